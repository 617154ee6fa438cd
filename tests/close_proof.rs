//! Close-proof locks (DESIGN.md §7): what a stray close() does to a stock process, and not to one with kanbanlock.
//!
//! "If a process closes any file descriptor referring to a file, then all of the process's locks on that file are
//! released" (fcntl(2)). Each scenario runs first with a stock process, where the lock **must** be lost, then with a
//! process that has registered kanbanlock, where it must hold. The peer is always stock SQLite on the plain unix VFS,
//! which knows nothing of the gate: only the POSIX or OFD locks can keep it out.

mod support;

use std::sync::Arc;

use rusqlite::ffi;
use support::TestDb;
use support::agent::{Agent, Task};
use support::handles::Order;
use support::tap_vfs::{Observer, Tap};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

const SCHEMA: &str = "CREATE TABLE t (x); INSERT INTO t VALUES (1)";

/// The process with the stray close: stock, or with kanbanlock.
fn victim(db: &TestDb, is_shimmed: bool) -> Agent {
    if is_shimmed { Agent::with_db(db.path(), "kanbanlock") } else { Agent::stock_with_db(db.path()) }
}

fn database(journal_mode: &str) -> TestDb {
    let db = TestDb::new();
    let connection =
        rusqlite::Connection::open_with_flags_and_vfs(db.path(), rusqlite::OpenFlags::default(), "unix");
    let connection = connection.unwrap();
    support::set_journal_mode(&connection, journal_mode);
    connection.execute_batch(SCHEMA).unwrap();
    db
}

/// True if the peer's statement was kept out (SQLITE_BUSY).
fn is_kept_out(peer: &mut Agent, sql: &str) -> bool {
    match peer.execute(sql) {
        Ok(_) => false,
        Err((code, _)) if code & 0xff == ffi::SQLITE_BUSY => true,
        Err(other) => panic!("{sql}: {other:?}"),
    }
}

/// The victim holds a lock; some code in its process closes `<db><suffix>`; a peer tries to `intrude`.
fn assert_survives_a_stray_close(journal_mode: &str, hold: &str, suffix: &str, intrude: &str) {
    for is_shimmed in [false, true] {
        let db = database(journal_mode);
        let mut victim = victim(&db, is_shimmed);
        victim.execute(hold).unwrap();
        let mut peer = Agent::stock_with_db(db.path());
        assert!(is_kept_out(&mut peer, intrude), "before the stray close");
        victim.ask(&Task::StrayClose(db.beside(suffix))).unwrap();
        assert_eq!(is_kept_out(&mut peer, intrude), is_shimmed);
    }
}

/// Rollback mode, the database file: RESERVED is lost, and a second writer gets in.
#[test]
fn a_writers_reserved_lock() {
    assert_survives_a_stray_close("delete", "BEGIN IMMEDIATE; UPDATE t SET x = 2", "", "BEGIN IMMEDIATE");
}

/// Rollback mode: a reader's SHARED is lost, and a writer commits under it.
#[test]
fn a_readers_shared_lock() {
    assert_survives_a_stray_close("delete", "BEGIN; SELECT * FROM t", "", "UPDATE t SET x = 2");
}

/// WAL mode, `-shm`: WRITE is lost, and a second writer is admitted.
#[test]
fn a_wal_writers_write_lock() {
    assert_survives_a_stray_close("wal", "BEGIN IMMEDIATE; UPDATE t SET x = 2", "-shm", "BEGIN IMMEDIATE");
}

/// WAL mode: a reader's mark is lost, and a checkpoint truncates the WAL that the reader is reading.
#[test]
fn a_wal_readers_mark() {
    for is_shimmed in [false, true] {
        let db = database("wal");
        let mut victim = victim(&db, is_shimmed);
        let mut peer = Agent::stock_with_db(db.path());
        peer.execute("UPDATE t SET x = 2").unwrap();
        victim.execute("BEGIN; SELECT * FROM t").unwrap();
        peer.execute("UPDATE t SET x = 3").unwrap();
        assert_eq!(peer.query("PRAGMA wal_checkpoint(TRUNCATE)"), "1", "busy before the stray close");
        victim.ask(&Task::StrayClose(db.beside("-shm"))).unwrap();
        let busy = peer.query("PRAGMA wal_checkpoint(TRUNCATE)");
        assert_eq!(busy == "1", is_shimmed);
        if is_shimmed {
            assert_eq!(victim.query("SELECT x FROM t"), "2", "its snapshot still stands");
        }
    }
}

