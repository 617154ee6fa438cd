//! The parts of the overhead benchmark that decide what README says: the statistics, and the replacement of
//! the table between its markers. (A criterion benchmark has no test harness of its own.)

#[path = "../benches/overhead/markers.rs"]
mod markers;
#[path = "../benches/overhead/stats.rs"]
mod stats;

use markers::splice;
use stats::{Estimate, FEWEST, median_of};

/// The values 1, 2, … n, not in order.
fn values(n: u32) -> impl Iterator<Item = f64> {
    (1..=n).rev().map(f64::from)
}

#[test]
fn median_of_an_even_number_is_between() {
    assert_eq!(median_of(values(5)), 3.0);
    assert_eq!(median_of(values(6)), 3.5);
    assert_eq!(median_of([7.0]), 7.0);
}

#[test]
fn quartiles_are_values_and_symmetric() {
    assert_eq!(Estimate::quartiles(values(9)), Estimate { low: 3.0, median: 5.0, high: 7.0 });
    assert_eq!(Estimate::quartiles(values(1)), Estimate { low: 1.0, median: 1.0, high: 1.0 });
}

/// The number of observations below the median is binomial(n, 1/2), so the chance that the interval misses
/// it can be had exactly. It is never more than 5 %, nor is the interval much wider than that needs.
#[test]
fn confidence_interval_keeps_its_promise() {
    for n in FEWEST..=1000 {
        let Ok(size) = u32::try_from(n) else { unreachable!() };
        let Estimate { low, median, high } = Estimate::confidence(values(size));
        assert_eq!(low + high, 2.0 * median, "symmetric, n = {n}");
        // The values are their own ranks: the interval misses if fewer than `low` are below the median.
        let mut probability = 0.5_f64.powi(size.cast_signed());
        let mut below = 0.0;
        let mut rank = 0.0;
        while rank < low {
            below += probability;
            probability *= (f64::from(size) - rank) / (rank + 1.0);
            rank += 1.0;
        }
        assert!(2.0 * below <= 0.05, "n = {n}: misses in {}", 2.0 * below);
        assert!(n < 100 || 2.0 * below >= 0.02, "n = {n}: too wide, misses in {}", 2.0 * below);
    }
}

#[test]
#[should_panic(expected = "5 observations")]
fn too_few_observations_have_no_interval() {
    Estimate::confidence(values(5));
}

#[test]
fn splice_replaces_only_what_is_between_the_markers() {
    let text = "# A\n<!-- overhead:begin -->\nold\n<!-- overhead:end -->\nrest";
    let once = splice(text, "overhead", "new").expect("both markers");
    assert_eq!(once, "# A\n<!-- overhead:begin -->\n\nnew\n<!-- overhead:end -->\nrest");
    assert_eq!(splice(&once, "overhead", "new").as_ref(), Ok(&once), "again: no change");
}

#[test]
fn splice_refuses_markers_that_are_missing_doubled_or_swapped() {
    const BEGIN: &str = "<!-- overhead:begin -->";
    const END: &str = "<!-- overhead:end -->";
    for parts in [&[][..], &[BEGIN], &[END], &[END, BEGIN], &[BEGIN, BEGIN, END], &[BEGIN, END, END]] {
        assert!(splice(&parts.concat(), "overhead", "new").is_err(), "{parts:?}");
    }
}
