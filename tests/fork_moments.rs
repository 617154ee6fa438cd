//! fork(2) at awkward moments: while SQLite's log callback runs, while a VFS is registered, without any registration.
//!
//! Each test runs in a process of its own, which SIGALRM ends if it waits for itself.

mod support;

use std::ffi::c_int;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock};

use kanbanlock::ffi as kanbanlock_ffi;
use kanbanlock::{Hold, HostApi, Options, register_with};
use rusqlite::ffi;
use support::{TestDb, in_own_process, is_flocked};

/// Longer than anything here takes; it only decides how long a deadlock is waited for.
const WATCHDOG: u32 = 60;

fn in_watched_process(test: &str, body: impl FnOnce()) {
    in_own_process(test, || {
        // SAFETY: an integer. The default action of SIGALRM is to end the process: alarm(2), signal(7).
        unsafe { libc::alarm(WATCHDOG) };
        body();
    });
}

/// Forks; the child runs `in_child`, and ends. Answers its wait status.
fn fork_and_wait(in_child: impl FnOnce() -> bool) -> c_int {
    // SAFETY: the child runs `in_child` only, on the one thread that it has, and then _exit(2).
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: "alarms … are not inherited by children created via fork": alarm(2).
        unsafe { libc::alarm(WATCHDOG) };
        let status = c_int::from(!in_child());
        // SAFETY: ends the child without running what is the parent's to run.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: our own child, and a place for its status.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    status
}

/// Makes the hooks log: a connection from before the registration holds a lock on the database, and another locks it.
fn provoke_a_warning(callback: fn(c_int, &str)) {
    // SAFETY: nothing else uses SQLite in this process yet.
    unsafe { rusqlite::trace::config_log(Some(callback)) }.unwrap();
    let db = TestDb::new();
    let before = db.open("unix");
    before.execute_batch("CREATE TABLE t (x); BEGIN; SELECT * FROM t").unwrap();
    kanbanlock::register().unwrap();
    db.open("kanbanlock").execute_batch("BEGIN IMMEDIATE; ROLLBACK").unwrap();
}

fn is_hooks_warning(message: &str) -> bool {
    message.contains("has no close-proof locks")
}

/// The callback holds nothing of ours: the handler that runs before a fork takes our mutexes.
#[test]
fn a_log_callback_may_fork() {
    static STATUS: AtomicI32 = AtomicI32::new(-1);
    fn callback(_code: c_int, message: &str) {
        if is_hooks_warning(message) {
            STATUS.store(fork_and_wait(|| true), Ordering::SeqCst);
        }
    }
    in_watched_process("a_log_callback_may_fork", || {
        provoke_a_warning(callback);
        assert_eq!(STATUS.load(Ordering::SeqCst), 0, "it was called, and its child ended well");
    });
}

/// As apsw's logger waits for Python's GIL, while the thread that has it calls os.fork().
#[test]
fn a_log_callback_may_wait_for_a_thread_that_forks() {
    static GIL: Mutex<()> = Mutex::new(());
    static IS_CALLED: AtomicBool = AtomicBool::new(false);
    fn callback(_code: c_int, message: &str) {
        if is_hooks_warning(message) {
            IS_CALLED.store(true, Ordering::SeqCst);
            drop(GIL.lock().unwrap());
        }
    }
    in_watched_process("a_log_callback_may_wait_for_a_thread_that_forks", || {
        let gil = GIL.lock().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| provoke_a_warning(callback));
            while !IS_CALLED.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            assert_eq!(fork_and_wait(|| true), 0);
            drop(gil);
        });
    });
}

/// Hosts register for each connection. A child forked meanwhile can register too.
#[test]
fn a_child_that_is_forked_during_a_registration_can_register() {
    /// The thread that forks: what /proc calls it, and that it is about to.
    static FORKS: OnceLock<libc::pid_t> = OnceLock::new();
    static IS_REGISTERING: AtomicBool = AtomicBool::new(false);
    static HAS_FORKED: AtomicBool = AtomicBool::new(false);

    /// `sqlite3_vfs_register`, which returns when the other thread has forked or waits in fork(2) for us.
    unsafe extern "C" fn slow_register(vfs: *mut kanbanlock_ffi::sqlite3_vfs, make_default: c_int) -> c_int {
        // SAFETY: the same arguments.
        let code = unsafe { ffi::sqlite3_vfs_register(vfs.cast(), make_default) };
        IS_REGISTERING.store(true, Ordering::SeqCst);
        let waits = |thread: &libc::pid_t| {
            let state = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
            state.rsplit(") ").next().unwrap().starts_with('S')
        };
        while !HAS_FORKED.load(Ordering::SeqCst) && !FORKS.get().is_some_and(waits) {
            std::thread::yield_now();
        }
        code
    }
    in_watched_process("a_child_that_is_forked_during_a_registration_can_register", || {
        kanbanlock::register().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let api = HostApi { vfs_register: slow_register, ..HostApi::linked() };
                // SAFETY: the linked SQLite, through one wrapper.
                unsafe { register_with(api, &Options::new().name("second")) }.unwrap();
            });
            while !IS_REGISTERING.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            // SAFETY: takes nothing.
            FORKS.set(unsafe { libc::gettid() }).unwrap();
            let status = fork_and_wait(|| {
                HAS_FORKED.store(true, Ordering::SeqCst);
                kanbanlock::register().is_ok() && Options::new().name("third").register().is_ok()
            });
            HAS_FORKED.store(true, Ordering::SeqCst);
            assert_eq!(status, 0, "the child's wait status");
        });
    });
}

/// A [`Hold`] needs no registration, and a child forked meanwhile does not keep its gate.
#[test]
fn a_child_does_not_keep_the_gate_of_a_hold() {
    in_watched_process("a_child_does_not_keep_the_gate_of_a_hold", || {
        let db = TestDb::new();
        File::create(db.path()).unwrap();
        let hold = Hold::acquire(db.path(), None).unwrap().unwrap();
        let flag = File::create(db.beside("-application")).unwrap();
        flag.lock().unwrap(); // what happens to an application's own flock
        let (mut from_child, mut to_parent) = std::io::pipe().unwrap();
        // SAFETY: the child says that it is there, and waits to be killed.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let _ = to_parent.write_all(b"!"); // its atfork handlers have run
            loop {
                // SAFETY: takes nothing.
                unsafe { libc::pause() };
            }
        }
        assert!(pid > 0 && is_flocked(&db.lock_file()), "the parent holds it");
        from_child.read_exact(&mut [0]).unwrap();
        drop((hold, flag));
        let (gate, application) = (is_flocked(&db.lock_file()), is_flocked(&db.beside("-application")));
        // SAFETY: our own child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        // SAFETY: ditto; its status is of no interest.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        assert_eq!((gate, application), (false, true));
    });
}
