//! # A worker process
//!
//! Migrates the schema with all the others, then does one step after the other until told to stop.

use std::time::{Duration, Instant};

use super::Result;
use super::board;
use super::committer::Committer;
use super::job::Job;
use super::session::{Signal, say};

/// How often the parent hears of the progress.
const PROGRESS: Duration = Duration::from_millis(200);

/// The process: returns when told to stop.
pub(crate) fn run(job: &Job) -> Result<()> {
    let Some(mut committer) = Committer::begin(job)? else { return Ok(()) };
    let mut told = Instant::now();
    while !committer.session.think() {
        committer.commit(board::work)?;
        if told.elapsed() >= PROGRESS {
            say(&Signal::Commits(committer.acknowledged().seq.unsigned_abs()));
            told = Instant::now();
        }
    }
    Ok(())
}
