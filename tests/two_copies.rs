//! Two copies of SQLite in one process, one writing thread each: neither sees the other's locks.
//!
//! It happens without anybody deciding it: a Python program imports `sqlite3`, which loads the system's
//! `libsqlite3.so.0`, and an extension module that was built with a bundled SQLite; both open the same `kanban.db`. A
//! POSIX lock belongs to the *process*, so it never conflicts with one of the same process (fcntl(2)). Within one copy
//! SQLite makes up for that: os_unix keeps a list of inodes. Two copies have a list each. So both get their
//! `BEGIN IMMEDIATE`, both read the counter, and what was acknowledged to one of them has never happened. `PRAGMA
//! integrity_check` says `ok` to that; only an audit of the acknowledged commits finds it.
//!
//! With kanbanlock registered in both copies each lock is an open file description's, and those conflict whoever asks
//! (`src/ofd.rs`); and the gate is one flock for both. Registered in one copy only it protects that copy, and excludes
//! the other one, but cannot save the other's POSIX locks from being cancelled: the last test shows exactly that limit.
//!
//! Locks and registrations belong to the whole process: each scenario has a process of its own.

mod support;

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::fmt;
use std::sync::Barrier;

use kanbanlock::{Options, register_with};
use rusqlite::{Connection, ffi};
use support::agent::{Agent, Task};
use support::system_sqlite::{System, SystemConnection};
use support::{TestDb, in_own_process};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// A connection of either copy.
trait Exec {
    /// The primary result code.
    fn exec(&self, sql: &str) -> c_int;
}

impl Exec for Connection {
    fn exec(&self, sql: &str) -> c_int {
        match self.execute_batch(sql) {
            Ok(()) => ffi::SQLITE_OK,
            Err(error) => error.sqlite_error().map_or(ffi::SQLITE_ERROR, |error| error.extended_code & 0xff),
        }
    }
}

impl Exec for SystemConnection<'_> {
    fn exec(&self, sql: &str) -> c_int {
        self.execute(sql)
    }
}

/// How the two threads' transactions meet.
#[derive(Clone, Copy, Debug)]
enum Schedule {
    /// Both ask for BEGIN IMMEDIATE before either writes, and whoever is in writes before either commits. Who was
    /// refused writes after that.
    Lockstep,
    /// As it comes: each waits for its turn with a busy timeout.
    FreeRunning,
}

/// Transactions of each thread.
const TRANSACTIONS: i64 = 300;

/// Long enough for any turn to come.
const WAIT: &str = "PRAGMA busy_timeout = 60000";

/// What one thread saw.
#[derive(Default)]
struct Account {
    acknowledged: Vec<i64>,
    /// Result codes that were neither SQLITE_OK nor SQLITE_BUSY.
    failures: Vec<c_int>,
}

/// One thread, with a connection of one copy.
struct Client<'a> {
    db: &'a dyn Exec,
    first_id: i64,
    account: Account,
}

impl Client<'_> {
    fn new(db: &dyn Exec, first_id: i64) -> Client<'_> {
        Client { db, first_id, account: Account::default() }
    }

    fn run(mut self, schedule: Schedule, barrier: &Barrier) -> Account {
        // Nothing here is about power loss.
        self.db.exec("PRAGMA synchronous = OFF");
        if matches!(schedule, Schedule::FreeRunning) {
            self.db.exec(WAIT);
        }
        for number in 0..TRANSACTIONS {
            let id = self.first_id + number;
            match schedule {
                Schedule::Lockstep => self.transaction_in_lockstep(id, barrier),
                Schedule::FreeRunning => self.transaction(id),
            }
        }
        self.account
    }

    fn transaction(&mut self, id: i64) {
        if self.begin() && self.write(id) {
            self.commit(id);
        }
    }

    fn transaction_in_lockstep(&mut self, id: i64, barrier: &Barrier) {
        barrier.wait();
        let is_in = self.begin();
        barrier.wait();
        let has_written = is_in && self.write(id);
        barrier.wait();
        if has_written {
            self.commit(id);
        }
        barrier.wait();
        if !is_in {
            // In WAL mode both may have been refused: the one by the other, the other by a snapshot that was stale.
            self.db.exec(WAIT);
            self.transaction(id);
            self.db.exec("PRAGMA busy_timeout = 0");
        }
    }

    fn begin(&mut self) -> bool {
        let code = self.db.exec("BEGIN IMMEDIATE");
        if code != ffi::SQLITE_OK && code != ffi::SQLITE_BUSY {
            self.account.failures.push(code);
        }
        code == ffi::SQLITE_OK
    }

    /// Reads the counter, writes a row that nobody else writes, and the counter.
    fn write(&mut self, id: i64) -> bool {
        let sql = format!("INSERT INTO work SELECT {id}, n FROM counter; UPDATE counter SET n = n + 1");
        self.or_roll_back(&sql)
    }

    fn commit(&mut self, id: i64) {
        if self.or_roll_back("COMMIT") {
            self.account.acknowledged.push(id);
        }
    }

    fn or_roll_back(&mut self, sql: &str) -> bool {
        let code = self.db.exec(sql);
        if code != ffi::SQLITE_OK {
            self.account.failures.push(code);
            self.db.exec("ROLLBACK");
        }
        code == ffi::SQLITE_OK
    }
}

