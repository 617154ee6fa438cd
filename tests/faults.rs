//! # The real VFS fails
//!
//! Whatever SQLite does goes through kanbanlock to a real VFS, and there every call can fail: the disk is
//! full, a lock is refused, fsync reports EIO. Then the gate must neither be left behind (nobody writes any
//! more) nor be let go too early (two write at once).
//!
//! **The sweep** runs one script with the 1st, the 2nd, the 3rd … call of a method failing, until the script
//! has no such call any more; once with that call alone failing, once with every call from there on, and once
//! with the call doing its work and reporting an error all the same. All along, and at the end:
//!
//! - the gate is held exactly while the real VFS holds what a write transaction holds, and is free when no
//!   transaction is open (`Run::check_gate`, after each statement);
//! - each call that reached the real VFS as part of a write came while the gate was held
//!   (`Rig::check_record`, call by call);
//! - SQLite answered each statement as it does without kanbanlock: the same script with the same fault runs
//!   directly on the real VFS, as the control, and the result codes are compared;
//! - as many descriptors are open as before;
//! - the next transaction succeeds, the database is whole, every acknowledged commit is in it, and nothing is
//!   that was rolled back. A stock connection says so, which is no part of all this.
//!
//! **The rows** are those of the transition table (DESIGN.md §5, `src/state.rs`) where the real VFS's answer
//! is not OK, or where it must not be asked: one test each.
//!
//! The real VFS is `support/fault_vfs.rs`; `fault_vfs.rs` tests that one.

#[path = "support/fault_vfs.rs"]
mod fault_vfs;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_int;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use fault_vfs::{Error, Event, Fault, FaultVfs, Faults, Gate, LockKind, Method, OpenKind};
use kanbanlock::{CheckpointPolicy, Options};
use rusqlite::{Connection, OpenFlags, ffi};

/// The real VFS alone: the control.
const REAL: &str = "faultvfs";
/// kanbanlock above it.
const SHIM: &str = "kl-fault";
/// kanbanlock above it, with `kanbanlock_checkpoint=gate`.
const SHIM_GATED: &str = "kl-fault-gated";

const BOTH: [&str; 2] = ["DELETE", "WAL"];
const WRITE: u8 = 0;
const CKPT: u8 = 1;
const READ_0: u8 = 3;
const READ_4: u8 = 7;

// -----------------------------------------------------------------------------------------------------------
// The rig
// -----------------------------------------------------------------------------------------------------------

/// A new database in a directory of its own, above a real VFS on which nothing is armed.
struct Rig {
    faults: &'static Arc<Faults>,
    path: PathBuf,
    vfs: &'static str,
    mode: &'static str,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new(vfs: &'static str, mode: &'static str) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let rig = Rig { faults: faults(), path: dir.path().join("kanban.db"), vfs, mode, _dir: dir };
        rig.faults.disarm();
        rig.faults.clear();
        rig.faults.watch();
        rig
    }

    /// With a table and one row in it, and a connection to it.
    fn with_table(vfs: &'static str, mode: &'static str) -> (Rig, Connection) {
        let rig = Rig::new(vfs, mode);
        let conn = rig.open().unwrap();
        conn.execute_batch(&format!("PRAGMA journal_mode={mode}")).unwrap();
        conn.execute_batch(
            "CREATE TABLE task(id INTEGER PRIMARY KEY, note); INSERT INTO task(id, note) VALUES(1, '')",
        )
        .unwrap();
        rig.faults.clear();
        (rig, conn)
    }

    fn open(&self) -> rusqlite::Result<Connection> {
        self.open_path(&self.path)
    }

    fn open_path(&self, path: &Path) -> rusqlite::Result<Connection> {
        let conn = Connection::open_with_flags_and_vfs(path, OpenFlags::default(), self.vfs)?;
        conn.busy_timeout(Duration::ZERO)?;
        Ok(conn)
    }

    fn gate(&self) -> Gate {
        Gate::of(&self.path)
    }

    /// The flock on the lock file, held by somebody who knows nothing of SQLite.
    fn outside_flock(&self) -> File {
        let path = fault_vfs::lock_path(&self.path);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        file.try_lock().unwrap();
        file
    }

    /// Looks at the database as a stranger: a new connection on the stock unix VFS.
    fn audit(&self) -> Audit {
        let conn = Connection::open(&self.path).unwrap();
        let integrity = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        let mut names = conn.prepare("SELECT name FROM sqlite_schema").unwrap();
        let names = names.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
        let mut rows = conn.prepare("SELECT id FROM task").unwrap();
        let rows = rows.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
        Audit { integrity, names, rows }
    }

    /// Is there a reason for the gate to be held now? By the real VFS's own account of its locks.
    fn has_reason(&self) -> bool {
        let holds = |slot, is_gated: fn(&Slots) -> bool| {
            self.faults.holder(&self.path, slot).is_some_and(|holder| {
                let mut slots = self.slots();
                let events = self.faults.events();
                events
                    .iter()
                    .filter(|event| event.call.handle == holder)
                    .for_each(|event| slots.follow(event));
                is_gated(&slots)
            })
        };
        self.faults.level(&self.path) > LockKind::Shared
            || holds(WRITE, Slots::holds_gated_write)
            || holds(CKPT, Slots::holds_gated_ckpt)
    }

    /// The slots of a handle just opened.
    fn slots(&self) -> Slots {
        Slots { policy_gate: self.vfs == SHIM_GATED, ..Slots::default() }
    }

    /// The gate at every call that reached the real VFS: held if that is, or asks for, what a writer holds,
    /// and not held otherwise. (After a failed unlock of a slot it may be held for longer: `strictly` false.)
    fn check_record(&self, what: &str, strictly: bool) {
        let events = self.faults.events();
        let mut handles: BTreeMap<u64, Slots> = BTreeMap::new();
        let mut looked = 0;
        for (n, event) in events.iter().enumerate() {
            let call = &event.call;
            let slots = handles.entry(call.handle).or_insert_with(|| self.slots());
            if call.method == Method::Close {
                slots.held.clear(); // by xShmUnmap, which does not get as far as the record
            }
            // The gate comes before the real lock …
            let is_upgrade = match call.method {
                Method::Lock => call.level > Some(LockKind::Shared),
                Method::ShmLock => call.exclusive && slots.are_gated(&call.slots),
                _ => false,
            };
            // … and goes after it.
            let is_writer = event.level > LockKind::Shared
                || call.db.as_deref() == Some(&self.path) && handles.values().any(Slots::are_reason);
            let is_held = event.gate.map(Gate::is_held);
            let context = || {
                let context = events[n.saturating_sub(12)..=n].iter();
                context.map(|event| format!("{event}   {:?}", event.gate)).collect::<Vec<_>>()
            };
            if is_upgrade || is_writer {
                assert_ne!(is_held, Some(false), "{what}: {event} without the gate: {:#?}", context());
            } else if strictly {
                assert_ne!(is_held, Some(true), "{what}: {event} with the gate: {:#?}", context());
            }
            looked += usize::from(is_held.is_some());
            handles.entry(call.handle).or_default().follow(event);
        }
        assert!(looked > 0 || self.faults.calls(Method::Open) == 0, "{what}: nobody has looked at the gate");
    }
}

