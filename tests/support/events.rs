//! What the tests of the features `log` and `tracing` share: the scenarios, told by what a logger is called with.
//!
//! A logger is the process's, and a connection's events come in the connection's thread: so each test, a thread of its
//! own, sees its own events, and may do with each what it likes ([`on_event`]).

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rusqlite::Connection;

use super::agent::Agent;
use super::{TestDb, await_tick, code, in_own_process, is_flocked, log, set_journal_mode};

/// The tests, with a logger that `$install` installs, once in a process.
#[allow(unused_macros)] // of the test binaries, two use it
macro_rules! tests_with {
    ($install:ident) => {
        tests_with!($install: every_line_of_the_log_is_an_event);
        tests_with!($install: a_long_wait_is_two_events);
        tests_with!($install: a_logger_may_use_sqlite);
        tests_with!($install: a_logger_may_use_sqlite_also_for_a_line_from_inside_the_unix_vfs);
        tests_with!($install: a_panic_of_a_logger_ends_before_sqlite);
    };
    ($install:ident: $scenario:ident) => {
        #[test]
        fn $scenario() {
            $install();
            $crate::support::events::$scenario();
        }
    };
}
#[allow(unused_imports)]
pub(crate) use tests_with;

/// An event, as a logger sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub level: String,
    pub target: String,
    pub message: String,
    pub code: Option<i64>,
    pub database: Option<String>,
    pub waited_ms: Option<u64>,
}

type OnEvent = Rc<dyn Fn(&Seen)>;

thread_local! {
    static SEEN: RefCell<Vec<Seen>> = const { RefCell::new(Vec::new()) };
    static ON_EVENT: RefCell<Option<OnEvent>> = const { RefCell::new(None) };
}

/// What the loggers call.
pub fn seen(event: Seen) {
    SEEN.with_borrow_mut(|seen| seen.push(event.clone()));
    let on_event = ON_EVENT.with_borrow(Option::clone);
    if let Some(on_event) = on_event {
        on_event(&event);
    }
}

fn on_event(body: impl Fn(&Seen) + 'static) {
    ON_EVENT.set(Some(Rc::new(body)));
}

/// This thread's events so far.
fn events() -> Vec<Seen> {
    SEEN.with_borrow(Vec::clone)
}

const CANTOPEN: i32 = 14;
const CANTOPEN_SYMLINK: i32 = CANTOPEN | (6 << 8);
const NOTICE: i32 = 27;
const WARNING: i32 = 28;

/// A database in a folder of its own, with one table.
fn prepared(journal_mode: &str) -> TestDb {
    log::install();
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let connection = db.open("kanbanlock");
    set_journal_mode(&connection, journal_mode);
    connection.execute_batch("CREATE TABLE t (x)").unwrap();
    db
}

/// Somebody has put another lock file in the place of this one: the next write logs a warning, with the gate held.
fn replace_lock_file(db: &TestDb) {
    std::fs::remove_file(db.lock_file()).unwrap();
    std::fs::write(db.lock_file(), "").unwrap();
    await_tick();
}

fn rows(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap()
}

/// Each line of SQLite's log is an event, in the same order, with its result code, level, and database.
pub fn every_line_of_the_log_is_an_event() {
    let db = prepared("delete");
    let connection = db.open("kanbanlock");
    std::fs::rename(db.lock_file(), db.beside(".aside")).unwrap();
    std::os::unix::fs::symlink(db.beside(".aside"), db.lock_file()).unwrap();
    assert_eq!(code(connection.execute_batch("INSERT INTO t VALUES (1)")), CANTOPEN_SYMLINK);
    std::fs::remove_file(db.lock_file()).unwrap();
    connection.execute_batch("INSERT INTO t VALUES (1)").unwrap();
    replace_lock_file(&db);
    connection.execute_batch("INSERT INTO t VALUES (2)").unwrap();
    assert_eq!(code(db.try_open_uri("vfs=kanbanlock&kanbanlock_fallbck=refuse")), CANTOPEN);

    let events = events();
    let summary: Vec<_> = events.iter().map(|event| (&*event.level, event.code)).collect();
    let expected = [("ERROR", CANTOPEN_SYMLINK), ("WARN", WARNING), ("ERROR", CANTOPEN)];
    assert_eq!(summary, expected.map(|(level, code)| (level, Some(i64::from(code)))), "{events:#?}");
    for event in &events {
        assert_eq!(event.target, "kanbanlock");
        assert_eq!(event.database.as_deref(), db.path().to_str());
        assert_eq!(event.waited_ms, None);
        let line = format!("kanbanlock: {}", event.message);
        assert_eq!(log::lines_with(&line).len(), 1, "{line}");
    }
    assert_eq!(log::lines_about(db.dir()).len(), 2); // the third, of the parameter, has no path
}

