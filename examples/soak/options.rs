//! # The command line, and what a round is made of

use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use fastrand::Rng;

use crate::Result;
use crate::board::Database;
use crate::crew::Plan;
use crate::job::{Job, Synchronous, parse_job};

/// The time of a worker between two actions.
const THINK: Duration = Duration::from_micros(500);
/// Of every second round, in bytes: some of the database is mapped, some is not.
const MMAP_SIZE: u32 = 1 << 19;
/// Longer than any SIGSTOP and any hold of the flock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Processes, signals, stray closes and every kind of write on one database, audited.
#[derive(Parser)]
#[command(name = "soak")]
pub(crate) struct Options {
    /// How long to run
    #[arg(long, value_name = "M", default_value_t = 1.0, value_parser = parse_minutes)]
    pub(crate) minutes: f64,

    /// How long each round is, on a database of its own
    #[arg(long, value_name = "S", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) round_seconds: u64,

    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: u32,

    /// VFS to open the database through; `unix` is stock SQLite, and expected to fail
    #[arg(long, value_name = "NAME", default_value = kanbanlock::VFS_NAME)]
    pub(crate) vfs: String,

    /// Let no code of the workers open and close the database's files: then stock SQLite is expected to hold
    #[arg(long)]
    pub(crate) no_stray_closes: bool,

    /// Seed of all random choices [default: random, and printed]
    #[arg(long, value_name = "N", hide_default_value = true, default_value_t = RandomState::new().hash_one(()))]
    pub(crate) seed: u64,

    /// Write the result as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Be the process described by this JSON
    #[arg(long, hide = true, exclusive = true, value_parser = parse_job)]
    pub(crate) child: Option<Job>,
}

impl Options {
    /// Of the whole run.
    pub(crate) fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.minutes * 60.0)
    }

    /// There is an outsider where its flock means something.
    pub(crate) fn outsiders(&self) -> u32 {
        u32::from(self.vfs == kanbanlock::VFS_NAME)
    }

    /// The database as every process of a round opens it.
    pub(crate) fn database(&self, path: &Path, random: &mut Rng) -> Database {
        let levels = [Synchronous::Off, Synchronous::Normal, Synchronous::Full];
        Database {
            path: path.to_path_buf(),
            vfs: self.vfs.clone(),
            params: Vec::new(),
            journal: None,
            synchronous: random.choice(levels).unwrap_or(Synchronous::Normal),
            busy_timeout: BUSY_TIMEOUT,
            mmap_size: random.choice([0, MMAP_SIZE]).unwrap_or(0),
        }
    }

    /// Who works in a round.
    pub(crate) fn plan(&self, left: Duration, random: &mut Rng) -> Plan {
        Plan {
            workers: self.workers,
            readers: self.outsiders(),
            duration: left.min(Duration::from_secs(self.round_seconds)),
            think: THINK,
            seed: random.u64(..),
            stray_closes: !self.no_stray_closes,
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

fn parse_minutes(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(minutes) if minutes > 0.0 && minutes <= 100_000.0 => Ok(minutes),
        _ => Err("expected minutes, more than 0 and at most 100000".to_owned()),
    }
}
