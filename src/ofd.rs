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
//! that owns all locks of this copy on one inode. *User*: a descriptor that has made a lock call. *Slot*: what the
//! hooks know of a descriptor number.
//!
//! ## Key operations
//! - `fcntl` with F_SETLK, F_GETLK, F_SETLKW: the same with F_OFD_… on the canonical description of the descriptor's
//!   inode, which is opened at the first lock call. Everything else passes untouched.
//! - `close`: a user that goes takes its slot with it; the last one unlocks and closes the canonical description, *before*
//!   the real close, as POSIX locks would go.
//! - `open`: a descriptor number that comes back with a slot was closed behind our back: the slot is stale.
//!
//! ## Invariants
//! - All users of one inode in one copy go one way: through one canonical description, or on POSIX locks (`Posix`).
//!   The owner of the locks is then one and the same, as with POSIX locks, so os_unix's own bookkeeping holds.
//! - A connection may wish for either way (`kanbanlock_close_proof`). The wishes for an inode agree, since one that
//!   contradicts is not opened ([`wish`]); the `-shm` of a database goes its database's way.
//! - An inode stays on POSIX locks while it has users if that is wished for, or, at its first lock, a descriptor from before the installation
//!   holds POSIX locks on it, it cannot be opened again as it was, or the kernel says EINVAL.
//! - The canonical description is its own open, never a dup(): a forked child would keep a dup's locks.
//! - The mutex is taken at a descriptor's first lock and at its close. After that a lock call costs one atomic load
//!   more. It is not held over F_OFD_SETLKW, which waits.
//!
//! OFD and POSIX locks conflict with each other on Linux ("…conflict … even when they are acquired by the same
//! process", fcntl(2)), so processes without the hooks exclude and are excluded as before.
//!
//! Uses: `host`, `real`, `events`, `sys`, `error`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use once_cell::sync::OnceCell;

use crate::error::rc;
use crate::events::About;
use crate::host::Host;
use crate::real::RealVfs;
use crate::sys::{self, ErrnoGuard, FileId};

// The hooks. ------------------------------------------------------------------------------------------------

/// How many copies of SQLite can have hooks. A hook gets no context, so each copy needs functions of its own.
const COPIES: usize = 8;

/// fcntl(2) is variadic; so is a call of it. (Defining a variadic function is not possible in Rust, but a function of
/// three arguments receives such a call alike on x86-64 and aarch64 Linux.)
type Fcntl = unsafe extern "C" fn(c_int, c_int, ...) -> c_int;
type HookedFcntl = unsafe extern "C" fn(c_int, c_int, *mut c_void) -> c_int;
type Open = unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int;
type Close = unsafe extern "C" fn(c_int) -> c_int;

/// One copy of SQLite with hooks: what was in its table before.
struct Copy {
    host: Host,
    fcntl: Fcntl,
    open: Open,
    close: Close,
}

static INSTALLED: [OnceCell<Copy>; COPIES] = [const { OnceCell::new() }; COPIES];

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

