//! # The table and the JSON
//!
//! A latency is what a caller waits: from a transaction's first BEGIN IMMEDIATE to COMMIT's OK, SQLITE_BUSY and
//! retries included. The p50 and p99 of all transactions are not enough: under a lock that one process
//! monopolises, most transactions are that process' and quick. Therefore the table also has p99.9 and max, the
//! worst worker's p99, Jain's fairness index of the workers' commits (1 is even, 1/N is one takes all), and the
//! *time-weighted median*: half of all time spent in transactions was spent in ones at least this long.
//!
//! SQLITE_BUSY is counted for transactions, where it means that the busy timeout was over. It is counted apart
//! for the switch to WAL, where SQLite answers it without calling the busy handler.

use std::collections::BTreeMap;
use std::fs;
use std::thread;

use hdrhistogram::Histogram;
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use super::Result;
use super::acklog::{self, Entry};
use super::audit::Check;
use super::board::Database;
use super::crew::Shift;
use super::job::{self, Journal, Role, Synchronous};
use super::load::Load;

/// The result of a run.
#[derive(Serialize)]
pub(crate) struct Report {
    sqlite: &'static str,
    vfs: String,
    params: Vec<String>,
    journal: Journal,
    synchronous: Synchronous,
    workers: u32,
    readers: u32,
    think_us: u64,
    chaos_seed: Option<u64>,
    seconds: f64,
    commits: u64,
    commits_per_s: f64,
    latency: Latency,
    per_worker: Vec<Share>,
    jain: f64,
    snapshots: u64,
    snapshots_per_s: f64,
    snapshot_latency: Latency,
    busy_workers: u64,
    busy_readers: u64,
    busy_opening: u64,
    peak_wal_bytes: u64,
    db_bytes: u64,
    kills: usize,
    checks: Vec<Check>,
    pub(crate) passed: bool,
}

/// Milliseconds.
#[derive(Serialize)]
struct Latency {
    p50_ms: f64,
    p99_ms: f64,
    p999_ms: f64,
    max_ms: f64,
    time_weighted_median_ms: f64,
}

/// One worker, all its incarnations together.
#[derive(Serialize)]
struct Share {
    worker: u32,
    commits: u64,
    p99_ms: f64,
}

/// What the logs of one or more processes add up to.
struct Tally {
    /// Of the commits or the snapshots, in nanoseconds.
    latencies: Histogram<u64>,
    busy: u64,
    busy_opening: u64,
}

/// The first lines: what is run, on what.
pub(crate) fn print_heading(load: &Load, database: &Database, shim: Option<&str>) -> Result<()> {
    let cores = thread::available_parallelism()?;
    println!(
        "run       {} workers, {} readers, {} s, think time {} µs, {cores} cores",
        load.workers, load.readers, load.seconds, load.think_us
    );
    if load.chaos {
        println!("chaos     SIGKILL at random moments, --seed {}", load.seed);
    }
    println!(
        "SQLite    {}, journal {}, synchronous {}, busy timeout {} ms",
        rusqlite::version(),
        job::name(load.journal),
        job::name(database.synchronous),
        database.busy_timeout.as_millis()
    );
    println!(
        "VFS       {}",
        shim.map_or_else(|| database.vfs.clone(), |json| format!("{} {json}", database.vfs))
    );
    println!("database  {}", database.uri());
    Ok(())
}

