//! What kanbanlock is to reach under contention, and whether it did.
//!
//! Ratios are to stock SQLite in the same repetition, medians over the repetitions; SQLITE_BUSY and the WAL's size are
//! the worst of all repetitions.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::results::{Figure, Lane, Outcome};
use crate::table::{show, times};
use crate::workload::{Cell, Journal, Workload};

/// Bounds for one cell.
struct Goal {
    cell: Cell,
    /// At least this multiple of stock's commits per second.
    commits: f64,
    /// At most these multiples of stock's latency.
    latencies: &'static [(Figure, f64)],
    jain: f64,
}

const GOALS: [Goal; 4] = [
    Goal {
        cell: cell(Workload::DELETE_TMPFS, Duration::from_millis(1)),
        commits: 2.2,
        latencies: &[(Figure::P99, 1.0 / 15.0), (Figure::P999, 1.0 / 30.0), (Figure::Max, 1.0 / 30.0)],
        jain: 0.99,
    },
    Goal {
        cell: cell(Workload::WAL_DISK, Duration::from_millis(1)),
        commits: 1.7,
        latencies: &[(Figure::P99, 1.0 / 7.0), (Figure::P999, 1.0 / 7.0), (Figure::Max, 1.0 / 6.0)],
        jain: 0.99,
    },
    Goal {
        cell: cell(Workload::WAL_TMPFS, Duration::ZERO),
        commits: 1.0,
        latencies: &[(Figure::P999, 1.0 / 10.0), (Figure::Max, 1.0 / 30.0)],
        jain: 0.98,
    },
    Goal {
        cell: cell(Workload::DELETE_TMPFS, Duration::ZERO),
        commits: 1.1,
        latencies: &[(Figure::P999, 1.0 / 30.0), (Figure::Max, 1.0 / 30.0)],
        jain: 0.98,
    },
];

/// Bounds for any cell whose runs last this long: no SQLITE_BUSY at 32 writers, and a WAL in a tight loop of at most …
const LONG_RUN: f64 = 30.0;
/// … so many megabytes.
const WAL: f64 = 64.0;

const fn cell(workload: Workload, think: Duration) -> Cell {
    Cell { workload, think, writers: 16, readers: 0 }
}

/// The cells that have a goal.
pub(crate) fn cells() -> Vec<Cell> {
    GOALS.iter().map(|goal| goal.cell).collect()
}

/// One line of the comparison.
#[derive(Serialize)]
pub(crate) struct Check {
    cell: String,
    variant: String,
    figure: &'static str,
    goal: String,
    measured: String,
    reached: bool,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cell, variant, figure, goal, measured, reached } = self;
        let verdict = if *reached { "reached" } else { "MISSED" };
        write!(f, "{verdict:<8} {cell}, {variant}: {figure} {measured} (goal: {goal})")
    }
}

/// Everything that can be checked of one cell, for each kanbanlock variant.
pub(crate) fn check(outcome: &Outcome) -> Vec<Check> {
    let shimmed = outcome.lanes.iter().filter(|lane| lane.variant.kanbanlock.is_some());
    shimmed.flat_map(|lane| check_lane(outcome, lane)).collect()
}

fn check_lane(outcome: &Outcome, lane: &Lane) -> Vec<Check> {
    let Some(summary) = lane.summary() else { return Vec::new() };
    let check = |figure: Figure, goal: String, measured: String, reached: bool| Check {
        cell: outcome.cell.to_string(),
        variant: lane.variant.name.clone(),
        figure: figure.label(),
        goal,
        measured,
        reached,
    };
    let mut checks = Vec::new();
    let goal = GOALS.iter().find(|goal| goal.cell == outcome.cell);
    if let (Some(goal), Some(ratios)) = (goal, outcome.ratios(lane)) {
        let commits = ratios.median[Figure::Commits];
        let reached = commits >= goal.commits;
        checks.push(check(
            Figure::Commits,
            format!("at least {}", times(goal.commits)),
            times(commits),
            reached,
        ));
        for &(figure, bound) in goal.latencies {
            let ratio = ratios.median[figure];
            checks.push(check(figure, format!("at most {}", times(bound)), times(ratio), ratio <= bound));
        }
        let jain = summary.median[Figure::Jain];
        let measured = show(Figure::Jain, &summary.median);
        checks.push(check(Figure::Jain, format!("at least {}", goal.jain), measured, jain >= goal.jain));
    }
    let is_long = outcome.seconds >= LONG_RUN;
    if goal.is_some() || (is_long && outcome.cell.writers == 32) {
        let measured = show(Figure::Busy, &summary.max);
        checks.push(check(Figure::Busy, "0".to_owned(), measured, summary.max[Figure::Busy] == 0.0));
    }
    if is_long && outcome.cell.workload.journal == Journal::Wal && outcome.cell.think.is_zero() {
        let measured = show(Figure::Wal, &summary.max);
        checks.push(check(Figure::Wal, format!("at most {WAL}"), measured, summary.max[Figure::Wal] <= WAL));
    }
    checks
}
