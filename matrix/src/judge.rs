//! The scenario: two processes write one database, and an outsider, this process, looks at the flock.
//!
//! ```text
//!   judge                      writer 1              writer 2
//!   founds the database: stock SQLite, the journal mode
//!                              registers, opens      registers, opens
//!   each in its turn:          BEGIN IMMEDIATE, DDL, INSERT
//!   is the flock held?
//!                              COMMIT
//!   is the flock free?
//!   then both at once, 50 transactions each, with a look at the flock in each
//!   audits: stock SQLite; every acknowledged note is there once, and no other
//! ```
//!
//! A look is `flock(LOCK_EX | LOCK_NB)` on `kanban.db.lock`, through a descriptor of its own. Each program runs three
//! times: through kanbanlock by name in WAL mode, as the default VFS in DELETE mode, and as a control on stock SQLite, where
//! the flock must *not* be seen held.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{File, TryLockError};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;

use rusqlite::{Connection, OpenFlags};

use crate::packages;
use crate::rows::Row;

/// Threads hand it on, so it has to be Send.
pub type Failure = Box<dyn Error + Send + Sync>;

const TURNS: u32 = 2;
const AT_ONCE: u32 = 50;
/// Of each program, where all write at once: whoever is unlucky waits for most of the others' transactions, and gives up
/// after 30 s.
const TOGETHER: u32 = 20;

/// How the programs come to kanbanlock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    ByName,
    AsDefault,
    Stock,
}

impl Way {
    fn registration(self) -> &'static str {
        match self {
            Way::ByName => "by-name",
            Way::AsDefault => "as-default",
            Way::Stock => "none",
        }
    }

    fn database(self, row: &Row) -> String {
        match self {
            Way::ByName => row.database.through("kanbanlock"),
            Way::AsDefault => row.database.plain().to_owned(),
            Way::Stock => row.database.through("unix"),
        }
    }

    fn journal_mode(self) -> &'static str {
        match self {
            Way::ByName | Way::Stock => "wal",
            Way::AsDefault => "delete",
        }
    }
}

/// What was seen.
#[derive(Default)]
pub struct Seen {
    /// Write transactions whose COMMIT was acknowledged, all of them found by the audit.
    pub commits: usize,
    /// In how many of them the flock was held.
    pub held: usize,
    /// What the SQLite that wrote calls itself.
    pub sqlite: Vec<String>,
}

/// The scenario, for two processes of the row's program.
pub fn judge(row: &Row, program: &Path, way: Way) -> Result<Seen, Failure> {
    let dir = tempfile::tempdir()?;
    found(dir.path(), way.journal_mode())?;
    let mut writers = [
        Writer::start(program, row, way, dir.path(), "writer 1")?,
        Writer::start(program, row, way, dir.path(), "writer 2")?,
    ];
    let mut held = 0;
    for _ in 0..TURNS {
        for writer in &mut writers {
            held += usize::from(writer.add(dir.path())?);
            if is_flocked(dir.path())? {
                return Err("the flock is held after COMMIT".into());
            }
        }
    }
    held += at_once(&mut writers, AT_ONCE, dir.path())?;
    let acknowledged = end_all(writers)?;
    let sqlite = audit(dir.path(), &acknowledged)?;
    if dir.path().join("kanban.db.lock").exists() != (way != Way::Stock) {
        return Err("a lock file on stock SQLite, or none with kanbanlock".into());
    }
    Ok(Seen { commits: acknowledged.len(), held, sqlite })
}

/// All programs on one database: as many copies of SQLite, in as many processes.
pub fn judge_together(programs: &[(&Row, std::path::PathBuf)]) -> Result<Seen, Failure> {
    let dir = tempfile::tempdir()?;
    found(dir.path(), Way::ByName.journal_mode())?;
    let mut writers = Vec::new();
    for (row, program) in programs {
        writers.push(Writer::start(program, row, Way::ByName, dir.path(), row.name)?);
    }
    let held = at_once(&mut writers, TOGETHER, dir.path())?;
    let acknowledged = end_all(writers)?;
    let sqlite = audit(dir.path(), &acknowledged)?;
    Ok(Seen { commits: acknowledged.len(), held, sqlite })
}

/// All writers write, each driven by a thread; returns in how many transactions the flock was held.
fn at_once(writers: &mut [Writer], each: u32, dir: &Path) -> Result<usize, Failure> {
    thread::scope(|scope| {
        let drive = |writer: &mut Writer| -> Result<usize, Failure> {
            let mut held = 0;
            for _ in 0..each {
                held += usize::from(writer.add(dir)?);
            }
            Ok(held)
        };
        let threads: Vec<_> = writers.iter_mut().map(|writer| scope.spawn(move || drive(writer))).collect();
        // All are joined before the first failure is returned.
        let counts: Vec<_> =
            threads.into_iter().map(|thread| thread.join().expect("a thread that drives a writer")).collect();
        counts.into_iter().sum()
    })
}

/// A process that runs a row's program.
struct Writer {
    name: String,
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    acknowledged: Vec<i64>,
}

