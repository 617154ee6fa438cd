//! `ffi.rs` against libsqlite3-sys: the same structures, field by field, and the same constants.

use std::mem::{align_of, offset_of, size_of};

use rusqlite::ffi as sys;

use crate::error::rc;
use crate::ffi as ours;

macro_rules! assert_same_layout {
    ($type:ident: $($field:ident),*) => {
        assert_eq!(size_of::<ours::$type>(), size_of::<sys::$type>(), stringify!($type));
        assert_eq!(align_of::<ours::$type>(), align_of::<sys::$type>(), stringify!($type));
        $(assert_eq!(
            offset_of!(ours::$type, $field),
            offset_of!(sys::$type, $field),
            concat!(stringify!($type), ".", stringify!($field))
        );)*
    };
}

#[test]
fn structures_are_laid_out_as_in_libsqlite3_sys() {
    assert_same_layout!(sqlite3_file: pMethods);
    assert_same_layout!(
        sqlite3_io_methods: iVersion, xClose, xRead, xWrite, xTruncate, xSync, xFileSize, xLock, xUnlock,
        xCheckReservedLock, xFileControl, xSectorSize, xDeviceCharacteristics, xShmMap, xShmLock, xShmBarrier,
        xShmUnmap, xFetch, xUnfetch
    );
    assert_same_layout!(
        sqlite3_vfs: iVersion, szOsFile, mxPathname, pNext, zName, pAppData, xOpen, xDelete, xAccess,
        xFullPathname, xDlOpen, xDlError, xDlSym, xDlClose, xRandomness, xSleep, xCurrentTime, xGetLastError,
        xCurrentTimeInt64, xSetSystemCall, xGetSystemCall, xNextSystemCall
    );
}

#[test]
fn constants_are_those_of_libsqlite3_sys() {
    assert_eq!(ours::SQLITE_OPEN_READONLY, sys::SQLITE_OPEN_READONLY);
    assert_eq!(ours::SQLITE_OPEN_MAIN_DB, sys::SQLITE_OPEN_MAIN_DB);
    assert_eq!(ours::SQLITE_FCNTL_LOCKSTATE, sys::SQLITE_FCNTL_LOCKSTATE);
    assert_eq!(ours::SQLITE_FCNTL_VFSNAME, sys::SQLITE_FCNTL_VFSNAME);
    assert_eq!(ours::SQLITE_FCNTL_PRAGMA, sys::SQLITE_FCNTL_PRAGMA);
    assert_eq!(ours::SQLITE_FCNTL_HAS_MOVED, sys::SQLITE_FCNTL_HAS_MOVED);
    assert_eq!(ours::SQLITE_FCNTL_LOCK_TIMEOUT, sys::SQLITE_FCNTL_LOCK_TIMEOUT);
    assert_eq!(rc::PERM, sys::SQLITE_PERM);
    assert_eq!(rc::BUSY, sys::SQLITE_BUSY);
    assert_eq!(rc::NOMEM, sys::SQLITE_NOMEM);
    assert_eq!(rc::NOTFOUND, sys::SQLITE_NOTFOUND);
    assert_eq!(rc::FULL, sys::SQLITE_FULL);
    assert_eq!(rc::CANTOPEN, sys::SQLITE_CANTOPEN);
    assert_eq!(rc::WARNING, sys::SQLITE_WARNING);
    assert_eq!(rc::CANTOPEN_ISDIR, sys::SQLITE_CANTOPEN_ISDIR);
    assert_eq!(rc::CANTOPEN_SYMLINK, sys::SQLITE_CANTOPEN_SYMLINK);
    assert_eq!(rc::READONLY, sys::SQLITE_READONLY);
    assert_eq!(rc::READONLY_DBMOVED, sys::SQLITE_READONLY_DBMOVED);
    assert_eq!(rc::READONLY_DIRECTORY, sys::SQLITE_READONLY_DIRECTORY);
    assert_eq!(rc::IOERR_UNLOCK, sys::SQLITE_IOERR_UNLOCK);
    assert_eq!(rc::IOERR_LOCK, sys::SQLITE_IOERR_LOCK);
    assert_eq!(rc::IOERR_CLOSE, sys::SQLITE_IOERR_CLOSE);
    assert_eq!(rc::IOERR_SHMLOCK, sys::SQLITE_IOERR_SHMLOCK);
    assert_eq!(rc::IOERR_SHMMAP, sys::SQLITE_IOERR_SHMMAP);
}