/// WAL mode: the mark that says "this -shm is in use" (the DMS byte) is lost, and the next opener truncates the `-shm`
/// that the victim has mapped.
#[test]
fn the_mark_of_a_shm_in_use() {
    for is_shimmed in [false, true] {
        let db = database("wal");
        let mut victim = victim(&db, is_shimmed);
        victim.execute("SELECT * FROM t").unwrap();
        let inode_is_marked = || dms_is_locked(&db);
        assert!(inode_is_marked(), "before the stray close");
        victim.ask(&Task::StrayClose(db.beside("-shm"))).unwrap();
        assert_eq!(inode_is_marked(), is_shimmed);
    }
}

/// Asks for the DMS byte (128) of `-shm` as os_unix's `unixLockSharedMemory` does: is it locked by somebody else?
fn dms_is_locked(db: &TestDb) -> bool {
    use std::os::fd::AsRawFd;
    let shm = std::fs::File::options().read(true).write(true).open(db.beside("-shm")).unwrap();
    // SAFETY: all-zero is a valid flock structure.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(libc::F_WRLCK).unwrap();
    lock.l_whence = i16::try_from(libc::SEEK_SET).unwrap();
    lock.l_start = 128;
    lock.l_len = 1;
    // SAFETY: an open descriptor and a flock structure.
    assert_eq!(unsafe { libc::fcntl(shm.as_raw_fd(), libc::F_GETLK, &raw mut lock) }, 0);
    i32::from(lock.l_type) != libc::F_UNLCK
}

/// Two shimmed connections of one process share their locks as on stock SQLite, and a peer is excluded by both.
#[test]
fn connections_of_one_process_share_one_owner() {
    let db = database("delete");
    kanbanlock::register().unwrap();
    let (a, b) = (db.open("kanbanlock"), db.open("unix"));
    a.execute_batch("BEGIN; SELECT * FROM t").unwrap();
    b.execute_batch("BEGIN; SELECT * FROM t").unwrap();
    a.execute_batch("COMMIT").unwrap();
    let mut peer = Agent::stock_with_db(db.path());
    assert!(is_kept_out(&mut peer, "UPDATE t SET x = 2"), "b still reads");
    drop(a);
    drop(std::fs::File::open(db.path()).unwrap());
    assert!(is_kept_out(&mut peer, "UPDATE t SET x = 2"), "b still reads, on the plain unix VFS");
    b.execute_batch("COMMIT").unwrap();
    assert!(!is_kept_out(&mut peer, "UPDATE t SET x = 2"));
}

/// §7 rule 4: whoever comes first, a read-only connection or a writer, the writer can write.
#[test]
fn a_read_only_connection_does_not_stop_a_writer() {
    for journal_mode in ["delete", "wal"] {
        let db = database(journal_mode);
        kanbanlock::register().unwrap();
        let read_only = db.try_open_uri("vfs=kanbanlock&mode=ro").unwrap();
        read_only.query_row("SELECT * FROM t", [], |_| Ok(())).unwrap();
        let writer = db.open("kanbanlock");
        writer.execute_batch("BEGIN IMMEDIATE; UPDATE t SET x = 7").unwrap();
        let mut peer = Agent::stock_with_db(db.path());
        assert!(is_kept_out(&mut peer, "BEGIN IMMEDIATE"), "{journal_mode}");
        writer.execute_batch("COMMIT").unwrap();
        let x: i64 = read_only.query_row("SELECT x FROM t", [], |row| row.get(0)).unwrap();
        assert_eq!(x, 7);
    }
}

