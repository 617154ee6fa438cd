//! A program of the matrix: diesel.

mod writer;

use diesel::connection::SimpleConnection;
use diesel::sql_types::{BigInt, Text};
use diesel::{Connection, RunQueryDsl, SqliteConnection, sql_query};
// diesel uses the SQLite that this package builds; without it, the system's.
use libsqlite3_sys as _;
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct Diesel(SqliteConnection);

impl App for Diesel {
    fn open(database: &str) -> Result<Self, Failure> {
        let mut db = SqliteConnection::establish(database)?;
        db.batch_execute("PRAGMA busy_timeout = 30000")?;
        Ok(Diesel(db))
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        self.0.immediate_transaction(|db| {
            db.batch_execute(TABLE)?;
            sql_query(ADD).bind::<Text, _>(note.writer).bind::<BigInt, _>(note.number).execute(db)?;
            pause();
            Ok(())
        })
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<Diesel>()
}