struct Audit {
    integrity: String,
    names: BTreeSet<String>,
    rows: BTreeSet<i64>,
}

/// The WAL-index slots of one handle, as far as they can be told from the record.
#[derive(Default)]
struct Slots {
    /// `kanbanlock_checkpoint=gate`
    policy_gate: bool,
    held: BTreeSet<u8>,
    /// SQLite is between locking and unlocking WRITE. (It takes a failed unlock for a success.)
    is_writing: bool,
    /// WRITE is held by a transaction or a checkpoint, not by a reader who rebuilds the WAL-index.
    write_is_gated: bool,
    /// CKPT is held by a checkpoint under the policy `gate`, not by a reader, nor by the reset guard.
    ckpt_is_gated: bool,
}

impl Slots {
    fn follow(&mut self, event: &Event) {
        let slots = event.call.slots.clone();
        if event.call.method == Method::ShmUnlock && slots.contains(&WRITE) {
            self.is_writing = false;
        }
        match (event.call.method, event.answer) {
            (Method::ShmLock, "OK") => {
                self.is_writing |= slots.contains(&WRITE);
                if slots.contains(&WRITE) {
                    self.write_is_gated = self.are_gated(&slots);
                }
                if slots.contains(&CKPT) {
                    self.ckpt_is_gated = self.are_gated(&slots);
                }
                self.held.extend(slots);
            }
            (Method::ShmUnlock, "OK") => self.held.retain(|slot| !slots.contains(slot)),
            (Method::ShmUnmap, _) => self.held.clear(),
            _ => {}
        }
    }

    fn holds_gated_write(&self) -> bool {
        self.held.contains(&WRITE) && self.write_is_gated
    }

    fn holds_gated_ckpt(&self) -> bool {
        self.held.contains(&CKPT) && self.ckpt_is_gated
    }

    fn are_reason(&self) -> bool {
        self.holds_gated_write() || self.holds_gated_ckpt()
    }

    /// Do these slots, if asked for now and exclusively, need the gate?
    fn are_gated(&self, slots: &Range<u8>) -> bool {
        let in_transaction = self.held.contains(&CKPT) || self.held.iter().any(|&slot| slot >= READ_0);
        let is_checkpoint = *slots == (CKPT..CKPT + 1) && !self.is_writing;
        slots.contains(&WRITE) && in_transaction || is_checkpoint && self.policy_gate
    }
}

/// The one registered fault VFS, with kanbanlock above it.
fn faults() -> &'static Arc<Faults> {
    static FAULTS: OnceLock<Arc<Faults>> = OnceLock::new();
    FAULTS.get_or_init(|| {
        let faults = FaultVfs::register(REAL);
        Options::default().name(SHIM).real_vfs(REAL).register().unwrap();
        let gated = Options::default().name(SHIM_GATED).real_vfs(REAL).checkpoint(CheckpointPolicy::Gate);
        gated.register().unwrap();
        faults
    })
}

/// Runs a test alone in this process: all share one real VFS, and one table of descriptors. As many of
/// those as before must be open afterwards.
fn alone(test: impl FnOnce()) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    drop(Rig::with_table(SHIM, "WAL")); // Whatever is opened once and for all is open now.
    let before = descriptors();
    test();
    assert_eq!(descriptors(), before, "descriptors leaked");
}

/// The open descriptors of this process, and what they lead to.
fn descriptors() -> BTreeMap<PathBuf, PathBuf> {
    let names: Vec<_> = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path()).collect();
    // By now the descriptor of that very directory is closed, and no link any more.
    names.into_iter().filter_map(|fd| fs::read_link(&fd).ok().map(|target| (fd, target))).collect()
}

/// The extended result code.
fn code<T>(result: rusqlite::Result<T>) -> c_int {
    match result {
        Ok(_) => ffi::SQLITE_OK,
        Err(error) => error.sqlite_error().map_or(ffi::SQLITE_MISUSE, |error| error.extended_code),
    }
}

fn count(conn: &Connection) -> rusqlite::Result<i64> {
    conn.query_row("SELECT count(*) FROM task", [], |row| row.get(0))
}

// -----------------------------------------------------------------------------------------------------------
// The sweep
// -----------------------------------------------------------------------------------------------------------

/// One run of the script.
struct Run<'a> {
    rig: &'a Rig,
    /// For the failure text.
    what: &'a str,
    /// Unlock calls fail: then an idle connection may still hold its real lock, and the gate with it.
    unlock_fails: bool,
    writer: Option<Connection>,
    /// Each statement with its result code.
    answers: Vec<(String, c_int)>,
    /// Acknowledged rows and tables.
    rows: BTreeSet<i64>,
    names: BTreeSet<&'static str>,
    /// Rows that must not be there: their COMMIT was never sent.
    gone: BTreeSet<i64>,
}