/// What an audit from another process finds.
#[derive(Default)]
struct Audit {
    acknowledged: usize,
    /// Acknowledged commits that are not in the database.
    lost: usize,
    /// What the counter says, against the number of rows.
    counter: String,
    /// `PRAGMA integrity_check`, or why it could not be asked.
    integrity: String,
    failures: Vec<c_int>,
}

impl Audit {
    fn of(db: &TestDb, accounts: [Account; 2]) -> Audit {
        let mut auditor = Agent::stock_with_db(db.path());
        let mut query = |sql: &str| {
            let answer = auditor.ask(&Task::Query(sql.to_owned()));
            answer.unwrap_or_else(|(code, message)| format!("({code}) {message}"))
        };
        let ids = query("SELECT group_concat(id) FROM work");
        let ids: BTreeSet<i64> = ids.split(',').filter_map(|id| id.parse().ok()).collect();
        let mut audit = Audit {
            counter: query("SELECT (SELECT n FROM counter) || ' of ' || (SELECT count(*) FROM work)"),
            integrity: query("SELECT group_concat(integrity_check) FROM pragma_integrity_check"),
            ..Audit::default()
        };
        for account in accounts {
            audit.acknowledged += account.acknowledged.len();
            audit.lost += account.acknowledged.iter().filter(|id| !ids.contains(id)).count();
            audit.failures.extend(account.failures);
        }
        audit
    }

    /// Every transaction was acknowledged and is there.
    fn assert_clean(&self) {
        let all = 2 * usize::try_from(TRANSACTIONS).unwrap();
        assert_eq!(self.acknowledged, all, "{self}");
        assert_eq!((self.lost, self.integrity.as_str()), (0, "ok"), "{self}");
        assert_eq!(self.counter, format!("{all} of {all}"), "{self}");
        assert_eq!(self.failures, [0; 0], "{self}");
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Audit { acknowledged, lost, counter, integrity, failures } = self;
        write!(f, "{acknowledged} acknowledged, {lost} of them lost; counter {counter}; ")?;
        let codes: BTreeSet<&c_int> = failures.iter().collect();
        write!(f, "{} failures {codes:?}; integrity: {integrity}", failures.len())
    }
}

fn uri(db: &TestDb, vfs: &str) -> String {
    format!("file:{}?vfs={vfs}", db.path().display())
}

fn new_database(journal_mode: &str) -> TestDb {
    let db = TestDb::new();
    let mut agent = Agent::stock_with_db(db.path());
    assert_eq!(agent.query(&format!("PRAGMA journal_mode = {journal_mode}")), journal_mode);
    agent
        .execute(
            "CREATE TABLE work (id INTEGER PRIMARY KEY, n); CREATE TABLE counter (n);
             INSERT INTO counter VALUES (0)",
        )
        .unwrap();
    db
}

/// One thread for each copy, all its transactions, then the audit.
fn two_threads(system: &System, vfs: &str, journal_mode: &str, schedule: Schedule) -> Audit {
    let db = new_database(journal_mode);
    let bundled = db.open(vfs);
    let other = SystemConnection::open(system, &uri(&db, vfs));
    let barrier = Barrier::new(2);
    let accounts = std::thread::scope(|scope| {
        // Moved: the connection is closed in its thread, while the other one may still be writing.
        let thread = scope.spawn(|| {
            let bundled = bundled;
            Client::new(&bundled, 1_000).run(schedule, &barrier)
        });
        let ours = Client::new(&other, 2_000).run(schedule, &barrier);
        [thread.join().unwrap(), ours]
    });
    drop(other);
    let audit = Audit::of(&db, accounts);
    println!("{vfs}, {journal_mode}, {schedule:?}: {audit}");
    audit
}

fn register_in_both(system: &System) {
    kanbanlock::register().unwrap();
    // SAFETY: System::api.
    unsafe { register_with(system.api(), &Options::new()) }.unwrap();
}

