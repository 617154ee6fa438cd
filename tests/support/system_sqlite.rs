//! The system's SQLite, `libsqlite3.so.0`, loaded at run time: another copy in this process, beside the bundled one.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::transmute_copy;
use std::ptr;

use kanbanlock::HostApi;
use rusqlite::ffi;

/// The system's SQLite, by dlopen(3).
pub struct System(*mut c_void);

impl System {
    /// `None`, and the line that tells so, where the system has none.
    pub fn load_or_skip() -> Option<System> {
        let system = System::load();
        if system.is_none() {
            println!("SKIPPED: the system has no libsqlite3.so.0 (Debian: libsqlite3-0)");
        }
        system
    }

    fn load() -> Option<System> {
        // SAFETY: a library without initialisers that could hurt.
        let library = unsafe { libc::dlopen(c"libsqlite3.so.0".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        (!library.is_null()).then_some(System(library))
    }

    /// # Safety
    /// `F` is the type of the function `name`, or an `Option` of it.
    unsafe fn function<F>(&self, name: &CStr) -> F {
        // SAFETY: a loaded library.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        // SAFETY: a function pointer of the type that the caller says; NULL only for an Option.
        unsafe { transmute_copy(&symbol) }
    }

    /// Its functions, as `register_with` wants them.
    pub fn api(&self) -> HostApi {
        // SAFETY: each name is that of the field, all from one library, never unloaded.
        unsafe {
            HostApi {
                libversion_number: self.function(c"sqlite3_libversion_number"),
                threadsafe: self.function(c"sqlite3_threadsafe"),
                mprintf: self.function(c"sqlite3_mprintf"),
                log: self.function(c"sqlite3_log"),
                vfs_find: self.function(c"sqlite3_vfs_find"),
                vfs_register: self.function(c"sqlite3_vfs_register"),
                uri_parameter: self.function(c"sqlite3_uri_parameter"),
                uri_key: self.function(c"sqlite3_uri_key"),
            }
        }
    }
}

/// A connection of the system's SQLite.
pub struct SystemConnection<'a> {
    system: &'a System,
    db: *mut c_void,
}

impl SystemConnection<'_> {
    pub fn open<'a>(system: &'a System, uri: &str) -> SystemConnection<'a> {
        type Open = unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, *const c_char) -> c_int;
        // SAFETY: sqlite3_open_v2's type.
        let open: Open = unsafe { system.function(c"sqlite3_open_v2") };
        let uri = CString::new(uri).unwrap();
        let mut db = ptr::null_mut();
        let flags = ffi::SQLITE_OPEN_READWRITE | ffi::SQLITE_OPEN_CREATE | ffi::SQLITE_OPEN_URI;
        // SAFETY: as sqlite3_open_v2 wants it.
        assert_eq!(unsafe { open(uri.as_ptr(), &raw mut db, flags, ptr::null()) }, ffi::SQLITE_OK);
        SystemConnection { system, db }
    }

    /// sqlite3_exec: the primary result code.
    pub fn execute(&self, sql: &str) -> c_int {
        type Execute = unsafe extern "C" fn(
            *mut c_void,
            *const c_char,
            *const c_void,
            *const c_void,
            *mut *mut c_char,
        ) -> c_int;
        // SAFETY: sqlite3_exec's type.
        let execute: Execute = unsafe { self.system.function(c"sqlite3_exec") };
        let sql = CString::new(sql).unwrap();
        // SAFETY: an open connection; no callback, no error text.
        unsafe { execute(self.db, sql.as_ptr(), ptr::null(), ptr::null(), ptr::null_mut()) }
    }
}

impl Drop for SystemConnection<'_> {
    fn drop(&mut self) {
        type Close = unsafe extern "C" fn(*mut c_void) -> c_int;
        // SAFETY: sqlite3_close's type.
        let close: Close = unsafe { self.system.function(c"sqlite3_close") };
        // SAFETY: an open connection, not used again.
        unsafe { close(self.db) };
    }
}