impl Run<'_> {
    /// One statement of the writer.
    fn sql(&mut self, sql: &str) -> bool {
        let Some(writer) = &self.writer else { return false };
        let code = code(writer.execute_batch(sql));
        self.answered(sql, code)
    }

    fn answered(&mut self, what: &str, code: c_int) -> bool {
        self.answers.push((what.to_owned(), code));
        if self.rig.vfs != REAL {
            self.check_gate(what);
        }
        code == ffi::SQLITE_OK
    }

    fn check_gate(&self, statement: &str) {
        let what = format!("{}: {statement}", self.what);
        let held = self.rig.gate().is_held();
        assert_eq!(
            held,
            self.rig.has_reason(),
            "{what}: (the gate is held, the real VFS holds a reason for it)"
        );
        let idle = self.writer.as_ref().is_none_or(Connection::is_autocommit);
        assert!(!(held && idle) || self.unlock_fails, "{what}: no transaction, yet the gate is held");
    }

    /// One transaction that inserts row `id`.
    fn transaction(&mut self, id: i64, statements: &[&str], end: &str) {
        let insert = format!("INSERT INTO task(id, note) VALUES({id}, 'new')");
        let begun = self.sql("BEGIN IMMEDIATE") && self.sql(&insert);
        if begun && statements.iter().all(|sql| self.statement(sql)) && end == "COMMIT" {
            if self.sql("COMMIT") {
                self.rows.insert(id);
            }
        } else {
            self.gone.insert(id);
        }
        if self.writer.as_ref().is_some_and(|writer| !writer.is_autocommit()) {
            self.sql("ROLLBACK");
        }
    }

    fn statement(&mut self, sql: &str) -> bool {
        if sql == READER { self.reader() } else { self.sql(sql) }
    }

    /// A second connection reads while the first is in the midst of a transaction.
    fn reader(&mut self) -> bool {
        let opened = self.rig.open();
        let read = opened.and_then(|reader| count(&reader));
        self.answered("reader", code(read));
        true
    }

    fn autocommit(&mut self, id: i64) {
        if self.sql(&format!("INSERT INTO task(id, note) VALUES({id}, 'auto')")) {
            self.rows.insert(id);
        }
    }

    fn ddl(&mut self, name: &'static str, sql: &str) {
        if self.sql(sql) {
            self.names.insert(name);
        }
    }

    fn script(&mut self) {
        // A caller who cannot open tries once more.
        for _ in 0..2 {
            let opened = self.rig.open();
            let code = match opened {
                Ok(conn) => {
                    self.writer = Some(conn);
                    ffi::SQLITE_OK
                }
                Err(error) => code::<()>(Err(error)),
            };
            if self.answered("open", code) {
                break;
            }
        }
        self.sql(&format!("PRAGMA journal_mode={}", self.rig.mode));
        self.sql("PRAGMA synchronous=FULL; PRAGMA cache_size=2; PRAGMA wal_autocheckpoint=8");
        self.ddl("task", "CREATE TABLE task(id INTEGER PRIMARY KEY, note)");
        self.ddl("filler", "CREATE TABLE filler(x)");
        self.autocommit(1);
        self.transaction(2, &[READER, "UPDATE task SET note='doing' WHERE id=1"], "COMMIT");
        self.transaction(3, &["UPDATE task SET note='lost' WHERE id=1"], "ROLLBACK");
        // More pages than the cache has: they spill before the COMMIT, and are played back by the ROLLBACK.
        self.transaction(4, &[FILL], "COMMIT");
        self.transaction(5, &["UPDATE filler SET x = printf('%.2900c', 'y')"], "ROLLBACK");
        self.ddl("task_note", "CREATE INDEX task_note ON task(note)");
        self.sql("ALTER TABLE task ADD COLUMN owner DEFAULT 'nobody'");
        self.sql("DELETE FROM filler");
        self.sql("VACUUM");
        self.sql("ALTER TABLE task DROP COLUMN owner");
        self.sql("PRAGMA wal_checkpoint(FULL)");
        self.autocommit(6); // restarts the WAL
        self.transaction(7, &[READER], "COMMIT");
        self.sql("PRAGMA wal_checkpoint(TRUNCATE)");
        self.autocommit(8);
        if let Some(writer) = self.writer.take() {
            let closed = writer.close().map_err(|(_, error)| error);
            self.answered("close", code(closed));
        }
    }
}

const READER: &str = "(the reader reads)";
const FILL: &str = "WITH RECURSIVE n(x) AS (VALUES(1) UNION ALL SELECT x+1 FROM n WHERE x<6)
                    INSERT INTO filler SELECT printf('%.2900c', 'x') FROM n";

/// The script with `fault` armed. Returns how often it struck, and how SQLite answered.
fn run(vfs: &'static str, mode: &'static str, fault: &Fault) -> (u64, Vec<(String, c_int)>) {
    let what = format!("{vfs}, {mode}, {fault}");
    let rig = Rig::new(vfs, mode);
    let before = descriptors();
    let hits = rig.faults.arm(fault.clone());
    let mut run = Run {
        rig: &rig,
        what: &what,
        unlock_fails: matches!(fault.method(), Method::Unlock | Method::ShmUnlock),
        writer: None,
        answers: Vec::new(),
        rows: BTreeSet::new(),
        names: BTreeSet::new(),
        gone: BTreeSet::new(),
    };
    run.script();
    rig.faults.disarm();
    let Run { answers, rows, names, gone, .. } = run;

    assert_eq!(rig.faults.open_handles(&rig.path), 0, "{what}");
    assert!(!rig.gate().is_held(), "{what}: closed, yet the gate is held");
    if vfs != REAL {
        rig.check_record(&what, fault.method() != Method::ShmUnlock);
    }

    // The next transaction, by somebody who has seen nothing of all this.
    let next = rig.open().unwrap();
    next.execute_batch("CREATE TABLE IF NOT EXISTS task(id INTEGER PRIMARY KEY, note)").unwrap();
    next.execute_batch("BEGIN IMMEDIATE; INSERT INTO task(id, note) VALUES(100, 'next'); COMMIT").unwrap();
    drop(next);
    assert!(!rig.gate().is_held(), "{what}: the next has left the gate behind");

    let found = rig.audit();
    assert_eq!(found.integrity, "ok", "{what}");
    let lost: Vec<_> = rows.iter().chain([&100]).filter(|id| !found.rows.contains(id)).collect();
    assert!(lost.is_empty(), "{what}: acknowledged, but not there: {lost:?}; {answers:#?}");
    let undead: Vec<_> = gone.intersection(&found.rows).collect();
    assert!(undead.is_empty(), "{what}: never committed, but there: {undead:?}; {answers:#?}");
    let lost: Vec<_> = names.iter().filter(|&&name| !found.names.contains(name)).collect();
    assert!(lost.is_empty(), "{what}: acknowledged, but not there: {lost:?}; {answers:#?}");
    assert_eq!(descriptors(), before, "{what}: descriptors leaked");
    (hits.count(), answers)
}

