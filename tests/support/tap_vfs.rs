//! A tap: a VFS that forwards every call to another VFS and lets a test watch, answer or hold up each one.
//!
//! Beneath kanbanlock (kanbanlock wraps the tap, the tap wraps `unix`) it sees what reaches the real VFS; above
//! it (the tap wraps kanbanlock) it sees what SQLite asks. All files are tapped, journals and WAL included.
//!
//! A test implements [`Observer`]; the calls it sees are [`Call`]s. [`Tap::interface`] caps the interface version
//! that files advertise, to build the older real VFSes of the contract tests.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::mem::size_of;
use std::sync::Arc;

use rusqlite::ffi;

/// Which file a call is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Database,
    Wal,
    Journal,
    Other,
}

impl FileKind {
    fn from_flags(flags: c_int) -> FileKind {
        if flags & ffi::SQLITE_OPEN_MAIN_DB != 0 {
            FileKind::Database
        } else if flags & ffi::SQLITE_OPEN_WAL != 0 {
            FileKind::Wal
        } else if flags & ffi::SQLITE_OPEN_MAIN_JOURNAL != 0 {
            FileKind::Journal
        } else {
            FileKind::Other
        }
    }
}

/// One call that the tap forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Open,
    Close,
    Write,
    Truncate,
    Sync,
    Lock(c_int),
    Unlock(c_int),
    ShmMap,
    ShmLock { offset: c_int, count: c_int, flags: c_int },
    ShmUnmap,
    FileControl(c_int),
    Unfetch,
}

/// One call, with the file that it is about.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub method: Method,
    pub kind: FileKind,
    pub path: &'a str,
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LEVELS: [&str; 5] = ["NONE", "SHARED", "RESERVED", "PENDING", "EXCLUSIVE"];
        let level = |level: c_int| usize::try_from(level).ok().and_then(|l| LEVELS.get(l)).unwrap_or(&"?");
        match self.method {
            Method::Lock(to) => write!(f, "xLock {}", level(to)),
            Method::Unlock(to) => write!(f, "xUnlock {}", level(to)),
            Method::ShmLock { offset, count, flags } => {
                let verb = if flags & ffi::SQLITE_SHM_LOCK != 0 { "lock" } else { "unlock" };
                let mode = if flags & ffi::SQLITE_SHM_SHARED != 0 { "shared" } else { "exclusive" };
                let slots = match (offset, count) {
                    (0, 1) => "WRITE".to_owned(),
                    (1, 1) => "CKPT".to_owned(),
                    (2, 1) => "RECOVER".to_owned(),
                    (1, 2) => "CKPT+RECOVER".to_owned(),
                    (n @ 3..8, 1) => format!("READ({})", n - 3),
                    (n @ 3..8, count) => format!("READ({})…READ({})", n - 3, n - 4 + count),
                    other => format!("{other:?}"),
                };
                write!(f, "xShmLock {verb} {mode} {slots}")
            }
            method => write!(f, "x{method:?} {:?}", self.kind),
        }
    }
}

/// What a test does with the calls. Called on the thread that makes the call.
pub trait Observer: Send + Sync {
    /// Before a call is forwarded. `Some(code)`: answer that, do not forward.
    fn before(&self, _call: Call<'_>) -> Option<c_int> {
        None
    }
    /// After it was forwarded, with its answer.
    fn after(&self, _call: Call<'_>, _code: c_int) {}
}

/// A tap to register.
pub struct Tap {
    pub name: &'static str,
    /// The VFS beneath.
    pub parent: &'static str,
    /// The highest interface version that its files advertise: 1, 2 or 3.
    pub interface: c_int,
    /// Call xShmLock not on the VFS beneath but this many bytes further into its file: on what *that* wraps.
    /// For building the xLock-only shim that the tests must be able to catch.
    pub shm_lock_bypass: Option<usize>,
    /// Open databases, then answer this code all the same, leaving the file open.
    pub fail_open_with: Option<c_int>,
    pub observer: Arc<dyn Observer>,
}

impl Tap {
    pub fn new(name: &'static str, parent: &'static str, observer: Arc<dyn Observer>) -> Tap {
        Tap { name, parent, interface: 3, shm_lock_bypass: None, fail_open_with: None, observer }
    }

