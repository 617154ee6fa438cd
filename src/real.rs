//! The real VFS and its open files: what the shim wraps, as handles that forward one call each.
//!
//! Architecture invariant: nothing is decided here. A handle is a copy of a pointer; it forwards the arguments
//! that it got and returns the result code that came back. No Rust reference to the file's memory exists
//! while the real VFS runs: the handles hold raw pointers, and read a method pointer out before calling it.
//!
//! Uses: `lock`, `ffi`, `error`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;

use crate::error::rc;
use crate::ffi;
use crate::lock::{LockLevel, RealLocks};

/// The VFS that the shim wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealVfs(NonNull<ffi::sqlite3_vfs>);

impl RealVfs {
    /// # Safety
    ///
    /// `vfs` is registered with its copy of SQLite, and stays valid until the process ends. (SQLite's own
    /// VFSes are static; `sqlite3_vfs_unregister` of a wrapped VFS is the one way to break this.)
    pub unsafe fn new(vfs: NonNull<ffi::sqlite3_vfs>) -> RealVfs {
        RealVfs(vfs)
    }

    /// The pointer that every forwarded method must get as its first argument.
    pub fn as_ptr(self) -> *mut ffi::sqlite3_vfs {
        self.0.as_ptr()
    }

    /// A copy of the structure: the methods, the sizes and the version.
    pub fn methods(self) -> ffi::sqlite3_vfs {
        // SAFETY: RealVfs::new: the pointer is valid; the structure is Copy, and what SQLite changes in it
        // (pNext, under its own mutex) is not used.
        unsafe { self.0.as_ptr().read() }
    }

    /// Its name, as registered.
    pub fn name(self) -> String {
        let name = self.methods().zName;
        if name.is_null() {
            return String::from("?");
        }
        // SAFETY: not null, and a registered VFS's zName is a NUL-terminated string that lives as long as it.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }

    /// `xGetSystemCall`: `None` if there is no such method, or no such call.
    pub fn system_call(self, name: &CStr) -> Option<unsafe extern "C" fn()> {
        let methods = self.methods();
        let x_get_system_call = methods.xGetSystemCall.filter(|_| methods.iVersion >= 3)?;
        methods.xSetSystemCall?;
        // SAFETY: the method of the real VFS, called with the real VFS and a NUL-terminated name.
        unsafe { x_get_system_call(self.as_ptr(), name.as_ptr()) }
    }

    /// `xSetSystemCall`, for a call that [`RealVfs::system_call`] has found.
    ///
    /// # Safety
    ///
    /// `call` is a function of the type that the real VFS calls under that name, and may be called until the process
    /// ends.
    pub unsafe fn set_system_call(self, name: &CStr, call: unsafe extern "C" fn()) {
        let Some(x_set_system_call) = self.methods().xSetSystemCall else { return };
        // SAFETY: the method of the real VFS, called with the real VFS and a NUL-terminated name; the caller vouches
        // for `call`.
        unsafe { x_set_system_call(self.as_ptr(), name.as_ptr(), Some(call)) };
    }

    /// `xOpen`
    ///
    /// # Safety
    ///
    /// The arguments are those of an xOpen call that SQLite made, and `file` has at least the real VFS's
    /// `szOsFile` bytes.
    pub unsafe fn x_open(
        self,
        name: *const c_char,
        file: *mut ffi::sqlite3_file,
        flags: c_int,
        out_flags: *mut c_int,
    ) -> c_int {
        let Some(x_open) = self.methods().xOpen else { return rc::CANTOPEN };
        // SAFETY: the method of the real VFS, called with the real VFS, and the caller vouches for the rest.
        unsafe { x_open(self.as_ptr(), name, file, flags, out_flags) }
    }
}

/// An open file of the real VFS, in the memory behind a `ShimFile` (`file.rs`).
#[derive(Clone, Copy, Debug)]
pub struct RealFile(NonNull<ffi::sqlite3_file>);

impl RealFile {
    /// # Safety
    ///
    /// `file` was opened by the real VFS, and stays open and in place as long as the handle is used. SQLite
    /// serialises the calls on one file, so no other thread is inside one of its methods.
    pub unsafe fn new(file: NonNull<ffi::sqlite3_file>) -> RealFile {
        RealFile(file)
    }

