//! Scripts for `tests/syscall_faults.rs`: what they do, how each is run, and what must hold after each run.
//!
//! A script makes transactions on a copy of a database, one statement after another, and goes on whatever fails. `run`
//! lets it run with a system call failing, or under a limit of the process, and checks all that needs no comparison.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_int;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, ffi};

use crate::support::{self, TestDb};
use crate::syscalls::{self, Fault, Lasts, Struck};

pub const STOCK: &str = "unix";
pub const SHIM: &str = "kanbanlock";

// -----------------------------------------------------------------------------------------------------------
// The scripts
// -----------------------------------------------------------------------------------------------------------

/// A database to start from, copied for each run.
type Template = Vec<(&'static str, Vec<u8>)>;

fn files_of(db: &TestDb) -> Template {
    let read = |suffix| fs::read(db.beside(suffix)).ok().map(|bytes| (suffix, bytes));
    ["", "-wal", "-journal"].into_iter().filter_map(read).collect()
}

fn new_database(mode: &str) -> (TestDb, Connection) {
    let db = TestDb::new();
    let conn = db.open(STOCK);
    support::set_journal_mode(&conn, mode);
    conn.execute_batch("CREATE TABLE task(id INTEGER PRIMARY KEY, filler); CREATE TABLE note(id)").unwrap();
    conn.execute_batch("INSERT INTO task VALUES(1, NULL); INSERT INTO note VALUES(1)").unwrap();
    (db, conn)
}

/// Closed in good order.
fn clean(mode: &str) -> Template {
    let (db, conn) = new_database(mode);
    drop(conn);
    files_of(&db)
}

/// As a crash in the midst of a transaction leaves it: with a hot journal, or a WAL that nobody has an index of.
fn crashed(mode: &str) -> Template {
    let (db, conn) = new_database(mode);
    conn.execute_batch("PRAGMA cache_size=1; BEGIN IMMEDIATE").unwrap();
    conn.execute_batch(&insert(2)).unwrap();
    let files = files_of(&db);
    assert_eq!(files.len(), 2, "something to recover");
    files
}

/// More pages than the cache has, so that they are written out before the COMMIT.
fn insert(id: i64) -> String {
    format!("INSERT INTO task VALUES({id}, zeroblob(12000)); INSERT INTO note VALUES({id})")
}

const COUNT: &str = "SELECT count(*) FROM task";

pub struct Script {
    pub name: &'static str,
    template: Template,
    run: fn(&mut Run),
}

pub fn scripts() -> &'static [Script] {
    static SCRIPTS: OnceLock<Vec<Script>> = OnceLock::new();
    SCRIPTS.get_or_init(|| {
        vec![
            Script { name: "DELETE", template: clean("delete"), run: |run| run.life("delete") },
            Script { name: "TRUNCATE", template: clean("delete"), run: |run| run.short_life("truncate") },
            Script { name: "PERSIST", template: clean("delete"), run: |run| run.short_life("persist") },
            Script { name: "WAL", template: clean("wal"), run: |run| run.life("wal") },
            Script { name: "hot journal", template: crashed("delete"), run: Run::recovery },
            Script { name: "WAL recovery", template: crashed("wal"), run: Run::recovery },
            Script { name: "mode switch", template: clean("delete"), run: Run::mode_switch },
            Script { name: "odds and ends", template: clean("delete"), run: Run::odds_and_ends },
        ]
    })
}

impl Run {
    fn life(&mut self, mode: &str) {
        self.open();
        self.set_up(mode);
        self.transaction(11);
        self.upgrade(12);
        self.rolled_back(13);
        self.sql("CREATE TABLE extra(x)");
        // Another connection of the process comes and goes: os_unix keeps its descriptor until the locks are gone.
        if self.sql("BEGIN IMMEDIATE") {
            self.reader();
            self.sql("COMMIT");
        }
        if mode == "wal" {
            self.query("PRAGMA wal_checkpoint(PASSIVE)");
            self.transaction(14); // restarts the WAL
            self.query("PRAGMA wal_checkpoint(TRUNCATE)");
        }
        self.transaction(15);
        self.close();
    }

