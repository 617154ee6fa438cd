//! # What was done, and what was found
//!
//! One line for each round, and the sums at the end.

use std::path::{Path, PathBuf};

use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use crate::Result;
use crate::acklog::{self, Entry};
use crate::audit::Check;
use crate::board::Database;
use crate::crew::Shift;
use crate::job::{self, Synchronous};
use crate::mischief::Deeds;
use crate::options::Options;

/// One round.
#[derive(Serialize)]
pub(crate) struct Round {
    seed: u64,
    synchronous: Synchronous,
    mmap_size: u32,
    seconds: f64,
    peak_wal_bytes: u64,
    did: Deeds,
    checks: Vec<Check>,
}

/// The whole run.
#[derive(Serialize)]
pub(crate) struct Report {
    sqlite: &'static str,
    vfs: String,
    seed: u64,
    minutes: f64,
    round_seconds: u64,
    workers: u32,
    outsiders: u32,
    stray_closes: bool,
    did: Deeds,
    rounds: Vec<Round>,
    bad: usize,
    /// The database of the first bad round.
    kept: Option<PathBuf>,
}

impl Round {
    /// Adds up the logs of a round.
    pub(crate) fn new(
        seed: u64,
        database: &Database,
        shift: &Shift,
        mut did: Deeds,
        checks: Vec<Check>,
    ) -> Result<Self> {
        let mut add = |what: &str, count| *did.entry(what.to_owned()).or_default() += count;
        for record in &shift.records {
            add("SIGKILL", u64::from(record.killed));
            add("process", 1);
            for entry in acklog::entries(&record.job.log)? {
                match entry? {
                    Entry::Commit { .. } => add("commit", 1),
                    Entry::Busy { .. } => add("SQLITE_BUSY", 1),
                    Entry::Snapshot { .. } => add("snapshot", 1),
                    Entry::Violation(_) => add("violation", 1),
                    Entry::Did { what, count } => add(&what, count),
                }
            }
        }
        let (seconds, peak_wal_bytes) = (shift.elapsed.as_secs_f64(), shift.peak_wal);
        let Database { synchronous, mmap_size, .. } = *database;
        Ok(Self { seed, synchronous, mmap_size, seconds, peak_wal_bytes, did, checks })
    }

    fn is_bad(&self) -> bool {
        self.checks.iter().any(|check| !check.passed)
    }

    /// A line, and one more for each check that failed.
    pub(crate) fn print(&self) {
        let verdict = if self.is_bad() { "BAD " } else { "good" };
        let count = |what| HumanCount(self.did.get(what).copied().unwrap_or(0));
        println!(
            "round  {verdict}  {:5.1} s  {} commits, {} snapshots, {} kills, {} stops, WAL up to {}, synchronous {}, \
             mmap_size {}, seed {}",
            self.seconds,
            count("commit"),
            count("snapshot"),
            count("SIGKILL"),
            count("SIGSTOP"),
            HumanBytes(self.peak_wal_bytes),
            job::name(self.synchronous),
            self.mmap_size,
            self.seed
        );
        for check in self.checks.iter().filter(|check| !check.passed) {
            println!("       {}: {}", check.name, check.detail);
        }
    }
}

impl Report {
    /// Of a run that has not begun.
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            sqlite: rusqlite::version(),
            vfs: options.vfs.clone(),
            seed: options.seed,
            minutes: options.minutes,
            round_seconds: options.round_seconds,
            workers: options.workers,
            outsiders: options.outsiders(),
            stray_closes: !options.no_stray_closes,
            did: Deeds::new(),
            rounds: Vec::new(),
            bad: 0,
            kept: None,
        }
    }

    /// The first lines: what is run.
    pub(crate) fn print_heading(&self) {
        println!(
            "soak   {} min in rounds of {} s, {} workers, {} outsiders, VFS {}, SQLite {}, --seed {}",
            self.minutes, self.round_seconds, self.workers, self.outsiders, self.vfs, self.sqlite, self.seed
        );
    }

    /// Adds a round; true if it is the first bad one.
    pub(crate) fn add(&mut self, round: Round) -> bool {
        for (what, count) in &round.did {
            *self.did.entry(what.clone()).or_default() += count;
        }
        let bad = round.is_bad();
        self.bad += usize::from(bad);
        self.rounds.push(round);
        bad && self.bad == 1
    }

    /// Remembers where the first bad round's database is.
    pub(crate) fn keep(&mut self, db: &Path) {
        self.kept = Some(db.to_path_buf());
    }

    /// How many rounds were bad.
    pub(crate) fn bad(&self) -> usize {
        self.bad
    }

    /// The sums.
    pub(crate) fn print(&self) {
        println!();
        for (what, count) in &self.did {
            println!("{what:<24}{:>14}", HumanCount(*count).to_string());
        }
        println!();
        println!("soak   {} rounds, {} bad", self.rounds.len(), self.bad);
        if let Some(kept) = &self.kept {
            println!("kept   {}", kept.display());
        }
    }
}