/// Installs the hooks into the table that `real` uses: once for each copy of SQLite, and for good.
///
/// # Errors
///
/// Why that is impossible; nothing has changed then.
pub fn install(host: Host, real: RealVfs) -> Result<(), Unavailable> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one_at_a_time = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if is_installed(&host) {
        return Ok(());
    }
    let index = INSTALLED.iter().position(|copy| copy.get().is_none()).ok_or(Unavailable::TooManyCopies)?;
    sys::open_descriptors().map_err(|_| Unavailable::NoProc)?;
    let is_ours = |call: unsafe extern "C" fn()| HOOKS.iter().any(|hooks| ptr::fn_addr_eq(hooks.fcntl, call));
    if real.system_call(c"fcntl").is_some_and(is_ours) {
        return Ok(()); // the same table, reached through another sqlite3_vfs_find
    }
    let found = |name| real.system_call(name).ok_or(Unavailable::NoSystemCalls);
    let (fcntl, open, close) = (found(c"fcntl")?, found(c"open")?, found(c"close")?);
    let copy = Copy {
        host,
        // SAFETY: os_unix's table holds, under this name, a function of this type (its cast is `(int(*)(int,int,…))`);
        // whoever has replaced it must have kept to that.
        fcntl: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Fcntl>(fcntl) },
        // SAFETY: ditto: `(int(*)(const char*,int,int))`.
        open: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Open>(open) },
        // SAFETY: ditto: `(int(*)(int))`.
        close: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Close>(close) },
    };
    if INSTALLED[index].set(copy).is_err() {
        return Err(Unavailable::TooManyCopies); // not reached: one at a time
    }
    let hooks = &HOOKS[index];
    // In this order: whatever makes a hooked lock call was either seen to open, or is in the list of what was there
    // before; and it will be seen to close.
    // SAFETY: a hook of the type that os_unix calls under this name.
    unsafe { real.set_system_call(c"close", hooks.close) };
    // SAFETY: a hook of the type that os_unix calls under this name.
    unsafe { real.set_system_call(c"open", hooks.open) };
    let mut before = sys::open_descriptors().unwrap_or_default();
    before.retain(|(fd, _)| Slot::load(*fd) == Slot::UNKNOWN);
    lock_table().before.extend(before);
    // SAFETY: a hook of the type that os_unix calls under this name.
    unsafe { real.set_system_call(c"fcntl", hooks.fcntl) };
    Ok(())
}

/// True if this copy of SQLite has the hooks.
fn is_installed(host: &Host) -> bool {
    INSTALLED.iter().any(|copy| copy.get().is_some_and(|copy| copy.host.is_same_copy(host)))
}

