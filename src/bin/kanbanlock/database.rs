//! What the headers of a database's files say, read without SQLite.
//!
//! The files are opened read-only and closed again. That is the very thing that drops POSIX locks, but only those of the
//! process that closes (fcntl(2)), and this one has none: it never opens a database through SQLite. Other processes
//! notice nothing.
//!
//! Formats: <https://www.sqlite.org/fileformat2.html> and <https://www.sqlite.org/walformat.html>.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use crate::failure::{DATA, Failure};
use crate::processes::beside;

/// A database's state on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Database {
    /// `wal`, `rollback`, or `empty` for a file of no bytes.
    pub journal_mode: &'static str,
    /// In bytes.
    pub size: u64,
    /// In bytes; 0 for an empty file.
    pub page_size: u32,
    /// The size of `-wal` in bytes, if it exists.
    pub wal_bytes: Option<u64>,
    /// What the wal-index in `-shm` says, if it exists.
    pub wal_index: Option<WalIndex>,
    /// There is a `-journal` that is not empty: a transaction that goes on, or one to be rolled back.
    pub has_journal: bool,
}

/// The wal-index's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WalIndex {
    /// `mxFrame`: valid frames in `-wal`.
    pub frames: u32,
    /// `mxFrame` - `nBackfill`: those not copied into the database yet.
    pub pending: u32,
}

const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Reads the headers.
///
/// # Errors
///
/// The database cannot be read, or is no database.
pub fn read(db: &Path) -> Result<Database, Failure> {
    let attributes = std::fs::metadata(db).map_err(|error| Failure::of_file(db, &error))?;
    let not = |what: &str| Failure::new(DATA, format!("{}: {what}", db.display()));
    if !attributes.is_file() {
        return Err(not("not a regular file"));
    }
    let mut header = [0; 100];
    let (journal_mode, page_size) = match read_start(db, &mut header) {
        Ok(()) if !header.starts_with(MAGIC) => {
            return Err(not("not an SQLite database (or an encrypted one)"));
        }
        Ok(()) => {
            // "The value 1 represents a page size of 65536"; "read version … 1 for legacy; 2 for WAL".
            let size = match u16::from_be_bytes([header[16], header[17]]) {
                1 => 65_536,
                size => u32::from(size),
            };
            (if header[19] == 2 { "wal" } else { "rollback" }, size)
        }
        Err(error) if error.kind() == ErrorKind::UnexpectedEof && attributes.len() == 0 => ("empty", 0),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Err(not("not an SQLite database")),
        Err(error) => return Err(Failure::of_file(db, &error)),
    };
    let size_of = |suffix| std::fs::metadata(beside(db, suffix)).ok().map(|attributes| attributes.len());
    Ok(Database {
        journal_mode,
        size: attributes.len(),
        page_size,
        wal_bytes: size_of("-wal"),
        wal_index: read_wal_index(&beside(db, "-shm")),
        has_journal: size_of("-journal").is_some_and(|size| size > 0),
    })
}

fn read_start(path: &Path, buffer: &mut [u8]) -> io::Result<()> {
    File::open(path)?.read_exact_at(buffer, 0)
}

/// How often a header that is just being written is read again.
const ATTEMPTS: usize = 20;

/// "The header … 48 bytes, … two copies", then `nBackfill` at offset 96, all in native byte order.
fn read_wal_index(shm: &Path) -> Option<WalIndex> {
    for _ in 0..ATTEMPTS {
        let mut bytes = [0; 100];
        read_start(shm, &mut bytes).ok()?;
        let at = |offset: usize| {
            u32::from_ne_bytes([bytes[offset], bytes[offset + 1], bytes[offset + 2], bytes[offset + 3]])
        };
        let is_initialised = bytes[12] != 0;
        if bytes[..48] == bytes[48..96] && is_initialised {
            return Some(WalIndex { frames: at(16), pending: at(16).saturating_sub(at(96)) });
        }
    }
    None
}
