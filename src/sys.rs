//! The system calls behind the lock file, the queue and the close-proof locks, as safe functions: open(2), stat(2),
//! flock(2), fchmod(2), fchown(2), fcntl(2), clock_gettime(2), memfd_create(2), mmap(2), futex(2), and what `/proc/self`
//! tells of descriptors.
//!
//! Each function makes one call, retried on EINTR where the manual allows it, with the error as [`io::Error`]. What the
//! errors mean is for `refusal.rs`, `hint.rs` and `ofd.rs` to say.
//!
//! [`ErrnoGuard`] keeps the promise of ARCHITECTURE.md ("errno"): SQLite's core asks `xGetLastError` after a
//! failure, and must find the errno that the *real* VFS left, not one of ours.
//!
//! Uses: nothing.

use std::ffi::{CStr, CString, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

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
    /// Device and inode numbers.
    pub fn numbers(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// From device and inode numbers.
    pub fn new(device: libc::dev_t, inode: libc::ino_t) -> FileId {
        FileId { device, inode }
    }

    /// The device: major and minor.
    pub fn device(&self) -> (u32, u32) {
        #[allow(clippy::unnecessary_cast)] // c_uint, c_int: as the platform's C library has it
        (libc::major(self.device) as u32, libc::minor(self.device) as u32)
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
/// O_NONBLOCK (do not hang on a FIFO or a device), O_NOCTTY; never O_TRUNC. Its number is 3 or more.
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
    above_standard(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The same open file description with a number of 3 or more. Where a standard descriptor is closed, the next file that is
/// opened gets its number; then a stray printf(3) writes into that file, and a daemon's dup2(2) closes it.
fn above_standard(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() >= 3 { Ok(fd) } else { duplicate_number(fd.as_raw_fd()) }
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

/// fchown(2); where the owner may not be changed (EPERM), the group alone: "the owner of a file may change the group of the
/// file to any group of which that owner is a member".
pub fn fchown(fd: BorrowedFd<'_>, uid: libc::uid_t, gid: libc::gid_t) -> io::Result<()> {
    const SAME: libc::uid_t = libc::uid_t::MAX; // "If the owner or group is specified as -1, then that ID is not changed."
    // SAFETY: `fd` is borrowed, hence open; any ids are valid arguments.
    match check(unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) }) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            // SAFETY: as above.
            check(unsafe { libc::fchown(fd.as_raw_fd(), SAME, gid) })
        }
        done => done,
    }
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

impl Tick {
    /// As [`micros`] counts.
    pub fn micros(self) -> u64 {
        of_this_machine(self.0.unsigned_abs() * 1_000_000 + self.1.unsigned_abs() / 1000)
    }
}

/// clock_gettime(2), CLOCK_MONOTONIC_COARSE: "a faster but less precise version of CLOCK_MONOTONIC"; no system call
/// where there is a vDSO.
#[inline]
pub fn tick() -> Tick {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a clock that Linux has had since 2.6.32, and a place for its answer. (A failure leaves zeros: then every
    // moment is one tick, and `descriptor.rs` would look at a lock file's name once only. It cannot fail.)
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

/// Write-locks one byte for this open file description: fcntl(2), F_OFD_SETLK. `Ok(false)`: another has it locked
/// ("EACCES or EAGAIN: operation is prohibited by locks held by other processes").
pub fn ofd_lock_byte_nb(fd: BorrowedFd<'_>, byte: usize) -> io::Result<bool> {
    match ofd_set(fd, libc::F_WRLCK, byte) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EAGAIN)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Read-locks one byte for this open file description, beside others that do: fcntl(2), F_OFD_SETLK.
pub fn ofd_share_byte_nb(fd: BorrowedFd<'_>, byte: usize) -> io::Result<()> {
    ofd_set(fd, libc::F_RDLCK, byte)
}

/// True if another open file description has this byte locked: fcntl(2), F_OFD_GETLK.
pub fn ofd_is_byte_locked(fd: BorrowedFd<'_>, byte: usize) -> io::Result<bool> {
    let mut lock = write_lock_of_byte(libc::off_t::try_from(byte).map_err(io::Error::other)?);
    // SAFETY: `fd` is borrowed, hence open; the command takes a pointer to a flock structure, with l_pid 0.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// Gives that byte up for this open file description: fcntl(2), F_OFD_SETLK with F_UNLCK.
pub fn ofd_unlock_byte(fd: BorrowedFd<'_>, byte: usize) -> io::Result<()> {
    ofd_set(fd, libc::F_UNLCK, byte)
}

/// What `/proc/locks` calls a file: the numbers that stat(2) gives, but on btrfs and on some overlays, where stat(2) has
/// other numbers than the kernel's own. It is asked by a read lock on a byte that nobody uses, and shown in
/// `/proc/self/fdinfo/FD`: `lock: 1: OFDLCK ADVISORY READ -1 00:2e:131 2147483647 2147483647`. proc_pid_fdinfo(5)
pub fn name_in_proc_locks(fd: BorrowedFd<'_>) -> Option<String> {
    const BYTE: usize = 0x7fff_ffff;
    ofd_set(fd, libc::F_RDLCK, BYTE).ok()?;
    let info = locks_of(fd);
    let _ = ofd_unlock_byte(fd, BYTE);
    let byte = BYTE.to_string();
    info.ok()?.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let ["lock:", _, "OFDLCK", _, "READ", _, name, start, _] = fields[..] else { return None };
        (start == byte).then(|| name.to_owned())
    })
}

fn ofd_set(fd: BorrowedFd<'_>, lock_type: c_int, byte: usize) -> io::Result<()> {
    // SAFETY: a structure of integers, for which all zeroes are valid: SEEK_SET, and l_pid 0 as F_OFD_SETLK wants it.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_possible_truncation)] // 0, 1 or 2
    {
        lock.l_type = lock_type as libc::c_short;
    }
    lock.l_start = libc::off_t::try_from(byte).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    lock.l_len = 1;
    retry_eintr(|| {
        // SAFETY: `fd` is borrowed, hence open; the command takes a pointer to a flock structure, and only reads it.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }
    })
    .map(|_| ())
}

/// The mount that `path`, not followed if it is a symbolic link, is on: `mnt_id` of `/proc/self/fdinfo/FD`, which is the
/// first field of its line in `/proc/self/mountinfo`. proc(5)
///
/// By a descriptor of O_PATH: "The file itself is not opened", open(2).
pub fn mount_of(path: &CStr) -> io::Result<Option<u64>> {
    let fd = retry_eintr(|| {
        // SAFETY: `path` is NUL-terminated and outlives the call; without O_CREAT there is no third argument.
        unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) }
    })?;
    // SAFETY: open(2) has just returned this descriptor, so it is open and nobody else's to close.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let info = locks_of(fd.as_fd())?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    Ok(id.and_then(|id| id.trim().parse().ok()))
}

/// What the kernel says of `fd`, the locks of its open file description included: `/proc/self/fdinfo/FD`, proc(5).
pub fn locks_of(fd: BorrowedFd<'_>) -> io::Result<String> {
    std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))
}

