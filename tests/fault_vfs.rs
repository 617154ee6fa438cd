//! # Is the instrument true?
//!
//! The fault tests lay every failure that they see at kanbanlock's door. So the VFS that they put
//! beneath it (`support/fault_vfs.rs`) has to be a sound VFS as long as nothing is armed, and has
//! to fail exactly as ordered when something is. Here SQLite runs on it directly.

#[path = "support/fault_vfs.rs"]
mod fault_vfs;

use std::path::Path;
use std::sync::Arc;

use fault_vfs::{Error, Event, Fault, FaultVfs, Faults, Gate, LockKind, Method, OpenKind, WalIndexHandle};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use sqlite_vfs::wip::{WalIndex, WalIndexLock};

const JOURNAL_MODES: [&str; 2] = ["DELETE", "WAL"];

fn open(path: &Path, vfs: &str) -> Connection {
    let conn = Connection::open_with_flags_and_vfs(path, OpenFlags::default(), vfs).unwrap();
    conn.busy_timeout(std::time::Duration::ZERO).unwrap();
    conn
}

fn create(path: &Path, vfs: &str, journal_mode: &str) -> Connection {
    let conn = open(path, vfs);
    let mode: String =
        conn.query_row(&format!("PRAGMA journal_mode={journal_mode}"), [], |row| row.get(0)).unwrap();
    assert_eq!(mode, journal_mode.to_lowercase());
    conn.execute_batch("CREATE TABLE t(x INTEGER PRIMARY KEY)").unwrap();
    conn
}

fn rows(conn: &Connection) -> i64 {
    conn.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap()
}

fn integrity(conn: &Connection) -> String {
    conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap()
}

fn code(result: rusqlite::Result<()>) -> Option<ErrorCode> {
    result.err().and_then(|error| error.sqlite_error_code())
}

/// Two connections in one thread, interleaved: writers exclude each other, readers keep their
/// snapshot (WAL) or hold off the writer at PENDING (DELETE), a rollback leaves nothing behind, and
/// a stock connection finds every row afterwards.
#[test]
fn two_connections() {
    for mode in JOURNAL_MODES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.db");
        let vfs = format!("two-{mode}");
        let faults = FaultVfs::register(&vfs);
        let a = create(&path, &vfs, mode);
        let b = open(&path, &vfs);

        a.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES(1)").unwrap();
        assert!(faults.has_writer(&path));
        assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), Some(ErrorCode::DatabaseBusy), "{mode}");
        assert_eq!(rows(&b), 0, "{mode}: B sees uncommitted rows");
        a.execute_batch("ROLLBACK").unwrap();
        assert!(!faults.has_writer(&path), "{mode}");
        assert_eq!(rows(&a), 0, "{mode}");

        b.execute_batch("BEGIN").unwrap();
        assert_eq!(rows(&b), 0);
        faults.clear();
        let commit = a.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES(2); COMMIT");
        if mode == "WAL" {
            assert_eq!(commit, Ok(()));
            assert_eq!(rows(&b), 0, "the snapshot of B has moved");
            assert!(faults.locks().contains(&"xShmLock WRITE UNLOCK -> OK".into()), "{:#?}", faults.locks());
        } else {
            assert_eq!(code(commit), Some(ErrorCode::DatabaseBusy));
            assert_eq!(faults.locks().last().map(String::as_str), Some("xLock EXCLUSIVE -> BUSY"));
            let c = open(&path, &vfs);
            assert_eq!(
                code(c.execute_batch("SELECT * FROM t")),
                Some(ErrorCode::DatabaseBusy),
                "PENDING admits C"
            );
            b.execute_batch("COMMIT").unwrap();
            a.execute_batch("COMMIT").unwrap();
        }
        if mode == "WAL" {
            b.execute_batch("COMMIT").unwrap();
        }
        assert_eq!(rows(&b), 1, "{mode}");
        b.execute_batch("INSERT INTO t VALUES(3)").unwrap();
        assert_eq!(rows(&a), 2, "{mode}");
        a.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); INSERT INTO t VALUES(4)").unwrap();
        assert_eq!(rows(&b), 3, "{mode}");
        assert_eq!(integrity(&b), "ok");

        drop(a);
        b.execute_batch("INSERT INTO t VALUES(5)").unwrap();
        drop(b);
        assert_eq!(faults.open_handles(&path), 0);
        let stock = Connection::open(&path).unwrap();
        assert_eq!((rows(&stock), integrity(&stock).as_str()), (4, "ok"), "{mode}");
        drop(stock);
        assert_eq!(rows(&open(&path, &vfs)), 4, "{mode}: reopened");
    }
}

