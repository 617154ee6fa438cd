//! The part of SQLite's C interface that a VFS shim needs, declared here and nowhere else.
//!
//! kanbanlock does not depend on libsqlite3-sys: a package with `links = "sqlite3"` may appear once in a
//! binary, so a shim that asked for a particular one would shut out the users of every other. The layouts
//! below are part of SQLite's ABI promise ("new fields may be appended in future versions", iVersion tells)
//! and are held against libsqlite3-sys's bindings in `tests/layout.rs`.
//!
//! Sources: <https://www.sqlite.org/c3ref/vfs.html>, <https://www.sqlite.org/c3ref/io_methods.html>,
//! <https://www.sqlite.org/c3ref/file.html>.
//!
//! Uses: nothing. Declarations only: no code, no policy.

#![allow(non_camel_case_types, non_snake_case, missing_docs)]

use std::ffi::{c_char, c_double, c_int, c_void};

pub type sqlite3_int64 = i64;
pub type sqlite3_syscall_ptr = Option<unsafe extern "C" fn()>;

/// An open file: SQLite allocates `szOsFile` bytes, the VFS fills them, `pMethods` first.
#[repr(C)]
#[derive(Debug)]
pub struct sqlite3_file {
    pub pMethods: *const sqlite3_io_methods,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct sqlite3_io_methods {
    pub iVersion: c_int,
    pub xClose: Option<unsafe extern "C" fn(*mut sqlite3_file) -> c_int>,
    pub xRead: Option<unsafe extern "C" fn(*mut sqlite3_file, *mut c_void, c_int, sqlite3_int64) -> c_int>,
    pub xWrite: Option<unsafe extern "C" fn(*mut sqlite3_file, *const c_void, c_int, sqlite3_int64) -> c_int>,
    pub xTruncate: Option<unsafe extern "C" fn(*mut sqlite3_file, sqlite3_int64) -> c_int>,
    pub xSync: Option<unsafe extern "C" fn(*mut sqlite3_file, c_int) -> c_int>,
    pub xFileSize: Option<unsafe extern "C" fn(*mut sqlite3_file, *mut sqlite3_int64) -> c_int>,
    pub xLock: Option<unsafe extern "C" fn(*mut sqlite3_file, c_int) -> c_int>,
    pub xUnlock: Option<unsafe extern "C" fn(*mut sqlite3_file, c_int) -> c_int>,
    pub xCheckReservedLock: Option<unsafe extern "C" fn(*mut sqlite3_file, *mut c_int) -> c_int>,
    pub xFileControl: Option<unsafe extern "C" fn(*mut sqlite3_file, c_int, *mut c_void) -> c_int>,
    pub xSectorSize: Option<unsafe extern "C" fn(*mut sqlite3_file) -> c_int>,
    pub xDeviceCharacteristics: Option<unsafe extern "C" fn(*mut sqlite3_file) -> c_int>,
    // iVersion >= 2
    pub xShmMap:
        Option<unsafe extern "C" fn(*mut sqlite3_file, c_int, c_int, c_int, *mut *mut c_void) -> c_int>,
    pub xShmLock: Option<unsafe extern "C" fn(*mut sqlite3_file, c_int, c_int, c_int) -> c_int>,
    pub xShmBarrier: Option<unsafe extern "C" fn(*mut sqlite3_file)>,
    pub xShmUnmap: Option<unsafe extern "C" fn(*mut sqlite3_file, c_int) -> c_int>,
    // iVersion >= 3
    pub xFetch:
        Option<unsafe extern "C" fn(*mut sqlite3_file, sqlite3_int64, c_int, *mut *mut c_void) -> c_int>,
    pub xUnfetch: Option<unsafe extern "C" fn(*mut sqlite3_file, sqlite3_int64, *mut c_void) -> c_int>,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct sqlite3_vfs {
    pub iVersion: c_int,
    pub szOsFile: c_int,
    pub mxPathname: c_int,
    pub pNext: *mut sqlite3_vfs,
    pub zName: *const c_char,
    pub pAppData: *mut c_void,
    pub xOpen: Option<
        unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char, *mut sqlite3_file, c_int, *mut c_int) -> c_int,
    >,
    pub xDelete: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char, c_int) -> c_int>,
    pub xAccess: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char, c_int, *mut c_int) -> c_int>,
    pub xFullPathname:
        Option<unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char, c_int, *mut c_char) -> c_int>,
    pub xDlOpen: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char) -> *mut c_void>,
    pub xDlError: Option<unsafe extern "C" fn(*mut sqlite3_vfs, c_int, *mut c_char)>,
    pub xDlSym:
        Option<unsafe extern "C" fn(*mut sqlite3_vfs, *mut c_void, *const c_char) -> sqlite3_syscall_ptr>,
    pub xDlClose: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *mut c_void)>,
    pub xRandomness: Option<unsafe extern "C" fn(*mut sqlite3_vfs, c_int, *mut c_char) -> c_int>,
    pub xSleep: Option<unsafe extern "C" fn(*mut sqlite3_vfs, c_int) -> c_int>,
    pub xCurrentTime: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *mut c_double) -> c_int>,
    pub xGetLastError: Option<unsafe extern "C" fn(*mut sqlite3_vfs, c_int, *mut c_char) -> c_int>,
    // iVersion >= 2
    pub xCurrentTimeInt64: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *mut sqlite3_int64) -> c_int>,
    // iVersion >= 3
    pub xSetSystemCall:
        Option<unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char, sqlite3_syscall_ptr) -> c_int>,
    pub xGetSystemCall: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char) -> sqlite3_syscall_ptr>,
    pub xNextSystemCall: Option<unsafe extern "C" fn(*mut sqlite3_vfs, *const c_char) -> *const c_char>,
}

