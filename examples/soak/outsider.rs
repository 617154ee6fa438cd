//! # The outsider: holds the flock, and watches that nothing is written
//!
//! Takes `flock(LOCK_EX)` on `<db>.lock` as flock(1) or any program could, and looks at the database twice. In
//! between no transaction may commit, and neither the WAL nor the rollback journal may change.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fastrand::Rng;
use rusqlite::{Connection, OptionalExtension as _};

use crate::Result;
use crate::acklog::Entry;
use crate::job::Job;
use crate::place::beside;
use crate::session::{Session, nanoseconds};

/// The time between two holds, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 50..400;
/// How long the flock is held at least, in milliseconds: workload, as any backup would take its time.
const HOLD_MS: std::ops::Range<u64> = 1..60;
/// A hot journal cannot be rolled back while we hold the flock, so there is no use in waiting for that.
const BUSY_TIMEOUT: Duration = Duration::from_millis(50);

/// What may not change under the flock.
struct Seen {
    /// How many events, and the last one's id. None if it was SQLITE_BUSY or before the first migration.
    events: Option<(i64, Option<i64>)>,
    wal: Content,
    journal: Content,
}

/// A file's size and modification time; an empty one is as good as none.
type Content = Option<(u64, SystemTime)>;

/// The process: returns when told to stop.
pub(crate) fn run(job: &Job) -> Result<()> {
    let mut job = job.clone();
    job.database.busy_timeout = BUSY_TIMEOUT;
    let mut random = Rng::with_seed(job.seed);
    job.think = Duration::from_millis(random.u64(PAUSE_MS));
    let Some(mut session) = Session::begin(&job)? else { return Ok(()) };
    let db = &job.database.path;
    while !session.think() {
        let Ok(lock_file) = File::open(beside(db, ".lock")) else { continue };
        lock_file.lock()?;
        let begin = Instant::now();
        let hold = Duration::from_millis(random.u64(HOLD_MS));
        let change = watch(&mut session, db, hold)?;
        // SQLite's own closing is watched, too.
        session.close();
        drop(lock_file);
        session.log.append(&Entry::Did { what: "hold of the flock".to_owned(), count: 1 })?;
        let found = match change {
            Some(change) => Entry::Violation(change),
            None => Entry::Snapshot { ns: nanoseconds(begin)? },
        };
        session.log.append(&found)?;
    }
    Ok(())
}

/// Looks twice, the flock being held.
fn watch(session: &mut Session, db: &Path, hold: Duration) -> Result<Option<String>> {
    let before = look(session, db)?;
    thread::sleep(hold);
    let after = look(session, db)?;
    Ok(change(&before, &after).map(|what| format!("{what}, under the outsider's flock of {hold:?}")))
}

/// What is not as it was; a look that was SQLITE_BUSY says nothing.
fn change(before: &Seen, after: &Seen) -> Option<String> {
    match (&before.events, &after.events) {
        (Some(before), Some(after)) if before != after => {
            Some(format!("events went from {before:?} to {after:?}"))
        }
        _ if before.wal != after.wal => Some("the WAL changed".to_owned()),
        _ if before.journal != after.journal => Some("the rollback journal changed".to_owned()),
        _ => None,
    }
}

fn look(session: &mut Session, db: &Path) -> Result<Seen> {
    let events = session.attempt(|conn| events(conn))?.flatten();
    Ok(Seen { events, wal: content(&beside(db, "-wal"))?, journal: content(&beside(db, "-journal"))? })
}

/// None before the first migration.
fn events(conn: &Connection) -> rusqlite::Result<Option<(i64, Option<i64>)>> {
    let exists: Option<i64> = conn
        .query_row("SELECT 1 FROM sqlite_schema WHERE name = 'task_events'", [], |row| row.get(0))
        .optional()?;
    match exists {
        None => Ok(None),
        Some(_) => conn
            .query_row("SELECT count(*), max(id) FROM task_events", [], |row| Ok((row.get(0)?, row.get(1)?)))
            .map(Some),
    }
}

fn content(path: &Path) -> io::Result<Content> {
    match fs::metadata(path) {
        Ok(file) if file.len() > 0 => Ok(Some((file.len(), file.modified()?))),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
