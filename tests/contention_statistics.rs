//! The statistics of the contention benchmark. (It has no test harness of its own.)

#[path = "../benches/contention/stats.rs"]
mod stats;

use stats::{ccdf, jain, time_weighted_median};

#[test]
fn jain_is_1_for_equal_shares_and_1_in_n_for_a_monopoly() {
    assert_eq!(jain([7.0; 16]), 1.0);
    assert_eq!(jain([0.0, 0.0, 9.0, 0.0]), 0.25);
    assert_eq!(jain([3.0]), 1.0);
}

/// Half of them get nothing, the others the same: one half. And the index does not ask how much there was.
#[test]
fn jain_says_which_part_of_the_clients_is_served() {
    assert_eq!(jain([5.0, 0.0, 5.0, 0.0]), 0.5);
    assert_eq!(jain([1.0, 2.0, 3.0]), jain([10.0, 20.0, 30.0]));
    assert!((jain([1.0, 2.0, 3.0]) - 36.0 / 42.0).abs() < 1e-12);
}

#[test]
fn jain_of_nothing_is_0() {
    assert_eq!(jain([]), 0.0);
    assert_eq!(jain([0.0; 4]), 0.0);
}

/// A thousand transactions of 1 ms and one of 2 s: the median transaction takes 1 ms, but two thirds of all the time
/// went into the long one.
#[test]
fn time_weighted_median_is_where_the_time_went() {
    assert_eq!(time_weighted_median(&[(1, 1000), (2000, 1)]), 2000);
    assert_eq!(time_weighted_median(&[(1, 2001), (2000, 1)]), 1);
}

#[test]
fn time_weighted_median_of_exactly_half_is_the_shorter_one() {
    assert_eq!(time_weighted_median(&[(1, 2000), (2000, 1)]), 1);
    assert_eq!(time_weighted_median(&[(5, 3)]), 5);
    assert_eq!(time_weighted_median(&[]), 0);
}

/// Ten minutes in nanoseconds, a thousand million times: more than 64 bits hold.
#[test]
fn time_weighted_median_does_not_overflow() {
    assert_eq!(time_weighted_median(&[(1, 1), (600_000_000_000, 1_000_000_000)]), 600_000_000_000);
}

#[test]
fn ccdf_begins_at_all_and_ends_at_the_longest_ones() {
    assert_eq!(ccdf(&[(1, 5), (4, 4), (9, 1)]), [(1, 1.0), (4, 0.5), (9, 0.1)]);
    assert_eq!(ccdf(&[(3, 1)]), [(3, 1.0)]);
    assert_eq!(ccdf(&[]), []);
}