/// The hooks that a VFS goes through: those of its copy of SQLite, or of another that shares its table.
fn copy_index(host: &Host, real: RealVfs) -> Option<usize> {
    let by_host =
        INSTALLED.iter().position(|copy| copy.get().is_some_and(|copy| copy.host.is_same_copy(host)));
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
    let result = match inode.slot(user).way()? {
        Way::Ofd(canonical) => ofd_call(copy_index, inode.slot(user), canonical, libc::F_GETLK, &mut lock),
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

static HOOKS: [Hooks; COPIES] = [
    hooks::<0>(),
    hooks::<1>(),
    hooks::<2>(),
    hooks::<3>(),
    hooks::<4>(),
    hooks::<5>(),
    hooks::<6>(),
    hooks::<7>(),
];

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

/// The copy that a hook belongs to; the hooks are in no table before it is there.
fn copy(index: usize) -> &'static Copy {
    match INSTALLED[index].get() {
        Some(copy) => copy,
        None => unreachable!("a hook was called before it was installed"),
    }
}

unsafe extern "C" fn hooked_fcntl<const COPY: usize>(fd: c_int, cmd: c_int, arg: *mut c_void) -> c_int {
    match cmd {
        libc::F_SETLK | libc::F_GETLK | libc::F_SETLKW => {
            // SAFETY: these commands take "a pointer to a flock structure" (fcntl(2)), and os_unix passes one of its
            // own, on its stack.
            let lock = unsafe { &mut *arg.cast::<libc::flock>() };
            lock_call(COPY, fd, cmd, lock)
        }
        // SAFETY: what os_unix would have called, with what it passed.
        _ => unsafe { (copy(COPY).fcntl)(fd, cmd, arg) },
    }
}

unsafe extern "C" fn hooked_open<const COPY: usize>(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: what os_unix would have called, with what it passed.
    let fd = unsafe { (copy(COPY).open)(path, flags, mode) };
    if fd >= 0 {
        let _errno = ErrnoGuard::new();
        let mut table = lock_table();
        if Slot::load(fd) != Slot::UNKNOWN {
            table.forget(fd);
        }
        Slot::OPENED.store(fd);
    }
    fd
}

unsafe extern "C" fn hooked_close<const COPY: usize>(fd: c_int) -> c_int {
    if fd >= 0 && Slot::load(fd) != Slot::UNKNOWN {
        lock_table().forget(fd);
    }
    // SAFETY: what os_unix would have called, with what it passed.
    unsafe { (copy(COPY).close)(fd) }
}

// One lock call. --------------------------------------------------------------------------------------------

// Inlined into the hook: after a system call each return address is mispredicted on many machines, so the depth of the
// stack around it costs more than the instructions (ARCHITECTURE.md, "Speed").
#[inline(always)]
fn lock_call(copy_index: usize, fd: RawFd, cmd: c_int, lock: &mut libc::flock) -> c_int {
    let slot = Slot::load(fd);
    match slot.way() {
        Some(Way::Ofd(canonical)) => ofd_call(copy_index, slot, canonical, cmd, lock),
        Some(Way::Posix) => posix_call(copy_index, fd, cmd, lock),
        None => first_call(copy_index, fd, cmd, lock),
    }
}

fn posix_call(copy_index: usize, fd: RawFd, cmd: c_int, lock: &mut libc::flock) -> c_int {
    let lock: *mut libc::flock = lock;
    // SAFETY: what os_unix would have called, with what it passed.
    unsafe { (copy(copy_index).fcntl)(fd, cmd, lock) }
}

// The last thing it does to lock is a call of three arguments, of which the compiler makes a jump: the system call is as
// deep in the stack as without the hook. A structure of its own to pass, a copy of `lock`, would make that impossible.
#[inline(always)]
fn ofd_call(copy_index: usize, slot: Slot, canonical: RawFd, cmd: c_int, lock: &mut libc::flock) -> c_int {
    if cmd == libc::F_GETLK {
        return ofd_getlk(copy_index, canonical, lock);
    }
    // "EBADF: cmd is F_SETLK or F_SETLKW and the file descriptor open mode doesn't match with the type of lock
    // requested" (fcntl(2)): the user's mode counts, not the canonical description's.
    if slot.is_read_only() && c_int::from(lock.l_type) == libc::F_WRLCK {
        sys::set_errno(libc::EBADF);
        return -1;
    }
    // "The l_pid field must be set to zero", fcntl(2) on open file description locks. To F_SETLK it means nothing,
    // and os_unix neither sets nor reads it.
    lock.l_pid = 0;
    let ofd_cmd = if cmd == libc::F_SETLKW { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
    let lock: *mut libc::flock = lock;
    // SAFETY: a lock command with its flock structure; `canonical` is open as long as the user has its slot.
    unsafe { (copy(copy_index).fcntl)(canonical, ofd_cmd, lock) }
}

/// F_GETLK: the answer is copied back only if there is one.
#[inline(never)]
fn ofd_getlk(copy_index: usize, canonical: RawFd, lock: &mut libc::flock) -> c_int {
    let mut request = libc::flock { l_pid: 0, ..*lock };
    let request_ptr: *mut libc::flock = &raw mut request;
    // SAFETY: a lock command with its flock structure; `canonical` is open as long as the user has its slot.
    let result = unsafe { (copy(copy_index).fcntl)(canonical, libc::F_OFD_GETLK, request_ptr) };
    if result == 0 {
        *lock = request;
    }
    result
}

/// The first lock call of a descriptor: finds its inode's way, or decides it.
#[cold]
#[inline(never)]
fn first_call(copy_index: usize, fd: RawFd, cmd: c_int, lock: &mut libc::flock) -> c_int {
    let errno = ErrnoGuard::new();
    let adopted = lock_table().adopt(copy_index, fd);
    drop(errno);
    let (slot, is_first_of_inode) = match adopted {
        Ok(adopted) => adopted,
        Err(error) => {
            // os_unix makes SQLITE_IOERR_LOCK of these; of ENOLCK it would make SQLITE_BUSY.
            sys::set_errno(error.raw_os_error().unwrap_or(libc::EMFILE));
            return -1;
        }
    };
    let Some(Way::Ofd(canonical)) = slot.way() else {
        return posix_call(copy_index, fd, cmd, lock);
    };
    let result = ofd_call(copy_index, slot, canonical, cmd, lock);
    let is_refused = result == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL);
    if is_first_of_inode && is_refused {
        // The file system does not have such locks. Nothing is locked yet, so the inode can still change its way.
        lock_table().fall_back_to_posix(fd, "the kernel does not support them for this file (EINVAL)");
        return posix_call(copy_index, fd, cmd, lock);
    }
    result
}

// What the hooks know of a descriptor number. ---------------------------------------------------------------

/// One word, so that a lock call after the first needs one load and no mutex: bits 0 and 1 are the kind, bit 2 says
/// read-only, the rest is the canonical descriptor.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Slot(u32);

/// Which way the lock calls of a user go.
enum Way {
    Posix,
    Ofd(RawFd),
}

const CHUNK: usize = 1024;
const CHUNKS: usize = 1024;
type Chunk = [AtomicU32; CHUNK];

/// Slots by descriptor number, up to 2^20 (Linux's default `fs.nr_open`); chunks come into being when first needed.
static SLOTS: [AtomicPtr<Chunk>; CHUNKS] = [const { AtomicPtr::new(ptr::null_mut()) }; CHUNKS];

impl Slot {
    /// Not opened through a hook, and not a user.
    const UNKNOWN: Slot = Slot(0);
    /// Opened through a hook, not yet a user.
    const OPENED: Slot = Slot(1);
    const POSIX: Slot = Slot(2);
    const KIND_OFD: u32 = 3;

    fn ofd(canonical: RawFd, is_read_only: bool) -> Slot {
        Slot(canonical.unsigned_abs() << 3 | u32::from(is_read_only) << 2 | Slot::KIND_OFD)
    }

    #[inline]
    fn way(self) -> Option<Way> {
        match self.0 & 3 {
            Slot::KIND_OFD => RawFd::try_from(self.0 >> 3).ok().map(Way::Ofd),
            _ if self == Slot::POSIX => Some(Way::Posix),
            _ => None,
        }
    }

    fn is_read_only(self) -> bool {
        self.0 & 4 != 0
    }

    #[inline]
    fn cell(fd: RawFd) -> Option<&'static AtomicU32> {
        let fd = usize::try_from(fd).ok()?;
        let chunk = SLOTS.get(fd / CHUNK)?.load(Ordering::Acquire);
        // SAFETY: null, or a chunk that `make_cell` has leaked.
        let chunk = unsafe { chunk.as_ref() }?;
        Some(&chunk[fd % CHUNK])
    }

    /// Called with the table's mutex held.
    fn make_cell(fd: RawFd) -> Option<&'static AtomicU32> {
        let place = SLOTS.get(usize::try_from(fd).ok()? / CHUNK)?;
        if place.load(Ordering::Acquire).is_null() {
            let chunk = Box::leak(Box::new([const { AtomicU32::new(0) }; CHUNK]));
            place.store(chunk, Ordering::Release);
        }
        Slot::cell(fd)
    }

    #[inline]
    fn load(fd: RawFd) -> Slot {
        Slot::cell(fd).map_or(Slot::UNKNOWN, |cell| Slot(cell.load(Ordering::Acquire)))
    }

    /// False if the descriptor number is beyond all chunks.
    fn store(self, fd: RawFd) -> bool {
        let cell = if self == Slot::UNKNOWN { Slot::cell(fd) } else { Slot::make_cell(fd) };
        cell.map(|cell| cell.store(self.0, Ordering::Release)).is_some()
    }
}

