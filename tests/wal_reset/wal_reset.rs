//! The WAL-reset race, on an SQLite that has it: corrupt in every run on stock SQLite, in none through kanbanlock.
//!
//! The bug (<https://www.sqlite.org/wal.html#walresetbug>; SQLite 3.7.0 to 3.51.2, but for 3.44.6 and 3.50.7):
//! a checkpointer reads the wal-index header, which says that the WAL has M frames; all of them are in the
//! database file already, so there is nothing to do, and `nBackfill`, the count of frames copied, says so. Before
//! the checkpointer compares the two, a writer, who finds the WAL copied in full as well, *restarts* it: its
//! frames go to the start of the file, `nBackfill` to 0. The checkpointer now sees 0 < M, copies what it finds
//! there as far as the *old* header goes, and sets `nBackfill = M`. From then on the first M frames of the new WAL
//! pass for copied. Those that are not, because their pages lie behind the old end of the database or because
//! they are written later, no reader looks up, no checkpoint copies, and the next restart overwrites.
//!
//! So nothing is wrong with any lock that a writer or a checkpointer takes: there is one lock too few. A flock
//! around write transactions adds none that a checkpointer would wait for. kanbanlock's *reset guard* (rows G1–G4
//! of `src/state.rs`) does: a writer must win CKPT, which a checkpointer holds all that time, before it restarts.
//!
//! ## The schedule
//!
//! Between reading the header and comparing, `sqlite3WalCheckpoint` makes one call through the VFS, if the header
//! is news to it: `xUnfetch(fd, 0, 0)`. A tap on top of the checkpointer's VFS stops it there, so the race is
//! lost in every run, without luck and without a sleep:
//!
//! ```text
//!   founder (stock)          writer                           checkpointer (a process of its own)
//!   CREATE TABLE             opens                            opens, reads: knows a header
//!                            20 commits: a newer header, M frames
//!   checkpoint, complete:
//!   nBackfill = M
//!                                                             checkpoint: wins CKPT, reads the header,
//!                                                             ── xUnfetch: stopped ──
//!                            1 commit: restarts the WAL (stock)
//!                            or appends to it (reset guard)
//!                                                             ── goes on ── 0 < M, so: nBackfill = M
//!                            5 commits: frames below M
//!   all close; an audit on stock SQLite looks for each acknowledged commit, and runs integrity_check
//! ```
//!
//! With *long* notes the database grows, and ends up malformed: its pages behind the old end are missing. With
//! *short* ones, all on one page, integrity_check says ok and the last 5 acknowledged commits are gone.
//!
//! ## The scenarios, 20 runs each, with long notes and with short ones
//!
//! | writer | checkpointer | bad runs | what it shows |
//! |---|---|---|---|
//! | stock | stock | 20 | the bug, and that the schedule meets it |
//! | kanbanlock | kanbanlock | 0 | the guard closes it |
//! | kanbanlock | stock | 0 | the guard asks nothing of the checkpointer |
//! | kanbanlock without the guard | kanbanlock | 20 | it is the guard that helps, not the flock |
//! | stock | kanbanlock | 20 | a limit: nothing beneath a checkpointer can hold up somebody else's restart |

#[path = "../support/mod.rs"]
mod support;

use std::ffi::c_int;
use std::fs;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::{Connection, ffi};
use support::agent::{self, Agent, Task};
use support::tap_vfs::{Call, FileKind, Method, Observer, Tap};
use support::{Stack, TestDb, is_flocked, set_journal_mode};

const RUNS: usize = 20;

/// Commits before the checkpoint, while it stands in its window, and after it. `AFTER` is so much smaller than
/// `BEFORE` that the new WAL stays shorter than M frames: any beyond those would be copied after all.
const BEFORE: i64 = 20;
const DURING: i64 = 1;
const AFTER: i64 = 5;
const LAST: i64 = BEFORE + DURING + AFTER;

/// For speed: nobody pulls the plug here.
const NO_SYNC: &str = "PRAGMA synchronous = OFF";

/// What a stopped checkpointer answers; see [`Window`].
const IN_WINDOW: &str = "in the window";

/// The checkpointer's VFSes: the one that is named, with a [`Window`] on top.
const STOCK_WITH_WINDOW: &str = "unix-with-window";
const KANBANLOCK_WITH_WINDOW: &str = "kanbanlock-with-window";

/// Stops an agent at its first `xUnfetch`. Nothing but the checkpoint calls it here: there is no memory mapping.
struct Window {
    is_open: AtomicBool,
}

impl Window {
    fn on(parent: &'static str, name: &'static str) {
        Tap::new(name, parent, Arc::new(Window { is_open: AtomicBool::new(true) })).register();
    }
}

