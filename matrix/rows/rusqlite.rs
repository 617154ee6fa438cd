//! A program of the matrix: rusqlite. The source is the same for each version of the table.

mod writer;

use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior, params};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct Rusqlite(Connection);

impl App for Rusqlite {
    fn open(database: &str) -> Result<Self, Failure> {
        let db = Connection::open(database)?;
        db.busy_timeout(Duration::from_secs(30))?;
        Ok(Rusqlite(db))
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        let tx = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute_batch(TABLE)?;
        tx.execute(ADD, params![note.writer, note.number])?;
        pause();
        Ok(tx.commit()?)
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<Rusqlite>()
}