// The table of inodes. --------------------------------------------------------------------------------------

struct Table {
    inodes: Vec<Inode>,
    wishes: Vec<WishEntry>,
    /// The number of the last wish.
    last_wish: u64,
    /// Descriptors from before the installation, with what they were open on.
    before: Vec<(RawFd, FileId)>,
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

static TABLE: Mutex<Table> =
    Mutex::new(Table { inodes: Vec::new(), wishes: Vec::new(), last_wish: 0, before: Vec::new() });

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
                Slot::OPENED.store(user.fd);
            }
        }
    }
}

impl Table {
    /// Makes `fd` a user. True: the first of its inode.
    fn adopt(&mut self, copy_index: usize, fd: RawFd) -> io::Result<(Slot, bool)> {
        // SAFETY: os_unix is making a lock call on it, so it is open during the call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let id = sys::fstat(borrowed)?.id;
        let user = User { fd, is_read_only: sys::is_read_only(borrowed)? };
        let known = self.inodes.iter().position(|inode| inode.copy == copy_index && inode.id == id);
        let index = match known {
            Some(index) => index,
            None => {
                let is_unwanted = self.is_unwanted(copy_index, id);
                let canonical = if is_unwanted { None } else { self.decide(copy_index, borrowed, id) };
                self.inodes.push(Inode { copy: copy_index, id, canonical, is_unwanted, users: Vec::new() });
                self.inodes.len() - 1
            }
        };
        let inode = &mut self.inodes[index];
        let slot = inode.slot(&user);
        inode.users.push(user);
        if !slot.store(fd) {
            self.forget(fd);
            return Err(io::Error::other("a descriptor number beyond all slots"));
        }
        Ok((slot, known.is_none()))
    }

