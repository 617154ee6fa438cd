//! # The system calls fail
//!
//! `faults.rs` makes the *methods* of the real VFS fail. Here SQLite's own unix VFS is the real one, and the system calls
//! that it makes fail under it: EIO, a full disk, no descriptors left, interrupted calls, short reads and writes, lock calls
//! refused for odd reasons. So do kanbanlock's own calls.
//!
//! **A sweep** runs a script with the 1st, the 2nd, the 3rd … call of one kind failing, until the script has no such call any
//! more: first on stock SQLite, before kanbanlock is registered in the process, then through kanbanlock. For each run:
//!
//! - after each statement the gate is held exactly while a write transaction is open;
//! - afterwards it is free, no descriptor is open that was not before, and no lock is left on any of its files;
//! - a new connection's transaction succeeds, integrity_check says `ok`, every acknowledged transaction is there, none is
//!   that was rolled back, and one whose COMMIT failed is whole or absent;
//! - SQLite answered each statement, and has the rows in the end, as on stock when *the same* call failed: the n-th one of
//!   that description in that statement ([`syscalls::Struck`]). Where it may differ, the reason is written in
//!   [`is_reset_guards`].
//!
//! The scripts: a life from open to last close in each journal mode, the rollback of a hot journal, the recovery of a WAL,
//! changes of the journal mode, and one for what the others do not call.

#[path = "support/syscall_runs.rs"]
mod runs;
mod support;
#[path = "support/syscall_faults.rs"]
mod syscalls;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_int;
use std::path::Path;

use libc::{EACCES, EAGAIN, EDQUOT, EINTR, EIO, EMFILE, ENOLCK, ENOMEM, ENOSPC, EPERM};
use runs::{Limit, Outcome, SHIM, STOCK, faultless, is_root, run, scripts};
use rusqlite::ffi;
use support::{TestDb, in_own_process, log};
use syscalls::{Call, Effect, Fault, Lasts, Struck};

// -----------------------------------------------------------------------------------------------------------
// A sweep
// -----------------------------------------------------------------------------------------------------------

/// Where ours lie: kanbanlock's hooks call them, or they call kanbanlock's hooks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Position {
    Under,
    Over,
}

