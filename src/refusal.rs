//! Why the gate cannot be had at all, in a result code and in words that say what to do.
//!
//! The result codes were chosen by the text that a user sees: the table in ARCHITECTURE.md, "The lock file".
//!
//! Uses: `sys`, `error`.

use std::ffi::{CStr, OsStr, c_int};
use std::io;
use std::os::unix::ffi::OsStrExt;

use crate::error::rc;
use crate::sys::{self, Attributes};

/// Why the gate cannot be had, other than that another holds it.
#[derive(Debug)]
pub struct Failure {
    /// SQLite's.
    pub code: c_int,
    /// A sentence that begins with the lock file's path.
    pub message: String,
}

impl Failure {
    /// `what`: the rest of a sentence that begins with the lock file.
    pub fn new(lock_file: &CStr, code: c_int, what: &str) -> Failure {
        Failure { code, message: format!("{} {what}", lock_file.to_string_lossy()) }
    }

    /// flock(2) failed, and not because another holds it.
    pub fn of_flock(lock_file: &CStr, error: &io::Error) -> Failure {
        // ENOLCK, ENOSYS, EOPNOTSUPP …: an error, not SQLITE_BUSY, which would be tried again without end.
        Failure::new(
            lock_file,
            rc::IOERR_LOCK,
            &format!(
                "cannot be locked: flock(2): {error}. The file system may not support flock; put the \
                 database on a local one"
            ),
        )
    }

    /// It cannot be opened.
    pub fn of_open(lock_file: &CStr, error: &io::Error) -> Failure {
        match error.raw_os_error() {
            Some(libc::ELOOP) => Failure::symbolic_link(lock_file),
            Some(libc::EISDIR) => Failure::new(
                lock_file,
                rc::CANTOPEN_ISDIR,
                "is a directory: another tool's lock (SQLite's unix-dotfile VFS, a mkdir lock). Stop that \
                 tool, then remove the directory",
            ),
            // "ENXIO … the file is a UNIX domain socket", open(2).
            Some(libc::ENXIO) => match sys::lstat(lock_file) {
                Ok(attributes) => Failure::not_regular(lock_file, &attributes),
                Err(_) => Failure::new(lock_file, rc::CANTOPEN, &format!("cannot be opened: {error}")),
            },
            Some(libc::EACCES | libc::EPERM) => Failure::new(
                lock_file,
                rc::PERM,
                "exists, but this process may not open it for reading and writing. Give it the database's \
                 owner and mode (chown --reference, chmod --reference)",
            ),
            _ => Failure::cannot_be(lock_file, "opened", error),
        }
    }

    /// It cannot be created.
    pub fn of_create(lock_file: &CStr, error: &io::Error) -> Failure {
        match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => Failure::new(
                lock_file,
                rc::READONLY_DIRECTORY,
                "does not exist, and this process may not create files in its folder. Make the folder \
                 writable (SQLite needs that for its journals too), or create the file beforehand",
            ),
            _ => Failure::cannot_be(lock_file, "created", error),
        }
    }

    /// A system call failed: it cannot be opened, created, examined.
    pub fn cannot_be(lock_file: &CStr, verb: &str, error: &io::Error) -> Failure {
        let (code, advice) = match error.raw_os_error() {
            Some(libc::EROFS) => (rc::READONLY_DIRECTORY, "open the database with mode=ro"),
            Some(libc::ENOSPC | libc::EDQUOT) => (rc::FULL, "free some space"),
            Some(libc::ENOMEM) => (rc::NOMEM, "free some memory"),
            Some(libc::EMFILE | libc::ENFILE) => {
                (rc::CANTOPEN, "raise the limit of open files (ulimit -n), or close some")
            }
            _ => (rc::CANTOPEN, "check that its folder exists and is reachable"),
        };
        Failure::new(lock_file, code, &format!("cannot be {verb}: {error}; {advice}"))
    }

    fn symbolic_link(lock_file: &CStr) -> Failure {
        let target = std::fs::read_link(OsStr::from_bytes(lock_file.to_bytes())).unwrap_or_default();
        let state = if sys::stat(lock_file).is_ok() { "a" } else { "a dangling" };
        Failure::new(
            lock_file,
            rc::CANTOPEN_SYMLINK,
            &format!(
                "is {state} symbolic link to {}, and a lock file is not looked for elsewhere. Remove the link",
                target.display()
            ),
        )
    }

    /// A FIFO, a socket, a device.
    pub fn not_regular(lock_file: &CStr, attributes: &Attributes) -> Failure {
        Failure::new(
            lock_file,
            rc::CANTOPEN,
            &format!("is {}, not a regular file. Remove it", attributes.type_name()),
        )
    }
}