/// A writer loses its disk in the middle of a transaction, and then its life. The next connection
/// finds a hot journal (DELETE) or an uncommitted tail (WAL), and the last commit.
#[test]
fn recovery() {
    for mode in JOURNAL_MODES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.db");
        let vfs = format!("recovery-{mode}");
        let faults = FaultVfs::register(&vfs);
        let a = create(&path, &vfs, mode);
        a.execute_batch("INSERT INTO t VALUES(1); PRAGMA cache_size=1; PRAGMA cache_spill=1").unwrap();
        a.execute_batch("BEGIN IMMEDIATE").unwrap();
        a.execute_batch(
            "WITH RECURSIVE n(x) AS (VALUES(2) UNION ALL SELECT x+1 FROM n WHERE x<9999)
             INSERT INTO t SELECT x FROM n",
        )
        .unwrap();
        for method in [Method::Write, Method::Truncate, Method::Delete, Method::Sync, Method::ShmLock] {
            faults.arm(Fault::new(method, Error::Io).persistent());
        }
        drop(a);
        faults.disarm();

        let journal = path.with_extension(if mode == "WAL" { "db-wal" } else { "db-journal" });
        assert!(journal.metadata().unwrap().len() > 4096, "nothing to recover from: {journal:?}");
        faults.clear();
        let b = open(&path, &vfs);
        assert_eq!((rows(&b), integrity(&b).as_str()), (1, "ok"), "{mode}");
        let recovery =
            if mode == "WAL" { "xShmLock RECOVER EXCLUSIVE -> OK" } else { "xLock EXCLUSIVE -> OK" };
        let locks = faults.locks();
        let recovered =
            locks.iter().any(|lock| lock == recovery) || locks.iter().any(|lock| lock.contains("RECOVER"));
        assert!(recovered, "{mode}: {locks:#?}");
    }
}

/// Two connections change different bytes of one region, each in its own copy. Neither undoes what the
/// other has done, and the one whose copy is out of date is refused WRITE until it has pulled.
#[test]
fn wal_index_copies() {
    const WRITE: std::ops::Range<u8> = 0..1;
    const CKPT: std::ops::Range<u8> = 1..2;
    let faults = Arc::new(Faults::default());
    let mut writer = WalIndexHandle::open(&faults, "t.db", 1);
    let mut checkpointer = WalIndexHandle::open(&faults, "t.db", 2);
    let (mut w, mut c) = (writer.map(0).unwrap(), checkpointer.map(0).unwrap());

    assert!(checkpointer.lock(CKPT, WalIndexLock::Exclusive).unwrap());
    assert!(writer.lock(WRITE, WalIndexLock::Exclusive).unwrap());
    assert!(!checkpointer.lock(WRITE, WalIndexLock::Exclusive).unwrap(), "WRITE is taken");
    w[16] = 7;
    writer.push(0, &w).unwrap();
    writer.lock(WRITE, WalIndexLock::None).unwrap();

    assert!(!checkpointer.lock(WRITE, WalIndexLock::Exclusive).unwrap(), "its copy is out of date");
    c[96] = 9;
    checkpointer.push(0, &c).unwrap();
    assert!(!checkpointer.lock(WRITE, WalIndexLock::Exclusive).unwrap(), "its copy is still out of date");
    checkpointer.pull(0, &mut c).unwrap();
    assert_eq!((c[16], c[96]), (7, 9), "one push has undone the other");
    assert!(checkpointer.lock(WRITE, WalIndexLock::Exclusive).unwrap());

    drop(checkpointer);
    writer.pull(0, &mut w).unwrap();
    assert_eq!((w[16], w[96]), (7, 9));
    assert!(writer.lock(WRITE, WalIndexLock::Exclusive).unwrap(), "a slot outlives its holder");
    drop(writer);
    let mut next = WalIndexHandle::open(&faults, "t.db", 3);
    assert_eq!(next.map(0).unwrap(), [0; 32768], "the regions outlive the last handle");
}

/// Threads that insert as fast as they can, each on its own connection, some of them checkpointing.
/// Every acknowledged insert is looked for; `integrity_check` alone would not miss a lost one.
#[test]
fn storm() {
    const THREADS: i64 = 4;
    const INSERTS: i64 = 60;
    for mode in JOURNAL_MODES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.db");
        let vfs = format!("storm-{mode}");
        FaultVfs::register(&vfs);
        let keeper = create(&path, &vfs, mode);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (path, vfs) = (&path, &vfs);
                scope.spawn(move || {
                    let conn = open(path, vfs);
                    for insert in 0..INSERTS {
                        let sql = format!("INSERT INTO t VALUES({})", thread * INSERTS + insert);
                        while let Err(error) = conn.execute_batch(&sql) {
                            assert_eq!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy), "{error}");
                            std::thread::yield_now();
                        }
                        if insert % 16 == thread {
                            conn.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").ok();
                        }
                    }
                });
            }
        });
        drop(keeper);
        let stock = Connection::open(&path).unwrap();
        assert_eq!((rows(&stock), integrity(&stock).as_str()), (THREADS * INSERTS, "ok"), "{mode}");
    }
}