/// §7 rule 5: what was locked before the registration keeps its POSIX locks, and everybody on that inode with it.
#[test]
fn a_connection_from_before_the_registration_keeps_its_locks() {
    let db = database("delete");
    let mut early = Agent::stock_with_db(db.path());
    early.execute("BEGIN IMMEDIATE; UPDATE t SET x = 2").unwrap();
    early.ask(&Task::Register).unwrap();
    let mut peer = Agent::stock_with_db(db.path());
    assert!(is_kept_out(&mut peer, "BEGIN IMMEDIATE"));
    early.execute("COMMIT").unwrap();
    assert!(!is_kept_out(&mut peer, "UPDATE t SET x = x + 1"), "the old locks are gone");
    early.execute("UPDATE t SET x = x + 1").unwrap();
    assert_eq!(early.query("SELECT x FROM t"), "4");
    assert!(early.log().contains("no close-proof locks: a connection from before"), "{}", early.log());

    // Its connection closed, the inode has no user left: the next one is close-proof.
    early.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
    early.execute("BEGIN IMMEDIATE; UPDATE t SET x = 5").unwrap();
    early.ask(&Task::StrayClose(db.path().to_owned())).unwrap();
    assert!(is_kept_out(&mut peer, "BEGIN IMMEDIATE"));
}

/// §7 rule 2: the canonical descriptions come and go with the connections.
#[test]
fn no_descriptor_is_leaked() {
    for journal_mode in ["delete", "wal"] {
        let db = database(journal_mode);
        let mut agent = Agent::start();
        let count = |agent: &mut Agent| agent.ask(&Task::CountDescriptors).unwrap();
        let before = count(&mut agent);
        for _ in 0..3 {
            agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
            agent.execute("UPDATE t SET x = x + 1").unwrap();
            agent.ask(&Task::Close).unwrap();
        }
        assert_eq!(count(&mut agent), before, "{journal_mode}");
    }
}

#[test]
fn the_status_says_whether_locks_are_close_proof() {
    let db = database("delete");
    let mut agent = Agent::with_db(db.path(), "kanbanlock");
    assert!(agent.query("PRAGMA kanbanlock").contains("\"close_proof\":true"));
}

fn open_with(db: &TestDb, close_proof: &str) -> Task {
    Task::Open(format!("file:{}?vfs=kanbanlock&kanbanlock_close_proof={close_proof}", db.path().display()))
}

/// The URI decides for one database: `off` leaves its locks, and its `-shm`'s, as stock SQLite has them.
#[test]
fn the_uri_decides() {
    let cases = [
        ("delete", "BEGIN IMMEDIATE; UPDATE t SET x = 2", ""),
        ("wal", "BEGIN IMMEDIATE; UPDATE t SET x = 2", "-shm"),
    ];
    for (journal_mode, hold, suffix) in cases {
        for close_proof in ["off", "on"] {
            let db = database(journal_mode);
            let mut victim = Agent::start();
            victim.ask(&open_with(&db, close_proof)).unwrap();
            victim.execute(hold).unwrap();
            let mut peer = Agent::stock_with_db(db.path());
            assert!(is_kept_out(&mut peer, "BEGIN IMMEDIATE"), "before the stray close");
            victim.ask(&Task::StrayClose(db.beside(suffix))).unwrap();
            let expected = close_proof == "on";
            assert_eq!(is_kept_out(&mut peer, "BEGIN IMMEDIATE"), expected, "{journal_mode}, {close_proof}");
            let status = format!("\"close_proof\":{expected}");
            assert!(victim.query("PRAGMA kanbanlock").contains(&status), "{journal_mode}, {close_proof}");
            assert_eq!(victim.log(), "", "it was wished for: nothing to warn of");
        }
    }
}

