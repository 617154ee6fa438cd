//! # A child process' side: barrier, connection, retry
//!
//! ```text
//! parent                                   child
//!   │ ◄──────────── Ready ─────────────────  │   started, nothing opened yet
//!   │ ───────────── a line ────────────────► │   the barrier: all are released at once
//!   │ ◄──── Migrated, Commits, Failed ─────  │
//!   │ ───────── end of file ───────────────► │   stop
//! ```
//!
//! The child writes [`Signal`]s to its stdout, one JSON line each. End of file on stdin means stop, and comes
//! just as well when the parent dies, however it dies: no orphan outlives its current transaction.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use super::Result;
use super::acklog::{AckLog, Entry};
use super::board::{self, Database};
use super::job::{self, Job};

/// What a child tells its parent.
#[derive(Serialize, Deserialize)]
pub(crate) enum Signal {
    /// Waiting for the release.
    Ready,
    /// The schema is complete.
    Migrated,
    /// Commits so far, for the progress bar only.
    Commits(u64),
    /// The process ends because of this.
    Failed(String),
}

/// Sends a signal. A parent that is gone cannot be told; its death is noticed as end of file on stdin.
pub(crate) fn say(signal: &Signal) {
    if let Ok(line) = serde_json::to_string(signal) {
        let _ = writeln!(io::stdout(), "{line}");
    }
}

/// A released child process, with its connection and its log.
pub(crate) struct Session {
    pub(crate) log: AckLog,
    database: Database,
    /// Opened when it is needed.
    conn: Option<Connection>,
    /// The journal mode is not set yet.
    opening: bool,
    stop: Receiver<Infallible>,
    think: Duration,
}

impl Session {
    /// Waits for the release, then opens and configures the connection. None if told to stop before.
    pub(crate) fn begin(job: &Job) -> Result<Option<Self>> {
        say(&Signal::Ready);
        if io::stdin().read_line(&mut String::new())? == 0 {
            return Ok(None);
        }
        let (log, database) = (AckLog::create(&job.log)?, job.database.clone());
        let mut session =
            Self { log, database, conn: None, opening: true, stop: watch_stdin(), think: job.think };
        let Some(mode) = session.retry(|conn| job.database.configure(conn))? else { return Ok(None) };
        if let Some(wanted) = job.database.journal.map(job::name).filter(|wanted| *wanted != mode) {
            return Err(format!("journal mode {wanted} was asked for, SQLite stays in {mode}").into());
        }
        session.opening = false;
        Ok(Some(session))
    }

    /// Calls `operation` until it does not return SQLITE_BUSY, and logs each time it does. The waiting is done
    /// inside, by SQLite's busy handler. None if told to stop.
    pub(crate) fn retry<T>(
        &mut self,
        mut operation: impl FnMut(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        while !self.stopped(Duration::ZERO) {
            if let Some(value) = self.attempt(&mut operation)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Calls `operation` once. None if that is SQLITE_BUSY, which is logged.
    pub(crate) fn attempt<T>(
        &mut self,
        operation: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        let begin = Instant::now();
        let conn = match &mut self.conn {
            Some(conn) => conn,
            None => self.conn.insert(self.database.open()?),
        };
        match operation(conn) {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                let code = board::busy_code(&error).ok_or_else(|| board::explain(&error))?;
                self.log.append(&Entry::Busy { opening: self.opening, code, ns: nanoseconds(begin)? })?;
                Ok(None)
            }
        }
    }

    /// Closes the connection until it is needed again.
    #[allow(dead_code, reason = "the soak's")]
    pub(crate) fn close(&mut self) {
        self.conn = None;
    }

    /// The think time between two transactions; true if it is time to stop.
    pub(crate) fn think(&self) -> bool {
        self.stopped(self.think)
    }

    fn stopped(&self, patience: Duration) -> bool {
        matches!(self.stop.recv_timeout(patience), Err(RecvTimeoutError::Disconnected))
    }
}

/// The time since then, as the logs have it.
pub(crate) fn nanoseconds(since: Instant) -> Result<u64> {
    Ok(u64::try_from(since.elapsed().as_nanos())?)
}

/// A channel that nothing is sent on, and that is disconnected at the end of stdin.
fn watch_stdin() -> Receiver<Infallible> {
    let (open, stop) = mpsc::channel();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        drop(open);
    });
    stop
}
