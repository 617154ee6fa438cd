//! The system calls behind the lock file and the close-proof locks, as safe functions: open(2), stat(2), flock(2),
//! fchmod(2), fchown(2), fcntl(2), clock_gettime(2), and what `/proc/self` tells of descriptors.
//!
//! Each function makes one call, retried on EINTR where the manual allows it, with the error as [`io::Error`]. What the
//! errors mean is for `gate.rs` and `ofd.rs` to say.
//!
//! [`ErrnoGuard`] keeps the promise of ARCHITECTURE.md ("errno"): SQLite's core asks `xGetLastError` after a
//! failure, and must find the errno that the *real* VFS left, not one of ours.
//!
//! Uses: nothing.

use std::ffi::{CStr, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Restores errno, as it was when this was made, on drop.
#[derive(Debug)]
pub struct ErrnoGuard(c_int);

impl ErrnoGuard {
    /// Remembers errno.
    #[inline]
    #[must_use]
    pub fn new() -> ErrnoGuard {
        ErrnoGuard(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

/// Sets errno.
pub fn set_errno(errno: c_int) {
    drop(ErrnoGuard(errno));
}

impl Drop for ErrnoGuard {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: errno(3): "errno is thread-local", and __errno_location() gives this thread's own, which
        // lives as long as the thread; it takes no argument that could be wrong.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: `errno` is this thread's errno (above): valid, aligned, and written by this thread only.
        unsafe { *errno = self.0 };
    }
}

/// What a file is: enough to tell whether two names, or a name and a descriptor, are one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: libc::dev_t,
    inode: libc::ino_t,
}

impl FileId {
    /// From device and inode numbers.
    pub fn new(device: libc::dev_t, inode: libc::ino_t) -> FileId {
        FileId { device, inode }
    }

    /// As `/proc/locks` writes it: `MAJOR:MINOR:INODE`, the device in hexadecimal. proc(5)
    pub fn in_proc_locks(&self) -> String {
        let (major, minor) = (libc::major(self.device), libc::minor(self.device));
        format!("{major:02x}:{minor:02x}:{}", self.inode)
    }
}

/// The attributes that the lock file's rules ask about.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Device and inode.
    pub id: FileId,
    /// `st_mode`: type and permissions.
    pub mode: libc::mode_t,
    /// Owner.
    pub uid: libc::uid_t,
    /// Group.
    pub gid: libc::gid_t,
    /// `st_size`, in bytes.
    pub size: libc::off_t,
    /// How many names lead to it.
    pub links: libc::nlink_t,
    /// `st_ctim`, in seconds and nanoseconds: "the time of the last status change", inode(7).
    pub changed: (libc::time_t, libc::c_long),
}

impl Attributes {
    /// S_ISREG
    pub fn is_regular(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// What a person would call this type of file.
    pub fn type_name(&self) -> &'static str {
        match self.mode & libc::S_IFMT {
            libc::S_IFREG => "a regular file",
            libc::S_IFDIR => "a directory",
            libc::S_IFLNK => "a symbolic link",
            libc::S_IFIFO => "a FIFO",
            libc::S_IFSOCK => "a socket",
            libc::S_IFCHR | libc::S_IFBLK => "a device",
            _ => "a file of unknown type",
        }
    }
}

impl From<libc::stat> for Attributes {
    fn from(stat: libc::stat) -> Attributes {
        Attributes {
            id: FileId::new(stat.st_dev, stat.st_ino),
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size,
            links: stat.st_nlink,
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// How [`open`] treats a path with nothing there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// ENOENT
    No,
    /// O_CREAT|O_EXCL with this mode: a new file, or EEXIST.
    New(libc::mode_t),
}

/// open(2) for reading and writing, with every flag that keeps a lock file from harm:
/// O_CLOEXEC (an exec'd child must not keep the lock), O_NOFOLLOW (ELOOP on a symbolic link),
/// O_NONBLOCK (do not hang on a FIFO or a device), O_NOCTTY; never O_TRUNC.
pub fn open(path: &CStr, create: Create) -> io::Result<OwnedFd> {
    let base = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let (flags, mode) = match create {
        Create::No => (base, 0),
        Create::New(mode) => (base | libc::O_CREAT | libc::O_EXCL, mode),
    };
    let fd = retry_eintr(|| {
        // SAFETY: `path` is a NUL-terminated string that outlives the call, and with O_CREAT open(2) takes
        // exactly one further argument, a mode, which it gets (and ignores without O_CREAT).
        unsafe { libc::open(path.as_ptr(), flags, mode) }
    })?;
    // SAFETY: open(2) has just returned this descriptor, so it is open and nobody else's to close.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// fstat(2)
#[inline]
pub fn fstat(fd: BorrowedFd<'_>) -> io::Result<Attributes> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `fd` is borrowed, hence open, and `stat` is a writable buffer of the size that fstat fills.
    check(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: fstat returned 0: stat(2) says the buffer is then filled.
    Ok(Attributes::from(unsafe { stat.assume_init() }))
}

/// stat(2): follows symbolic links.
pub fn stat(path: &CStr) -> io::Result<Attributes> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `path` is a NUL-terminated string, and `stat` is a writable buffer of the size that stat fills.
    check(unsafe { libc::stat(path.as_ptr(), stat.as_mut_ptr()) })?;
    // SAFETY: stat returned 0: stat(2) says the buffer is then filled.
    Ok(Attributes::from(unsafe { stat.assume_init() }))
}

/// lstat(2): "if pathname is a symbolic link, then it returns information about the link itself".
pub fn lstat(path: &CStr) -> io::Result<Attributes> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `path` is a NUL-terminated string, and `stat` is a writable buffer of the size that lstat fills.
    check(unsafe { libc::lstat(path.as_ptr(), stat.as_mut_ptr()) })?;
    // SAFETY: lstat returned 0: stat(2) says the buffer is then filled.
    Ok(Attributes::from(unsafe { stat.assume_init() }))
}

/// fchmod(2)
pub fn fchmod(fd: BorrowedFd<'_>, mode: libc::mode_t) -> io::Result<()> {
    // SAFETY: `fd` is borrowed, hence open; any mode is a valid argument.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), mode) })
}

/// fchown(2)
pub fn fchown(fd: BorrowedFd<'_>, uid: libc::uid_t, gid: libc::gid_t) -> io::Result<()> {
    // SAFETY: `fd` is borrowed, hence open; any ids are valid arguments.
    check(unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) })
}

/// flock(2) with LOCK_EX|LOCK_NB: `Ok(false)` if another open file description holds the lock.
///
/// "LOCK_NB … EWOULDBLOCK: The file is locked and the LOCK_NB flag was selected." Locks "are associated with
/// an open file description": two opens exclude each other even within one process.
#[inline]
pub fn flock_exclusive_nb(fd: BorrowedFd<'_>) -> io::Result<bool> {
    match flock(fd, libc::LOCK_EX | libc::LOCK_NB) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// flock(2) with LOCK_UN.
#[inline]
pub fn flock_unlock(fd: BorrowedFd<'_>) -> io::Result<()> {
    flock(fd, libc::LOCK_UN)
}

#[inline]
fn flock(fd: BorrowedFd<'_>, operation: c_int) -> io::Result<()> {
    retry_eintr(|| {
        // SAFETY: `fd` is borrowed, hence open; flock takes no pointer.
        unsafe { libc::flock(fd.as_raw_fd(), operation) }
    })
    .map(|_| ())
}

/// A moment, as exact as the kernel's tick: 1 to 10 ms, as it was configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick(libc::time_t, libc::c_long);

/// clock_gettime(2), CLOCK_MONOTONIC_COARSE: "a faster but less precise version of CLOCK_MONOTONIC"; no system call
/// where there is a vDSO.
#[inline]
pub fn tick() -> Tick {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a clock that Linux has had since 2.6.32, and a place for its answer. (A failure leaves zeros: then every
    // moment is one tick, and `gate.rs` would look at a lock file's name once only. It cannot fail.)
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    Tick(now.tv_sec, now.tv_nsec)
}

/// True if `fd` was opened O_RDONLY. fcntl(2), F_GETFL
pub fn is_read_only(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: `fd` is borrowed, hence open; F_GETFL takes no argument.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    Ok(flags & libc::O_ACCMODE == libc::O_RDONLY)
}

/// A write lock of one byte, as F_SETLK, F_GETLK and their kin take it. fcntl(2)
pub fn write_lock_of_byte(byte: libc::off_t) -> libc::flock {
    // SAFETY: a structure of integers, for which all zeroes are valid: from SEEK_SET.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_possible_truncation)] // F_WRLCK is 1
    {
        lock.l_type = libc::F_WRLCK as libc::c_short;
    }
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

/// Gives up every lock of this open file description: fcntl(2), F_OFD_SETLK with F_UNLCK, from 0 to "the end of the file,
/// no matter how large it grows" (l_len 0).
pub fn ofd_unlock_all(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a structure of integers, for which all zeroes are valid: from SEEK_SET, 0, to the end.
    let mut unlock: libc::flock = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_possible_truncation)] // F_UNLCK is 2
    {
        unlock.l_type = libc::F_UNLCK as libc::c_short;
    }
    // SAFETY: `fd` is borrowed, hence open; the command takes a pointer to a flock structure.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw mut unlock) })
}

/// A new open file description, O_CLOEXEC, of the file that `fd` is open on: "for file descriptors for … files,
/// /proc/pid/fd/ entries are symbolic links to the file", which open(2) follows even where it was unlinked. proc(5)
///
/// Its number is 3 or more: a library that is careless with the standard descriptors must not write into a database.
pub fn reopen(fd: BorrowedFd<'_>, access_mode: c_int) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}\0", fd.as_raw_fd());
    let flags = access_mode | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    let new = retry_eintr(|| {
        // SAFETY: `path` is NUL-terminated and outlives the call; without O_CREAT there is no third argument.
        unsafe { libc::open(path.as_ptr().cast(), flags) }
    })?;
    // SAFETY: open(2) has just returned this descriptor, so it is open and nobody else's to close.
    let new = unsafe { OwnedFd::from_raw_fd(new) };
    if new.as_raw_fd() >= 3 {
        return Ok(new);
    }
    // SAFETY: `new` is open; F_DUPFD_CLOEXEC takes an int: "the lowest-numbered available file descriptor greater than
    // or equal to arg". It shares the open file description, of which `new` is about to let go.
    let high = unsafe { libc::fcntl(new.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    check(high)?;
    // SAFETY: fcntl(2) has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(high) })
}

/// Every open descriptor of this process, with what it is open on. proc(5)
pub fn open_descriptors() -> io::Result<Vec<(RawFd, FileId)>> {
    let mut descriptors = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Some(fd) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(id) = id_of(fd) {
            descriptors.push((fd, id));
        }
    }
    Ok(descriptors)
}

/// True if descriptor number `fd` is open, on this file.
pub fn is_open_on(fd: RawFd, id: FileId) -> bool {
    id_of(fd) == Some(id)
}

fn id_of(fd: RawFd) -> Option<FileId> {
    if fd < 0 {
        return None;
    }
    // SAFETY: fstat(2) alone is done with it, which answers EBADF if the number is not open: nothing is assumed of it.
    fstat(unsafe { BorrowedFd::borrow_raw(fd) }).ok().map(|attributes| attributes.id)
}

/// True if this process holds POSIX locks that it got through descriptor number `fd`: the `lock:` lines of
/// `/proc/self/fdinfo/FD`. proc(5). If that cannot be read, true.
pub fn holds_posix_locks(fd: RawFd) -> bool {
    std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))
        .map_or(true, |info| info.lines().any(|line| line.starts_with("lock:") && line.contains("POSIX")))
}

/// The path that `fd` is open on, for a message.
pub fn path_of(fd: BorrowedFd<'_>) -> std::path::PathBuf {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::fs::read_link(&link).unwrap_or_else(|_| link.into())
}

#[inline]
fn check(result: c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[inline]
fn retry_eintr(call: impl Fn() -> c_int) -> io::Result<c_int> {
    loop {
        let result = call();
        match check(result) {
            Ok(()) => return Ok(result),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
