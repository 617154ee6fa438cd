//! What the integration tests share: a database in a folder of its own, VFS stacks, helper processes.

#![allow(dead_code)] // each test binary uses its own part

pub mod agent;
pub mod events;
pub mod handles;
pub mod killer;
pub mod log;
pub mod raw_file;
pub mod storm;
pub mod system_sqlite;
pub mod tap_vfs;

use std::fs::{File, TryLockError};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kanbanlock::Options;
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

use tap_vfs::{Observer, Tap};

/// A path for a database, in a fresh folder that goes away with this.
pub struct TestDb {
    dir: TempDir,
    path: PathBuf,
}

impl TestDb {
    /// On disk (the system's temporary folder).
    pub fn new() -> TestDb {
        TestDb::new_in(&tempfile::env::temp_dir())
    }

    pub fn new_in(folder: &Path) -> TestDb {
        let dir = tempfile::tempdir_in(folder).unwrap();
        // xFullPathname resolves symbolic links; resolve them here too, so that paths compare equal.
        let path = dir.path().canonicalize().unwrap().join("kanban.db");
        TestDb { dir, path }
    }

    pub fn dir(&self) -> &Path {
        self.path.parent().unwrap()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `<db><suffix>`: `-wal`, `-shm`, `-journal`, `.lock`.
    pub fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(suffix);
        name.into()
    }

    pub fn lock_file(&self) -> PathBuf {
        self.beside(".lock")
    }

    /// A connection through the VFS of that name, by `sqlite3_open_v2`'s zVfs.
    pub fn open(&self, vfs: &str) -> Connection {
        open(&self.path, vfs)
    }

    /// A connection by URI, with further parameters.
    pub fn try_open_uri(&self, parameters: &str) -> rusqlite::Result<Connection> {
        Connection::open(format!("file:{}?{parameters}", self.path.display()))
    }
}

pub fn open(path: &Path, vfs: &str) -> Connection {
    let db = Connection::open_with_flags_and_vfs(path, OpenFlags::default(), vfs).unwrap();
    db.busy_timeout(std::time::Duration::ZERO).unwrap();
    db
}

/// Waits for the kernel's next tick: within one, kanbanlock does not look again whether a lock file is in its place.
pub fn await_tick() {
    let tick = || {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a clock that Linux has, and a place for its answer.
        assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) }, 0);
        (now.tv_sec, now.tv_nsec)
    };
    let before = tick();
    while tick() == before {
        std::hint::spin_loop();
    }
}

/// The lines of `/proc/locks`. Not less than a page at a time: between two read(2) the kernel may skip a lock.
pub fn proc_locks() -> Vec<String> {
    let file = File::open("/proc/locks").unwrap();
    BufReader::with_capacity(1 << 16, file).lines().map(Result::unwrap).collect()
}

/// Held while a child is started, and while a flock is tried: between fork and exec a child shares our descriptors, and
/// with them a flock that we have for an instant. It would refuse the next writer.
pub fn no_fork_meanwhile() -> MutexGuard<'static, ()> {
    static FORKING: Mutex<()> = Mutex::new(());
    FORKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True if somebody holds the flock on this file now (asked through a descriptor of our own).
pub fn is_flocked(path: &Path) -> bool {
    let _no_fork = no_fork_meanwhile();
    match File::open(path).map(|file| file.try_lock()) {
        Ok(Ok(())) => false,
        Ok(Err(TryLockError::WouldBlock)) => true,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        other => panic!("{}: {other:?}", path.display()),
    }
}

/// A journal mode set, and checked: SQLite answers with the mode that it is in.
pub fn set_journal_mode(db: &Connection, mode: &str) {
    let now: String = db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |row| row.get(0)).unwrap();
    assert_eq!(now, mode);
}

/// The result code of a failed statement.
pub fn code(result: rusqlite::Result<impl std::fmt::Debug>) -> std::ffi::c_int {
    match result {
        Err(rusqlite::Error::SqliteFailure(error, _)) => error.extended_code,
        other => panic!("expected a failure, got {other:?}"),
    }
}

/// kanbanlock on a tap on `unix`, both under names of their own.
pub struct Stack {
    /// The VFS to open through.
    pub kanbanlock: &'static str,
    /// The tap beneath it: the real VFS, as kanbanlock sees it.
    pub real: &'static str,
}

impl Stack {
    pub fn new(observer: Arc<dyn Observer>) -> Stack {
        Stack::with(observer, Options::new(), 3)
    }

    /// `interface`: the highest version that the real VFS's files advertise.
    pub fn with(observer: Arc<dyn Observer>, options: Options, interface: std::ffi::c_int) -> Stack {
        let real = unique("tap");
        Tap { interface, ..Tap::new(real, "unix", observer) }.register();
        let kanbanlock = unique("kanbanlock");
        options.name(kanbanlock).real_vfs(real).register().unwrap();
        Stack { kanbanlock, real }
    }
}

const OWN_PROCESS: &str = "KANBANLOCK_TEST_OWN_PROCESS";

/// Runs `body` in a process of its own, for what is the whole process's business: this binary again, with this one
/// test. `test` is the name of the calling test.
pub fn in_own_process(test: &str, body: impl FnOnce()) {
    in_process_of(Command::new(std::env::current_exe().unwrap()), test, body);
}

/// The same, of a process in namespaces of its own: unshare(1) with these arguments. False: not allowed here.
pub fn in_own_namespace(arguments: &[&str], test: &str, body: impl FnOnce()) -> bool {
    let command = unshare(arguments);
    let is_allowed = command.is_some();
    if let Some(mut command) = command {
        command.arg(std::env::current_exe().unwrap());
        in_process_of(command, test, body);
    }
    is_allowed
}

/// unshare(1) with these arguments, to be followed by a command; as another than root in a user namespace besides. `None`:
/// it is not allowed here.
pub fn unshare(arguments: &[&str]) -> Option<Command> {
    let unshare = || {
        let mut command = Command::new("unshare");
        // SAFETY: no arguments, cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(arguments);
        command
    };
    let _fork = no_fork_meanwhile();
    let tried = unshare().args(["--fork", "true"]).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success()).then(unshare)
}

fn in_process_of(mut command: Command, test: &str, body: impl FnOnce()) {
    if std::env::var_os(OWN_PROCESS).is_some() {
        return body();
    }
    command
        .args(["--exact", test, "--nocapture"])
        .env(OWN_PROCESS, "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = {
        let _fork = no_fork_meanwhile();
        command.spawn().unwrap()
    };
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("1 passed"), "no such test: {test}");
    print!("{}", text(&output.stdout)); // counts, for --show-output
}

/// The same in `count` processes, one after the other: for what is a matter of luck, and can be tried once in a process.
pub fn in_own_processes(count: usize, test: &str, body: impl Fn()) {
    let count = if std::env::var_os(OWN_PROCESS).is_some() { 1 } else { count };
    (0..count).for_each(|_| in_own_process(test, &body));
}

/// A VFS name that no other test of this process uses.
pub fn unique(prefix: &str) -> &'static str {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Box::leak(format!("{prefix}-{number}").into_boxed_str())
}
