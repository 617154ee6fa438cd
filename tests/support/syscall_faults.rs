//! System calls that fail on demand: those of SQLite's unix VFS, and those of kanbanlock itself.
//!
//! Two ways lead to them:
//!
//! - The unix VFS makes its system calls through a table, and `xSetSystemCall` replaces an entry. [`install`] puts a
//!   function of ours in front of each; what was there before is what it calls on. Installed before kanbanlock is registered,
//!   ours lies *under* kanbanlock's hooks (open, close, fcntl); installed afterwards, *over* them.
//! - fsync(2) is in no table, and kanbanlock calls libc directly. Those calls are bound when the test binary is linked, so a
//!   function of the same name in this binary is called in libc's place (`#[no_mangle]`, at the end of this file). SQLite and
//!   Rust's standard library are compiled with 64-bit file offsets and call `open64`, `fstat64` and so on, so plain `open`,
//!   `fstat`, `lstat`, `stat` and `fcntl` are kanbanlock's. Hence this file must be part of one test binary only.
//!
//! One [`Fault`] is armed at a time, for the whole process; the tests that use this run in processes of their own.
//!
//! No data is synced to the disk, and nanosleep(2) returns at once: nothing here is about power loss or time.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::mem::transmute;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::ffi;

use super::support::raw_file::{vfs, vfs_methods};

/// A system call that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    // The unix VFS's table.
    Open,
    Close,
    Access,
    Getcwd,
    Stat,
    Fstat,
    Ftruncate,
    /// The lock calls: F_SETLK, F_GETLK, and F_OFD_… in their place.
    Fcntl,
    Read,
    Write,
    Fchmod,
    Unlink,
    OpenDirectory,
    Fchown,
    Mmap,
    Munmap,
    Mremap,
    Readlink,
    Lstat,
    /// In no table.
    Fsync,
    // kanbanlock's own.
    OwnOpen,
    OwnFstat,
    OwnLstat,
    OwnStat,
    OwnFcntl,
    OwnFchmod,
    OwnFchown,
    Flock,
}

/// What happens in place of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is done, and errno is this.
    Error(c_int),
    /// The call does its work, and reports this all the same. close(2): "the kernel always releases the file descriptor
    /// early in the close operation … the steps that may return an error … occur only later".
    DoneButError(c_int),
    /// read and write: only the first half.
    Short,
}

/// How many calls it strikes, from the n-th on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    Once,
    Thrice,
    ForGood,
}

#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub call: Call,
    pub effect: Effect,
    pub lasts: Lasts,
    /// From 1.
    pub nth: usize,
    /// Only calls whose description passes.
    pub aim: fn(&str) -> bool,
}

/// Which call was struck first: so that one and the same can be found in another run, which has made other calls beside it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Struck {
    pub statement: usize,
    pub call: String,
    /// Which one of the calls of this description, in this statement.
    pub number: usize,
}

struct Armed {
    fault: Fault,
    seen: usize,
    statement: usize,
    /// Calls by description, in this statement.
    numbers: BTreeMap<String, usize>,
    struck: Option<Struck>,
    /// The descriptions of all calls struck.
    victims: BTreeSet<String>,
}

static ARMED: Mutex<Option<Armed>> = Mutex::new(None);

fn armed() -> MutexGuard<'static, Option<Armed>> {
    ARMED.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn arm(fault: Fault) {
    let (numbers, victims) = (BTreeMap::new(), BTreeSet::new());
    *armed() = Some(Armed { fault, seen: 0, statement: 0, numbers, victims, struck: None });
}

/// Where the fault has struck first.
pub fn disarm() -> Option<Struck> {
    armed().take().and_then(|armed| armed.struck)
}

/// The script goes on to its next statement.
pub fn next_statement() {
    if let Some(armed) = &mut *armed() {
        armed.statement += 1;
        armed.numbers.clear();
    }
}

/// True if the armed fault has struck a call whose description contains `what`.
pub fn has_struck(what: &str) -> bool {
    armed().as_ref().is_some_and(|armed| armed.victims.iter().any(|victim| victim.contains(what)))
}

