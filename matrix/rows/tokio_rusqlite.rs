//! A program of the matrix: tokio-rusqlite.

mod writer;

use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio_rusqlite::Connection;
use tokio_rusqlite::rusqlite::{self, TransactionBehavior, params};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct TokioRusqlite {
    runtime: Runtime,
    db: Connection,
}

impl App for TokioRusqlite {
    fn open(database: &str) -> Result<Self, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let db = runtime.block_on(async {
            let db = Connection::open(database).await?;
            db.call(|db| db.busy_timeout(Duration::from_secs(30))).await?;
            Ok::<_, Failure>(db)
        })?;
        Ok(TokioRusqlite { runtime, db })
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        let transaction = self.db.call(move |db| -> rusqlite::Result<()> {
            let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            tx.execute_batch(TABLE)?;
            tx.execute(ADD, params![note.writer, note.number])?;
            pause();
            tx.commit()
        });
        Ok(self.runtime.block_on(transaction)?)
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<TokioRusqlite>()
}
