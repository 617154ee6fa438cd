//! The VFS itself: `sqlite3_vfs`, one trampoline for each method.
//!
//! Only xOpen does more than forward, and only for a main database file. Every forwarded method gets the
//! *real* VFS as its first argument, `xSetSystemCall` and its kin included, and a method that the real VFS
//! does not have is NULL here too. One answer is our own: `xGetSystemCall` knows a kanbanlock by [`MARK`].
//!
//! Uses: `io`, `file`, `inherited`, `shim`, `wait`, `options`, `real`, `events`, `ffi`, `error`.

use std::ffi::{CStr, CString, c_char, c_double, c_int, c_void};

use crate::error::rc;
use crate::events::{self, About};
use crate::ffi::{self, sqlite3_file, sqlite3_int64, sqlite3_syscall_ptr, sqlite3_vfs};
use crate::file::{FileHandle, OpenFile, guarded, shim_file_size};
use crate::inherited;
use crate::io;
use crate::options::{FileOptions, PARAMETERS};
use crate::real::RealVfs;
use crate::shim::Shim;
use crate::wait;

/// The structure to register for `shim`; `None` if the real VFS's `szOsFile` is absurd.
pub fn structure(shim: &'static Shim) -> Option<sqlite3_vfs> {
    let real = shim.real.methods();
    let shim_ptr: *const Shim = shim;
    Some(sqlite3_vfs {
        iVersion: real.iVersion.min(3),
        szOsFile: shim_file_size(real.szOsFile)?,
        mxPathname: real.mxPathname,
        pNext: std::ptr::null_mut(),
        zName: shim.name.as_ptr(),
        pAppData: shim_ptr.cast_mut().cast(),
        xOpen: Some(x_open),
        xDelete: real.xDelete.and(Some(x_delete)),
        xAccess: real.xAccess.and(Some(x_access)),
        xFullPathname: real.xFullPathname.and(Some(x_full_pathname)),
        xDlOpen: real.xDlOpen.and(Some(x_dl_open)),
        xDlError: real.xDlError.and(Some(x_dl_error)),
        xDlSym: real.xDlSym.and(Some(x_dl_sym)),
        xDlClose: real.xDlClose.and(Some(x_dl_close)),
        xRandomness: real.xRandomness.and(Some(x_randomness)),
        xSleep: real.xSleep.and(Some(x_sleep)),
        xCurrentTime: real.xCurrentTime.and(Some(x_current_time)),
        xGetLastError: real.xGetLastError.and(Some(x_get_last_error)),
        xCurrentTimeInt64: since(2, &real, real.xCurrentTimeInt64).and(Some(x_current_time_int64)),
        xSetSystemCall: since(3, &real, real.xSetSystemCall).and(Some(x_set_system_call)),
        xGetSystemCall: since(3, &real, real.xGetSystemCall).and(Some(x_get_system_call)),
        xNextSystemCall: since(3, &real, real.xNextSystemCall).and(Some(x_next_system_call)),
    })
}

/// Not the name of a system call: what `xGetSystemCall` of a kanbanlock VFS answers it, and no other.
const MARK: &CStr = c"kanbanlock";

/// True if `real` is a kanbanlock VFS, of whatever copy of this library in the process, or passes `xGetSystemCall` on
/// to one. Not known, and false, if what that wraps has no system calls.
pub fn is_kanbanlock(real: RealVfs) -> bool {
    real.system_call(MARK).is_some()
}

unsafe extern "C" fn x_get_system_call(vfs: *mut sqlite3_vfs, name: *const c_char) -> sqlite3_syscall_ptr {
    unsafe extern "C" fn mark() {}
    // SAFETY: if it is not null, the NUL-terminated name of a system call.
    if !name.is_null() && unsafe { CStr::from_ptr(name) } == MARK {
        return Some(mark);
    }
    // SAFETY: the caller's own arguments.
    unsafe { get_real_system_call(vfs, name) }
}

