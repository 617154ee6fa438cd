//! A program of the matrix: SeaORM, over sqlx.

mod writer;

use std::time::Duration;

use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, SqliteTransactionMode,
    Statement, TransactionOptions, TransactionTrait,
};
use tokio::runtime::{Builder, Runtime};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct SeaOrm {
    runtime: Runtime,
    db: DatabaseConnection,
}

impl App for SeaOrm {
    fn open(database: &str) -> Result<Self, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let mut options = ConnectOptions::new(database);
        options.map_sqlx_sqlite_opts(|options| options.busy_timeout(Duration::from_secs(30)));
        let db = runtime.block_on(Database::connect(options))?;
        Ok(SeaOrm { runtime, db })
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        let immediate = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        let values = [note.writer.into(), note.number.into()];
        let add = Statement::from_sql_and_values(DbBackend::Sqlite, ADD, values);
        self.runtime.block_on(async {
            let tx = self.db.begin_with_options(immediate).await?;
            tx.execute_unprepared(TABLE).await?;
            tx.execute_raw(add).await?;
            pause();
            Ok(tx.commit().await?)
        })
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<SeaOrm>()
}