/// Another descriptor of the open file description behind number `fd`, O_CLOEXEC; EBADF if that is not open: fcntl(2),
/// F_DUPFD_CLOEXEC.
pub fn duplicate_number(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an int, and answers EBADF for a number that is not open: nothing is assumed of it.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    check(copy)?;
    // SAFETY: fcntl(2) has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// True if a program that is executed inherits `fd`: no FD_CLOEXEC. fcntl(2), F_GETFD
pub fn is_inheritable(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes no argument, and answers EBADF for a number that is not open: nothing is assumed of it.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags != -1 && flags & libc::FD_CLOEXEC == 0
}

/// Lets the program of `command` inherit this open file description; answers its number there. It stays O_CLOEXEC here, so
/// that nothing else that is started meanwhile inherits it, and open as long as `command` lives.
///
/// The number is 10 or more: a shell script's `exec 3>file` must not hit it (POSIX has shells support 0 to 9).
pub fn inherit(command: &mut Command, fd: BorrowedFd<'_>) -> io::Result<RawFd> {
    // SAFETY: `fd` is borrowed, hence open; F_DUPFD_CLOEXEC takes an int.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 10) };
    check(copy)?;
    // SAFETY: fcntl(2) has just returned this descriptor.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    let number = copy.as_raw_fd();
    let keep = move || {
        // SAFETY: the child's copy of `copy`, hence open; F_SETFD takes an int: no FD_CLOEXEC.
        check(unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_SETFD, 0) })
    };
    // SAFETY: between fork and exec, `keep` makes one fcntl(2), which is async-signal-safe (signal-safety(7)), and allocates
    // nothing: an error of check() is a number.
    unsafe { command.pre_exec(keep) };
    Ok(number)
}

