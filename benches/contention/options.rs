//! The command line, and the cells and variants that it asks for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

use crate::variant::Variant;
use crate::workload::{Cell, Workload};
use crate::{Result, goals};

/// SQLite under contention: writer processes on one database, stock beside kanbanlock.
#[derive(Parser)]
#[command(name = "contention")]
pub(crate) struct Options {
    /// A short run over few cells, for CI
    #[arg(long)]
    quick: bool,

    /// The whole matrix: every axis that is not named below in full
    #[arg(long, conflicts_with = "quick")]
    full: bool,

    /// Length of one run [default: 3; with --quick 0.5]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    seconds: Option<Duration>,

    /// Repetitions of each cell; the variants take turns within each [default: 5; with --quick 1]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repetitions: Option<u32>,

    /// Numbers of writer processes [default, if an axis is named: 16; all: 1,2,4,8,16,32]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=256))]
    writers: Option<Vec<u32>>,

    /// Numbers of reader processes [default, if an axis is named: 0; all: 0,4]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(0..=256))]
    readers: Option<Vec<u32>>,

    /// Think times in milliseconds, 0 for a tight loop [default, if an axis is named, and all: 1,0]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_milliseconds)]
    think: Option<Vec<Duration>>,

    /// Workloads whose name contains this: WAL/NORMAL/disk, DELETE/NORMAL/disk, WAL/OFF/tmpfs, DELETE/OFF/tmpfs
    #[arg(long, value_name = "FILTER")]
    workload: Option<String>,

    /// Variants: stock, stock-1ms, app-flock, kanbanlock, kanbanlock-1ms, kanbanlock-mixed [default: the first four]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_variant)]
    variants: Option<Vec<String>>,

    /// URI parameters of the named kanbanlock variants: kanbanlock_x=y&kanbanlock_z=w
    #[arg(long, value_name = "PARAMETERS", default_value = "", hide_default_value = true)]
    uri_parameters: String,

    /// One more kanbanlock variant, with its own URI parameters (may be repeated)
    #[arg(long, value_name = "NAME=PARAMETERS", value_parser = parse_kanbanlock)]
    kanbanlock: Vec<Variant>,

    /// Check the goals too; if no axis is named, run their cells only
    #[arg(long)]
    compare: bool,

    /// Put the pictures into docs/img and the table into README.md (with the default cells only)
    #[arg(long, conflicts_with_all = [
        "quick", "full", "compare", "seconds", "repetitions", "writers", "readers", "think", "workload", "variants",
        "uri_parameters", "kanbanlock",
    ])]
    pub(crate) docs: bool,

    /// Directory for contention.json and the pictures [default: Cargo's target directory]
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,

    /// Directory that stands for the disk
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_TARGET_TMPDIR"), hide_default_value = true)]
    pub(crate) dir: PathBuf,

    /// What `cargo bench` passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// Whether it is to be quick: on request, and when `cargo test` runs it, which does not pass `--bench`.
    fn is_quick(&self) -> bool {
        self.quick || !(self.bench || self.docs)
    }

    /// Whether the goals are to be checked.
    pub(crate) fn compares(&self) -> bool {
        self.compare
    }

    /// Of one run.
    pub(crate) fn duration(&self) -> Duration {
        self.seconds.unwrap_or(Duration::from_millis(if self.is_quick() { 500 } else { 3000 }))
    }

    /// Where the JSON file and the pictures go.
    pub(crate) fn output(&self) -> Result<PathBuf> {
        match &self.output {
            Some(path) => Ok(path.clone()),
            None => {
                Ok(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().ok_or("no target directory")?.to_owned())
            }
        }
    }

    pub(crate) fn repetitions(&self) -> u32 {
        self.repetitions.unwrap_or(if self.is_quick() { 1 } else { 5 })
    }

    /// Who competes, in the order of the first repetition.
    pub(crate) fn variants(&self) -> Vec<Variant> {
        let named = Variant::named(&self.uri_parameters);
        let mut variants = match &self.variants {
            None => named[..4].to_vec(),
            Some(names) => named.into_iter().filter(|variant| names.contains(&variant.name)).collect(),
        };
        variants.extend_from_slice(&self.kanbanlock);
        variants
    }

    /// Where they compete. If any axis is named, or with --full: every combination. Otherwise the cells that the
    /// default run, or the quick one, is made of.
    pub(crate) fn cells(&self) -> Vec<Cell> {
        let all = self.full;
        let axis_is_named = self.writers.is_some() || self.readers.is_some() || self.think.is_some();
        if !all && !axis_is_named && self.workload.is_none() {
            return match self.compare {
                true => goals::cells(),
                false if self.is_quick() => quick_cells(),
                false => default_cells(),
            };
        }
        let writers = self.writers.clone();
        let writers = writers.unwrap_or(if all { vec![1, 2, 4, 8, 16, 32] } else { vec![16] });
        let readers = self.readers.clone().unwrap_or(if all { vec![0, 4] } else { vec![0] });
        let think = self.think.clone().unwrap_or(vec![ONE_MS, TIGHT]);
        let filter = self.workload.as_deref().unwrap_or("");
        let mut cells = Vec::new();
        for workload in Workload::ALL.into_iter().filter(|workload| workload.to_string().contains(filter)) {
            for &think in &think {
                for &readers in &readers {
                    cells.extend(writers.iter().map(|&writers| Cell { workload, think, writers, readers }));
                }
            }
        }
        cells
    }
}

