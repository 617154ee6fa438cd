//! Adopting kanbanlock in an app that sets a busy timeout: the timeout now covers the lock file as well.
//!
//! ## What changes
//!
//! ```diff
//! +kanbanlock::register()?;
//! -let db = Connection::open("kanban.db")?;
//! +let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
//!  db.busy_timeout(Duration::from_secs(60))?;
//! ```
//!
//! ## What to know
//!
//! - While another holds the lock, kanbanlock answers SQLITE_BUSY, as the unix VFS does. SQLite then calls its
//!   busy handler and tries again, so `busy_timeout`, `PRAGMA busy_timeout` and busy handlers of your own work
//!   as they did.
//! - rusqlite sets 5 seconds on each connection it opens; SQLite itself, and most other drivers, set none.
//! - No timeout helps a transaction that begins as a reader (`BEGIN`, `BEGIN DEFERRED`) and then writes, if
//!   another has written meanwhile: what it has read is out of date. Only the app can start it again. Use `BEGIN
//!   IMMEDIATE` for whatever will write.
//!
//! ## How it is shown
//!
//! Two processes: this one, and a copy of it that holds a write transaction until its standard input is closed.
//!
//! ## Run
//!
//! `cargo run --example busy_timeout`

mod shared;

use std::env;
use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rusqlite::{Connection, ffi};
use shared::{ChildGuard, check, is_locked};

fn main() -> Result<(), Box<dyn Error>> {
    match env::args_os().nth(1) {
        None => demonstrate(),
        Some(role) if role == "hold" => hold(),
        Some(other) => Err(format!("unknown argument {other:?}: run this example without arguments").into()),
    }
}

fn demonstrate() -> Result<(), Box<dyn Error>> {
    let _dir = shared::enter_fresh_dir()?;
    let db = open_kanban()?;
    db.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE task (title TEXT)")?;

    let other_process = start_holder()?;
    check("another process is in a write transaction: kanban.db.lock is locked", is_locked("kanban.db")?)?;

    db.busy_timeout(Duration::ZERO)?;
    let refused_before = kanbanlock::stats().refused;
    let code = result_code(db.execute("INSERT INTO task VALUES ('in a hurry')", ()));
    let tries = kanbanlock::stats().refused - refused_before;
    check(
        "busy timeout 0: a write gets SQLITE_BUSY at its first try",
        code == ffi::SQLITE_BUSY && tries == 1,
    )?;

    db.busy_timeout(Duration::from_secs(60))?;
    let refused_before = kanbanlock::stats().refused;
    let writing = thread::spawn(move || db.execute("INSERT INTO task VALUES ('patient')", ()).map(|_| db));
    while kanbanlock::stats().refused == refused_before && !writing.is_finished() {
        thread::yield_now(); // until it has been refused once: from then on it waits
    }
    check("busy timeout 60 seconds: a write is refused, and waits", !writing.is_finished())?;
    commit_and_wait(other_process)?;
    let db = writing.join().map_err(|_| "the writing thread panicked")??;
    check("the other process commits, and the write goes on", titles(&db)? == "held, patient")?;

    db.execute_batch("BEGIN; SELECT count(*) FROM task")?;
    open_kanban()?.execute("INSERT INTO task VALUES ('in between')", ())?;
    let code = result_code(db.execute("INSERT INTO task VALUES ('out of date')", ()));
    check("a reader that has become out of date cannot write: SQLITE_BUSY, whatever the timeout", {
        code == ffi::SQLITE_BUSY_SNAPSHOT
    })?;
    check("and kanban.db.lock is free", !is_locked("kanban.db")?)?;
    db.execute_batch("ROLLBACK; BEGIN IMMEDIATE; INSERT INTO task VALUES ('up to date'); COMMIT")?;
    check("begun again with BEGIN IMMEDIATE, it can", titles(&db)? == "held, patient, in between, up to date")
}

fn open_kanban() -> Result<Connection, Box<dyn Error>> {
    kanbanlock::register()?; // again with the same options: it changes nothing
    Ok(Connection::open("file:kanban.db?vfs=kanbanlock")?)
}

/// The tasks, oldest first.
fn titles(db: &Connection) -> rusqlite::Result<String> {
    db.query_row("SELECT group_concat(title, ', ' ORDER BY rowid) FROM task", (), |row| row.get(0))
}

/// SQLite's extended result code.
fn result_code<T>(result: rusqlite::Result<T>) -> i32 {
    match result {
        Ok(_) => ffi::SQLITE_OK,
        Err(error) => error.sqlite_error().map_or(ffi::SQLITE_ERROR, |error| error.extended_code),
    }
}

/// The other process: begins a write transaction, says so, and commits when its standard input is closed.
fn hold() -> Result<(), Box<dyn Error>> {
    let db = open_kanban()?;
    db.execute_batch("BEGIN IMMEDIATE; INSERT INTO task VALUES ('held')")?;
    writeln!(io::stdout(), "holding")?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    db.execute_batch("COMMIT")?;
    Ok(())
}

/// Starts it, and returns when it is in its transaction.
fn start_holder() -> Result<ChildGuard, Box<dyn Error>> {
    let mut command = Command::new(env::current_exe()?);
    let mut holder = ChildGuard(command.arg("hold").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let stdout = holder.0.stdout.take().ok_or("the other process has no standard output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line != "holding\n" {
        return Err("the other process ended too early".into());
    }
    Ok(holder)
}

/// Lets it commit, and returns when it has ended.
fn commit_and_wait(mut holder: ChildGuard) -> Result<(), Box<dyn Error>> {
    drop(holder.0.stdin.take());
    let status = holder.0.wait()?;
    if !status.success() {
        return Err(format!("the other process failed: {status}").into());
    }
    Ok(())
}