/// A new open file description, O_CLOEXEC, of the file that `fd` is open on: "for file descriptors for … files,
/// /proc/pid/fd/ entries are symbolic links to the file", which open(2) follows even where it was unlinked. proc(5)
///
/// Its number is 3 or more: a library that is careless with the standard descriptors must not write into a database.
pub fn reopen(fd: BorrowedFd<'_>, access_mode: c_int) -> io::Result<OwnedFd> {
    reopen_link(&format!("/proc/self/fd/{}\0", fd.as_raw_fd()), access_mode)
}

/// The same of descriptor `fd` of process `pid`, if it is memory that [`sealed_memory`] has called
/// `name`: "memfd: … the target of the corresponding symbolic link in /proc/self/fd/ and is always prefixed with memfd:",
/// memfd_create(2). ENOENT if it is anything else: a process number comes again, and to open a device does something.
pub fn reopen_sealed_memory(pid: u32, fd: u32, name: &str, access_mode: c_int) -> io::Result<OwnedFd> {
    let link = format!("/proc/{pid}/fd/{fd}");
    let target = std::fs::read_link(&link)?;
    if !target.to_string_lossy().starts_with(&format!("/memfd:{name} ")) {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    }
    reopen_link(&format!("{link}\0"), access_mode)
}

/// `link`: NUL-terminated.
fn reopen_link(link: &str, access_mode: c_int) -> io::Result<OwnedFd> {
    let link = CStr::from_bytes_with_nul(link.as_bytes()).map_err(io::Error::other)?;
    let flags = access_mode | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    let new = retry_eintr(|| {
        // SAFETY: `link` is NUL-terminated and outlives the call; without O_CREAT there is no third argument.
        unsafe { libc::open(link.as_ptr(), flags) }
    })?;
    // SAFETY: open(2) has just returned this descriptor, so it is open and nobody else's to close.
    let new = unsafe { OwnedFd::from_raw_fd(new) };
    above_standard(new)
}

/// `/proc/self/fd`, opened: what it lists is what is open when it is read. proc(5)
#[derive(Debug)]
pub struct OpenDescriptors(std::fs::ReadDir);

impl OpenDescriptors {
    /// Opens it, and reads nothing yet: opendir(3).
    pub fn new() -> io::Result<OpenDescriptors> {
        std::fs::read_dir("/proc/self/fd").map(OpenDescriptors)
    }

    /// Every descriptor of this process that is open all along while this runs, with what it is open on.
    pub fn list(self) -> io::Result<Vec<(RawFd, FileId)>> {
        let mut descriptors = Vec::new();
        for entry in self.0 {
            let Some(fd) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if let Some(id) = id_of(fd) {
                descriptors.push((fd, id));
            }
        }
        Ok(descriptors)
    }
}

/// Every open descriptor of this process, with what it is open on.
pub fn open_descriptors() -> io::Result<Vec<(RawFd, FileId)>> {
    OpenDescriptors::new()?.list()
}

