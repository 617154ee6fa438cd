//! The hint file `<db>.lock-queue`: how the processes that wait for one lock file find the same shared memory.
//!
//! ## The problem
//! The queue's board (`queue.rs`) must lie in memory that all of them share. A mapped file beside the database would do, but
//! whoever truncates it (`open(path, "w")`), or fills the disk, would kill every process that looks at it: SIGBUS.
//!
//! ## The solution
//! The memory is a *sealed memory file* (memfd_create(2)): no name, no disk, and by its seals of a size that nobody can
//! change. The hint file is one line of text that says where to find it: a process that has it open, and its descriptor
//! there, to be opened through `/proc/PID/fd/FD`. What is opened so is used only if the kernel says that it is sealed and of
//! the right size, and if it says itself that it belongs to this lock file: the text is a hint.
//!
//! ## Invariants
//! - The hint file is made by the first connection that is *refused* (before that there is nothing to wait for), is never
//!   mapped, and is written only while it is empty or begins as ours do, under its own flock.
//! - If that process is gone, the next that looks makes new memory and writes where it is; the others notice at their next
//!   look, once in a tick of the kernel's clock while they acquire, and at each poll while they wait.
//! - *Gone* is not what `/proc` says, which may show another process under that number, or none at all (another pid
//!   namespace, `hidepid`). As long as the process has the memory open, it also keeps a byte of the hint file read-locked
//!   (F_OFD_SETLK), the byte whose offset is the memory's inode number. Who cannot have memory that is still kept polls, and
//!   leaves the hint file alone.
//! - Nothing here is needed for safety: any failure means *polling*, with one line in the log. Another pid namespace, another
//!   user (proc(5): "permission to dereference or read the symbolic links … is governed by a ptrace access mode
//!   PTRACE_MODE_READ_FSCREDS check"), no `/proc`: polling.
//! - The dates on the board are those of the machine's monotonic clock; processes of another time namespace reckon with the
//!   difference ([`sys::learn_time_namespace`]).
//!
//! Uses: `fork`, `queue`, `sys`.

use std::ffi::{CStr, CString, OsStr, c_int};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::mem::{align_of, size_of};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};

use crate::fork;
use crate::queue::Board;
use crate::sys::{self, Create, FileId};

/// What is mapped: whole pages.
const SIZE: usize = size_of::<Board>().next_multiple_of(4096);
const _: () = assert!(align_of::<Board>() <= 4096, "mmap(2) gives page-aligned memory");

/// What the memory is called, in `/proc/PID/fd`.
const MEMORY_NAME: &str = "kanbanlock-queue";
/// How a hint file of ours begins.
const TITLE: &str = "kanbanlock queue 1\n";
/// More than any of ours is long.
const LONGEST: usize = 256;
/// How often it is tried again to get what another process has for a moment only …
const ATTEMPTS: u32 = 100;
/// … and how long after, in microseconds, if that process is about to end.
const ATTEMPT_PAUSE: u64 = 50;

/// The board of one lock file, shared by all connections of this process.
#[derive(Debug)]
pub struct Hint {
    board: NonNull<Board>,
    lock_file: FileId,
    /// Others open it through `/proc`.
    memory: Option<OwnedFd>,
    /// The lock file once more, to try its flock with: an open file description of its own, so that unlocking it cannot
    /// unlock a connection's.
    probe: Option<OwnedFd>,
    /// The hint file, and what it said when we found the board.
    file: Option<File>,
    /// What the hint file, the probe and the memory were open on: other code may close their numbers (`descriptor.rs`).
    ids: [FileId; 3],
    text: String,
    /// The `fork::generation` that this belongs to.
    generation: u32,
}

// SAFETY: the board is made of atomics, in memory that stays mapped as long as the Hint lives; the rest is Send and Sync.
unsafe impl Send for Hint {}
// SAFETY: ditto.
unsafe impl Sync for Hint {}

/// A seat's hold on the board.
#[derive(Clone, Debug)]
pub struct SharedHint(pub Arc<Hint>);

impl AsRef<Board> for SharedHint {
    #[inline]
    fn as_ref(&self) -> &Board {
        // SAFETY: mapped, page-aligned, SIZE bytes that no-one can take away (sealed), all atomics, for which any bytes are
        // valid; unmapped only when the Hint is dropped.
        unsafe { self.0.board.as_ref() }
    }
}

/// Why there is no board.
#[derive(Debug)]
pub enum NoBoard {
    /// There is no hint file: nobody has waited here yet.
    Nobody,
    /// Something that the user should know of.
    Because(String),
}

impl From<io::Error> for NoBoard {
    fn from(error: io::Error) -> NoBoard {
        NoBoard::Because(error.to_string())
    }
}

fn because<T>(text: impl Into<String>) -> Result<T, NoBoard> {
    Err(NoBoard::Because(text.into()))
}

