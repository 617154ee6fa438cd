//! fork(2): a child must not keep the parent's locks alive, nor use the parent's connections.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use support::TestDb;
use support::agent::{Agent, Reply, Task};
use support::handles::{Answer, Order};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// The parent is killed in the middle of a transaction while a forked child lives on.
#[test]
fn a_forked_child_does_not_keep_a_dead_parents_lock() {
    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let mut parent = Agent::with_db(db.path(), "kanbanlock");
        parent.query(&format!("PRAGMA journal_mode = {journal_mode}"));
        parent
            .execute("CREATE TABLE t (x); INSERT INTO t VALUES (1); BEGIN IMMEDIATE; UPDATE t SET x = 2")
            .unwrap();
        let child = ServingChild::of(&mut parent, &db); // it answers, so its handler has run
        let mut outsider = Agent::start();
        assert!(!outsider.is_free(&db.lock_file()), "the parent holds it");
        parent.kill();
        assert!(child.process.is_alive());
        assert!(outsider.is_free(&db.lock_file()), "{journal_mode}");
        let mut writer = Agent::with_db(db.path(), "kanbanlock");
        writer.execute("BEGIN IMMEDIATE; UPDATE t SET x = x + 10; COMMIT").unwrap();
        assert_eq!(writer.query("SELECT x FROM t"), "11", "the dead parent's transaction was rolled back");
    }
}

/// That this is a real danger: the same with an application's own flock.
#[test]
fn an_applications_own_flock_lives_on_in_the_child() {
    let db = TestDb::new();
    let mut parent = Agent::start();
    parent.ask(&Task::Flock(db.lock_file())).unwrap();
    let child = Child(parent.ask(&Task::Fork).unwrap().parse().unwrap());
    parent.kill();
    assert!(child.is_alive());
    assert!(!Agent::start().is_free(&db.lock_file()));
}

/// The fork does not disturb the parent: its flock and its OFD locks are on descriptions that the child has only closed.
#[test]
fn the_parent_keeps_its_locks_and_goes_on() {
    let db = TestDb::new();
    let mut parent = Agent::with_db(db.path(), "kanbanlock");
    parent
        .execute("CREATE TABLE t (x); INSERT INTO t VALUES (1); BEGIN IMMEDIATE; UPDATE t SET x = 2")
        .unwrap();
    let _child = Child(parent.ask(&Task::Fork).unwrap().parse().unwrap());
    assert!(!Agent::start().is_free(&db.lock_file()));
    let mut stock = Agent::stock_with_db(db.path());
    assert!(stock.execute("BEGIN IMMEDIATE").is_err());
    parent.execute("COMMIT").unwrap();
    stock.execute("UPDATE t SET x = x + 1").unwrap();
    assert_eq!(parent.query("SELECT x FROM t"), "3");
}

/// What a child does with the connection that it has inherited in the middle of a write transaction.
const DEEDS: [&str; 6] = [
    "close",
    "ROLLBACK",
    "COMMIT",
    "INSERT INTO t SELECT -id, payload, y FROM t; COMMIT",
    "SELECT sum(y) FROM t",
    "exit",
];

/// How the parent goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Commit,
    Rollback,
    Killed,
}

/// The parent's connection and its transaction.
#[derive(Clone, Copy, Debug)]
struct Scene {
    journal_mode: &'static str,
    /// Too large for the cache, so that a part of it is in the database or its WAL.
    is_spilled: bool,
    /// `PRAGMA locking_mode = EXCLUSIVE`: the wal-index is in the process's own memory.
    is_exclusive: bool,
}

/// Rows before the transaction.
const OLD: usize = 50;

