//! Adopting kanbanlock in an app with sqlx's pool.
//!
//! ## What changes
//!
//! ```diff
//! +    kanbanlock::register()?; // once, before the pool is built
//! -    let options = SqliteConnectOptions::from_str("sqlite:kanban.db")?
//! +    let options = SqliteConnectOptions::from_str("sqlite:kanban.db?vfs=kanbanlock")?
//!          .create_if_missing(true)
//!          .journal_mode(SqliteJournalMode::Wal)
//! +        .busy_timeout(Duration::from_secs(30));
//!      let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await?;
//! ```
//!
//! And where a transaction reads before it writes, with kanbanlock or without:
//!
//! ```diff
//! -        let mut tx = pool.begin().await?;
//! +        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
//! ```
//!
//! ## What to know
//!
//! - The connections of one pool exclude each other exactly as processes do, so each needs a busy timeout that outlasts
//!   the others' writes. sqlx's own default is 5 seconds.
//! - `pool.begin()` is `BEGIN DEFERRED`: what it writes after it has read may get SQLITE_BUSY at once.
//! - sqlx's URL takes `vfs`, and refuses parameters that it does not know, all `kanbanlock_…` among them. A file name
//!   it passes on as it is: `.filename("file:kanban.db?vfs=kanbanlock&kanbanlock_checkpoint=gate")`.
//! - A transaction that is dropped is rolled back by the connection's own thread, a moment later: until then the lock is
//!   held. `tx.rollback().await` waits for it.
//! - A transaction holds the lock across each `.await` in it. Fetch first, then begin.
//!
//! ## Run
//!
//! `cargo run --manifest-path examples/stacks/sqlx_pool/Cargo.toml`

#[path = "../../../shared/mod.rs"]
mod shared;

use std::error::Error;
use std::str::FromStr;
use std::time::Duration;

use shared::{check, is_locked};
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use tokio::task::JoinSet;

const WORKERS: u32 = 4;
const TASKS_EACH: u32 = 25;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let _dir = shared::enter_fresh_dir()?;

    kanbanlock::register()?; // once, before the pool is built
    let options = SqliteConnectOptions::from_str("sqlite:kanban.db?vfs=kanbanlock")?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(30));
    let pool = SqlitePoolOptions::new().max_connections(WORKERS).connect_with(options).await?;
    sqlx::query("CREATE TABLE task (number INTEGER)").execute(&pool).await?;

    let acquired_before = kanbanlock::stats().acquired;
    let mut workers = JoinSet::new();
    for _ in 0..WORKERS {
        workers.spawn(add_tasks(pool.clone()));
    }
    while let Some(worker) = workers.join_next().await {
        worker?.map_err(|error| -> Box<dyn Error> { error })?;
    }
    let acquired = kanbanlock::stats().acquired - acquired_before;
    check("in each of 100 transactions kanban.db.lock was locked", acquired >= 100)?;

    let all = WORKERS * TASKS_EACH;
    let (tasks, numbers, last): (u32, u32, u32) =
        sqlx::query_as("SELECT count(*), count(DISTINCT number), max(number) FROM task")
            .fetch_one(&pool)
            .await?;
    check("4 workers have added 25 tasks each, and none was refused", tasks == all)?;
    check("each task has the number after the last: 1 to 100, none twice", (numbers, last) == (all, all))?;

    let mut tx = pool.begin().await?;
    let _: u32 = sqlx::query_scalar("SELECT count(*) FROM task").fetch_one(&mut *tx).await?;
    check("a transaction that reads leaves kanban.db.lock free", !is_locked("kanban.db")?)?;
    tx.rollback().await?;

    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::query("DELETE FROM task").execute(&mut *tx).await?;
    tx.rollback().await?;
    check("one that is rolled back has let go of it", !is_locked("kanban.db")?)?;
    pool.close().await;

    let options = SqliteConnectOptions::new()
        .filename("file:kanban.db?vfs=kanbanlock&kanbanlock_checkpoint=gate")
        .busy_timeout(Duration::from_secs(30));
    let pool = SqlitePool::connect_with(options).await?;
    let status: String = sqlx::query_scalar("PRAGMA kanbanlock").fetch_one(&pool).await?;
    check("an option of kanbanlock's goes into the file name", status.contains(r#""checkpoint":"gate""#))?;
    pool.close().await;
    Ok(())
}

/// One of the workers: each task is a write transaction, on whichever connection the pool gives.
async fn add_tasks(pool: SqlitePool) -> Result<(), Box<dyn Error + Send + Sync>> {
    for _ in 0..TASKS_EACH {
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
        if !is_locked("kanban.db")? {
            return Err("kanban.db.lock is free in a write transaction".into());
        }
        let last: u32 =
            sqlx::query_scalar("SELECT coalesce(max(number), 0) FROM task").fetch_one(&mut *tx).await?;
        sqlx::query("INSERT INTO task VALUES (?1)").bind(last + 1).execute(&mut *tx).await?;
        tx.commit().await?;
    }
    Ok(())
}
