//! Row P1: a panic in a callback stops at the C interface, poisons the file and nothing else.

use std::ffi::c_int;

use rusqlite::ffi as sys;

use crate::error::rc;
use crate::ffi;
use crate::file::FileHandle;

const MAIN_DB: c_int = sys::SQLITE_OPEN_READWRITE | sys::SQLITE_OPEN_CREATE | sys::SQLITE_OPEN_MAIN_DB;

/// A database file opened through the VFS, and the memory that it lies in.
fn open(path: &std::path::Path) -> Vec<u64> {
    crate::register().unwrap();
    // SAFETY: a NUL-terminated name.
    let vfs = unsafe { ffi::sqlite3_vfs_find(c"kanbanlock".as_ptr()) };
    // SAFETY: registered, hence valid.
    let methods = unsafe { vfs.read() };
    let mut memory = vec![0_u64; usize::try_from(methods.szOsFile).unwrap().div_ceil(8)];
    // xOpen keeps the name: leaked, as a connection would keep it. Ends in an empty URI parameter.
    let name = format!("{}\0\0\0", path.display()).leak().as_ptr();
    let x_open = methods.xOpen.unwrap();
    // SAFETY: szOsFile bytes and a name in SQLite's form.
    let code = unsafe { x_open(vfs, name.cast(), memory.as_mut_ptr().cast(), MAIN_DB, std::ptr::null_mut()) };
    assert_eq!(code, rc::OK);
    memory
}

#[test]
fn a_panic_poisons_the_file_and_locks_can_still_be_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kanban.db");
    let mut memory = open(&path);
    let file: *mut ffi::sqlite3_file = memory.as_mut_ptr().cast();
    // SAFETY: open, and used by this thread alone.
    let handle = unsafe { FileHandle::new(file) };
    // SAFETY: open: pMethods is the first field.
    let methods = unsafe { (*file).pMethods };
    // SAFETY: open, so a table.
    let methods = unsafe { *methods };
    // SAFETY: open; a lock level.
    let lock = |level| unsafe { methods.xLock.unwrap()(file, level) };
    // SAFETY: open; a lock level.
    let unlock = |level| unsafe { methods.xUnlock.unwrap()(file, level) };

    assert_eq!(lock(sys::SQLITE_LOCK_SHARED), rc::OK);
    assert_eq!(lock(sys::SQLITE_LOCK_RESERVED), rc::OK);
    let lock_file = std::fs::File::open(path.with_extension("db.lock")).unwrap();
    assert!(lock_file.try_lock().is_err(), "held");

    assert_eq!(handle.guarded(rc::IOERR_LOCK, |_, _| panic!("on purpose")), rc::IOERR_LOCK);

    // Nothing new is granted, not even the next step of a transaction …
    assert_eq!(lock(sys::SQLITE_LOCK_EXCLUSIVE), rc::IOERR_LOCK);
    // … but what is held can be given back, and with it the gate.
    assert_eq!(unlock(sys::SQLITE_LOCK_SHARED), rc::OK);
    assert!(lock_file.try_lock().is_ok(), "free");
    lock_file.unlock().unwrap();
    assert_eq!(lock(sys::SQLITE_LOCK_RESERVED), rc::IOERR_LOCK);
    assert_eq!(unlock(sys::SQLITE_LOCK_NONE), rc::OK);
    assert_eq!(lock(sys::SQLITE_LOCK_SHARED), rc::OK, "reading is still allowed");
    assert_eq!(unlock(sys::SQLITE_LOCK_NONE), rc::OK);
    // SAFETY: open; the last call.
    assert_eq!(unsafe { methods.xClose.unwrap()(file) }, rc::OK);
}