/// The warning that names the holder, while the wait goes on; and what SQLite's log does not have: its end.
pub fn a_long_wait_is_two_events() {
    let db = prepared("wal");
    let mut holder = Agent::with_db(db.path(), "kanbanlock");
    holder.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1)").unwrap();
    let pid = holder.pid();
    let connection = db.try_open_uri("vfs=kanbanlock&kanbanlock_warn_ms=20").unwrap();
    connection.busy_timeout(Duration::from_secs(600)).unwrap();
    let holder = RefCell::new(holder);
    on_event(move |event| {
        if event.message.starts_with("waiting for ") {
            holder.borrow_mut().execute("COMMIT").unwrap();
        }
    });
    connection.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (2); COMMIT").unwrap();
    assert_eq!(rows(&connection), 2);

    let events = events();
    let [waits, acquired] = &events[..] else { panic!("{events:#?}") };
    assert_eq!((&*waits.level, waits.code), ("WARN", Some(WARNING.into())));
    assert!(waits.message.contains(&format!("held by process {pid} (")), "{waits:?}");
    assert_eq!((&*acquired.level, acquired.code), ("INFO", Some(NOTICE.into())));
    assert!(acquired.message.contains(".lock was acquired after a wait of "), "{acquired:?}");
    for event in [waits, acquired] {
        assert!(event.waited_ms.is_some_and(|waited| waited >= 20), "{event:?}");
        assert_eq!(event.database.as_deref(), db.path().to_str());
    }
    assert!(waits.waited_ms <= acquired.waited_ms);
    assert_eq!(log::lines_about(db.path()).len(), 1);

    // A wait that is not long makes none.
    connection.execute_batch("INSERT INTO t VALUES (3)").unwrap();
    assert_eq!(self::events().len(), 2);
}

/// A logger that writes what it is told into SQLite, through kanbanlock: into the very database that it is told of, and
/// into one that is out of order and has something to say itself.
pub fn a_logger_may_use_sqlite() {
    for journal_mode in ["delete", "wal"] {
        let db = prepared(journal_mode);
        let broken = prepared(journal_mode);
        std::fs::remove_file(broken.lock_file()).unwrap();
        std::os::unix::fs::symlink("/nowhere", broken.lock_file()).unwrap();
        let connection = db.open("kanbanlock");
        connection.execute_batch("INSERT INTO t VALUES ('first')").unwrap();
        replace_lock_file(&db);
        let calls = Rc::new(Cell::new(0));
        let (path, lock_file, broken_path) = (db.path().to_owned(), db.lock_file(), broken.path().to_owned());
        let counted = Rc::clone(&calls);
        on_event(move |event| {
            counted.set(counted.get() + 1);
            assert!(!is_flocked(&lock_file), "{event:?} came with the gate held");
            write(&path, &event.message).unwrap();
            assert_eq!(code(write(&broken_path, &event.message)), CANTOPEN_SYMLINK);
        });
        connection.execute_batch("INSERT INTO t VALUES ('second')").unwrap();
        assert_eq!(calls.get(), 1, "{journal_mode}: what a logger does is no event");
        assert!(!log::lines_about(broken.path()).is_empty(), "but it is in SQLite's log");
        assert_eq!(rows(&connection), 3, "{journal_mode}");
        ON_EVENT.set(None);
        // And the logger is called again after that.
        replace_lock_file(&db);
        let before = events().len();
        connection.execute_batch("INSERT INTO t VALUES ('third')").unwrap();
        assert_eq!(events().len(), before + 1);
    }
}

/// Without a busy timeout.
fn write(path: &Path, text: &str) -> rusqlite::Result<()> {
    super::open(path, "kanbanlock").execute("INSERT INTO t VALUES (?1)", [text]).map(drop)
}

/// A line that is written in a hook of the unix VFS, which has a mutex of its own locked, and so have the close-proof
/// locks. The logger opens a database: it would wait for both.
pub fn a_logger_may_use_sqlite_also_for_a_line_from_inside_the_unix_vfs() {
    in_own_process("a_logger_may_use_sqlite_also_for_a_line_from_inside_the_unix_vfs", || {
        // A deadlock shall fail, not hang.
        // SAFETY: alarm(2) takes a number; the signal ends the process.
        unsafe { libc::alarm(120) };
        log::install();
        let (db, other) = (TestDb::new(), TestDb::new());
        let before = Connection::open(db.path()).unwrap();
        before.execute_batch("CREATE TABLE t (x); BEGIN; SELECT * FROM t").unwrap(); // holds SHARED, a POSIX lock
        kanbanlock::register().unwrap();
        let path = other.path().to_owned();
        on_event(move |event| {
            let events = super::open(&path, "kanbanlock");
            set_journal_mode(&events, "wal");
            events.execute_batch("CREATE TABLE t (x)").unwrap();
            events.execute("INSERT INTO t VALUES (?1)", [&event.message]).unwrap();
        });
        db.open("kanbanlock").execute_batch("BEGIN IMMEDIATE; ROLLBACK").unwrap();
        let events = events();
        let [event] = &events[..] else { panic!("{events:#?}") };
        assert!(event.message.contains("has no close-proof locks: a connection from before"), "{event:?}");
        assert_eq!(event.database.as_deref(), db.path().to_str());
        assert_eq!(rows(&other.open("kanbanlock")), 1);
    });
}

/// A logger that panics changes nothing for SQLite.
pub fn a_panic_of_a_logger_ends_before_sqlite() {
    let db = prepared("delete");
    let connection = db.open("kanbanlock");
    connection.execute_batch("INSERT INTO t VALUES (1)").unwrap();
    replace_lock_file(&db);
    on_event(|event| panic!("a logger's own fault: {event:?}"));
    connection.execute_batch("INSERT INTO t VALUES (2)").unwrap();
    replace_lock_file(&db);
    connection.execute_batch("INSERT INTO t VALUES (3)").unwrap();
    assert_eq!(rows(&connection), 3);
    assert_eq!(events().len(), 2, "it was called, both times");
}
