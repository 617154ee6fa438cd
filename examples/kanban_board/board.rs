//! # The board: its schema, and every transaction on it
//!
//! ```text
//!            create          claim           finish
//!                  ──► todo ──────► doing ──────────► done
//!                        ▲            │ finish, one in eight
//!                        └─ blocked ◄─┘
//!                   unblock
//! ```
//!
//! Every write transaction is a `BEGIN IMMEDIATE … COMMIT` that does one step, writes *one* row into
//! `task_events` with its unique [`CommitId`], and keeps `counters` up to date. So whatever is lost, doubled or
//! seen too early makes two things disagree, and [`disagreements`] or the audit says which.
//!
//! DDL is one of the steps: each worker walks its own scratch table through [`DDL`], over and over. Each change
//! of the schema makes every other process read the schema again.

use std::path::PathBuf;
use std::time::Duration;

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension as _, Transaction, TransactionBehavior, params,
};
use serde::{Deserialize, Serialize};

use super::Result;
use super::job::{self, Journal, Synchronous};

/// The schema's steps; `PRAGMA user_version` counts those that are done. None says IF NOT EXISTS: a step made
/// twice, because two processes believed they held the write lock, must fail.
pub(crate) const MIGRATIONS: [&str; 3] = [
    "CREATE TABLE tasks (
         id       INTEGER PRIMARY KEY,
         title    TEXT NOT NULL,
         body     BLOB NOT NULL,
         priority INTEGER NOT NULL,
         status   TEXT NOT NULL CHECK (status IN ('todo', 'doing', 'blocked', 'done')),
         assignee INTEGER
     );
     CREATE TABLE task_events (
         id          INTEGER PRIMARY KEY,
         task_id     INTEGER REFERENCES tasks (id),
         kind        TEXT NOT NULL,
         status      TEXT,
         worker      INTEGER NOT NULL,
         incarnation INTEGER NOT NULL,
         seq         INTEGER NOT NULL,
         UNIQUE (worker, incarnation, seq)
     );
     CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
     INSERT INTO counters VALUES ('events', 0), ('todo', 0), ('doing', 0), ('blocked', 0), ('done', 0);
     PRAGMA user_version = 1;",
    "CREATE TABLE task_runs (
         id          INTEGER PRIMARY KEY,
         task_id     INTEGER NOT NULL REFERENCES tasks (id),
         worker      INTEGER NOT NULL,
         incarnation INTEGER NOT NULL,
         outcome     TEXT
     );
     PRAGMA user_version = 2;",
    "CREATE INDEX tasks_by_status ON tasks (status, priority, id);
     CREATE INDEX tasks_by_assignee ON tasks (assignee) WHERE status = 'doing';
     CREATE INDEX events_by_task ON task_events (task_id, id);
     CREATE INDEX runs_by_task ON task_runs (task_id);
     PRAGMA user_version = 3;",
];

/// The cycle of a worker's scratch table: entry i leads from stage i to stage i + 1, the last one back to 0.
/// Stages are counted by [`ddl_stage`]. `#` stands for the worker's number.
pub(crate) const DDL: [(&str, &str); 4] = [
    ("create table", "CREATE TABLE scratch_# AS SELECT id, status FROM tasks ORDER BY id DESC LIMIT 32"),
    ("create index", "CREATE INDEX scratch_#_by_status ON scratch_# (status)"),
    ("add column", "ALTER TABLE scratch_# ADD COLUMN note TEXT NOT NULL DEFAULT ''"),
    ("drop table", "DROP TABLE scratch_#"),
];

/// Every n-th commit of a worker changes the schema.
const DDL_EVERY: i64 = 64;
/// Every n-th commit of a worker, if it finishes a task, finishes it as blocked.
const BLOCK_EVERY: i64 = 8;
/// Workers without a task create one while there are fewer than this to do, else they claim one.
const BACKLOG: i64 = 64;
/// Workers without a task unblock one while there are more than this.
const BLOCKED_MAX: i64 = 16;

