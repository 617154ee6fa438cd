//! The promise itself, seen from outside: **nothing is written to a database but under the flock on its lock
//! file, and reading never takes it.**
//!
//! A tap beneath kanbanlock stops at every xWrite and xTruncate of the database, its journal and its WAL, and
//! has *another process* try `flock(LOCK_EX|LOCK_NB)` on `<db>.lock`: it must fail. After each statement it must
//! succeed. That covers every kind of write without knowing how SQLite carries it out.
//!
//! That these tests can fail is shown with the same scenarios on the plain unix VFS, and on an xLock-only shim,
//! which WAL mode must expose.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kanbanlock::{CheckpointPolicy, Options};
use rusqlite::{Connection, ffi};
use support::agent::{Agent, Task};
use support::raw_file::vfs_methods;
use support::tap_vfs::{Call, FileKind, Method, Observer, Tap};
use support::{Stack, TestDb, code, open, set_journal_mode, unique};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// Asks an outsider at every write whether the flock is held.
struct WriteProbe {
    outsider: Mutex<Agent>,
    /// A passive checkpoint under policy `free` copies finished transactions without the gate.
    checkpoints_are_free: bool,
    in_checkpoint: AtomicUsize,
    writes: AtomicUsize,
    naked: Mutex<Vec<String>>,
}

impl WriteProbe {
    fn new(checkpoints_are_free: bool) -> Arc<WriteProbe> {
        Arc::new(WriteProbe {
            outsider: Mutex::new(Agent::start()),
            checkpoints_are_free,
            in_checkpoint: AtomicUsize::new(0),
            writes: AtomicUsize::new(0),
            naked: Mutex::default(),
        })
    }

    fn is_free(&self, db: &TestDb) -> bool {
        self.outsider.lock().unwrap().is_free(&db.lock_file())
    }

    fn writes(&self) -> usize {
        self.writes.load(Ordering::Relaxed)
    }

    /// The writes that were made while an outsider could have had the flock.
    fn naked(&self) -> Vec<String> {
        self.naked.lock().unwrap().clone()
    }
}

impl Observer for WriteProbe {
    fn before(&self, call: Call<'_>) -> Option<std::ffi::c_int> {
        match call.method {
            Method::FileControl(ffi::SQLITE_FCNTL_CKPT_START) => {
                self.in_checkpoint.store(1, Ordering::Relaxed)
            }
            Method::FileControl(ffi::SQLITE_FCNTL_CKPT_DONE) => {
                self.in_checkpoint.store(0, Ordering::Relaxed)
            }
            _ => {}
        }
        let database = match call.kind {
            FileKind::Database => call.path,
            FileKind::Wal => call.path.strip_suffix("-wal").unwrap(),
            FileKind::Journal => call.path.strip_suffix("-journal").unwrap(),
            FileKind::Other => return None,
        };
        if !matches!(call.method, Method::Write | Method::Truncate) {
            return None;
        }
        let is_free_checkpoint = self.checkpoints_are_free && self.in_checkpoint.load(Ordering::Relaxed) == 1;
        if is_free_checkpoint && call.kind == FileKind::Database {
            return None;
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
        if self.outsider.lock().unwrap().is_free(format!("{database}.lock").as_ref()) {
            self.naked.lock().unwrap().push(call.to_string());
        }
        None
    }
}

const SCHEMA: &str = "
    CREATE TABLE task (id INTEGER PRIMARY KEY, title TEXT NOT NULL, state TEXT NOT NULL);
    CREATE INDEX task_state ON task (state);
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)
    INSERT INTO task SELECT i, printf('task %d %s', i, hex(zeroblob(100))), 'todo' FROM n;";