impl Observer for Window {
    fn before(&self, call: Call<'_>) -> Option<c_int> {
        let is_here = call.method == Method::Unfetch && call.kind == FileKind::Database;
        if is_here && self.is_open.swap(false, Ordering::Relaxed) {
            agent::pause(IN_WINDOW);
        }
        None
    }
}

/// Beneath kanbanlock: answers SQLITE_OK to the reset guard's CKPT and takes no lock. What is left is a shim that
/// flocks and does nothing else. (Its writer runs no checkpoint but at the last close, alone with the database.)
struct NoGuard;

impl Observer for NoGuard {
    fn before(&self, call: Call<'_>) -> Option<c_int> {
        let is_ckpt = matches!(call.method, Method::ShmLock { offset: 1, count: 1, .. });
        is_ckpt.then_some(ffi::SQLITE_OK)
    }
}

/// In the same place, the control: lets everything pass.
struct WithGuard;

impl Observer for WithGuard {}

#[test]
fn agent_process() {
    agent::serve_if_asked_with(|is_shimmed| match is_shimmed {
        true => Window::on("kanbanlock", KANBANLOCK_WITH_WINDOW),
        false => Window::on("unix", STOCK_WITH_WINDOW),
    });
}

/// What the writer writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notes {
    /// More than half a page each, so each has a page of its own: the database grows with every commit.
    Long,
    /// All of them fit on one page: the database keeps its size.
    Short,
}

impl Notes {
    fn body(self, id: i64) -> String {
        format!("note {id}. ").repeat(if self == Notes::Long { 300 } else { 1 })
    }
}

/// What one run has come to.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    /// The writer restarted the WAL while the checkpointer was in its window.
    restarted: bool,
    /// Acknowledged commits that the audit did not find again.
    lost: Vec<i64>,
    /// The first line of `PRAGMA integrity_check`, or the error that it failed with.
    integrity: String,
}

impl Outcome {
    fn bad(notes: Notes) -> Outcome {
        let (lost, integrity) = match notes {
            Notes::Long => (1..=LAST, "database disk image is malformed"),
            Notes::Short => (LAST - AFTER + 1..=LAST, "ok"),
        };
        Outcome { restarted: true, lost: lost.collect(), integrity: integrity.to_owned() }
    }

    fn good() -> Outcome {
        Outcome { restarted: false, lost: Vec::new(), integrity: "ok".to_owned() }
    }
}

/// The schedule of the header, once, in a database of its own.
fn run(writer_vfs: &str, checkpointer_vfs: &str, notes: Notes) -> Outcome {
    let db = TestDb::new();
    let founder = db.open("unix");
    founder.execute_batch(NO_SYNC).unwrap();
    set_journal_mode(&founder, "wal");
    founder.execute_batch("CREATE TABLE note (id INTEGER PRIMARY KEY, body TEXT NOT NULL)").unwrap();

    let writer = Writer::open(&db, writer_vfs, notes);
    let mut checkpointer = open_checkpointer(&db, checkpointer_vfs);
    checkpointer.execute(NO_SYNC).unwrap();
    assert_eq!(checkpointer.query("SELECT count(*) FROM note"), "0");
    writer.commit(1..=BEFORE);
    checkpoint_all(&founder);
    drop(founder);

    let before = salts(&db);
    checkpointer.send(&Task::Query("PRAGMA wal_checkpoint(PASSIVE)".to_owned()));
    assert_eq!(checkpointer.receive().unwrap(), IN_WINDOW);
    writer.commit(BEFORE + 1..=BEFORE + DURING);
    let restarted = salts(&db) != before;
    checkpointer.resume();
    assert_eq!(checkpointer.receive().unwrap(), "0", "the checkpoint was not refused");
    writer.commit(BEFORE + DURING + 1..=LAST);

    checkpointer.ask(&Task::Close).unwrap();
    drop(writer);
    let (lost, integrity) = audit(&db, notes);
    Outcome { restarted, lost, integrity }
}

/// In a process of its own, which for a stock checkpointer has no kanbanlock in it.
fn open_checkpointer(db: &TestDb, vfs: &str) -> Agent {
    let mut agent = if vfs == STOCK_WITH_WINDOW { Agent::stock() } else { Agent::start() };
    agent.ask(&Task::Open(format!("file:{}?vfs={vfs}", db.path().display()))).unwrap();
    agent
}

/// A connection that commits notes, one by one.
struct Writer<'a> {
    connection: Connection,
    db: &'a TestDb,
    notes: Notes,
    is_shimmed: bool,
}

