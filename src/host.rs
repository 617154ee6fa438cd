//! One copy of SQLite, seen as the handful of functions that it gives a VFS shim.
//!
//! A process may hold several copies of SQLite (Python's own and a bundled one, say); each has its own list of
//! VFSes, its own log and its own allocator. [`HostApi`] names the functions of *one* copy, and everything in
//! kanbanlock that talks back to SQLite does so through the copy that called it.
//!
//! Uses: `ffi`, `error`, `events`.

use std::ffi::{CStr, CString, c_char, c_int};

use crate::error::rc;
use crate::events::{self, About};
use crate::ffi;

/// The functions of one copy of SQLite.
///
/// [`HostApi::linked`] is the copy that this binary is linked with. For any other, fill the fields with that
/// copy's functions (from `sqlite3_api_routines`, or found by `dlsym`) and pass it to
/// [`register_with`](crate::register_with).
#[derive(Clone, Copy, Debug)]
pub struct HostApi {
    /// `sqlite3_libversion_number` <https://www.sqlite.org/c3ref/libversion.html>
    pub libversion_number: ffi::LibversionNumber,
    /// `sqlite3_threadsafe` <https://www.sqlite.org/c3ref/threadsafe.html>; `None` if it cannot be had
    /// (`sqlite3_api_routines` lacks it): then the host is taken to be thread-safe.
    pub threadsafe: Option<ffi::Threadsafe>,
    /// `sqlite3_mprintf` <https://www.sqlite.org/c3ref/mprintf.html>
    pub mprintf: ffi::Mprintf,
    /// `sqlite3_log` <https://www.sqlite.org/c3ref/log.html>
    pub log: ffi::Log,
    /// `sqlite3_vfs_find` <https://www.sqlite.org/c3ref/vfs_find.html>
    pub vfs_find: ffi::VfsFind,
    /// `sqlite3_vfs_register` <https://www.sqlite.org/c3ref/vfs_find.html>
    pub vfs_register: ffi::VfsRegister,
    /// `sqlite3_uri_parameter` <https://www.sqlite.org/c3ref/uri_boolean.html>
    pub uri_parameter: ffi::UriParameter,
    /// `sqlite3_uri_key`, since SQLite 3.31; without it a misspelt `kanbanlock_…` URI parameter goes unnoticed.
    pub uri_key: Option<ffi::UriKey>,
}

impl HostApi {
    /// The copy of SQLite that this binary is linked with (3.31 or later, for `sqlite3_uri_key`).
    pub fn linked() -> HostApi {
        HostApi {
            libversion_number: ffi::sqlite3_libversion_number,
            threadsafe: Some(ffi::sqlite3_threadsafe),
            mprintf: ffi::sqlite3_mprintf,
            log: ffi::sqlite3_log,
            vfs_find: ffi::sqlite3_vfs_find,
            vfs_register: ffi::sqlite3_vfs_register,
            uri_parameter: ffi::sqlite3_uri_parameter,
            uri_key: Some(ffi::sqlite3_uri_key),
        }
    }
}

/// A [`HostApi`] whose functions are known to be what they say: safe to call.
#[derive(Clone, Copy, Debug)]
pub struct Host(HostApi);

impl Host {
    /// # Safety
    ///
    /// Every function of `api` is the one that its field names, of one and the same copy of SQLite, and that
    /// copy stays loaded until the process ends.
    pub unsafe fn new(api: HostApi) -> Host {
        Host(api)
    }

    /// True if `other` is the same copy of SQLite: two copies cannot share a `sqlite3_vfs_find`.
    pub fn is_same_copy(&self, other: &Host) -> bool {
        std::ptr::fn_addr_eq(self.0.vfs_find, other.0.vfs_find)
    }

    /// For example 3051003 for 3.51.3.
    pub fn version(&self) -> c_int {
        // SAFETY: Host::new: this is sqlite3_libversion_number, which takes nothing and may be called any time.
        unsafe { (self.0.libversion_number)() }
    }

    /// False only for a build with SQLITE_THREADSAFE=0.
    pub fn is_threadsafe(&self) -> bool {
        let Some(threadsafe) = self.0.threadsafe else { return true };
        // SAFETY: Host::new: this is sqlite3_threadsafe, which takes nothing and may be called any time.
        unsafe { threadsafe() != 0 }
    }

    /// Writes one line to SQLite's error log (`SQLITE_CONFIG_LOG`), if the application has set one up; and to the
    /// loggers of `events.rs`. Every line of the shim's goes this way.
    pub fn log(&self, code: c_int, message: &str, about: About) {
        events::note(code, message, about);
        let message = c_string(message);
        // SAFETY: Host::new: this is sqlite3_log; the format `%s` takes exactly one NUL-terminated string.
        unsafe { (self.0.log)(code, c"%s".as_ptr(), message.as_ptr()) }
    }

