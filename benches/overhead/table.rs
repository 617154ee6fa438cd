//! From the sittings to README's tables.
//!
//! A lane's *extra time* is its time per transaction minus that of `unix` in the same round. A sitting's
//! value is the median over its rounds; the table gives the median over the sittings, and its confidence
//! interval. A goal counts as met, or as missed, only if the whole interval says so.

use std::path::Path;

use crate::Result;
use crate::markers::splice;
use crate::sitting::Sitting;
use crate::stats::{Estimate, FEWEST, median_of};
use crate::workload::{Lane, Operation, PerLane, Place, Workload};

/// What kanbanlock may add to a write transaction on top of the flock pair, in nanoseconds.
const WRITE_GOAL: f64 = 500.0;

/// What a read transaction may take, as a multiple of the stock one.
const READ_GOAL: f64 = 1.02;

/// What a pair of lock calls may take with close-proof locks, as a multiple of the stock one.
const LOCK_GOAL: f64 = 1.05;

/// What a run has measured.
#[derive(Default)]
pub(crate) struct Results {
    /// The table's rows, in Markdown.
    rows: Vec<String>,
    /// The rows of the second table, that of the lock calls.
    lock_rows: Vec<String>,
    /// The fewest and the most sittings behind a row.
    sittings: Option<(usize, usize)>,
    skipped: Vec<(Place, &'static str)>,
}

impl Results {
    /// Leaves out the workloads that need `place`.
    pub(crate) fn skip(&mut self, place: Place, reason: &'static str) {
        self.skipped.push((place, reason));
    }

    /// The workloads to run.
    pub(crate) fn workloads(&self) -> Vec<Workload> {
        Workload::all()
            .filter(|workload| self.skipped.iter().all(|(place, _)| *place != workload.place))
            .collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.lock_rows.is_empty()
    }

    /// Adds a row if there were sittings enough: not for a workload that was filtered out, or only tested.
    pub(crate) fn add(&mut self, workload: Workload, sittings: &[Sitting]) {
        let sittings: Vec<_> = sittings.iter().filter(|sitting| !sitting.rounds.is_empty()).collect();
        let n = sittings.len();
        if n < FEWEST {
            if n > 0 {
                println!("{workload}: no row in the table, {n} sittings are too few");
            }
            return;
        }
        let (fewest, most) = self.sittings.unwrap_or((n, n));
        self.sittings = Some((fewest.min(n), most.max(n)));

        let stock = sittings.iter().flat_map(|sitting| &sitting.rounds).map(|round| round[Lane::Unix]);
        let stock = Estimate::quartiles(stock);
        let compare = |value: &dyn Fn(&PerLane<f64>) -> f64| {
            Estimate::confidence(sittings.iter().map(|sitting| median_of(sitting.rounds.iter().map(value))))
        };
        let extra = |lane| compare(&|round| round[lane] - round[Lane::Unix]);
        let ratio = |lane| compare(&|round| round[lane] / round[Lane::Unix]);
        if workload.operation.is_lock() {
            let close_proof = ratio(Lane::CloseProof);
            self.lock_rows.push(format!(
                "| {workload} | {} | {} | {} | {} | {} | {} |",
                time(stock),
                times(ratio(Lane::UnixAgain)),
                times(close_proof),
                times(ratio(Lane::OptedOut)),
                times(ratio(Lane::Kanbanlock)),
                verdict(close_proof, LOCK_GOAL),
            ));
            return;
        }
        let ratio = ratio(Lane::Kanbanlock);

        let (app_flock, flock_pair, goal) = match workload.operation {
            Operation::OneRowUpdate | Operation::Kanban => {
                let beyond_pair =
                    compare(&|round| round[Lane::Kanbanlock] - round[Lane::Unix] - round[Lane::FlockPair]);
                let flock_pair = compare(&|round| round[Lane::FlockPair]);
                (plus(extra(Lane::AppFlock)), time(flock_pair), verdict(beyond_pair, WRITE_GOAL))
            }
            Operation::Read => (none(), none(), verdict(ratio, READ_GOAL)),
            Operation::OpenClose | Operation::SharedLock | Operation::ReadLock => (none(), none(), none()),
        };
        self.rows.push(format!(
            "| {workload} | {} | {} | {} | {} | {app_flock} | {flock_pair} | {goal} |",
            time(stock),
            plus(extra(Lane::UnixAgain)),
            plus(extra(Lane::Kanbanlock)),
            times(ratio),
        ));
    }