/// Fails the 1st, 2nd, 3rd … call that `fault` aims at, until there is none left.
fn sweep_one(shim: &'static str, mode: &'static str, fault: &Fault) {
    // Where kanbanlock refuses a lock, or wins CKPT before a reset, the real VFS is called less or more often
    // than in the control: its n-th call is another one. And xOpen asks HAS_MOVED too (`src/place.rs`).
    let method = fault.method();
    let comparable = method != Method::HasMoved
        && (mode == "DELETE" || !matches!(method, Method::Lock | Method::ShmLock | Method::ShmUnlock));
    let mut struck = 0;
    for n in 1.. {
        let fault = fault.clone().nth(n);
        let (hits, answers) = run(shim, mode, &fault);
        let (expected_hits, expected) = run(REAL, mode, &fault);
        if comparable {
            assert_eq!(hits, expected_hits, "{mode}, {fault}: struck not as often as without kanbanlock");
            assert_eq!(answers, expected, "{mode}, {fault}: not answered as without kanbanlock");
        }
        if hits == 0 {
            break;
        }
        struck += 1;
    }
    assert!(struck > 0, "{shim}, {mode}, {fault}: never fired");
    println!("{shim:14} {mode:6} {struck:4} runs with a fault that fired: {fault} and following");
}

fn sweep(shim: &'static str, modes: &[&'static str], method: Method, aim: impl Fn(Fault) -> Fault) {
    for &mode in modes {
        // Error::ShortRead is a lie about the data, which SQLite has to believe.
        for &error in method.errors().iter().filter(|&&error| error != Error::ShortRead) {
            let once = aim(Fault::new(method, error));
            sweep_one(shim, mode, &once);
            sweep_one(shim, mode, &once.clone().persistent());
            if has_effect_first(method) && error == Error::Io {
                sweep_one(shim, mode, &once.after());
            }
        }
    }
}

/// Methods that may have done their work when they report an error. (Not locks: a lock that is reported as
/// not taken and held in fact is beyond the contract. Not xShmLock UNLOCK: nobody could tell.)
fn has_effect_first(method: Method) -> bool {
    matches!(method, Method::Delete | Method::Write | Method::Truncate | Method::Sync | Method::Unlock)
}

/// One #[test] for each method: `name => method, journal modes`.
macro_rules! sweeps {
    ($($name:ident => $method:ident $(to $level:ident)?, $modes:expr;)*) => {
        $(
            #[test]
            fn $name() {
                alone(|| sweep(SHIM, &$modes, Method::$method, |fault| fault $(.to(LockKind::$level))?));
            }
        )*

        /// No method is forgotten. (xClose cannot fail. LOCKSTATE is only asked after a failed xUnlock: row
        /// L11, below.)
        #[test]
        fn sweeps_are_complete() {
            let swept = [$(Method::$method),*];
            let forgotten = Method::ALL.into_iter().filter(|method| !swept.contains(method));
            assert_eq!(forgotten.collect::<Vec<_>>(), [Method::Close, Method::LockState]);
        }
    };
}

sweeps! {
    sweep_x_open => Open, BOTH;
    sweep_x_delete => Delete, BOTH;
    sweep_x_access => Access, BOTH;
    sweep_x_full_pathname => FullPathname, BOTH;
    sweep_x_read => Read, BOTH;
    sweep_x_write => Write, BOTH;
    sweep_x_truncate => Truncate, BOTH;
    sweep_x_sync => Sync, BOTH;
    sweep_x_file_size => FileSize, BOTH;
    sweep_x_lock_shared => Lock to Shared, BOTH;
    sweep_x_lock_reserved => Lock to Reserved, BOTH;
    sweep_x_lock_exclusive => Lock to Exclusive, BOTH;
    sweep_x_unlock_shared => Unlock to Shared, BOTH;
    sweep_x_unlock_none => Unlock to None, BOTH;
    sweep_x_check_reserved_lock => CheckReservedLock, ["DELETE"];
    sweep_has_moved => HasMoved, BOTH;
    sweep_x_shm_map_open => ShmOpen, ["WAL"];
    sweep_x_shm_map => ShmMap, ["WAL"];
    sweep_x_shm_lock => ShmLock, ["WAL"];
    sweep_x_shm_unlock => ShmUnlock, ["WAL"];
    sweep_x_shm_unmap => ShmUnmap, ["WAL"];
}

/// With checkpoints behind the gate, too: CKPT is then another reason to hold it.
#[test]
fn sweep_gated_checkpoints() {
    alone(|| {
        for method in [Method::ShmLock, Method::ShmUnlock, Method::Sync, Method::Truncate] {
            sweep(SHIM_GATED, &["WAL"], method, |fault| fault);
        }
    });
}

// -----------------------------------------------------------------------------------------------------------
// The rows
// -----------------------------------------------------------------------------------------------------------

const INSERT: &str = "INSERT INTO task(note) VALUES('row')";

/// Leaves a hot journal (DELETE) or a WAL without a WAL-index (WAL), as a crash would.
fn crash(rig: &Rig, conn: Connection) {
    conn.execute_batch("PRAGMA cache_size=2; BEGIN IMMEDIATE; CREATE TABLE filler(x)").unwrap();
    conn.execute_batch(FILL).unwrap();
    for method in [Method::Write, Method::Truncate, Method::Delete, Method::Unlock] {
        rig.faults.arm(Fault::new(method, Error::Io).persistent());
    }
    rig.faults.arm(Fault::new(Method::Lock, Error::Busy).to(LockKind::Exclusive).persistent());
    drop(conn);
    rig.faults.disarm();
    rig.faults.clear();
    assert!(!rig.gate().is_held(), "C1: the gate has survived xClose");
}

/// Whether a write reached the real VFS, or a lock for one.
fn writes(rig: &Rig) -> Vec<String> {
    let is_write = |event: &&Event| match event.call.method {
        Method::Lock => event.call.level.is_some_and(|level| level > LockKind::Shared),
        Method::ShmLock => event.call.exclusive && event.call.slots.contains(&WRITE),
        Method::Write | Method::Truncate | Method::Sync | Method::Delete => true,
        _ => false,
    };
    rig.faults.events().iter().filter(is_write).map(ToString::to_string).collect()
}

