//! `register_with`: another copy of SQLite in this process, here the system's `libsqlite3.so.0`, loaded at run
//! time beside the bundled one.

mod support;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::transmute_copy;
use std::ptr;

use kanbanlock::{HostApi, Options, register_with};
use rusqlite::ffi;
use support::{TestDb, code, is_flocked};

/// The system's SQLite, by dlopen(3).
struct System(*mut c_void);

impl System {
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

    fn api(&self) -> HostApi {
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
struct SystemConnection<'a> {
    system: &'a System,
    db: *mut c_void,
}

impl SystemConnection<'_> {
    fn open<'a>(system: &'a System, uri: &str) -> SystemConnection<'a> {
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

    fn execute(&self, sql: &str) -> c_int {
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

/// With close-proof locks even the plain unix VFSes of two copies exclude each other, readers included, once both have
/// registered.
#[test]
fn close_proof_locks_exclude_between_two_copies() {
    let Some(system) = System::load() else {
        println!("SKIPPED: the system has no libsqlite3.so.0 (Debian: libsqlite3-0)");
        return;
    };
    kanbanlock::register().unwrap();
    // SAFETY: System::api.
    unsafe { register_with(system.api(), &Options::new()) }.unwrap();
    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let bundled = db.open("unix");
        support::set_journal_mode(&bundled, journal_mode);
        bundled.execute_batch("CREATE TABLE t (x)").unwrap();
        let other = SystemConnection::open(&system, &format!("file:{}?vfs=unix", db.path().display()));
        assert_eq!(other.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1)"), ffi::SQLITE_OK);
        assert_eq!(code(bundled.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY, "{journal_mode}");
        assert_eq!(other.execute("COMMIT"), ffi::SQLITE_OK);
        bundled.execute_batch("BEGIN; SELECT * FROM t").unwrap();
        if journal_mode == "delete" {
            assert_eq!(other.execute("INSERT INTO t VALUES (2)"), ffi::SQLITE_BUSY, "the other copy reads");
        }
        bundled.execute_batch("COMMIT").unwrap();
        assert_eq!(other.execute("INSERT INTO t VALUES (2)"), ffi::SQLITE_OK);
    }
}

#[test]
fn two_copies_of_sqlite_in_one_process_have_a_registration_each_and_one_gate() {
    let Some(system) = System::load() else {
        println!("SKIPPED: the system has no libsqlite3.so.0 (Debian: libsqlite3-0)");
        return;
    };
    kanbanlock::register().unwrap();
    // SAFETY: System::api.
    unsafe { register_with(system.api(), &Options::new()) }.unwrap();
    // SAFETY: ditto. Again: idempotent for this copy as well.
    unsafe { register_with(system.api(), &Options::new()) }.unwrap();
    // SAFETY: sqlite3_vfs_find of that copy.
    let theirs = unsafe { (system.api().vfs_find)(c"kanbanlock".as_ptr()) };
    // SAFETY: a NUL-terminated name.
    let ours = unsafe { ffi::sqlite3_vfs_find(c"kanbanlock".as_ptr()) };
    assert!(!theirs.is_null() && !ours.is_null());
    assert_ne!(theirs as usize, ours as usize, "one structure in two lists would splice them");

    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let bundled = db.open("kanbanlock");
        support::set_journal_mode(&bundled, journal_mode);
        bundled.execute_batch("CREATE TABLE t (x)").unwrap();
        let other = SystemConnection::open(&system, &format!("file:{}?vfs=kanbanlock", db.path().display()));

        assert_eq!(other.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (1)"), ffi::SQLITE_OK);
        assert!(is_flocked(&db.lock_file()));
        // POSIX locks do not conflict within a process: only the gate keeps the bundled copy out.
        assert_eq!(code(bundled.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY, "{journal_mode}");
        assert_eq!(other.execute("COMMIT"), ffi::SQLITE_OK);
        bundled.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (2)").unwrap();
        assert_eq!(other.execute("BEGIN IMMEDIATE"), ffi::SQLITE_BUSY, "{journal_mode}");
        bundled.execute_batch("COMMIT").unwrap();
    }
}

/// That something is needed: in a process without kanbanlock both copies get BEGIN IMMEDIATE.
#[test]
fn without_kanbanlock_two_copies_do_not_exclude_each_other() {
    let Some(system) = System::load() else {
        println!("SKIPPED: the system has no libsqlite3.so.0 (Debian: libsqlite3-0)");
        return;
    };
    support::in_own_process("without_kanbanlock_two_copies_do_not_exclude_each_other", || {
        let db = TestDb::new();
        let bundled = db.open("unix");
        bundled.execute_batch("CREATE TABLE t (x)").unwrap();
        let other = SystemConnection::open(&system, &format!("file:{}?vfs=unix", db.path().display()));
        assert_eq!(other.execute("BEGIN IMMEDIATE"), ffi::SQLITE_OK);
        bundled.execute_batch("BEGIN IMMEDIATE").unwrap();
    });
}