/// The database, and how every process opens it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Database {
    pub(crate) path: PathBuf,
    pub(crate) vfs: String,
    pub(crate) params: Vec<String>,
    /// None leaves it as it is.
    pub(crate) journal: Option<Journal>,
    pub(crate) synchronous: Synchronous,
    pub(crate) busy_timeout: Duration,
    /// `PRAGMA mmap_size`
    pub(crate) mmap_size: u32,
}

/// The unique name of a commit, in the database and in the acknowledgement log.
#[derive(Clone, Copy)]
pub(crate) struct CommitId {
    pub(crate) worker: u32,
    pub(crate) incarnation: u32,
    pub(crate) seq: i64,
}

/// What a write transaction did, for its row in `task_events`.
pub(crate) struct Event {
    kind: &'static str,
    change: Option<Change>,
}

/// A task's way from one status to the next; `from` is None for a new task.
struct Change {
    task: i64,
    from: Option<&'static str>,
    to: &'static str,
}

impl Database {
    /// Opens a connection by URI, and makes sure that it goes through the VFS that was asked for. Touches
    /// neither the file's content nor its locks.
    pub(crate) fn open(&self) -> Result<Connection> {
        job::register(&self.vfs)?;
        let flags =
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags(self.uri(), flags)
            .map_err(|error| format!("cannot open {}: {error}", self.uri()))?;
        conn.busy_timeout(self.busy_timeout)?;
        conn.pragma_update(None, "foreign_keys", true)?;
        conn.pragma_update(None, "mmap_size", self.mmap_size)?;
        conn.set_prepared_statement_cache_capacity(32);
        if self.vfs == kanbanlock::VFS_NAME && shim_status(&conn)?.is_none() {
            return Err("the VFS kanbanlock does not answer PRAGMA kanbanlock: it is not in use".into());
        }
        Ok(conn)
    }

    /// The path as <https://sqlite.org/uri.html> has it escaped, and the VFS.
    pub(crate) fn uri(&self) -> String {
        let path = self.path.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
        let params: String = self.params.iter().map(|param| format!("&{param}")).collect();
        format!("file:{path}?vfs={}{params}", self.vfs)
    }

    /// Sets the journal mode, which all processes race to do on the new file, and `synchronous`.
    /// Returns the journal mode that SQLite is in then.
    pub(crate) fn configure(&self, conn: &Connection) -> rusqlite::Result<String> {
        conn.pragma_update(None, "synchronous", job::name(self.synchronous))?;
        match self.journal {
            Some(journal) => set_journal_mode(conn, journal),
            None => conn.pragma_query_value(None, "journal_mode", |row| row.get(0)),
        }
    }
}

/// Returns the journal mode that SQLite is in then, which may be another one.
pub(crate) fn set_journal_mode(conn: &Connection, journal: Journal) -> rusqlite::Result<String> {
    conn.pragma_update_and_check(None, "journal_mode", job::name(journal), |row| row.get(0))
}

/// kanbanlock's own word on this connection, JSON; None on another VFS.
pub(crate) fn shim_status(conn: &Connection) -> rusqlite::Result<Option<String>> {
    conn.query_row("PRAGMA kanbanlock", [], |row| row.get(0)).optional()
}

/// The extended code if the error is an SQLITE_BUSY: nothing happened, try again.
pub(crate) fn busy_code(error: &rusqlite::Error) -> Option<i32> {
    let error = error.sqlite_error()?;
    (error.code == ErrorCode::DatabaseBusy).then_some(error.extended_code)
}

/// The error with its extended code, which says which disk I/O error it was, for example.
pub(crate) fn explain(error: &rusqlite::Error) -> String {
    match error.sqlite_error() {
        Some(code) => format!("{error} (extended code {})", code.extended_code),
        None => error.to_string(),
    }
}

