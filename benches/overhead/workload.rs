//! What is measured: the transactions, where they run, and who runs them.
//!
//! All lanes run the same statements on byte-identical copies of one database of a thousand tasks, visit
//! the tasks in the same order, and hold prepared statements, so that neither parsing nor luck decides.
//! In WAL mode the automatic checkpoints stay on. The lanes do the same writes from the same start, so their
//! checkpoints fall into the same rounds, and a median does not see the few rounds that have one.

use std::fmt;
use std::ops::{Index, IndexMut};
use std::path::{Path, PathBuf};

use rusqlite::{CachedStatement, Connection, OpenFlags};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::machine::file_system;

/// Rows in `tasks`.
const TASKS: u32 = 1000;

/// The kanban board of an agent framework, its indexes included.
const SCHEMA: &str = "
    CREATE TABLE tasks (
        id         INTEGER PRIMARY KEY,
        title      TEXT    NOT NULL,
        status     TEXT    NOT NULL,
        assignee   TEXT    NOT NULL,
        updates    INTEGER NOT NULL DEFAULT 0,
        updated_at INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX tasks_by_status   ON tasks (status, updated_at);
    CREATE INDEX tasks_by_assignee ON tasks (assignee);
    CREATE TABLE task_events (
        id         INTEGER PRIMARY KEY,
        task_id    INTEGER NOT NULL REFERENCES tasks,
        kind       TEXT    NOT NULL,
        payload    TEXT    NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE INDEX task_events_by_task ON task_events (task_id, created_at);
    CREATE TABLE task_runs (
        task_id    INTEGER PRIMARY KEY REFERENCES tasks,
        worker     TEXT    NOT NULL,
        attempts   INTEGER NOT NULL,
        heartbeat  INTEGER NOT NULL
    );
    CREATE INDEX task_runs_by_heartbeat ON task_runs (heartbeat);
    WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < ?1)
    INSERT INTO tasks (id, title, status, assignee)
        SELECT id, 'task number ' || id, 'ready', 'worker-' || (id % 24) FROM n;
";

const UPDATE: &str = "UPDATE tasks SET updates = updates + 1 WHERE id = ?1";
const ADD_EVENT: &str = "INSERT INTO task_events (task_id, kind, payload, created_at)
    VALUES (?1, 'claimed', '{\"by\":\"worker\",\"lease\":30}', ?2)";
const SET_STATUS: &str = "UPDATE tasks SET updates = updates + 1, updated_at = ?2,
    status = CASE status WHEN 'ready' THEN 'running' ELSE 'ready' END WHERE id = ?1";
const UPSERT_RUN: &str = "INSERT INTO task_runs (task_id, worker, attempts, heartbeat)
    VALUES (?1, 'worker-1', 1, ?2)
    ON CONFLICT (task_id) DO UPDATE SET attempts = attempts + 1, heartbeat = excluded.heartbeat";
const READ: &str = "SELECT id, status FROM tasks WHERE id = ?1";

/// What is counted as one: a transaction, or an open/close.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Operation {
    /// `BEGIN IMMEDIATE`, one UPDATE by primary key of a column without an index, `COMMIT`.
    OneRowUpdate,
    /// `BEGIN IMMEDIATE`, insert an event, change a task's status, upsert its run, `COMMIT`.
    Kanban,
    /// One SELECT by primary key, a read transaction by itself.
    Read,
    /// Open, one such SELECT (before the first statement SQLite does not touch the file), close. Nobody
    /// else has the database open, so that in WAL mode each open makes `-wal` and `-shm` and each close
    /// takes the EXCLUSIVE lock and deletes them: the dearest case.
    OpenClose,
    /// Nothing but a SHARED lock on the database, taken and given back (`lock_calls.rs`).
    SharedLock,
    /// Nothing but a READ slot of the wal-index, locked and unlocked.
    ReadLock,
}