    /// What these modes do in another way than DELETE: begin, end and roll back a journal.
    fn short_life(&mut self, mode: &str) {
        self.open();
        self.set_up(mode);
        self.transaction(11);
        self.rolled_back(12);
        self.transaction(13);
        self.close();
    }

    fn set_up(&mut self, mode: &str) {
        self.query(&format!("PRAGMA journal_mode={mode}"));
        self.sql("PRAGMA cache_size=2; PRAGMA wal_autocheckpoint=0; PRAGMA synchronous=FULL");
    }

    fn recovery(&mut self) {
        self.open();
        self.query(COUNT);
        self.transaction(11);
        self.close();
    }

    fn mode_switch(&mut self) {
        self.open();
        for (id, mode) in (11..).zip(["wal", "truncate", "wal", "persist", "delete"]) {
            self.set_up(mode);
            self.transaction(id);
        }
        self.close();
    }

    /// A relative path through a symbolic link; permissions that the umask takes away, and another owner; a file that is
    /// mapped, and grows; a temporary file.
    fn odds_and_ends(&mut self) {
        std::os::unix::fs::symlink(self.db.path(), self.db.dir().join("link.db")).unwrap();
        std::env::set_current_dir(self.db.dir()).unwrap();
        fs::set_permissions(self.db.path(), fs::Permissions::from_mode(0o666)).unwrap();
        if is_root() {
            std::os::unix::fs::chown(self.db.path(), Some(1), Some(1)).unwrap();
        }
        self.name = "link.db".into();
        self.open();
        self.sql("PRAGMA mmap_size=10000000");
        self.query(COUNT);
        self.transaction(11);
        self.query("SELECT sum(length(filler)) FROM task");
        self.transaction(12);
        self.query("SELECT sum(length(filler)) FROM task");
        self.sql("PRAGMA cache_size=1; VACUUM");
        self.close();
        std::env::set_current_dir("/").unwrap();
    }
}

// -----------------------------------------------------------------------------------------------------------
// One run
// -----------------------------------------------------------------------------------------------------------

struct Run {
    db: TestDb,
    /// What is opened.
    name: PathBuf,
    vfs: &'static str,
    writer: Option<Connection>,
    /// Each statement, its result code, and what it returned.
    answers: Vec<(String, c_int, String)>,
    acknowledged: BTreeSet<i64>,
    /// Their COMMIT was never sent.
    gone: BTreeSet<i64>,
    /// They were to be committed, and it was not acknowledged.
    failed: BTreeSet<i64>,
    was_read_only: bool,
    /// With no fault in the way, a transaction must be seen to hold locks.
    is_faultless: bool,
    limit: Limit,
    what: String,
}

/// What a run leaves behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub answers: Vec<(String, c_int, String)>,
    rows: BTreeSet<i64>,
}

impl Outcome {
    /// The result codes of the statements that failed.
    pub fn errors(&self) -> Vec<c_int> {
        self.answers.iter().map(|(_, code, _)| *code).filter(|code| *code != ffi::SQLITE_OK).collect()
    }
}

impl Run {
    /// Before each statement.
    fn enter(&self) {
        syscalls::next_statement();
        self.limit.impose();
    }

    fn connect(&self) -> rusqlite::Result<Connection> {
        let conn = Connection::open_with_flags_and_vfs(&self.name, OpenFlags::default(), self.vfs)?;
        conn.busy_timeout(Duration::ZERO)?;
        Ok(conn)
    }

    /// A caller who cannot open tries once more.
    fn open(&mut self) {
        for _ in 0..2 {
            self.enter();
            let opened = self.connect();
            let code = code(&opened);
            self.writer = opened.ok();
            if self.answered("open", code, "") {
                break;
            }
        }
    }