    /// Registers it (leaking it: SQLite keeps the pointer).
    pub fn register(self) {
        let parent_name = CString::new(self.parent).unwrap();
        // SAFETY: sqlite3_vfs_find takes a NUL-terminated name.
        let parent = unsafe { ffi::sqlite3_vfs_find(parent_name.as_ptr()) };
        assert!(!parent.is_null(), "no VFS {}", self.parent);
        // SAFETY: a registered VFS is valid; the structure is Copy.
        let methods = unsafe { *parent };
        let name = CString::new(self.name).unwrap().into_raw();
        let registered: &'static Registered = Box::leak(Box::new(Registered { tap: self, parent, methods }));
        let app_data: *const Registered = registered;
        let vfs = Box::leak(Box::new(ffi::sqlite3_vfs {
            szOsFile: c_int::try_from(size_of::<TapFile>()).unwrap() + methods.szOsFile,
            pNext: std::ptr::null_mut(),
            zName: name,
            pAppData: app_data.cast_mut().cast(),
            xOpen: Some(x_open),
            xDelete: Some(x_delete),
            xAccess: Some(x_access),
            xFullPathname: Some(x_full_pathname),
            xDlOpen: None,
            xDlError: None,
            xDlSym: None,
            xDlClose: None,
            xRandomness: Some(x_randomness),
            xSleep: Some(x_sleep),
            xCurrentTime: None,
            xGetLastError: Some(x_get_last_error),
            xCurrentTimeInt64: Some(x_current_time),
            xSetSystemCall: None,
            xGetSystemCall: None,
            xNextSystemCall: None,
            ..methods
        }));
        // SAFETY: a complete VFS, leaked.
        let code = unsafe { ffi::sqlite3_vfs_register(vfs, 0) };
        assert_eq!(code, ffi::SQLITE_OK);
    }
}

struct Registered {
    tap: Tap,
    parent: *mut ffi::sqlite3_vfs,
    methods: ffi::sqlite3_vfs,
}

#[repr(C)]
struct TapFile {
    base: ffi::sqlite3_file,
    info: *mut FileInfo,
}

struct FileInfo {
    registered: &'static Registered,
    kind: FileKind,
    path: String,
}

/// # Safety
/// `vfs` is one of ours.
unsafe fn registered(vfs: *mut ffi::sqlite3_vfs) -> &'static Registered {
    // SAFETY: `Tap::register` has put it there.
    unsafe { &*(*vfs).pAppData.cast::<Registered>() }
}

/// # Safety
/// `file` is one of ours.
unsafe fn beneath(file: *mut ffi::sqlite3_file) -> *mut ffi::sqlite3_file {
    // SAFETY: szOsFile has room for the parent's file behind ours.
    unsafe { file.cast::<TapFile>().add(1).cast() }
}

/// # Safety
/// `file` is one of ours, open.
unsafe fn methods(
    file: *mut ffi::sqlite3_file,
) -> (*mut ffi::sqlite3_file, &'static ffi::sqlite3_io_methods) {
    // SAFETY: one of ours.
    let below = unsafe { beneath(file) };
    // SAFETY: open, so its method table is there; tables are static.
    (below, unsafe { &*(*below).pMethods })
}

/// Shows the call to the observer, before and after.
///
/// # Safety
/// `file` is one of ours, open.
unsafe fn observed(file: *mut ffi::sqlite3_file, method: Method, forward: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: x_open has written it.
    let info = unsafe { &*(*file.cast::<TapFile>()).info };
    let call = Call { method, kind: info.kind, path: &info.path };
    let observer = &info.registered.tap.observer;
    if let Some(code) = observer.before(call) {
        return code;
    }
    let code = forward();
    observer.after(call, code);
    code
}

unsafe extern "C" fn x_open(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite's call.
    let registered = unsafe { registered(vfs) };
    let path = if name.is_null() {
        String::new()
    } else {
        // SAFETY: NUL-terminated.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    };
    let kind = FileKind::from_flags(flags);
    let call = Call { method: Method::Open, kind, path: &path };
    if let Some(code) = registered.tap.observer.before(call) {
        return code; // and pMethods is left as it was found: some VFSes are as careless as that
    }
    // SAFETY: szOsFile bytes, aligned.
    unsafe { (*file).pMethods = std::ptr::null() };
    // SAFETY: room behind ours.
    let below = unsafe { beneath(file) };
    // SAFETY: SQLite's own arguments.
    let code = unsafe { registered.methods.xOpen.unwrap()(registered.parent, name, below, flags, out_flags) };
    registered.tap.observer.after(call, code);
    // SAFETY: the parent has set it.
    let below_methods = unsafe { (*below).pMethods };
    if code != ffi::SQLITE_OK {
        return code;
    }
    // SAFETY: open.
    let version = unsafe { (*below_methods).iVersion }.min(registered.tap.interface);
    let info = Box::into_raw(Box::new(FileInfo { registered, kind, path }));
    let tap_file = TapFile { base: ffi::sqlite3_file { pMethods: table(version) }, info };
    // SAFETY: szOsFile bytes, aligned.
    unsafe { file.cast::<TapFile>().write(tap_file) };
    match registered.tap.fail_open_with {
        Some(failure) if kind == FileKind::Database => failure,
        _ => code,
    }
}

fn table(version: c_int) -> &'static ffi::sqlite3_io_methods {
    static V3: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
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
    static V2: ffi::sqlite3_io_methods =
        ffi::sqlite3_io_methods { iVersion: 2, xFetch: None, xUnfetch: None, ..V3 };
    static V1: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
        iVersion: 1,
        xShmMap: None,
        xShmLock: None,
        xShmBarrier: None,
        xShmUnmap: None,
        ..V2
    };
    match version {
        3.. => &V3,
        2 => &V2,
        _ => &V1,
    }
}

