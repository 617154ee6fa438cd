//! Adopting kanbanlock in an app that attaches a second database: each file has its own lock file, and a
//! transaction over both holds both.
//!
//! ## What changes
//!
//! ```diff
//! +kanbanlock::register()?;
//! -let db = Connection::open("kanban.db")?;
//! -db.execute_batch("ATTACH 'archive.db' AS archive")?;
//! +let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
//! +db.execute_batch("ATTACH 'file:archive.db?vfs=kanbanlock' AS archive")?;
//! ```
//!
//! ## What to know
//!
//! - ATTACH without `vfs=` takes the VFS that the connection was opened with: a plain `ATTACH 'archive.db'` in a
//!   connection through kanbanlock goes through it too.
//! - `BEGIN IMMEDIATE` locks every attached database, in the order in which they were attached. Attach in the
//!   same order everywhere, or two processes wait for each other until a busy timeout ends.
//! - In a rollback journal mode a transaction over several files is atomic, even through a crash: SQLite writes a
//!   super-journal. In WAL mode each file is atomic by itself, but a crash in the middle of COMMIT can leave one
//!   with the transaction and the other without. <https://www.sqlite.org/lang_attach.html>
//!
//! ## How it is shown
//!
//! A task moves from one database to the other, so it must always be in exactly one. A copy of this process is
//! killed while it commits the move. A limit on the size of its files sees to that (setrlimit(2), RLIMIT_FSIZE):
//! the archive grows beyond it, when the other file is written already.
//!
//! ## Run
//!
//! `cargo run --example attach`

mod shared;

use std::env;
use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use rusqlite::{Connection, OptionalExtension};
use shared::{check, is_locked};

/// Moves a task to the archive, together with a report of 300 kB.
const MOVE_TASK: &str = "
    INSERT INTO archive.task SELECT title, zeroblob(300000) FROM main.task;
    DELETE FROM main.task;
";

fn main() -> Result<(), Box<dyn Error>> {
    match env::args_os().nth(1) {
        None => demonstrate(),
        Some(role) if role == "move" => move_task(),
        Some(other) => Err(format!("unknown argument {other:?}: run this example without arguments").into()),
    }
}

fn demonstrate() -> Result<(), Box<dyn Error>> {
    let _dir = shared::enter_fresh_dir()?;
    let db = open_both()?;
    db.execute_batch(
        "CREATE TABLE main.task (title TEXT, report BLOB);
         CREATE TABLE archive.task (title TEXT, report BLOB);
         INSERT INTO main.task (title) VALUES ('write docs')",
    )?;
    check("the attached database goes through kanbanlock", goes_through_kanbanlock(&db, "archive")?)?;
    db.execute_batch("ATTACH 'plain.db' AS plain")?;
    check("and so would one that is attached by plain path", goes_through_kanbanlock(&db, "plain")?)?;
    db.execute_batch("DETACH plain")?;

    db.execute_batch("BEGIN IMMEDIATE")?;
    let both_locked = is_locked("kanban.db")? && is_locked("archive.db")?;
    check("in a write transaction kanban.db.lock and archive.db.lock are locked", both_locked)?;
    db.execute_batch(MOVE_TASK)?;
    db.execute_batch("ROLLBACK")?;
    let both_free = !is_locked("kanban.db")? && !is_locked("archive.db")?;
    check("after ROLLBACK both are free", both_free && tasks(&db)? == (1, 0))?;

    // Not one connection of ours may be open when we read a database file as a file: close(2) on it would cancel
    // the POSIX locks that SQLite has on it.
    drop(db);
    let before = fs::read("kanban.db")?;
    let status = move_task_with_files_limited()?;
    if status.signal() != Some(libc::SIGXFSZ) {
        return Err(format!("{status}, where death by SIGXFSZ was due: is that signal ignored here?").into());
    }
    let is_half_done = fs::read("kanban.db")? != before && fs::metadata("archive.db")?.len() < 300_000;
    check("a process is killed in COMMIT: kanban.db is written, archive.db is not", is_half_done)?;
    let names_both =
        |names: &String| names.contains("kanban.db-journal") && names.contains("archive.db-journal");
    check(
        "it leaves a super-journal that names the journals of both",
        super_journals()?.iter().any(names_both),
    )?;
    let both_free = !is_locked("kanban.db")? && !is_locked("archive.db")?;
    check("and both lock files free: a flock ends with its process", both_free)?;

    let db = open_both()?;
    check("the next reader rolls both back: the task is where it was", tasks(&db)? == (1, 0))?;
    check("and the super-journal is gone", super_journals()?.is_empty())?;

    move_task()?;
    check("without the limit the task is moved: it is in the archive only", tasks(&db)? == (0, 1))?;
    let both_free = !is_locked("kanban.db")? && !is_locked("archive.db")?;
    check("after COMMIT both lock files are free", both_free)
}

fn open_both() -> Result<Connection, Box<dyn Error>> {
    kanbanlock::register()?; // again with the same options: it changes nothing
    let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
    db.execute_batch("ATTACH 'file:archive.db?vfs=kanbanlock' AS archive")?;
    Ok(db)
}

fn move_task() -> Result<(), Box<dyn Error>> {
    let mut db = open_both()?;
    let tx = db.transaction()?;
    tx.execute_batch(MOVE_TASK)?;
    Ok(tx.commit()?)
}

/// `ulimit -f` counts in units of 512 bytes, or of 1024, depending on the shell: 32 or 64 kB.
fn move_task_with_files_limited() -> io::Result<ExitStatus> {
    let this_program = env::current_exe()?;
    Command::new("sh").args(["-c", "ulimit -f 64; exec \"$0\" move"]).arg(this_program).status()
}

/// How many tasks there are in each database.
fn tasks(db: &Connection) -> rusqlite::Result<(u32, u32)> {
    db.query_row("SELECT (SELECT count(*) FROM main.task), (SELECT count(*) FROM archive.task)", (), |row| {
        Ok((row.get(0)?, row.get(1)?))
    })
}

/// The content of each super-journal: the names of the journals that it binds together.
fn super_journals() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(".")? {
        let name = entry?.file_name();
        if name.to_string_lossy().starts_with("kanban.db-mj") {
            found.push(String::from_utf8_lossy(&fs::read(name)?).into_owned());
        }
    }
    Ok(found)
}

fn goes_through_kanbanlock(db: &Connection, schema: &str) -> rusqlite::Result<bool> {
    let status: Option<String> =
        db.query_row(&format!("PRAGMA {schema}.kanbanlock"), (), |row| row.get(0)).optional()?;
    Ok(status.is_some())
}