/// L2, S2: a gate that is refused is SQLITE_BUSY, and the real VFS hears nothing of it. Readers do not
/// notice.
#[test]
fn l2_s2_refused() {
    alone(|| {
        for mode in BOTH {
            let (rig, conn) = Rig::with_table(SHIM, mode);
            let outside = rig.outside_flock();
            for sql in ["BEGIN IMMEDIATE", INSERT, "CREATE TABLE other(x)", "VACUUM", "DROP TABLE task"] {
                assert_eq!(code(conn.execute_batch(sql)), ffi::SQLITE_BUSY, "{mode}: {sql}");
                assert!(conn.is_autocommit(), "{mode}: {sql}");
                assert_eq!(count(&conn), Ok(1), "{mode}: {sql}");
            }
            // An upgrade leaves the read transaction alone.
            conn.execute_batch("BEGIN; SELECT * FROM task").unwrap();
            assert_eq!(code(conn.execute_batch(INSERT)), ffi::SQLITE_BUSY, "{mode}");
            conn.execute_batch("COMMIT").unwrap();
            assert_eq!(writes(&rig), [""; 0], "{mode}: reached the real VFS");
            assert!(rig.faults.calls(Method::Lock) + rig.faults.calls(Method::ShmLock) > 0);

            drop(outside);
            conn.execute_batch(INSERT).unwrap();
            assert_eq!((count(&conn), rig.gate()), (Ok(2), Gate::Free), "{mode}");
            assert_ne!(writes(&rig), [""; 0], "{mode}: the record does not show writes");
        }
    });
}

/// L3, S3: the gate is won, then the real VFS refuses or fails. The gate is given back at once, with the
/// read transaction still open.
#[test]
fn l3_s3_real_lock_fails() {
    alone(|| {
        for (mode, error, expected) in [
            ("DELETE", Error::Busy, ffi::SQLITE_BUSY),
            ("DELETE", Error::Io, ffi::SQLITE_IOERR_LOCK),
            ("WAL", Error::Busy, ffi::SQLITE_BUSY),
            ("WAL", Error::Io, ffi::SQLITE_IOERR_SHMLOCK),
        ] {
            let (rig, conn) = Rig::with_table(SHIM, mode);
            let fault = match mode {
                "DELETE" => Fault::new(Method::Lock, error).to(LockKind::Reserved),
                _ => Fault::new(Method::ShmLock, error).slot(WRITE),
            };
            conn.execute_batch("BEGIN; SELECT * FROM task").unwrap();
            let hits = rig.faults.arm(fault);
            assert_eq!(code(conn.execute_batch(INSERT)), expected, "{mode}, {error:?}");
            assert_eq!((hits.count(), rig.gate()), (1, Gate::Free), "{mode}, {error:?}");
            let struck = rig.faults.events().into_iter().find(|event| event.answer != "OK").unwrap();
            assert_eq!(struck.gate, Some(Gate::Held), "{mode}: the gate comes before {struck}");

            if !conn.is_autocommit() {
                conn.execute_batch(INSERT).unwrap();
                assert_eq!(rig.gate(), Gate::Held);
                conn.execute_batch("ROLLBACK").unwrap();
            }
            conn.execute_batch(INSERT).unwrap();
            assert_eq!((count(&conn), rig.gate()), (Ok(2), Gate::Free), "{mode}, {error:?}");
        }
    });
}

/// L4, L5: a SELECT that finds a hot journal must write, and so wants the gate.
#[test]
fn l4_l5_hot_journal() {
    alone(|| {
        let (rig, conn) = Rig::with_table(SHIM, "DELETE");
        crash(&rig, conn);
        let conn = rig.open().unwrap();

        // L4, refused: the real VFS hears nothing of it.
        let outside = rig.outside_flock();
        assert_eq!(code(count(&conn)), ffi::SQLITE_BUSY);
        assert_eq!(writes(&rig), [""; 0], "reached the real VFS");
        drop(outside);
        rig.faults.clear();

        // L5: the gate won, the real lock not.
        for (error, expected) in [(Error::Busy, ffi::SQLITE_BUSY), (Error::Io, ffi::SQLITE_IOERR_LOCK)] {
            let hits = rig.faults.arm(Fault::new(Method::Lock, error).to(LockKind::Exclusive));
            assert_eq!((code(count(&conn)), hits.count()), (expected, 1), "{error:?}");
            assert_eq!(rig.gate(), Gate::Free, "{error:?}");
        }

        // L4, L10: rolled back, and the gate given back.
        assert_eq!((count(&conn), rig.gate()), (Ok(1), Gate::Free));
        assert!(rig.faults.locks().contains(&"xLock EXCLUSIVE -> OK".to_owned()), "no hot journal");
        rig.check_record("L4", true);
    });
}

/// L7: a refused or failed EXCLUSIVE does not cost a writer the gate. The real VFS may be at PENDING, and
/// the journal is written; only ROLLBACK or a COMMIT that succeeds ends it.
#[test]
fn l7_denied_exclusive() {
    alone(|| {
        for (error, expected) in [(Error::Busy, ffi::SQLITE_BUSY), (Error::Io, ffi::SQLITE_IOERR_LOCK)] {
            for end in ["ROLLBACK", "COMMIT"] {
                let (rig, conn) = Rig::with_table(SHIM, "DELETE");
                conn.execute_batch("BEGIN IMMEDIATE").unwrap();
                conn.execute_batch(INSERT).unwrap();
                let hits =
                    rig.faults.arm(Fault::new(Method::Lock, error).to(LockKind::Exclusive).persistent());
                assert_eq!((code(conn.execute_batch("COMMIT")), hits.count()), (expected, 1));
                if conn.is_autocommit() {
                    // An I/O error has SQLite roll back of its own accord.
                    assert_eq!((error, rig.gate()), (Error::Io, Gate::Free));
                    continue;
                }
                assert_eq!((rig.gate(), rig.faults.level(&rig.path)), (Gate::Held, LockKind::Reserved));
                assert_eq!((code(conn.execute_batch("COMMIT")), hits.count()), (expected, 2));
                assert_eq!(rig.gate(), Gate::Held, "the second refusal has cost the gate");
                rig.faults.disarm();
                conn.execute_batch(end).unwrap();
                assert_eq!(rig.gate(), Gate::Free, "{end}");
                assert_eq!(count(&conn), Ok(if end == "COMMIT" { 2 } else { 1 }));
                rig.check_record("L7", true);
            }
        }
    });
}

/// L7 with a reader in the way instead of a fault: the real VFS goes to PENDING, and the gate stays.
#[test]
fn l7_pending() {
    alone(|| {
        let (rig, writer) = Rig::with_table(SHIM, "DELETE");
        let reader = rig.open().unwrap();
        reader.execute_batch("BEGIN; SELECT * FROM task").unwrap();
        writer.execute_batch("BEGIN IMMEDIATE").unwrap();
        writer.execute_batch(INSERT).unwrap();
        assert_eq!(code(writer.execute_batch("COMMIT")), ffi::SQLITE_BUSY);
        assert_eq!((rig.gate(), rig.faults.level(&rig.path)), (Gate::Held, LockKind::Pending));
        reader.execute_batch("COMMIT").unwrap();
        writer.execute_batch("COMMIT").unwrap();
        assert_eq!((rig.gate(), count(&reader)), (Gate::Free, Ok(2)));
        rig.check_record("L7", true);
    });
}