/// <https://www.sqlite.org/c3ref/c_open_autoproxy.html>
pub const SQLITE_OPEN_READONLY: c_int = 0x0000_0001;
pub const SQLITE_OPEN_MAIN_DB: c_int = 0x0000_0100;

/// <https://www.sqlite.org/c3ref/c_fcntl_begin_atomic_write.html>
pub const SQLITE_FCNTL_LOCKSTATE: c_int = 1;
pub const SQLITE_FCNTL_VFSNAME: c_int = 12;
pub const SQLITE_FCNTL_PRAGMA: c_int = 14;
pub const SQLITE_FCNTL_HAS_MOVED: c_int = 20;
pub const SQLITE_FCNTL_LOCK_TIMEOUT: c_int = 34;

// The functions that the host's copy of SQLite gives a shim, as types: `host.rs` holds one set per copy.
pub type LibversionNumber = unsafe extern "C" fn() -> c_int;
pub type Threadsafe = unsafe extern "C" fn() -> c_int;
pub type Mprintf = unsafe extern "C" fn(*const c_char, ...) -> *mut c_char;
pub type Log = unsafe extern "C" fn(c_int, *const c_char, ...);
pub type VfsFind = unsafe extern "C" fn(*const c_char) -> *mut sqlite3_vfs;
pub type VfsRegister = unsafe extern "C" fn(*mut sqlite3_vfs, c_int) -> c_int;
pub type UriParameter = unsafe extern "C" fn(*const c_char, *const c_char) -> *const c_char;
pub type UriKey = unsafe extern "C" fn(*const c_char, c_int) -> *const c_char;

// The SQLite that this binary is linked with. Only `HostApi::linked` names these symbols.
unsafe extern "C" {
    pub fn sqlite3_libversion_number() -> c_int;
    pub fn sqlite3_threadsafe() -> c_int;
    pub fn sqlite3_mprintf(format: *const c_char, ...) -> *mut c_char;
    pub fn sqlite3_log(code: c_int, format: *const c_char, ...);
    pub fn sqlite3_vfs_find(name: *const c_char) -> *mut sqlite3_vfs;
    pub fn sqlite3_vfs_register(vfs: *mut sqlite3_vfs, make_default: c_int) -> c_int;
    pub fn sqlite3_uri_parameter(filename: *const c_char, name: *const c_char) -> *const c_char;
    pub fn sqlite3_uri_key(filename: *const c_char, index: c_int) -> *const c_char;
}