/// Every kind of write, as SQL on a database with [`SCHEMA`].
const WRITES: &[(&str, &str)] = &[
    ("insert", "INSERT INTO task (title, state) VALUES ('new', 'todo')"),
    ("update", "UPDATE task SET state = 'doing' WHERE id = 7"),
    ("delete", "DELETE FROM task WHERE id = 8"),
    ("begin immediate", "BEGIN IMMEDIATE; UPDATE task SET state = 'done'; COMMIT"),
    ("begin exclusive", "BEGIN EXCLUSIVE; UPDATE task SET state = 'todo'; COMMIT"),
    ("deferred, then upgraded", "BEGIN; SELECT count(*) FROM task; UPDATE task SET state = 'done'; COMMIT"),
    (
        "savepoint",
        "SAVEPOINT a; DELETE FROM task WHERE id < 50; ROLLBACK TO a; UPDATE task SET state = 'x'; RELEASE a",
    ),
    (
        "spilled and rolled back",
        "PRAGMA cache_size = 2; BEGIN; UPDATE task SET title = title || 'x'; ROLLBACK",
    ),
    ("create table", "CREATE TABLE extra (x)"),
    ("create index", "CREATE INDEX task_title ON task (title)"),
    ("alter table", "ALTER TABLE task ADD COLUMN owner TEXT"),
    ("drop", "CREATE TABLE gone (x); DROP TABLE gone"),
    (
        "trigger",
        "CREATE TRIGGER t AFTER INSERT ON task BEGIN UPDATE task SET state = 'z' WHERE id = 1; END;
                 INSERT INTO task (title, state) VALUES ('x', 'y')",
    ),
    ("user_version", "PRAGMA user_version = 3"),
    ("analyze", "ANALYZE"),
    ("reindex", "REINDEX"),
    ("vacuum", "VACUUM"),
    (
        "vacuum after auto_vacuum change",
        "PRAGMA auto_vacuum = INCREMENTAL; VACUUM; DELETE FROM task WHERE id > 9;
                                         PRAGMA incremental_vacuum",
    ),
    ("truncating checkpoint", "UPDATE task SET state = 'c'; PRAGMA wal_checkpoint(TRUNCATE)"),
    (
        "restarting checkpoint",
        "UPDATE task SET state = 'd'; PRAGMA wal_checkpoint(RESTART); UPDATE task SET state = 'e'",
    ),
    (
        "exclusive locking mode",
        "PRAGMA locking_mode = EXCLUSIVE; UPDATE task SET state = 'f';
                                PRAGMA locking_mode = NORMAL; UPDATE task SET state = 'g'",
    ),
    (
        "into WAL mode and back",
        "PRAGMA journal_mode = WAL; UPDATE task SET state = 'h'; PRAGMA journal_mode = DELETE;
                                UPDATE task SET state = 'i'",
    ),
    (
        "out of WAL mode and back",
        "PRAGMA journal_mode = DELETE; UPDATE task SET state = 'j'; PRAGMA journal_mode = WAL;
                                  UPDATE task SET state = 'k'",
    ),
    ("mmap", "PRAGMA mmap_size = 1048576; UPDATE task SET state = 'l'; PRAGMA mmap_size = 0"),
];

const JOURNAL_MODES: &[&str] = &["delete", "truncate", "persist", "memory", "wal"];

/// Runs one scenario on a fresh database and gives the naked writes.
fn naked_writes(vfs: &str, probe: &WriteProbe, journal_mode: &str, name: &str, sql: &str) -> Vec<String> {
    let db = TestDb::new();
    let connection = db.open(vfs);
    set_journal_mode(&connection, journal_mode);
    connection.execute_batch(SCHEMA).unwrap();
    let before = probe.writes();
    connection.execute_batch(sql).unwrap_or_else(|error| panic!("{journal_mode}, {name}: {error}"));
    assert!(probe.is_free(&db), "{journal_mode}, {name}: still held afterwards");
    connection.execute_batch("INSERT INTO task (title, state) VALUES ('last', 'todo')").unwrap();
    connection.close().unwrap();
    assert!(probe.is_free(&db), "{journal_mode}, {name}: still held after close");
    assert_ne!(probe.writes(), before, "{journal_mode}, {name}: wrote nothing, so it shows nothing");
    probe.naked()
}

#[test]
fn every_kind_of_write_is_under_the_flock() {
    for policy in [CheckpointPolicy::Free, CheckpointPolicy::Gate] {
        let probe = WriteProbe::new(policy == CheckpointPolicy::Free);
        let stack = Stack::with(probe.clone(), Options::new().checkpoint(policy), 3);
        for journal_mode in JOURNAL_MODES {
            for (name, sql) in WRITES {
                let naked = naked_writes(stack.kanbanlock, &probe, journal_mode, name, sql);
                assert_eq!(naked, [""; 0], "{policy:?}, {journal_mode}, {name}");
            }
        }
    }
}

