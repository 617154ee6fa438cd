//! Row L12: a SQLite before 3.51 deletes a WAL that another process still writes to; through kanbanlock it does not.
//!
//! A process in WAL mode holds SHARED on the database for as long as it is connected, and that is what keeps others from
//! deleting the WAL. A close() of the database file anywhere in the process cancels it, without a sign. The next one
//! to close its connection then believes to be the last: it is granted EXCLUSIVE, copies the WAL into the database and
//! unlinks it. What the first process commits from then on goes into a file without a name.
//!
//! One trace of the first process is left, its lock on the DMS byte of the `-shm`. SQLite 3.51 asks for it before it
//! asks for EXCLUSIVE. The system's SQLite here is an older one; the victim is stock SQLite in a process of its own.

mod support;

use kanbanlock::{Options, register_with};
use rusqlite::ffi;
use support::agent::{Agent, Task};
use support::system_sqlite::{System, SystemConnection};
use support::{TestDb, in_own_process};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// What the visitor does last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// It closes its connection, as the last one.
    Close,
    /// It switches the database to rollback mode first.
    LeaveWalMode,
}

/// The titles that a new connection finds, after a commit that the victim was promised when the visitor was gone.
fn visit(system: &System, vfs: &str, leave: Leave) -> String {
    let db = TestDb::new();
    let mut victim = Agent::stock_with_db(db.path());
    victim.query("PRAGMA journal_mode = WAL");
    victim.execute("CREATE TABLE task (title TEXT); INSERT INTO task VALUES ('before')").unwrap();

    let visitor = SystemConnection::open(system, &format!("file:{}?vfs={vfs}", db.path().display()));
    assert_eq!(visitor.execute("SELECT * FROM task"), ffi::SQLITE_OK);
    victim.ask(&Task::StrayClose(db.path().to_owned())).unwrap();
    if leave == Leave::LeaveWalMode {
        let expected = if vfs == "unix" { ffi::SQLITE_OK } else { ffi::SQLITE_BUSY };
        assert_eq!(visitor.execute("PRAGMA journal_mode = DELETE"), expected, "{vfs}");
    }
    drop(visitor);

    victim.execute("INSERT INTO task VALUES ('acknowledged')").unwrap();
    let mut auditor = Agent::stock_with_db(db.path());
    assert_eq!(auditor.query("PRAGMA integrity_check"), "ok", "the loss does not show here");
    auditor.query("SELECT group_concat(title) FROM task")
}

#[test]
fn an_older_sqlite_that_closes_last_leaves_a_wal_in_use_alone() {
    let Some(system) = System::load_or_skip() else { return };
    in_own_process("an_older_sqlite_that_closes_last_leaves_a_wal_in_use_alone", || {
        // SAFETY: the system's SQLite, all of it; never unloaded.
        unsafe { register_with(system.api(), &Options::new()) }.unwrap();
        // SAFETY: no arguments.
        let asks_itself = unsafe { (system.api().libversion_number)() } >= 3_051_000;
        for leave in [Leave::Close, Leave::LeaveWalMode] {
            if asks_itself {
                println!(
                    "SKIPPED the stock half: the system's SQLite is 3.51 or later, and asks the DMS byte itself"
                );
            } else {
                assert_eq!(visit(&system, "unix", leave), "before", "{leave:?}: stock loses the commit");
            }
            assert_eq!(visit(&system, "kanbanlock", leave), "before,acknowledged", "{leave:?}");
        }
    });
}

/// The mark is asked for where it must be, and not believed where nobody else is there: the WAL of a sole connection
/// goes at its close, as ever, and a process's own connections do not count as others.
#[test]
fn the_last_connection_still_deletes_its_wal() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let (a, b) = (db.open("kanbanlock"), db.open("kanbanlock"));
    support::set_journal_mode(&a, "wal");
    a.execute_batch("CREATE TABLE task (title TEXT)").unwrap();
    b.execute_batch("INSERT INTO task VALUES ('x')").unwrap();
    drop(a);
    assert!(db.beside("-wal").exists(), "b is connected");
    drop(b);
    assert!(!db.beside("-wal").exists() && !db.beside("-shm").exists());
}
