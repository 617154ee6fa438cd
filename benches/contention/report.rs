//! What is left of a run: the JSON file, the pictures, README's table.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use serde_json::{Value, json};

use crate::Result;
use crate::goals::Check;
use crate::machine::Machine;
use crate::markers::splice;
use crate::results::{Lane, Outcome, steps};
use crate::stats::ccdf;
use crate::{plot, table};

/// All that a run has brought.
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) repetitions: u32,
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) checks: Vec<Check>,
    /// Runs that were made again because they had been paused.
    pub(crate) paused: u32,
    /// What went wrong, one line each.
    pub(crate) failures: Vec<String>,
}

impl Report {
    /// Writes `contention.json` and the two pictures into `directory`; returns their names.
    pub(crate) fn write(&self, directory: &Path) -> Result<[PathBuf; 3]> {
        let json = directory.join("contention.json");
        std::fs::write(&json, serde_json::to_string(&self.to_json())? + "\n")?;
        let [latency, fairness] = self.draw(directory)?;
        Ok([json, latency, fairness])
    }

    /// Puts the pictures into `docs/img` and the table into `README.md` of this package.
    pub(crate) fn publish(&self, package: &Path) -> Result<()> {
        let images = package.join("docs/img");
        std::fs::create_dir_all(&images)?;
        self.draw(&images)?;
        let path = package.join("README.md");
        let text = std::fs::read_to_string(&path)?;
        let table = table::to_markdown(&self.outcomes, self.repetitions, &self.machine);
        let text =
            splice(&text, "contention", &table).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(std::fs::write(path, text)?)
    }

    fn draw(&self, directory: &Path) -> Result<[PathBuf; 2]> {
        let paths = ["contention-latency.svg", "contention-fairness.svg"].map(|name| directory.join(name));
        plot::latency(&self.outcomes, &paths[0])?;
        plot::fairness(&self.outcomes, &paths[1])?;
        Ok(paths)
    }

    fn to_json(&self) -> Value {
        json!({
            "machine": self.machine,
            "git_commit": git_commit(),
            "repetitions": self.repetitions,
            "cells": self.outcomes.iter().map(cell).collect::<Vec<_>>(),
            "goals": self.checks,
            "paused_runs_repeated": self.paused,
            "failures": self.failures,
        })
    }
}

fn cell(outcome: &Outcome) -> Value {
    let cell = outcome.cell;
    json!({
        "name": cell.to_string(),
        "workload": cell.workload.to_string(),
        "think_ms": cell.think.as_secs_f64() * 1000.0,
        "writers": cell.writers,
        "readers": cell.readers,
        "seconds": outcome.seconds,
        "variants": outcome.lanes.iter().map(|lane| variant(outcome, lane)).collect::<Vec<_>>(),
    })
}

fn variant(outcome: &Outcome, lane: &Lane) -> Value {
    /// For each latency in milliseconds, the part of transactions at least as long.
    #[derive(Serialize)]
    struct Point(f64, f64);
    let ccdf = ccdf(&steps(&lane.latencies));
    json!({
        "variant": lane.variant,
        "figures": lane.summary(),
        "ratios_to_stock": outcome.ratios(lane),
        "repetitions": lane.repetitions().collect::<Vec<_>>(),
        "commits_per_client": lane.shares,
        "sqlite_busy_at": lane.busy,
        "latency_ccdf_ms": plot::thinned(&ccdf)
            .into_iter()
            .map(|(ns, part)| Point(ns as f64 / 1e6, part))
            .collect::<Vec<_>>(),
    })
}

/// The commit that is checked out, with a `+` if the files differ from it.
fn git_commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let is_clean = git(&["status", "--porcelain"])?.is_empty();
    Some(commit + if is_clean { "" } else { "+" })
}
