//! From runs to figures: those of one run, their medians, and their ratios to stock.
//!
//! A ratio is taken within one repetition, where both ran side by side; what is reported is the median of the ratios.

use std::collections::BTreeMap;
use std::ops::{Index, IndexMut};

use hdrhistogram::Histogram;
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::Result;
use crate::client::{Tally, histogram};
use crate::median::median_of;
use crate::run::Run;
use crate::stats::{jain, time_weighted_median};
use crate::variant::{STOCK, Variant};
use crate::workload::Cell;

/// What is reported. Latencies are from before BEGIN to after COMMIT, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Figure {
    /// Commits acknowledged before the end of the run's duration, per second.
    Commits,
    P50,
    P99,
    P999,
    /// The longest of all, which is also the worst client's longest.
    Max,
    /// The p99 of the client whose p99 is longest.
    WorstP99,
    /// See [`time_weighted_median`].
    TimeWeightedMedian,
    /// Jain's index over the clients' commits before the end of the run's duration.
    Jain,
    /// Times SQLITE_BUSY reached the application, a reader's included.
    Busy,
    /// Those of them that came before the busy timeout had passed.
    Early,
    /// The writers' user and system time per commit, in microseconds.
    Cpu,
    /// The largest size of the WAL that was seen, in megabytes (10⁶ bytes).
    Wal,
    /// Commits that were acknowledged, and all found in the database.
    Audited,
    /// Read transactions of all readers, per second.
    Reads,
    /// The readers' p99.
    ReadP99,
    /// The part of the machine's processor time in percent that other programs and the kernel's threads used.
    Foreign,
}

impl Figure {
    pub(crate) const ALL: [Self; 16] = [
        Self::Commits,
        Self::P50,
        Self::P99,
        Self::P999,
        Self::Max,
        Self::WorstP99,
        Self::TimeWeightedMedian,
        Self::Jain,
        Self::Busy,
        Self::Early,
        Self::Cpu,
        Self::Wal,
        Self::Audited,
        Self::Reads,
        Self::ReadP99,
        Self::Foreign,
    ];

    /// Its name in the JSON file.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Commits => "commits_per_s",
            Self::P50 => "p50_ms",
            Self::P99 => "p99_ms",
            Self::P999 => "p999_ms",
            Self::Max => "max_ms",
            Self::WorstP99 => "worst_client_p99_ms",
            Self::TimeWeightedMedian => "time_weighted_median_ms",
            Self::Jain => "jain",
            Self::Busy => "sqlite_busy",
            Self::Early => "early_sqlite_busy",
            Self::Cpu => "cpu_us_per_commit",
            Self::Wal => "peak_wal_mb",
            Self::Audited => "audited_commits",
            Self::Reads => "reads_per_s",
            Self::ReadP99 => "read_p99_ms",
            Self::Foreign => "foreign_cpu_percent",
        }
    }

    /// Its name at the head of a column.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Commits => "commits/s",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::P999 => "p99.9",
            Self::Max => "max",
            Self::WorstP99 => "worst p99",
            Self::TimeWeightedMedian => "tw median",
            Self::Jain => "Jain",
            Self::Busy => "BUSY",
            Self::Early => "early BUSY",
            Self::Cpu => "CPU µs",
            Self::Wal => "WAL MB",
            Self::Audited => "audited",
            Self::Reads => "reads/s",
            Self::ReadP99 => "read p99",
            Self::Foreign => "foreign %",
        }
    }

    /// Whether a ratio to stock means something.
    pub(crate) fn has_ratio(self) -> bool {
        !matches!(self, Self::Jain | Self::Busy | Self::Early | Self::Audited | Self::Foreign)
    }
}

/// One value of each figure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Figures([f64; Figure::ALL.len()]);

impl Figures {
    fn of(run: &Run, seconds: f64) -> Result<Self> {
        let all = sum(&run.writers)?;
        let reads = sum(&run.readers)?;
        let ms = |ns: u64| ns as f64 / 1e6;
        let mut worst_p99 = 0;
        for client in &run.writers {
            worst_p99 = worst_p99.max(client.latencies()?.value_at_quantile(0.99));
        }
        let in_time = || run.writers.iter().map(|client| f64::from(client.in_time));
        let read: u32 = run.readers.iter().map(|client| client.in_time).sum();
        let commits: u32 = run.writers.iter().map(|client| client.done).sum();
        let clients = || run.writers.iter().chain(&run.readers);
        let busy: u32 = clients().flat_map(|client| client.busy.values()).sum();
        let early: u32 = clients().map(|client| client.early).sum();
        let cpu: f64 = run.writers.iter().map(|client| client.cpu.as_secs_f64()).sum();
        let mut figures = Self::default();
        for figure in Figure::ALL {
            figures[figure] = match figure {
                Figure::Commits => in_time().sum::<f64>() / seconds,
                Figure::P50 => ms(all.value_at_quantile(0.5)),
                Figure::P99 => ms(all.value_at_quantile(0.99)),
                Figure::P999 => ms(all.value_at_quantile(0.999)),
                Figure::Max => ms(all.max()),
                Figure::WorstP99 => ms(worst_p99),
                Figure::TimeWeightedMedian => ms(time_weighted_median(&steps(&all))),
                Figure::Jain => jain(in_time()),
                Figure::Busy => f64::from(busy),
                Figure::Early => f64::from(early),
                Figure::Cpu => cpu * 1e6 / f64::from(commits),
                Figure::Wal => run.peak_wal as f64 / 1e6,
                Figure::Audited => f64::from(commits),
                Figure::Reads => f64::from(read) / seconds,
                Figure::ReadP99 => ms(reads.value_at_quantile(0.99)),
                Figure::Foreign => run.foreign_cpu * 100.0,
            };
        }
        Ok(figures)
    }