    fn sql(&mut self, sql: &str) -> bool {
        let Some(writer) = &self.writer else { return false };
        self.enter();
        let code = code(&writer.execute_batch(sql));
        self.answered(sql, code, "")
    }

    fn query(&mut self, sql: &str) {
        let Some(writer) = &self.writer else { return };
        self.enter();
        let result = first_value(writer, sql);
        let text = result.as_ref().map_or(String::new(), |value| format!("{value:?}"));
        self.answered(sql, code(&result), &text);
    }

    fn reader(&mut self) {
        self.enter();
        let result = self.connect().and_then(|reader| first_value(&reader, COUNT));
        let text = result.as_ref().map_or(String::new(), |value| format!("{value:?}"));
        self.answered("reader", code(&result), &text);
    }

    /// If the write fails, the read transaction may go on, and the gate must be free.
    fn upgrade(&mut self, id: i64) {
        let is_begun = self.sql("BEGIN");
        self.query(COUNT);
        self.write_and_commit(id, is_begun);
    }

    fn transaction(&mut self, id: i64) {
        let is_begun = self.sql("BEGIN IMMEDIATE");
        self.write_and_commit(id, is_begun);
    }

    fn write_and_commit(&mut self, id: i64, is_begun: bool) {
        let is_whole = is_begun && self.sql(&insert(id));
        if is_whole && self.sql("COMMIT") {
            self.acknowledged.insert(id);
        } else {
            self.failed.insert(id);
        }
        if !is_whole {
            self.gone.insert(id);
        }
        self.roll_back();
    }

    fn rolled_back(&mut self, id: i64) {
        let _ = self.sql("BEGIN IMMEDIATE") && self.sql(&insert(id));
        self.gone.insert(id);
        self.roll_back();
    }

    fn roll_back(&mut self) {
        if self.writer.as_ref().is_some_and(|writer| !writer.is_autocommit()) {
            self.sql("ROLLBACK");
        }
    }

    fn close(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        self.enter();
        let closed = writer.close().map_err(|(_, error)| error);
        self.answered("close", code(&closed), "");
    }

    /// After each statement.
    fn answered(&mut self, what: &str, code: c_int, text: &str) -> bool {
        self.limit.lift();
        self.answers.push((what.to_owned(), code, text.to_owned()));
        // After some errors os_unix opens a database read-only.
        self.was_read_only |=
            self.writer.as_ref().is_some_and(|writer| writer.is_readonly("main") == Ok(true));
        let is_writing = self.writer.as_ref().is_some_and(is_writing);
        let held = is_flocked(&self.db.lock_file());
        if self.vfs == STOCK {
            assert!(!self.db.lock_file().exists(), "{}: stock has a lock file", self.what);
        } else if held != is_writing {
            // A lock that could not be given up keeps the gate: rows L11 and S6.
            let is_excused = held && syscalls::has_struck("F_SETLK unlock");
            assert!(is_excused, "{}: {what}: gate held {held}, transaction {is_writing}", self.what);
        }
        if self.vfs == SHIM && is_writing && self.is_faultless {
            // (Not on stock: the probe is a stray close.)
            assert_ne!(locked_files(&self.db), [""; 0], "{}: {what}: no lock is seen", self.what);
        }
        code == ffi::SQLITE_OK
    }
}