/// A write transaction; a child's deed with the inherited connection; the parent's end of the transaction. What is wrong
/// then, if anything.
fn deed_in_child(scene: Scene, is_shimmed: bool, deed: &str, end: End) -> Result<(), String> {
    let Scene { journal_mode, is_spilled, is_exclusive } = scene;
    let db = TestDb::new();
    let mut parent =
        if is_shimmed { Agent::with_db(db.path(), "kanbanlock") } else { Agent::stock_with_db(db.path()) };
    if is_exclusive {
        parent.query("PRAGMA locking_mode = EXCLUSIVE");
    }
    assert_eq!(parent.query(&format!("PRAGMA journal_mode = {journal_mode}")), journal_mode);
    let insert = |ids: std::ops::RangeInclusive<usize>| {
        format!(
            "WITH RECURSIVE c (i) AS (SELECT {} UNION ALL SELECT i + 1 FROM c WHERE i < {}) \
             INSERT INTO t SELECT i, hex(randomblob(200)), i * 7919 % 3001 FROM c",
            ids.start(),
            ids.end()
        )
    };
    let (new, cache_size) = if is_spilled { (3000, 5) } else { (300, 2000) };
    let schema = "CREATE TABLE t (id INTEGER PRIMARY KEY, payload, y); CREATE INDEX i ON t (y)";
    parent.execute(&format!("{schema}; {}", insert(1..=OLD))).unwrap();
    let pragmas = format!("PRAGMA wal_autocheckpoint = 0; PRAGMA cache_size = {cache_size}");
    parent.execute(&format!("{pragmas}; BEGIN IMMEDIATE; {}", insert(OLD + 1..=OLD + new))).unwrap();

    let mut child = ServingChild::of(&mut parent, &db);
    let answer = match deed {
        "exit" => Ok(String::new()),
        "close" => child.ask(&Task::Close),
        sql => child.ask(&Task::Execute(sql.to_owned())),
    };
    child.end();
    if answer.is_ok() && deed.ends_with("COMMIT") {
        return Err(format!("the child's {deed} was accepted"));
    }
    let rows = match end {
        End::Commit => {
            parent.execute("COMMIT").map_err(|error| format!("the parent's COMMIT: {error:?}"))?;
            OLD + new
        }
        End::Rollback => {
            parent.execute("ROLLBACK").map_err(|error| format!("the parent's ROLLBACK: {error:?}"))?;
            OLD
        }
        End::Killed => OLD,
    };
    if end == End::Killed {
        parent.kill();
    } else {
        audit(&mut parent, rows).map_err(|wrong| format!("in the parent: {wrong}"))?;
        if journal_mode == "wal" {
            parent.query("PRAGMA wal_checkpoint(TRUNCATE)");
        }
        parent.ask(&Task::Close).unwrap();
    }
    audit(&mut Agent::stock_with_db(db.path()), rows).map_err(|wrong| format!("opened again: {wrong}"))
}

/// All rows by the table and all rows by the index.
fn audit(agent: &mut Agent, rows: usize) -> Result<(), String> {
    let sum: usize = (1..=rows).map(|id| id * 7919 % 3001).sum();
    for (sql, expected) in [
        (
            "SELECT count(*) || ' ' || sum(y) || ' ' || min(length(payload)) FROM t NOT INDEXED",
            format!("{rows} {sum} 400"),
        ),
        ("SELECT count(*) || ' ' || sum(y) FROM t INDEXED BY i WHERE y >= 0", format!("{rows} {sum}")),
        ("PRAGMA integrity_check", "ok".to_owned()),
    ] {
        let answer = agent.ask(&Task::Query(sql.to_owned()));
        if answer.as_ref() != Ok(&expected) {
            return Err(format!("{sql}: {answer:?}, not {expected}"));
        }
    }
    Ok(())
}

/// Whatever a child does with a connection that it has inherited, it commits nothing, and the parent's transaction is the
/// parent's: committed, rolled back, or rolled back after its death.
#[test]
fn a_childs_deeds_do_not_touch_the_parents_transaction() {
    for journal_mode in ["wal", "delete", "truncate", "persist"] {
        for (is_spilled, is_exclusive) in [(true, false), (false, false), (true, true)] {
            let scene = Scene { journal_mode, is_spilled, is_exclusive };
            for deed in DEEDS {
                for end in [End::Commit, End::Rollback, End::Killed] {
                    assert_eq!(deed_in_child(scene, true, deed, end), Ok(()), "{scene:?}, {deed}, {end:?}");
                }
            }
        }
    }
}