const TIGHT: Duration = Duration::ZERO;
const ONE_MS: Duration = Duration::from_millis(1);

/// The cells of the goals (`goals.rs`), then the same with readers, on a disk that syncs every commit, and the usual
/// case with fewer and with more writers.
fn default_cells() -> Vec<Cell> {
    let cell = |workload, think, writers, readers| Cell { workload, think, writers, readers };
    let mut cells = goals::cells();
    cells.extend([
        cell(Workload::DELETE_TMPFS, ONE_MS, 16, 4),
        cell(Workload::WAL_DISK, ONE_MS, 16, 4),
        cell(Workload::DELETE_DISK, ONE_MS, 16, 0),
        cell(Workload::WAL_DISK, ONE_MS, 1, 0),
        cell(Workload::WAL_DISK, ONE_MS, 4, 0),
        cell(Workload::WAL_DISK, ONE_MS, 32, 0),
    ]);
    cells
}

/// One cell of each workload, both think times, with and without readers.
fn quick_cells() -> Vec<Cell> {
    let cell = |workload, think, writers, readers| Cell { workload, think, writers, readers };
    vec![
        cell(Workload::WAL_DISK, ONE_MS, 16, 0),
        cell(Workload::DELETE_DISK, TIGHT, 4, 4),
        cell(Workload::WAL_TMPFS, TIGHT, 16, 4),
        cell(Workload::DELETE_TMPFS, ONE_MS, 16, 0),
    ]
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected seconds, from 0.05 to 3600".to_owned()),
    }
}

fn parse_milliseconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(ms) if (0.0..=10_000.0).contains(&ms) => Ok(Duration::from_secs_f64(ms / 1000.0)),
        _ => Err("expected milliseconds, from 0 to 10000".to_owned()),
    }
}

fn parse_variant(name: &str) -> Result<String, String> {
    let known = Variant::named("").map(|variant| variant.name);
    if known.iter().any(|known| known == name) {
        Ok(name.to_owned())
    } else {
        Err(format!("expected one of {}", known.join(", ")))
    }
}

fn parse_kanbanlock(text: &str) -> Result<Variant, String> {
    match text.split_once('=') {
        Some((name, parameters)) if !name.is_empty() && parse_variant(name).is_err() => {
            Ok(Variant::kanbanlock(name, parameters))
        }
        _ => Err("expected NAME=PARAMETERS with a new name, such as slice0=kanbanlock_slice_us=0".to_owned()),
    }
}