impl Writer {
    fn start(program: &Path, row: &Row, way: Way, dir: &Path, name: &str) -> Result<Writer, Failure> {
        let mut process = Command::new(program)
            .args([way.registration(), &way.database(row), name])
            .env("KANBANLOCK_EXTENSION", packages::extension())
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        let commands = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped"));
        Ok(Writer { name: name.to_owned(), process, commands, answers, acknowledged: Vec::new() })
    }

    /// One write transaction. True if the flock was held in it.
    fn add(&mut self, dir: &Path) -> Result<bool, Failure> {
        let number = i64::try_from(self.acknowledged.len())?;
        writeln!(self.commands, "{number}")?;
        self.expect("open")?;
        let held = is_flocked(dir)?;
        writeln!(self.commands, "commit")?;
        self.expect("committed")?;
        self.acknowledged.push(number);
        Ok(held)
    }

    fn expect(&mut self, expected: &str) -> Result<(), Failure> {
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        if answer.trim_end() != expected {
            return Err(format!(
                "{} said {answer:?} instead of {expected:?}; its complaint is above",
                self.name
            )
            .into());
        }
        Ok(())
    }

    /// Ends the process by the end of its input.
    fn end(mut self) -> Result<(String, Vec<i64>), Failure> {
        drop(self.commands);
        let status = self.process.wait()?;
        if !status.success() {
            return Err(format!("{}: {status}", self.name).into());
        }
        Ok((self.name, self.acknowledged))
    }
}

/// A new database in this journal mode, made by stock SQLite.
fn found(dir: &Path, journal_mode: &str) -> Result<(), Failure> {
    let db = Connection::open(dir.join("kanban.db"))?;
    let now: String = db.query_row(&format!("PRAGMA journal_mode = {journal_mode}"), [], |row| row.get(0))?;
    if now != journal_mode {
        return Err(format!("journal mode {now} instead of {journal_mode}").into());
    }
    // A database of no pages keeps no journal mode.
    Ok(db.execute_batch("PRAGMA user_version = 1")?)
}

/// How often each note, of that writer and with that number, is there: once, if it was acknowledged.
type Notes = BTreeMap<(String, i64), u32>;

/// Ends the writers, and returns what they were promised.
fn end_all(writers: impl IntoIterator<Item = Writer>) -> Result<Notes, Failure> {
    let mut acknowledged = Notes::new();
    for writer in writers {
        let (name, numbers) = writer.end()?;
        acknowledged.extend(numbers.into_iter().map(|number| ((name.clone(), number), 1)));
    }
    Ok(acknowledged)
}

/// Looks for each acknowledged note on stock SQLite. Returns which versions of SQLite have written them.
fn audit(dir: &Path, acknowledged: &Notes) -> Result<Vec<String>, Failure> {
    let db = Connection::open_with_flags(dir.join("kanban.db"), OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    let integrity: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    if integrity != "ok" {
        return Err(format!("integrity_check: {integrity}").into());
    }
    let mut found = Notes::new();
    let mut notes = db.prepare("SELECT writer, number FROM note")?;
    for note in notes.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))? {
        *found.entry(note?).or_insert(0) += 1;
    }
    if found != *acknowledged {
        return Err(format!("acknowledged: {acknowledged:?}\nfound: {found:?}").into());
    }
    let mut versions = db.prepare("SELECT DISTINCT sqlite FROM note ORDER BY sqlite")?;
    Ok(versions.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?)
}

/// True if somebody holds the flock now; false without a lock file, too.
fn is_flocked(dir: &Path) -> io::Result<bool> {
    let lock_file = match File::open(dir.join("kanban.db.lock")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    match lock_file.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_audit_notices_a_lost_a_doubled_and_an_unknown_note() {
        let dir = tempfile::tempdir().unwrap();
        found(dir.path(), "wal").unwrap();
        let db = Connection::open(dir.path().join("kanban.db")).unwrap();
        db.execute_batch(
            "CREATE TABLE note (writer TEXT, number INTEGER, sqlite TEXT);
             INSERT INTO note VALUES ('a', 0, '3.1'), ('b', 0, '3.2');",
        )
        .unwrap();
        let notes =
            |of: &[(&str, i64)]| -> Notes { of.iter().map(|(w, n)| ((w.to_string(), *n), 1)).collect() };
        let both = notes(&[("a", 0), ("b", 0)]);
        assert_eq!(audit(dir.path(), &both).unwrap(), ["3.1", "3.2"]);
        audit(dir.path(), &notes(&[("a", 0), ("b", 0), ("b", 1)])).expect_err("(b, 1) is lost");
        audit(dir.path(), &notes(&[("a", 0)])).expect_err("(b, 0) is unknown");
        db.execute_batch("INSERT INTO note VALUES ('a', 0, '3.1')").unwrap();
        audit(dir.path(), &both).expect_err("(a, 0) is doubled");
    }

    #[test]
    fn a_flock_is_seen_while_it_is_held() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_flocked(dir.path()).unwrap(), "without a lock file");
        let holder = File::create(dir.path().join("kanban.db.lock")).unwrap();
        assert!(!is_flocked(dir.path()).unwrap());
        holder.lock().unwrap();
        assert!(is_flocked(dir.path()).unwrap());
        holder.unlock().unwrap();
        assert!(!is_flocked(dir.path()).unwrap());
    }
}
