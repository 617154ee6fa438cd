//! # A reader process
//!
//! Reads the board in deferred transactions of several statements. Inside one snapshot the counters must be
//! what they count, and must be the same at its end as at its beginning.

use std::time::Instant;

use rusqlite::Connection;

use super::Result;
use super::acklog::Entry;
use super::board::{self, Counted};
use super::job::Job;
use super::session::{Session, nanoseconds};

/// The process: returns when told to stop.
pub(crate) fn run(job: &Job) -> Result<()> {
    let Some(mut session) = Session::begin(job)? else { return Ok(()) };
    let mut counted = Counted::default();
    while !session.think() {
        let begin = Instant::now();
        let Some((now, violations)) = session.retry(|conn| snapshot(conn, counted))? else { break };
        counted = now;
        if violations.is_empty() {
            session.log.append(&Entry::Snapshot { ns: nanoseconds(begin)? })?;
        }
        for violation in violations {
            session.log.append(&Entry::Violation(violation))?;
        }
    }
    Ok(())
}

/// One read transaction: the events counted so far, and what is wrong in this snapshot.
fn snapshot(conn: &mut Connection, counted: Counted) -> rusqlite::Result<(Counted, Vec<String>)> {
    let tx = conn.transaction()?;
    let counted = counted.advance(&tx)?;
    let mut violations = board::disagreements(&tx, counted, false)?;
    if counted.advance(&tx)? != counted {
        violations.push("events appeared inside a snapshot".to_owned());
    }
    tx.commit()?;
    Ok((counted, violations))
}
