//! A program of the matrix: deadpool-sqlite, an asynchronous pool of rusqlite's connections.

mod writer;

use std::time::Duration;

use deadpool_sqlite::rusqlite::{self, TransactionBehavior, params};
use deadpool_sqlite::{Config, Pool, Runtime as PoolRuntime};
use tokio::runtime::{Builder, Runtime};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct Deadpool {
    runtime: Runtime,
    pool: Pool,
}

impl App for Deadpool {
    fn open(database: &str) -> Result<Self, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let pool = Config::new(database).create_pool(PoolRuntime::Tokio1)?;
        Ok(Deadpool { runtime, pool })
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        self.runtime.block_on(async {
            let db = self.pool.get().await?;
            let transaction = db.interact(move |db| -> rusqlite::Result<()> {
                db.busy_timeout(Duration::from_secs(30))?;
                let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
                tx.execute_batch(TABLE)?;
                tx.execute(ADD, params![note.writer, note.number])?;
                pause();
                tx.commit()
            });
            // An InteractError, of a panic or an abort, is not Sync: its text will do.
            Ok(transaction.await.map_err(|error| error.to_string())??)
        })
    }
}

impl Drop for Deadpool {
    fn drop(&mut self) {
        // Its connections are closed on the runtime, and panic outside of one.
        let _inside = self.runtime.enter();
        self.pool.close();
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<Deadpool>()
}
