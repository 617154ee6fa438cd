//! # The command line, and what a child process is told
//!
//! The example runs itself again for every worker and reader: `--child JSON`, hidden, carries the child's
//! whole [`Job`], so parent and child cannot disagree about a default, and `ps` shows what each process is.

use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::board::Database;

/// A kanban board shared by many processes: SQLite under contention, audited.
#[derive(Parser)]
#[command(name = "kanban_board")]
pub(crate) struct Options {
    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: u32,

    /// Reader processes beside them
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=256))]
    pub(crate) readers: u32,

    /// How long to run
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub(crate) seconds: u64,

    /// VFS to open the database through; `unix` is stock SQLite
    #[arg(long, value_name = "NAME", default_value = kanbanlock::VFS_NAME)]
    pub(crate) vfs: String,

    /// URI parameter for every connection, such as kanbanlock_checkpoint=gate (may be repeated)
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = parse_param)]
    pub(crate) params: Vec<String>,

    /// Journal mode
    #[arg(long, value_enum, default_value_t = Journal::Wal)]
    pub(crate) journal: Journal,

    /// PRAGMA synchronous [default: normal with wal, full with delete]
    #[arg(long, value_enum)]
    synchronous: Option<Synchronous>,

    /// Busy timeout of every connection
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(0..=600_000))]
    busy_timeout_ms: u32,

    /// Think time of every process between two transactions; 0 saturates the lock
    #[arg(long, value_name = "US", default_value_t = 1000)]
    pub(crate) think_us: u64,

    /// Kill workers at random moments with SIGKILL and restart them
    #[arg(long)]
    pub(crate) chaos: bool,

    /// Seed of the chaos [default: random, and printed]
    #[arg(long, value_name = "N", hide_default_value = true, default_value_t = RandomState::new().hash_one(()))]
    pub(crate) seed: u64,

    /// Database to create and keep; it must not exist yet [default: a temporary one]
    #[arg(long, value_name = "PATH")]
    pub(crate) db: Option<PathBuf>,

    /// Keep the temporary database (a failed audit always keeps it)
    #[arg(long)]
    pub(crate) keep: bool,

    /// Write the result as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Damage the board before the audit, which must notice
    #[arg(long, value_enum, hide = true)]
    pub(crate) sabotage: Option<Sabotage>,

    /// Be the worker or reader described by this JSON
    #[arg(long, hide = true, exclusive = true, value_parser = parse_job)]
    pub(crate) child: Option<Job>,
}

/// `PRAGMA journal_mode`
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Journal {
    Wal,
    Delete,
}

/// `PRAGMA synchronous`
#[derive(Clone, Copy, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Synchronous {
    Off,
    Normal,
    Full,
    Extra,
}

/// Ways to damage the board, each of which only one check of the audit can notice.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Sabotage {
    /// Take an acknowledged commit's event away and correct the counter
    LoseCommit,
    /// Change a counter
    SkewCounter,
    /// Change a task's status and correct the counters
    FlipStatus,
}

/// What a child process is.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Worker,
    Reader,
}

/// All that a child process is told.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) role: Role,
    pub(crate) number: u32,
    /// 1, and one more after each kill: (worker, incarnation, seq) names a commit for good.
    pub(crate) incarnation: u32,
    pub(crate) database: Database,
    /// The child's acknowledgement log.
    pub(crate) log: PathBuf,
    pub(crate) think: Duration,
}

impl Options {
    /// The database as every process opens it.
    pub(crate) fn database(&self, path: &Path) -> Database {
        let synchronous = self.synchronous.unwrap_or(match self.journal {
            Journal::Wal => Synchronous::Normal,
            Journal::Delete => Synchronous::Full,
        });
        Database {
            path: path.to_path_buf(),
            vfs: self.vfs.clone(),
            params: self.params.clone(),
            journal: self.journal,
            synchronous,
            busy_timeout: Duration::from_millis(self.busy_timeout_ms.into()),
        }
    }

    /// Fails if SQLite does not know the VFS; no file is touched.
    pub(crate) fn check_vfs(&self) -> Result<()> {
        register(&self.vfs)?;
        Connection::open_with_flags_and_vfs(":memory:", OpenFlags::default(), self.vfs.as_str())
            .map(drop)
            .map_err(|error| format!("--vfs {}: {error}; try kanbanlock or unix", self.vfs).into())
    }

    /// Creates the `--json` file, so that a wrong path is reported before the run and not after it.
    pub(crate) fn create_json(&self) -> Result<Option<File>> {
        let Some(path) = &self.json else { return Ok(None) };
        let file = File::create(path)
            .map_err(|error| format!("--json: cannot write {}: {error}", path.display()))?;
        Ok(Some(file))
    }
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

fn parse_param(text: &str) -> std::result::Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() && !text.contains(['&', '#', '%']) => Ok(text.to_owned()),
        _ => Err("expected KEY=VALUE, without any of & # %".to_owned()),
    }
}

fn parse_job(text: &str) -> serde_json::Result<Job> {
    serde_json::from_str(text)
}