/// The boards that connections of this process sit at.
static BOARDS: Mutex<Vec<Weak<Hint>>> = Mutex::new(Vec::new());

/// `None`: another thread is at it; or was, when this process was forked, and then it stays so. Nothing is lost but a few
/// descriptors that could have been shared.
fn boards() -> Option<MutexGuard<'static, Vec<Weak<Hint>>>> {
    match BOARDS.try_lock() {
        Ok(boards) => Some(boards),
        // A push or a retain leaves the list whole.
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// The board of the lock file at `path`, which is open as `lock_file`; its hint file is at `hint_path`. `may_create`: make
/// a hint file if there is none. Where there is none and it may not, nothing is allocated.
///
/// # Errors
///
/// [`NoBoard`]. Then there is nothing but polling.
pub fn find(
    path: &CStr,
    hint_path: &CStr,
    lock_file: FileId,
    may_create: bool,
) -> Result<SharedHint, NoBoard> {
    if let Some(mut boards) = boards() {
        boards.retain(|board| board.strong_count() > 0);
        let known = boards.iter().filter_map(Weak::upgrade);
        let mut known = known.filter(|hint| hint.lock_file == lock_file && hint.is_current());
        if let Some(hint) = known.next() {
            return Ok(SharedHint(hint));
        }
    }
    let hint = Arc::new(open(path, hint_path, lock_file, may_create)?);
    if let Some(mut boards) = boards() {
        boards.push(Arc::downgrade(&hint));
    }
    Ok(SharedHint(hint))
}

/// Shows `look` the board, which it may only read: it is mapped so. Creates and changes nothing.
///
/// # Errors
///
/// [`NoBoard`]
pub fn view<T>(path: &CStr, lock_file: FileId, look: impl FnOnce(&Board) -> T) -> Result<T, NoBoard> {
    let name = |path: &CStr| Path::new(OsStr::from_bytes(path.to_bytes())).to_owned();
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file = match File::options().read(true).custom_flags(flags).open(name(&hint_path(path))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(NoBoard::Nobody),
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        return because("it is not a regular file; remove it");
    }
    sys::learn_time_namespace()?;
    let place = MemoryAddress::parse(&read(&mut file)?, path)?.ok_or(NoBoard::Nobody)?;
    let memory = place.open(lock_file, libc::O_RDONLY)?.ok_or(NoBoard::Nobody)?;
    Ok(look(Mapping::new(&memory, libc::O_RDONLY)?.board()))
}

/// `<db>.lock-queue`
fn hint_path(path: &CStr) -> CString {
    let mut hint_path = path.to_bytes().to_vec();
    hint_path.extend_from_slice(b"-queue");
    CString::new(hint_path).unwrap_or_default()
}

fn open(path: &CStr, hint_path: &CStr, lock_file: FileId, may_create: bool) -> Result<Hint, NoBoard> {
    let mut file = open_hint_file(path, hint_path, may_create)?;
    sys::learn_time_namespace()?;
    for attempt in 0.. {
        let text = read(&mut file)?;
        if let Some(place) = MemoryAddress::parse(&text, path)? {
            match place.open(lock_file, libc::O_RDWR) {
                Ok(Some(memory)) => return Hint::new(memory, path, lock_file, file, text),
                Ok(None) if !place.is_kept(&file) => {}
                // A process that ends loses its /proc/PID/fd a moment before its locks.
                Ok(None) if attempt < ATTEMPTS => {
                    sys::sleep(ATTEMPT_PAUSE);
                    continue;
                }
                Ok(None) => return because(place.invisible()),
                Err(_) if !place.is_kept(&file) => {}
                Err(reason) => return Err(reason),
            }
        }
        // Nobody has it any more: new memory. One at a time; the others read again.
        if !sys::flock_exclusive_nb(file.as_fd())? {
            if attempt >= ATTEMPTS {
                return because("its flock is held by somebody else");
            }
            std::thread::yield_now();
            continue;
        }
        let made = if read(&mut file)? == text { make(path, lock_file, &mut file) } else { Ok(None) };
        let _ = sys::flock_unlock(file.as_fd());
        if let Some((memory, text)) = made? {
            return Hint::new(memory, path, lock_file, file, text);
        }
    }
    because("it changes all the time")
}

/// The hint file, created with the lock file's mode and owner.
fn open_hint_file(path: &CStr, hint_path: &CStr, may_create: bool) -> Result<File, NoBoard> {
    let opened = match sys::open(hint_path, Create::No) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if !may_create {
                return Err(NoBoard::Nobody);
            }
            create_hint_file(path, hint_path)
        }
        opened => opened,
    };
    let file = File::from(opened.or_else(|error| because(advice(&error)))?);
    if !file.metadata()?.is_file() {
        return because("it is not a regular file; remove it");
    }
    Ok(file)
}

