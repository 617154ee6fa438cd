//! `register_with`: another copy of SQLite in this process, here the system's `libsqlite3.so.0`, loaded at run
//! time beside the bundled one.

mod support;

use kanbanlock::{Options, register_with};
use rusqlite::ffi;
use support::system_sqlite::{System, SystemConnection};
use support::{TestDb, code, is_flocked};

/// With close-proof locks even the plain unix VFSes of two copies exclude each other, readers included, once both have
/// registered.
#[test]
fn close_proof_locks_exclude_between_two_copies() {
    let Some(system) = System::load_or_skip() else { return };
    kanbanlock::register().unwrap();
    // SAFETY: System::api.
    unsafe { register_with(system.api(), &Options::new()) }.unwrap();
    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let bundled = db.open("unix");
        support::set_journal_mode(&bundled, journal_mode);
        bundled.execute_batch("CREATE TABLE t (x)").unwrap();
        let other = SystemConnection::open(&system, &format!("file:{}?vfs=unix", db.path().display()));
        assert_eq!(other.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1)"), ffi::SQLITE_OK);
        assert_eq!(code(bundled.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY, "{journal_mode}");
        assert_eq!(other.execute("COMMIT"), ffi::SQLITE_OK);
        bundled.execute_batch("BEGIN; SELECT * FROM t").unwrap();
        if journal_mode == "delete" {
            assert_eq!(other.execute("INSERT INTO t VALUES (2)"), ffi::SQLITE_BUSY, "the other copy reads");
        }
        bundled.execute_batch("COMMIT").unwrap();
        assert_eq!(other.execute("INSERT INTO t VALUES (2)"), ffi::SQLITE_OK);
    }
}

#[test]
fn two_copies_of_sqlite_in_one_process_have_a_registration_each_and_one_gate() {
    let Some(system) = System::load_or_skip() else { return };
    kanbanlock::register().unwrap();
    // SAFETY: System::api.
    unsafe { register_with(system.api(), &Options::new()) }.unwrap();
    // SAFETY: ditto. Again: idempotent for this copy as well.
    unsafe { register_with(system.api(), &Options::new()) }.unwrap();
    // SAFETY: sqlite3_vfs_find of that copy.
    let theirs = unsafe { (system.api().vfs_find)(c"kanbanlock".as_ptr()) };
    // SAFETY: a NUL-terminated name.
    let ours = unsafe { ffi::sqlite3_vfs_find(c"kanbanlock".as_ptr()) };
    assert!(!theirs.is_null() && !ours.is_null());
    assert_ne!(theirs as usize, ours as usize, "one structure in two lists would splice them");

    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let bundled = db.open("kanbanlock");
        support::set_journal_mode(&bundled, journal_mode);
        bundled.execute_batch("CREATE TABLE t (x)").unwrap();
        let other = SystemConnection::open(&system, &format!("file:{}?vfs=kanbanlock", db.path().display()));

        assert_eq!(other.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1)"), ffi::SQLITE_OK);
        assert!(is_flocked(&db.lock_file()));
        // POSIX locks do not conflict within a process: only the gate keeps the bundled copy out.
        assert_eq!(code(bundled.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY, "{journal_mode}");
        assert_eq!(other.execute("COMMIT"), ffi::SQLITE_OK);
        bundled.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (2)").unwrap();
        assert_eq!(other.execute("BEGIN IMMEDIATE"), ffi::SQLITE_BUSY, "{journal_mode}");
        bundled.execute_batch("COMMIT").unwrap();
    }
}

/// That something is needed: in a process without kanbanlock both copies get BEGIN IMMEDIATE.
#[test]
fn without_kanbanlock_two_copies_do_not_exclude_each_other() {
    let Some(system) = System::load_or_skip() else { return };
    support::in_own_process("without_kanbanlock_two_copies_do_not_exclude_each_other", || {
        let db = TestDb::new();
        let bundled = db.open("unix");
        bundled.execute_batch("CREATE TABLE t (x)").unwrap();
        let other = SystemConnection::open(&system, &format!("file:{}?vfs=unix", db.path().display()));
        assert_eq!(other.execute("BEGIN IMMEDIATE"), ffi::SQLITE_OK);
        bundled.execute_batch("BEGIN IMMEDIATE").unwrap();
    });
}
