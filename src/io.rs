//! The methods of an open database file: `sqlite3_io_methods`, one trampoline for each.
//!
//! A trampoline casts, guards against panics, calls and returns; what happens is decided in `driver.rs`. Three
//! static tables, one for each interface version: a file advertises its *real* file's version, and there is no
//! NULL method under an advertised version.
//!
//! Uses: `file`, `inherited`, `real`, `events`, `lock`, `ffi`, `error`.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::error::rc;
use crate::events;
use crate::ffi::{self, sqlite3_file, sqlite3_int64};
use crate::file::{FileHandle, OpenFile};
use crate::inherited;
use crate::lock::LockLevel;
use crate::real::{RealFile, WalIndex};

/// The table for a real file whose methods are complete up to `version`.
pub fn methods(version: c_int) -> &'static ffi::sqlite3_io_methods {
    match version {
        3.. => &VERSION_3,
        2 => &VERSION_2,
        _ => &VERSION_1,
    }
}

static VERSION_3: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 3,
    xClose: Some(x_close),
    xRead: Some(x_read),
    xWrite: Some(x_write),
    xTruncate: Some(x_truncate),
    xSync: Some(x_sync),
    xFileSize: Some(x_file_size),
    xLock: Some(x_lock),
    xUnlock: Some(x_unlock),
    xCheckReservedLock: Some(x_check_reserved_lock),
    xFileControl: Some(x_file_control),
    xSectorSize: Some(x_sector_size),
    xDeviceCharacteristics: Some(x_device_characteristics),
    xShmMap: Some(x_shm_map),
    xShmLock: Some(x_shm_lock),
    xShmBarrier: Some(x_shm_barrier),
    xShmUnmap: Some(x_shm_unmap),
    xFetch: Some(x_fetch),
    xUnfetch: Some(x_unfetch),
};
static VERSION_2: ffi::sqlite3_io_methods =
    ffi::sqlite3_io_methods { iVersion: 2, xFetch: None, xUnfetch: None, ..VERSION_3 };
static VERSION_1: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 1,
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    ..VERSION_2
};

/// # Safety
///
/// `file` is the first argument of a call that SQLite makes through one of the tables above.
unsafe fn handle(file: *mut sqlite3_file) -> FileHandle {
    // SAFETY: our tables are installed by x_open alone, in memory of szOsFile bytes; SQLite keeps it in place
    // during a call, and serialises the calls on one file (the database's mutex).
    unsafe { FileHandle::new(file) }
}

/// `SQLITE_SHM_UNLOCK | SQLITE_SHM_SHARED`: a READ slot is given up. <https://www.sqlite.org/c3ref/c_shm_exclusive.html>
const UNLOCK_SHARED: c_int = 1 | 4;

// The methods that change locks. --------------------------------------------------------------------------

unsafe extern "C" fn x_close(file: *mut sqlite3_file) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    let code = crate::file::guarded(rc::IOERR_CLOSE, || file.close());
    events::deliver();
    code
}

unsafe extern "C" fn x_lock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    file.guarded(rc::IOERR_LOCK, |open, real| {
        open.unless_inherited(rc::IOERR_LOCK, || open.driver.x_lock(&real, level, open))
    })
}

unsafe extern "C" fn x_unlock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    let code = file.guarded(rc::IOERR_UNLOCK, |open, real| open.driver.x_unlock(&real, level));
    if level == LockLevel::None as c_int {
        events::deliver();
    }
    code
}

unsafe extern "C" fn x_shm_lock(file: *mut sqlite3_file, offset: c_int, count: c_int, flags: c_int) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    let code = file.guarded(rc::IOERR_SHMLOCK, |open, real| {
        open.unless_inherited(rc::IOERR_SHMLOCK, || open.driver.x_shm_lock(&real, offset, count, flags, open))
    });
    if flags == UNLOCK_SHARED {
        events::deliver(); // a transaction's last lock in WAL mode, but for SHARED, which it keeps for life
    }
    code
}