/// L7w: where there is a `-shm` file, the holder of SHARED may be a WAL connection that waits for the gate
/// and never lets go of SHARED. The writer at PENDING lends it the gate, and must win it back before the next
/// EXCLUSIVE: refused, the real VFS hears nothing of it.
#[test]
fn l7w_lent() {
    alone(|| {
        for end in ["ROLLBACK", "COMMIT"] {
            let (rig, writer) = Rig::with_table(SHIM, "DELETE");
            let shm = rig.path.with_extension("db-shm");
            fs::write(&shm, "").unwrap();
            let reader = rig.open().unwrap();
            reader.execute_batch("BEGIN; SELECT * FROM task").unwrap();
            writer.execute_batch("BEGIN IMMEDIATE").unwrap();
            writer.execute_batch(INSERT).unwrap();
            assert_eq!(rig.gate(), Gate::Held);
            assert_eq!(code(writer.execute_batch("COMMIT")), ffi::SQLITE_BUSY);
            assert_eq!((rig.gate(), rig.faults.level(&rig.path)), (Gate::Free, LockKind::Pending));

            let borrower = rig.outside_flock();
            rig.faults.clear();
            assert_eq!(code(writer.execute_batch("COMMIT")), ffi::SQLITE_BUSY);
            assert_eq!(writes(&rig), [""; 0], "EXCLUSIVE without the gate");
            if end == "ROLLBACK" {
                writer.execute_batch("ROLLBACK").unwrap();
                assert!(rig.gate().is_held(), "it has released what it had lent");
            }
            drop(borrower);

            reader.execute_batch("COMMIT").unwrap();
            if end == "COMMIT" {
                writer.execute_batch("COMMIT").unwrap();
            }
            assert_eq!((rig.gate(), count(&reader)), (Gate::Free, Ok(if end == "COMMIT" { 2 } else { 1 })));
            fs::remove_file(&shm).unwrap();
        }
    });
}

/// L11: xUnlock reports an error. Whether the gate may go depends on what the real VFS still holds.
#[test]
fn l11_failed_unlock() {
    alone(|| {
        let unlock = || Fault::new(Method::Unlock, Error::Io).persistent();
        let lock_state = || Fault::new(Method::LockState, Error::Io).persistent();
        // The faults; what the real VFS holds afterwards; the gate.
        let cases: [(&[Fault], LockKind, Gate); 4] = [
            (&[unlock()], LockKind::Exclusive, Gate::Held),
            (&[unlock().after()], LockKind::None, Gate::Free),
            (&[unlock(), lock_state()], LockKind::Exclusive, Gate::Held),
            // Nobody can tell what is held, so the gate stays.
            (&[unlock().after(), lock_state()], LockKind::None, Gate::Held),
        ];
        for (faults, level, gate) in cases {
            for is_closed in [false, true] {
                let what = format!("{faults:?}");
                let (rig, conn) = Rig::with_table(SHIM, "DELETE");
                let hits: Vec<_> = faults.iter().map(|fault| rig.faults.arm(fault.clone())).collect();
                assert_eq!(code(conn.execute_batch(INSERT)), ffi::SQLITE_IOERR_UNLOCK, "{what}");
                assert!(hits.iter().all(|hits| hits.count() > 0), "{what}");
                assert!(rig.faults.calls(Method::LockState) > 0, "LOCKSTATE was not asked");
                assert_eq!((rig.faults.level(&rig.path), rig.gate()), (level, gate), "{what}");

                if is_closed {
                    drop(conn); // with the faults
                    assert_eq!(rig.gate(), Gate::Free, "C1, {what}");
                    continue;
                }
                rig.faults.disarm();
                assert_eq!(count(&conn), Ok(2), "{what}");
                assert_eq!((rig.faults.level(&rig.path), rig.gate()), (LockKind::None, Gate::Free), "{what}");
                conn.execute_batch(INSERT).unwrap();
                assert_eq!(rig.gate(), Gate::Free, "{what}");
            }
        }
    });
}

/// S6: WRITE cannot be unlocked. SQLite does not even look at the answer, but the real VFS still holds the
/// slot, so the gate stays until xShmUnmap and xClose.
#[test]
fn s6_failed_unlock_of_write() {
    alone(|| {
        let (rig, conn) = Rig::with_table(SHIM, "WAL");
        let hits = rig.faults.arm(Fault::new(Method::ShmUnlock, Error::Io).slot(WRITE));
        conn.execute_batch(INSERT).unwrap();
        assert_eq!(hits.count(), 1);
        assert!(rig.faults.holder(&rig.path, WRITE).is_some());
        assert_eq!(rig.gate(), Gate::Held);
        assert_eq!(count(&conn), Ok(2));
        drop(conn);
        assert_eq!(rig.gate(), Gate::Free);
        assert_eq!(rig.audit().rows.len(), 2);
    });
}

/// S7: xShmUnmap drops every slot, also one that could not be unlocked. Seen where the connection lives on:
/// it leaves WAL mode.
#[test]
fn s7_unmap_drops_slots() {
    alone(|| {
        let (rig, conn) = Rig::with_table(SHIM, "WAL");
        let hits = rig.faults.arm(Fault::new(Method::ShmUnlock, Error::Io).slot(WRITE));
        conn.execute_batch(INSERT).unwrap();
        assert_eq!((hits.count(), rig.gate()), (1, Gate::Held));
        conn.execute_batch("PRAGMA journal_mode=DELETE").unwrap();
        assert_eq!(rig.faults.calls(Method::ShmUnmap), 1, "still in WAL mode");
        assert_eq!(rig.gate(), Gate::Free);
        conn.execute_batch(INSERT).unwrap();
        assert_eq!((rig.gate(), count(&conn)), (Gate::Free, Ok(3)));
    });
}