impl Report {
    /// Adds up the logs.
    pub(crate) fn new(load: &Load, database: &Database, shift: &Shift, checks: Vec<Check>) -> Result<Self> {
        let workers = tally(shift, Role::Worker, load.workers)?;
        let readers = Tally::sum(tally(shift, Role::Reader, load.readers)?.values())?;
        let all = Tally::sum(workers.values())?;
        let per_worker: Vec<Share> =
            workers.iter().map(|(worker, tally)| Share::new(*worker, &tally.latencies)).collect();
        let seconds = shift.elapsed.as_secs_f64();
        Ok(Self {
            sqlite: rusqlite::version(),
            vfs: database.vfs.clone(),
            params: load.params.clone(),
            journal: load.journal,
            synchronous: database.synchronous,
            workers: load.workers,
            readers: load.readers,
            think_us: load.think_us,
            chaos_seed: load.chaos.then_some(load.seed),
            seconds,
            commits: all.latencies.len(),
            commits_per_s: all.latencies.len() as f64 / seconds,
            latency: Latency::new(&all.latencies),
            jain: jain(&per_worker),
            per_worker,
            snapshots: readers.latencies.len(),
            snapshots_per_s: readers.latencies.len() as f64 / seconds,
            snapshot_latency: Latency::new(&readers.latencies),
            busy_workers: all.busy,
            busy_readers: readers.busy,
            busy_opening: all.busy_opening + readers.busy_opening,
            peak_wal_bytes: shift.peak_wal,
            db_bytes: fs::metadata(&database.path).map_or(0, |db| db.len()),
            kills: shift.records.iter().filter(|record| record.killed).count(),
            passed: checks.iter().all(|check| check.passed),
            checks,
        })
    }
    /// The table and the audit, for the terminal.
    #[allow(dead_code, reason = "kanbanlock stress has a table with a column for each VFS")]
    pub(crate) fn print(&self) {
        println!();
        for Row { name, value, note } in self.rows() {
            println!("{}", format!("{name:<22}{value:>14}  {note}").trim_end());
        }
        println!();
        self.print_audit();
    }

    /// What the audit has found.
    pub(crate) fn print_audit(&self) {
        for Check { name, passed, detail } in &self.checks {
            println!("audit  {}  {name:<24}  {detail}", if *passed { "ok  " } else { "FAIL" });
        }
        println!("audit  {}", if self.passed { "passed" } else { "FAILED" });
    }

    /// The lines of the table: the same for equal loads.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows = self.speed();
        rows.extend(self.cost());
        rows
    }

    fn speed(&self) -> Vec<Row> {
        let worst = self.per_worker.iter().max_by(|a, b| a.p99_ms.total_cmp(&b.p99_ms));
        let least = self.per_worker.iter().min_by_key(|share| share.commits);
        let worst = worst.map(|worst| {
            Row::new("worst worker's p99", ms(worst.p99_ms), format!("worker {}", worst.worker))
        });
        let least = least.map(|least| {
            let note = format!("commits, worker {}", least.worker);
            Row::new("worst worker's share", HumanCount(least.commits), note)
        });
        let mut rows = vec![
            Row::new("commits", HumanCount(self.commits), ""),
            Row::new("commits/s", format!("{:.0}", self.commits_per_s), ""),
            Row::new("p50", ms(self.latency.p50_ms), "BEGIN IMMEDIATE to COMMIT's OK"),
            Row::new("p99", ms(self.latency.p99_ms), ""),
            Row::new("p99.9", ms(self.latency.p999_ms), ""),
            Row::new("max", ms(self.latency.max_ms), ""),
            Row::new("time-weighted median", ms(self.latency.time_weighted_median_ms), ""),
        ];
        rows.extend(worst.into_iter().chain(least));
        rows.push(Row::new("Jain's index", format!("{:.3}", self.jain), "1 is even"));
        rows
    }

    fn cost(&self) -> Vec<Row> {
        let busy = format!("workers, {} readers", HumanCount(self.busy_readers));
        let wal = match self.journal {
            Journal::Wal => HumanBytes(self.peak_wal_bytes).to_string(),
            Journal::Delete => "none".to_owned(),
        };
        let mut rows = vec![
            Row::new("SQLITE_BUSY", HumanCount(self.busy_workers), busy),
            Row::new(
                "SQLITE_BUSY at open",
                HumanCount(self.busy_opening),
                "at once, while all switch the journal mode",
            ),
            Row::new("peak WAL size", wal, ""),
            Row::new("database size", HumanBytes(self.db_bytes), "at the end"),
        ];
        if self.readers > 0 {
            rows.push(Row::new("snapshots/s", format!("{:.0}", self.snapshots_per_s), "read transactions"));
            rows.push(Row::new("snapshots' p99", ms(self.snapshot_latency.p99_ms), ""));
        }
        if self.chaos_seed.is_some() {
            rows.push(Row::new("kills", self.kills, "SIGKILL, each followed by a restart"));
        }
        rows
    }
}

