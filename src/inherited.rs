//! What a forked child inherits of the database files that are open through the shim, and how it is cut off from it.
//!
//! ## The bug
//! SQLite writes to the WAL and the journal by descriptors that belong to the real VFS, and to the wal-index by shared
//! memory, without any call. A child shares all of it with its parent. If it merely closes a connection that it has
//! inherited in the middle of a write transaction, it rolls the *parent's* transaction back: it takes the parent's frames
//! out of the shared wal-index, and the parent's COMMIT is acknowledged without them; or it deletes the parent's journal.
//! And a connection that it opens by itself finds the inherited one in os_unix's list of inodes, takes part in locks that
//! only the parent has, and makes no lock call of its own.
//!
//! ## Definitions
//! *File*: a database file, open through the shim. *Ours*: a descriptor that os_unix has opened at the shim's request
//! (database, `-wal`, `-shm`, journal, temporary file), or that is open on the same file as one of these. *Dead*: a
//! descriptor that is open on nothing that can be read, written, synced, locked or looked at. *Region*: of a mapped `-shm`.
//!
//! ## Key operations
//! In the child, before fork(2) returns ([`TableGuard::let_go_in_child`]):
//! - each region becomes a private copy of what it was;
//! - each descriptor of ours becomes a dead one of the same number: SQLite still has the number, and will close it;
//! - os_unix is told another device number for each of those databases ([`Shift`]), by `fstat` and `stat` in its table
//!   of system calls. That is how it tells files apart. So a connection that the child opens gets an inode, a mapping
//!   and locks of its own. A process that is nobody's child does not have these two hooks.
//!
//! ## Invariants
//! - What SQLite does with an inherited connection ends in the child. Most of it fails; the rest happens in memory that
//!   is the child's own.
//! - A region is in the table from after it was mapped until before it is unmapped: nothing else is ever mapped over.
//! - A descriptor is in the table from its open to its close. One that is closed behind our back leaves a stale number,
//!   as it does in os_unix.
//! - All connections that the child opens to one database, `unix` ones included, are told the same device number.
//!
//! Uses: `ffi`, `real`, `sys`.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int};
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use once_cell::sync::OnceCell;

use crate::ffi;
use crate::real::RealVfs;
use crate::sys::{self, ErrnoGuard, FileId};

/// How many copies of SQLite can have hooks. A hook gets no context, so each copy needs functions of its own.
pub const COPIES: usize = 8;

/// `[$hooks::<0>(), …]`: what a generic function has for each of the [`COPIES`].
macro_rules! for_each_copy {
    ($hooks:ident) => {
        [
            $hooks::<0>(),
            $hooks::<1>(),
            $hooks::<2>(),
            $hooks::<3>(),
            $hooks::<4>(),
            $hooks::<5>(),
            $hooks::<6>(),
            $hooks::<7>(),
        ]
    };
}
pub(crate) use for_each_copy;

struct Table {
    files: Vec<File>,
    last_number: u64,
    descriptors: Vec<Descriptor>,
    shifts: Vec<Shift>,
}

struct File {
    number: u64,
    copy: usize,
    id: FileId,
    /// Address and size, in bytes.
    regions: Vec<(usize, usize)>,
}

struct Descriptor {
    fd: RawFd,
    copy: usize,
    is_ours: bool,
    is_dead: bool,
    /// Looked up in the child.
    id: Option<FileId>,
}

/// A database of which this process has inherited a connection: what os_unix knows of it by its true device number is the
/// parent's.
struct Shift {
    copy: usize,
    id: FileId,
    /// The last fork at which it was open: goes above the 32 bits that Linux has for a device.
    generation: u32,
}

static TABLE: Mutex<Table> =
    Mutex::new(Table { files: Vec::new(), last_number: 0, descriptors: Vec::new(), shifts: Vec::new() });

fn lock_table() -> MutexGuard<'static, Table> {
    // Each change is one push, one retain or one assignment.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

// What is open. ---------------------------------------------------------------------------------------------

