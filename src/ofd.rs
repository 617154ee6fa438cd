//! Close-proof locks: the unix VFS's POSIX locks, moved to open file descriptions.
//!
//! ## The bug
//! "If a process closes *any* file descriptor referring to a file, then all of the process's locks on that file are
//! released, regardless of the file descriptor(s) on which the locks were obtained" (fcntl(2)). So any code in the
//! process that opens and closes the database or its `-shm`, a backup, a checksum, `cp` in a library, silently drops
//! every lock that SQLite holds there. And POSIX locks never conflict within a process, so two copies of SQLite in
//! one process do not exclude each other.
//!
//! ## Definitions
//! *Hook*: a function of ours in the unix VFS's table of system calls (`xSetSystemCall`). The table is global to its
//! copy of SQLite: plain `unix` connections are protected too. *Canonical description*: the one open file description
//! that owns all locks of this copy on one inode. *User*: a descriptor that has made a lock call. *State* of a
//! descriptor number: which way its lock calls go, if it is a user.
//!
//! ## Key operations
//! - `fcntl` with F_SETLK, F_GETLK, F_SETLKW: the same with F_OFD_… on the canonical description of the descriptor's
//!   inode, which is opened at the first lock call. Everything else passes untouched.
//! - `close`: a user that goes takes its state with it; the last one unlocks and closes the canonical description,
//!   *before* the real close, as POSIX locks would go.
//! - `open`: a descriptor number that comes back as a user was closed behind our back: the state is stale.
//!
//! ## Invariants
//! - All users of one inode in one copy go one way: through one canonical description, or on POSIX locks (`Posix`).
//!   The owner of the locks is then one and the same, as with POSIX locks, so os_unix's own bookkeeping holds.
//! - A connection may wish for either way (`kanbanlock_close_proof`). The wishes for an inode agree, since one that
//!   contradicts is not opened ([`wish`]); the `-shm` of a database goes its database's way.
//! - An inode stays on POSIX locks while it has users if that is wished for, or, at its first lock, a descriptor from
//!   before the installation holds POSIX locks on it, it cannot be opened again as it was, or the kernel says EINVAL.
//! - Every POSIX lock that was taken past the hooks is on a descriptor from *before* ([`install`] has the argument).
//! - The canonical description is its own open, never a dup(): a forked child would keep a dup's locks.
//! - The table's mutex is taken at a descriptor's first lock and at a user's close. After that a lock call costs one
//!   atomic load more. It is not held over F_OFD_SETLKW, which waits, nor while SQLite's log callback runs, which may
//!   wait for anything, fork(2) included.
//! - A hook does not panic, which would abort the process: a descriptor is looked at only if it is not negative (-1 is
//!   what SQLITE_FCNTL_NULL_IO leaves), nothing is indexed or unwrapped on the way to a lock, and a panic in what is done
//!   beside that, with the table or the log, ends at [`guarded`].
//!
//! OFD and POSIX locks conflict with each other on Linux ("…conflict … even when they are acquired by the same
//! process", fcntl(2)), so processes without the hooks exclude and are excluded as before.
//!
//! Uses: `inherited`, `host`, `real`, `events`, `sys`, `error`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use once_cell::sync::OnceCell;

use crate::error::rc;
use crate::events::About;
use crate::host::Host;
use crate::inherited::{self, COPIES, for_each_copy};
use crate::real::RealVfs;
use crate::sys::{self, ErrnoGuard, FileId};

// The hooks. ------------------------------------------------------------------------------------------------

/// fcntl(2) is variadic; so is a call of it. (Defining a variadic function is not possible in Rust, but a function of
/// three arguments receives such a call alike on x86-64 and aarch64 Linux.)
type Fcntl = unsafe extern "C" fn(c_int, c_int, ...) -> c_int;
type HookedFcntl = unsafe extern "C" fn(c_int, c_int, *mut c_void) -> c_int;
type Open = unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int;
type Close = unsafe extern "C" fn(c_int) -> c_int;

/// One copy of SQLite with hooks: what was in its table before.
struct HookedSqlite {
    host: Host,
    fcntl: Fcntl,
    open: Open,
    close: Close,
    /// The hooks are in the table, and what was open before is known.
    is_complete: AtomicBool,
}