/// That these are real dangers: stock SQLite.
#[test]
fn a_childs_deeds_destroy_a_stock_parents_transaction() {
    for (journal_mode, is_spilled, deed, end) in [
        ("wal", true, "close", End::Commit),
        ("wal", true, "ROLLBACK", End::Commit),
        ("wal", true, "COMMIT", End::Rollback),
        ("wal", false, "COMMIT", End::Killed),
        ("delete", true, "close", End::Commit),
        ("delete", false, "close", End::Commit),
        ("delete", false, "ROLLBACK", End::Commit),
        ("delete", true, "COMMIT", End::Killed),
        ("truncate", true, "close", End::Rollback),
        ("persist", true, "close", End::Rollback),
    ] {
        let scene = Scene { journal_mode, is_spilled, is_exclusive: false };
        assert!(deed_in_child(scene, false, deed, end).is_err(), "{scene:?}, {deed}, {end:?}");
    }
}

/// A connection that is idle when it is carried into the child can neither read nor write there.
#[test]
fn an_inherited_connection_is_refused_in_the_child() {
    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let mut parent = Agent::with_db(db.path(), "kanbanlock");
        parent.query(&format!("PRAGMA journal_mode = {journal_mode}"));
        parent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
        let mut child = ServingChild::of(&mut parent, &db);
        for sql in ["INSERT INTO t VALUES (2)", "SELECT * FROM t", "BEGIN IMMEDIATE", "VACUUM"] {
            assert!(child.ask(&Task::Execute(sql.to_owned())).is_err(), "{journal_mode}: {sql}");
        }
        let log = child.ask(&Task::Log).unwrap();
        assert!(log.contains("Open a connection of its own in the child"), "{log}");
        child.ask(&Task::Close).unwrap();
        parent.execute("INSERT INTO t VALUES (3)").unwrap();
        assert_eq!(parent.query("SELECT count(*) FROM t"), "2", "{journal_mode}");
        assert_eq!(parent.query("PRAGMA journal_mode"), journal_mode);
    }
}

/// The same database, through plain `unix` in the same process: it shares what is mapped with the other.
#[test]
fn a_plain_connection_beside_it_is_refused_too() {
    let db = TestDb::new();
    let mut parent = Agent::with_db(db.path(), "kanbanlock");
    parent.query("PRAGMA journal_mode = wal");
    parent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
    parent.execute(&format!("ATTACH 'file:{}?vfs=unix' AS plain", db.path().display())).unwrap();
    assert_eq!(parent.query("SELECT x FROM plain.t"), "1");
    let elsewhere = TestDb::new();
    parent.execute(&format!("ATTACH 'file:{}?vfs=unix' AS elsewhere", elsewhere.path().display())).unwrap();
    parent.execute("CREATE TABLE elsewhere.t (x)").unwrap();
    let mut child = ServingChild::of(&mut parent, &db);
    let descriptors = child.ask(&Task::CountDescriptors).unwrap();
    for sql in ["SELECT x FROM plain.t", "INSERT INTO plain.t VALUES (2)"] {
        assert!(child.ask(&Task::Execute(sql.to_owned())).is_err(), "{sql}");
    }
    assert_eq!(child.ask(&Task::CountDescriptors).unwrap(), descriptors);
    // One to another database is none of kanbanlock's business.
    child.ask(&Task::Execute("INSERT INTO elsewhere.t VALUES (2)".to_owned())).unwrap();
    child.ask(&Task::Close).unwrap();
    parent.execute("INSERT INTO t VALUES (3)").unwrap();
    assert_eq!(parent.query("SELECT count(*) FROM plain.t"), "2");
    assert_eq!(parent.query("SELECT x FROM elsewhere.t"), "2");
}