unsafe extern "C" fn x_close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite's call.
    let (below, methods) = unsafe { methods(file) };
    // SAFETY: SQLite's call.
    let code = unsafe { observed(file, Method::Close, || methods.xClose.unwrap()(below)) };
    // SAFETY: x_open's box; the last call on this file.
    drop(unsafe { Box::from_raw((*file.cast::<TapFile>()).info) });
    code
}

macro_rules! forward {
    ($name:ident, $field:ident ( $($arg:ident : $type:ty),* ) $(-> $ret:ty)? $(, as $method:expr)?) => {
        unsafe extern "C" fn $name(file: *mut ffi::sqlite3_file $(, $arg: $type)*) $(-> $ret)? {
            // SAFETY: SQLite's call.
            let (below, methods) = unsafe { methods(file) };
            // SAFETY: the parent's own method, its own file, SQLite's own arguments.
            let forward = || unsafe { methods.$field.unwrap()(below $(, $arg)*) };
            forward!(@end file, forward $(, $method)?)
        }
    };
    (@end $file:ident, $forward:ident) => { $forward() };
    // SAFETY: SQLite's call.
    (@end $file:ident, $forward:ident, $method:expr) => { unsafe { observed($file, $method, $forward) } };
}

forward!(x_read, xRead(buffer: *mut c_void, amount: c_int, offset: i64) -> c_int);
forward!(x_write, xWrite(buffer: *const c_void, amount: c_int, offset: i64) -> c_int, as Method::Write);
forward!(x_truncate, xTruncate(size: i64) -> c_int, as Method::Truncate);
forward!(x_sync, xSync(flags: c_int) -> c_int, as Method::Sync);
forward!(x_file_size, xFileSize(size: *mut i64) -> c_int);
forward!(x_lock, xLock(level: c_int) -> c_int, as Method::Lock(level));
forward!(x_unlock, xUnlock(level: c_int) -> c_int, as Method::Unlock(level));
forward!(x_check_reserved_lock, xCheckReservedLock(out: *mut c_int) -> c_int);
forward!(x_file_control, xFileControl(op: c_int, arg: *mut c_void) -> c_int, as Method::FileControl(op));
forward!(x_sector_size, xSectorSize() -> c_int);
forward!(x_device_characteristics, xDeviceCharacteristics() -> c_int);
forward!(x_shm_map, xShmMap(page: c_int, size: c_int, extend: c_int, out: *mut *mut c_void) -> c_int, as Method::ShmMap);
forward!(x_shm_barrier, xShmBarrier());
forward!(x_shm_unmap, xShmUnmap(delete: c_int) -> c_int, as Method::ShmUnmap);
forward!(x_fetch, xFetch(offset: i64, amount: c_int, out: *mut *mut c_void) -> c_int);
forward!(x_unfetch, xUnfetch(offset: i64, page: *mut c_void) -> c_int, as Method::Unfetch);

unsafe extern "C" fn x_shm_lock(
    file: *mut ffi::sqlite3_file,
    offset: c_int,
    count: c_int,
    flags: c_int,
) -> c_int {
    // SAFETY: x_open has written it.
    let bypass = unsafe { (*(*file.cast::<TapFile>()).info).registered.tap.shm_lock_bypass };
    // SAFETY: SQLite's call.
    let below = unsafe { beneath(file) };
    // SAFETY: the test says that an open file of the VFS beneath the next one lies there.
    let below = unsafe { below.byte_add(bypass.unwrap_or(0)) };
    // SAFETY: open.
    let methods = unsafe { &*(*below).pMethods };
    // SAFETY: its own method and SQLite's own arguments.
    let forward = || unsafe { methods.xShmLock.unwrap()(below, offset, count, flags) };
    // SAFETY: SQLite's call.
    unsafe { observed(file, Method::ShmLock { offset, count, flags }, forward) }
}

macro_rules! forward_vfs {
    ($name:ident, $field:ident ( $($arg:ident : $type:ty),* )) => {
        unsafe extern "C" fn $name(vfs: *mut ffi::sqlite3_vfs $(, $arg: $type)*) -> c_int {
            // SAFETY: SQLite's call.
            let registered = unsafe { registered(vfs) };
            // SAFETY: the parent's own method and SQLite's own arguments.
            unsafe { registered.methods.$field.unwrap()(registered.parent $(, $arg)*) }
        }
    };
}

forward_vfs!(x_delete, xDelete(name: *const c_char, sync: c_int));
forward_vfs!(x_access, xAccess(name: *const c_char, flags: c_int, out: *mut c_int));
forward_vfs!(x_full_pathname, xFullPathname(name: *const c_char, size: c_int, out: *mut c_char));
forward_vfs!(x_randomness, xRandomness(size: c_int, out: *mut c_char));
forward_vfs!(x_sleep, xSleep(microseconds: c_int));
forward_vfs!(x_get_last_error, xGetLastError(size: c_int, out: *mut c_char));
forward_vfs!(x_current_time, xCurrentTimeInt64(out: *mut i64));