    /// The pointer that every forwarded method must get as its first argument.
    #[inline]
    pub fn as_ptr(self) -> *mut ffi::sqlite3_file {
        self.0.as_ptr()
    }

    /// True if the real VFS left methods behind: then xClose must be called even after a failed xOpen
    /// ("…xClose will be called even if xOpen fails", <https://www.sqlite.org/c3ref/vfs.html>).
    pub fn has_methods(self) -> bool {
        !self.methods_ptr().is_null()
    }

    /// The highest interface version (1, 2 or 3) whose methods are all there.
    ///
    /// A real file may advertise a version and leave methods of it NULL (os_unix does so for xShmMap of
    /// `unix-none`; sqlite-vfs for xFetch): a method that is not there cannot be forwarded to, so the shim
    /// must not advertise it.
    pub fn version(self) -> c_int {
        self.method(|methods| {
            let has_shm = methods.xShmMap.is_some()
                && methods.xShmLock.is_some()
                && methods.xShmBarrier.is_some()
                && methods.xShmUnmap.is_some();
            let has_fetch = methods.xFetch.is_some() && methods.xUnfetch.is_some();
            match methods.iVersion {
                3.. if has_shm && has_fetch => 3,
                2.. if has_shm => 2,
                _ => 1,
            }
        })
    }

    #[inline]
    fn methods_ptr(self) -> *const ffi::sqlite3_io_methods {
        // SAFETY: RealFile::new: the file is in place, and pMethods is its first field, always readable.
        unsafe { (*self.0.as_ptr()).pMethods }
    }

    /// One entry, or several, of the method table.
    #[inline]
    pub fn method<M>(self, pick: impl FnOnce(&ffi::sqlite3_io_methods) -> M) -> M {
        // SAFETY: the file is open, so pMethods points to a table, which stays as it is while the file is open.
        // The reference ends here, before any method is called.
        let methods = unsafe { &*self.methods_ptr() };
        pick(methods)
    }

    /// `xClose`
    pub fn x_close(self) -> c_int {
        let Some(x_close) = self.method(|methods| methods.xClose) else { return rc::IOERR_CLOSE };
        // SAFETY: the real file's own method, called with the real file, which is open (RealFile::new).
        unsafe { x_close(self.as_ptr()) }
    }

    /// `xFileControl`
    ///
    /// # Safety
    ///
    /// `arg` is what the opcode `op` calls for. <https://www.sqlite.org/c3ref/c_fcntl_begin_atomic_write.html>
    pub unsafe fn x_file_control(self, op: c_int, arg: *mut c_void) -> c_int {
        let Some(x_file_control) = self.method(|methods| methods.xFileControl) else { return rc::NOTFOUND };
        // SAFETY: the real file's own method, called with the real file; the caller vouches for `arg`.
        unsafe { x_file_control(self.as_ptr(), op, arg) }
    }
}

impl RealFile {
    /// Has the file been "renamed, moved, or deleted since it was first opened"? `None`: it cannot tell.
    pub fn has_moved(self) -> Option<bool> {
        let mut has_moved: c_int = 0;
        let arg: *mut c_int = &raw mut has_moved;
        // SAFETY: SQLITE_FCNTL_HAS_MOVED "interprets its argument as a pointer to an integer": `has_moved`.
        let rc = unsafe { self.x_file_control(ffi::SQLITE_FCNTL_HAS_MOVED, arg.cast()) };
        (rc == rc::OK).then_some(has_moved != 0)
    }
}

/// The header of a mapped wal-index: the first region of a `-shm`. <https://www.sqlite.org/walformat.html#the_wal_index_header>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalIndex(NonNull<u32>);

impl WalIndex {
    /// # Safety
    ///
    /// `region` is region 0 as xShmMap returned it, null or at least 48 bytes, and stays mapped as long as this is used:
    /// until xShmUnmap.
    pub unsafe fn new(region: *mut c_void) -> Option<WalIndex> {
        NonNull::new(region.cast()).map(WalIndex)
    }