/// Runs the script, with a fault if there is one, and checks everything but the answers.
pub fn run(
    script: &Script,
    vfs: &'static str,
    fault: Option<Fault>,
    limit: Limit,
) -> (Option<Struck>, Outcome) {
    let before = descriptors();
    let db = TestDb::new();
    for (suffix, bytes) in &script.template {
        fs::write(db.beside(suffix), bytes).unwrap();
    }
    let mut run = Run {
        name: db.path().to_owned(),
        db,
        vfs,
        writer: None,
        answers: Vec::new(),
        acknowledged: BTreeSet::from([1]),
        gone: BTreeSet::new(),
        failed: BTreeSet::new(),
        was_read_only: false,
        is_faultless: fault.is_none() && limit == Limit::None,
        limit,
        what: format!("{}, {vfs}, {fault:?}, {limit:?}", script.name),
    };
    if let Some(fault) = fault {
        syscalls::arm(fault);
    }
    (script.run)(&mut run);
    let unlock_failed = syscalls::has_struck("F_SETLK unlock");
    let struck = syscalls::disarm();
    run.name = run.db.path().to_owned();
    let Run { db, answers, acknowledged, gone, what, .. } = &run;
    let what = format!("{what}, struck first {struck:?}: {answers:?}");

    assert_eq!(locked_files(db), [""; 0], "closed, yet locked: {what}");
    assert!(!is_flocked(&db.lock_file()), "closed, yet the gate is held: {what}");
    assert_eq!(descriptors(), before, "descriptors leaked: {what}");

    // One call that fails costs one transaction, and the next one on the same connection succeeds; unless the database was
    // opened read-only, or a lock could not be given up (then it is as on stock, which the caller compares).
    let is_once = fault.is_some_and(|fault| fault.lasts == Lasts::Once);
    if is_once && !unlock_failed && !run.was_read_only {
        assert!(run.failed.len() <= 1, "{:?} have failed: {what}", run.failed);
    }

    // The next transaction, by somebody who has seen nothing of all this.
    let next = run.connect().unwrap();
    next.execute_batch(&format!("BEGIN IMMEDIATE; {}; COMMIT", insert(900))).expect(&what);
    drop(next);
    assert!(!is_flocked(&db.lock_file()), "the next has left the gate behind: {what}");

    let stranger = Connection::open(db.path()).unwrap();
    let integrity = stranger.query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0));
    assert_eq!(integrity.as_deref(), Ok("ok"), "{what}");
    let rows = ids(&stranger, "task");
    assert_eq!(rows, ids(&stranger, "note"), "half a transaction: {what}");
    drop(stranger);
    let lost: Vec<_> = acknowledged.difference(&rows).collect();
    assert!(lost.is_empty() && rows.contains(&900), "acknowledged, but not there: {lost:?}: {what}");
    let undead: Vec<_> = gone.intersection(&rows).collect();
    assert!(undead.is_empty(), "never committed, but there: {undead:?}: {what}");
    assert_eq!(locked_files(db), [""; 0], "{what}");
    assert_eq!(descriptors(), before, "descriptors leaked: {what}");
    (struck, Outcome { answers: run.answers, rows })
}

/// Without a fault nothing may fail.
pub fn faultless(script: &Script, vfs: &'static str) -> Outcome {
    let (_, outcome) = run(script, vfs, None, Limit::None);
    assert_eq!(outcome.errors(), [0; 0], "{outcome:?}");
    outcome
}

fn ids(conn: &Connection, table: &str) -> BTreeSet<i64> {
    let mut ids = conn.prepare(&format!("SELECT id FROM {table}")).unwrap();
    ids.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

fn first_value(conn: &Connection, sql: &str) -> rusqlite::Result<rusqlite::types::Value> {
    conn.query_row(sql, [], |row| row.get(0))
}

/// `sqlite3_txn_state`: is a write transaction open?
fn is_writing(conn: &Connection) -> bool {
    // SAFETY: an open connection, and a NUL-terminated schema name.
    unsafe { ffi::sqlite3_txn_state(conn.handle(), c"main".as_ptr()) == ffi::SQLITE_TXN_WRITE }
}

/// fchown(2) is tried by root alone.
pub fn is_root() -> bool {
    // SAFETY: no argument.
    unsafe { libc::geteuid() == 0 }
}

/// The extended result code.
fn code<T>(result: &rusqlite::Result<T>) -> c_int {
    match result {
        Ok(_) => ffi::SQLITE_OK,
        Err(error) => error.sqlite_error().map_or(ffi::SQLITE_MISUSE, |error| error.extended_code),
    }
}

/// The open descriptors of this process, and what they lead to.
fn descriptors() -> BTreeMap<PathBuf, PathBuf> {
    let names: Vec<_> = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path()).collect();
    // By now the descriptor of that very directory is closed, and no link any more.
    names.into_iter().filter_map(|fd| fs::read_link(&fd).ok().map(|target| (fd, target))).collect()
}