/// Filled with the table's mutex held.
static HOOKED: [OnceCell<HookedSqlite>; COPIES] = [const { OnceCell::new() }; COPIES];

/// Why locks are not close-proof, for the whole copy of SQLite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// The real VFS has no replaceable system calls: it is not the unix VFS.
    NoSystemCalls,
    /// `/proc/self/fd` cannot be read.
    NoProc,
    /// More copies of SQLite in this process than there are hooks for.
    TooManyCopies,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unavailable::NoSystemCalls => "the real VFS has no replaceable system calls",
            Unavailable::NoProc => "/proc is not mounted",
            Unavailable::TooManyCopies => "too many copies of SQLite in this process",
        })
    }
}

/// Installs the hooks into the table that `real` uses: once for each copy of SQLite, and for good. Other threads may
/// use SQLite meanwhile. When it returns, every lock call that begins goes through the hooks.
///
/// ## Why no lock is left behind
/// What a thread does meanwhile goes the old way or through a hook, since it may have read an entry of the table just
/// before that was replaced. A *past lock* is one taken by such an fcntl(2).
///
/// - The mutex is held from before the first hook is in until what is open is listed, so no inode's way is decided
///   before that: a hooked lock call on a new descriptor waits.
/// - The descriptor of a past lock was open when the old entry was read, so before the replacement, so before the list
///   was made: it is in the list, or closed again, and its locks with it. How it was opened does not matter.
/// - A past lock may still be under way when the list is complete, and even when another thread makes a hooked call.
///   But not on the same database: os_unix makes each lock call under its inode's mutex. Nor on the same `-shm`: there
///   it does so too, but for SQLITE_ENABLE_SETLK_TIMEOUT, which has a mutex for each wal-index slot; and a slot is
///   locked by a past lock only if the DMS byte was before, as a past lock, and it stays so while the `-shm` is open.
/// - So when an inode's way is decided its past locks are there to see (`/proc/self/fdinfo`), and it stays on POSIX
///   locks. Later lock calls on it are hooked and go that way: what was locked past the hooks is unlocked.
/// - A user is closed by the close hook: its lock call has seen the mutex released, so its close sees the replacement.
///   One that the old close(2) closes has made past calls only, and one that the old open(2) opens is nobody's state.
///
/// # Errors
///
/// Why that is impossible; nothing has changed then.
pub fn install(host: Host, real: RealVfs) -> Result<(), Unavailable> {
    if is_installed(&host) {
        return Ok(());
    }
    let mut table = lock_table();
    if is_installed(&host) {
        return Ok(());
    }
    let is_ours = |call: unsafe extern "C" fn()| HOOKS.iter().any(|hooks| ptr::fn_addr_eq(hooks.fcntl, call));
    if real.system_call(c"fcntl").is_some_and(is_ours) {
        return Ok(()); // the same table, reached through another sqlite3_vfs_find
    }
    let index = HOOKED.iter().position(|copy| copy.get().is_none()).ok_or(Unavailable::TooManyCopies)?;
    let hooks = HOOKS.get(index).ok_or(Unavailable::TooManyCopies)?;
    let found = |name| real.system_call(name).ok_or(Unavailable::NoSystemCalls);
    let (fcntl, open, close) = (found(c"fcntl")?, found(c"open")?, found(c"close")?);
    // Opened now, to be read later: it cannot fail for want of a descriptor then.
    let descriptors = sys::OpenDescriptors::new().map_err(|_| Unavailable::NoProc)?;
    if !inherited::prepare_copy(index, real) {
        return Err(Unavailable::NoSystemCalls);
    }
    let copy = HookedSqlite {
        host,
        // SAFETY: os_unix's table holds, under this name, a function of this type (its cast is `(int(*)(int,int,…))`);
        // whoever has replaced it must have kept to that.
        fcntl: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Fcntl>(fcntl) },
        // SAFETY: ditto: `(int(*)(const char*,int,int))`.
        open: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Open>(open) },
        // SAFETY: ditto: `(int(*)(int))`.
        close: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Close>(close) },
        is_complete: AtomicBool::new(false),
    };
    let copy = HOOKED[index].get_or_init(|| copy);
    // os_unix's xSetSystemCall is an assignment, and takes no mutex.
    // SAFETY: a hook of the type that os_unix calls under this name.
    unsafe { real.set_system_call(c"close", hooks.close) };
    // SAFETY: a hook of the type that os_unix calls under this name.
    unsafe { real.set_system_call(c"open", hooks.open) };
    // SAFETY: a hook of the type that os_unix calls under this name.
    unsafe { real.set_system_call(c"fcntl", hooks.fcntl) };
    fence(Ordering::SeqCst); // the replacements are visible before anything is listed
    match descriptors.list() {
        Ok(descriptors) => table.remember_before(index, &descriptors),
        Err(_) => table.unlisted.push(index),
    }
    copy.is_complete.store(true, Ordering::Release);
    Ok(())
}

