//! # Commits, each acknowledged
//!
//! A commit's `seq` is used up by its acknowledgement and not before, so the log of an incarnation is 1, 2, 3 …
//! without a gap, and at most one commit of a killed incarnation is not in it.

use std::time::Instant;

use rusqlite::Transaction;

use super::Result;
use super::acklog::Entry;
use super::board::{self, CommitId, Event};
use super::job::Job;
use super::session::{Session, Signal, nanoseconds, say};

/// A worker's session and the id of its next commit.
pub(crate) struct Committer {
    pub(crate) session: Session,
    /// The next commit.
    id: CommitId,
}

impl Committer {
    /// Begins a session and migrates the schema with all the others. None if told to stop before.
    pub(crate) fn begin(job: &Job) -> Result<Option<Self>> {
        let Some(session) = Session::begin(job)? else { return Ok(None) };
        let id = CommitId { worker: job.number, incarnation: job.incarnation, seq: 1 };
        let mut committer = Self { session, id };
        while committer.commit(board::migrate)? {}
        say(&Signal::Migrated);
        Ok(Some(committer))
    }

    /// The last commit that was acknowledged; `seq` is 0 if none was.
    pub(crate) fn acknowledged(&self) -> CommitId {
        CommitId { seq: self.id.seq - 1, ..self.id }
    }

    /// One write transaction, tried until it commits, then acknowledged. False if there was nothing to do, or
    /// if told to stop.
    pub(crate) fn commit(
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
