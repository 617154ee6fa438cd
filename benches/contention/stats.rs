//! The statistics of contention. Each works on a distribution as ascending pairs (latency, how many transactions took
//! it), which is what a histogram's buckets are.

/// Jain's fairness index of what each client got, `(Σx)² / (n Σx²)`: 1 if all got the same, `1/n` if one got everything.
/// (R. Jain, D. Chiu, W. Hawe, "A Quantitative Measure of Fairness", DEC-TR-301, 1984.) 0 if nobody got anything.
pub(crate) fn jain(shares: impl IntoIterator<Item = f64>) -> f64 {
    let (mut n, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for share in shares {
        n += 1.0;
        sum += share;
        squares += share * share;
    }
    if squares == 0.0 { 0.0 } else { sum * sum / (n * squares) }
}

/// The time-weighted median: half of all the time that clients spent in transactions was spent in transactions that
/// took at most this long. A median over moments instead of transactions: a client asked at a random moment of its
/// waiting is, with probability one half, in a transaction at least as long. Unlike the median over transactions it
/// is not made to look good by one client that commits ten thousand times while the others wait. 0 of nothing.
pub(crate) fn time_weighted_median(distribution: &[(u64, u64)]) -> u64 {
    let time = |(latency, count): (u64, u64)| u128::from(latency) * u128::from(count);
    let total: u128 = distribution.iter().copied().map(time).sum();
    let mut spent = 0;
    let mut last = 0;
    for &step in distribution {
        spent += time(step);
        last = step.0;
        if 2 * spent >= total {
            break;
        }
    }
    last
}

/// The complementary cumulative distribution: for each latency the part of all transactions that took at least as
/// long. It begins at 1 and falls; its last value belongs to the longest, and is not 0, so that it can be drawn on a
/// logarithmic scale.
pub(crate) fn ccdf(distribution: &[(u64, u64)]) -> Vec<(u64, f64)> {
    let total: u64 = distribution.iter().map(|(_, count)| count).sum();
    let mut left = total;
    distribution
        .iter()
        .map(|&(latency, count)| {
            let point = (latency, left as f64 / total as f64);
            left -= count;
            point
        })
        .collect()
}