/// The structure of a VFS of version 1 ends before the methods of version 2: what is there is not a method.
fn since<M>(version: c_int, real: &sqlite3_vfs, method: Option<M>) -> Option<M> {
    method.filter(|_| real.iVersion >= version)
}

/// # Safety
///
/// `vfs` is the first argument of a call that SQLite makes to one of the methods below.
unsafe fn shim(vfs: *mut sqlite3_vfs) -> &'static Shim {
    // SAFETY: the methods are only in structures that `structure` has made; those live until the process ends.
    let shim: *const Shim = unsafe { (*vfs).pAppData }.cast();
    // SAFETY: `structure` has put a `&'static Shim` there, and nobody writes pAppData.
    unsafe { &*shim }
}

unsafe extern "C" fn x_open(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite's call.
    let shim = unsafe { shim(vfs) };
    if flags & ffi::SQLITE_OPEN_MAIN_DB == 0 || name.is_null() {
        // Not a database: the real VFS's own file in the same memory, with its own methods.
        // SAFETY: SQLite's own arguments; our szOsFile is larger than the real VFS's.
        return inherited::as_ours(|| unsafe { shim.real.x_open(name, file, flags, out_flags) });
    }
    // SAFETY: SQLite gives szOsFile bytes for the file to open.
    let handle = unsafe { FileHandle::new(file) };
    handle.set_closed();
    // SAFETY: not null (above), and "a pointer to a NUL-terminated string" as xFullPathname made it.
    let database = unsafe { CStr::from_ptr(name) };
    let about = About { database: Some(database), waited_ms: None };
    let code = guarded(rc::CANTOPEN, || {
        // SAFETY: `name` is what SQLite passed to xOpen for a main database.
        let options = match unsafe { file_options(shim, name) } {
            Ok(options) => options,
            Err(message) => {
                return shim.host.log_failure(rc::CANTOPEN, &format!("kanbanlock: {message}"), about);
            }
        };
        let mut real_flags = 0;
        // SAFETY: SQLite's own arguments, the same `name` pointer (URI parameters live behind its NUL), our own
        // place for the flags, and the memory behind ShimFile, which szOsFile has room for.
        let open = || unsafe { shim.real.x_open(name, handle.real().as_ptr(), flags, &raw mut real_flags) };
        let code = inherited::as_ours(open);
        if code != rc::OK {
            if handle.real().has_methods() {
                handle.real().x_close();
            }
            return code;
        }
        let writable = real_flags & ffi::SQLITE_OPEN_READONLY == 0;
        let open = match OpenFile::new(shim, handle.real(), database, options, writable) {
            Ok(open) => Box::new(open),
            Err(message) => {
                handle.real().x_close();
                return shim.host.log_failure(rc::CANTOPEN, &format!("kanbanlock: {message}"), about);
            }
        };
        if !out_flags.is_null() {
            // SAFETY: not null, and then SQLite's place for an int.
            unsafe { out_flags.write(real_flags) };
        }
        handle.set_open(open, io::methods(handle.real().version()));
        rc::OK
    });
    events::deliver();
    code
}

/// The file's options, from its URI and the registration's defaults.
///
/// # Safety
///
/// `name` is what SQLite passed to xOpen for a main database.
unsafe fn file_options(shim: &Shim, name: *const c_char) -> Result<FileOptions, String> {
    // SAFETY: as the caller says.
    let mut keys = unsafe { shim.host.uri_keys(name) };
    if keys.is_empty() {
        // A plain path, or a SQLite before 3.31: then the known parameters are asked for one by one.
        keys.extend(PARAMETERS.map(|key| key.to_string_lossy().into_owned()));
    }
    let mut parameters = Vec::new();
    for key in keys {
        let Ok(c_key) = CString::new(key.as_str()) else { continue };
        // SAFETY: as the caller says.
        if let Some(value) = unsafe { shim.host.uri_parameter(name, &c_key) } {
            parameters.push((key, value));
        }
    }
    shim.options.file.overridden_by(&parameters)
}

