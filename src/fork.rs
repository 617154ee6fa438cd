//! fork(2): what a child process inherits, and must let go of at once.
//!
//! ## The bug
//! A child inherits the parent's open file descriptions. Flocks and OFD locks belong to those, not to the process: if
//! the parent dies, its lock lives on as long as the child has the descriptor open, and every writer waits for a
//! process that knows nothing of it.
//!
//! ## Key operations
//! `pthread_atfork` handlers. *prepare* takes the mutexes, so that the child finds whole tables; *parent* gives them
//! back. *child* closes every lock file and every canonical description: close(2), never LOCK_UN or F_UNLCK, which
//! would unlock the description that the parent still uses. It starts a new *generation*, and cuts the process off from its
//! parent's database files (`inherited.rs`).
//!
//! ## Invariants
//! - A database file that was opened in an older generation takes no lock and writes nothing (`file.rs`): its
//!   descriptors' numbers may be anything by now, and the transaction it may be in is the parent's. SQLite forbids such
//!   use anyway: "do not open an SQLite database connection, then fork(2), then try to use that database connection in
//!   the child process" (<https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork_>).
//! - What SQLite writes past the shim (WAL, journal, wal-index) is out of the child's reach, if the hooks of `ofd.rs` are
//!   installed: `inherited.rs`.
//! - A descriptor of an older generation is forgotten, not closed: the number may be in use again.
//!
//! Not covered: vfork(2), clone(2) and a raw fork system call run no handlers. A child that execs at once is fine
//! in any case: every descriptor is O_CLOEXEC.
//!
//! Uses: `inherited`, `ofd`, `place`.

use std::cell::UnsafeCell;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use once_cell::sync::OnceCell;

use crate::{inherited, ofd, place};

static GENERATION: AtomicU32 = AtomicU32::new(0);

/// The descriptors of all open lock files.
static LOCK_FILES: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// How many forks lie between the first process and this one.
#[inline]
pub fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// The child of a fork will close `fd`.
pub fn close_in_child(fd: RawFd) {
    lock_files().push(fd);
}

/// `fd` is about to be closed.
pub fn forget(fd: RawFd) {
    lock_files().retain(|known| *known != fd);
}

fn lock_files() -> MutexGuard<'static, Vec<RawFd>> {
    // A push or a retain of numbers leaves the list whole.
    LOCK_FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Held while a VFS is registered: no fork meanwhile, or the child's next registration would wait for a thread that it
/// does not have. The first of the mutexes.
pub fn registering() -> MutexGuard<'static, ()> {
    static REGISTERING: Mutex<()> = Mutex::new(());
    REGISTERING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs the handlers, once.
pub fn install() {
    static ONCE: OnceCell<()> = OnceCell::new();
    ONCE.get_or_init(|| {
        // SAFETY: three functions that may run at any fork until the process ends; a failure (ENOMEM) installs none,
        // and a child then keeps what it would have kept without us.
        let _ = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
}

type Guards = (
    MutexGuard<'static, ()>,
    MutexGuard<'static, Vec<RawFd>>,
    ofd::TableGuard,
    place::TableGuard,
    inherited::TableGuard,
);

/// The mutexes, from `prepare` to `parent` or `child`, which run on the same thread.
struct Held(UnsafeCell<Option<Guards>>);

// SAFETY: touched by the handlers only, and by one thread at a time: whoever is between prepare and parent or child
// holds the mutexes that are in it, so another thread's prepare waits before it gets here.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));

extern "C" fn prepare() {
    let guards = (
        registering(),
        lock_files(),
        ofd::lock_for_fork(),
        place::lock_for_fork(),
        inherited::lock_for_fork(),
    );
    // SAFETY: the mutexes are ours now, so nobody else touches it (Held).
    unsafe { *HELD.0.get() = Some(guards) };
}

fn take_guards() -> Option<Guards> {
    // SAFETY: after prepare on this thread, which still has the mutexes (Held).
    unsafe { (*HELD.0.get()).take() }
}

extern "C" fn parent() {
    drop(take_guards());
}

extern "C" fn child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    let Some((_registering, mut lock_files, locks, places, files)) = take_guards() else { return };
    for fd in lock_files.drain(..) {
        // SAFETY: the lock file's descriptor, inherited: the file object that owned it belongs to an older generation
        // from now on, and forgets it instead of closing it.
        unsafe { libc::close(fd) };
    }
    locks.close_all_in_child();
    places.clear_in_child();
    files.let_go_in_child(generation());
}