/// True if this copy of SQLite has the hooks, all of them.
fn is_installed(host: &Host) -> bool {
    let mut copies = HOOKED.iter().filter_map(OnceCell::get);
    copies.any(|copy| copy.host.is_same_copy(host) && copy.is_complete.load(Ordering::Acquire))
}

/// The hooks that a VFS goes through: those of its copy of SQLite, or of another that shares its table.
pub fn copy_index(host: &Host, real: RealVfs) -> Option<usize> {
    let by_host = HOOKED.iter().position(|copy| copy.get().is_some_and(|copy| copy.host.is_same_copy(host)));
    by_host.or_else(|| {
        let fcntl = real.system_call(c"fcntl")?;
        HOOKS.iter().position(|hooks| ptr::fn_addr_eq(hooks.fcntl, fcntl))
    })
}

/// Does anybody but this copy of SQLite hold a lock on that byte of the file? `None` if this copy has not locked the
/// file, or not through the hooks: then there is no descriptor to ask with, and opening one is out of the question.
///
/// If the kernel does not answer, yes.
pub fn is_locked_by_others(host: &Host, real: RealVfs, id: FileId, byte: libc::off_t) -> Option<bool> {
    let copy_index = copy_index(host, real)?;
    let table = lock_table();
    let inode = table.inodes.iter().find(|inode| inode.copy == copy_index && inode.id == id)?;
    let user = inode.users.first()?;
    let mut lock = sys::write_lock_of_byte(byte);
    let result = match inode.state(user).way()? {
        Way::Ofd(canonical) => ofd_call(copy_index, inode.state(user), canonical, libc::F_GETLK, &mut lock),
        Way::Posix => posix_call(copy_index, user.fd, libc::F_GETLK, &mut lock),
    };
    Some(result == -1 || c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// A connection's wish stands until this is dropped.
#[derive(Debug)]
pub struct Wish(u64);

impl Drop for Wish {
    fn drop(&mut self) {
        lock_table().wishes.retain(|wish| wish.number != self.0);
    }
}

/// One inode cannot go both ways: os_unix counts the locks of all connections to it together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contradiction;

/// A database file just opened wishes for close-proof locks, or for POSIX locks. `None`: this copy of SQLite has no
/// hooks, so there is nothing to choose.
///
/// # Errors
///
/// The locks of this file go the other way already, in this copy of SQLite.
pub fn wish(
    host: &Host,
    real: RealVfs,
    id: FileId,
    shm_path: &CStr,
    is_close_proof: bool,
) -> Result<Option<Wish>, Contradiction> {
    let Some(copy_index) = copy_index(host, real) else { return Ok(None) };
    let mut table = lock_table();
    let mut others = table.wishes.iter().filter(|wish| wish.copy == copy_index && wish.id == id);
    let inode = table.inodes.iter().find(|inode| inode.copy == copy_index && inode.id == id);
    let goes_other_way = inode.is_some_and(|inode| match is_close_proof {
        true => inode.is_unwanted,
        false => inode.canonical.is_some(), // a plain `unix` connection was first
    });
    if goes_other_way || others.any(|wish| wish.is_close_proof != is_close_proof) {
        return Err(Contradiction);
    }
    table.last_wish += 1;
    let number = table.last_wish;
    let shm_path = shm_path.to_owned();
    table.wishes.push(WishEntry { number, copy: copy_index, id, shm_path, is_close_proof });
    Ok(Some(Wish(number)))
}

/// Which way the locks of this file go in this copy of SQLite; before its first lock call, which way they will go if
/// nothing is in the way.
pub fn is_close_proof(host: &Host, real: RealVfs, id: FileId) -> bool {
    let Some(copy_index) = copy_index(host, real) else { return false };
    let table = lock_table();
    let inode = table.inodes.iter().find(|inode| inode.copy == copy_index && inode.id == id);
    inode.map_or_else(|| !table.is_unwanted(copy_index, id), |inode| inode.canonical.is_some())
}

struct Hooks {
    fcntl: unsafe extern "C" fn(),
    open: unsafe extern "C" fn(),
    close: unsafe extern "C" fn(),
}

static HOOKS: [Hooks; COPIES] = for_each_copy!(hooks);

const fn hooks<const COPY: usize>() -> Hooks {
    let fcntl: HookedFcntl = hooked_fcntl::<COPY>;
    let open: Open = hooked_open::<COPY>;
    let close: Close = hooked_close::<COPY>;
    // `sqlite3_syscall_ptr` is the type of every entry of the table: "void (*)(void)". os_unix casts it back.
    Hooks {
        // SAFETY: a function pointer stays one; nobody calls it by this type.
        fcntl: unsafe { std::mem::transmute::<HookedFcntl, unsafe extern "C" fn()>(fcntl) },
        // SAFETY: ditto.
        open: unsafe { std::mem::transmute::<Open, unsafe extern "C" fn()>(open) },
        // SAFETY: ditto.
        close: unsafe { std::mem::transmute::<Close, unsafe extern "C" fn()>(close) },
    }
}

/// The copy that a hook belongs to: there before the hooks are in any table.
#[inline(always)]
fn copy(index: usize) -> Option<&'static HookedSqlite> {
    HOOKED.get(index)?.get()
}

/// The answer of a hook without a copy, which nobody can call.
#[cold]
#[inline(never)]
fn not_installed() -> c_int {
    sys::set_errno(libc::ENOSYS);
    -1
}

/// Ends a panic in what the hooks do beside the fast path: `None`.
fn guarded<T>(body: impl FnOnce() -> T) -> Option<T> {
    // The table is usable after a panic (lock_table). What a panic carries is not dropped: that may panic, too.
    catch_unwind(AssertUnwindSafe(body)).map_err(std::mem::forget).ok()
}

unsafe extern "C" fn hooked_fcntl<const COPY: usize>(fd: c_int, cmd: c_int, arg: *mut c_void) -> c_int {
    match cmd {
        libc::F_SETLK | libc::F_GETLK | libc::F_SETLKW => {
            // SAFETY: these commands take "a pointer to a flock structure" (fcntl(2)), and os_unix passes one of its
            // own, on its stack.
            let lock = unsafe { &mut *arg.cast::<libc::flock>() };
            lock_call(COPY, fd, cmd, lock)
        }
        _ => {
            let Some(copy) = copy(COPY) else { return not_installed() };
            // SAFETY: what os_unix would have called, with what it passed.
            unsafe { (copy.fcntl)(fd, cmd, arg) }
        }
    }
}

unsafe extern "C" fn hooked_open<const COPY: usize>(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    let Some(copy) = copy(COPY) else { return not_installed() };
    // SAFETY: what os_unix would have called, with what it passed.
    let fd = unsafe { (copy.open)(path, flags, mode) };
    forget_user(fd);
    if fd >= 0 {
        inherited::opened(COPY, fd);
    }
    fd
}

unsafe extern "C" fn hooked_close<const COPY: usize>(fd: c_int) -> c_int {
    let Some(copy) = copy(COPY) else { return not_installed() };
    forget_user(fd);
    inherited::closed(fd);
    // SAFETY: what os_unix would have called, with what it passed.
    unsafe { (copy.close)(fd) }
}

/// `fd` is a user no longer, if it was one.
fn forget_user(fd: RawFd) {
    if FdState::load(fd) != FdState::NO_USER {
        let _errno = ErrnoGuard::new();
        guarded(|| lock_table().forget(fd));
    }
}

// One lock call. --------------------------------------------------------------------------------------------

// Inlined into the hook: after a system call each return address is mispredicted on many machines, so the depth of the
// stack around it costs more than the instructions (ARCHITECTURE.md, "Speed").
#[inline(always)]
fn lock_call(copy_index: usize, fd: RawFd, cmd: c_int, lock: &mut libc::flock) -> c_int {
    let state = FdState::load(fd);
    match state.way() {
        Some(Way::Ofd(canonical)) => ofd_call(copy_index, state, canonical, cmd, lock),
        Some(Way::Posix) => posix_call(copy_index, fd, cmd, lock),
        None => first_call(copy_index, fd, cmd, lock),
    }
}

fn posix_call(copy_index: usize, fd: RawFd, cmd: c_int, lock: &mut libc::flock) -> c_int {
    let Some(copy) = copy(copy_index) else { return not_installed() };
    let lock: *mut libc::flock = lock;
    // SAFETY: what os_unix would have called, with what it passed.
    unsafe { (copy.fcntl)(fd, cmd, lock) }
}

// The last thing it does to lock is a call of three arguments, of which the compiler makes a jump: the system call is
// as deep in the stack as without the hook. A structure of its own to pass, a copy of `lock`, would make that
// impossible.
#[inline(always)]
fn ofd_call(
    copy_index: usize,
    state: FdState,
    canonical: RawFd,
    cmd: c_int,
    lock: &mut libc::flock,
) -> c_int {
    let Some(copy) = copy(copy_index) else { return not_installed() };
    if cmd == libc::F_GETLK {
        return ofd_getlk(copy, canonical, lock);
    }
    // "EBADF: cmd is F_SETLK or F_SETLKW and the file descriptor open mode doesn't match with the type of lock
    // requested" (fcntl(2)): the user's mode counts, not the canonical description's.
    if state.is_read_only() && c_int::from(lock.l_type) == libc::F_WRLCK {
        sys::set_errno(libc::EBADF);
        return -1;
    }
    // "The l_pid field must be set to zero", fcntl(2) on open file description locks. To F_SETLK it means nothing,
    // and os_unix neither sets nor reads it.
    lock.l_pid = 0;
    let ofd_cmd = if cmd == libc::F_SETLKW { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
    let lock: *mut libc::flock = lock;
    // SAFETY: a lock command with its flock structure; `canonical` is open as long as the user has its state.
    unsafe { (copy.fcntl)(canonical, ofd_cmd, lock) }
}

/// F_GETLK: the answer is copied back only if there is one.
#[inline(never)]
fn ofd_getlk(copy: &HookedSqlite, canonical: RawFd, lock: &mut libc::flock) -> c_int {
    let mut request = libc::flock { l_pid: 0, ..*lock };
    let request_ptr: *mut libc::flock = &raw mut request;
    // SAFETY: a lock command with its flock structure; `canonical` is open as long as the user has its state.
    let result = unsafe { (copy.fcntl)(canonical, libc::F_OFD_GETLK, request_ptr) };
    if result == 0 {
        *lock = request;
    }
    result
}

/// The first lock call of a descriptor: finds its inode's way, or decides it.
#[cold]
#[inline(never)]
fn first_call(copy_index: usize, fd: RawFd, cmd: c_int, lock: &mut libc::flock) -> c_int {
    if fd < 0 || inherited::is_dead(fd) {
        return posix_call(copy_index, fd, cmd, lock); // EBADF
    }
    let errno = ErrnoGuard::new();
    let adopted = guarded(|| lock_table().adopt(copy_index, fd)); // and the mutex is free again
    let adopted = adopted.unwrap_or_else(|| Err(io::Error::from_raw_os_error(libc::EIO)));
    if let Ok(Adopted { warning: Some(warning), .. }) = &adopted {
        guarded(|| warning.log(copy_index));
    }
    drop(errno);
    let (state, is_first_of_inode) = match adopted {
        Ok(adopted) => (adopted.state, adopted.is_first_of_inode),
        Err(error) => {
            // os_unix makes SQLITE_IOERR_LOCK of these; of ENOLCK it would make SQLITE_BUSY.
            sys::set_errno(error.raw_os_error().unwrap_or(libc::EMFILE));
            return -1;
        }
    };
    let Some(Way::Ofd(canonical)) = state.way() else {
        return posix_call(copy_index, fd, cmd, lock);
    };
    let result = ofd_call(copy_index, state, canonical, cmd, lock);
    let is_refused = result == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL);
    if is_first_of_inode && is_refused {
        // The file system does not have such locks. Nothing is locked yet, so the inode can still change its way.
        if let Some(Some(warning)) = guarded(|| lock_table().fall_back_to_posix(fd)) {
            guarded(|| warning.log(copy_index));
        }
        return posix_call(copy_index, fd, cmd, lock);
    }
    result
}

/// Why an inode stays on POSIX locks, for SQLite's log: made with the table's mutex held, logged after that.
#[derive(Debug)]
struct Warning {
    message: String,
    database: Option<CString>,
}

impl Warning {
    fn new(fd: BorrowedFd<'_>, why: &str) -> Warning {
        let path = sys::path_of(fd);
        let message = format!("kanbanlock: {} has no close-proof locks: {why}", path.display());
        let path = path.into_os_string().into_vec();
        let database = CString::new(path.strip_suffix(b"-shm").unwrap_or(&path)).ok();
        Warning { message, database }
    }

    /// Not with the table's mutex held: the callback is the application's.
    fn log(&self, copy_index: usize) {
        let about = About { database: self.database.as_deref(), waited_ms: None };
        if let Some(copy) = copy(copy_index) {
            copy.host.log(rc::WARNING, &self.message, about);
        }
    }
}

// What the hooks know of a descriptor number. ---------------------------------------------------------------

/// One word, so that a lock call after the first needs one load and no mutex: bits 0 and 1 are the kind, bit 2 says
/// read-only, the rest is the canonical descriptor ([`FdState::HIGHEST`]).
#[derive(Clone, Copy, PartialEq, Eq)]
struct FdState(u32);

/// Which way the lock calls of a user go.
enum Way {
    Posix,
    Ofd(RawFd),
}

const CHUNK: usize = 1024;
const CHUNKS: usize = 1024;
type Chunk = [AtomicU32; CHUNK];

/// States by descriptor number, up to 2^20 (Linux's default `fs.nr_open`); chunks come into being when first needed.
static STATES: [AtomicPtr<Chunk>; CHUNKS] = [const { AtomicPtr::new(ptr::null_mut()) }; CHUNKS];

impl FdState {
    /// Has made no lock call yet.
    const NO_USER: FdState = FdState(0);
    const POSIX: FdState = FdState(2);
    const KIND_OFD: u32 = 3;
    /// The highest canonical descriptor that there is room for.
    const HIGHEST: RawFd = (1 << 29) - 1;

    fn ofd(canonical: RawFd, is_read_only: bool) -> FdState {
        FdState(canonical.unsigned_abs() << 3 | u32::from(is_read_only) << 2 | FdState::KIND_OFD)
    }

    #[inline]
    fn way(self) -> Option<Way> {
        match self.0 & 3 {
            FdState::KIND_OFD => RawFd::try_from(self.0 >> 3).ok().map(Way::Ofd),
            _ if self == FdState::POSIX => Some(Way::Posix),
            _ => None,
        }
    }

    fn is_read_only(self) -> bool {
        self.0 & 4 != 0
    }

    #[inline]
    fn cell(fd: RawFd) -> Option<&'static AtomicU32> {
        let fd = usize::try_from(fd).ok()?;
        let chunk = STATES.get(fd / CHUNK)?.load(Ordering::Acquire);
        // SAFETY: null, or a chunk that `make_cell` has leaked.
        let chunk = unsafe { chunk.as_ref() }?;
        chunk.get(fd % CHUNK)
    }

    /// Called with the table's mutex held.
    fn make_cell(fd: RawFd) -> Option<&'static AtomicU32> {
        let place = STATES.get(usize::try_from(fd).ok()? / CHUNK)?;
        if place.load(Ordering::Acquire).is_null() {
            let chunk = Box::leak(Box::new([const { AtomicU32::new(0) }; CHUNK]));
            place.store(chunk, Ordering::Release);
        }
        FdState::cell(fd)
    }

    #[inline]
    fn load(fd: RawFd) -> FdState {
        FdState::cell(fd).map_or(FdState::NO_USER, |cell| FdState(cell.load(Ordering::Acquire)))
    }

    /// False if the descriptor number is beyond all chunks.
    fn store(self, fd: RawFd) -> bool {
        let cell = if self == FdState::NO_USER { FdState::cell(fd) } else { FdState::make_cell(fd) };
        cell.map(|cell| cell.store(self.0, Ordering::Release)).is_some()
    }
}