/// `describe` is run only if a fault is armed for this call; `None`: not one to count.
fn strike(call: Call, describe: impl FnOnce() -> Option<String>) -> Option<Effect> {
    let mut armed = armed();
    let armed = armed.as_mut().filter(|armed| armed.fault.call == call)?;
    let description = describe().filter(|description| (armed.fault.aim)(description))?;
    let number = armed.numbers.entry(description.clone()).or_default();
    *number += 1;
    armed.seen += 1;
    let last = match armed.fault.lasts {
        Lasts::Once => armed.fault.nth,
        Lasts::Thrice => armed.fault.nth + 2,
        Lasts::ForGood => usize::MAX,
    };
    if !(armed.fault.nth..=last).contains(&armed.seen) {
        return None;
    }
    armed.victims.insert(description.clone());
    let statement = armed.statement;
    armed.struck.get_or_insert(Struck { statement, call: description, number: *number });
    Some(armed.fault.effect)
}

fn set_errno(errno: c_int) {
    // SAFETY: this thread's errno.
    unsafe { *libc::__errno_location() = errno };
}

// How calls are described: by the file's name, not by anything that differs from run to run. ----------------

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let name = name.trim_end_matches(" (deleted)");
    if name.starts_with("etilqs_") || name.starts_with(".tmp") {
        "temporary".to_owned()
    } else {
        name.to_owned()
    }
}

fn fd_name(fd: c_int) -> String {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).map_or("?".to_owned(), |path| name_of(&path))
}

/// # Safety
///
/// `path` is NUL-terminated.
unsafe fn path_name(path: *const c_char) -> String {
    // SAFETY: as the caller says.
    let path = unsafe { CStr::from_ptr(path) };
    name_of(Path::new(OsStr::from_bytes(path.to_bytes())))
}

/// A lock call by what it asks for, whoever owns the lock; `None`: another command.
///
/// # Safety
///
/// `arg` is what `cmd` calls for.
unsafe fn describe_lock(fd: c_int, cmd: c_int, arg: *mut c_void) -> Option<String> {
    let what = match cmd {
        libc::F_SETLK | libc::F_OFD_SETLK => "F_SETLK",
        libc::F_SETLKW | libc::F_OFD_SETLKW => "F_SETLKW",
        libc::F_GETLK | libc::F_OFD_GETLK => "F_GETLK",
        _ => return None,
    };
    // SAFETY: these commands take a flock structure.
    let lock = unsafe { &*arg.cast::<libc::flock>() };
    let kind = match c_int::from(lock.l_type) {
        libc::F_RDLCK => "read",
        libc::F_WRLCK => "write",
        _ => "unlock",
    };
    Some(format!("{what} {kind} {}+{} {}", lock.l_start, lock.l_len, fd_name(fd)))
}

// The table of the unix VFS. --------------------------------------------------------------------------------

type AnyCall = unsafe extern "C" fn();

/// One entry: the name in SQLite's table, our function, and what was there before.
struct Entry {
    name: &'static CStr,
    call: Call,
    ours: AnyCall,
    before: AtomicPtr<c_void>,
}

impl Entry {
    fn before(&self) -> AnyCall {
        let before = self.before.load(Ordering::Acquire);
        assert!(!before.is_null());
        // SAFETY: `install` has put a function pointer there, before ours could be called.
        unsafe { transmute::<*mut c_void, AnyCall>(before) }
    }
}

/// Declares a replacement for each entry: `real` is the call itself, `failed` what it returns on failure.
macro_rules! table {
    ($($name:literal $call:ident: fn $function:ident($($arg:ident: $type:ty),*) -> $ret:ty,
       $describe:expr, failed: $failed:expr;)*) => {
        static ENTRIES: [Entry; [$($name),*].len()] = [$(Entry {
            name: $name,
            call: Call::$call,
            // SAFETY: a function pointer stays one; os_unix casts it back.
            ours: unsafe { transmute::<unsafe extern "C" fn($($type),*) -> $ret, AnyCall>($function) },
            before: AtomicPtr::new(ptr::null_mut()),
        }),*];

        $(unsafe extern "C" fn $function($($arg: $type),*) -> $ret {
            let entry = ENTRIES.iter().find(|entry| entry.name == $name).unwrap();
            // SAFETY: what was found under this name has this type, as os_unix calls it.
            let real = unsafe { transmute::<AnyCall, unsafe extern "C" fn($($type),*) -> $ret>(entry.before()) };
            #[allow(unused_unsafe)]
            // SAFETY: SQLite's own arguments.
            match strike(Call::$call, || unsafe { $describe }) {
                None => {
                    // SAFETY: what os_unix would have called, with what it passed.
                    unsafe { real($($arg),*) }
                }
                Some(Effect::Error(errno)) => {
                    set_errno(errno);
                    $failed
                }
                Some(Effect::DoneButError(errno)) => {
                    // SAFETY: what os_unix would have called, with what it passed.
                    unsafe { real($($arg),*) };
                    set_errno(errno);
                    $failed
                }
                Some(Effect::Short) => {
                    $(let $arg = $arg.cut();)*
                    // SAFETY: what os_unix would have called, with half the bytes that it passed.
                    unsafe { real($($arg),*) }
                }
            }
        })*
    };
}

