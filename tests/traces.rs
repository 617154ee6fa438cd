//! Golden traces: what reaches the real VFS, call by call, and whether the gate was held at that instant.
//!
//! One script for each journal mode, recorded by a tap beneath kanbanlock and compared with `tests/golden/`. A
//! line reads `held  xLock EXCLUSIVE → OK`: the first word is the gate *as the real VFS is called*, so the order
//! "acquire gate → real, release real → gate" is there to be read: a write lock is asked for with the gate held,
//! and given up with the gate held.
//!
//! `UPDATE_GOLDEN=1 cargo test --test traces` writes the files anew; read the difference before you commit it.

mod support;

use std::ffi::c_int;
use std::fmt::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rusqlite::{Connection, ffi};
use support::tap_vfs::{Call, FileKind, Method, Observer};
use support::{Stack, TestDb, is_flocked, set_journal_mode};

#[derive(Default)]
struct Trace(Mutex<String>);

impl Trace {
    fn note(&self, line: &str) {
        writeln!(self.0.lock().unwrap(), "{line}").unwrap();
    }
}

fn is_lock_call(call: Call<'_>) -> bool {
    let changes_locks = matches!(
        call.method,
        Method::Lock(_) | Method::Unlock(_) | Method::ShmLock { .. } | Method::ShmUnmap | Method::Close
    );
    call.kind == FileKind::Database && changes_locks
}

impl Observer for Trace {
    fn before(&self, call: Call<'_>) -> Option<c_int> {
        if is_lock_call(call) {
            let held = is_flocked(format!("{}.lock", call.path).as_ref());
            write!(self.0.lock().unwrap(), "{}  {call}", if held { "held" } else { "free" }).unwrap();
        }
        None
    }

    fn after(&self, call: Call<'_>, code: c_int) {
        if is_lock_call(call) {
            let answer = if code == ffi::SQLITE_OK { "OK".to_owned() } else { code.to_string() };
            self.note(&format!(" → {answer}"));
        }
    }
}

/// Every kind of lock sequence, in short.
const SCRIPT: &[&str] = &[
    "SELECT count(*) FROM t",
    "INSERT INTO t VALUES (1)",
    "BEGIN IMMEDIATE; INSERT INTO t VALUES (2); ROLLBACK",
    "BEGIN EXCLUSIVE; INSERT INTO t VALUES (3); COMMIT",
    "BEGIN; SELECT count(*) FROM t; INSERT INTO t VALUES (4); COMMIT",
    "CREATE TABLE u (y)",
    "PRAGMA wal_checkpoint(PASSIVE)",
    "INSERT INTO t VALUES (5)",
    "PRAGMA wal_checkpoint(TRUNCATE)",
    "VACUUM",
];

fn trace(journal_mode: &str) -> String {
    let trace = Arc::new(Trace::default());
    let stack = Stack::new(trace.clone());
    let db = TestDb::new();
    let connection = db.open(stack.kanbanlock);
    connection.execute_batch("CREATE TABLE t (x)").unwrap();
    *trace.0.lock().unwrap() = String::new();
    trace.note(&format!("-- PRAGMA journal_mode = {journal_mode}"));
    set_journal_mode(&connection, journal_mode);
    for sql in SCRIPT {
        trace.note(&format!("\n-- {sql}"));
        run(&connection, sql);
        assert!(!is_flocked(&db.lock_file()), "{sql}");
    }
    trace.note("\n-- close");
    connection.close().unwrap();
    std::mem::take(&mut trace.0.lock().unwrap())
}

fn run(connection: &Connection, sql: &str) {
    connection.execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
}

fn compare(journal_mode: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{journal_mode}.txt"));
    let now = trace(journal_mode);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &now).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    for (number, (golden, now)) in golden.lines().zip(now.lines()).enumerate() {
        assert_eq!(now, golden, "{}:{}", path.display(), number + 1);
    }
    assert_eq!(now.lines().count(), golden.lines().count(), "{}", path.display());
}

#[test]
fn rollback_mode() {
    compare("delete");
}

#[test]
fn wal_mode() {
    compare("wal");
}

/// No golden file needed: no lock that writes is asked for, or given up, with the gate free. The one exception is
/// row S5: the first reader of a new WAL builds the wal-index under WRITE, ungated.
#[test]
fn write_locks_are_asked_for_and_given_up_with_the_gate_held() {
    for (journal_mode, ungated) in [("delete", 0), ("wal", 2)] {
        let trace = trace(journal_mode);
        let is_write_lock = |line: &&str| {
            ["xLock RESERVED", "xLock EXCLUSIVE", "exclusive WRITE"].iter().any(|call| line.contains(call))
        };
        let (held, free): (Vec<_>, Vec<_>) =
            trace.lines().filter(is_write_lock).partition(|line| line.starts_with("held"));
        assert!(held.len() > 10, "{journal_mode}: {held:?}");
        assert_eq!(free.len(), ungated, "{journal_mode}: {free:?}");
    }
}
