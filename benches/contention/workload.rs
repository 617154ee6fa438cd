//! What is measured: the database, the transaction, where it is, and how many processes want it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::machine::file_system;

/// A log of who wrote what, and a counter that every transaction changes too.
const SCHEMA: &str = "
    CREATE TABLE entries (
        id       INTEGER PRIMARY KEY,
        client   INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        payload  TEXT    NOT NULL
    );
    CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER NOT NULL);
    INSERT INTO counter VALUES (1, 0);
";

/// The writer's transaction: these four, in this order.
pub(crate) const BEGIN: &str = "BEGIN IMMEDIATE";
pub(crate) const INSERT: &str = "INSERT INTO entries (client, sequence, payload) VALUES (?1, ?2, ?3)";
pub(crate) const COUNT: &str = "UPDATE counter SET value = value + 1 WHERE id = 1";
pub(crate) const COMMIT: &str = "COMMIT";

/// About a hundred bytes of a row.
pub(crate) const PAYLOAD: &str = "{\"event\":\"claimed\",\"by\":\"worker\",\"lease\":30,\
    \"note\":\"a hundred bytes, as a small row of an application has\"}";

/// The reader's transaction. Nobody deletes, so the highest id is the number of entries, and in every snapshot the
/// counter says the same.
pub(crate) const READ: &str =
    "SELECT (SELECT value FROM counter WHERE id = 1), (SELECT coalesce(max(id), 0) FROM entries)";

/// Journal mode.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Journal {
    #[serde(rename = "WAL")]
    Wal,
    #[serde(rename = "DELETE")]
    Delete,
}

impl Journal {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Wal => "WAL",
            Self::Delete => "DELETE",
        }
    }
}

/// Where the database is, and with it how often SQLite syncs.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Place {
    /// `/dev/shm`, `synchronous=OFF`.
    Tmpfs,
    /// The build directory's file system or `--dir`, `synchronous=NORMAL`.
    Disk,
}

impl Place {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    pub(crate) fn synchronous(self) -> &'static str {
        match self {
            Self::Tmpfs => "OFF",
            Self::Disk => "NORMAL",
        }
    }

    /// The directory, or why there is none. `disk` is the one that stands for [`Place::Disk`].
    pub(crate) fn directory(self, disk: &Path) -> Result<PathBuf, String> {
        match self {
            Self::Tmpfs => {
                let shm = Path::new("/dev/shm");
                let is_tmpfs = file_system(shm).is_ok_and(|kind| kind == "tmpfs");
                if is_tmpfs { Ok(shm.to_owned()) } else { Err("/dev/shm is not a tmpfs".to_owned()) }
            }
            Self::Disk => disk.canonicalize().map_err(|error| format!("{}: {error}", disk.display())),
        }
    }
}

/// A journal mode at a place.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Workload {
    pub(crate) journal: Journal,
    pub(crate) place: Place,
}

impl Workload {
    pub(crate) const WAL_DISK: Self = Self { journal: Journal::Wal, place: Place::Disk };
    pub(crate) const DELETE_DISK: Self = Self { journal: Journal::Delete, place: Place::Disk };
    pub(crate) const WAL_TMPFS: Self = Self { journal: Journal::Wal, place: Place::Tmpfs };
    pub(crate) const DELETE_TMPFS: Self = Self { journal: Journal::Delete, place: Place::Tmpfs };
    pub(crate) const ALL: [Self; 4] =
        [Self::WAL_DISK, Self::DELETE_DISK, Self::WAL_TMPFS, Self::DELETE_TMPFS];

    /// Makes the database, through stock SQLite, and leaves it closed.
    pub(crate) fn create(self, database: &Path) -> Result<()> {
        let connection = Connection::open(database)?;
        connection.pragma_update(None, "synchronous", "OFF")?;
        connection.pragma_update(None, "journal_mode", self.journal.name())?;
        connection.execute_batch(SCHEMA)?;
        connection.close().map_err(|(_, error)| error.into())
    }

    /// Checks, through stock SQLite and after everyone else has closed it, that `database` is whole and holds
    /// exactly the acknowledged commits: client `i` was told so `commits[i]` times.
    pub(crate) fn audit(self, database: &Path, commits: &[u32]) -> Result<()> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags_and_vfs(database, flags, c"unix")?;
        let journal: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
        if !journal.eq_ignore_ascii_case(self.journal.name()) {
            return Err(format!("audit: journal mode {journal}, not {}", self.journal.name()).into());
        }
        let integrity: String = connection.pragma_query_value(None, "integrity_check", |row| row.get(0))?;
        if integrity != "ok" {
            return Err(format!("audit: integrity_check: {integrity}").into());
        }
        let expected: u32 = commits.iter().sum();
        let (rows, counter): (u32, u32) = connection.query_row(
            "SELECT (SELECT count(*) FROM entries), (SELECT value FROM counter WHERE id = 1)",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        if (rows, counter) != (expected, expected) {
            return Err(format!("audit: {expected} commits, {rows} rows, counter {counter}").into());
        }
        for (client, &expected) in (0_u32..).zip(commits) {
            let (rows, distinct, last): (u32, u32, u32) = connection.query_row(
                "SELECT count(*), count(DISTINCT sequence), coalesce(max(sequence), 0)
                     FROM entries WHERE client = ?1",
                [client],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
            )?;
            if [rows, distinct, last] != [expected; 3] {
                return Err(format!(
                    "audit: client {client} made {expected} commits; {rows} rows, {distinct} different, last {last}"
                )
                .into());
            }
        }
        Ok(())
    }
}

/// `WAL/NORMAL/disk`.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.journal.name(), self.place.synchronous(), self.place.name())
    }
}

/// One cell of the matrix: every variant is run in it, side by side.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) workload: Workload,
    /// Between two transactions of a writer; zero is a tight loop.
    pub(crate) think: Duration,
    pub(crate) writers: u32,
    pub(crate) readers: u32,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.think {
            Duration::ZERO => write!(f, "tight")?,
            think => write!(f, "think {} ms", think.as_secs_f64() * 1000.0)?,
        }
        let plural = |n| if n == 1 { "" } else { "s" };
        write!(f, ", {}, {} writer{}", self.workload, self.writers, plural(self.writers))?;
        match self.readers {
            0 => Ok(()),
            readers => write!(f, ", {readers} reader{}", plural(readers)),
        }
    }
}

/// `database` with a suffix on its name: `-wal`, `.app-lock`.
pub(crate) fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
