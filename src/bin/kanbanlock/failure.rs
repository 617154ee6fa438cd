//! Why the command could not do what it was asked to, and the exit status for it.
//!
//! The exit statuses are those of flock(1), which takes them from `<sysexits.h>` (sysexits(3head)); `kanbanlock --help`
//! and docs/CLI.md list them.

use std::fmt::Display;
use std::io::{self, ErrorKind};
use std::path::Path;

/// The answer is "no": a lock that was not had in time, something wrong that `doctor` found, a lost commit.
pub const NO: u8 = 1;
/// EX_USAGE: "the command was used incorrectly".
pub const USAGE: u8 = 64;
/// EX_DATAERR: the file is not a database.
pub const DATA: u8 = 65;
/// EX_NOINPUT: the database does not exist, or may not be read.
pub const NO_INPUT: u8 = 66;
/// EX_OSERR: fork(2), pipe(2), `/proc` …
pub const OS: u8 = 71;
/// EX_CANTCREAT: an output file cannot be created.
pub const CANNOT_CREATE: u8 = 73;
/// EX_IOERR: reading or writing failed.
pub const IO: u8 = 74;

/// An exit status and one line for the user that says what to do.
#[derive(Debug)]
pub struct Failure {
    /// One of this module's constants.
    pub status: u8,
    /// What is printed after `kanbanlock: `.
    pub message: String,
}

impl Failure {
    /// With this exit status and message.
    pub fn new(status: u8, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }

    /// A system call on `path` failed: EX_NOINPUT if it is not there or not to be read, or else EX_IOERR.
    pub fn of_file(path: &Path, error: &io::Error) -> Failure {
        let status = match error.kind() {
            ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::IsADirectory => NO_INPUT,
            _ => IO,
        };
        Failure::new(status, format!("{}: {error}", path.display()))
    }

    /// EX_OSERR
    pub fn of_system(what: impl Display, error: &io::Error) -> Failure {
        Failure::new(OS, format!("{what}: {error}"))
    }
}

/// Writing to standard output failed, mostly.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::new(IO, error.to_string())
    }
}