    /// How many bytes the WAL has at least, if its committed frames are all there: "mxFrame", each a frame header of 24
    /// bytes and a page, behind a WAL header of 32 bytes. `None`: the header is not that of a WAL with frames.
    pub fn wal_size(self) -> Option<u64> {
        let [version, pages, frames] = [0, 3, 4].map(|word| self.read(word));
        let [is_init, _, page_size @ ..] = pages.to_ne_bytes();
        // "The size of a database page in bytes, or 1 to represent a page size of 65536."
        let page_size = match u16::from_ne_bytes(page_size) {
            1 => 65536,
            size => u64::from(size),
        };
        let is_valid = version == 3_007_000 && is_init == 1 && frames != 0;
        is_valid.then(|| 32 + u64::from(frames) * (24 + page_size))
    }

    /// "iChange: a counter that is incremented with each transaction".
    #[inline]
    pub fn changes(self) -> u32 {
        self.read(2)
    }

    #[inline]
    fn read(self, word: usize) -> u32 {
        // SAFETY: WalIndex::new: 48 bytes, of which `word` (0 to 4) is one of the first five words.
        let word = unsafe { self.0.add(word) };
        // SAFETY: mapped (WalIndex::new), and aligned: regions are pages. Other processes write it at any time: volatile.
        unsafe { word.read_volatile() }
    }
}

impl RealLocks for RealFile {
    #[inline]
    fn x_lock(&self, level: c_int) -> c_int {
        let Some(x_lock) = self.method(|methods| methods.xLock) else { return rc::IOERR_LOCK };
        // SAFETY: the real file's own method, called with the real file, which is open (RealFile::new).
        unsafe { x_lock(self.as_ptr(), level) }
    }

    #[inline]
    fn x_unlock(&self, level: c_int) -> c_int {
        let Some(x_unlock) = self.method(|methods| methods.xUnlock) else { return rc::IOERR_UNLOCK };
        // SAFETY: the real file's own method, called with the real file, which is open (RealFile::new).
        unsafe { x_unlock(self.as_ptr(), level) }
    }

    #[inline]
    fn x_shm_lock(&self, offset: c_int, count: c_int, flags: c_int) -> c_int {
        let Some(x_shm_lock) = self.method(|methods| methods.xShmLock) else { return rc::IOERR_SHMLOCK };
        // SAFETY: the real file's own method, called with the real file, which is open (RealFile::new).
        unsafe { x_shm_lock(self.as_ptr(), offset, count, flags) }
    }

    fn x_shm_unmap(&self, delete: c_int) -> c_int {
        let Some(x_shm_unmap) = self.method(|methods| methods.xShmUnmap) else { return rc::OK };
        // SAFETY: the real file's own method, called with the real file, which is open (RealFile::new).
        unsafe { x_shm_unmap(self.as_ptr(), delete) }
    }

    fn lock_state(&self) -> Option<LockLevel> {
        let mut level: c_int = -1;
        let arg: *mut c_int = &raw mut level;
        // SAFETY: SQLITE_FCNTL_LOCKSTATE: "causes the xFileControl method to write the current state of the
        // lock … into an integer that the pArg argument points to": `level` is that integer.
        let rc = unsafe { self.x_file_control(ffi::SQLITE_FCNTL_LOCKSTATE, arg.cast()) };
        if rc == rc::OK { LockLevel::from_raw(level) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first words of a wal-index: version, padding, change counter, flags with the page size, mxFrame.
    fn wal_size(version: u32, is_init: u8, page_size: u16, frames: u32) -> Option<u64> {
        let [low, high] = page_size.to_ne_bytes();
        let mut header = [version, 0, 7, u32::from_ne_bytes([is_init, 0, low, high]), frames];
        // SAFETY: as many words as are read, in place during the call.
        unsafe { WalIndex::new(header.as_mut_ptr().cast()) }.unwrap().wal_size()
    }

    #[test]
    fn a_wal_is_as_long_as_its_index_says() {
        assert_eq!(wal_size(3_007_000, 1, 4096, 1), Some(32 + 24 + 4096));
        assert_eq!(wal_size(3_007_000, 1, 1, 3), Some(32 + 3 * (24 + 65536)));
        assert_eq!(wal_size(3_007_000, 1, 512, u32::MAX), Some(32 + 4_294_967_295 * 536));
        for (version, is_init, frames) in [(3_007_000, 1, 0), (3_007_000, 0, 1), (3_021_000, 1, 1)] {
            assert_eq!(wal_size(version, is_init, 4096, frames), None, "{version} {is_init} {frames}");
        }
        // SAFETY: null is allowed.
        assert_eq!(unsafe { WalIndex::new(std::ptr::null_mut()) }, None);
    }
}