/// A line of the table.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) value: String,
    #[allow(dead_code, reason = "kanbanlock stress has no room for it")]
    note: String,
}

impl Row {
    fn new(name: &'static str, value: impl ToString, note: impl Into<String>) -> Self {
        Self { name, value: value.to_string(), note: note.into() }
    }
}

impl Latency {
    fn new(latencies: &Histogram<u64>) -> Self {
        Self {
            p50_ms: quantile_ms(latencies, 0.5),
            p99_ms: quantile_ms(latencies, 0.99),
            p999_ms: quantile_ms(latencies, 0.999),
            max_ms: latencies.max() as f64 / 1e6,
            time_weighted_median_ms: time_weighted_median_ms(latencies),
        }
    }
}

impl Share {
    fn new(worker: u32, latencies: &Histogram<u64>) -> Self {
        Self { worker, commits: latencies.len(), p99_ms: quantile_ms(latencies, 0.99) }
    }
}

impl Tally {
    fn new() -> Result<Self> {
        Ok(Self { latencies: Histogram::new(3)?, busy: 0, busy_opening: 0 })
    }

    fn sum<'a>(tallies: impl Iterator<Item = &'a Self>) -> Result<Self> {
        let mut sum = Self::new()?;
        for tally in tallies {
            sum.latencies.add(&tally.latencies)?;
            sum.busy += tally.busy;
            sum.busy_opening += tally.busy_opening;
        }
        Ok(sum)
    }
}

/// The processes of a role by their number, those without a log entry included.
fn tally(shift: &Shift, role: Role, count: u32) -> Result<BTreeMap<u32, Tally>> {
    let mut tallies =
        (0..count).map(|number| Ok((number, Tally::new()?))).collect::<Result<BTreeMap<_, _>>>()?;
    for record in shift.records.iter().filter(|record| record.job.role == role) {
        let Some(tally) = tallies.get_mut(&record.job.number) else { continue };
        for entry in acklog::entries(&record.job.log)? {
            match entry? {
                Entry::Commit { ns, .. } | Entry::Snapshot { ns } => tally.latencies.record(ns)?,
                Entry::Busy { opening: true, .. } => tally.busy_opening += 1,
                Entry::Busy { opening: false, .. } => tally.busy += 1,
                Entry::Violation(_) | Entry::Did { .. } => {}
            }
        }
    }
    Ok(tallies)
}

fn quantile_ms(latencies: &Histogram<u64>, quantile: f64) -> f64 {
    latencies.value_at_quantile(quantile) as f64 / 1e6
}

fn time_weighted_median_ms(latencies: &Histogram<u64>) -> f64 {
    let time = |value: u64, count: u64| u128::from(value) * u128::from(count);
    let spent = || latencies.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value()));
    let total: u128 = spent().map(|(value, count)| time(value, count)).sum();
    let mut below = 0;
    let median = spent().find(|&(value, count)| {
        below += time(value, count);
        2 * below >= total
    });
    median.map_or(0.0, |(value, _)| value as f64 / 1e6)
}

/// (Σx)² / (n·Σx²)
fn jain(shares: &[Share]) -> f64 {
    let commits = || shares.iter().map(|share| share.commits as f64);
    let squares: f64 = commits().map(|x| x * x).sum();
    if squares == 0.0 { 0.0 } else { commits().sum::<f64>().powi(2) / (shares.len() as f64 * squares) }
}

fn ms(value: f64) -> String {
    format!("{value:.3} ms")
}