#[test]
fn the_same_writes_are_naked_on_the_plain_unix_vfs() {
    for (name, sql) in WRITES {
        let probe = WriteProbe::new(true);
        let tap = unique("tap");
        Tap::new(tap, "unix", probe.clone()).register();
        assert_ne!(naked_writes(tap, &probe, "wal", name, sql), [""; 0], "{name}");
    }
}

/// A shim that handles xLock alone is what one builds first; in WAL mode it protects almost nothing.
#[test]
fn an_xlock_only_shim_is_caught_in_wal_mode() {
    let probe = WriteProbe::new(true);
    let stack = Stack::new(probe.clone());
    let xlock_only = unique("xlock-only");
    // SQLite → tap → kanbanlock → tap → unix, but xShmLock goes past kanbanlock to the tap beneath it.
    let size = |vfs| usize::try_from(vfs_methods(vfs).szOsFile).unwrap();
    let shim_size = size(stack.kanbanlock) - size(stack.real);
    struct Silent;
    impl Observer for Silent {}
    let above = Tap::new(xlock_only, stack.kanbanlock, Arc::new(Silent));
    Tap { shm_lock_bypass: Some(shim_size), ..above }.register();

    let (name, sql) = WRITES[0];
    assert_eq!(naked_writes(xlock_only, &probe, "delete", name, sql), [""; 0], "rollback mode is protected");
    assert_ne!(naked_writes(xlock_only, &probe, "wal", name, sql), [""; 0], "WAL mode is not");
}

#[test]
fn the_flock_is_held_exactly_during_a_transaction() {
    kanbanlock::register().unwrap();
    let mut outsider = Agent::start();
    for journal_mode in JOURNAL_MODES {
        let db = TestDb::new();
        let connection = db.open("kanbanlock");
        set_journal_mode(&connection, journal_mode);
        connection.execute_batch(SCHEMA).unwrap();
        for begin in ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "BEGIN; DELETE FROM task WHERE id = 1"] {
            for end in ["COMMIT", "ROLLBACK"] {
                connection.execute_batch(begin).unwrap();
                assert!(!outsider.is_free(&db.lock_file()), "{journal_mode}: {begin}");
                connection.execute_batch(end).unwrap();
                assert!(outsider.is_free(&db.lock_file()), "{journal_mode}: {begin}; {end}");
            }
        }
    }
}

