//! # Mischief: signals and intermissions
//!
//! Workers are killed as in the kanban board's chaos. Beside that one is stopped (SIGSTOP) wherever it happens to
//! be, with whatever locks it holds, and goes on (SIGCONT) a moment later. During an *intermission*, while a
//! certain file exists, the workers use short connections only, and try to switch to the journal mode that the
//! file names.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use fastrand::Rng;
use rustix::process::Signal;

use crate::chaos::Chaos;
use crate::crew::{Crew, Disturber};
use crate::job::{self, Journal};
use crate::place::beside;

/// The time between the end of a stop and the next one, and how long one is, in milliseconds.
const STOPS_MS: (Range<u64>, Range<u64>) = (300..2000, 1..1000);
/// The same of the intermissions.
const INTERMISSIONS_MS: (Range<u64>, Range<u64>) = (1000..4000, 300..2000);

/// What was done, and how often.
pub(crate) type Deeds = BTreeMap<String, u64>;

/// All of it.
pub(crate) struct Mischief {
    random: Rng,
    chaos: Chaos,
    stopped: Option<usize>,
    next_stop: Instant,
    intermission: PathBuf,
    in_intermission: bool,
    next_intermission: Instant,
    deeds: Deeds,
}

/// The file that is there during an intermission, and names its journal mode.
pub(crate) fn intermission(db: &Path) -> PathBuf {
    beside(db, ".intermission")
}

/// The journal mode of the intermission, if there is one now.
pub(crate) fn announced(intermission: &Path) -> Option<Journal> {
    fs::read_to_string(intermission).ok().and_then(|name| Journal::from_str(&name, false).ok())
}

impl Mischief {
    /// Nothing is due at once.
    pub(crate) fn new(db: &Path, mut random: Rng) -> Self {
        Self {
            chaos: Chaos::new(random.u64(..)),
            stopped: None,
            next_stop: later(&mut random, STOPS_MS.0),
            intermission: intermission(db),
            in_intermission: false,
            next_intermission: later(&mut random, INTERMISSIONS_MS.0),
            deeds: Deeds::new(),
            random,
        }
    }

    pub(crate) fn into_deeds(self) -> Deeds {
        self.deeds
    }

    fn did(&mut self, what: &str) {
        *self.deeds.entry(what.to_owned()).or_default() += 1;
    }

    fn stop_or_continue(&mut self, crew: &mut Crew<'_>) {
        if let Some(index) = self.stopped.take() {
            crew.signal(index, Signal::CONT);
            self.next_stop = later(&mut self.random, STOPS_MS.0);
        } else if let Some(index) = self.random.choice(crew.workers()) {
            crew.signal(index, Signal::STOP);
            self.stopped = Some(index);
            self.next_stop = later(&mut self.random, STOPS_MS.1);
            self.did("SIGSTOP");
        }
    }

    fn begin_or_end_intermission(&mut self) {
        // Without the file there is no intermission, which is no harm.
        if self.in_intermission {
            let _ = fs::remove_file(&self.intermission);
            self.next_intermission = later(&mut self.random, INTERMISSIONS_MS.0);
        } else {
            let journal = self.random.choice([Journal::Wal, Journal::Delete]).unwrap_or(Journal::Wal);
            let _ = fs::write(&self.intermission, job::name(journal));
            self.next_intermission = later(&mut self.random, INTERMISSIONS_MS.1);
            self.did("intermission");
        }
        self.in_intermission = !self.in_intermission;
    }
}

impl Disturber for Mischief {
    fn disturb(&mut self, crew: &mut Crew<'_>) {
        self.chaos.disturb(crew);
        let now = Instant::now();
        if now >= self.next_stop {
            self.stop_or_continue(crew);
        }
        if now >= self.next_intermission {
            self.begin_or_end_intermission();
        }
    }

    fn finish(&mut self, crew: &mut Crew<'_>) {
        if self.stopped.is_some() {
            self.stop_or_continue(crew);
        }
    }
}

fn later(random: &mut Rng, ms: Range<u64>) -> Instant {
    Instant::now() + Duration::from_millis(random.u64(ms))
}