/// S5: a reader who rebuilds the WAL-index takes WRITE, CKPT and RECOVER, and writes nothing that the gate
/// protects: a SELECT does not wait for a writer.
#[test]
fn s5_recovery_is_not_gated() {
    alone(|| {
        let (rig, conn) = Rig::with_table(SHIM, "WAL");
        crash(&rig, conn);
        let outside = rig.outside_flock();
        let conn = rig.open().unwrap();
        assert_eq!(count(&conn), Ok(1));
        assert!(rig.faults.locks().iter().any(|lock| lock.contains("RECOVER")), "no recovery");
        drop(outside);

        // Nor is it gated when it fails.
        drop(conn);
        let (rig, conn) = Rig::with_table(SHIM, "WAL");
        crash(&rig, conn);
        let conn = rig.open().unwrap();
        let hits = rig.faults.arm(Fault::new(Method::ShmLock, Error::Io).slot(WRITE + 2));
        assert_eq!((code(count(&conn)), hits.count()), (ffi::SQLITE_IOERR_SHMLOCK, 1));
        assert_eq!(rig.gate(), Gate::Free);
        let asked = rig.faults.events().into_iter().filter(|event| event.call.slots.contains(&WRITE));
        assert!(asked.map(|event| event.gate).all(|gate| gate == Some(Gate::Free)));
        assert_eq!(count(&conn), Ok(1));
    });
}

/// G1–G4: a WAL restart wins CKPT on the real file first, and gives it back. That CKPT is refused is no
/// error: SQLite appends.
#[test]
fn g_reset_guard() {
    const CKPT_OK: &str = "xShmLock CKPT EXCLUSIVE -> OK";
    const CKPT_BUSY: &str = "xShmLock CKPT EXCLUSIVE -> BUSY";
    const CKPT_UNLOCK: &str = "xShmLock CKPT UNLOCK -> OK";
    const RESET: &str = "xShmLock READ(1)+READ(2)+READ(3)+READ(4)";
    let reset = |what: &str| format!("{RESET} {what}");
    let ckpt = |error| Fault::new(Method::ShmLock, error).slot(CKPT);
    let readers = |error| Fault::new(Method::ShmLock, error).slot(READ_4);
    let cases = [
        (
            "G3, G4",
            None,
            0,
            vec![CKPT_OK.into(), reset("EXCLUSIVE -> OK"), reset("UNLOCK -> OK"), CKPT_UNLOCK.into()],
        ),
        ("G1 refused", Some(ckpt(Error::Busy)), 0, vec![CKPT_BUSY.to_owned()]),
        (
            "G1 failed",
            Some(ckpt(Error::Io)),
            ffi::SQLITE_IOERR_SHMLOCK,
            vec!["xShmLock CKPT EXCLUSIVE -> IOERR".to_owned()],
        ),
        (
            "G2 refused",
            Some(readers(Error::Busy)),
            0,
            vec![CKPT_OK.into(), reset("EXCLUSIVE -> BUSY"), CKPT_UNLOCK.into()],
        ),
        (
            "G2 failed",
            Some(readers(Error::Io)),
            ffi::SQLITE_IOERR_SHMLOCK,
            vec![CKPT_OK.into(), reset("EXCLUSIVE -> IOERR"), CKPT_UNLOCK.into()],
        ),
    ];
    alone(|| {
        for (row, fault, expected, calls) in cases {
            let (rig, conn) = Rig::with_table(SHIM, "WAL");
            conn.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
            rig.faults.clear();
            let hits = fault.map(|fault| rig.faults.arm(fault));
            assert_eq!(code(conn.execute_batch(INSERT)), expected, "{row}");
            assert!(hits.is_none_or(|hits| hits.count() == 1), "{row}");
            let locks = rig.faults.locks();
            let guard: Vec<_> =
                locks.iter().filter(|lock| lock.contains("CKPT") || lock.contains(RESET)).collect();
            assert_eq!(guard, calls.iter().collect::<Vec<_>>(), "{row}");
            assert_eq!((rig.gate(), rig.faults.holder(&rig.path, CKPT)), (Gate::Free, None), "{row}");

            conn.execute_batch(INSERT).unwrap();
            conn.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
            assert_eq!(count(&conn), Ok(if expected == 0 { 3 } else { 2 }), "{row}");
            rig.check_record(row, true);
            drop(conn);
            assert_eq!(rig.audit().integrity, "ok", "{row}");
        }

        // G4: CKPT cannot be given back. Nobody checkpoints any more; everything else goes on.
        let (rig, conn) = Rig::with_table(SHIM, "WAL");
        conn.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
        let hits = rig.faults.arm(Fault::new(Method::ShmUnlock, Error::Io).slot(CKPT));
        conn.execute_batch(INSERT).unwrap();
        assert_eq!((hits.count(), rig.gate()), (1, Gate::Free));
        let busy = conn.query_row("PRAGMA wal_checkpoint", [], |row| row.get(0));
        assert_eq!(busy, Ok(1));
        conn.execute_batch(INSERT).unwrap();
        drop(conn);
        assert_eq!((rig.gate(), rig.audit().rows.len()), (Gate::Free, 3));
    });
}

/// K1, K2: under `kanbanlock_checkpoint=gate` CKPT, too, comes after the gate, and goes back with it.
#[test]
fn k_gated_checkpoint() {
    alone(|| {
        for (error, expected) in [(Error::Busy, Ok(1)), (Error::Io, Err(ffi::SQLITE_IOERR_SHMLOCK))] {
            let (rig, conn) = Rig::with_table(SHIM_GATED, "WAL");
            let checkpoint = || conn.query_row("PRAGMA wal_checkpoint", [], |row| row.get::<_, i64>(0));

            let outside = rig.outside_flock();
            assert_eq!(checkpoint(), Ok(1), "K1 refused");
            assert_eq!(rig.faults.calls(Method::ShmLock), 0, "K1 refused: {:#?}", rig.faults.locks());
            drop(outside);

            let hits = rig.faults.arm(Fault::new(Method::ShmLock, error).slot(CKPT));
            assert_eq!(checkpoint().map_err(|error| code::<()>(Err(error))), expected, "K2");
            assert_eq!((hits.count(), rig.gate()), (1, Gate::Free), "K2");

            assert_eq!((checkpoint(), rig.gate()), (Ok(0), Gate::Free), "K1");
            rig.check_record("K", true);
        }
    });
}

