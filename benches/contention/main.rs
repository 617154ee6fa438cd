//! Many writers at once: how fast, how fair, how long the longest wait.
//!
//! ```text
//! cargo bench --bench contention                      the default cells, some twelve minutes
//! cargo bench --bench contention -- --quick           few cells, one short run each
//! cargo bench --bench contention -- --full            every combination: three hours
//! cargo bench --bench contention -- --compare         the cells of the goals (`goals.rs`), and whether they are reached
//! cargo bench --bench contention -- --docs            the default cells; table and pictures go into README and docs/img
//! cargo bench --bench contention -- --writers 16 --workload WAL/OFF --think 0 \
//!     --variants stock,kanbanlock --kanbanlock 'gated=kanbanlock_checkpoint=gate'
//! cargo bench --bench contention -- --help
//! ```
//!
//! Each run also writes `contention.json` and two pictures, `contention-latency.svg` and `contention-fairness.svg`, into
//! Cargo's target directory.
//!
//! # What is compared
//!
//! Each *cell* is a workload (journal mode and place), a think time, a number of writer processes and one of readers.
//! In it compete, each on a fresh database:
//!
//! | variant | what it is |
//! |---|---|
//! | `stock` | plain `unix` VFS, `busy_timeout` 5000: the baseline |
//! | `stock-1ms` | the same with a busy handler of the application's that sleeps 1 ms at a time, for up to 5 s |
//! | `app-flock` | the application waits for a blocking `flock(LOCK_EX)` of its own around each transaction |
//! | `kanbanlock` | `?vfs=kanbanlock`, `busy_timeout` 5000 |
//! | `kanbanlock-1ms` | the handler of `stock-1ms` on kanbanlock (on request) |
//! | `kanbanlock-mixed` | every second client `busy_timeout`, every second the handler (on request) |
//!
//! and any number of further kanbanlock variants with URI parameters of their own (`--kanbanlock NAME=PARAMETERS`).
//!
//! A writer's transaction is `BEGIN IMMEDIATE`, the insert of a row of about a hundred bytes, the update of a counter,
//! `COMMIT`. On SQLITE_BUSY it is rolled back and tried again at once; its latency runs from before the first BEGIN to
//! after the COMMIT. Between two transactions a writer does nothing (a *tight* loop) or sleeps for its think time
//! (1 ms of nanosleep(2), which takes a little longer). A reader reads the counter and the last row in one statement, and
//! then sleeps 1 ms. `synchronous` is OFF on tmpfs and NORMAL on disk; automatic checkpoints are as SQLite has them.
//!
//! # How
//!
//! - **Every client is a process of its own**, this executable started again (`client.rs`). All have the database open
//!   before one pipe, closed by the parent, starts them together.
//! - **The variants take turns** within a repetition, and each repetition begins with another one: ABCD, BCDA, …
//! - **Every run is audited**: the database holds exactly the acknowledged commits, of each client, and is whole. A run
//!   that fails, or hangs, is reported, the others go on, and the exit status is 1.
//! - Medians are over the repetitions. Ratios are taken within one repetition (`results.rs`).
//! - The clock stops for nobody: a transaction that has begun in time is waited for and its latency counts. For
//!   commits/s and Jain's index only commits within the run's duration count.
//!
//! - **A run that was paused** for a second or more (the processes were stopped, the machine slept) is made again. It
//!   would be booked as one client's latency.
//!
//! A client that starves gets its turn at the latest when the others stop, at the end of the run. So where stock SQLite's
//! maximum is about as long as the run, it is a lower bound.
//!
//! `foreign` is what other programs took of the processors meanwhile, the kernel's threads included: where it is high, run
//! again on a quieter machine.
//!
//! In a tight loop stock SQLite's p99 over all transactions looks good because one process has the lock nearly all the
//! time, and commits thousands of times while the others wait for one commit each. Read p99.9, the maximum, the worst
//! client's p99, Jain's index and the time-weighted median (`stats.rs`) beside it.

