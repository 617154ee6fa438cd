//! A program of the matrix: sqlx, a pool. The source is the same for each version of the table.

mod writer;

use std::str::FromStr;
use std::time::Duration;

use sqlx::SqlitePool;
use sqlx::sqlite::SqliteConnectOptions;
use tokio::runtime::{Builder, Runtime};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct Sqlx {
    runtime: Runtime,
    pool: SqlitePool,
}

impl App for Sqlx {
    fn open(database: &str) -> Result<Self, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let options = SqliteConnectOptions::from_str(database)?.busy_timeout(Duration::from_secs(30));
        let pool = runtime.block_on(SqlitePool::connect_with(options))?;
        Ok(Sqlx { runtime, pool })
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        self.runtime.block_on(async {
            let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
            sqlx::query(TABLE).execute(&mut *tx).await?;
            sqlx::query(ADD).bind(note.writer).bind(note.number).execute(&mut *tx).await?;
            pause();
            Ok(tx.commit().await?)
        })
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<Sqlx>()
}