/// Sleeps until it is the connection's turn, if it waits for the gate; else the real VFS sleeps.
///
/// "The xSleep() method causes the calling thread to sleep for at least the number of microseconds given. The return value
/// … is the number of microseconds that the operating system was asked to sleep" (<https://www.sqlite.org/c3ref/vfs.html>
/// and os_unix.c): "at least" does not hold for the busy handler of a connection that is next.
unsafe extern "C" fn x_sleep(vfs: *mut sqlite3_vfs, microseconds: c_int) -> c_int {
    // SAFETY: SQLite's call.
    let real = unsafe { shim(vfs) }.real;
    let Some(method) = real.methods().xSleep else { return 0 };
    let real_sleep = || {
        // SAFETY: the real VFS's own method, called with the real VFS and SQLite's own argument.
        unsafe { method(real.as_ptr(), microseconds) };
    };
    events::deliver();
    guarded(rc::IOERR_LOCK, || {
        wait::sleep(u64::try_from(microseconds).unwrap_or(0), real_sleep);
        rc::OK
    });
    microseconds
}

/// One trampoline: the same arguments to the real VFS's method, its answer back. Nothing in it can panic.
macro_rules! forward {
    ($name:ident, $method:ident ( $($arg:ident : $type:ty),* ) $(-> $ret:ty, missing: $missing:expr)?) => {
        #[allow(clippy::question_mark)] // some of the methods return an Option
        unsafe extern "C" fn $name(vfs: *mut sqlite3_vfs $(, $arg: $type)*) $(-> $ret)? {
            // SAFETY: SQLite's call.
            let real = unsafe { shim(vfs) }.real;
            let Some(method) = real.methods().$method else { return $($missing)? };
            // SAFETY: the real VFS's own method, called with the real VFS and SQLite's own arguments.
            unsafe { method(real.as_ptr() $(, $arg)*) }
        }
    };
}

forward!(x_delete, xDelete(name: *const c_char, sync_dir: c_int) -> c_int, missing: rc::ERROR);
forward!(x_access, xAccess(name: *const c_char, flags: c_int, out: *mut c_int) -> c_int, missing: rc::ERROR);
// SQLITE_OK_SYMLINK (512) is a success, and passes through like any other code.
forward!(
    x_full_pathname,
    xFullPathname(name: *const c_char, size: c_int, out: *mut c_char) -> c_int, missing: rc::CANTOPEN
);
forward!(x_dl_open, xDlOpen(name: *const c_char) -> *mut c_void, missing: std::ptr::null_mut());
forward!(x_dl_error, xDlError(size: c_int, out: *mut c_char));
forward!(x_dl_sym, xDlSym(library: *mut c_void, symbol: *const c_char) -> sqlite3_syscall_ptr, missing: None);
forward!(x_dl_close, xDlClose(library: *mut c_void));
forward!(x_randomness, xRandomness(size: c_int, out: *mut c_char) -> c_int, missing: 0);
forward!(x_current_time, xCurrentTime(out: *mut c_double) -> c_int, missing: rc::ERROR);
forward!(x_get_last_error, xGetLastError(size: c_int, out: *mut c_char) -> c_int, missing: 0);
forward!(x_current_time_int64, xCurrentTimeInt64(out: *mut sqlite3_int64) -> c_int, missing: rc::ERROR);
forward!(
    x_set_system_call,
    xSetSystemCall(name: *const c_char, call: sqlite3_syscall_ptr) -> c_int, missing: rc::NOTFOUND
);
forward!(get_real_system_call, xGetSystemCall(name: *const c_char) -> sqlite3_syscall_ptr, missing: None);
forward!(x_next_system_call, xNextSystemCall(name: *const c_char) -> *const c_char, missing: std::ptr::null());