mod client;
mod goals;
#[path = "../overhead/machine.rs"]
mod machine;
#[path = "../overhead/markers.rs"]
mod markers;
#[allow(dead_code, reason = "the overhead benchmark's confidence intervals")]
#[path = "../overhead/stats.rs"]
mod median;
mod options;
mod plot;
mod report;
mod results;
mod run;
mod stats;
mod table;
mod variant;
mod workload;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;

use crate::machine::Machine;
use crate::options::Options;
use crate::report::Report;
use crate::results::Outcome;
use crate::run::Run;
use crate::variant::Variant;
use crate::workload::Cell;

/// A benchmark has nothing to recover: any error ends the run with its text.
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// How often a run is made until it was not paused.
const ATTEMPTS: u32 = 5;

fn main() -> ExitCode {
    let done = match client::job() {
        Some(job) => job.and_then(|job| client::work(&job).map(|()| true)),
        None => bench(&Options::parse()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("contention: {error}");
            ExitCode::FAILURE
        }
    }
}

/// All of it; false if a run failed.
fn bench(options: &Options) -> Result<bool> {
    let (cells, variants, repetitions) = (options.cells(), options.variants(), options.repetitions());
    if cells.is_empty() || variants.is_empty() {
        return Err("nothing to run: no workload or variant of that name".into());
    }
    let output = options.output()?;
    std::fs::create_dir_all(&output).map_err(|error| format!("--output {}: {error}", output.display()))?;
    let machine =
        Machine::look(&options.dir).map_err(|error| format!("--dir {}: {error}", options.dir.display()))?;
    println!("{machine}");
    let runs = cells.len() * variants.len() * usize::try_from(repetitions)?;
    let minutes = runs as f64 * (options.duration().as_secs_f64() + 0.3) / 60.0;
    println!("{runs} runs of {} s, {minutes:.1} minutes or a little more", options.duration().as_secs_f64());

    let mut report = Report {
        machine,
        repetitions,
        outcomes: Vec::new(),
        checks: Vec::new(),
        paused: 0,
        failures: Vec::new(),
    };
    let mut files = None;
    for &cell in &cells {
        let outcome = compete(cell, &variants, options, &mut report)?;
        println!("{}", table::to_text(&outcome, repetitions));
        report.checks.extend(goals::check(&outcome));
        report.outcomes.push(outcome);
        files = Some(report.write(&output)?); // after each cell: an interrupted run leaves what it has
    }
    files.iter().flatten().for_each(|path| println!("{}", path.display()));
    if options.compares() {
        report.checks.iter().for_each(|check| println!("{check}"));
    }
    report.failures.iter().for_each(|failure| println!("FAILED   {failure}"));
    if options.docs && report.failures.is_empty() {
        report.publish(Path::new(env!("CARGO_MANIFEST_DIR")))?;
    }
    Ok(report.failures.is_empty())
}

/// All repetitions of one cell.
fn compete(cell: Cell, variants: &[Variant], options: &Options, report: &mut Report) -> Result<Outcome> {
    let duration = options.duration();
    let directory = cell.workload.place.directory(&options.dir)?;
    let mut outcome = Outcome::new(cell, duration.as_secs_f64(), variants);
    for repetition in 0..options.repetitions() {
        for position in 0..variants.len() {
            let lane = (position + usize::try_from(repetition)?) % variants.len();
            let variant = &variants[lane];
            let run = make_unpaused(cell, variant, duration, &directory, &mut report.paused)
                .inspect_err(|error| report.failures.push(format!("{cell}, {}: {error}", variant.name)));
            outcome.add(lane, run.ok().as_ref())?;
            eprintln!("{}", table::progress(&outcome, &outcome.lanes[lane], repetition));
        }
    }
    Ok(outcome)
}

/// A run, made again if it was paused.
fn make_unpaused(
    cell: Cell,
    variant: &Variant,
    duration: Duration,
    directory: &Path,
    paused: &mut u32,
) -> Result<Run> {
    for _ in 0..ATTEMPTS {
        let run = Run::make(cell, variant, duration, directory)?;
        if !run.was_paused {
            return Ok(run);
        }
        eprintln!("{cell}, {}: was paused, once more", variant.name);
        *paused += 1;
    }
    Err(format!("paused in each of {ATTEMPTS} attempts").into())
}
