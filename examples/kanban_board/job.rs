//! # What a child process is told
//!
//! The program runs itself again for every worker and reader: `--child JSON`, hidden, carries the child's
//! whole [`Job`], so parent and child cannot disagree about a default, and `ps` shows what each process is.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};

use super::Result;
use super::board::Database;

/// `PRAGMA journal_mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Journal {
    Wal,
    Delete,
}

/// `PRAGMA synchronous`
#[derive(Clone, Copy, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Synchronous {
    Off,
    Normal,
    Full,
    Extra,
}

/// What a child process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Worker,
    Reader,
}

/// All that a child process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) role: Role,
    pub(crate) number: u32,
    /// 1, and one more after each kill: (worker, incarnation, seq) names a commit for good.
    pub(crate) incarnation: u32,
    pub(crate) database: Database,
    /// The child's acknowledgement log.
    pub(crate) log: PathBuf,
    pub(crate) think: Duration,
    /// Of the random choices, if the role makes any.
    pub(crate) seed: u64,
    /// Whether code of the process opens and closes the database's files meanwhile; the soak's.
    pub(crate) stray_closes: bool,
}

/// Registers kanbanlock if it is what was asked for, and only then: the registration makes the locks of *all*
/// unix connections of the process close-proof, and a comparison run must be stock SQLite.
pub(crate) fn register(vfs: &str) -> Result<()> {
    if vfs == kanbanlock::VFS_NAME {
        kanbanlock::register().map_err(|error| format!("cannot register the VFS kanbanlock: {error}"))?;
    }
    Ok(())
}

/// The name that SQLite and the command line use for a value, `wal` for example.
pub(crate) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Fails if SQLite does not know the VFS; no file is touched.
pub(crate) fn check_vfs(vfs: &str) -> Result<()> {
    register(vfs)?;
    Connection::open_with_flags_and_vfs(":memory:", OpenFlags::default(), vfs)
        .map(drop)
        .map_err(|error| format!("--vfs {vfs}: {error}; try kanbanlock or unix").into())
}

/// A job as the command line has it.
pub(crate) fn parse_job(text: &str) -> serde_json::Result<Job> {
    serde_json::from_str(text)
}
