//! # A worker process
//!
//! Migrates the schema with all the others, then does one step after the other until told to stop. A commit's
//! `seq` is used up by its acknowledgement and not before, so the log of an incarnation is 1, 2, 3 … without a
//! gap, and at most one commit of a killed incarnation is not in it.

use std::time::{Duration, Instant};

use rusqlite::Transaction;

use crate::Result;
use crate::acklog::Entry;
use crate::board::{self, CommitId, Event};
use crate::options::Job;
use crate::session::{Session, Signal, nanoseconds, say};

/// How often the parent hears of the progress.
const PROGRESS: Duration = Duration::from_millis(200);

struct Worker {
    session: Session,
    /// The next commit.
    id: CommitId,
}

/// The process: returns when told to stop.
pub(crate) fn run(job: &Job) -> Result<()> {
    let Some(session) = Session::begin(job)? else { return Ok(()) };
    let id = CommitId { worker: job.number, incarnation: job.incarnation, seq: 1 };
    let mut worker = Worker { session, id };
    while worker.commit(board::migrate)? {}
    say(&Signal::Migrated);

    let mut told = Instant::now();
    while !worker.session.think() {
        worker.commit(board::work)?;
        if told.elapsed() >= PROGRESS {
            say(&Signal::Commits(worker.id.seq.unsigned_abs() - 1));
            told = Instant::now();
        }
    }
    Ok(())
}

impl Worker {
    /// One write transaction, tried until it commits, then acknowledged. False if there was nothing to do, or
    /// if told to stop.
    fn commit(
        &mut self,
        step: fn(&Transaction<'_>, CommitId) -> rusqlite::Result<Option<Event>>,
    ) -> Result<bool> {
        let (id, begin) = (self.id, Instant::now());
        let committed = self.session.retry(|conn| board::commit(conn, id, step))? == Some(true);
        if committed {
            self.session.log.append(&Entry::Commit { seq: id.seq, ns: nanoseconds(begin)? })?;
            self.id.seq += 1;
        }
        Ok(committed)
    }
}
