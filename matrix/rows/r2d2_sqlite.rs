//! A program of the matrix: r2d2_sqlite, a pool of rusqlite's connections.

mod writer;

use std::time::Duration;

use r2d2::Pool;
use r2d2_sqlite::SqliteConnectionManager;
use r2d2_sqlite::rusqlite::{TransactionBehavior, params};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct R2d2(Pool<SqliteConnectionManager>);

impl App for R2d2 {
    fn open(database: &str) -> Result<Self, Failure> {
        let manager =
            SqliteConnectionManager::file(database).with_init(|db| db.busy_timeout(Duration::from_secs(30)));
        Ok(R2d2(Pool::builder().max_size(2).build(manager)?))
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        let mut db = self.0.get()?;
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute_batch(TABLE)?;
        tx.execute(ADD, params![note.writer, note.number])?;
        pause();
        Ok(tx.commit()?)
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<R2d2>()
}