/// True if descriptor number `fd`, which was open on this file, is not any more: other code has closed it, and may have
/// opened another file under that number. EBADF: nobody has. Any other error says nothing of that: false.
pub fn is_lost(fd: &OwnedFd, id: FileId) -> bool {
    match fstat(fd.as_fd()) {
        Ok(attributes) => attributes.id != id,
        Err(error) => error.raw_os_error() == Some(libc::EBADF),
    }
}

/// True if descriptor number `fd` is open, on this file.
pub fn is_open_on(fd: RawFd, id: FileId) -> bool {
    id_of(fd) == Some(id)
}

/// What descriptor number `fd` is open on, if it is open.
pub fn id_of(fd: RawFd) -> Option<FileId> {
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

/// How far CLOCK_MONOTONIC is behind in the time namespace of this process, in microseconds.
static CLOCK_BEHIND: AtomicI64 = AtomicI64::new(0);

/// Microseconds since some moment that is the same for all processes since this machine started, once
/// [`learn_time_namespace`] was called: clock_gettime(2), CLOCK_MONOTONIC, "not affected by discontinuous jumps in the system
/// time", nor running while the machine is suspended. No system call where there is a vDSO.
#[inline]
pub fn micros() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a clock that every Linux has, and a place for its answer. (It cannot fail; zeros would make every lease
    // look expired, and the queue a polling one.)
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    // Both are positive: time since the machine started.
    of_this_machine(now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000)
}

#[inline]
fn of_this_machine(micros: u64) -> u64 {
    micros.saturating_add_signed(CLOCK_BEHIND.load(Ordering::Relaxed))
}

/// Makes [`micros`] comparable between processes of different time namespaces: `/proc/self/timens_offsets`, the offsets of
/// their clocks "relative to the clock values in the initial time namespace", time_namespaces(7).
///
/// # Errors
///
/// They cannot be read, or are not this process's own: what is there is the namespace that its children will be in.
pub fn learn_time_namespace() -> io::Result<()> {
    let offsets = match std::fs::read_to_string("/proc/self/timens_offsets") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()), // before Linux 5.6
        offsets => offsets?,
    };
    let own = std::fs::read_link("/proc/self/ns/time")?;
    let of_children = std::fs::read_link("/proc/self/ns/time_for_children")?;
    if own != of_children {
        return Err(io::Error::other("this process has made a time namespace for its children (unshare)"));
    }
    let ahead = parse_monotonic_offset(&offsets)
        .ok_or_else(|| io::Error::other("/proc/self/timens_offsets cannot be understood"))?;
    CLOCK_BEHIND.store(ahead.wrapping_neg(), Ordering::Relaxed);
    Ok(())
}

/// `monotonic           100000         0`: seconds and nanoseconds.
fn parse_monotonic_offset(offsets: &str) -> Option<i64> {
    let mut fields =
        offsets.lines().find_map(|line| line.strip_prefix("monotonic"))?.split_ascii_whitespace();
    let mut next = || fields.next()?.parse::<i64>().ok();
    let (seconds, nanoseconds) = (next()?, next()?);
    seconds.checked_mul(1_000_000)?.checked_add(nanoseconds / 1000)
}

/// Sleeps for `micros`.
pub fn sleep(micros: u64) {
    std::thread::sleep(std::time::Duration::from_micros(micros));
}

/// Sleeps while `*word == expected`, for at most `micros`: futex(2), FUTEX_WAIT on a word in shared memory. Returns after a
/// wake, a changed word, a signal or the time, and does not say which. The timeout is "a relative timeout", measured on
/// CLOCK_MONOTONIC.
pub fn futex_wait(word: &AtomicU32, expected: u32, micros: u64) {
    let seconds = libc::time_t::try_from(micros / 1_000_000).unwrap_or(libc::time_t::MAX);
    let nanoseconds = libc::c_long::try_from(micros % 1_000_000 * 1000).unwrap_or(0);
    let timeout = libc::timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    // SAFETY: `word` is a valid, aligned word for the whole call, `timeout` a valid structure; the other arguments are
    // integers. Without FUTEX_PRIVATE_FLAG it works between processes.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const timeout) };
}

