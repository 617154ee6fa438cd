//! Close-proof locks installed while SQLite is in use: one thread registers, another opens databases on the plain unix
//! VFS and locks them. Whatever a lock was taken by, its unlock must find it.
//!
//! OFD and POSIX locks conflict even within a process. A POSIX lock that is left behind on an inode whose calls go the
//! OFD way keeps everybody out, this process included, until the connection is closed. What makes the moment long enough
//! to be hit are many open descriptors, all of which the installation looks at.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rusqlite::Connection;
use support::{in_own_processes, open, set_journal_mode};

const DATABASES: usize = 200;
const DESCRIPTORS: usize = 1500;
/// A process registers once. (Before the hooks were installed as they are now, each of these tests failed in about 6
/// processes of 10.)
const PROCESSES: usize = 5;

/// The kinds of lock, `POSIX` or `OFDLCK`, that are on a file: /proc/locks, proc(5).
fn kinds_of_locks(path: &Path, locks: &BTreeMap<u64, BTreeSet<String>>) -> BTreeSet<String> {
    let Ok(metadata) = path.metadata() else { return BTreeSet::new() };
    locks.get(&metadata.ino()).cloned().unwrap_or_default()
}

/// By inode. All files of a test are on one file system; an inode number of another one is nobody's here.
fn locks() -> BTreeMap<u64, BTreeSet<String>> {
    let mut locks: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    for line in support::proc_locks() {
        // "1: POSIX  ADVISORY  READ 5433 08:01:7864448 128 128"
        let words: Vec<&str> = line.split_whitespace().filter(|word| *word != "->").collect();
        let inode = words[5].rsplit(':').next().unwrap().parse().unwrap();
        locks.entry(inode).or_default().insert(words[1].to_owned());
    }
    locks
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// More descriptors than usual.
fn open_many() -> Vec<File> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a place for the answer.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the soft limit raised to the hard one, which everybody may.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    // DESCRIPTORS, and for each connection of DATABASES one or, in WAL mode, three.
    assert!(limit.rlim_max > 3 * 1024, "the hard limit is {}", limit.rlim_max);
    (0..DESCRIPTORS).map(|_| File::open("/dev/null").unwrap()).collect()
}

fn register_while_a_thread_opens_and_locks(journal_mode: &str) {
    let dir = tempfile::tempdir().unwrap();
    let _descriptors = open_many();
    let path = |number: usize| dir.path().join(format!("{number}.db"));
    for number in 0..DATABASES {
        let db = open(&path(number), "unix");
        set_journal_mode(&db, journal_mode);
        db.execute_batch("PRAGMA synchronous = OFF; CREATE TABLE t (x); INSERT INTO t VALUES (0)").unwrap();
    }
    let opened = AtomicUsize::new(0);
    let (is_registered, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let await_opened = |count: usize| {
        while opened.load(Ordering::SeqCst) < count.min(DATABASES) {
            std::thread::yield_now();
        }
    };
    let connections = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut connections = Vec::new();
            while connections.len() < DATABASES && !is_over.load(Ordering::SeqCst) {
                while connections.len() == DATABASES - 5 && !is_registered.load(Ordering::SeqCst) {
                    std::thread::yield_now(); // the last ones are for afterwards
                }
                let db = open(&path(connections.len()), "unix");
                db.execute_batch("BEGIN; SELECT * FROM t").unwrap();
                connections.push(db);
                opened.store(connections.len(), Ordering::SeqCst);
            }
            connections
        });
        await_opened(5);
        kanbanlock::register().unwrap();
        is_registered.store(true, Ordering::SeqCst);
        await_opened(opened.load(Ordering::SeqCst) + 5);
        is_over.store(true, Ordering::SeqCst);
        reader.join().unwrap()
    });

    let kinds = |suffix: &str| {
        let locks = locks();
        let kinds = |number| kinds_of_locks(&with_suffix(&path(number), suffix), &locks);
        (0..connections.len()).map(kinds).collect::<Vec<_>>()
    };
    let file_with_locks = if journal_mode == "wal" { "-shm" } else { "" };
    let ways: BTreeSet<_> = kinds(file_with_locks).into_iter().flatten().collect();
    assert_eq!(ways.len(), 2, "some were locked before, and some after: {ways:?}");

    for db in &connections {
        db.execute_batch("COMMIT").unwrap();
    }
    if journal_mode == "delete" {
        assert!(kinds("").iter().all(BTreeSet::is_empty), "a lock was left behind: {:?}", kinds(""));
    }
    let is_refused = |db: &&Connection| db.execute("INSERT INTO t VALUES (1)", []).is_err();
    let refused = connections.iter().filter(is_refused).count();
    let checkpoint = |db: &Connection| {
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    let busy = connections.iter().filter(|db| journal_mode == "wal" && checkpoint(db) != 0).count();
    assert_eq!((refused, busy), (0, 0), "of {}: inserts refused, checkpoints busy", connections.len());
    for suffix in ["", "-shm"] {
        assert!(kinds(suffix).iter().all(|kinds| kinds.len() < 2), "both ways: {:?}", kinds(suffix));
    }
    for (number, db) in connections.into_iter().enumerate() {
        db.close().unwrap();
        let again = open(&path(number), "unix");
        let count: i64 = again.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
        assert_eq!(count, 2);
    }
}

/// Rollback mode: SHARED was left behind, and each later write was "database is locked".
#[test]
fn a_registration_leaves_no_shared_lock_behind() {
    in_own_processes(PROCESSES, "a_registration_leaves_no_shared_lock_behind", || {
        register_while_a_thread_opens_and_locks("delete");
    });
}

/// WAL mode: a read mark was left behind, and no checkpoint could restart the WAL.
#[test]
fn a_registration_leaves_no_read_mark_behind() {
    in_own_processes(PROCESSES, "a_registration_leaves_no_read_mark_behind", || {
        register_while_a_thread_opens_and_locks("wal");
    });
}