impl Operation {
    const ALL: [Self; 6] =
        [Self::OneRowUpdate, Self::Kanban, Self::Read, Self::OpenClose, Self::SharedLock, Self::ReadLock];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OneRowUpdate => "one-row update",
            Self::Kanban => "kanban",
            Self::Read => "read",
            Self::OpenClose => "open/close",
            Self::SharedLock => "SHARED lock",
            Self::ReadLock => "READ slot",
        }
    }

    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::OneRowUpdate | Self::Kanban)
    }

    /// Whether it is a pair of lock calls, without a statement.
    pub(crate) fn is_lock(self) -> bool {
        matches!(self, Self::SharedLock | Self::ReadLock)
    }

    /// Does it for the `n`th time. ([`Operation::OpenClose`] and the locks begin with a `Read`, which is all that
    /// is done here.)
    pub(crate) fn run(self, connection: &Connection, n: u32) -> Result<()> {
        let id = n % TASKS * 7919 % TASKS + 1; // 7919 is prime: every task once, then again
        let statement = |sql| -> rusqlite::Result<CachedStatement<'_>> { connection.prepare_cached(sql) };
        match self {
            Self::OneRowUpdate => {
                statement("BEGIN IMMEDIATE")?.execute([])?;
                statement(UPDATE)?.execute([id])?;
                statement("COMMIT")?.execute([])?;
            }
            Self::Kanban => {
                statement("BEGIN IMMEDIATE")?.execute([])?;
                statement(ADD_EVENT)?.execute([id, n])?;
                statement(SET_STATUS)?.execute([id, n])?;
                statement(UPSERT_RUN)?.execute([id, n])?;
                statement("COMMIT")?.execute([])?;
            }
            Self::Read | Self::OpenClose | Self::SharedLock | Self::ReadLock => {
                let read = statement(READ)?.query_row([id], |row| row.get::<_, u32>(0))?;
                if read != id {
                    return Err(format!("asked for task {id}, read {read}").into());
                }
            }
        }
        Ok(())
    }
}

/// Journal mode.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Journal {
    Wal,
    Delete,
}

impl Journal {
    const ALL: [Self; 2] = [Self::Wal, Self::Delete];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Wal => "WAL",
            Self::Delete => "DELETE",
        }
    }
}

/// Where the database is, and how often SQLite syncs it there.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// tmpfs, `synchronous=OFF`.
    Memory,
    /// The build directory's file system, `synchronous=NORMAL`.
    Disk,
}

impl Place {
    pub(crate) const ALL: [Self; 2] = [Self::Memory, Self::Disk];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "tmpfs",
            Self::Disk => "disk",
        }
    }

    pub(crate) fn synchronous(self) -> &'static str {
        match self {
            Self::Memory => "OFF",
            Self::Disk => "NORMAL",
        }
    }

    /// The directory, or why there is none.
    pub(crate) fn directory(self) -> Result<&'static Path, &'static str> {
        match self {
            Self::Memory => {
                let shm = Path::new("/dev/shm");
                let is_tmpfs = file_system(shm).is_ok_and(|kind| kind == "tmpfs");
                if is_tmpfs { Ok(shm) } else { Err("/dev/shm is not a tmpfs") }
            }
            Self::Disk => Ok(Path::new(env!("CARGO_TARGET_TMPDIR"))),
        }
    }
}

/// Who does it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Lane {
    Unix,
    UnixAgain,
    Kanbanlock,
    AppFlock,
    FlockPair,
    CloseProof,
    OptedOut,
}

impl Lane {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unix => "unix",
            Self::UnixAgain => "unix again",
            Self::Kanbanlock => "kanbanlock",
            Self::AppFlock => "app-level flock",
            Self::FlockPair => "flock pair",
            Self::CloseProof => "close-proof",
            Self::OptedOut => "opted out",
        }
    }

    /// The VFS that its connections name.
    fn vfs(self) -> &'static str {
        if self == Self::Kanbanlock { kanbanlock::VFS_NAME } else { "unix" }
    }

    /// Whether its process registers kanbanlock, which installs the hooks of close-proof locks.
    pub(crate) fn registers(self) -> bool {
        matches!(self, Self::Kanbanlock | Self::CloseProof | Self::OptedOut)
    }

    /// What the kernel calls, in `/proc/<pid>/fdinfo`, SQLite's own locks in this lane.
    pub(crate) fn kind_of_lock(self) -> &'static str {
        if matches!(self, Self::Kanbanlock | Self::CloseProof) { "OFDLCK" } else { "POSIX" }
    }

    /// Whether a write transaction of this lane holds the flock on `<db>.lock`.
    pub(crate) fn holds_flock(self) -> bool {
        matches!(self, Self::Kanbanlock | Self::AppFlock | Self::FlockPair)
    }

    /// Opens `database` as this lane does. An unknown VFS is an error of SQLite's, never a fallback.
    pub(crate) fn open(self, database: &Path) -> Result<Connection> {
        open(database, self.vfs())
    }

    /// What must be open beside it, idle: a `unix` connection goes the way that it finds, so it is another one, through
    /// kanbanlock, that opts the file out.
    pub(crate) fn open_companion(self, database: &Path) -> Result<Option<Connection>> {
        if self != Self::OptedOut {
            return Ok(None);
        }
        open(database, &format!("{}&kanbanlock_close_proof=off", kanbanlock::VFS_NAME)).map(Some)
    }
}

/// Opens `database` through a VFS, whose name may be followed by further URI parameters.
fn open(database: &Path, vfs: &str) -> Result<Connection> {
    let path = database.to_str().ok_or("the temporary directory's name is not UTF-8")?;
    if path.contains(['?', '#', '%']) {
        return Err(format!("{path} would have to be escaped in a URI").into());
    }
    let uri = format!("file:{path}?vfs={vfs}");
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Ok(Connection::open_with_flags(uri, flags)?)
}