/// [`Effect::Short`], by the type of an argument: a number of bytes is halved.
trait Cut: Sized {
    fn cut(self) -> Self {
        self
    }
}
impl Cut for usize {
    fn cut(self) -> usize {
        self.div_ceil(2)
    }
}
impl<T> Cut for *const T {}
impl<T> Cut for *mut T {}
impl Cut for c_int {}
impl Cut for c_uint {}
impl Cut for i64 {}

table! {
    c"open" Open: fn open_(path: *const c_char, flags: c_int, mode: c_int) -> c_int,
        Some(format!("open {}", path_name(path))), failed: -1;
    c"close" Close: fn close_(fd: c_int) -> c_int, Some(format!("close {}", fd_name(fd))), failed: -1;
    c"access" Access: fn access_(path: *const c_char, mode: c_int) -> c_int,
        Some(format!("access {}", path_name(path))), failed: -1;
    c"getcwd" Getcwd: fn getcwd_(buffer: *mut c_char, size: usize) -> *mut c_char,
        Some("getcwd".to_owned()), failed: ptr::null_mut();
    c"stat" Stat: fn stat_(path: *const c_char, stat: *mut c_void) -> c_int,
        Some(format!("stat {}", path_name(path))), failed: -1;
    c"fstat" Fstat: fn fstat_(fd: c_int, stat: *mut c_void) -> c_int,
        Some(format!("fstat {}", fd_name(fd))), failed: -1;
    c"ftruncate" Ftruncate: fn ftruncate_(fd: c_int, size: i64) -> c_int,
        Some(format!("ftruncate {}", fd_name(fd))), failed: -1;
    c"fchmod" Fchmod: fn fchmod_(fd: c_int, mode: c_uint) -> c_int,
        Some(format!("fchmod {}", fd_name(fd))), failed: -1;
    c"unlink" Unlink: fn unlink_(path: *const c_char) -> c_int,
        Some(format!("unlink {}", path_name(path))), failed: -1;
    // os_unix's own function: it returns an SQLite result code.
    c"openDirectory" OpenDirectory: fn open_directory_(path: *const c_char, fd: *mut c_int) -> c_int,
        Some("openDirectory".to_owned()), failed: ffi::SQLITE_CANTOPEN;
    c"fchown" Fchown: fn fchown_(fd: c_int, uid: c_uint, gid: c_uint) -> c_int,
        Some(format!("fchown {}", fd_name(fd))), failed: -1;
    c"mmap" Mmap: fn mmap_(at: *mut c_void, size: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64)
        -> *mut c_void, Some(format!("mmap {}", fd_name(fd))), failed: libc::MAP_FAILED;
    c"munmap" Munmap: fn munmap_(at: *mut c_void, size: usize) -> c_int, Some("munmap".to_owned()), failed: -1;
    c"mremap" Mremap: fn mremap_(at: *mut c_void, old: usize, new: usize, flags: c_int) -> *mut c_void,
        Some("mremap".to_owned()), failed: libc::MAP_FAILED;
    c"readlink" Readlink: fn readlink_(path: *const c_char, buffer: *mut c_char, size: usize) -> isize,
        Some(format!("readlink {}", path_name(path))), failed: -1;
    c"lstat" Lstat: fn lstat_(path: *const c_char, stat: *mut c_void) -> c_int,
        Some(format!("lstat {}", path_name(path))), failed: -1;
    // fcntl is variadic; on x86-64 and aarch64 Linux a function of three arguments receives and makes such a call alike.
    c"fcntl" Fcntl: fn fcntl_(fd: c_int, cmd: c_int, arg: *mut c_void) -> c_int,
        describe_lock(fd, cmd, arg), failed: -1;
    c"read" Read: fn read_(fd: c_int, buffer: *mut c_void, count: usize) -> isize,
        Some(format!("read {}", fd_name(fd))), failed: -1;
    c"write" Write: fn write_(fd: c_int, buffer: *const c_void, count: usize) -> isize,
        Some(format!("write {}", fd_name(fd))), failed: -1;
    c"pread" Read: fn pread_(fd: c_int, buffer: *mut c_void, count: usize, offset: i64) -> isize,
        Some(format!("read {}", fd_name(fd))), failed: -1;
    c"pwrite" Write: fn pwrite_(fd: c_int, buffer: *const c_void, count: usize, offset: i64) -> isize,
        Some(format!("write {}", fd_name(fd))), failed: -1;
    c"pread64" Read: fn pread64_(fd: c_int, buffer: *mut c_void, count: usize, offset: i64) -> isize,
        Some(format!("read {}", fd_name(fd))), failed: -1;
    c"pwrite64" Write: fn pwrite64_(fd: c_int, buffer: *const c_void, count: usize, offset: i64) -> isize,
        Some(format!("write {}", fd_name(fd))), failed: -1;
}

