//! What the programs of the matrix share: how the judge (`src/judge.rs`) talks to one of them.
//!
//! Usage: `<program> <registration> <database> <writer>`
//!
//! | registration | what the program does before it opens the database |
//! |---|---|
//! | `by-name` | `kanbanlock::register()` |
//! | `as-default` | `kanbanlock::Options::new().make_default(true).register()` |
//! | `none` | nothing: stock SQLite |
//!
//! Then, for each number on a line of standard input, one write transaction. In the middle of it, when the rows are
//! written and not committed, the program says `open` and waits for a line; after COMMIT it says `committed`. At the end
//! of its input it ends.

use std::error::Error;
use std::io;

/// Any library's error.
pub type Failure = Box<dyn Error + Send + Sync>;

/// The DDL at the start of each transaction.
pub const TABLE: &str = "CREATE TABLE IF NOT EXISTS note (writer TEXT, number INTEGER, sqlite TEXT)";
/// The write: of the SQLite that does it, too.
pub const ADD: &str = "INSERT INTO note VALUES (?1, ?2, sqlite_version())";

/// What one transaction writes.
#[derive(Clone)]
pub struct Note {
    pub writer: String,
    pub number: i64,
}

/// An application, as far as the matrix is concerned.
pub trait App: Sized {
    /// Before anything is opened; see the table above.
    fn register(registration: &str) -> Result<(), Failure> {
        match registration {
            "by-name" => kanbanlock::register()?,
            "as-default" => kanbanlock::Options::new().make_default(true).register()?,
            "none" => {}
            other => return Err(format!("unknown registration {other:?}").into()),
        }
        Ok(())
    }

    /// Opens the database, by whatever string the library takes, with a busy timeout of 30 s.
    fn open(database: &str) -> Result<Self, Failure>;

    /// One write transaction: BEGIN IMMEDIATE, [`TABLE`], [`ADD`], [`pause`], COMMIT.
    fn add(&mut self, note: Note) -> Result<(), Failure>;
}

/// The whole program.
pub fn run<A: App>() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [registration, database, writer] = arguments.as_slice() else {
        return Err("usage: <program> by-name|as-default|none <database> <writer>".into());
    };
    A::register(registration)?;
    let mut app = A::open(database)?;
    while let Some(line) = read_line() {
        app.add(Note { writer: writer.clone(), number: line.parse()? })?;
        println!("committed");
    }
    Ok(())
}

/// Called in an open write transaction: waits for the judge's word to commit.
pub fn pause() {
    println!("open");
    if read_line().is_none() {
        // The judge has gone, and nobody is to believe in this transaction.
        std::process::exit(2);
    }
}

/// A line of standard input, without its end; None after the last. Not `Stdin::lines`, which keeps standard input locked:
/// some libraries run the transaction, and with it `pause`, in another thread.
fn read_line() -> Option<String> {
    let mut line = String::new();
    match io::stdin().read_line(&mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(line.trim_end().to_owned()),
    }
}