/// Wakes at most `count` of those that sleep on `word`: futex(2), FUTEX_WAKE.
pub fn futex_wake(word: &AtomicU32, count: c_int) {
    // SAFETY: `word` is a valid, aligned word; the other arguments are integers.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) };
}

/// linux/memfd.h; the libc crate does not have it for Linux.
const MFD_NOEXEC_SEAL: libc::c_uint = 8;

const SEALS: c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// A new memory file of `size` zero bytes that nobody can resize: memfd_create(2), fallocate(2), and fcntl(2),
/// F_ADD_SEALS. F_SEAL_SHRINK: "If this seal is set, the file in question cannot be reduced in size": so memory mapped
/// from it cannot raise SIGBUS. Nor for want of memory (`vm.overcommit_memory` 2): "After a successful call, subsequent
/// writes into the range specified by offset and size are guaranteed not to fail because of lack of disk space",
/// fallocate(2). Its number is 3 or more.
///
/// It is not executable: with the sysctl vm.memfd_noexec at 2, "memfd_create() without MFD_NOEXEC_SEAL will be rejected", and
/// at any value the kernel says so in its log (Documentation/userspace-api/mfd_noexec.rst). EINVAL: older than Linux 6.3,
/// which does not know of it.
pub fn sealed_memory(name: &str, size: usize) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: `name` is NUL-terminated; the flags are integers.
    let create = |flags| unsafe { libc::memfd_create(name.as_ptr(), flags) };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let mut fd = create(flags | MFD_NOEXEC_SEAL);
    if fd == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        fd = create(flags);
    }
    check(fd)?;
    // SAFETY: memfd_create(2) has just returned this descriptor.
    let fd = above_standard(unsafe { OwnedFd::from_raw_fd(fd) })?;
    let size = libc::off_t::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    retry_eintr(|| {
        // SAFETY: `fd` is open; fallocate takes integers.
        unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, size) }
    })?;
    // SAFETY: `fd` is open; F_ADD_SEALS takes an int.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) })?;
    Ok(fd)
}

/// True if `fd` is a memory file that [`sealed_memory`] made with this size: fcntl(2), F_GET_SEALS, and fstat(2).
pub fn is_sealed_memory(fd: BorrowedFd<'_>, size: usize) -> bool {
    // SAFETY: `fd` is borrowed, hence open; F_GET_SEALS takes no argument. ("EINVAL … fd refers to a file that does not
    // support sealing": -1, all bits.)
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    let is_sealed = seals != -1 && seals & SEALS == SEALS;
    is_sealed && fstat(fd).is_ok_and(|attributes| usize::try_from(attributes.size) == Ok(size))
}

