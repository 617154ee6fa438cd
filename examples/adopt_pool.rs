//! Adopting kanbanlock in an app with a connection pool (r2d2, r2d2_sqlite).
//!
//! ## What changes
//!
//! ```diff
//! +kanbanlock::register()?; // once, before the pool is built
//! -let manager = SqliteConnectionManager::file("kanban.db")
//! +let manager = SqliteConnectionManager::file("file:kanban.db?vfs=kanbanlock")
//!      .with_flags(OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE
//! +        | OpenFlags::SQLITE_OPEN_URI)
//! +    .with_init(|db| db.busy_timeout(Duration::from_secs(30)));
//!  let pool = Pool::new(manager)?;
//! ```
//!
//! ## What to know
//!
//! - A flock belongs to an open file description, not to a process: two connections of one pool exclude each
//!   other exactly as two processes do. So each of them needs a busy timeout that outlasts the others' writes.
//!   `with_init` gives it one (rusqlite's own default is 5 seconds).
//! - Begin what will write with `TransactionBehavior::Immediate`. A transaction that begins as a reader and then
//!   writes may get SQLITE_BUSY at once, whatever its busy timeout: `busy_timeout.rs`.
//! - Use rusqlite's `Transaction`, which rolls back when it is dropped. After `execute_batch("BEGIN IMMEDIATE")`
//!   and an early return, the connection goes back into the pool with its transaction open, and the lock held.
//! - If `Pool::new` takes 30 seconds and then reports "no such vfs", `register()` came too late or not at all:
//!   r2d2 tries a failing open again until its `connection_timeout`.
//!
//! ## Run
//!
//! `cargo run --example adopt_pool`

mod shared;

use std::error::Error;
use std::thread;
use std::time::Duration;

use r2d2::Pool;
use r2d2_sqlite::SqliteConnectionManager;
use rusqlite::{OpenFlags, TransactionBehavior};
use shared::{check, is_locked};

const WORKERS: u32 = 4;
const TASKS_EACH: u32 = 25;

fn main() -> Result<(), Box<dyn Error>> {
    let _dir = shared::enter_fresh_dir()?;

    kanbanlock::register()?;
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_URI;
    let manager = SqliteConnectionManager::file("file:kanban.db?vfs=kanbanlock")
        .with_flags(flags)
        .with_init(|db| db.busy_timeout(Duration::from_secs(30)));
    let pool = Pool::builder().max_size(WORKERS).build(manager)?;

    // The journal mode is kept in the database file: once is enough, and no concern of `with_init`.
    pool.get()?.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE task (number INTEGER)")?;

    let acquired_before = kanbanlock::stats().acquired;
    thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(|| add_tasks(&pool))).collect();
        for worker in workers {
            let done = worker.join().map_err(|_| "a worker panicked")?;
            done.map_err(|error| -> Box<dyn Error> { error })?;
        }
        Ok(())
    })?;
    let acquired = kanbanlock::stats().acquired - acquired_before;

    let all = WORKERS * TASKS_EACH;
    let (tasks, numbers, last): (u32, u32, u32) = pool.get()?.query_row(
        "SELECT count(*), count(DISTINCT number), max(number) FROM task",
        (),
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;
    check("4 threads have added 25 tasks each, and none was refused", tasks == all)?;
    check("each task has the number after the last: 1 to 100, none twice", (numbers, last) == (all, all))?;
    check("in each transaction kanban.db.lock was locked", acquired >= u64::from(all))?;

    drop(pool.get()?.transaction_with_behavior(TransactionBehavior::Immediate)?);
    check("a transaction that is dropped leaves kanban.db.lock free", !is_locked("kanban.db")?)
}

/// One of the threads: each task is a write transaction, on whichever connection the pool gives.
fn add_tasks(pool: &Pool<SqliteConnectionManager>) -> Result<(), Box<dyn Error + Send + Sync>> {
    for _ in 0..TASKS_EACH {
        let mut db = pool.get()?;
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if !is_locked("kanban.db")? {
            return Err("kanban.db.lock is free in a write transaction".into());
        }
        let last: u32 = tx.query_row("SELECT coalesce(max(number), 0) FROM task", (), |row| row.get(0))?;
        tx.execute("INSERT INTO task VALUES (?1)", (last + 1,))?;
        tx.commit()?;
    }
    Ok(())
}