/// Stock first, then kanbanlock. Must be alone in its process.
fn stock_then_shim<T>(position: Position, mut phase: impl FnMut(&'static str) -> T) -> [T; 2] {
    log::install();
    let memory = Path::new("/dev/shm"); // where there is one: quicker, and nothing here is about disks
    if memory.is_dir() {
        tempfile::env::override_temp_dir(memory).unwrap();
    }
    scripts();
    syscalls::install();
    let stock = phase(STOCK);
    if position == Position::Over {
        syscalls::uninstall();
    }
    kanbanlock::register().unwrap();
    if position == Position::Over {
        syscalls::install();
    }
    let shim = phase(SHIM);
    [stock, shim]
}

struct Sweep {
    call: Call,
    effects: &'static [Effect],
    /// Calls by their description.
    aim: fn(&str) -> bool,
    /// At least so many runs on stock had a fault that fired.
    at_least: usize,
}

const ANY: fn(&str) -> bool = |_| true;
/// All but unlocks of `-shm` where SQLite was compiled with SQLITE_DEBUG: the next lock of that slot by that connection then
/// finds it held, which is SQLITE_BUSY, or a failed assertion (`unixShmLock`).
const LOCKS: fn(&str) -> bool = |call| {
    // SAFETY: a NUL-terminated name.
    let asserts = unsafe { ffi::sqlite3_compileoption_used(c"DEBUG".as_ptr()) } != 0;
    !(asserts && call.contains("unlock") && call.ends_with("-shm"))
};

/// All runs of one phase in which the fault fired.
type Runs = BTreeMap<(&'static str, String, Struck), Outcome>;

impl Sweep {
    fn phase(&self, vfs: &'static str) -> Runs {
        let mut runs = Runs::new();
        for script in scripts() {
            let faultless = faultless(script, vfs);
            for &effect in self.effects {
                for &lasts in durations(effect) {
                    for nth in 1.. {
                        let fault = Fault { call: self.call, effect, lasts, nth, aim: self.aim };
                        let (Some(struck), outcome) = run(script, vfs, Some(fault), Limit::None) else {
                            break;
                        };
                        if is_unnoticed(self.call, effect) {
                            assert_eq!(outcome, faultless, "{vfs}, {}, {fault:?}: noticed", script.name);
                        }
                        let is_new =
                            runs.insert((script.name, format!("{effect:?}, {lasts:?}"), struck), outcome);
                        assert_eq!(is_new, None, "two runs, and the same call struck");
                    }
                }
            }
        }
        runs
    }

    fn run(&self, position: Position) {
        let [stock, shim] = stock_then_shim(position, |vfs| self.phase(vfs));
        let keys: BTreeSet<_> = stock.keys().chain(shim.keys()).collect();
        let differ = keys.iter().filter(|key| shim.get(**key) != stock.get(**key));
        let (excused, differences): (Vec<_>, Vec<_>) =
            differ.partition(|key| is_our_own_call(stock.get(**key), shim.get(**key), &key.2));
        let show =
            |key| format!("{key:?}\n    kanbanlock {:?}\n    stock      {:?}", shim.get(key), stock.get(key));
        let differences: Vec<_> = differences.into_iter().map(show).collect();
        assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
        let at_least = if self.call == Call::Fchown && !is_root() { 0 } else { self.at_least };
        assert!(stock.len() >= at_least, "{:?}: fired in {} runs only", self.call, stock.len());
        println!(
            "{:?}: fired in {} runs on stock, {} through kanbanlock; {} differ for a written reason",
            self.call,
            stock.len(),
            shim.len(),
            excused.len()
        );
    }
}

/// Calls that kanbanlock has the unix VFS make where stock makes none:
///
/// - the reset guard (rows G1 and G4) locks and unlocks CKPT around a restart of the WAL. If one of them fails the WAL is
///   not restarted, or nobody checkpoints until the close;
/// - before EXCLUSIVE it asks who uses the `-shm` (row L12). If that fails it goes on as SQLite before 3.51;
/// - at each open it asks whether the database has moved (row M1). If that fails the database is not opened, and the next
///   calls of that statement have other numbers.
fn is_our_own_call(stock: Option<&Outcome>, shim: Option<&Outcome>, struck: &Struck) -> bool {
    let is_extra = |calls: &[&str]| stock.is_none() && calls.contains(&&*struck.call);
    let opens = |statement: &str| matches!(statement, "open" | "reader");
    let is_not_opened = |outcome: &Outcome| {
        outcome.answers.iter().any(|(statement, code, _)| opens(statement) && *code == ffi::SQLITE_CANTOPEN)
    };
    let is_opening = |outcome: &Outcome| {
        struck
            .statement
            .checked_sub(1)
            .and_then(|at| outcome.answers.get(at))
            .is_some_and(|(statement, ..)| opens(statement))
    };
    let is_look_at_open = struck.call.starts_with("stat kanban.db") && shim.is_some_and(is_not_opened)
        || struck.call == "stat kanban.db" && shim.or(stock).is_some_and(is_opening);
    is_look_at_open
        || is_extra(&[
            "F_SETLK write 121+1 kanban.db-shm",
            "F_SETLK unlock 121+1 kanban.db-shm",
            "F_GETLK write 128+1 kanban.db-shm",
        ])
}

fn durations(effect: Effect) -> &'static [Lasts] {
    match effect {
        // Tried again at once: for good would be without end.
        Effect::Error(EINTR) => &[Lasts::Thrice],
        // For os_unix, twins of EAGAIN and EIO.
        Effect::Error(EACCES | ENOLCK | EDQUOT) | Effect::Short => &[Lasts::Once],
        _ => &[Lasts::Once, Lasts::ForGood],
    }
}

/// What os_unix hides from everybody.
fn is_unnoticed(call: Call, effect: Effect) -> bool {
    matches!(call, Call::Close | Call::Munmap | Call::Fchmod | Call::Fchown | Call::OpenDirectory)
        || effect == Effect::Short
        || effect == Effect::Error(EINTR)
            && matches!(call, Call::Open | Call::Read | Call::Write | Call::Ftruncate)
}

/// One #[test] for each kind of call.
macro_rules! sweeps {
    ($($name:ident: $call:ident, $position:ident, $at_least:literal, [$($effect:expr),*], $aim:expr;)*) => {
        /// Every kind of call that is swept.
        const SWEPT: &[Call] = &[$(Call::$call),*];

        $(#[test]
        fn $name() {
            in_own_process(stringify!($name), || {
                const EFFECTS: &[Effect] = &[$($effect),*];
                Sweep { call: Call::$call, effects: EFFECTS, aim: $aim, at_least: $at_least }.run(Position::$position);
            });
        })*
    };
}

const fn e(errno: c_int) -> Effect {
    Effect::Error(errno)
}

const fn done_but(errno: c_int) -> Effect {
    Effect::DoneButError(errno)
}

sweeps! {
    sweep_open: Open, Under, 500, [e(EMFILE), e(EIO), e(ENOSPC), e(EACCES), e(EINTR)], ANY;
    sweep_open_over: Open, Over, 200, [e(EMFILE), e(EINTR)], ANY;
    sweep_close: Close, Under, 250, [done_but(EIO), done_but(EINTR)], ANY;
    sweep_close_over: Close, Over, 120, [done_but(EIO)], ANY;
    sweep_fcntl: Fcntl, Under, 2200, [e(EAGAIN), e(EACCES), e(ENOLCK), e(EIO), e(EINTR)], LOCKS;
    sweep_fcntl_over: Fcntl, Over, 1200, [e(EAGAIN), e(EIO)], LOCKS;
    sweep_read: Read, Under, 900, [e(EIO), e(EINTR), Effect::Short], ANY;
    sweep_write: Write, Under, 3000, [e(EIO), e(ENOSPC), e(EDQUOT), e(EINTR), Effect::Short], ANY;
    sweep_ftruncate: Ftruncate, Under, 90, [e(EIO), e(ENOSPC), e(EINTR)], ANY;
    sweep_fsync: Fsync, Under, 650, [e(EIO), e(ENOSPC), e(EDQUOT)], ANY;
    sweep_unlink: Unlink, Under, 50, [e(EIO), e(EACCES)], ANY;
    sweep_open_directory: OpenDirectory, Under, 40, [e(EMFILE)], ANY;
    sweep_access: Access, Under, 4, [e(EIO), e(EACCES)], ANY;
    sweep_stat: Stat, Under, 400, [e(EIO), e(EACCES)], ANY;
    sweep_fstat: Fstat, Under, 250, [e(EIO)], ANY;
    sweep_lstat: Lstat, Under, 100, [e(EIO), e(EACCES)], ANY;
    sweep_readlink: Readlink, Under, 2, [e(EIO)], ANY;
    sweep_getcwd: Getcwd, Under, 1, [e(EACCES)], ANY;
    sweep_fchmod: Fchmod, Under, 4, [e(EPERM)], ANY;
    sweep_fchown: Fchown, Under, 60, [e(EPERM)], ANY;
    sweep_mmap: Mmap, Under, 8, [e(ENOMEM)], ANY;
    sweep_mremap: Mremap, Under, 3, [e(ENOMEM)], ANY;
    sweep_munmap: Munmap, Under, 8, [done_but(ENOMEM)], ANY;
}

/// No call of the table is forgotten.
#[test]
fn sweeps_are_complete() {
    let unswept: Vec<_> = syscalls::table_of_this_build()
        .into_iter()
        .filter_map(|(name, call)| match call {
            Some(call) if SWEPT.contains(&call) => None,
            _ => Some(name),
        })
        .collect();
    // mkdir and rmdir: VFS unix-dotfile only, which kanbanlock does not wrap. geteuid, getpagesize: cannot fail.
    assert_eq!(unswept, ["mkdir", "rmdir", "geteuid", "getpagesize"]);
}

/// Somebody resets the whole table, kanbanlock's hooks included, in the midst of a transaction. Its locks then belong to a
/// description that nobody unlocks any more: all are refused until the process ends (HAZARDS.md), and nobody writes
/// without a lock.
#[test]
fn a_reset_table_refuses_everybody() {
    in_own_process("a_reset_table_refuses_everybody", || {
        kanbanlock::register().unwrap();
        let db = TestDb::new();
        let conn = db.open(SHIM);
        conn.execute_batch("CREATE TABLE t (x); BEGIN IMMEDIATE; INSERT INTO t VALUES (1)").unwrap();
        syscalls::reset_table();
        assert_eq!(support::code(conn.execute_batch("COMMIT")), ffi::SQLITE_BUSY);
        drop(conn);
        for vfs in [SHIM, STOCK] {
            let refused = support::code(db.open(vfs).execute_batch("INSERT INTO t VALUES (2)"));
            assert_eq!(refused, ffi::SQLITE_BUSY, "{vfs}");
        }
    });
}

// -----------------------------------------------------------------------------------------------------------
// kanbanlock's own calls
// -----------------------------------------------------------------------------------------------------------

/// The lock file.
const LOCK_FILE: fn(&str) -> bool = |call| call.ends_with(".lock") || call.contains(".lock ");
/// A database or `-shm`, opened again for its canonical description.
const AGAIN: fn(&str) -> bool = |call| call.contains(" again ");
/// Descriptors of a database or `-shm`, and their canonical descriptions.
const NOT_LOCK_FILE: fn(&str) -> bool = |call| !call.contains(".lock");

/// Each call of kanbanlock's own fails: `codes` are the errors that SQLite answers. None: nobody notices.
struct Own {
    call: Call,
    effect: Effect,
    aim: fn(&str) -> bool,
    codes: &'static [c_int],
    at_least: usize,
}

impl Own {
    fn sweep(&self) {
        let &Own { call, effect, aim, .. } = self;
        let (mut fired, mut codes) = (0, BTreeSet::new());
        for script in scripts() {
            let faultless = faultless(script, SHIM);
            for &lasts in durations(effect) {
                for nth in 1.. {
                    let fault = Fault { call, effect, lasts, nth, aim };
                    let (Some(struck), outcome) = run(script, SHIM, Some(fault), Limit::None) else { break };
                    let what = format!("{}, {fault:?}, first {struck:?}: {outcome:?}", script.name);
                    if self.codes.is_empty() {
                        assert_eq!(outcome, faultless, "noticed: {what}");
                    }
                    assert!(outcome.errors().iter().all(|code| self.codes.contains(code)), "{what}");
                    codes.extend(outcome.errors());
                    fired += 1;
                }
            }
        }
        println!("{call:?} {effect:?}: fired in {fired} runs, answered {codes:?}");
        assert_eq!(
            codes,
            self.codes.iter().copied().collect(),
            "{call:?} {effect:?}: some code was not seen"
        );
        assert!(fired >= self.at_least, "{call:?} {effect:?}: fired in {fired} runs only");
    }
}

fn own(name: &str, sweeps: &[Own]) {
    in_own_process(name, || {
        stock_then_shim(Position::Over, |vfs| {
            if vfs == SHIM {
                sweeps.iter().for_each(Own::sweep);
            }
        });
        let wrong = log::lines_with("deleted or replaced");
        assert_eq!(wrong.first(), None, "no lock file was");
    });
}

#[test]
fn the_lock_file_cannot_be_opened() {
    let case = |effect, codes| Own { call: Call::OwnOpen, effect, aim: LOCK_FILE, codes, at_least: 12 };
    own(
        "the_lock_file_cannot_be_opened",
        &[
            case(e(EMFILE), &[ffi::SQLITE_CANTOPEN]),
            case(e(EIO), &[ffi::SQLITE_CANTOPEN]),
            case(e(ENOSPC), &[ffi::SQLITE_FULL]),
            case(e(EDQUOT), &[ffi::SQLITE_FULL]),
            case(e(EACCES), &[ffi::SQLITE_PERM, ffi::SQLITE_READONLY_DIRECTORY]),
            case(e(EINTR), &[]),
        ],
    );
}

#[test]
fn the_lock_file_cannot_be_examined() {
    let case = |call, effect, codes| Own { call, effect, aim: LOCK_FILE, codes, at_least: 12 };
    own(
        "the_lock_file_cannot_be_examined",
        &[
            case(Call::OwnFstat, e(EIO), &[ffi::SQLITE_CANTOPEN]),
            case(Call::OwnLstat, e(EIO), &[ffi::SQLITE_CANTOPEN]),
            // Only where the umask takes bits away, and where the database is another user's.
            Own { at_least: 1, ..case(Call::OwnFchmod, e(EPERM), &[]) },
            Own { at_least: usize::from(is_root()), ..case(Call::OwnFchown, e(EPERM), &[]) },
            Own { aim: NOT_LOCK_FILE, ..case(Call::OwnStat, e(EIO), &[ffi::SQLITE_CANTOPEN]) },
        ],
    );
}

#[test]
fn the_lock_file_cannot_be_locked() {
    const LOCK: fn(&str) -> bool = |call| call.starts_with("flock lock");
    const UNLOCK: fn(&str) -> bool = |call| call.starts_with("flock unlock");
    let case = |effect, aim, codes| Own { call: Call::Flock, effect, aim, codes, at_least: 30 };
    own(
        "the_lock_file_cannot_be_locked",
        &[
            case(e(EAGAIN), LOCK, &[ffi::SQLITE_BUSY]),
            case(e(ENOLCK), LOCK, &[ffi::SQLITE_IOERR_LOCK]),
            case(e(EIO), LOCK, &[ffi::SQLITE_IOERR_LOCK]),
            case(e(EINTR), LOCK, &[]),
            // It is closed then, and that unlocks it.
            case(e(EIO), UNLOCK, &[]),
            case(e(EINTR), UNLOCK, &[]),
        ],
    );
}

/// `kanbanlock_fallback=unlocked` on a file system without flock: what was granted without one is not unlocked, and the log
/// says once that there is none.
#[test]
fn without_flock_there_is_nothing_to_unlock() {
    const TEST: &str = "without_flock_there_is_nothing_to_unlock";
    in_own_process(TEST, || {
        log::install();
        syscalls::install();
        kanbanlock::register().unwrap();
        let db = TestDb::new();
        let connection = db.try_open_uri("vfs=kanbanlock&kanbanlock_fallback=unlocked").unwrap();
        let fault = Fault {
            call: Call::Flock,
            effect: Effect::Error(libc::ENOSYS),
            lasts: Lasts::ForGood,
            nth: 1,
            aim: ANY,
        };
        syscalls::arm(fault);
        connection.execute_batch("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
        assert!(syscalls::has_struck("flock lock"));
        assert!(!syscalls::has_struck("flock unlock"), "there was no flock");
        syscalls::disarm();
        let lines = log::lines_about(&db.lock_file());
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].1.contains("Writing WITHOUT the lock"), "{lines:?}");
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert!(support::is_flocked(&db.lock_file()), "now there is one");
        connection.execute_batch("COMMIT").unwrap();
        assert!(!support::is_flocked(&db.lock_file()));
    });
}