/// fsync fails at COMMIT: the transaction is gone, and so is the gate.
#[test]
fn failed_sync_at_commit() {
    alone(|| {
        for (mode, file) in
            [("DELETE", OpenKind::MainJournal), ("DELETE", OpenKind::MainDb), ("WAL", OpenKind::Wal)]
        {
            let (rig, conn) = Rig::with_table(SHIM, mode);
            conn.execute_batch("PRAGMA synchronous=FULL; BEGIN IMMEDIATE").unwrap();
            conn.execute_batch(INSERT).unwrap();
            assert_eq!(rig.gate(), Gate::Held);
            let hits = rig.faults.arm(Fault::new(Method::Sync, Error::Io).on(file).persistent());
            assert_eq!(code(conn.execute_batch("COMMIT")), ffi::SQLITE_IOERR_FSYNC, "{file:?}");
            assert!(hits.count() > 0, "{file:?}");
            rig.faults.disarm();
            if !conn.is_autocommit() {
                conn.execute_batch("ROLLBACK").unwrap();
            }
            assert_eq!((rig.gate(), count(&conn)), (Gate::Free, Ok(1)), "{file:?}");
            conn.execute_batch(INSERT).unwrap();
            assert_eq!((rig.gate(), count(&conn)), (Gate::Free, Ok(2)), "{file:?}");
            rig.check_record("fsync", true);
            drop(conn);
            assert_eq!(rig.audit().rows.len(), 2, "{file:?}");
        }
    });
}

/// C1: the connection is closed in the midst of a transaction, and everything fails that can.
#[test]
fn c1_close_with_faults() {
    alone(|| {
        for mode in BOTH {
            let (rig, conn) = Rig::with_table(SHIM, mode);
            conn.execute_batch("BEGIN IMMEDIATE").unwrap();
            conn.execute_batch(INSERT).unwrap();
            assert_eq!(rig.gate(), Gate::Held);
            for method in Method::ALL.into_iter().filter(|method| method.errors().contains(&Error::Io)) {
                rig.faults.arm(Fault::new(method, Error::Io).persistent());
            }
            drop(conn);
            // In DELETE mode, what xUnlock could not unlock is given up with the real file, and only then the
            // gate. In WAL mode xShmUnmap has given it up before.
            let closed = rig.faults.events().into_iter().rfind(|event| event.call.method == Method::Close);
            let gate = if mode == "DELETE" { Gate::Held } else { Gate::Free };
            assert_eq!(closed.and_then(|event| event.gate), Some(gate), "{mode}");
            assert_eq!((rig.gate(), rig.faults.open_handles(&rig.path)), (Gate::Free, 0), "{mode}");
            rig.faults.disarm();
            let conn = rig.open().unwrap();
            conn.execute_batch(INSERT).unwrap();
            assert_eq!((count(&conn), rig.gate()), (Ok(2), Gate::Free), "{mode}");
        }
    });
}

/// A file that xOpen reports READONLY has no gate, and no lock file is made for it: not for a write that
/// SQLite itself refuses, and not for the EXCLUSIVE that a WAL connection asks for in xClose.
#[test]
fn read_only_has_no_gate() {
    alone(|| {
        for mode in BOTH {
            let (rig, conn) = Rig::with_table(REAL, mode);
            drop(conn);
            let rig = Rig { vfs: SHIM, ..rig };
            rig.faults.clear();
            let denied = rig.faults.arm(Fault::new(Method::Open, Error::Denied).on(OpenKind::MainDb));
            let conn = rig.open().unwrap();
            assert_eq!((count(&conn), denied.count()), (Ok(1), 1), "{mode}");
            assert_eq!(code(conn.execute_batch(INSERT)), ffi::SQLITE_READONLY, "{mode}");
            drop(conn);
            let asked = rig.faults.locks().contains(&"xLock EXCLUSIVE -> OK".to_owned());
            assert_eq!(asked, mode == "WAL", "{:#?}", rig.faults.locks());
            assert_eq!(rig.gate(), Gate::Absent, "{mode}");
        }
    });
}

/// One transaction over two databases: two gates, and a super-journal between them. Whatever fails, both
/// gates are free afterwards, and the transaction is in both databases or in neither.
#[test]
fn sweep_super_journal() {
    alone(|| {
        for (method, error) in [
            (Method::Open, Error::Io),
            (Method::Delete, Error::Io),
            (Method::Access, Error::Io),
            (Method::Read, Error::Io),
            (Method::Write, Error::Full),
            (Method::Sync, Error::Io),
            (Method::Lock, Error::Busy),
            (Method::Lock, Error::Io),
            (Method::Unlock, Error::Io),
        ] {
            let mut struck = 0;
            for n in 1.. {
                let (rig, conn) = Rig::with_table(SHIM, "DELETE");
                let fault = Fault::new(method, error).nth(n);
                let what = format!("super-journal, {fault}");
                let other = rig.path.with_file_name("other.db");
                conn.execute("ATTACH ?1 AS other", [other.to_str().unwrap()]).unwrap();
                conn.execute_batch("CREATE TABLE other.task(id INTEGER PRIMARY KEY, note)").unwrap();
                conn.execute_batch("INSERT INTO other.task(id, note) VALUES(1, '')").unwrap();
                rig.faults.clear();

                let hits = rig.faults.arm(fault);
                let mut committed = false;
                if conn.execute_batch("BEGIN IMMEDIATE").is_ok() {
                    let both = [INSERT, "INSERT INTO other.task(note) VALUES('row')"];
                    committed = both.iter().all(|sql| conn.execute_batch(sql).is_ok())
                        && conn.execute_batch("COMMIT").is_ok();
                }
                if !conn.is_autocommit() {
                    conn.execute_batch("ROLLBACK").unwrap();
                }
                rig.faults.disarm();
                for db in [&rig.path, &other] {
                    let reason = rig.faults.level(db) > LockKind::Shared;
                    assert_eq!(Gate::of(db).is_held(), reason, "{what}: {}", db.display());
                    assert!(!reason || method == Method::Unlock, "{what}: {}", db.display());
                }
                rig.check_record(&what, true);
                drop(conn);

                let rows = [&rig.path, &other].map(|db| {
                    assert!(!Gate::of(db).is_held(), "{what}: {}", db.display());
                    let conn = rig.open_path(db).unwrap();
                    count(&conn).unwrap()
                });
                assert_eq!(rows[0], rows[1], "{what}: half a transaction");
                assert!(!committed || rows[0] == 2, "{what}: acknowledged, but not there");
                if hits.count() == 0 {
                    assert!(committed, "{what}");
                    break;
                }
                struck += 1;
            }
            assert!(struck > 0, "super-journal, {}: never fired", Fault::new(method, error));
            println!(
                "super-journal  DELETE {struck:4} runs with a fault that fired: {} and following",
                Fault::new(method, error)
            );
        }
    });
}