fn create_hint_file(path: &CStr, hint_path: &CStr) -> io::Result<OwnedFd> {
    let like = sys::stat(path)?;
    match sys::open(hint_path, Create::New(like.mode & 0o777)) {
        Ok(fd) => {
            // As for the lock file itself (`descriptor.rs`): not ours to insist.
            let _ = sys::fchmod(fd.as_fd(), like.mode & 0o777);
            let _ = sys::fchown(fd.as_fd(), like.uid, like.gid);
            Ok(fd)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => sys::open(hint_path, Create::No),
        Err(error) => Err(error),
    }
}

/// Why it cannot be opened or created, and what to do.
fn advice(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EISDIR) => "it is a directory; remove it".to_owned(),
        Some(libc::ELOOP) => "it is a symbolic link; remove it".to_owned(),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => format!(
            "{error}: give it the lock file's owner and mode, or, if it does not exist, make the folder writable"
        ),
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => {
            format!("{error}: free some space (it is one line of text)")
        }
        _ => error.to_string(),
    }
}

fn read(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    Read::by_ref(file).take(LONGEST as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// New memory, and where it is into the hint file.
fn make(path: &CStr, lock_file: FileId, file: &mut File) -> Result<Option<(OwnedFd, String)>, NoBoard> {
    let memory = sys::sealed_memory(MEMORY_NAME, SIZE)?;
    // The memory's mode decides, beside ptrace's rules, who may open it through /proc.
    // Nobody executes it: sealed so (MFD_NOEXEC_SEAL), it could not even be allowed.
    sys::fchmod(memory.as_fd(), sys::stat(path)?.mode & 0o666)?;
    let mapping = Mapping::new(&memory, libc::O_RDWR)?;
    mapping.board().initialise(lock_file.numbers());
    let inode = sys::fstat(memory.as_fd())?.id.numbers().1;
    let place = MemoryAddress {
        namespace: pid_namespace()?,
        pid: std::process::id(),
        fd: fd_number(&memory)?,
        inode,
    };
    let text = place.text();
    // Where the file system has no such locks (EINVAL, ENOLCK), `is_kept` cannot tell either.
    let _ = sys::ofd_share_byte_nb(file.as_fd(), place.byte());
    let mut write = || {
        file.seek(SeekFrom::Start(0))?;
        file.write_all(text.as_bytes())?;
        file.set_len(text.len() as u64)
    };
    write().or_else(|error| because(advice(&error)))?;
    Ok(Some((memory, text)))
}

/// The pid namespace: pids of another one mean nothing here. namespaces(7)
fn pid_namespace() -> io::Result<u64> {
    Ok(std::fs::metadata("/proc/self/ns/pid")?.ino())
}

/// What a hint file says.
struct MemoryAddress {
    namespace: u64,
    pid: u32,
    fd: u32,
    inode: u64,
}

impl MemoryAddress {
    fn text(&self) -> String {
        let MemoryAddress { namespace, pid, fd, inode } = self;
        format!("{TITLE}{namespace} {pid} {fd} {inode}\n")
    }

    /// `None`: it is empty, damaged, or half-written.
    fn parse(text: &str, path: &CStr) -> Result<Option<MemoryAddress>, NoBoard> {
        let Some(line) = text.strip_prefix(TITLE) else {
            if TITLE.starts_with(text) {
                return Ok(None);
            }
            let path = Path::new(OsStr::from_bytes(path.to_bytes())).display();
            return because(format!("{path}-queue holds something else than kanbanlock's; remove it"));
        };
        let mut numbers = line.strip_suffix('\n').unwrap_or("").split(' ').map(str::parse);
        let mut next = || numbers.next().and_then(Result::ok);
        let (namespace, pid, fd, inode) = (next(), next(), next(), next());
        let narrow = |number: Option<u64>| number.and_then(|number| u32::try_from(number).ok());
        let place = || {
            Some(MemoryAddress { namespace: namespace?, pid: narrow(pid)?, fd: narrow(fd)?, inode: inode? })
        };
        Ok(place())
    }

    /// `None`: it is not there any more.
    fn open(&self, lock_file: FileId, access_mode: c_int) -> Result<Option<OwnedFd>, NoBoard> {
        if self.namespace != pid_namespace()? {
            return because(
                "it belongs to processes of another pid namespace (another container). For one queue, let all that open \
                 this database share a pid namespace",
            );
        }
        let memory = match sys::reopen_sealed_memory(self.pid, self.fd, MEMORY_NAME, access_mode) {
            Ok(memory) => memory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return because(format!(
                    "the memory of process {}: {error}. It belongs to another user, or has more privileges; for one \
                     queue, let one user open this database",
                    self.pid
                ));
            }
            Err(error) => return because(format!("the memory of process {}: {error}", self.pid)),
        };
        let is_it = sys::is_sealed_memory(memory.as_fd(), SIZE)
            && sys::fstat(memory.as_fd())?.id.numbers().1 == self.inode
            && Mapping::new(&memory, access_mode)?.board().is_of(lock_file.numbers());
        Ok(is_it.then_some(memory))
    }

    /// True while the process that has written this has the memory open, wherever it is; or if that cannot be told.
    fn is_kept(&self, file: &File) -> bool {
        sys::ofd_is_byte_locked(file.as_fd(), self.byte()).unwrap_or(true)
    }

    /// The byte of the hint file that says so.
    fn byte(&self) -> usize {
        // Within the range of off_t, whatever the file says.
        usize::try_from(self.inode % (1 << 62)).unwrap_or(0)
    }

    fn invisible(&self) -> String {
        format!(
            "process {} has the queue's memory, and cannot be seen from here (/proc mounted with hidepid, another \
             machine)",
            self.pid
        )
    }
}

fn fd_number(fd: &OwnedFd) -> Result<u32, NoBoard> {
    u32::try_from(fd.as_raw_fd()).or_else(|error| because(error.to_string()))
}

/// Mapped memory, unmapped on drop.
struct Mapping(NonNull<Board>);

impl Mapping {
    /// `memory`: sealed, of SIZE bytes, and open in this mode.
    fn new(memory: &OwnedFd, access_mode: c_int) -> io::Result<Mapping> {
        sys::map_shared(memory.as_fd(), SIZE, access_mode).map(|address| Mapping(address.cast()))
    }

    fn board(&self) -> &Board {
        // SAFETY: as for SharedHint::as_ref; unmapped only on drop.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what map_shared gave for SIZE bytes; `board` lends it for the life of the Mapping only.
        unsafe { sys::unmap(self.0.cast(), SIZE) };
    }
}

impl Hint {
    fn new(
        memory: OwnedFd,
        path: &CStr,
        lock_file: FileId,
        file: File,
        text: String,
    ) -> Result<Hint, NoBoard> {
        let probe = sys::open(path, Create::No)?;
        if sys::fstat(probe.as_fd())?.id != lock_file {
            return because("the lock file was replaced");
        }
        let ids = [sys::fstat(file.as_fd())?.id, lock_file, sys::fstat(memory.as_fd())?.id];
        let board = sys::map_shared(memory.as_fd(), SIZE, libc::O_RDWR)?.cast();
        for fd in [memory.as_raw_fd(), probe.as_raw_fd(), file.as_raw_fd()] {
            fork::close_in_child(fd);
        }
        let (memory, probe, file) = (Some(memory), Some(probe), Some(file));
        Ok(Hint { board, lock_file, memory, probe, file, ids, text, generation: fork::generation() })
    }

    /// True in the child of a fork, for what the parent opened.
    pub fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    /// True while the hint file leads to this board. (Not in the child of a fork.)
    pub fn is_current(&self) -> bool {
        let Some(file) = self.file.as_ref().filter(|_| !self.is_inherited()) else { return false };
        let mut text = [0; LONGEST];
        if self.probe.as_ref().is_some_and(|probe| sys::is_lost(probe, self.lock_file)) {
            return false;
        }
        let is_linked = sys::fstat(file.as_fd())
            .is_ok_and(|attributes| attributes.links > 0 && attributes.id == self.ids[0]);
        is_linked && file.read_at(&mut text, 0).is_ok_and(|length| text[..length] == *self.text.as_bytes())
    }

    /// True if nobody holds the flock of the lock file: takes it, and gives it back.
    pub fn is_free(&self) -> bool {
        let Some(probe) = self.probe.as_ref().filter(|_| !self.is_inherited()) else { return false };
        if sys::is_lost(probe, self.lock_file) {
            return false;
        }
        let is_free = sys::flock_exclusive_nb(probe.as_fd()).unwrap_or(false);
        if is_free {
            let _ = sys::flock_unlock(probe.as_fd());
        }
        is_free
    }
}

impl Drop for Hint {
    fn drop(&mut self) {
        let is_inherited = self.is_inherited();
        // The hint file first, and with it the lock that says that the memory is there.
        let files = [self.file.take().map(OwnedFd::from), self.probe.take(), self.memory.take()];
        for (fd, id) in files.into_iter().zip(self.ids) {
            let Some(fd) = fd else { continue };
            if !is_inherited {
                fork::forget(fd.as_raw_fd());
            }
            // The child's atfork handler has closed it, or other code has: the number may be anything by now.
            if is_inherited || sys::is_lost(&fd, id) {
                std::mem::forget(fd);
            }
        }
        // SAFETY: what map_shared gave for SIZE bytes; a seat that used it held the Hint, so there is none any more.
        unsafe { sys::unmap(self.board.cast(), SIZE) };
    }
}
