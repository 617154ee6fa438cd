//! Adopting kanbanlock in an app with diesel.
//!
//! ## What changes
//!
//! ```diff
//!  fn main() -> Result<(), Box<dyn Error>> {
//! +    kanbanlock::register()?; // once, at start-up
//!  …
//! -    let mut db = SqliteConnection::establish("kanban.db")?;
//! +    let mut db = SqliteConnection::establish("file:kanban.db?vfs=kanbanlock")?;
//! +    db.batch_execute("PRAGMA busy_timeout = 30000")?;
//! ```
//!
//! And where a transaction reads before it writes, with kanbanlock or without:
//!
//! ```diff
//! -    db.transaction(|db| {
//! +    db.immediate_transaction(|db| {
//! ```
//!
//! ## What to know
//!
//! - diesel sets no busy timeout: a write that meets another's is SQLITE_BUSY at once ("database is locked").
//! - `transaction` is `BEGIN DEFERRED`: what it writes after it has read may get SQLITE_BUSY whatever the timeout.
//! - If the URL comes from `DATABASE_URL`, diesel's command-line tool reads it too, and has no such VFS. Leave the
//!   variable as it is, and make kanbanlock the default:
//!   `kanbanlock::Options::new().make_default(true).register()?` (`examples/adopt_by_default.rs`).
//! - diesel uses the system's SQLite, unless the app depends on `libsqlite3-sys` with the feature `bundled`. Either
//!   will do.
//!
//! ## Run
//!
//! `cargo run --manifest-path examples/stacks/diesel_app/Cargo.toml`

#[path = "../../../shared/mod.rs"]
mod shared;

use std::error::Error;
use std::thread;

use diesel::connection::SimpleConnection;
use diesel::dsl::max;
use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error as DieselError};
// The bundled SQLite is linked in, instead of the system's.
use libsqlite3_sys as _;
use shared::{check, is_locked};

diesel::table! {
    task (number) {
        number -> Integer,
        title -> Text,
    }
}

#[derive(Insertable)]
#[diesel(table_name = task)]
struct NewTask<'a> {
    number: i32,
    title: &'a str,
}

type Failure = Box<dyn Error + Send + Sync>;

const WORKERS: usize = 4;
const TASKS_EACH: usize = 25;

fn main() -> Result<(), Box<dyn Error>> {
    let _dir = shared::enter_fresh_dir()?;

    kanbanlock::register()?; // once, at start-up
    let mut db = connect()?;
    db.batch_execute("PRAGMA journal_mode = WAL")?;
    let locked_in_migration = db.immediate_transaction(|db| -> Result<bool, Box<dyn Error>> {
        db.batch_execute("CREATE TABLE task (number INTEGER PRIMARY KEY, title TEXT NOT NULL)")?;
        Ok(is_locked("kanban.db")?)
    })?;
    check("in a migration kanban.db.lock is locked", locked_in_migration)?;
    check("after it, it is free", !is_locked("kanban.db")?)?;

    let acquired_before = kanbanlock::stats().acquired;
    thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(add_tasks)).collect();
        for worker in workers {
            let done = worker.join().map_err(|_| "a worker panicked")?;
            done.map_err(|error| -> Box<dyn Error> { error })?;
        }
        Ok(())
    })?;
    let acquired = kanbanlock::stats().acquired - acquired_before;
    check("in each of 100 transactions it was locked", acquired >= 100)?;
    let all = i32::try_from(WORKERS * TASKS_EACH)?;
    let numbers: Vec<i32> = task::table.select(task::number).order(task::number).load(&mut db)?;
    check("4 workers have added 25 tasks each: numbers 1 to 100", numbers.into_iter().eq(1..=all))?;

    let locked_in_read = db.transaction(|db| -> Result<bool, Box<dyn Error>> {
        let _: i64 = task::table.count().get_result(db)?;
        Ok(is_locked("kanban.db")?)
    })?;
    check("a transaction that reads leaves it free", !locked_in_read)?;

    let mut impatient = SqliteConnection::establish("file:kanban.db?vfs=kanbanlock")?;
    let refused = db.immediate_transaction(|_| -> Result<bool, Box<dyn Error>> {
        let written = diesel::delete(task::table).execute(&mut impatient);
        Ok(matches!(written, Err(DieselError::DatabaseError(DatabaseErrorKind::Unknown, why)) if why.message() == "database is locked"))
    })?;
    check("without a busy timeout a write beside another's is refused: database is locked", refused)
}

fn connect() -> ConnectionResult<SqliteConnection> {
    let mut db = SqliteConnection::establish("file:kanban.db?vfs=kanbanlock")?;
    db.batch_execute("PRAGMA busy_timeout = 30000").map_err(ConnectionError::CouldntSetupConfiguration)?;
    Ok(db)
}

/// One of the workers: each task is a write transaction.
fn add_tasks() -> Result<(), Failure> {
    let mut db = connect()?;
    for _ in 0..TASKS_EACH {
        db.immediate_transaction(|db| -> Result<(), Failure> {
            if !is_locked("kanban.db")? {
                return Err("kanban.db.lock is free in a write transaction".into());
            }
            let last: Option<i32> = task::table.select(max(task::number)).first(db)?;
            let new = NewTask { number: last.unwrap_or(0) + 1, title: "adopt kanbanlock" };
            diesel::insert_into(task::table).values(&new).execute(db)?;
            Ok(())
        })?;
    }
    Ok(())
}