/// Puts our functions into the unix VFS's table.
pub fn install() {
    for entry in &ENTRIES {
        // Absent: this build of SQLite does not make the call under this name.
        let Some(before) = get(entry.name) else { continue };
        entry.before.store(before as *mut c_void, Ordering::Release);
        set(entry.name, entry.ours);
    }
}

/// Puts back what was there: only while nobody else has put anything on top.
pub fn uninstall() {
    for entry in ENTRIES.iter().filter(|entry| get(entry.name).is_some()) {
        set(entry.name, entry.before());
    }
}

fn get(name: &CStr) -> Option<AnyCall> {
    // SAFETY: the method of a registered VFS, called with it and a NUL-terminated name.
    unsafe { vfs_methods("unix").xGetSystemCall.unwrap()(vfs("unix"), name.as_ptr()) }
}

fn set(name: &CStr, call: AnyCall) {
    // SAFETY: the method of a registered VFS; the call has the type that os_unix calls by this name.
    let code = unsafe { vfs_methods("unix").xSetSystemCall.unwrap()(vfs("unix"), name.as_ptr(), Some(call)) };
    assert_eq!(code, ffi::SQLITE_OK);
}

/// "If … the zName parameter is NULL, restore all system calls to their default settings" (`unixSetSystemCall`): ours, and
/// kanbanlock's.
pub fn reset_table() {
    // SAFETY: the method of a registered VFS; a null name is allowed.
    let code = unsafe { vfs_methods("unix").xSetSystemCall.unwrap()(vfs("unix"), ptr::null(), None) };
    assert_eq!(code, ffi::SQLITE_OK);
}

/// The calls that are in the table of this build of SQLite, with the kind that each can be made to fail as.
pub fn table_of_this_build() -> Vec<(String, Option<Call>)> {
    let mut names = Vec::new();
    let mut name = ptr::null();
    loop {
        // SAFETY: the method of a registered VFS, called with it and NULL or the name before.
        name = unsafe { vfs_methods("unix").xNextSystemCall.unwrap()(vfs("unix"), name) };
        if name.is_null() {
            return names;
        }
        // SAFETY: a name in SQLite's static table.
        let text = unsafe { CStr::from_ptr(name) };
        let call = ENTRIES.iter().find(|entry| entry.name == text).map(|entry| entry.call);
        names.push((text.to_str().unwrap().to_owned(), call));
    }
}

// In libc's place. ------------------------------------------------------------------------------------------

/// The answer of a call that may be struck.
fn answer(call: Call, describe: impl FnOnce() -> Option<String>, real: impl FnOnce() -> c_int) -> c_int {
    match strike(call, describe) {
        None => real(),
        Some(Effect::Error(errno)) => {
            set_errno(errno);
            -1
        }
        Some(Effect::DoneButError(errno)) => {
            real();
            set_errno(errno);
            -1
        }
        Some(Effect::Short) => panic!("{call:?} moves no bytes"),
    }
}

fn system_call(result: libc::c_long) -> c_int {
    c_int::try_from(result).unwrap()
}

/// Nothing here is about what a disk has: the sync itself is left out.
#[unsafe(no_mangle)]
extern "C" fn fsync(fd: c_int) -> c_int {
    answer(Call::Fsync, || Some(format!("fsync {}", fd_name(fd))), || 0)
}