/// Maps `size` bytes of `fd`, shared, for reading, and with `access_mode` O_RDWR for writing: mmap(2). Never unmapped here.
pub fn map_shared(fd: BorrowedFd<'_>, size: usize, access_mode: c_int) -> io::Result<NonNull<u8>> {
    let access =
        if access_mode == libc::O_RDWR { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), size, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

/// munmap(2)
///
/// # Safety
///
/// `address` is what [`map_shared`] gave for `size` bytes, and nobody uses that memory any more.
pub unsafe fn unmap(address: NonNull<u8>, size: usize) {
    // SAFETY: as the caller says.
    unsafe { libc::munmap(address.as_ptr().cast(), size) };
}

// In the child of a fork. Async-signal-safe calls (signal-safety(7)) and plain system calls only. ----------------------------

/// Replaces each of these descriptors by a dead one: O_PATH, of which open(2) says "other file operations (e.g., read(2),
/// write(2), fchmod(2), fchown(2), fgetxattr(2), ioctl(2), mmap(2)) fail with the error EBADF"; so do fsync(2),
/// ftruncate(2) and the locks of fcntl(2). Where none can be had (ENFILE), they are closed.
pub fn kill_descriptors(fds: impl Iterator<Item = RawFd> + Clone) {
    let open = || {
        let candidates = [c"/dev/null", c"/"].into_iter();
        // SAFETY: NUL-terminated; without O_CREAT there is no third argument.
        let opened =
            candidates.map(|path| unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) });
        opened.into_iter().find(|fd| *fd >= 0)
    };
    let mut dead = None;
    for fd in fds.clone() {
        dead = dead.or_else(open);
        if dead.is_none() {
            // SAFETY: a descriptor that SQLite has inherited, and that it can do nothing with from now on.
            unsafe { libc::close(fd) };
            dead = open(); // EMFILE: there is room now
        }
        if let Some(dead) = dead.filter(|dead| *dead != fd) {
            // SAFETY: `dead` is open; what `fd` was is closed, by dup3(2) or above.
            unsafe { libc::dup3(dead, fd, libc::O_CLOEXEC) };
        }
    }
    if let Some(dead) = dead.filter(|dead| fds.clone().all(|fd| fd != *dead)) {
        // SAFETY: opened here.
        unsafe { libc::close(dead) };
    }
}

