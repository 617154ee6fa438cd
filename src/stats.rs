//! Counters of the whole process, over all connections and all copies of SQLite.
//!
//! Relaxed atomics: each counter is exact, but a snapshot may catch one of them a moment ahead of another.
//!
//! Uses: nothing.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter.
#[derive(Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    /// Adds one.
    pub fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The gate was acquired.
pub static ACQUIRED: Counter = Counter::new();
/// The gate was released.
pub static RELEASED: Counter = Counter::new();
/// The gate was refused: another holds it.
pub static REFUSED: Counter = Counter::new();
/// A lock file was found deleted or replaced.
pub static REPLACED: Counter = Counter::new();
/// A write lock was granted without the gate.
pub static UNLOCKED: Counter = Counter::new();
/// A WAL restart was put off by the reset guard.
pub static RESETS_DEFERRED: Counter = Counter::new();

/// What kanbanlock has done in this process so far; see [`stats`](crate::stats()).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// How often the flock on a `<db>.lock` was acquired.
    pub acquired: u64,
    /// How many of them are held at this moment.
    pub held: u64,
    /// How often it was refused because another open file description held it; SQLite saw SQLITE_BUSY.
    pub refused: u64,
    /// How often a lock file was found deleted or replaced, and was opened anew.
    pub replaced: u64,
    /// How many write locks were granted without the flock, by `kanbanlock_fallback=unlocked`.
    pub unlocked: u64,
    /// How many WAL restarts were put off because a checkpoint was under way (the reset guard).
    pub resets_deferred: u64,
}

/// A snapshot of the counters.
pub fn snapshot() -> Stats {
    // RELEASED first: a release counted here has its acquisition counted below, so `held` is not negative.
    let released = RELEASED.get();
    let acquired = ACQUIRED.get();
    Stats {
        acquired,
        held: acquired.saturating_sub(released),
        refused: REFUSED.get(),
        replaced: REPLACED.get(),
        unlocked: UNLOCKED.get(),
        resets_deferred: RESETS_DEFERRED.get(),
    }
}