/// Close-proof locks: no canonical description, and the inode stays on POSIX locks. A lock call that cannot even tell
/// which file it is for fails.
#[test]
fn the_canonical_description_cannot_be_had() {
    let case = |call, effect, aim, codes| Own { call, effect, aim, codes, at_least: 10 };
    own(
        "the_canonical_description_cannot_be_had",
        &[
            case(Call::OwnOpen, e(EMFILE), AGAIN, &[]),
            case(Call::OwnOpen, e(EACCES), AGAIN, &[]),
            case(Call::OwnOpen, e(EINTR), AGAIN, &[]),
            case(Call::OwnFstat, e(EIO), NOT_LOCK_FILE, &[ffi::SQLITE_IOERR_LOCK]),
            case(Call::OwnFcntl, e(EIO), NOT_LOCK_FILE, &[ffi::SQLITE_IOERR_LOCK]),
        ],
    );
}

// -----------------------------------------------------------------------------------------------------------
// For real: the process's own limits
// -----------------------------------------------------------------------------------------------------------

/// One descriptor more, until there are enough. kanbanlock needs at most three more than stock: the lock file, and the
/// canonical descriptions of the database and its `-shm`; without the latter two it works too.
#[test]
fn out_of_descriptors() {
    in_own_process("out_of_descriptors", || {
        let [stock, shim] = stock_then_shim(Position::Over, |vfs| {
            let enough = scripts().iter().map(|script| {
                let faultless = faultless(script, vfs);
                let is_enough =
                    |spare: &usize| run(script, vfs, None, Limit::spare_descriptors(*spare)).1 == faultless;
                (0..).find(is_enough).unwrap()
            });
            enough.collect::<Vec<_>>()
        });
        println!("descriptors needed: stock {stock:?}, kanbanlock {shim:?}");
        for (stock, shim) in stock.into_iter().zip(shim) {
            assert!(stock >= 2 && (stock..=stock + 3).contains(&shim), "stock {stock}, kanbanlock {shim}");
        }
    });
}

/// Files may not grow beyond a limit, which does, in odd steps: the answers are stock's at each.
#[test]
fn out_of_space() {
    in_own_process("out_of_space", || {
        // SAFETY: ignoring a signal.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let [stock, shim] = stock_then_shim(Position::Over, |vfs| {
            let outcomes = scripts().iter().map(|script| {
                let faultless = faultless(script, vfs);
                let limits =
                    (0..).step_by(1500).map(|limit| run(script, vfs, None, Limit::FileSize(limit)).1);
                limits.take_while(|outcome| *outcome != faultless).collect::<Vec<_>>()
            });
            outcomes.collect::<Vec<_>>()
        });
        assert_eq!(shim, stock);
        let hindered: Vec<_> = stock.iter().map(Vec::len).collect();
        println!("runs hindered by the limit: {hindered:?}");
        assert!(hindered.iter().all(|runs| *runs > 10));
    });
}