/// A child's own connection, opened beside the inherited one, excludes the parent and is excluded by it, by real locks:
/// also those that the inherited one has, and after that has been closed.
#[test]
fn a_childs_own_connection_locks_like_any_other() {
    for (journal_mode, parameters) in [
        ("wal", ""),
        ("delete", ""),
        ("wal", "&kanbanlock_close_proof=off"),
        ("delete", "&kanbanlock_close_proof=off"),
    ] {
        let db = TestDb::new();
        let uri = format!("file:{}?vfs=kanbanlock{parameters}", db.path().display());
        let mut parent = Agent::start();
        parent.ask(&Task::Open(uri.clone())).unwrap();
        parent.query(&format!("PRAGMA journal_mode = {journal_mode}"));
        parent
            .execute("CREATE TABLE t (x); INSERT INTO t VALUES (1); BEGIN IMMEDIATE; UPDATE t SET x = 2")
            .unwrap();
        let mut child = ServingChild::of(&mut parent, &db);
        let case = format!("{journal_mode}{parameters}");

        child.own(Order::Open(uri.clone())).unwrap();
        assert_busy(child.own(Order::Run("BEGIN IMMEDIATE".to_owned())), &case);
        assert_eq!(
            child.own(Order::Run("SELECT x FROM t".to_owned())),
            Ok("Integer(1)\n".to_owned()),
            "{case}"
        );
        parent.execute("COMMIT").unwrap();
        assert_eq!(
            child.own(Order::Run("SELECT x FROM t".to_owned())),
            Ok("Integer(2)\n".to_owned()),
            "{case}"
        );

        for sql in ["BEGIN IMMEDIATE", "UPDATE t SET x = 3"] {
            child.own(Order::Run(sql.to_owned())).unwrap();
        }
        assert_busy(parent.execute("BEGIN IMMEDIATE"), &case);
        child.ask(&Task::Close).unwrap();
        assert_busy(parent.execute("BEGIN IMMEDIATE"), &case);
        assert_busy(Agent::stock_with_db(db.path()).execute("BEGIN IMMEDIATE"), &case);
        child.own(Order::Run("COMMIT".to_owned())).unwrap();
        assert_eq!(parent.query("SELECT x FROM t"), "3", "{case}");

        // A reader in the child: SHARED, or a read mark and SHARED for as long as it is open.
        child.own(Order::Cursor("SELECT x FROM t UNION ALL SELECT x FROM t".to_owned())).unwrap();
        if journal_mode == "wal" {
            parent.execute("UPDATE t SET x = 4").unwrap();
            assert_eq!(parent.query("PRAGMA wal_checkpoint(TRUNCATE)"), "1", "{case}: busy");
            child.own(Order::EndCursor).unwrap();
            assert_eq!(parent.query("PRAGMA wal_checkpoint(TRUNCATE)"), "0", "{case}");
            assert_busy(parent.execute("PRAGMA journal_mode = delete"), &case);
        } else {
            assert_busy(parent.execute("BEGIN EXCLUSIVE"), &case);
        }
        drop(parent);
        child.own(Order::EndCursor).unwrap();
        child.own(Order::Run("UPDATE t SET x = x + 10".to_owned())).unwrap();
        child.own(Order::Close).unwrap();
        let x = if journal_mode == "wal" { "14" } else { "13" };
        assert_eq!(Agent::stock_with_db(db.path()).query("SELECT x FROM t"), x, "{case}");
    }
}

fn assert_busy(reply: Reply, case: &str) {
    assert_eq!(reply.map_err(|(code, _)| code & 0xff), Err(rusqlite::ffi::SQLITE_BUSY), "{case}");
}