unsafe extern "C" fn x_shm_map(
    file: *mut sqlite3_file,
    page: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    file.guarded(rc::IOERR_SHMMAP, |open, real| {
        let Some(x_shm_map) = real.method(|methods| methods.xShmMap) else { return rc::IOERR_SHMMAP };
        let map = || {
            inherited::as_ours(|| {
                // SAFETY: the real file's own method, called with the real file and SQLite's own arguments.
                unsafe { x_shm_map(real.as_ptr(), page, size, extend, out) }
            })
        };
        let code = open.unless_inherited(rc::IOERR_SHMMAP, map);
        let region = if code == rc::OK {
            // SAFETY: "written to *pp", where the answer is SQLITE_OK.
            unsafe { out.read() }
        } else {
            std::ptr::null_mut()
        };
        if let Some(record) = open.inherited.as_ref().filter(|_| !region.is_null()) {
            record.mapped(region.expose_provenance(), usize::try_from(size).unwrap_or(0));
        }
        let first = if page == 0 { region } else { std::ptr::null_mut() };
        // SAFETY: null, or region 0, of `size` bytes (SQLite's is 32 KiB), mapped until xShmUnmap.
        open.place.shm_mapped(unsafe { WalIndex::new(first) });
        code
    })
}

unsafe extern "C" fn x_shm_unmap(file: *mut sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    file.guarded(rc::IOERR_SHMLOCK, |open, real| {
        if let Some(record) = &open.inherited {
            record.about_to_unmap();
        }
        let code = open.driver.x_shm_unmap(&real, delete);
        open.place.shm_unmapped();
        code
    })
}

// The methods that change the file: not in the child of a fork. ----------------------------------------------

unsafe extern "C" fn x_write(
    file: *mut sqlite3_file,
    buffer: *const c_void,
    amount: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    file.guarded(rc::IOERR_WRITE, |open, real| {
        let Some(x_write) = real.method(|methods| methods.xWrite) else { return rc::IOERR_WRITE };
        // SAFETY: the real file's own method, called with the real file and SQLite's own arguments.
        open.unless_inherited(rc::IOERR_WRITE, || unsafe { x_write(real.as_ptr(), buffer, amount, offset) })
    })
}

unsafe extern "C" fn x_truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    file.guarded(rc::IOERR_TRUNCATE, |open, real| {
        let Some(x_truncate) = real.method(|methods| methods.xTruncate) else { return rc::IOERR_TRUNCATE };
        // SAFETY: the real file's own method, called with the real file and SQLite's own arguments.
        open.unless_inherited(rc::IOERR_TRUNCATE, || unsafe { x_truncate(real.as_ptr(), size) })
    })
}

// File controls. --------------------------------------------------------------------------------------------

unsafe extern "C" fn x_file_control(file: *mut sqlite3_file, op: c_int, arg: *mut c_void) -> c_int {
    // SAFETY: SQLite's call.
    let file = unsafe { handle(file) };
    file.guarded(rc::ERROR, |open, real| match op {
        // A build with SQLITE_ENABLE_SETLK_TIMEOUT would otherwise ask for WRITE before the READ slot, which
        // the state machine takes for recovery (row S5), and block in F_SETLKW with the gate unheld.
        ffi::SQLITE_FCNTL_LOCK_TIMEOUT => rc::NOTFOUND,
        // SAFETY: SQLite passes, for these opcodes, the arguments that the functions ask for.
        ffi::SQLITE_FCNTL_VFSNAME => unsafe { vfs_name(open, real, arg.cast()) },
        // SAFETY: ditto.
        ffi::SQLITE_FCNTL_PRAGMA => unsafe { pragma(open, real, arg.cast()) },
        // SAFETY: opcode and argument are those that SQLite, or the application, has passed.
        _ => unsafe { real.x_file_control(op, arg) },
    })
}