    /// The tables that have rows, with all that is needed to read them.
    pub(crate) fn to_markdown(&self, machine: &str) -> String {
        let (fewest, most) = self.sittings.unwrap_or_default();
        let skipped: String = self
            .skipped
            .iter()
            .map(|(place, reason)| format!("Not measured: {}, for {reason}.\n", place.name()))
            .collect();
        format!(
            "{}{}Lanes are compared round by round: median over {fewest} to {most} sittings (95 % confidence \
             interval). `unix` again: stock SQLite against itself, the noise floor. Goal, open: the interval does \
             not decide.\n\
             \n\
             {machine}\n\
             {skipped}",
            self.operations(),
            self.locks(),
        )
    }

    /// The first table.
    fn operations(&self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        format!(
            "| one operation | `unix` | `unix` again | **`kanbanlock`** | ratio | app-level flock | flock pair | goal |\n\
             |---|---|---|---|---|---|---|---|\n\
             {rows}\n\
             \n\
             Microseconds, uncontended; OFF and NORMAL are `synchronous`. `unix`: median (quartiles). Figures with \
             a sign come on top of it, ratio is kanbanlock's time to it. App-level flock: stock SQLite, and the \
             application locks around `BEGIN IMMEDIATE … COMMIT`. Flock pair: the two bare system calls. Goal: on a \
             write transaction at most the flock pair + {write} µs, on a read a ratio of at most {READ_GOAL}. These \
             are medians: WAL's automatic checkpoints do not show.\n\
             \n",
            rows = self.rows.join("\n"),
            write = WRITE_GOAL / 1000.0,
        )
    }

    /// The second.
    fn locks(&self) -> String {
        if self.lock_rows.is_empty() {
            return String::new();
        }
        format!(
            "| one pair of lock calls | `unix` | `unix` again | **close-proof** | opted out | `kanbanlock` | goal |\n\
             |---|---|---|---|---|---|---|\n\
             {rows}\n\
             \n\
             SQLite's own locks by themselves: `xLock` to SHARED and `xUnlock` to NONE (4 fcntl(2) calls), `xShmLock` \
             of a READ slot and back (2). `unix`: POSIX locks, in a process that has not registered kanbanlock, \
             microseconds, median (quartiles); the others are multiples of it. Close-proof: plain `unix` in a process \
             that has, whose locks are open file descriptions'; nothing else differs. Opted out: the same with \
             `kanbanlock_close_proof=off`. `kanbanlock`: close-proof and through the shim. Goal: close-proof at most \
             {LOCK_GOAL}.\n\
             \n",
            rows = self.lock_rows.join("\n"),
        )
    }

    /// Puts the table into a Markdown file, in place of the one between the markers.
    pub(crate) fn publish(&self, table: &str, path: &Path) -> Result<()> {
        let expected = self.workloads().len();
        let rows = self.rows.len() + self.lock_rows.len();
        if rows != expected {
            return Err(format!("{rows} of {expected} rows: no table for {}", path.display()).into());
        }
        let text = std::fs::read_to_string(path)?;
        let text =
            splice(&text, "overhead", table).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(std::fs::write(path, text)?)
    }
}

/// Whether `value` is at most `goal`, as far as one can tell.
fn verdict(value: Estimate, goal: f64) -> String {
    let verdict = if value.high <= goal {
        "met"
    } else if value.low > goal {
        "missed"
    } else {
        "open"
    };
    verdict.to_owned()
}

/// No such figure.
fn none() -> String {
    "–".to_owned()
}

/// Nanoseconds as microseconds.
fn time(estimate: Estimate) -> String {
    cell(estimate, |ns| microseconds(ns, ""))
}

/// The same, of a difference.
fn plus(estimate: Estimate) -> String {
    cell(estimate, |ns| microseconds(ns, if ns < 0.0 { "−" } else { "+" }))
}

fn times(estimate: Estimate) -> String {
    cell(estimate, |ratio| format!("{ratio:.3}"))
}

fn cell(Estimate { low, median, high }: Estimate, show: impl Fn(f64) -> String) -> String {
    format!("{} ({} … {})", show(median), show(low), show(high))
}

/// With three digits, and never below a nanosecond.
fn microseconds(ns: f64, sign: &str) -> String {
    let us = ns.abs() / 1000.0;
    let decimals = match us {
        ..1.0 => 3,
        1.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{sign}{us:.decimals$}")
}