    /// Figure by figure.
    fn map(value: impl Fn(Figure) -> f64) -> Self {
        Self(Figure::ALL.map(value))
    }
}

impl Index<Figure> for Figures {
    type Output = f64;

    fn index(&self, figure: Figure) -> &f64 {
        &self.0[figure as usize]
    }
}

impl IndexMut<Figure> for Figures {
    fn index_mut(&mut self, figure: Figure) -> &mut f64 {
        &mut self.0[figure as usize]
    }
}

impl Serialize for Figures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(Figure::ALL.len()))?;
        for figure in Figure::ALL {
            map.serialize_entry(figure.key(), &self[figure])?;
        }
        map.end()
    }
}

/// What the repetitions have in common.
#[derive(serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) median: Figures,
    pub(crate) min: Figures,
    pub(crate) max: Figures,
}

impl Summary {
    /// None of nothing.
    fn of(figures: &[Figures]) -> Option<Self> {
        let of = |reduce: fn(f64, f64) -> f64| {
            Figures::map(|figure| figures.iter().map(|each| each[figure]).reduce(reduce).unwrap_or(0.0))
        };
        (!figures.is_empty()).then(|| Self {
            median: Figures::map(|figure| median_of(figures.iter().map(|each| each[figure]))),
            min: of(f64::min),
            max: of(f64::max),
        })
    }
}

/// One variant in one cell, all repetitions.
pub(crate) struct Lane {
    pub(crate) variant: Variant,
    /// None: the run failed.
    repetitions: Vec<Option<Figures>>,
    /// Commits in time of each writer, for each run that did not fail.
    pub(crate) shares: Vec<Vec<u32>>,
    /// SQLITE_BUSY by where and how, all clients and repetitions.
    pub(crate) busy: BTreeMap<String, u32>,
    /// Of all writers and repetitions, in nanoseconds.
    pub(crate) latencies: Histogram<u64>,
}

/// One cell, all variants.
pub(crate) struct Outcome {
    pub(crate) cell: Cell,
    pub(crate) seconds: f64,
    pub(crate) lanes: Vec<Lane>,
}

impl Outcome {
    pub(crate) fn new(cell: Cell, seconds: f64, variants: &[Variant]) -> Self {
        let lane = |variant: &Variant| Lane {
            variant: variant.clone(),
            repetitions: Vec::new(),
            shares: Vec::new(),
            busy: BTreeMap::new(),
            latencies: histogram(),
        };
        Self { cell, seconds, lanes: variants.iter().map(lane).collect() }
    }

    /// Adds the next repetition of a lane.
    pub(crate) fn add(&mut self, lane: usize, run: Option<&Run>) -> Result<()> {
        let lane = &mut self.lanes[lane];
        let Some(run) = run else {
            lane.repetitions.push(None);
            return Ok(());
        };
        lane.latencies.add(sum(&run.writers)?)?;
        for (at, times) in run.writers.iter().chain(&run.readers).flat_map(|client| &client.busy) {
            *lane.busy.entry(at.clone()).or_default() += times;
        }
        lane.shares.push(run.writers.iter().map(|client| client.in_time).collect());
        lane.repetitions.push(Some(Figures::of(run, self.seconds)?));
        Ok(())
    }

    pub(crate) fn stock(&self) -> Option<&Lane> {
        self.lanes.iter().find(|lane| lane.variant.name == STOCK)
    }

    /// What a lane's figures are as multiples of stock's. None without stock, and of stock itself.
    pub(crate) fn ratios(&self, lane: &Lane) -> Option<Summary> {
        let stock = self.stock().filter(|stock| stock.variant != lane.variant)?;
        let pairs = lane.repetitions.iter().zip(&stock.repetitions);
        let ratios: Vec<Figures> = pairs
            .filter_map(|(ours, theirs)| {
                let (ours, theirs) = (ours.as_ref()?, theirs.as_ref()?);
                Some(Figures::map(|figure| ours[figure] / theirs[figure]))
            })
            .collect();
        Summary::of(&ratios)
    }
}

impl Lane {
    pub(crate) fn summary(&self) -> Option<Summary> {
        let figures: Vec<Figures> = self.repetitions().collect();
        Summary::of(&figures)
    }

    /// Those that did not fail.
    pub(crate) fn repetitions(&self) -> impl Iterator<Item = Figures> {
        self.repetitions.iter().flatten().copied()
    }
}

/// Several clients' latencies.
fn sum(clients: &[Tally]) -> Result<Histogram<u64>> {
    let mut sum = histogram();
    for client in clients {
        sum.add(client.latencies()?)?;
    }
    Ok(sum)
}

/// A histogram as `stats.rs` likes it.
pub(crate) fn steps(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect()
}
