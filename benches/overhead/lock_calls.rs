//! SQLite's lock calls by themselves, without SQLite around them: a pair of `sqlite3_io_methods`, called directly.
//!
//! | operation | calls | fcntl(2) calls of os_unix |
//! |---|---|---|
//! | [`Operation::SharedLock`] | `xLock(SHARED)`, `xUnlock(NONE)` | PENDING, SHARED, give PENDING back; unlock all |
//! | [`Operation::ReadLock`] | `xShmLock(READ(1), 1, SHARED)`, to lock and to unlock | one each |
//!
//! The file is a connection's own ([`SQLITE_FCNTL_FILE_POINTER`]), and the connection is idle: it holds none of these
//! locks, and finds the file as it left it.
//!
//! [`SQLITE_FCNTL_FILE_POINTER`]: https://www.sqlite.org/c3ref/c_fcntl_begin_atomic_write.html

use std::ffi::c_int;
use std::marker::PhantomData;
use std::ptr;

use rusqlite::{Connection, ffi};

use crate::Result;
use crate::workload::Operation;

type Lock = unsafe extern "C" fn(*mut ffi::sqlite3_file, c_int) -> c_int;
type ShmLock = unsafe extern "C" fn(*mut ffi::sqlite3_file, c_int, c_int, c_int) -> c_int;

/// READ(1) in the wal-index, the slot that readers use most: the first is number 3.
const READ_SLOT: c_int = 4;

/// The calls of one operation on one file.
pub(crate) struct LockCalls<'a> {
    connection: PhantomData<&'a Connection>,
    file: *mut ffi::sqlite3_file,
    methods: Methods,
}

enum Methods {
    File(Lock, Lock),
    WalIndex(ShmLock),
}

impl<'a> LockCalls<'a> {
    /// Of the database that `connection` has open, and has read from: the wal-index is mapped then, if there is one.
    pub(crate) fn new(connection: &'a Connection, operation: Operation) -> Result<Self> {
        if !connection.is_autocommit() {
            return Err("the connection is in a transaction".into());
        }
        let mut file: *mut ffi::sqlite3_file = ptr::null_mut();
        // SAFETY: the connection is open, and its handle is used for nothing else meanwhile.
        let handle = unsafe { connection.handle() };
        let argument = (&raw mut file).cast();
        // SAFETY: SQLITE_FCNTL_FILE_POINTER takes "a pointer to a pointer to a sqlite3_file"; main is always there.
        let code = unsafe {
            ffi::sqlite3_file_control(handle, c"main".as_ptr(), ffi::SQLITE_FCNTL_FILE_POINTER, argument)
        };
        if code != ffi::SQLITE_OK || file.is_null() {
            return Err(format!("no file pointer: result code {code}").into());
        }
        // SAFETY: the file that the connection has open; `pMethods` of an open file points to its methods.
        let methods = unsafe { &*(*file).pMethods };
        let methods = match (operation, methods.xLock, methods.xUnlock, methods.xShmLock) {
            (Operation::SharedLock, Some(lock), Some(unlock), _) => Methods::File(lock, unlock),
            (Operation::ReadLock, _, _, Some(lock)) => Methods::WalIndex(lock),
            _ => return Err(format!("{} is not a lock of this file", operation.name()).into()),
        };
        Ok(Self { connection: PhantomData, file, methods })
    }

    /// Locks and unlocks `count` times. Nobody else wants the lock: a refusal is an error.
    pub(crate) fn run(&self, count: u32) -> Result<()> {
        let mut codes = 0;
        for _ in 0..count {
            codes |= match self.methods {
                Methods::File(lock, unlock) => {
                    // SAFETY: the open file's own method; xLock goes from NONE to SHARED.
                    let locked = unsafe { lock(self.file, ffi::SQLITE_LOCK_SHARED) };
                    // SAFETY: the open file's own method; xUnlock goes to SHARED or NONE.
                    locked | unsafe { unlock(self.file, ffi::SQLITE_LOCK_NONE) }
                }
                Methods::WalIndex(lock) => {
                    let how = ffi::SQLITE_SHM_LOCK | ffi::SQLITE_SHM_SHARED;
                    // SAFETY: the open file's own method, with its wal-index mapped; a slot that is not held.
                    let locked = unsafe { lock(self.file, READ_SLOT, 1, how) };
                    let how = ffi::SQLITE_SHM_UNLOCK | ffi::SQLITE_SHM_SHARED;
                    // SAFETY: the same slot, and the same kind of lock.
                    locked | unsafe { lock(self.file, READ_SLOT, 1, how) }
                }
            };
        }
        match codes {
            ffi::SQLITE_OK => Ok(()),
            codes => Err(format!("a lock call failed: result codes {codes:#x}, or-ed").into()),
        }
    }
}