// The table of inodes. --------------------------------------------------------------------------------------

struct Table {
    inodes: Vec<Inode>,
    wishes: Vec<WishEntry>,
    /// The number of the last wish.
    last_wish: u64,
    /// Descriptors from before the installation.
    before: Vec<Before>,
    /// The copies for which those could not be listed: all their inodes stay on POSIX locks.
    unlisted: Vec<usize>,
}

/// A descriptor from before the installation in one copy, with what it was open on.
struct Before {
    copy: usize,
    fd: RawFd,
    id: FileId,
}

/// One inode with users, in one copy of SQLite.
struct Inode {
    copy: usize,
    id: FileId,
    /// `None`: on POSIX locks.
    canonical: Option<OwnedFd>,
    /// On POSIX locks because that was wished for.
    is_unwanted: bool,
    users: Vec<User>,
}

struct User {
    fd: RawFd,
    is_read_only: bool,
}

/// What one open database file wishes for.
struct WishEntry {
    number: u64,
    copy: usize,
    id: FileId,
    shm_path: CString,
    is_close_proof: bool,
}

static TABLE: Mutex<Table> = Mutex::new(Table {
    inodes: Vec::new(),
    wishes: Vec::new(),
    last_wish: 0,
    before: Vec::new(),
    unlisted: Vec::new(),
});