/// A child's own connection shows in the locks of the process that it is in. On stock SQLite it believes that it has the
/// SHARED lock that its parent has, and the parent deletes the WAL under it.
#[test]
fn a_childs_own_connection_keeps_the_wal() {
    for is_shimmed in [true, false] {
        let db = TestDb::new();
        let uri =
            format!("file:{}?vfs={}", db.path().display(), if is_shimmed { "kanbanlock" } else { "unix" });
        let mut parent = if is_shimmed { Agent::start() } else { Agent::stock() };
        parent.ask(&Task::Open(uri.clone())).unwrap();
        parent.query("PRAGMA journal_mode = wal");
        parent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
        let mut child = ServingChild::of(&mut parent, &db);
        child.own(Order::Open(uri)).unwrap();
        child.own(Order::Run("INSERT INTO t VALUES (2)".to_owned())).unwrap();
        let is_kept = parent.execute("PRAGMA journal_mode = delete").is_err();
        assert_eq!(is_kept, is_shimmed);
        assert_eq!(db.beside("-wal").exists(), is_shimmed);
    }
}

/// SQLite's shared cache: a connection of the child's that joins an inherited one's cache is refused with it.
#[test]
fn a_shared_cache_is_inherited_too() {
    let db = TestDb::new();
    let uri = format!("file:{}?vfs=kanbanlock&cache=shared", db.path().display());
    let mut parent = Agent::start();
    parent.ask(&Task::Open(uri.clone())).unwrap();
    parent.query("PRAGMA journal_mode = wal");
    parent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
    let mut child = ServingChild::of(&mut parent, &db);
    child.own(Order::Open(uri.clone())).unwrap();
    assert!(child.own(Order::Run("SELECT x FROM t".to_owned())).is_err());
    child.ask(&Task::Close).unwrap();
    assert!(child.own(Order::Run("SELECT x FROM t".to_owned())).is_err());
    child.own(Order::Open(uri)).unwrap();
    child.own(Order::Run("UPDATE t SET x = 2".to_owned())).unwrap();
    assert_eq!(parent.query("SELECT x FROM t"), "2");
}

/// A grandchild: neither its parent's connection nor its grandparent's, but one of its own.
#[test]
fn a_grandchild_is_a_child_too() {
    let db = TestDb::new();
    let uri = format!("file:{}?vfs=kanbanlock", db.path().display());
    let mut parent = Agent::start();
    parent.ask(&Task::Open(uri.clone())).unwrap();
    parent.query("PRAGMA journal_mode = wal");
    parent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
    let mut child = ServingChild::of(&mut parent, &db);
    child.ask(&Task::Open(uri.clone())).unwrap(); // and closes the inherited one
    child.ask(&Task::Execute("BEGIN IMMEDIATE; UPDATE t SET x = 2".to_owned())).unwrap();
    let listener = UnixListener::bind(db.beside(".second-socket")).unwrap();
    let pid = child.ask(&Task::ForkServing(db.beside(".second-socket"))).unwrap();
    let mut grandchild = ServingChild::accept(&listener, &pid);
    assert!(grandchild.ask(&Task::Execute("COMMIT".to_owned())).is_err());
    grandchild.own(Order::Open(uri)).unwrap();
    assert_busy(grandchild.own(Order::Run("BEGIN IMMEDIATE".to_owned())), "the child writes");
    child.ask(&Task::Execute("COMMIT".to_owned())).unwrap();
    grandchild.own(Order::Run("UPDATE t SET x = x + 10".to_owned())).unwrap();
    grandchild.ask(&Task::Close).unwrap();
    assert_eq!(parent.query("SELECT x FROM t"), "12");
    assert_eq!(child.ask(&Task::Query("SELECT x FROM t".to_owned())), Ok("12".to_owned()));
}