/// One inode goes one way: whoever wishes for the other one is not opened, and told what to do; once the first has
/// closed its connection, it is.
#[test]
fn a_contradicting_wish_is_not_opened() {
    for (first, second) in [("off", "on"), ("on", "off")] {
        let db = database("wal");
        // A handle is a connection of its own; Task::Open is another.
        let uri = format!("file:{}?vfs=kanbanlock&kanbanlock_close_proof={first}", db.path().display());
        let mut agent = Agent::start();
        agent.order(0, Order::Open(uri)).unwrap().result.unwrap();
        for has_locked in [false, true] {
            if has_locked {
                agent.order(0, Order::Run("SELECT x FROM t".to_owned())).unwrap().result.unwrap();
            }
            let (code, _) = agent.ask(&open_with(&db, second)).unwrap_err();
            assert_eq!(code, ffi::SQLITE_CANTOPEN, "{first}, then {second}, locked: {has_locked}");
            assert!(agent.log().contains("give all connections the same value"), "{}", agent.log());
        }
        agent.ask(&open_with(&db, first)).unwrap();
        agent.ask(&Task::Close).unwrap();
        agent.order(0, Order::Close).unwrap().result.unwrap();
        agent.ask(&open_with(&db, second)).unwrap();
        agent.execute("UPDATE t SET x = x + 1").unwrap();
        let status = format!("\"close_proof\":{}", second == "on");
        assert!(agent.query("PRAGMA kanbanlock").contains(&status));
    }
}

/// A connection without the parameter wishes for what the registration says; a plain `unix` one goes the way it finds,
/// and decides if it is first.
#[test]
fn the_registration_and_plain_connections_count_too() {
    let db = database("delete");
    let plain = |vfs: &str| Order::Open(format!("file:{}?vfs={vfs}", db.path().display()));
    let select = || Order::Run("SELECT x FROM t".to_owned());
    let mut agent = Agent::start();
    agent.ask(&open_with(&db, "off")).unwrap();
    let refused = agent.order(0, plain("kanbanlock")).unwrap().result.unwrap_err();
    assert_eq!(refused.0, ffi::SQLITE_CANTOPEN);
    agent.order(0, plain("unix")).unwrap().result.unwrap();
    agent.order(0, select()).unwrap().result.unwrap();
    agent.ask(&Task::Close).unwrap();
    // The plain connection has taken the way that it found, and keeps it.
    let refused = agent.order(1, plain("kanbanlock")).unwrap().result.unwrap_err();
    assert_eq!(refused.0, ffi::SQLITE_CANTOPEN);

    agent.order(0, Order::Close).unwrap().result.unwrap();
    agent.order(0, plain("unix")).unwrap().result.unwrap();
    agent.order(0, select()).unwrap().result.unwrap();
    assert_eq!(agent.ask(&open_with(&db, "off")).unwrap_err().0, ffi::SQLITE_CANTOPEN);
    agent.ask(&open_with(&db, "on")).unwrap();
}

/// `on` is a demand: it installs what a registration has left out, and where that is impossible nothing is opened.
#[test]
fn on_is_a_demand() {
    support::in_own_process("on_is_a_demand", || {
        support::log::install();
        let db = database("delete");
        let off = kanbanlock::Options::new().close_proof(false);
        // A real VFS without system calls, while nobody has installed the hooks.
        Tap::new("tap", "unix", Arc::new(Nobody)).register();
        off.clone().name("on-a-tap").real_vfs("tap").register().unwrap();
        let code = support::code(db.try_open_uri("vfs=on-a-tap&kanbanlock_close_proof=on"));
        assert_eq!(code, ffi::SQLITE_CANTOPEN);
        let lines = support::log::lines_with("kanbanlock_close_proof=on is not possible here");
        assert_eq!(lines.len(), 1, "{lines:?}");

        off.register().unwrap();
        let is_close_proof = |parameters: &str| {
            let connection = db.try_open_uri(parameters).unwrap();
            let status: String = connection.query_row("PRAGMA kanbanlock", [], |row| row.get(0)).unwrap();
            status.contains("\"close_proof\":true")
        };
        assert!(!is_close_proof("vfs=kanbanlock"));
        assert!(is_close_proof("vfs=kanbanlock&kanbanlock_close_proof=on"));
        assert!(!is_close_proof("vfs=kanbanlock"), "the registration says so");
    });
}

/// A tap that observes nothing.
struct Nobody;

impl Observer for Nobody {}