#[test]
fn reading_never_takes_the_flock_nor_waits_for_it() {
    kanbanlock::register().unwrap();
    let mut outsider = Agent::start();
    for journal_mode in JOURNAL_MODES {
        let db = TestDb::new();
        let connection = db.open("kanbanlock");
        set_journal_mode(&connection, journal_mode);
        connection.execute_batch(SCHEMA).unwrap();

        let mut statement = connection.prepare("SELECT id FROM task").unwrap();
        let mut rows = statement.query([]).unwrap();
        rows.next().unwrap().unwrap();
        assert!(outsider.is_free(&db.lock_file()), "{journal_mode}: in the middle of a SELECT");
        drop(rows);

        outsider.ask(&Task::Flock(db.lock_file())).unwrap();
        let count: i64 = connection.query_row("SELECT count(*) FROM task", [], |row| row.get(0)).unwrap();
        assert_eq!(count, 200, "{journal_mode}: an outside flock does not stop a reader");
        let another = db.open("kanbanlock");
        another.query_row("SELECT count(*) FROM task", [], |_| Ok(())).unwrap();
        assert_eq!(code(connection.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY, "{journal_mode}");
        outsider.ask(&Task::Unflock).unwrap();
        connection.execute_batch("BEGIN IMMEDIATE; COMMIT").unwrap();
    }
}

/// Rows L2, S2: two processes, one database.
#[test]
fn two_processes_exclude_each_other() {
    for journal_mode in JOURNAL_MODES {
        let db = TestDb::new();
        let mut a = Agent::with_db(db.path(), "kanbanlock");
        let mut b = Agent::with_db(db.path(), "kanbanlock");
        a.query(&format!("PRAGMA journal_mode = {journal_mode}"));
        a.execute(SCHEMA).unwrap();
        a.execute("BEGIN IMMEDIATE; UPDATE task SET state = 'a'").unwrap();
        assert_eq!(b.execute("BEGIN IMMEDIATE").unwrap_err().0, ffi::SQLITE_BUSY);
        a.execute("COMMIT").unwrap();
        b.execute("BEGIN IMMEDIATE; UPDATE task SET state = 'b'; COMMIT").unwrap();
        assert_eq!(a.query("SELECT count(*) FROM task WHERE state = 'b'"), "200");
    }
}

/// A database whose last writer was killed in the middle of a transaction that had spilled into the file.
fn with_hot_journal() -> TestDb {
    let db = TestDb::new();
    let mut victim = Agent::with_db(db.path(), "kanbanlock");
    victim.execute(SCHEMA).unwrap();
    victim
        .execute("PRAGMA cache_size = 2; BEGIN IMMEDIATE; UPDATE task SET title = title || 'lost'")
        .unwrap();
    victim.kill();
    assert!(db.beside("-journal").metadata().unwrap().len() > 0, "the journal is hot");
    db
}

/// kill -9 in the middle of a transaction: the kernel releases the flock with the process, SQLite rolls back,
/// and the rollback of the hot journal (row L4) is itself under the flock.
#[test]
fn a_hot_journal_is_rolled_back_under_the_flock() {
    let db = with_hot_journal();

    let probe = WriteProbe::new(true);
    let stack = Stack::new(probe.clone());
    let reader = db.open(stack.kanbanlock);
    assert!(probe.is_free(&db), "the dead process holds nothing");
    let lost: i64 =
        reader.query_row("SELECT count(*) FROM task WHERE title LIKE '%lost'", [], |row| row.get(0)).unwrap();
    assert_eq!(lost, 0);
    assert_ne!(probe.writes(), 0, "the SELECT rolled the journal back");
    assert_eq!(probe.naked(), [""; 0]);
    assert!(probe.is_free(&db));
}

/// Row L4, refused: while an outsider holds the flock, a hot journal stays hot, and is not deleted.
#[test]
fn a_hot_journal_waits_for_an_outside_flock() {
    let db = with_hot_journal();

    let mut outsider = Agent::start();
    outsider.ask(&Task::Flock(db.lock_file())).unwrap();
    let mut reader = Agent::with_db(db.path(), "kanbanlock");
    assert_eq!(reader.execute("SELECT count(*) FROM task").unwrap_err().0, ffi::SQLITE_BUSY);
    assert!(db.beside("-journal").metadata().unwrap().len() > 0, "still hot");
    outsider.ask(&Task::Unflock).unwrap();
    assert_eq!(reader.query("SELECT count(*) FROM task WHERE title LIKE '%lost'"), "0");
}

/// Row S5: a reader that must rebuild the wal-index after a crash is not a writer. It must not wait for the
/// gate: SQLite would give up with SQLITE_PROTOCOL.
#[test]
fn a_reader_recovers_the_wal_while_an_outsider_holds_the_flock() {
    let db = TestDb::new();
    let mut victim = Agent::with_db(db.path(), "kanbanlock");
    victim.query("PRAGMA journal_mode = WAL");
    victim.execute(SCHEMA).unwrap();
    victim.kill();
    std::fs::remove_file(db.beside("-shm")).unwrap(); // as after a reboot: the wal-index must be rebuilt

    let mut outsider = Agent::start();
    outsider.ask(&Task::Flock(db.lock_file())).unwrap();
    let mut reader = Agent::with_db(db.path(), "kanbanlock");
    assert_eq!(reader.query("SELECT count(*) FROM task"), "200");
    assert_eq!(reader.execute("BEGIN IMMEDIATE").unwrap_err().0, ffi::SQLITE_BUSY);
}

/// Rows L13, S2: a connection opened read-only restarts and truncates the WAL, too, if it finds everything copied.
#[test]
fn a_checkpoint_of_a_read_only_connection_is_under_the_flock() {
    for (mode, is_shimmed) in [("RESTART", true), ("TRUNCATE", true), ("TRUNCATE", false)] {
        let probe = WriteProbe::new(true);
        let stack = Stack::new(probe.clone());
        let vfs = if is_shimmed { stack.kanbanlock } else { stack.real };
        let db = TestDb::new();
        let writer = db.open(vfs);
        set_journal_mode(&writer, "wal");
        writer.execute_batch(SCHEMA).unwrap();
        writer.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).unwrap();
        probe.naked.lock().unwrap().clear();
        let before = probe.writes();

        let reader = db.try_open_uri(&format!("vfs={vfs}&mode=ro")).unwrap();
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        let busy: i64 = reader.query_row(&sql, [], |row| row.get(0)).unwrap();
        assert_eq!(busy, 0, "{mode}");
        // After a restart it is the next writer that writes over the WAL.
        assert_eq!(probe.writes() > before, mode == "TRUNCATE", "{mode}");
        assert_eq!(probe.naked().is_empty(), is_shimmed, "{mode}: {:?}", probe.naked());
        if is_shimmed {
            assert!(probe.is_free(&db), "{mode}: still held afterwards");
        }
    }
}

