//! A cell's figures as text.

use std::fmt::Write as _;

use crate::results::{Figure, Figures, Lane, Outcome};

/// The columns of the table on stdout. The readers' come only where there are readers.
const COLUMNS: [Figure; 15] = Figure::ALL;

/// For each variant a line of medians, one of the spread (smallest … largest) and one of ratios to stock.
pub(crate) fn to_text(outcome: &Outcome, repetitions: u32) -> String {
    let with_readers = outcome.cell.readers > 0;
    let columns: Vec<Figure> = COLUMNS
        .into_iter()
        .filter(|figure| with_readers || !matches!(figure, Figure::Reads | Figure::ReadP99))
        .collect();
    let mut text = format!("\n{} ({repetitions} x {} s)\n", outcome.cell, outcome.seconds);
    line(&mut text, "", columns.iter().map(|figure| figure.label().to_owned()));
    for lane in &outcome.lanes {
        let name = &lane.variant.name;
        let Some(summary) = lane.summary() else {
            let _ = writeln!(text, "{name:<18} every run failed");
            continue;
        };
        line(&mut text, name, columns.iter().map(|&figure| show(figure, &summary.median)));
        if lane.repetitions().count() > 1 {
            let spread = |&figure: &Figure| {
                let (low, high) = (show(figure, &summary.min), show(figure, &summary.max));
                if low == high { "=".to_owned() } else { format!("{low}…{high}") }
            };
            line(&mut text, "  min…max", columns.iter().map(spread));
        }
        if let Some(ratios) = outcome.ratios(lane) {
            let ratio = |&figure: &Figure| match ratios.median[figure] {
                ratio if figure.has_ratio() && ratio.is_finite() => times(ratio),
                _ => String::new(),
            };
            line(&mut text, "  to stock", columns.iter().map(ratio));
        }
    }
    text
}

/// One line for a run that has just ended.
pub(crate) fn progress(outcome: &Outcome, lane: &Lane, repetition: u32) -> String {
    let name = &lane.variant.name;
    let mut text = format!("{}, {name}, repetition {}:", outcome.cell, repetition + 1);
    match lane.repetitions().last() {
        Some(figures) => {
            for figure in
                [Figure::Commits, Figure::P99, Figure::Max, Figure::Jain, Figure::Busy, Figure::Foreign]
            {
                let _ = write!(text, "  {} {}", figure.label(), show(figure, &figures));
            }
        }
        None => text.push_str("  failed"),
    }
    text
}

fn line(text: &mut String, name: &str, cells: impl Iterator<Item = String>) {
    let _ = write!(text, "{name:<18}");
    for cell in cells {
        let _ = write!(text, " {cell:>12}");
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
}

/// As few digits as say something.
pub(crate) fn show(figure: Figure, figures: &Figures) -> String {
    let value = figures[figure];
    match figure {
        Figure::Commits | Figure::Busy | Figure::Audited | Figure::Reads | Figure::Foreign => {
            format!("{value:.0}")
        }
        Figure::Jain => format!("{value:.3}"),
        _ => three_digits(value),
    }
}

/// A multiple: large ones as `12.3x`, small ones as `1/12.3`.
pub(crate) fn times(ratio: f64) -> String {
    if ratio > 0.0 && ratio < 0.5 {
        format!("1/{}", three_digits(1.0 / ratio))
    } else {
        format!("{ratio:.2}x")
    }
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        ..1.0 => 3,
        1.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}