/// One write transaction: `step` and its row in `task_events`, committed. False if there was nothing to do.
pub(crate) fn commit(
    conn: &mut Connection,
    id: CommitId,
    step: fn(&Transaction<'_>, CommitId) -> rusqlite::Result<Option<Event>>,
) -> rusqlite::Result<bool> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let Some(event) = step(&tx, id)? else { return Ok(false) };
    record(&tx, id, &event)?;
    tx.commit()?;
    Ok(true)
}

/// Step: the next migration, if there is one left.
pub(crate) fn migrate(tx: &Transaction<'_>, _: CommitId) -> rusqlite::Result<Option<Event>> {
    let done: usize = tx.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0))? as usize;
    let Some(sql) = MIGRATIONS.get(done) else { return Ok(None) };
    tx.execute_batch(sql)?;
    Ok(Some(Event { kind: "migrate", change: None }))
}

/// Step: whatever a worker does next.
pub(crate) fn work(tx: &Transaction<'_>, id: CommitId) -> rusqlite::Result<Option<Event>> {
    if id.seq % DDL_EVERY == 0 {
        return change_schema(tx, id.worker).map(Some);
    }
    let event = if let Some(task) = own_task(tx, id.worker)? {
        finish(tx, id, task)?
    } else if counter(tx, "blocked")? > BLOCKED_MAX {
        unblock(tx)?
    } else if counter(tx, "todo")? < BACKLOG {
        create(tx, id)?
    } else {
        claim(tx, id)?
    };
    Ok(Some(event))
}

/// The task that the worker has in hand; a restarted worker finds the one of its predecessor.
fn own_task(tx: &Transaction<'_>, worker: u32) -> rusqlite::Result<Option<i64>> {
    tx.prepare_cached("SELECT id FROM tasks WHERE assignee = ?1 AND status = 'doing'")?
        .query_row([worker], |row| row.get(0))
        .optional()
}

fn create(tx: &Transaction<'_>, id: CommitId) -> rusqlite::Result<Event> {
    let task = tx
        .prepare_cached(
            "INSERT INTO tasks (title, body, priority, status)
             VALUES (printf('task %d of worker %d', ?1, ?2), randomblob(200), abs(random() % 5), 'todo')",
        )?
        .insert(params![id.seq, id.worker])?;
    Ok(Event { kind: "create", change: Some(Change { task, from: None, to: "todo" }) })
}

fn claim(tx: &Transaction<'_>, id: CommitId) -> rusqlite::Result<Event> {
    let task = tx
        .prepare_cached(
            "UPDATE tasks SET status = 'doing', assignee = ?1
             WHERE id = (SELECT id FROM tasks WHERE status = 'todo' ORDER BY priority, id LIMIT 1) RETURNING id",
        )?
        .query_row([id.worker], |row| row.get(0))?;
    tx.prepare_cached("INSERT INTO task_runs (task_id, worker, incarnation) VALUES (?1, ?2, ?3)")?
        .insert(params![task, id.worker, id.incarnation])?;
    Ok(Event { kind: "claim", change: Some(Change { task, from: Some("todo"), to: "doing" }) })
}

fn finish(tx: &Transaction<'_>, id: CommitId, task: i64) -> rusqlite::Result<Event> {
    let to = if id.seq % BLOCK_EVERY == 0 { "blocked" } else { "done" };
    update_one(tx, "UPDATE tasks SET status = ?2 WHERE id = ?1", params![task, to])?;
    update_one(
        tx,
        "UPDATE task_runs SET outcome = ?2 WHERE task_id = ?1 AND outcome IS NULL",
        params![task, to],
    )?;
    Ok(Event { kind: "finish", change: Some(Change { task, from: Some("doing"), to }) })
}

fn unblock(tx: &Transaction<'_>) -> rusqlite::Result<Event> {
    let task = tx
        .prepare_cached(
            "UPDATE tasks SET status = 'todo', assignee = NULL
             WHERE id = (SELECT id FROM tasks WHERE status = 'blocked' ORDER BY priority, id LIMIT 1) RETURNING id",
        )?
        .query_row([], |row| row.get(0))?;
    Ok(Event { kind: "unblock", change: Some(Change { task, from: Some("blocked"), to: "todo" }) })
}