/// The backup that README has: the database first, then `-wal`, under the flock. Whoever restarted the WAL in between would
/// take from it what the copy of the database does not have. Rows L13, S2.
#[test]
fn a_read_only_connection_does_not_empty_the_wal_while_an_outsider_copies() {
    for (vfs, is_whole) in [("unix", false), ("kanbanlock", true)] {
        let db = TestDb::new();
        let mut writer = Agent::with_db(db.path(), vfs);
        writer.query("PRAGMA journal_mode = WAL");
        writer.execute(SCHEMA).unwrap();
        let mut reader = Agent::start();
        reader.ask(&Task::Open(format!("file:{}?vfs={vfs}&mode=ro", db.path().display()))).unwrap();
        assert_eq!(reader.query("SELECT count(*) FROM task"), "200");

        let mut outsider = Agent::start();
        outsider.ask(&Task::Flock(db.lock_file())).unwrap();
        let copy = TestDb::new();
        std::fs::copy(db.path(), copy.path()).unwrap();
        assert_eq!(writer.query("PRAGMA wal_checkpoint(PASSIVE)"), "0", "beside the copy, as ever");
        for mode in ["FULL", "RESTART", "TRUNCATE"] {
            let busy = reader.query(&format!("PRAGMA wal_checkpoint({mode})"));
            assert_eq!(busy == "1", is_whole, "{vfs}, {mode}");
        }
        std::fs::copy(db.beside("-wal"), copy.beside("-wal")).unwrap();
        outsider.ask(&Task::Unflock).unwrap();

        let backup = copy.open("unix");
        let count = backup.query_row("SELECT count(*) FROM task", [], |row| row.get::<_, i64>(0));
        assert_eq!(count == Ok(200), is_whole, "{vfs}: {count:?}");
        assert_eq!(reader.query("PRAGMA wal_checkpoint(TRUNCATE)"), "0", "{vfs}: nobody is in the way now");
    }
}

#[test]
fn a_backup_into_the_database_is_under_the_flock() {
    for journal_mode in ["delete", "wal"] {
        let probe = WriteProbe::new(true);
        let stack = Stack::new(probe.clone());
        let source = Connection::open_in_memory().unwrap();
        source.execute_batch(SCHEMA).unwrap();
        let db = TestDb::new();
        let mut target = db.open(stack.kanbanlock);
        set_journal_mode(&target, journal_mode);
        target.execute_batch("CREATE TABLE old (x)").unwrap();
        let before = probe.writes();
        let backup = rusqlite::backup::Backup::new(&source, &mut target).unwrap();
        backup.run_to_completion(5, std::time::Duration::ZERO, None).unwrap();
        drop(backup);
        assert_ne!(probe.writes(), before);
        assert_eq!(probe.naked(), [""; 0], "{journal_mode}");
        assert!(probe.is_free(&db));
    }
}

