//! A backup by shell script, while the app writes: `flock` and `cp`.
//!
//! ## What changes
//!
//! ```diff
//!  # a copy may be torn: the app can write while cp reads
//! -cp kanban.db backup.db && cp kanban.db-wal backup.db-wal
//!  # a copy is whole: no write transaction runs until flock has given the lock back
//! +flock kanban.db.lock sh -c 'cp kanban.db backup.db && cp kanban.db-wal backup.db-wal'
//! ```
//!
//! In the app, as in `adopt_by_uri.rs`:
//!
//! ```diff
//! +kanbanlock::register()?;
//! -let db = Connection::open("kanban.db")?;
//! +let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
//! ```
//!
//! ## What to know
//!
//! - First the database, then `-wal`. Meanwhile a checkpoint may copy pages from the WAL into the database; they
//!   are in the WAL that is copied afterwards, too. Do not copy `-shm`: it is made anew from the WAL.
//! - Every process that writes must go through kanbanlock. The lock file does not stop the others.
//! - While the script runs, writers wait; give them a busy timeout that is longer than the copy. Readers go on.
//! - If no connection is open there is usually no `-wal`, and the database is whole without it. A `backup.db-wal`
//!   of an earlier backup would then be replayed into the new copy, so remove it. For a cron job:
//!
//!   ```sh
//!   flock kanban.db.lock sh -c 'rm -f backup.db-wal && cp kanban.db backup.db &&
//!       if [ -e kanban.db-wal ]; then cp kanban.db-wal backup.db-wal; fi'
//!   ```
//!
//! - In a rollback journal mode, put `-journal` for `-wal`: a journal that is there while the lock is held was
//!   left by a writer that died, and belongs to the copy.
//! - Copy in another process, as `cp` is. In the app itself, `std::fs::copy` closes a descriptor of the database
//!   file, and close(2) cancels the locks that SQLite has on it. <https://www.sqlite.org/howtocorrupt.html>
//!
//! ## Run
//!
//! `cargo run --example shell_backup`, with flock(1) installed (util-linux).

mod shared;

use std::env;
use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use shared::{ChildGuard, check, is_locked};

/// While the app is running.
const BACKUP: &str = "flock kanban.db.lock sh -c 'cp kanban.db backup.db && cp kanban.db-wal backup.db-wal'";

/// Whether it is running or not.
const BACKUP_FOR_CRON: &str = "
flock kanban.db.lock sh -c 'rm -f backup.db-wal && cp kanban.db backup.db &&
    if [ -e kanban.db-wal ]; then cp kanban.db-wal backup.db-wal; fi'";

/// Keeps the lock until its standard input is closed.
const HOLD: &str = "flock kanban.db.lock sh -c 'echo locked; cat'";

fn main() -> Result<(), Box<dyn Error>> {
    match env::args_os().nth(1) {
        None => demonstrate(),
        Some(role) if role == "write" => write_until_nobody_reads(),
        Some(other) => Err(format!("unknown argument {other:?}: run this example without arguments").into()),
    }
}

fn demonstrate() -> Result<(), Box<dyn Error>> {
    if !is_flock_installed()? {
        writeln!(io::stdout(), "skipped: there is no flock(1) here; install util-linux")?;
        return Ok(());
    }
    let _dir = shared::enter_fresh_dir()?;

    let mut writer = Writer::start()?;
    writer.await_commit(200)?;
    let acknowledged = writer.last_commit();
    check("a process writes continually; at least 200 of its commits are acknowledged", acknowledged >= 200)?;

    check("flock kanban.db.lock sh -c 'cp kanban.db … && cp kanban.db-wal …' makes a copy", run(BACKUP)?)?;
    let copied = commits_in_copy()?;
    check("every commit that was acknowledged before it began is in the copy", copied >= acknowledged)?;
    writer.await_commit(copied + 1)?;
    check("the process writes on", writer.last_commit() > copied)?;
    check("another copy is made, but not opened: its -wal stays", run(BACKUP)? && exists("backup.db-wal"))?;

    writer.stop()?;
    let db = open_kanban()?;
    let tasks: i64 = db.query_row("SELECT count(*) FROM task", (), |row| row.get(0))?;
    excludes_each_other(&db)?;
    drop(db);

    check(
        "a copy is made with no connection open: there is no -wal",
        !exists("kanban.db-wal") && run(BACKUP_FOR_CRON)?,
    )?;
    check("it is whole without one, and not mixed up with the old copy's", commits_in_copy()? == tasks)
}

