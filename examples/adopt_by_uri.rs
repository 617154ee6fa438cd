//! Adopting kanbanlock for some connections of an app: name the VFS in the URI.
//!
//! ## What changes
//!
//! ```diff
//!  fn main() -> Result<(), Box<dyn Error>> {
//! -    let db = Connection::open("kanban.db")?;
//! +    kanbanlock::register()?; // once, at start-up
//! +    let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
//! ```
//!
//! ## What to know
//!
//! - `open_with_flags` needs `OpenFlags::SQLITE_OPEN_URI` among its flags (`Connection::open` has it). Without
//!   it some builds of SQLite create a file that is really named `file:kanban.db?vfs=kanbanlock`.
//! - A URI is not a path: `?`, `#` and `%` in a file's name are written `%3f`, `%23` and `%25`. For a path that
//!   is only known at run time, name the VFS beside it instead: `open_with_flags_and_vfs`.
//! - It fails closed. If the registration was forgotten, the open fails; so it does if a `kanbanlock_…`
//!   parameter is misspelt. <https://www.sqlite.org/uri.html>
//! - Connections that do not name the VFS do not use it: `adopt_by_default.rs`.
//!
//! ## Run
//!
//! `cargo run --example adopt_by_uri`

mod shared;

use std::error::Error;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior};
use shared::{check, is_locked};

fn main() -> Result<(), Box<dyn Error>> {
    let _dir = shared::enter_fresh_dir()?;

    let forgotten = Connection::open("file:kanban.db?vfs=kanbanlock");
    let says_why = forgotten.is_err_and(|error| error.to_string().contains("no such vfs: kanbanlock"));
    check("without register(), the open fails: no such vfs: kanbanlock", says_why)?;

    kanbanlock::register()?;

    let mut db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
    check("with it, the connection goes through kanbanlock", goes_through_kanbanlock(&db)?)?;
    let plain = Connection::open("kanban.db")?;
    check("a connection by plain path does not", !goes_through_kanbanlock(&plain)?)?;

    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    tx.execute_batch("CREATE TABLE task (title TEXT); INSERT INTO task VALUES ('adopt kanbanlock')")?;
    check("in a write transaction kanban.db.lock is locked", is_locked("kanban.db")?)?;
    tx.commit()?;
    check("after COMMIT it is free", !is_locked("kanban.db")?)?;

    // The same file twice: escaped in a URI, and as a path with the VFS named beside it.
    let by_uri = Connection::open("file:50%25 done%3f.db?vfs=kanbanlock")?;
    let by_path = Connection::open_with_flags_and_vfs("50% done?.db", OpenFlags::default(), "kanbanlock")?;
    by_uri.execute_batch("BEGIN IMMEDIATE; CREATE TABLE task (title TEXT)")?;
    check("50%25 done%3f.db in a URI is the file '50% done?.db'", is_locked("50% done?.db")?)?;
    by_uri.execute_batch("COMMIT")?;
    by_path.execute("INSERT INTO task VALUES ('escape names')", ())?;
    check(
        "and can be opened by that path, with the VFS named beside it",
        goes_through_kanbanlock(&by_path)?,
    )?;

    let misspelt = Connection::open("file:kanban.db?vfs=kanbanlock&kanbanlock_chekpoint=gate");
    let cannot_open = misspelt.is_err_and(|e| e.sqlite_error_code() == Some(ErrorCode::CannotOpen));
    check("a misspelt kanbanlock_ parameter fails the open", cannot_open)
}

fn goes_through_kanbanlock(db: &Connection) -> rusqlite::Result<bool> {
    let status: Option<String> = db.query_row("PRAGMA kanbanlock", (), |row| row.get(0)).optional()?;
    Ok(status.is_some())
}