/// `SQLITE_FCNTL_VFSNAME`: "used to obtain the names of all VFSes in the VFS stack": ours, then the real one's.
///
/// # Safety
///
/// "A pointer to a `char*`", which receives a string from `sqlite3_malloc` that the caller frees.
unsafe fn vfs_name(open: &OpenFile, real: RealFile, arg: *mut *mut c_char) -> c_int {
    // SAFETY: the argument of SQLITE_FCNTL_VFSNAME (caller).
    let code = unsafe { real.x_file_control(ffi::SQLITE_FCNTL_VFSNAME, arg.cast()) };
    if code != rc::OK {
        return code;
    }
    // SAFETY: a valid pointer to a `char*` (caller), just written by the real VFS.
    let real_name = unsafe { arg.read() };
    // SAFETY: the real VFS has handed this string over to whoever asked: us. `%z` frees it.
    let name = unsafe { open.shim.host.allocate_vfs_name(&open.shim.name, real_name) };
    // SAFETY: a valid pointer to a `char*` (caller).
    unsafe { arg.write(name) };
    rc::OK
}

/// `SQLITE_FCNTL_PRAGMA`: answers exactly `PRAGMA kanbanlock`; every other pragma is the real VFS's and SQLite's.
///
/// # Safety
///
/// "An array of pointers to strings (char**) in which the second element of the array is the name of the
/// pragma and the third element is the argument to the pragma or NULL if the pragma has no argument."
unsafe fn pragma(open: &OpenFile, real: RealFile, arg: *mut *mut c_char) -> c_int {
    // SAFETY: the array has three elements (caller).
    let name = unsafe { arg.add(1) };
    // SAFETY: within the array.
    let name = unsafe { name.read() };
    // SAFETY: the pragma's name is a NUL-terminated string, valid during the call (caller).
    let name = unsafe { CStr::from_ptr(name) };
    if !name.to_bytes().eq_ignore_ascii_case(b"kanbanlock") {
        // SAFETY: the argument of SQLITE_FCNTL_PRAGMA (caller).
        return unsafe { real.x_file_control(ffi::SQLITE_FCNTL_PRAGMA, arg.cast()) };
    }
    let answer = open.shim.host.allocate_message(&open.status());
    if answer.is_null() {
        return rc::NOMEM;
    }
    // SAFETY: "the first element … may optionally be set to … a string obtained from sqlite3_mprintf()".
    unsafe { arg.write(answer) };
    rc::OK
}

// The methods that are forwarded as they are. ---------------------------------------------------------------

/// One trampoline: the same arguments to the real file's method, its answer back. Nothing in it can panic.
macro_rules! forward {
    ($name:ident, $method:ident ( $($arg:ident : $type:ty),* ) $(-> $ret:ty, missing: $missing:expr)?) => {
        unsafe extern "C" fn $name(file: *mut sqlite3_file $(, $arg: $type)*) $(-> $ret)? {
            // SAFETY: SQLite's call.
            let real = unsafe { handle(file) }.real();
            let Some(method) = real.method(|methods| methods.$method) else { return $($missing)? };
            // SAFETY: the real file's own method, called with the real file and SQLite's own arguments.
            unsafe { method(real.as_ptr() $(, $arg)*) }
        }
    };
}

/// SQLITE_IOERR: what a method that is not there answers. (Unreachable: `RealFile::version`.)
const MISSING: c_int = 10;

forward!(x_read, xRead(buffer: *mut c_void, amount: c_int, offset: sqlite3_int64) -> c_int, missing: MISSING);
forward!(x_sync, xSync(flags: c_int) -> c_int, missing: MISSING);
forward!(x_file_size, xFileSize(size: *mut sqlite3_int64) -> c_int, missing: MISSING);
// Forwarded, not answered from the flock: a held gate would make a hot journal look alive.
forward!(x_check_reserved_lock, xCheckReservedLock(out: *mut c_int) -> c_int, missing: MISSING);
forward!(x_sector_size, xSectorSize() -> c_int, missing: 0);
forward!(x_device_characteristics, xDeviceCharacteristics() -> c_int, missing: 0);
forward!(x_shm_barrier, xShmBarrier());
forward!(x_fetch, xFetch(offset: sqlite3_int64, amount: c_int, out: *mut *mut c_void) -> c_int, missing: MISSING);
forward!(x_unfetch, xUnfetch(offset: sqlite3_int64, page: *mut c_void) -> c_int, missing: MISSING);