/// SQLite's xSleep: in WAL mode it waits for up to ten seconds for a lock that keeps failing.
#[unsafe(no_mangle)]
extern "C" fn nanosleep(_for: *const libc::timespec, _rest: *mut libc::timespec) -> c_int {
    0
}

/// # Safety
///
/// open(2)
#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: the caller's own arguments. (open64 and open are one on 64-bit Linux.)
    let real = || unsafe { libc::open64(path, flags, mode) };
    // SAFETY: open's path is NUL-terminated.
    answer(Call::OwnOpen, || Some(format!("open {} {flags:#o}", unsafe { own_path(path) })), real)
}

/// kanbanlock's paths: the lock file's name, and `/proc/self/fd/…` of what it opens again.
///
/// # Safety
///
/// `path` is NUL-terminated.
unsafe fn own_path(path: *const c_char) -> String {
    // SAFETY: as the caller says.
    let text = unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned();
    match text.strip_prefix("/proc/self/fd/").and_then(|fd| fd.parse().ok()) {
        Some(fd) => format!("again {}", fd_name(fd)),
        None => name_of(Path::new(&text)),
    }
}

/// # Safety
///
/// fstat(2)
#[unsafe(no_mangle)]
unsafe extern "C" fn fstat(fd: c_int, stat: *mut libc::stat64) -> c_int {
    // SAFETY: the caller's own arguments. (stat64 and stat are one on 64-bit Linux.)
    answer(Call::OwnFstat, || Some(format!("fstat {}", fd_name(fd))), || unsafe { libc::fstat64(fd, stat) })
}

/// # Safety
///
/// lstat(2)
#[unsafe(no_mangle)]
unsafe extern "C" fn lstat(path: *const c_char, stat: *mut libc::stat64) -> c_int {
    // SAFETY: the caller's own arguments.
    let real = || unsafe { libc::lstat64(path, stat) };
    // SAFETY: lstat's path is NUL-terminated.
    answer(Call::OwnLstat, || Some(format!("lstat {}", unsafe { own_path(path) })), real)
}

/// # Safety
///
/// stat(2)
#[unsafe(no_mangle)]
unsafe extern "C" fn stat(path: *const c_char, stat: *mut libc::stat64) -> c_int {
    // SAFETY: the caller's own arguments.
    let real = || unsafe { libc::stat64(path, stat) };
    // SAFETY: stat's path is NUL-terminated.
    answer(Call::OwnStat, || Some(format!("stat {}", unsafe { own_path(path) })), real)
}

/// # Safety
///
/// fcntl(2), with at most three arguments: as for the table's fcntl.
#[unsafe(no_mangle)]
unsafe extern "C" fn fcntl(fd: c_int, cmd: c_int, arg: *mut c_void) -> c_int {
    // SAFETY: the caller's own arguments.
    let real = || unsafe { libc::syscall(libc::SYS_fcntl, fd, cmd, arg) };
    answer(Call::OwnFcntl, || Some(format!("fcntl {cmd} {}", fd_name(fd))), || system_call(real()))
}

#[unsafe(no_mangle)]
extern "C" fn flock(fd: c_int, operation: c_int) -> c_int {
    // SAFETY: no pointer.
    let real = || unsafe { libc::syscall(libc::SYS_flock, fd, operation) };
    let what = if operation & libc::LOCK_UN == 0 { "lock" } else { "unlock" };
    answer(Call::Flock, || Some(format!("flock {what} {}", fd_name(fd))), || system_call(real()))
}

#[unsafe(no_mangle)]
extern "C" fn fchmod(fd: c_int, mode: libc::mode_t) -> c_int {
    // SAFETY: no pointer.
    let real = || unsafe { libc::syscall(libc::SYS_fchmod, fd, mode) };
    answer(Call::OwnFchmod, || Some(format!("fchmod {}", fd_name(fd))), || system_call(real()))
}

#[unsafe(no_mangle)]
extern "C" fn fchown(fd: c_int, uid: libc::uid_t, gid: libc::gid_t) -> c_int {
    // SAFETY: no pointer.
    let real = || unsafe { libc::syscall(libc::SYS_fchown, fd, uid, gid) };
    answer(Call::OwnFchown, || Some(format!("fchown {}", fd_name(fd))), || system_call(real()))
}