/// The child has none of an inherited connection's files, open or mapped.
#[test]
fn a_child_lets_go_of_the_files() {
    for (is_shimmed, journal_mode) in [(true, "wal"), (true, "delete"), (false, "wal")] {
        let db = TestDb::new();
        let mut parent = if is_shimmed {
            Agent::with_db(db.path(), "kanbanlock")
        } else {
            Agent::stock_with_db(db.path())
        };
        parent.execute("PRAGMA page_size = 512; PRAGMA cache_size = 5").unwrap();
        parent.query(&format!("PRAGMA journal_mode = {journal_mode}"));
        // More than 4062 frames: the wal-index has two regions.
        parent
            .execute(
                "PRAGMA temp_store = file; CREATE TEMP TABLE u (y); INSERT INTO u VALUES (zeroblob(3000000));
                 CREATE TABLE t (x); BEGIN IMMEDIATE; INSERT INTO t VALUES (zeroblob(3000000))",
            )
            .unwrap();
        let child = ServingChild::of(&mut parent, &db);
        let process = PathBuf::from(format!("/proc/{}", child.process.0));
        let links = std::fs::read_dir(process.join("fd")).unwrap();
        let mut files: Vec<_> =
            links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok()).collect();
        files.retain(|file| file.starts_with(db.dir()) || file.to_string_lossy().contains("/etilqs_"));
        assert_eq!(files.is_empty(), is_shimmed, "{journal_mode}: {files:?}");
        let mapped = mappings(&process, "/kanban.db-shm");
        assert_eq!(mapped, if is_shimmed { 0 } else { 2 }, "{journal_mode}");
        let copied = if is_shimmed && journal_mode == "wal" { 2 } else { 0 };
        assert_eq!(mappings(&process, "/memfd:kanbanlock-fork"), copied, "{journal_mode}");
        child.end();
        parent.execute("COMMIT").unwrap();

        // What was mapped once is anybody's memory now.
        parent.query("PRAGMA journal_mode = delete");
        let child = ServingChild::of(&mut parent, &TestDb::new());
        let process = PathBuf::from(format!("/proc/{}", child.process.0));
        assert_eq!(mappings(&process, "/memfd:kanbanlock-fork"), 0, "{journal_mode}");
    }
}

/// How many mappings of a process are of a file of that name.
fn mappings(process: &Path, name: &str) -> usize {
    let maps = std::fs::read_to_string(process.join("maps")).unwrap();
    maps.lines().filter(|line| line.contains(name)).count()
}

/// A forked child that does as it is told, as its parent does.
struct ServingChild {
    process: Child,
    requests: UnixStream,
    replies: BufReader<UnixStream>,
}

impl ServingChild {
    fn of(parent: &mut Agent, db: &TestDb) -> ServingChild {
        let socket = db.beside(".socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let pid = parent.ask(&Task::ForkServing(socket)).unwrap();
        ServingChild::accept(&listener, &pid)
    }

    fn accept(listener: &UnixListener, pid: &str) -> ServingChild {
        let (stream, _) = listener.accept().unwrap();
        let replies = BufReader::new(stream.try_clone().unwrap());
        ServingChild { process: Child(pid.parse().unwrap()), requests: stream, replies }
    }

    fn ask(&mut self, task: &Task) -> Reply {
        let mut line = serde_json::to_vec(task).unwrap();
        line.push(b'\n');
        self.requests.write_all(&line).unwrap();
        let mut line = String::new();
        self.replies.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// An order to the connection that the child opens by itself.
    fn own(&mut self, order: Order) -> Reply {
        let answer: Answer = serde_json::from_str(&self.ask(&Task::Handle(0, order)).unwrap()).unwrap();
        answer.result
    }

    /// It leaves by exit(3), with its connection open if it has not closed it.
    fn end(mut self) {
        self.requests.shutdown(Shutdown::Write).unwrap();
        self.replies.read_to_end(&mut Vec::new()).unwrap();
    }
}

/// A forked child, killed when dropped.
struct Child(i32);

impl Child {
    fn is_alive(&self) -> bool {
        // SAFETY: signal 0 only asks.
        unsafe { libc::kill(self.0, 0) == 0 }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own grandchild, alive until now (its alarm is a minute away).
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}
