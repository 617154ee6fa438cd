//! A file opened through the C interface of a VFS, as SQLite itself would.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;

use rusqlite::ffi;

use super::TestDb;

pub const READ_WRITE: c_int = ffi::SQLITE_OPEN_READWRITE | ffi::SQLITE_OPEN_CREATE;
pub const MAIN_DB: c_int = READ_WRITE | ffi::SQLITE_OPEN_MAIN_DB;
pub const LOCK_EXCLUSIVE: c_int = ffi::SQLITE_SHM_LOCK | ffi::SQLITE_SHM_EXCLUSIVE;
pub const UNLOCK_EXCLUSIVE: c_int = ffi::SQLITE_SHM_UNLOCK | ffi::SQLITE_SHM_EXCLUSIVE;
pub const LOCK_SHARED: c_int = ffi::SQLITE_SHM_LOCK | ffi::SQLITE_SHM_SHARED;
pub const UNLOCK_SHARED: c_int = ffi::SQLITE_SHM_UNLOCK | ffi::SQLITE_SHM_SHARED;

pub fn vfs(name: &str) -> *mut ffi::sqlite3_vfs {
    let name = CString::new(name).unwrap();
    // SAFETY: a NUL-terminated name.
    let vfs = unsafe { ffi::sqlite3_vfs_find(name.as_ptr()) };
    assert!(!vfs.is_null());
    vfs
}

pub fn vfs_methods(name: &str) -> ffi::sqlite3_vfs {
    // SAFETY: registered, hence valid.
    unsafe { *vfs(name) }
}

/// A file opened through the C interface, in memory that was full of 0xAA.
pub struct RawFile {
    memory: Vec<u64>,
    _name: Vec<u8>,
}

impl RawFile {
    /// `name` as SQLite passes it: the path, then URI parameters, each NUL-terminated, then an empty one.
    pub fn open(
        vfs_name: &str,
        path: &str,
        parameters: &[&str],
        flags: c_int,
    ) -> Result<RawFile, (c_int, RawFile)> {
        let mut name = format!("{path}\0").into_bytes();
        for parameter in parameters {
            name.extend_from_slice(parameter.as_bytes());
            name.push(0);
        }
        name.extend_from_slice(&[0, 0, 0]);
        let methods = vfs_methods(vfs_name);
        let words = usize::try_from(methods.szOsFile).unwrap().div_ceil(8);
        let mut file = RawFile { memory: vec![0xAAAA_AAAA_AAAA_AAAA; words], _name: name };
        let name = file._name.as_ptr().cast::<c_char>();
        let mut out_flags = 0;
        // SAFETY: szOsFile bytes, and a name in SQLite's form.
        let code =
            unsafe { methods.xOpen.unwrap()(vfs(vfs_name), name, file.ptr(), flags, &raw mut out_flags) };
        if code == ffi::SQLITE_OK { Ok(file) } else { Err((code, file)) }
    }

    pub fn main_db(vfs_name: &str, db: &TestDb) -> RawFile {
        RawFile::open(vfs_name, db.path().to_str().unwrap(), &[], MAIN_DB).map_err(|(code, _)| code).unwrap()
    }

    /// The same file object in other memory; the old memory is scribbled over.
    pub fn move_elsewhere(mut self) -> RawFile {
        let moved = RawFile { memory: self.memory.clone(), _name: std::mem::take(&mut self._name) };
        self.memory.fill(0x5555_5555_5555_5555);
        moved
    }

    pub fn ptr(&mut self) -> *mut ffi::sqlite3_file {
        self.memory.as_mut_ptr().cast()
    }

    pub fn methods_ptr(&mut self) -> *const ffi::sqlite3_io_methods {
        // SAFETY: pMethods is the first field.
        unsafe { (*self.ptr()).pMethods }
    }

    pub fn methods(&mut self) -> ffi::sqlite3_io_methods {
        // SAFETY: open.
        unsafe { *self.methods_ptr() }
    }

    pub fn lock(&mut self, level: c_int) -> c_int {
        let x_lock = self.methods().xLock.unwrap();
        // SAFETY: open.
        unsafe { x_lock(self.ptr(), level) }
    }

    pub fn unlock(&mut self, level: c_int) -> c_int {
        let x_unlock = self.methods().xUnlock.unwrap();
        // SAFETY: open.
        unsafe { x_unlock(self.ptr(), level) }
    }

    pub fn map_shm(&mut self) {
        let x_shm_map = self.methods().xShmMap.unwrap();
        let mut region: *mut c_void = ptr::null_mut();
        // SAFETY: open.
        let code = unsafe { x_shm_map(self.ptr(), 0, 32768, 1, (&raw mut region).cast()) };
        assert_eq!(code, ffi::SQLITE_OK);
    }

    pub fn shm_lock(&mut self, offset: c_int, count: c_int, flags: c_int) -> c_int {
        let x_shm_lock = self.methods().xShmLock.unwrap();
        // SAFETY: open.
        unsafe { x_shm_lock(self.ptr(), offset, count, flags) }
    }

    pub fn file_control(&mut self, op: c_int, arg: *mut c_void) -> c_int {
        let x_file_control = self.methods().xFileControl.unwrap();
        // SAFETY: open; the test passes what `op` calls for.
        unsafe { x_file_control(self.ptr(), op, arg) }
    }

    /// xShmUnmap, which SQLite calls before xClose, and xClose.
    pub fn close(mut self) {
        if let Some(x_shm_unmap) = self.methods().xShmUnmap {
            // SAFETY: open.
            assert_eq!(unsafe { x_shm_unmap(self.ptr(), 0) }, ffi::SQLITE_OK);
        }
        let x_close = self.methods().xClose.unwrap();
        // SAFETY: open.
        assert_eq!(unsafe { x_close(self.ptr()) }, ffi::SQLITE_OK);
    }
}
