//! # The command line

use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

use crate::Result;
use crate::board::Database;
use crate::crew::Plan;
use crate::job::{Job, Journal, Synchronous, parse_job};
use crate::sabotage::Sabotage;

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
            journal: Some(self.journal),
            synchronous,
            busy_timeout: Duration::from_millis(self.busy_timeout_ms.into()),
            mmap_size: 0,
        }
    }

    /// Who works, and for how long.
    pub(crate) fn plan(&self) -> Plan {
        Plan {
            workers: self.workers,
            readers: self.readers,
            duration: Duration::from_secs(self.seconds),
            think: Duration::from_micros(self.think_us),
            seed: self.seed,
            stray_closes: false,
        }
    }

    /// Creates the `--json` file, so that a wrong path is reported before the run and not after it.
    pub(crate) fn create_json(&self) -> Result<Option<File>> {
        let Some(path) = &self.json else { return Ok(None) };
        let file = File::create(path)
            .map_err(|error| format!("--json: cannot write {}: {error}", path.display()))?;
        Ok(Some(file))
    }
}

fn parse_param(text: &str) -> std::result::Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() && !text.contains(['&', '#', '%']) => Ok(text.to_owned()),
        _ => Err("expected KEY=VALUE, without any of & # %".to_owned()),
    }
}
