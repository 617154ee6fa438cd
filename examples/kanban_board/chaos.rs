//! # Chaos: SIGKILL at random moments
//!
//! A worker, or one time in eight every worker, is killed wherever it happens to be.

use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::process::Signal;

use super::crew::{Crew, Disturber};

/// Shortest and longest time between two kills, in milliseconds.
const KILLS_MS: std::ops::Range<u64> = 50..800;
/// One in this many kills is a kill of all workers at once.
const KILL_ALL_ONE_IN: u32 = 8;

/// When to kill whom: a sequence that the seed determines.
pub(crate) struct Chaos {
    random: Rng,
    next: Instant,
}

impl Chaos {
    /// The first kill is due a while from now.
    pub(crate) fn new(seed: u64) -> Self {
        let mut chaos = Self { random: Rng::with_seed(seed), next: Instant::now() };
        chaos.schedule();
        chaos
    }

    fn schedule(&mut self) {
        self.next = Instant::now() + Duration::from_millis(self.random.u64(KILLS_MS));
    }
}

impl Disturber for Chaos {
    fn disturb(&mut self, crew: &mut Crew<'_>) {
        if Instant::now() < self.next {
            return;
        }
        let mut victims = crew.workers();
        if self.random.u32(0..KILL_ALL_ONE_IN) != 0 {
            victims = self.random.choice(victims).into_iter().collect();
        }
        for victim in victims {
            crew.signal(victim, Signal::KILL);
        }
        self.schedule();
    }

    fn finish(&mut self, _: &mut Crew<'_>) {}
}