/// Which of the files somebody has a POSIX or OFD lock on, by F_OFD_GETLK of a stranger for all bytes. (`/proc/locks` is no
/// witness: while locks come and go in other processes, a read of it may miss lines. A lock on a file that was deleted
/// needs a descriptor of it, and none is left: [`descriptors`].)
fn locked_files(db: &TestDb) -> Vec<&'static str> {
    let is_locked = |suffix: &&str| {
        let Ok(file) = File::options().read(true).write(true).open(db.beside(suffix)) else { return false };
        // SAFETY: all-zero is a valid flock structure: from 0 to the end.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = i16::try_from(libc::F_WRLCK).unwrap();
        // SAFETY: an open descriptor and a flock structure.
        let result =
            unsafe { libc::syscall(libc::SYS_fcntl, file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        c_int::from(lock.l_type) != libc::F_UNLCK
    };
    ["", "-shm", "-wal", "-journal"].into_iter().filter(is_locked).collect()
}

/// True if somebody holds the flock. Asked by a system call that no fault strikes.
fn is_flocked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    // SAFETY: no pointer. The lock goes with `file`, the only descriptor of its description.
    unsafe { libc::syscall(libc::SYS_flock, file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) != 0 }
}

// -----------------------------------------------------------------------------------------------------------
// Limits of the process
// -----------------------------------------------------------------------------------------------------------

/// setrlimit(2), while SQLite has the floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    None,
    /// RLIMIT_NOFILE: EMFILE
    Descriptors(libc::rlim_t),
    /// RLIMIT_FSIZE, with SIGXFSZ ignored: "a process may … ignore this signal …, in which case the relevant system call
    /// (e.g., write(2), truncate(2)) fails with the error EFBIG"; a write that begins below the limit is short.
    FileSize(libc::rlim_t),
}

impl Limit {
    /// A limit of descriptors at which `spare` more can be opened.
    pub fn spare_descriptors(spare: usize) -> Limit {
        let number = |fd: &PathBuf| fd.file_name().unwrap().to_str().unwrap().parse::<u64>().unwrap();
        let taken: BTreeSet<u64> = descriptors().keys().map(number).collect();
        Limit::Descriptors((0..).filter(|number| !taken.contains(number)).nth(spare).unwrap())
    }

    fn impose(self) {
        match self {
            Limit::None => {}
            Limit::Descriptors(limit) => set_soft_limit(libc::RLIMIT_NOFILE, Some(limit)),
            Limit::FileSize(limit) => set_soft_limit(libc::RLIMIT_FSIZE, Some(limit)),
        }
    }

    fn lift(self) {
        match self {
            Limit::None => {}
            Limit::Descriptors(_) => set_soft_limit(libc::RLIMIT_NOFILE, None),
            Limit::FileSize(_) => set_soft_limit(libc::RLIMIT_FSIZE, None),
        }
    }
}

/// `None`: as high as it goes.
fn set_soft_limit(resource: libc::__rlimit_resource_t, limit: Option<libc::rlim_t>) {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a place for the answer.
    assert_eq!(unsafe { libc::getrlimit(resource, &raw mut limits) }, 0);
    limits.rlim_cur = limit.unwrap_or(limits.rlim_max);
    // SAFETY: a soft limit not above the hard one.
    assert_eq!(unsafe { libc::setrlimit(resource, &raw const limits) }, 0);
}
