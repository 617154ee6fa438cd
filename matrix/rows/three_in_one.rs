//! A program of the matrix: rusqlite, sqlx and diesel in one binary, on one copy of SQLite, with one registration.
//! Each of the three keeps a connection to the same database; they take turns.

mod writer;

use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::sql_types::{BigInt, Text};
use diesel::{Connection as _, RunQueryDsl, SqliteConnection, sql_query};
use rusqlite::{TransactionBehavior, params};
use sqlx::SqlitePool;
use sqlx::sqlite::SqliteConnectOptions;
use tokio::runtime::{Builder, Runtime};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct ThreeInOne {
    rusqlite: rusqlite::Connection,
    diesel: SqliteConnection,
    runtime: Runtime,
    sqlx: SqlitePool,
}

impl App for ThreeInOne {
    fn open(database: &str) -> Result<Self, Failure> {
        let rusqlite = rusqlite::Connection::open(database)?;
        rusqlite.busy_timeout(Duration::from_secs(30))?;

        let mut diesel = SqliteConnection::establish(database)?;
        diesel.batch_execute("PRAGMA busy_timeout = 30000")?;

        let runtime = Builder::new_current_thread().enable_all().build()?;
        // SQLite's own kind of URI, the same as for the others: sqlx hands a file name on as it is.
        let options = SqliteConnectOptions::new().filename(database).busy_timeout(Duration::from_secs(30));
        let sqlx = runtime.block_on(SqlitePool::connect_with(options))?;

        Ok(ThreeInOne { rusqlite, diesel, runtime, sqlx })
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        match note.number % 3 {
            0 => {
                let tx = self.rusqlite.transaction_with_behavior(TransactionBehavior::Immediate)?;
                tx.execute_batch(TABLE)?;
                tx.execute(ADD, params![note.writer, note.number])?;
                pause();
                Ok(tx.commit()?)
            }
            1 => self.diesel.immediate_transaction(|db| {
                db.batch_execute(TABLE)?;
                sql_query(ADD).bind::<Text, _>(note.writer).bind::<BigInt, _>(note.number).execute(db)?;
                pause();
                Ok(())
            }),
            _ => self.runtime.block_on(async {
                let mut tx = self.sqlx.begin_with("BEGIN IMMEDIATE").await?;
                sqlx::query(TABLE).execute(&mut *tx).await?;
                sqlx::query(ADD).bind(note.writer).bind(note.number).execute(&mut *tx).await?;
                pause();
                Ok(tx.commit().await?)
            }),
        }
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<ThreeInOne>()
}