/// A write transaction keeps scripts waiting, and a script keeps write transactions waiting.
fn excludes_each_other(db: &Connection) -> Result<(), Box<dyn Error>> {
    const TRY: &str = "flock -n kanban.db.lock true";
    db.execute_batch("BEGIN IMMEDIATE")?;
    check("while a write transaction runs, a script cannot have the lock", !run(TRY)?)?;
    db.execute_batch("ROLLBACK")?;

    db.busy_timeout(Duration::ZERO)?;
    let mut command = Command::new("sh");
    let child = command.args(["-c", HOLD]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut script = ChildGuard(child);
    let stdout = script.0.stdout.take().ok_or("the script has no standard output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    check("afterwards it can, and holds it", line == "locked\n" && is_locked("kanban.db")?)?;

    let write = db.execute("DELETE FROM task", ());
    let is_busy = write.is_err_and(|error| error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy));
    check("then a write gets SQLITE_BUSY: this connection was told not to wait", is_busy)?;
    let tasks: i64 = db.query_row("SELECT count(*) FROM task", (), |row| row.get(0))?;
    check("and a read works", tasks > 0)?;

    drop(script.0.stdin.take());
    let ended = script.0.wait()?;
    check("when the script ends, the lock is free", ended.success() && !is_locked("kanban.db")?)
}

fn exists(path: &str) -> bool {
    Path::new(path).exists()
}

/// Runs one of the scripts above. True if it succeeds.
fn run(script: &str) -> io::Result<bool> {
    Ok(Command::new("sh").args(["-c", script]).status()?.success())
}

fn is_flock_installed() -> io::Result<bool> {
    match Command::new("flock").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// How many of the writer's commits are in the copy, which is opened as any database is. An error if it is not
/// whole: not sound, a commit missing before the last, or half of one.
fn commits_in_copy() -> Result<i64, Box<dyn Error>> {
    let copy = Connection::open("backup.db")?;
    let verdict: String = copy.query_row("PRAGMA integrity_check", (), |row| row.get(0))?;
    if verdict != "ok" {
        return Err(format!("the copy is damaged: {verdict}").into());
    }
    let (tasks, last, total): (i64, i64, i64) = copy.query_row(
        "SELECT count(*), coalesce(max(number), 0), (SELECT tasks FROM total) FROM task",
        (),
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;
    if (tasks, total) != (last, last) {
        return Err(format!("the copy has {tasks} tasks, the last is {last}, the total is {total}").into());
    }
    Ok(tasks)
}

fn open_kanban() -> Result<Connection, Box<dyn Error>> {
    kanbanlock::register()?;
    let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
    db.busy_timeout(Duration::from_secs(60))?; // longer than a backup takes
    Ok(db)
}

/// The other process: an app that writes. It acknowledges each commit with a line, and ends when nobody reads
/// them any more.
fn write_until_nobody_reads() -> Result<(), Box<dyn Error>> {
    let mut db = open_kanban()?;
    db.execute_batch(
        "PRAGMA journal_mode = WAL;
         PRAGMA wal_autocheckpoint = 20; -- often, so that the backup meets checkpoints, too
         CREATE TABLE task (number INTEGER PRIMARY KEY, notes TEXT);
         CREATE TABLE total (tasks INTEGER);
         INSERT INTO total VALUES (0)",
    )?;
    loop {
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute("UPDATE total SET tasks = tasks + 1", ())?;
        tx.execute("INSERT INTO task (notes) VALUES (hex(randomblob(500)))", ())?;
        let number = tx.last_insert_rowid();
        tx.commit()?;
        match writeln!(io::stdout(), "{number}") {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
    }
}

/// The first process's side of it.
struct Writer {
    process: ChildGuard,
    acknowledgements: Receiver<i64>,
    last: i64,
}

impl Writer {
    fn start() -> Result<Writer, Box<dyn Error>> {
        let child = Command::new(env::current_exe()?).arg("write").stdout(Stdio::piped()).spawn()?;
        let mut process = ChildGuard(child);
        let stdout = process.0.stdout.take().ok_or("the writer has no standard output")?;
        let (sender, acknowledgements) = mpsc::channel();
        // A thread reads the lines at once: the writer must not have to wait for a pipe that is full.
        thread::spawn(move || {
            let lines = BufReader::new(stdout).lines();
            let numbers = lines.map_while(|line| line.ok()?.parse().ok());
            numbers.map_while(|number| sender.send(number).ok()).for_each(drop)
        });
        Ok(Writer { process, acknowledgements, last: 0 })
    }

    /// Returns when commit `number` has been acknowledged.
    fn await_commit(&mut self, number: i64) -> Result<(), Box<dyn Error>> {
        while self.last < number {
            self.last = self.acknowledgements.recv().map_err(|_| "the writer ended too early")?;
        }
        Ok(())
    }

    /// The last commit acknowledged so far.
    fn last_commit(&mut self) -> i64 {
        self.last = self.acknowledgements.try_iter().last().unwrap_or(self.last);
        self.last
    }

    /// Stops reading, so that the writer ends, and waits until it has.
    fn stop(self) -> Result<(), Box<dyn Error>> {
        let Writer { mut process, acknowledgements, .. } = self;
        drop(acknowledgements);
        let status = process.0.wait()?;
        if !status.success() {
            return Err(format!("the writer failed: {status}").into());
        }
        Ok(())
    }
}