impl Writer<'_> {
    fn open<'a>(db: &'a TestDb, vfs: &str, notes: Notes) -> Writer<'a> {
        let connection = db.open(vfs);
        connection.execute_batch(NO_SYNC).unwrap();
        // No checkpoint but those of the schedule.
        connection.execute_batch("PRAGMA wal_autocheckpoint = 0").unwrap();
        Writer { connection, db, notes, is_shimmed: vfs != "unix" }
    }

    /// Returns when every one of them is acknowledged: none may ever be missing from then on.
    fn commit(&self, ids: RangeInclusive<i64>) {
        for id in ids {
            self.connection.execute_batch("BEGIN IMMEDIATE").unwrap();
            assert_eq!(is_flocked(&self.db.lock_file()), self.is_shimmed);
            self.connection.execute("INSERT INTO note VALUES (?1, ?2)", (id, self.notes.body(id))).unwrap();
            self.connection.execute_batch("COMMIT").unwrap();
        }
    }
}

fn checkpoint_all(connection: &Connection) {
    let answer: (i64, i64, i64) = connection
        .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .unwrap();
    let (busy, frames, copied) = answer;
    assert!(busy == 0 && frames == copied, "everything is copied: {answer:?}");
    assert!(frames > 3 * (DURING + AFTER), "the new WAL, a few frames for each commit, stays shorter");
}

/// Closed by all, opened by stock SQLite: which acknowledged notes are missing, and what integrity_check says.
fn audit(db: &TestDb, notes: Notes) -> (Vec<i64>, String) {
    assert!(!db.beside("-wal").exists(), "the last close has checkpointed and deleted the WAL");
    let connection = db.open("unix");
    let is_there = |id: i64| {
        let found = connection.query_row("SELECT body FROM note WHERE id = ?1", [id], |row| row.get(0));
        found.is_ok_and(|found: String| found == notes.body(id))
    };
    let lost = (1..=LAST).filter(|&id| !is_there(id)).collect();
    let integrity = connection
        .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
        .unwrap_or_else(|error| error.to_string());
    (lost, integrity)
}

/// The two salts of the WAL header: they change when the WAL is restarted.
/// <https://www.sqlite.org/fileformat2.html#walformat>
fn salts(db: &TestDb) -> [u8; 8] {
    fs::read(db.beside("-wal")).unwrap()[16..24].try_into().unwrap()
}

/// Every run of this pair, with long notes and with short ones, must come to the same.
fn assert_each_run(writer_vfs: &str, checkpointer_vfs: &str, expected: impl Fn(Notes) -> Outcome) {
    for notes in [Notes::Long, Notes::Short] {
        for number in 1..=RUNS {
            let outcome = run(writer_vfs, checkpointer_vfs, notes);
            assert_eq!(outcome, expected(notes), "run {number}, {notes:?} notes");
        }
    }
}

#[test]
fn this_sqlite_has_the_bug_and_registration_warns_of_it_once() {
    assert_eq!(rusqlite::version(), "3.50.2", "pinned in Cargo.toml: an SQLite that has the bug");
    let log = Agent::start().log();
    assert_eq!(log.matches("SQLite 3.50.2 has the WAL-reset race").count(), 1, "{log}");
}

#[test]
fn stock_writer_and_stock_checkpointer_corrupt_the_database() {
    assert_each_run("unix", STOCK_WITH_WINDOW, Outcome::bad);
}

#[test]
fn shimmed_writer_and_shimmed_checkpointer_do_not() {
    kanbanlock::register().unwrap();
    assert_each_run("kanbanlock", KANBANLOCK_WITH_WINDOW, |_| Outcome::good());
}

#[test]
fn shimmed_writer_and_stock_checkpointer_do_not() {
    kanbanlock::register().unwrap();
    assert_each_run("kanbanlock", STOCK_WITH_WINDOW, |_| Outcome::good());
}

#[test]
fn the_flock_without_the_guard_does_not_help() {
    let flock_only = Stack::new(Arc::new(NoGuard)).kanbanlock;
    assert_each_run(flock_only, KANBANLOCK_WITH_WINDOW, Outcome::bad);
    let control = Stack::new(Arc::new(WithGuard)).kanbanlock;
    assert_each_run(control, KANBANLOCK_WITH_WINDOW, |_| Outcome::good());
}

/// The limit, as ARCHITECTURE.md states it: it is the *writers* that must go through the shim.
#[test]
fn a_shimmed_checkpointer_cannot_help_against_a_stock_writer() {
    assert_each_run("unix", KANBANLOCK_WITH_WINDOW, Outcome::bad);
}