/// Faults strike the call they were aimed at, that one only, and leave or have their effect as told.
#[test]
fn aim() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let faults = FaultVfs::register("aim");
    let a = create(&path, "aim", "DELETE");
    let insert = |x: i32| code(a.execute_batch(&format!("INSERT INTO t VALUES({x})")));

    let second = faults.arm(Fault::new(Method::Lock, Error::Busy).to(LockKind::Reserved).nth(2));
    assert_eq!(insert(1), None);
    assert_eq!((insert(2), second.count()), (Some(ErrorCode::DatabaseBusy), 1));
    assert_eq!((insert(3), second.count()), (None, 1));

    let journal = faults.arm(Fault::new(Method::Sync, Error::Io).on(OpenKind::MainJournal).persistent());
    assert_eq!(insert(4), Some(ErrorCode::SystemIoFailure));
    assert_eq!(insert(5), Some(ErrorCode::SystemIoFailure));
    assert!(journal.count() >= 2);
    faults.disarm();
    assert_eq!(insert(6), None);

    let full = faults.arm(Fault::new(Method::Write, Error::Full).on(OpenKind::MainDb));
    assert_eq!((insert(7), full.count()), (Some(ErrorCode::DiskFull), 1));
    faults.disarm();

    // Unlocked in spite of the error, and locked because of it. (Either way the COMMIT is reported
    // as failed, although it is done.)
    faults.arm(Fault::new(Method::Unlock, Error::Io).to(LockKind::Shared).after());
    assert_eq!((insert(8), faults.has_writer(&path)), (Some(ErrorCode::SystemIoFailure), false));
    faults.disarm();
    faults.arm(Fault::new(Method::Unlock, Error::Io).persistent());
    assert_eq!((insert(9), faults.has_writer(&path)), (Some(ErrorCode::SystemIoFailure), true));
    faults.disarm();
    assert_eq!((insert(10), faults.has_writer(&path)), (None, false));

    // A short read of page 1 is a buffer of zeros: no database.
    let reader = open(&path, "aim");
    let short = faults.arm(Fault::new(Method::Read, Error::ShortRead).on(OpenKind::MainDb));
    assert_eq!(code(reader.execute_batch("SELECT * FROM t")), Some(ErrorCode::NotADatabase));
    assert_eq!(short.count(), 1);
    drop(reader);
    faults.disarm();

    // xOpen answered with EACCES gives a read-only connection.
    let denied = faults.arm(Fault::new(Method::Open, Error::Denied).on(OpenKind::MainDb));
    let reader = open(&path, "aim");
    assert!(reader.is_readonly(rusqlite::MAIN_DB).unwrap());
    assert_eq!((rows(&reader), denied.count()), (6, 1));
}

/// A fault that no real VFS could show is refused when it is made.
#[test]
#[should_panic(expected = "xRead never answers Busy")]
fn impossible_faults() {
    let _ = Fault::new(Method::Read, Error::Busy);
}

/// The record: what was called, with what answer, under which lock, and what the gate was.
#[test]
fn record() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let faults: Arc<Faults> = FaultVfs::register("record");
    let a = create(&path, "record", "DELETE");
    faults.watch();
    faults.clear();
    a.execute_batch("INSERT INTO t VALUES(1)").unwrap();
    let locks = ["xLock SHARED -> OK", "xLock RESERVED -> OK", "xLock EXCLUSIVE -> OK"];
    let unlocks = ["xUnlock SHARED -> OK", "xUnlock NONE -> OK"];
    assert_eq!(faults.locks(), [&locks[..], &unlocks[..]].concat());
    let of_file = |event: &Event| event.call.file.is_some() && event.gate.is_some();
    assert!(
        faults.events().iter().filter(|event| of_file(event)).all(|event| event.gate == Some(Gate::Absent))
    );
    let writes = faults.events().into_iter().filter(|event| event.call.method == Method::Write);
    assert!(
        writes
            .filter(|event| event.call.file == Some(OpenKind::MainDb))
            .all(|event| event.level > LockKind::Shared)
    );

    let held = std::fs::File::create(fault_vfs::lock_path(&path)).unwrap();
    held.try_lock().unwrap();
    faults.clear();
    rows(&a);
    let mut looked = 0;
    for event in faults.events().iter().filter(|event| of_file(event)) {
        assert!(event.gate == Some(Gate::Held) && event.level <= LockKind::Shared, "{event}");
        looked += 1;
    }
    assert!(looked > 0);
    drop(held);
    assert_eq!(Gate::of(&path), Gate::Free);
    assert!(faults.calls(Method::Lock) > 0);
}
