//! The two pictures: how long transactions take, and who gets to commit.

use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Result;
use crate::results::{Figure, Lane, Outcome, steps};
use crate::stats::ccdf;
use crate::table::times;
use crate::workload::{Cell, Workload};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const FONT: &str = "sans-serif";
/// Stock, and then the others in the order of the variants: colours that the colour-blind can tell apart (Okabe, Ito).
const COLORS: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// Which outcomes go into the pictures: the usual case and the worst, of those that were run; else the first.
fn chosen(outcomes: &[Outcome]) -> Vec<&Outcome> {
    let is = |outcome: &&Outcome, workload, tight: bool| {
        let Cell { writers, readers, .. } = outcome.cell;
        outcome.cell.workload == workload
            && outcome.cell.think.is_zero() == tight
            && (writers, readers) == (16, 0)
    };
    let usual = outcomes.iter().find(|outcome| is(outcome, Workload::WAL_DISK, false));
    let worst = outcomes.iter().find(|outcome| is(outcome, Workload::WAL_TMPFS, true));
    let mut chosen: Vec<&Outcome> = usual.into_iter().chain(worst).collect();
    if chosen.is_empty() {
        chosen.extend(outcomes.first());
    }
    chosen
}

/// The part of transactions that take at least so long, every variant in one picture for each chosen cell. The whole
/// distribution of all repetitions, so the far right shows single transactions.
pub(crate) fn latency(outcomes: &[Outcome], path: &Path) -> Result<()> {
    let chosen = chosen(outcomes);
    let width = 560 * u32::try_from(chosen.len())?;
    let root = SVGBackend::new(path, (width, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, outcome) in root.split_evenly((1, chosen.len())).iter().zip(chosen) {
        latencies_of(outcome, area)?;
    }
    Ok(root.present()?)
}

fn latencies_of(outcome: &Outcome, area: &Area<'_>) -> Result<()> {
    let ms = |ns: u64| ns as f64 / 1e6;
    let with_commits = || outcome.lanes.iter().filter(|lane| !lane.latencies.is_empty());
    let longest = with_commits().map(|lane| ms(lane.latencies.max())).fold(1.0, f64::max);
    let shortest = with_commits().map(|lane| ms(lane.latencies.min_nz())).fold(1.0, f64::min);
    let most = with_commits().map(|lane| lane.latencies.len()).max().unwrap_or(1);
    let mut chart = ChartBuilder::on(area)
        .caption(outcome.cell.to_string(), (FONT, 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(65)
        .build_cartesian_2d((shortest..longest * 1.5).log_scale(), (0.5 / most as f64..1.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("latency from before BEGIN to after COMMIT, ms")
        .y_desc("part of transactions at least as long")
        .x_label_formatter(&|x| plain(*x))
        .y_label_formatter(&|y| plain(*y))
        .x_labels(8)
        .y_labels(8)
        .light_line_style(WHITE)
        .label_style((FONT, 12))
        .axis_desc_style((FONT, 13))
        .draw()?;
    for (lane, color) in outcome.lanes.iter().zip(COLORS.iter().cycle()) {
        let points = thinned(&ccdf(&steps(&lane.latencies)));
        let line = points.into_iter().map(|(latency, part)| (ms(latency), part));
        let style = color.stroke_width(if lane.is_highlighted() { 3 } else { 1 });
        chart
            .draw_series(LineSeries::new(line, style))?
            .label(&lane.variant.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 13))
        .draw()?;
    Ok(())
}

/// The commits of each client in one run, most first: stock beside kanbanlock.
pub(crate) fn fairness(outcomes: &[Outcome], path: &Path) -> Result<()> {
    let Some(outcome) = chosen(outcomes).pop() else { return Ok(()) };
    let lanes: Vec<&Lane> =
        outcome.lanes.iter().filter(|lane| lane.is_highlighted() && !lane.shares.is_empty()).collect();
    if lanes.is_empty() {
        return Ok(());
    }
    let root = SVGBackend::new(path, (1120, 340)).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(&format!("Commits of each writer: {}", outcome.cell), (FONT, 16))?;
    let runs: Vec<Vec<u32>> = lanes.iter().map(|lane| typical_run(lane)).collect();
    let highest = runs.iter().flatten().max().copied().unwrap_or(0).max(1);
    for ((area, lane), run) in root.split_evenly((1, lanes.len())).iter().zip(&lanes).zip(&runs) {
        let color = COLORS
            [outcome.lanes.iter().position(|each| each.variant == lane.variant).unwrap_or(0) % COLORS.len()];
        commits_of(outcome, lane, run, 0..highest + highest / 20 + 1, color, area)?;
    }
    Ok(root.present()?)
}

fn commits_of(
    outcome: &Outcome,
    lane: &Lane,
    run: &[u32],
    scale: Range<u32>,
    color: RGBColor,
    area: &Area<'_>,
) -> Result<()> {
    let jain = lane.summary().map_or(0.0, |summary| summary.median[Figure::Jain]);
    let ratio = outcome.ratios(lane).map(|ratios| times(ratios.median[Figure::Commits]));
    let ratio = ratio.map(|ratio| format!(", {ratio} stock's commits/s")).unwrap_or_default();
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: Jain's index {jain:.3}{ratio}", lane.variant.name), (FONT, 14))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(65)
        .build_cartesian_2d(0.0..run.len() as f64, scale)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(0)
        .x_desc("writers, most commits first")
        .y_desc(format!("commits in {} s", outcome.seconds))
        .label_style((FONT, 12))
        .axis_desc_style((FONT, 13))
        .draw()?;
    let bars = run.iter().enumerate().map(|(at, &commits)| {
        Rectangle::new([(at as f64 + 0.1, 0), (at as f64 + 0.9, commits)], color.filled())
    });
    chart.draw_series(bars)?;
    Ok(())
}

impl Lane {
    /// What the pictures are about: stock SQLite with its own busy timeout, and kanbanlock.
    fn is_highlighted(&self) -> bool {
        !self.variant.app_flock && self.variant.waiting == crate::variant::Waiting::BusyTimeout
    }
}

/// The run whose Jain's index is the median (of an even number the lower one), sorted.
fn typical_run(lane: &Lane) -> Vec<u32> {
    let mut runs: Vec<(f64, &Vec<u32>)> = lane
        .shares
        .iter()
        .map(|run| (crate::stats::jain(run.iter().map(|&commits| commits.into())), run))
        .collect();
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut run = runs[(runs.len() - 1) / 2].1.clone();
    run.sort_unstable_by(|a, b| b.cmp(a));
    run
}

/// Without the points that nobody sees: those that differ from the last by less than two percent in both.
pub(crate) fn thinned(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let mut thinned: Vec<(u64, f64)> = Vec::new();
    for (at, &point) in points.iter().enumerate() {
        let is_near = |last: &(u64, f64)| {
            (point.0 as f64) < 1.02 * last.0 as f64 && last.1 / point.1 < 1.02 && at + 1 < points.len()
        };
        if !thinned.last().is_some_and(is_near) {
            thinned.push(point);
        }
    }
    thinned
}

/// A power of ten without needless zeros.
fn plain(value: f64) -> String {
    if value < 0.0009 { format!("{value:e}") } else { format!("{value}") }
}