/// Replaces shared memory by a private copy of what it is now: the process goes on with it, and shares it no longer. Bytes
/// that cannot be read (a file that was truncated: SIGBUS) become zero. Private memory stays as it is (`unix-excl` has its
/// wal-index on the heap).
///
/// # Safety
///
/// `address` is that of `size` bytes that may be read, in pages of their own if they are shared, which nobody uses
/// meanwhile in this process.
pub unsafe fn make_private(address: usize, size: usize) {
    // SAFETY: no pointers.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let start = address / page * page;
    let size = (address + size).next_multiple_of(page) - start;
    let memory: *mut libc::c_void = std::ptr::with_exposed_provenance_mut(start);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // "If the value of old_size is zero, and old_address refers to a shareable mapping …, then mremap() will create a new
    // mapping of the same pages", mremap(2); EINVAL for one that is not.
    // SAFETY: the memory itself stays as it is.
    let again = unsafe { libc::mremap(memory, 0, size, libc::MREMAP_MAYMOVE) };
    if again != libc::MAP_FAILED {
        // SAFETY: mapped just now, and known to nobody.
        unsafe { libc::munmap(again, size) };
    } else if io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        return;
    }
    // write(2) says EFAULT where a load would be SIGBUS.
    // SAFETY: NUL-terminated.
    let copy = unsafe { libc::memfd_create(c"kanbanlock-fork".as_ptr(), libc::MFD_CLOEXEC) };
    let mut is_private = false;
    if copy >= 0 {
        let length = libc::off_t::try_from(size).unwrap_or(0);
        // SAFETY: the descriptor is open.
        let has_size = unsafe { libc::ftruncate(copy, length) } == 0;
        // SAFETY: `size` bytes that are mapped (caller); the kernel checks each page.
        unsafe { libc::pwrite(copy, memory, size, 0) };
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        // SAFETY: over memory that the caller gives up, in whole pages; memory of the same size takes its place.
        let mapped = has_size.then(|| unsafe { libc::mmap(memory, size, access, flags, copy, 0) });
        is_private = mapped == Some(memory);
        // SAFETY: opened here; a mapping keeps its file.
        unsafe { libc::close(copy) };
    }
    if !is_private {
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_ANONYMOUS;
        // SAFETY: as above.
        is_private = unsafe { libc::mmap(memory, size, access, flags, -1, 0) } == memory;
    }
    if !is_private {
        // SAFETY: as above. Better a child that SIGSEGV ends than one that writes there.
        unsafe { libc::mprotect(memory, size, libc::PROT_NONE) };
    }
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_offset_of_a_time_namespace() {
        let of = |line: &str| parse_monotonic_offset(&format!("{line}\nboottime            7         0\n"));
        assert_eq!(of("monotonic      100000         0"), Some(100_000_000_000));
        assert_eq!(of("monotonic          -2 500000000"), Some(-1_500_000));
        assert_eq!(of("monotonic"), None);
        assert_eq!(of("monotonic 9223372036854775807 0"), None);
        assert_eq!(parse_monotonic_offset(""), None);
    }

    const SIZE: usize = 1 << 16;

    fn read(memory: NonNull<u8>, at: usize) -> u8 {
        // SAFETY: mapped by the tests below, of SIZE bytes; `at` is less.
        unsafe { memory.as_ptr().wrapping_add(at).read_volatile() }
    }

    fn write(memory: NonNull<u8>, at: usize, byte: u8) {
        // SAFETY: ditto.
        unsafe { memory.as_ptr().wrapping_add(at).write_volatile(byte) };
    }

    #[test]
    fn shared_memory_becomes_a_private_copy() {
        let memfd = sealed_memory("kanbanlock-test", SIZE).unwrap();
        let [one, other] = [(); 2].map(|()| map_shared(memfd.as_fd(), SIZE, libc::O_RDWR).unwrap());
        write(other, 0, 1);
        write(other, 40_000, 2);
        // SAFETY: `one` is mapped, of SIZE bytes, and nobody else's. Two regions of one mapping, as os_unix may have it.
        unsafe { make_private(one.addr().get(), SIZE / 2) };
        // SAFETY: ditto.
        unsafe { make_private(one.addr().get() + SIZE / 2, SIZE / 2) };
        assert_eq!([read(one, 0), read(one, 40_000), read(one, 7)], [1, 2, 0]);
        write(one, 0, 3);
        write(other, 40_000, 4);
        assert_eq!([read(one, 0), read(one, 40_000)], [3, 2]);
        assert_eq!([read(other, 0), read(other, 40_000)], [1, 4]);
    }

    /// A load of what was truncated would be SIGBUS.
    #[test]
    fn what_cannot_be_read_becomes_zero() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE as u64).unwrap();
        let memory = map_shared(file.as_fd(), SIZE, libc::O_RDWR).unwrap();
        write(memory, 5, 1);
        write(memory, 40_000, 2);
        file.set_len(4096).unwrap();
        // SAFETY: mapped, of SIZE bytes, and nobody else's.
        unsafe { make_private(memory.addr().get(), SIZE) };
        assert_eq!([read(memory, 5), read(memory, 40_000)], [1, 0]);
    }

    #[test]
    fn private_memory_stays_as_it_is() {
        let bytes = vec![7_u8; SIZE];
        let address = bytes.as_ptr().expose_provenance();
        // SAFETY: SIZE bytes that may be read, and nobody else's.
        unsafe { make_private(address, SIZE) };
        assert!(bytes.iter().all(|byte| *byte == 7));
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut copies = maps.lines().filter(|line| line.contains("kanbanlock-fork"));
        let covers = |line: &str| {
            let (from, to) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).unwrap();
            let [from, to] = [from, to].map(|end| usize::from_str_radix(end, 16).unwrap());
            (from..to).contains(&address)
        };
        assert!(!copies.any(covers), "{maps}");
    }

    #[test]
    fn a_dead_descriptor_is_open_on_nothing() {
        use std::io::{Read, Write};
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"kanban").unwrap();
        let mut other = file.try_clone().unwrap();
        kill_descriptors([file.as_raw_fd(), other.as_raw_fd()].into_iter());
        let is_ebadf =
            |result: io::Result<usize>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EBADF));
        for file in [&mut file, &mut other] {
            assert!(id_of(file.as_raw_fd()).is_some(), "the number is taken");
            assert!(!is_inheritable(file.as_raw_fd()));
            is_ebadf(file.write(b"x"));
            is_ebadf(file.read(&mut [0]));
            is_ebadf(file.set_len(0).map(|()| 0));
            is_ebadf(file.sync_all().map(|()| 0));
        }
    }
}
