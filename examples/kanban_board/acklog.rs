//! # The acknowledgement log: what SQLite told a process, kept outside the database
//!
//! A worker appends one line *after* COMMIT returned SQLITE_OK, with one write(2) to a file opened O_APPEND:
//! a process killed at any moment has at most one commit that it could not log any more, and at most one torn
//! line, the last one. A torn line acknowledges nothing. Latencies and SQLITE_BUSY are logged here as well, so
//! that a kill loses no measurement.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, ErrorKind, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Result;

/// One line of the log.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Entry {
    /// COMMIT of write transaction `seq` returned OK, `ns` after its first BEGIN IMMEDIATE.
    Commit { seq: i64, ns: u64 },
    /// SQLITE_BUSY (`code` is the extended code) after `ns`: the transaction is tried again, or, while
    /// `opening`, the switch of the journal mode.
    Busy { opening: bool, code: i32, ns: u64 },
    /// A read transaction ended with everything in agreement.
    Snapshot { ns: u64 },
    /// A read transaction saw what no snapshot may show.
    Violation(String),
    /// Something else was done, this many times since it was last logged.
    Did { what: String, count: u64 },
}

/// The writing side, one per process.
pub(crate) struct AckLog(File);

impl AckLog {
    /// Creates the log, which must not exist: no two incarnations share one.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).create_new(true).open(path);
        file.map(Self).map_err(|error| format!("cannot create {}: {error}", path.display()).into())
    }

    /// Appends one entry with one write(2).
    pub(crate) fn append(&mut self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        self.0.write_all(&line)
    }
}

/// The complete entries of a log; none if the process was killed before it created one.
pub(crate) fn entries(path: &Path) -> Result<impl Iterator<Item = Result<Entry>>> {
    let mut reader = match File::open(path) {
        Ok(file) => Some(BufReader::new(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(format!("cannot read {}: {error}", path.display()).into()),
    };
    let mut line = Vec::new();
    Ok(std::iter::from_fn(move || {
        line.clear();
        match reader.as_mut()?.read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => Some(serde_json::from_slice(&line).map_err(Into::into)),
            Ok(_) => None,
            Err(error) => Some(Err(error.into())),
        }
    }))
}