fn change_schema(tx: &Transaction<'_>, worker: u32) -> rusqlite::Result<Event> {
    let (kind, sql) = DDL[ddl_stage(tx, worker)? % DDL.len()];
    tx.execute_batch(&sql.replace('#', &worker.to_string()))?;
    Ok(Event { kind, change: None })
}

/// How far the worker's scratch table is: 0 none, 1 a table, 2 with an index, 3 with the column added.
pub(crate) fn ddl_stage(conn: &Connection, worker: u32) -> rusqlite::Result<usize> {
    conn.prepare_cached(
        "SELECT (SELECT count(*) FROM sqlite_schema WHERE tbl_name = ?1)
              + (SELECT count(*) FROM pragma_table_info(?1) WHERE name = 'note')",
    )?
    .query_row([format!("scratch_{worker}")], |row| row.get::<_, u32>(0))
    .map(|stage| stage as usize)
}

/// Writes the transaction's row in `task_events` and brings the counters up to date.
fn record(tx: &Transaction<'_>, id: CommitId, event: &Event) -> rusqlite::Result<()> {
    let change = event.change.as_ref();
    tx.prepare_cached(
        "INSERT INTO task_events (task_id, kind, status, worker, incarnation, seq)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .insert(params![
        change.map(|change| change.task),
        event.kind,
        change.map(|change| change.to),
        id.worker,
        id.incarnation,
        id.seq
    ])?;
    add(tx, "events", 1)?;
    if let Some(change) = change {
        add(tx, change.to, 1)?;
        if let Some(from) = change.from {
            add(tx, from, -1)?;
        }
    }
    Ok(())
}

fn counter(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<i64> {
    tx.prepare_cached("SELECT value FROM counters WHERE name = ?1")?.query_row([name], |row| row.get(0))
}

fn add(tx: &Transaction<'_>, name: &str, amount: i64) -> rusqlite::Result<()> {
    update_one(tx, "UPDATE counters SET value = value + ?2 WHERE name = ?1", params![name, amount])
}

/// An UPDATE that must change exactly one row.
fn update_one(tx: &Transaction<'_>, sql: &str, params: &[&dyn rusqlite::ToSql]) -> rusqlite::Result<()> {
    match tx.prepare_cached(sql)?.execute(params)? {
        1 => Ok(()),
        changed => Err(rusqlite::Error::StatementChangedRows(changed)),
    }
}

/// How many rows `task_events` had up to which id. Events are never deleted, so a reader need not count those
/// again that it has counted once, and its transactions stay short on a board of any age.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    rows: i64,
    up_to: i64,
}

impl Counted {
    /// Counts the events that came since.
    pub(crate) fn advance(self, conn: &Connection) -> rusqlite::Result<Self> {
        conn.prepare_cached("SELECT ?1 + count(*), coalesce(max(id), ?2) FROM task_events WHERE id > ?2")?
            .query_row([self.rows, self.up_to], |row| Ok(Self { rows: row.get(0)?, up_to: row.get(1)? }))
    }
}

/// The counters that are not what they count, as text. `done` only grows, and only the audit counts it.
pub(crate) fn disagreements(conn: &Connection, events: Counted, done: bool) -> rusqlite::Result<Vec<String>> {
    conn.prepare_cached(
        "SELECT printf('counter %s is %d, counted %d', name, value, counted)
         FROM (SELECT name, value, CASE name WHEN 'events' THEN ?1
                      ELSE (SELECT count(*) FROM tasks WHERE status = name) END AS counted
               FROM counters WHERE name <> 'done' OR ?2)
         WHERE value <> counted",
    )?
    .query_map(params![events.rows, done], |row| row.get(0))?
    .collect()
}
