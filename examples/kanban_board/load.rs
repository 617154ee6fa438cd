//! # The load: how many processes do what to the board, and for how long

use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::board::Database;
use super::crew::Plan;
use super::job::{Journal, Synchronous};

/// The part of the command line that says what is done.
#[derive(Clone, Debug, Args)]
pub(crate) struct Load {
    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: u32,

    /// Reader processes beside them
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=256))]
    pub(crate) readers: u32,

    /// How long to run
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub(crate) seconds: u64,

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
}

impl Load {
    /// The database as every process opens it, through the VFS of that name.
    pub(crate) fn database(&self, path: &Path, vfs: &str) -> Database {
        let synchronous = self.synchronous.unwrap_or(match self.journal {
            Journal::Wal => Synchronous::Normal,
            Journal::Delete => Synchronous::Full,
        });
        Database {
            path: path.to_path_buf(),
            vfs: vfs.to_owned(),
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
}

fn parse_param(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() && !text.contains(['&', '#', '%']) => Ok(text.to_owned()),
        _ => Err("expected KEY=VALUE, without any of & # %".to_owned()),
    }
}