/// One value per lane.
#[derive(Clone, Copy, Default)]
pub(crate) struct PerLane<T>([T; 7]);

impl<T> Index<Lane> for PerLane<T> {
    type Output = T;

    fn index(&self, lane: Lane) -> &T {
        &self.0[lane as usize]
    }
}

impl<T> IndexMut<Lane> for PerLane<T> {
    fn index_mut(&mut self, lane: Lane) -> &mut T {
        &mut self.0[lane as usize]
    }
}

/// One group of the benchmark, one row of the table.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Workload {
    pub(crate) operation: Operation,
    pub(crate) journal: Journal,
    pub(crate) place: Place,
}

impl Workload {
    /// All of them, in the table's order.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Operation::ALL
            .into_iter()
            .flat_map(|operation| {
                Journal::ALL.into_iter().flat_map(move |journal| {
                    Place::ALL.into_iter().map(move |place| Self { operation, journal, place })
                })
            })
            .filter(|workload| workload.has_its_own_row())
    }

    /// A lock touches no disk, so it is measured in one place, and in the journal mode whose transactions ask for it.
    fn has_its_own_row(&self) -> bool {
        let journal = match self.operation {
            Operation::SharedLock => Journal::Delete,
            Operation::ReadLock => Journal::Wal,
            _ => return true,
        };
        self.journal == journal && self.place == Place::Memory
    }

    /// The lanes that run it, the baseline first. The application takes its flock around write
    /// transactions only.
    pub(crate) fn lanes(self) -> &'static [Lane] {
        const WRITERS: [Lane; 5] =
            [Lane::Unix, Lane::UnixAgain, Lane::Kanbanlock, Lane::AppFlock, Lane::FlockPair];
        const LOCKS: [Lane; 5] =
            [Lane::Unix, Lane::UnixAgain, Lane::CloseProof, Lane::OptedOut, Lane::Kanbanlock];
        match self.operation {
            operation if operation.writes() => &WRITERS,
            operation if operation.is_lock() => &LOCKS,
            _ => &WRITERS[..3],
        }
    }

    /// Whether each transaction syncs: a thousand times the others' time, so fewer of them must do.
    pub(crate) fn waits_for_disk(self) -> bool {
        self.operation.writes() && self.journal == Journal::Delete && self.place == Place::Disk
    }

    /// Transactions in a timed batch: few, so that the batches of a round share the machine's mood, but
    /// enough to make light of reading the clock.
    pub(crate) fn batch(self) -> u32 {
        match self.operation {
            _ if self.waits_for_disk() => 1,
            operation if operation.is_lock() => 16,
            _ => 4,
        }
    }

    /// Makes the database that each lane gets a copy of.
    pub(crate) fn create(self, database: &Path) -> Result<()> {
        let connection = Connection::open(database)?;
        connection.pragma_update(None, "synchronous", "OFF")?;
        connection.pragma_update(None, "journal_mode", self.journal.name())?;
        connection.execute_batch(&SCHEMA.replace("?1", &TASKS.to_string()))?;
        connection.close().map_err(|(_, error)| error.into())
    }

    /// Checks, through stock SQLite and after everyone else has closed it, that `database` is whole and
    /// holds what `transactions` of this workload leave behind.
    pub(crate) fn audit(self, database: &Path, transactions: u32) -> Result<()> {
        let connection = Lane::Unix.open(database)?;
        let journal: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
        if !journal.eq_ignore_ascii_case(self.journal.name()) {
            return Err(format!("journal mode {journal}, not {}", self.journal.name()).into());
        }
        let integrity: String = connection.pragma_query_value(None, "integrity_check", |row| row.get(0))?;
        if integrity != "ok" {
            return Err(format!("integrity_check: {integrity}").into());
        }
        let found: [u32; 3] = connection.query_row(
            "SELECT (SELECT sum(updates) FROM tasks), (SELECT count(*) FROM task_events),
                    (SELECT coalesce(sum(attempts), 0) FROM task_runs)",
            [],
            |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?]),
        )?;
        let expected = match self.operation {
            Operation::OneRowUpdate => [transactions, 0, 0],
            Operation::Kanban => [transactions; 3],
            Operation::Read | Operation::OpenClose | Operation::SharedLock | Operation::ReadLock => [0; 3],
        };
        if found != expected {
            return Err(format!("[updates, events, attempts] are {found:?}, committed {expected:?}").into());
        }
        Ok(())
    }
}

/// As criterion's groups are named and filtered.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (operation, journal) = (self.operation.name(), self.journal.name());
        write!(f, "{operation}, {journal}, {} {}", self.place.name(), self.place.synchronous())
    }
}

/// `<db>.lock`.
pub(crate) fn lock_file(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}