/// [`Table::adopt`]'s answer.
struct Adopted {
    state: FdState,
    is_first_of_inode: bool,
    warning: Option<Warning>,
}

fn lock_table() -> MutexGuard<'static, Table> {
    // No step below leaves the table half changed if it panics.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The table's mutex, held across a fork.
pub struct TableGuard(MutexGuard<'static, Table>);

/// For `fork.rs`: nobody is in the middle of a change when the process is copied.
pub fn lock_for_fork() -> TableGuard {
    TableGuard(lock_table())
}

impl TableGuard {
    /// In the child: closes every canonical description (never F_UNLCK: the parent still uses it). A connection that
    /// goes on here makes its first lock call anew, with a description of its own, as POSIX locks would have it.
    pub fn close_all_in_child(mut self) {
        self.0.wishes.clear();
        for inode in self.0.inodes.drain(..) {
            for user in inode.users {
                FdState::NO_USER.store(user.fd);
            }
        }
    }
}

impl Table {
    /// These were open when the hooks of this copy were in. Users are not of interest: they are other copies', since no
    /// lock call of this one has got past the mutex yet.
    fn remember_before(&mut self, copy: usize, descriptors: &[(RawFd, FileId)]) {
        let is_user = |fd: RawFd, id: FileId| {
            self.inodes.iter().any(|inode| inode.id == id && inode.users.iter().any(|user| user.fd == fd))
        };
        let others = descriptors.iter().filter(|(fd, id)| !is_user(*fd, *id));
        self.before.extend(others.map(|&(fd, id)| Before { copy, fd, id }));
    }

    /// Makes `fd`, which is not negative, a user.
    fn adopt(&mut self, copy_index: usize, fd: RawFd) -> io::Result<Adopted> {
        // SAFETY: os_unix is making a lock call on it, so it is open during the call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let id = sys::fstat(borrowed)?.id;
        let user = User { fd, is_read_only: sys::is_read_only(borrowed)? };
        let is_same = |inode: &Inode| inode.copy == copy_index && inode.id == id;
        let is_first_of_inode = !self.inodes.iter().any(is_same);
        let mut warning = None;
        if is_first_of_inode {
            let is_unwanted = self.is_unwanted(copy_index, id);
            let canonical = match is_unwanted {
                true => None,
                false => self
                    .decide(copy_index, borrowed, id)
                    .map_err(|why| warning = Some(Warning::new(borrowed, &why)))
                    .ok(),
            };
            self.inodes.push(Inode { copy: copy_index, id, canonical, is_unwanted, users: Vec::new() });
        }
        let Some(inode) = self.inodes.iter_mut().find(|inode| is_same(inode)) else {
            return Err(io::Error::from_raw_os_error(libc::EIO)); // not reached
        };
        let state = inode.state(&user);
        inode.users.push(user);
        if !state.store(fd) {
            self.forget(fd);
            return Err(io::Error::other("a descriptor number beyond all states"));
        }
        Ok(Adopted { state, is_first_of_inode, warning })
    }

    /// Does a connection to this database, or to the database that this `-shm` belongs to, wish for POSIX locks?
    fn is_unwanted(&self, copy_index: usize, id: FileId) -> bool {
        let is_its_shm = |wish: &WishEntry| sys::lstat(&wish.shm_path).is_ok_and(|shm| shm.id == id);
        let mut unwanted = self.wishes.iter().filter(|wish| wish.copy == copy_index && !wish.is_close_proof);
        unwanted.any(|wish| wish.id == id || is_its_shm(wish))
    }

    /// The canonical description of a new inode; or why it must stay on POSIX locks, though nobody wishes for them.
    fn decide(&mut self, copy_index: usize, fd: BorrowedFd<'_>, id: FileId) -> Result<OwnedFd, String> {
        self.before.retain(|before| sys::is_open_on(before.fd, before.id));
        let mut before = self.before.iter().filter(|before| before.copy == copy_index && before.id == id);
        if before.any(|before| sys::holds_posix_locks(before.fd)) {
            return Err(
                "a connection from before kanbanlock was registered holds POSIX locks on it".to_owned()
            );
        }
        if self.unlisted.contains(&copy_index) {
            return Err("what was open when kanbanlock was registered could not be listed".to_owned());
        }
        canonical_description(fd, id).map_err(|error| format!("it cannot be opened again: {error}"))
    }

    /// `fd` is closed, or about to be.
    fn forget(&mut self, fd: RawFd) {
        FdState::NO_USER.store(fd);
        for inode in &mut self.inodes {
            inode.users.retain(|user| user.fd != fd);
        }
        // The last user of an inode gives up all its locks, as close(2) does with POSIX locks: at once, by F_UNLCK,
        // since a child between vfork and exec may share the description for a moment. Dropping the inode closes it.
        for inode in self.inodes.iter().filter(|inode| inode.users.is_empty()) {
            if let Some(canonical) = &inode.canonical {
                let _ = sys::ofd_unlock_all(canonical.as_fd());
            }
        }
        self.inodes.retain(|inode| !inode.users.is_empty());
    }

    /// The kernel has refused the first lock of this user's inode with EINVAL.
    fn fall_back_to_posix(&mut self, fd: RawFd) -> Option<Warning> {
        let has_user = |inode: &&mut Inode| inode.users.iter().any(|user| user.fd == fd);
        let inode = self.inodes.iter_mut().find(has_user)?;
        inode.canonical = None;
        for user in &inode.users {
            inode.state(user).store(user.fd);
        }
        // SAFETY: os_unix is making a lock call on it, so it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        Some(Warning::new(fd, "the kernel does not support them for this file (EINVAL)"))
    }
}

impl Inode {
    fn state(&self, user: &User) -> FdState {
        match &self.canonical {
            Some(canonical) => FdState::ofd(canonical.as_raw_fd(), user.is_read_only),
            None => FdState::POSIX,
        }
    }
}

/// A new open file description of what `fd` is open on.
///
/// Writable if at all possible, even for a read-only `fd`: a connection that writes may follow. If it is not possible
/// for a writable `fd` (privileges were dropped since), the inode cannot go this way.
fn canonical_description(fd: BorrowedFd<'_>, id: FileId) -> io::Result<OwnedFd> {
    let canonical = match sys::reopen(fd, libc::O_RDWR) {
        Err(_) if sys::is_read_only(fd)? => sys::reopen(fd, libc::O_RDONLY)?,
        result => result?,
    };
    if canonical.as_raw_fd() > FdState::HIGHEST {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    if sys::fstat(canonical.as_fd())?.id != id {
        return Err(io::Error::other("/proc/self/fd leads to another file"));
    }
    Ok(canonical)
}