/// The story, step by step, on stock SQLite: the second COMMIT undoes the first one, which was acknowledged, and
/// integrity_check has nothing to say.
#[test]
fn stock_copies_lose_an_acknowledged_commit() {
    let Some(system) = System::load_or_skip() else { return };
    in_own_process("stock_copies_lose_an_acknowledged_commit", || {
        for journal_mode in ["delete", "wal"] {
            let db = new_database(journal_mode);
            let bundled = db.open("unix");
            let other = SystemConnection::open(&system, &uri(&db, "unix"));
            let clients = [(&bundled as &dyn Exec, 1), (&other, 2)];
            for (copy, _) in clients {
                assert_eq!(copy.exec("BEGIN IMMEDIATE"), ffi::SQLITE_OK, "{journal_mode}: both get it");
            }
            for (copy, id) in clients {
                let sql = format!("INSERT INTO work VALUES ({id}, 0); UPDATE counter SET n = n + 1");
                assert_eq!(copy.exec(&sql), ffi::SQLITE_OK, "{journal_mode}");
            }
            assert_eq!(bundled.exec("COMMIT"), ffi::SQLITE_OK, "{journal_mode}: acknowledged");
            // In WAL mode the second one is acknowledged too. In rollback mode both have used one journal, which is
            // gone by now: an I/O error, and a rollback to what was there before the first.
            let second = other.exec("COMMIT");
            drop(bundled);
            drop(other);
            let mut auditor = Agent::stock_with_db(db.path());
            let ids = auditor.query("SELECT ifnull(group_concat(id), '') FROM work");
            let integrity = auditor.query("PRAGMA integrity_check");
            println!("unix, {journal_mode}: second COMMIT {second}, ids {ids:?}, integrity {integrity}");
            assert!(!ids.split(',').any(|id| id == "1"), "{journal_mode}: acknowledged, and lost: {ids}");
            assert_eq!(integrity, "ok", "{journal_mode}");
        }
    });
}

/// The same by the loop and the audit of the test below: they can fail. (In lockstep: left to themselves two threads
/// need not meet within so few transactions.)
#[test]
fn stock_copies_in_a_loop_lose_commits_or_corrupt_the_database() {
    let Some(system) = System::load_or_skip() else { return };
    in_own_process("stock_copies_in_a_loop_lose_commits_or_corrupt_the_database", || {
        two_threads(&system, "unix", "delete", Schedule::FreeRunning);
        let audit = two_threads(&system, "unix", "delete", Schedule::Lockstep);
        assert!(audit.lost > 0 || audit.integrity != "ok", "{audit}");
    });
}

#[test]
fn with_kanbanlock_in_both_copies_nothing_is_lost() {
    let Some(system) = System::load_or_skip() else { return };
    in_own_process("with_kanbanlock_in_both_copies_nothing_is_lost", || {
        register_in_both(&system);
        // `unix` too: close-proof locks are the whole copy's.
        for vfs in ["kanbanlock", "unix"] {
            for journal_mode in ["delete", "wal"] {
                for schedule in [Schedule::Lockstep, Schedule::FreeRunning] {
                    two_threads(&system, vfs, journal_mode, schedule).assert_clean();
                }
            }
        }
    });
}

/// Registered in the bundled copy only. The two copies exclude each other, since a POSIX lock and an open file
/// description's conflict even within a process, and the registered copy's locks survive whatever the other one closes.
/// The limit: the *stock* copy's locks are still the process's, so any close() in the process cancels them, the
/// registered copy's own included.
#[test]
fn with_kanbanlock_in_one_copy_that_copy_is_protected_and_the_other_is_not() {
    let Some(system) = System::load_or_skip() else { return };
    in_own_process("with_kanbanlock_in_one_copy_that_copy_is_protected_and_the_other_is_not", || {
        kanbanlock::register().unwrap();
        for journal_mode in ["delete", "wal"] {
            let db = new_database(journal_mode);
            let registered = db.open("kanbanlock");
            let stock = SystemConnection::open(&system, &uri(&db, "unix"));
            let mut peer = Agent::stock_with_db(db.path());
            let mut is_kept_out = || match peer.execute("BEGIN IMMEDIATE; ROLLBACK") {
                Ok(_) => false,
                Err((code, _)) if code & 0xff == ffi::SQLITE_BUSY => true,
                Err(other) => panic!("{other:?}"),
            };
            let insert = |id| format!("BEGIN IMMEDIATE; INSERT INTO work VALUES ({id}, 0)");

            // Each keeps the other out.
            assert_eq!(registered.exec(&insert(1)), ffi::SQLITE_OK);
            assert_eq!(stock.exec("BEGIN IMMEDIATE"), ffi::SQLITE_BUSY, "{journal_mode}");
            // What is protected: the registered copy's lock, when the other copy opens and closes the files.
            let visitor = SystemConnection::open(&system, &uri(&db, "unix"));
            assert_eq!(visitor.exec("SELECT * FROM work"), ffi::SQLITE_OK);
            drop(visitor);
            drop(stock);
            assert!(is_kept_out(), "{journal_mode}");
            assert_eq!(registered.exec("COMMIT"), ffi::SQLITE_OK);

            let stock = SystemConnection::open(&system, &uri(&db, "unix"));
            assert_eq!(stock.exec(&insert(2)), ffi::SQLITE_OK);
            assert_eq!(registered.exec("BEGIN IMMEDIATE"), ffi::SQLITE_BUSY, "{journal_mode}");
            assert!(is_kept_out(), "{journal_mode}");
            // What is not: the stock copy's lock, when the registered one closes its connection.
            drop(registered);
            assert!(!is_kept_out(), "{journal_mode}");
        }
    });
}
