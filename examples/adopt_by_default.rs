//! Adopting kanbanlock in an app that opens its database by plain path: make it the default VFS.
//!
//! One line at start-up. No other line of the app changes, those inside libraries that open connections of
//! their own included.
//!
//! ## What changes
//!
//! ```diff
//!  fn main() -> Result<(), Box<dyn Error>> {
//! +    kanbanlock::Options::new().make_default(true).register()?;
//!      let db = Connection::open("kanban.db")?;
//! ```
//!
//! ## What to know
//!
//! - Register before the first connection is opened. A connection keeps the VFS that it was opened with.
//! - Every database that this process opens from then on gets a `<db>.lock` at its first write. In-memory and
//!   temporary databases do not. If that is too much, name the VFS where it is wanted: `adopt_by_uri.rs`.
//! - It is the default of this copy of SQLite in this process. Other processes need the line too; a process
//!   without it is excluded by SQLite's own locks alone, as ever.
//! - `PRAGMA kanbanlock` tells whether a connection goes through kanbanlock: one row if it does, none if not.
//!
//! ## Run
//!
//! `cargo run --example adopt_by_default`

mod shared;

use std::error::Error;
use std::path::Path;

use rusqlite::{Connection, OptionalExtension};
use shared::{check, is_locked};

fn main() -> Result<(), Box<dyn Error>> {
    let _dir = shared::enter_fresh_dir()?;

    let before = open_kanban()?;
    before.execute_batch("CREATE TABLE task (title TEXT); INSERT INTO task VALUES ('adopt kanbanlock')")?;
    let no_lock_file = !Path::new("kanban.db.lock").exists();
    check("before: the app writes without a lock file", no_lock_file)?;

    kanbanlock::Options::new().make_default(true).register()?;

    let db = open_kanban()?;
    check("after: the same code opens a connection through kanbanlock", goes_through_kanbanlock(&db)?)?;
    check("a connection from before the registration stays as it was", !goes_through_kanbanlock(&before)?)?;

    // SQLite's default transaction begins as a reader, and takes a write lock at its first write.
    db.execute_batch("BEGIN")?;
    let tasks: i64 = db.query_row("SELECT count(*) FROM task", (), |row| row.get(0))?;
    check("reading does not touch kanban.db.lock", tasks == 1 && !Path::new("kanban.db.lock").exists())?;
    db.execute("INSERT INTO task VALUES ('write docs')", ())?;
    check("from the first write on, kanban.db.lock is locked", is_locked("kanban.db")?)?;
    db.execute_batch("COMMIT")?;
    check("after COMMIT it is free", !is_locked("kanban.db")?)?;

    db.execute_batch("BEGIN; CREATE TABLE column (title TEXT)")?;
    check("CREATE TABLE locks it as well", is_locked("kanban.db")?)?;
    db.execute_batch("ROLLBACK")?;
    check("after ROLLBACK it is free", !is_locked("kanban.db")?)?;

    let acquired_before = kanbanlock::stats().acquired;
    db.execute("INSERT INTO task VALUES ('ship it')", ())?;
    let acquired = kanbanlock::stats().acquired - acquired_before;
    check("a statement by itself is a transaction: it takes the lock once", acquired == 1)?;
    check("and gives it back", !is_locked("kanban.db")?)
}

/// The app's own code: it knows nothing of kanbanlock.
fn open_kanban() -> rusqlite::Result<Connection> {
    Connection::open("kanban.db")
}

fn goes_through_kanbanlock(db: &Connection) -> rusqlite::Result<bool> {
    let status: Option<String> = db.query_row("PRAGMA kanbanlock", (), |row| row.get(0)).optional()?;
    Ok(status.is_some())
}
