//! What can go wrong: result codes for SQLite, and the typed error of registration.
//!
//! Uses: nothing.

use std::ffi::c_int;
use std::fmt;

/// Result codes that the shim itself returns. <https://www.sqlite.org/rescode.html>
///
/// A refused gate is exactly `BUSY`, in no extended form: the SQLite core compares with `==`.
pub mod rc {
    use std::ffi::c_int;

    /// SQLITE_OK
    pub const OK: c_int = 0;
    /// SQLITE_ERROR
    pub const ERROR: c_int = 1;
    /// SQLITE_PERM: "access permission denied" (the lock file exists, but not for us)
    pub const PERM: c_int = 3;
    /// SQLITE_BUSY: the gate is refused
    pub const BUSY: c_int = 5;
    /// SQLITE_NOMEM
    pub const NOMEM: c_int = 7;
    /// SQLITE_NOTFOUND: an xFileControl opcode that is not handled
    pub const NOTFOUND: c_int = 12;
    /// SQLITE_FULL: no room to create the lock file
    pub const FULL: c_int = 13;
    /// SQLITE_CANTOPEN
    pub const CANTOPEN: c_int = 14;
    /// SQLITE_NOTICE, for events only: a wait is over
    pub const NOTICE: c_int = 27;
    /// SQLITE_WARNING, for the log only
    pub const WARNING: c_int = 28;
    /// SQLITE_CANTOPEN_ISDIR
    pub const CANTOPEN_ISDIR: c_int = CANTOPEN | (2 << 8);
    /// SQLITE_CANTOPEN_SYMLINK
    pub const CANTOPEN_SYMLINK: c_int = CANTOPEN | (6 << 8);
    /// SQLITE_READONLY: the database has several names
    pub const READONLY: c_int = 8;
    /// SQLITE_READONLY_DBMOVED: the database, its `-wal` or its `-shm` is not in its place
    pub const READONLY_DBMOVED: c_int = READONLY | (4 << 8);
    /// SQLITE_READONLY_DIRECTORY: the lock file cannot be created there
    pub const READONLY_DIRECTORY: c_int = READONLY | (6 << 8);
    /// SQLITE_IOERR_WRITE
    pub const IOERR_WRITE: c_int = 10 | (3 << 8);
    /// SQLITE_IOERR_TRUNCATE
    pub const IOERR_TRUNCATE: c_int = 10 | (6 << 8);
    /// SQLITE_IOERR_UNLOCK
    pub const IOERR_UNLOCK: c_int = 10 | (8 << 8);
    /// SQLITE_IOERR_LOCK: flock(2) itself failed, or the file is poisoned
    pub const IOERR_LOCK: c_int = 10 | (15 << 8);
    /// SQLITE_IOERR_CLOSE
    pub const IOERR_CLOSE: c_int = 10 | (16 << 8);
    /// SQLITE_IOERR_SHMLOCK
    pub const IOERR_SHMLOCK: c_int = 10 | (20 << 8);
    /// SQLITE_IOERR_SHMMAP
    pub const IOERR_SHMMAP: c_int = 10 | (21 << 8);

    /// The primary code within an extended one. <https://www.sqlite.org/rescode.html#pve>
    pub fn primary(code: c_int) -> c_int {
        code & 0xff
    }
}

/// Why [`register`](crate::register()) or [`Options::register`](crate::Options::register) failed.
///
/// Nothing was registered, and nothing that was registered before has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterError {
    /// The name is empty or has a NUL byte.
    InvalidName {
        /// The name that was asked for.
        name: String,
    },
    /// There is no VFS of that name to wrap.
    RealVfsNotFound {
        /// The real VFS's name; `None` for the default VFS.
        name: Option<String>,
    },
    /// The VFS to wrap already uses `<db>.lock` for itself.
    RealVfsUsesLockFile {
        /// The real VFS's name.
        name: String,
    },
    /// The VFS to wrap is itself a kanbanlock VFS, perhaps another library's in this process, or has one beneath it: each
    /// write would wait for its own flock.
    RealVfsIsKanbanlock {
        /// The real VFS's name.
        name: String,
    },
    /// Another VFS, not ours, already has this name.
    NameTaken {
        /// The name that was asked for.
        name: String,
    },
    /// This name is registered already, with other options (other than `make_default`).
    OptionsDiffer {
        /// The name that was asked for.
        name: String,
    },
    /// SQLite was compiled with SQLITE_THREADSAFE=0.
    SingleThreaded,
    /// SQLite is older than kanbanlock supports.
    TooOld {
        /// `sqlite3_libversion_number()`
        version: c_int,
    },
    /// `sqlite3_vfs_register` refused.
    Sqlite {
        /// SQLite's result code.
        code: c_int,
    },
}

impl fmt::Display for RegisterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegisterError::InvalidName { name } => {
                write!(f, "{name:?} cannot name a VFS: give a name that is not empty and has no NUL byte")
            }
            RegisterError::RealVfsNotFound { name: Some(name) } => write!(
                f,
                "there is no VFS named {name:?} to wrap: register it first, or leave Options::real_vfs \
                 out to wrap SQLite's default VFS"
            ),
            RegisterError::RealVfsNotFound { name: None } => write!(
                f,
                "SQLite has no default VFS to wrap (sqlite3_initialize failed, or it was built with \
                 SQLITE_OS_OTHER): register a VFS first and name it with Options::real_vfs"
            ),
            RegisterError::RealVfsUsesLockFile { name } => write!(
                f,
                "the VFS {name:?} makes a directory at <db>.lock, where kanbanlock needs a file: wrap \
                 \"unix\" instead"
            ),
            RegisterError::RealVfsIsKanbanlock { name } => write!(
                f,
                "the VFS {name:?} is a kanbanlock VFS already, or wraps one, and a write through two of them \
                 would wait for itself: wrap \"unix\" instead"
            ),
            RegisterError::NameTaken { name } => {
                write!(f, "another VFS is registered as {name:?}: choose another name with Options::name")
            }
            RegisterError::OptionsDiffer { name } => write!(
                f,
                "{name:?} is registered with other options: register once, at start-up, or give this set \
                 of options a name of its own with Options::name"
            ),
            RegisterError::SingleThreaded => write!(
                f,
                "this SQLite was compiled with SQLITE_THREADSAFE=0, so it cannot be shared with \
                 kanbanlock's callers safely: use a build with SQLITE_THREADSAFE=1 or 2"
            ),
            RegisterError::TooOld { version } => write!(
                f,
                "this SQLite is version {}.{}.{}; kanbanlock needs 3.14 or later",
                version / 1_000_000,
                version / 1000 % 1000,
                version % 1000
            ),
            RegisterError::Sqlite { code } => write!(
                f,
                "sqlite3_vfs_register failed with result code {code} (see https://www.sqlite.org/rescode.html)"
            ),
        }
    }
}

impl std::error::Error for RegisterError {}