#[test]
fn attached_databases_have_a_flock_each() {
    kanbanlock::register().unwrap();
    let (main, other) = (TestDb::new(), TestDb::new());
    let mut outsider = Agent::start();
    let connection = main.try_open_uri("vfs=kanbanlock").unwrap();
    let attach = format!("ATTACH 'file:{}?vfs=kanbanlock' AS other", other.path().display());
    connection.execute_batch(&attach).unwrap();
    connection.execute_batch("CREATE TABLE main.a (x); CREATE TABLE other.b (x)").unwrap();

    connection.execute_batch("BEGIN; INSERT INTO other.b VALUES (1)").unwrap();
    assert!(outsider.is_free(&main.lock_file()), "main is not written");
    assert!(!outsider.is_free(&other.lock_file()));
    connection.execute_batch("INSERT INTO main.a VALUES (1)").unwrap();
    assert!(!outsider.is_free(&main.lock_file()));
    connection.execute_batch("COMMIT").unwrap();
    assert!(outsider.is_free(&main.lock_file()) && outsider.is_free(&other.lock_file()));
}

#[test]
fn connections_with_a_shared_cache_share_a_gate() {
    let probe = WriteProbe::new(true);
    let stack = Stack::new(probe.clone());
    let db = TestDb::new();
    let parameters = format!("vfs={}&cache=shared", stack.kanbanlock);
    let a = db.try_open_uri(&parameters).unwrap();
    let b = db.try_open_uri(&parameters).unwrap();
    a.execute_batch(SCHEMA).unwrap();
    a.execute_batch("BEGIN IMMEDIATE; UPDATE task SET state = 'a'").unwrap();
    assert_eq!(rusqlite::ErrorCode::DatabaseLocked as i32, {
        let result = b.execute_batch("BEGIN IMMEDIATE");
        result.unwrap_err().sqlite_error_code().unwrap() as i32
    });
    a.execute_batch("COMMIT").unwrap();
    b.execute_batch("UPDATE task SET state = 'b'").unwrap();
    assert_eq!(probe.naked(), [""; 0]);
    assert!(probe.is_free(&db));
}

/// Two connections of one process are as separate as two processes: a flock belongs to the open file
/// description.
#[test]
fn two_connections_of_one_process_exclude_each_other() {
    kanbanlock::register().unwrap();
    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let (a, b) = (db.open("kanbanlock"), db.open("kanbanlock"));
        set_journal_mode(&a, journal_mode);
        a.execute_batch(SCHEMA).unwrap();
        a.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
        a.execute_batch("COMMIT").unwrap();
        b.execute_batch("BEGIN IMMEDIATE; COMMIT").unwrap();
    }
}

/// §5 rule 5: no lock file for what cannot be written or has no file. (Row L13: but for a checkpoint.)
#[test]
fn what_cannot_be_written_has_no_lock_file() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    Connection::open(db.path()).unwrap().execute_batch(SCHEMA).unwrap(); // by the default VFS: no lock file
    for parameters in ["mode=ro", "immutable=1", "mode=ro&nolock=1"] {
        let reader = db.try_open_uri(&format!("vfs=kanbanlock&{parameters}")).unwrap();
        let count: i64 = reader.query_row("SELECT count(*) FROM task", [], |row| row.get(0)).unwrap();
        assert_eq!(count, 200, "{parameters}");
        assert!(reader.execute_batch("DELETE FROM task").is_err(), "{parameters}");
    }
    let reader = db.open("kanbanlock");
    reader.query_row("SELECT count(*) FROM task", [], |_| Ok(())).unwrap();
    reader.close().unwrap();
    assert!(!db.lock_file().exists(), "readers never touch the lock file");

    let memory = Connection::open("file::memory:?vfs=kanbanlock").unwrap();
    memory.execute_batch(SCHEMA).unwrap();
    let temporary = open("".as_ref(), "kanbanlock");
    temporary.execute_batch("PRAGMA cache_size = 2").unwrap();
    temporary.execute_batch(SCHEMA).unwrap();
    let in_memory_by_mode = db.try_open_uri("vfs=kanbanlock&mode=memory").unwrap();
    in_memory_by_mode.execute_batch(SCHEMA).unwrap();
    assert!(!db.lock_file().exists());
}