    /// Does a connection to this database, or to the database that this `-shm` belongs to, wish for POSIX locks?
    fn is_unwanted(&self, copy_index: usize, id: FileId) -> bool {
        let is_its_shm = |wish: &WishEntry| sys::lstat(&wish.shm_path).is_ok_and(|shm| shm.id == id);
        let mut unwanted = self.wishes.iter().filter(|wish| wish.copy == copy_index && !wish.is_close_proof);
        unwanted.any(|wish| wish.id == id || is_its_shm(wish))
    }

    /// Which way a new inode goes, if nobody minds.
    fn decide(&mut self, copy_index: usize, fd: BorrowedFd<'_>, id: FileId) -> Option<OwnedFd> {
        self.before.retain(|(fd, was)| sys::is_open_on(*fd, *was));
        if self.before.iter().any(|(before, was)| *was == id && sys::holds_posix_locks(*before)) {
            warn(
                copy_index,
                fd,
                "a connection from before kanbanlock was registered holds POSIX locks on it",
            );
            return None;
        }
        match canonical_description(fd, id) {
            Ok(canonical) => Some(canonical),
            Err(error) => {
                warn(copy_index, fd, &format!("it cannot be opened again: {error}"));
                None
            }
        }
    }

    /// `fd` is closed, or about to be.
    fn forget(&mut self, fd: RawFd) {
        Slot::UNKNOWN.store(fd);
        for inode in &mut self.inodes {
            inode.users.retain(|user| user.fd != fd);
        }
        // The last user of an inode gives up all its locks, as close(2) does with POSIX locks: at once, by F_UNLCK, since a
        // child between vfork and exec may share the description for a moment. Dropping the inode closes it.
        for inode in self.inodes.iter().filter(|inode| inode.users.is_empty()) {
            if let Some(canonical) = &inode.canonical {
                let _ = sys::ofd_unlock_all(canonical.as_fd());
            }
        }
        self.inodes.retain(|inode| !inode.users.is_empty());
    }

    fn fall_back_to_posix(&mut self, fd: RawFd, why: &str) {
        let Some(inode) = self.inodes.iter_mut().find(|inode| inode.users.iter().any(|user| user.fd == fd))
        else {
            return;
        };
        // SAFETY: os_unix is making a lock call on it, so it is open.
        warn(inode.copy, unsafe { BorrowedFd::borrow_raw(fd) }, why);
        inode.canonical = None;
        for user in &inode.users {
            inode.slot(user).store(user.fd);
        }
    }
}

impl Inode {
    fn slot(&self, user: &User) -> Slot {
        match &self.canonical {
            Some(canonical) => Slot::ofd(canonical.as_raw_fd(), user.is_read_only),
            None => Slot::POSIX,
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
    if sys::fstat(canonical.as_fd())?.id != id {
        return Err(io::Error::other("/proc/self/fd leads to another file"));
    }
    Ok(canonical)
}

fn warn(copy_index: usize, fd: BorrowedFd<'_>, why: &str) {
    let path = sys::path_of(fd);
    let message = format!("kanbanlock: {} has no close-proof locks: {why}", path.display());
    let path = path.into_os_string().into_vec();
    let database = CString::new(path.strip_suffix(b"-shm").unwrap_or(&path)).ok();
    let about = About { database: database.as_deref(), waited_ms: None };
    copy(copy_index).host.log(rc::WARNING, &message, about);
}