thread_local! {
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// What os_unix opens during `call` is ours.
pub fn as_ours<T>(call: impl FnOnce() -> T) -> T {
    struct Reset(bool);
    impl Drop for Reset {
        fn drop(&mut self) {
            IS_OURS.set(self.0);
        }
    }
    let _reset = Reset(IS_OURS.replace(true));
    call()
}

/// os_unix has opened `fd`.
pub fn opened(copy: usize, fd: RawFd) {
    let _errno = ErrnoGuard::new();
    let is_ours = IS_OURS.get();
    let descriptor = Descriptor { fd, copy, is_ours, is_dead: false, id: None };
    let descriptors = &mut lock_table().descriptors;
    descriptors.retain(|known| known.fd != fd);
    descriptors.push(descriptor);
}

/// os_unix closes `fd`.
pub fn closed(fd: RawFd) {
    let _errno = ErrnoGuard::new();
    lock_table().descriptors.retain(|known| known.fd != fd);
}

/// True for a descriptor that the parent has left us dead.
pub fn is_dead(fd: RawFd) -> bool {
    lock_table().descriptors.iter().any(|known| known.fd == fd && known.is_dead)
}

/// An open file, until this is dropped.
#[derive(Debug)]
pub struct Record(u64);

impl Record {
    /// A database file just opened through that copy's hooks.
    pub fn new(copy: usize, id: FileId) -> Record {
        let mut table = lock_table();
        table.last_number += 1;
        let number = table.last_number;
        table.files.push(File { number, copy, id, regions: Vec::new() });
        Record(number)
    }

    /// xShmMap has answered with this address.
    pub fn mapped(&self, address: usize, size: usize) {
        self.change(|file| file.regions.push((address, size)));
    }

    /// xShmUnmap is about to be called.
    pub fn about_to_unmap(&self) {
        self.change(|file| file.regions.clear());
    }

    fn change(&self, change: impl FnOnce(&mut File)) {
        // Not found: it was inherited.
        if let Some(file) = lock_table().files.iter_mut().find(|file| file.number == self.0) {
            change(file);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        lock_table().files.retain(|file| file.number != self.0);
    }
}

// In the child. ---------------------------------------------------------------------------------------------

/// The table's mutex, held across a fork.
pub struct TableGuard(MutexGuard<'static, Table>);

/// For `fork.rs`: nobody is in the middle of a change when the process is copied.
pub fn lock_for_fork() -> TableGuard {
    TableGuard(lock_table())
}

impl TableGuard {
    /// Cuts the child off from its parent's files. `generation`: of the child.
    pub fn let_go_in_child(mut self, generation: u32) {
        let Table { files, descriptors, shifts, .. } = &mut *self.0;
        for descriptor in &mut *descriptors {
            descriptor.id = sys::id_of(descriptor.fd);
        }
        for at in 0..descriptors.len() {
            let it = &descriptors[at];
            let is_same = |other: &Descriptor| {
                other.is_ours && other.copy == it.copy && other.id.is_some() && other.id == it.id
            };
            // os_unix reuses a descriptor that another connection has left, perhaps one that is not ours.
            let is_files = files.iter().any(|file| file.copy == it.copy && Some(file.id) == it.id);
            let dies = it.is_ours || is_files || descriptors.iter().any(is_same);
            descriptors[at].is_dead |= dies;
        }
        sys::kill_descriptors(descriptors.iter().filter(|it| it.is_dead).map(|it| it.fd));
        for file in files.drain(..) {
            for (address, size) in file.regions {
                // SAFETY: os_unix has this region mapped (Record), and uses it as plain memory; no other thread is left.
                unsafe { sys::make_private(address, size) };
            }
            match shifts.iter_mut().find(|shift| shift.copy == file.copy && shift.id == file.id) {
                Some(shift) => shift.generation = generation,
                None => shifts.push(Shift { copy: file.copy, id: file.id, generation }),
            }
            install_hooks(file.copy);
        }
        for descriptor in descriptors {
            descriptor.is_ours = false;
        }
    }
}

// The hooks. ------------------------------------------------------------------------------------------------

type Fstat = unsafe extern "C" fn(c_int, *mut libc::stat) -> c_int;
type Stat = unsafe extern "C" fn(*const c_char, *mut libc::stat) -> c_int;

/// What was in a copy's table before.
struct Next {
    fstat: Fstat,
    stat: Stat,
}

static NEXT: [OnceCell<Next>; COPIES] = [const { OnceCell::new() }; COPIES];

/// The VFS by which to reach a copy's table.
static REAL: [AtomicPtr<ffi::sqlite3_vfs>; COPIES] = [const { AtomicPtr::new(ptr::null_mut()) }; COPIES];

const FSTAT: &CStr = c"fstat";
const STAT: &CStr = c"stat";

/// Whether the table that `real` uses has what a child replaces. Remembers it as that copy's, then.
pub fn prepare_copy(copy: usize, real: RealVfs) -> bool {
    let has_both = [FSTAT, STAT].iter().all(|name| real.system_call(name).is_some());
    if let Some(place) = REAL.get(copy).filter(|_| has_both) {
        place.store(real.as_ptr(), Ordering::Release);
    }
    has_both
}

/// In a child, once; its own children inherit them. os_unix's xSetSystemCall is an assignment, and takes no mutex.
fn install_hooks(copy: usize) {
    let (Some(next), Some(real), Some(hooks)) = (NEXT.get(copy), REAL.get(copy), HOOKS.get(copy)) else {
        return;
    };
    let Some(real) = NonNull::new(real.load(Ordering::Acquire)).filter(|_| next.get().is_none()) else {
        return;
    };
    // SAFETY: prepare_copy has got it from a RealVfs.
    let real = unsafe { RealVfs::new(real) };
    let (Some(fstat), Some(stat)) = (real.system_call(FSTAT), real.system_call(STAT)) else { return };
    let was_set = next.set(Next {
        // SAFETY: os_unix's table holds, under this name, a function of this type (its cast is
        // `(int(*)(int,struct stat*))`); whoever has replaced it must have kept to that.
        fstat: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Fstat>(fstat) },
        // SAFETY: ditto: `(int(*)(const char*,struct stat*))`.
        stat: unsafe { std::mem::transmute::<unsafe extern "C" fn(), Stat>(stat) },
    });
    if was_set.is_ok() {
        // SAFETY: a hook of the type that os_unix calls under this name.
        unsafe { real.set_system_call(FSTAT, hooks.0) };
        // SAFETY: a hook of the type that os_unix calls under this name.
        unsafe { real.set_system_call(STAT, hooks.1) };
    }
}

type Hooks = (unsafe extern "C" fn(), unsafe extern "C" fn());

static HOOKS: [Hooks; COPIES] = for_each_copy!(hooks);

const fn hooks<const COPY: usize>() -> Hooks {
    let fstat: Fstat = hooked_fstat::<COPY>;
    let stat: Stat = hooked_stat::<COPY>;
    // SAFETY: a function pointer stays one; nobody calls it by this type. os_unix casts it back.
    let fstat = unsafe { std::mem::transmute::<Fstat, unsafe extern "C" fn()>(fstat) };
    // SAFETY: ditto.
    let stat = unsafe { std::mem::transmute::<Stat, unsafe extern "C" fn()>(stat) };
    (fstat, stat)
}

unsafe extern "C" fn hooked_fstat<const COPY: usize>(fd: c_int, to: *mut libc::stat) -> c_int {
    let Some(next) = NEXT[COPY].get().filter(|_| !is_dead(fd)) else {
        sys::set_errno(libc::EBADF);
        return -1;
    };
    // SAFETY: what os_unix would have called, with what it passed.
    let result = unsafe { (next.fstat)(fd, to) };
    // SAFETY: os_unix's structure, which the call has filled if it has succeeded.
    unsafe { shift(COPY, result, to) }
}

unsafe extern "C" fn hooked_stat<const COPY: usize>(path: *const c_char, to: *mut libc::stat) -> c_int {
    let Some(next) = NEXT[COPY].get() else {
        sys::set_errno(libc::ENOSYS);
        return -1;
    };
    // SAFETY: what os_unix would have called, with what it passed.
    let result = unsafe { (next.stat)(path, to) };
    // SAFETY: os_unix's structure, which the call has filled if it has succeeded.
    unsafe { shift(COPY, result, to) }
}

/// # Safety
///
/// `to` is what fstat(2) or stat(2) has filled, if `result` is 0.
unsafe fn shift(copy: usize, result: c_int, to: *mut libc::stat) -> c_int {
    if result == 0 {
        let _errno = ErrnoGuard::new();
        // SAFETY: filled, hence valid (caller).
        let to = unsafe { &mut *to };
        let id = FileId::new(to.st_dev, to.st_ino);
        let table = lock_table();
        if let Some(shift) = table.shifts.iter().find(|shift| shift.copy == copy && shift.id == id) {
            to.st_dev |= libc::dev_t::from(shift.generation) << 32;
        }
    }
    result
}
