//! A cell's figures as text.

use std::fmt::Write as _;

use crate::machine::Machine;
use crate::results::{Figure, Figures, Lane, Outcome};
use crate::variant::{KANBANLOCK, Waiting};

/// For each variant a line of medians, one of the spread (smallest … largest) and one of ratios to stock.
pub(crate) fn to_text(outcome: &Outcome, repetitions: u32) -> String {
    let with_readers = outcome.cell.readers > 0;
    let columns: Vec<Figure> = Figure::ALL
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
        if !lane.busy.is_empty() {
            let places: Vec<String> = lane.busy.iter().map(|(at, times)| format!("{times} x {at}")).collect();
            let _ = writeln!(text, "  BUSY in all repetitions: {}", places.join(", "));
        }
        if lane.variant.waiting == Waiting::Mixed {
            let handler: u64 = lane
                .shares
                .iter()
                .flat_map(|run| run.iter().skip(1).step_by(2))
                .copied()
                .map(u64::from)
                .sum();
            let all: u64 = lane.shares.iter().flatten().copied().map(u64::from).sum();
            let percent = 100.0 * handler as f64 / all as f64;
            let _ = writeln!(
                text,
                "  the clients with a handler of their own have {percent:.1} % of the commits"
            );
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

/// README's table: one row for each cell, stock's median → kanbanlock's.
pub(crate) fn to_markdown(outcomes: &[Outcome], repetitions: u32, machine: &Machine) -> String {
    const COLUMNS: [Figure; 9] = [
        Figure::Commits,
        Figure::P99,
        Figure::P999,
        Figure::Max,
        Figure::TimeWeightedMedian,
        Figure::Jain,
        Figure::Busy,
        Figure::Cpu,
        Figure::Wal,
    ];
    let mut text = "| `unix` → **`kanbanlock`** | ".to_owned();
    text.push_str(&COLUMNS.map(Figure::label).join(" | "));
    text.push_str(" |\n|");
    text.push_str(&"---|".repeat(1 + COLUMNS.len()));
    for outcome in outcomes {
        let Some(lane) = outcome.lanes.iter().find(|lane| lane.variant.name == KANBANLOCK) else { continue };
        let medians = (outcome.stock().and_then(Lane::summary), lane.summary(), outcome.ratios(lane));
        let (Some(stock), Some(ours), Some(ratios)) = medians else { continue };
        let _ = write!(text, "\n| {} |", outcome.cell);
        for figure in COLUMNS {
            let (before, after) = (show(figure, &stock.median), show(figure, &ours.median));
            let ratio = ratios.median[figure];
            let ratio = match figure {
                Figure::Commits | Figure::P99 | Figure::P999 | Figure::Max => format!(" ({})", times(ratio)),
                _ => String::new(),
            };
            if before == after {
                let _ = write!(text, " {before} |");
            } else {
                let _ = write!(text, " {before} → {after}{ratio} |");
            }
        }
    }
    let seconds = outcomes.first().map_or(0.0, |outcome| outcome.seconds);
    let _ = write!(
        text,
        "\n\n\
         ![Latency distributions](docs/img/contention-latency.svg)\n\
         ![Commits of each writer](docs/img/contention-fairness.svg)\n\
         \n\
         Medians of {repetitions} runs of {seconds} s, the variants in turns; in brackets the median ratio of runs side by \
         side. Latency in milliseconds from before BEGIN to after COMMIT, both with `busy_timeout` 5000. OFF and NORMAL are \
         `synchronous`; think: what a writer sleeps between two transactions. tw median: half of all the time that \
         writers spent in transactions was spent in ones at most this long. Jain: fairness over the writers' commits, 1 is \
         equal. BUSY: SQLITE_BUSY that reached the application. CPU µs: the writers', per commit. WAL MB: its largest \
         size. Every acknowledged commit was found in the database afterwards. All figures, and those of an \
         application's own flock and of a 1 ms busy handler: `cargo bench --bench contention`.\n\
         \n\
         {machine}\n"
    );
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
        Figure::Commits
        | Figure::Busy
        | Figure::Early
        | Figure::Audited
        | Figure::Reads
        | Figure::Foreign => {
            format!("{value:.0}")
        }
        Figure::Jain => format!("{value:.3}"),
        Figure::Wal if value == 0.0 => "–".to_owned(), // rollback mode
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
        ..0.9995 => 3,
        0.9995..9.995 => 2,
        9.995..99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}