    /// The message in memory from SQLite's allocator, which SQLite frees; null if out of memory.
    pub fn allocate_message(&self, message: &str) -> *mut c_char {
        let message = c_string(message);
        // SAFETY: Host::new: this is sqlite3_mprintf; the format `%s` takes exactly one NUL-terminated string.
        unsafe { (self.0.mprintf)(c"%s".as_ptr(), message.as_ptr()) }
    }

    /// `<name>/<real>`, freeing `real`; null if out of memory.
    ///
    /// # Safety
    ///
    /// `real` is null or a string from this copy's allocator that nobody else will use or free.
    pub unsafe fn allocate_vfs_name(&self, name: &CStr, real: *mut c_char) -> *mut c_char {
        // SAFETY: Host::new: this is sqlite3_mprintf. `%s` takes `name`; `%z` takes `real`: "works like %s
        // except that after substitution, sqlite3_free() is called on the input", which the caller allows.
        unsafe { (self.0.mprintf)(c"%s/%z".as_ptr(), name.as_ptr(), real) }
    }

    /// The VFS of that name, or the default VFS; null if there is none.
    pub fn vfs_find(&self, name: Option<&CStr>) -> *mut ffi::sqlite3_vfs {
        let name = name.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: Host::new: this is sqlite3_vfs_find, which takes NULL or a NUL-terminated string.
        unsafe { (self.0.vfs_find)(name) }
    }

    /// Puts `vfs` on this copy's list of VFSes, or moves it there.
    ///
    /// # Safety
    ///
    /// `vfs` is a complete VFS that stays valid until the process ends and is on no other copy's list.
    pub unsafe fn vfs_register(&self, vfs: *mut ffi::sqlite3_vfs, make_default: bool) -> c_int {
        // SAFETY: Host::new: this is sqlite3_vfs_register; the caller vouches for `vfs`.
        unsafe { (self.0.vfs_register)(vfs, c_int::from(make_default)) }
    }

    /// The value of a URI parameter of `filename`.
    ///
    /// # Safety
    ///
    /// `filename` is a name that this copy of SQLite passed to xOpen for a main database, still valid.
    pub unsafe fn uri_parameter(&self, filename: *const c_char, name: &CStr) -> Option<String> {
        // SAFETY: Host::new: this is sqlite3_uri_parameter: "if F is the database filename pointer passed into
        // the xOpen() method of a VFS implementation", P a parameter's name; both hold here.
        let value = unsafe { (self.0.uri_parameter)(filename, name.as_ptr()) };
        // SAFETY: the value is NULL or a NUL-terminated string inside `filename`'s memory (ditto).
        unsafe { owned_string(value) }
    }

    /// The names of all URI parameters of `filename`; empty where this SQLite is older than 3.31.
    ///
    /// # Safety
    ///
    /// As for [`Host::uri_parameter`].
    pub unsafe fn uri_keys(&self, filename: *const c_char) -> Vec<String> {
        let Some(uri_key) = self.0.uri_key else { return Vec::new() };
        (0..)
            .map_while(|index| {
                // SAFETY: Host::new: this is sqlite3_uri_key, which answers NULL past the last parameter.
                let key = unsafe { uri_key(filename, index) };
                // SAFETY: the key is NULL or a NUL-terminated string inside `filename`'s memory.
                unsafe { owned_string(key) }
            })
            .collect()
    }

    /// True if this SQLite has the WAL-reset race: "3.7.0 through 3.51.2", fixed by back-ports in 3.44.6 and
    /// 3.50.7. <https://www.sqlite.org/wal.html#walresetbug>
    pub fn has_wal_reset_race(&self) -> bool {
        let version = self.version();
        let patched = (3_044_006..3_045_000).contains(&version) || (3_050_007..3_051_000).contains(&version);
        version < 3_051_003 && !patched
    }

    /// A one-line explanation of a failure that we also return as a result code.
    pub fn log_failure(&self, code: c_int, message: &str, about: About) -> c_int {
        debug_assert_ne!(rc::primary(code), rc::OK);
        self.log(code, message, about);
        code
    }
}

/// `message` up to its first NUL byte (ours have none; a path inside one cannot either).
fn c_string(message: &str) -> CString {
    let end = message.find('\0').unwrap_or(message.len());
    CString::new(&message[..end]).unwrap_or_default()
}

/// # Safety
///
/// `text` is null or a NUL-terminated string that is valid during the call.
unsafe fn owned_string(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller vouches for the string.
    let text = unsafe { CStr::from_ptr(text) };
    Some(text.to_string_lossy().into_owned())
}