/// `nolock=1` is the user's word that nobody else uses the file: SQLite takes no lock, so there is no gate.
#[test]
fn nolock_writes_without_the_flock_as_asked() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let connection = db.try_open_uri("vfs=kanbanlock&nolock=1").unwrap();
    connection.execute_batch(SCHEMA).unwrap();
    assert!(!db.lock_file().exists());
}

/// All names of one database lead to one lock file: xFullPathname resolves symbolic links.
#[test]
fn a_symbolic_link_leads_to_the_same_lock_file() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let direct = db.open("kanbanlock");
    direct.execute_batch(SCHEMA).unwrap();
    let link = db.dir().join("link.db");
    std::os::unix::fs::symlink(db.path(), &link).unwrap();
    let linked = open(&link, "kanbanlock");
    linked.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(support::is_flocked(&db.lock_file()));
    assert!(!db.dir().join("link.db.lock").exists());
    assert_eq!(code(direct.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
}

/// Row K1: under `kanbanlock_checkpoint=gate` a passive checkpoint takes the gate; under `free` it does not.
#[test]
fn the_checkpoint_policy_decides_whether_a_checkpoint_takes_the_gate() {
    kanbanlock::register().unwrap();
    for (policy, copies_under_an_outside_flock) in [("free", true), ("gate", false)] {
        let db = TestDb::new();
        let connection = db.try_open_uri(&format!("vfs=kanbanlock&kanbanlock_checkpoint={policy}")).unwrap();
        set_journal_mode(&connection, "wal");
        connection.execute_batch(SCHEMA).unwrap();
        let mut outsider = Agent::start();
        outsider.ask(&Task::Flock(db.lock_file())).unwrap();
        let checkpoint = |mode: &str| -> (i64, i64, i64) {
            let sql = format!("PRAGMA wal_checkpoint({mode})");
            connection.query_row(&sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap()
        };
        let (busy, _, copied) = checkpoint("PASSIVE");
        assert_eq!(
            (busy == 0, copied > 0),
            (copies_under_an_outside_flock, copies_under_an_outside_flock),
            "{policy}"
        );
        // A truncating checkpoint takes WRITE, and with it the gate, whatever the policy.
        assert_eq!(checkpoint("TRUNCATE").0, 1, "{policy}");
        outsider.ask(&Task::Unflock).unwrap();
        assert_eq!(checkpoint("PASSIVE").0, 0, "{policy}");
        assert_eq!(checkpoint("TRUNCATE"), (0, 0, 0), "{policy}");
        assert!(outsider.is_free(&db.lock_file()));
    }
}

/// Row K3: under `kanbanlock_checkpoint=auto`, the default, a checkpoint takes the gate when the WAL is longer than 32 MB;
/// if it is not to be had, it goes on without, as it does when the WAL is short.
#[test]
fn an_auto_checkpoint_takes_the_gate_when_the_wal_is_long() {
    let probe = WriteProbe::new(false);
    let stack = Stack::new(probe.clone());
    let db = TestDb::new();
    let connection = db.open(stack.kanbanlock);
    set_journal_mode(&connection, "wal");
    connection.execute_batch(SCHEMA).unwrap();
    connection
        .execute_batch("PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 0; CREATE TABLE blob (data)")
        .unwrap();
    // How many writes of the database were naked in a checkpoint that copies everything.
    let naked_after = |megabytes: u32, is_held: bool| {
        for _ in 0..megabytes {
            connection.execute_batch("INSERT INTO blob VALUES (zeroblob(1 << 20))").unwrap();
        }
        probe.naked.lock().unwrap().clear();
        let mut outsider = Agent::start();
        if is_held {
            outsider.ask(&Task::Flock(db.lock_file())).unwrap();
        }
        let (busy, log, copied): (i64, i64, i64) = connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .unwrap();
        assert_eq!((busy, log), (0, copied), "{megabytes} MB, {is_held}");
        assert_ne!(probe.writes(), 0);
        probe.naked().len()
    };
    assert_ne!(naked_after(1, false), 0, "short: beside writers");
    assert_eq!(naked_after(33, false), 0, "long: under the gate");
    // Held by another all the time, so no write is naked: it shows that the checkpoint goes on.
    naked_after(33, true);
    assert!(probe.is_free(&db));
}
