//! A wait for the gate that has become long: whom it is for, in words for SQLite's log.
//!
//! ## Definitions
//! *A wait*: refusals of one connection, with at most a second between two of them. *Self-deadlock*: the flock is held by
//! this very process, but by none of its kanbanlock connections.
//!
//! ## Invariants
//! - A wait has at most one message; a connection is told of a self-deadlock once.
//! - `/proc/locks` is read at the 10th, 20th, 40th … refusal and for a message, not at each: to read it took some 10 ms
//!   here. (It excludes all that take or give up a lock on any processor: `locks_start` in the kernel's fs/locks.c.)
//!
//! Uses: `descriptor`, `holder`, `inner_gates`, `queue`, `stats`, `sys`.

use std::cell::Cell;
use std::path::Path;

use crate::descriptor::Descriptor;
use crate::holder;
use crate::inner_gates;
use crate::queue::Micros;
use crate::stats;
use crate::sys;

/// A refusal so long after the last one belongs to another wait: SQLite sleeps at most 100 ms in between.
const SAME_WAIT: Micros = 1_000_000;
/// After how many refusals in a row it is first asked who the holder is.
const SELF_DEADLOCK_REFUSALS: u32 = 10;

/// How long a connection has waited, and what it was told.
#[derive(Debug)]
pub struct LongWait {
    /// A wait that is longer is worth a message; 0: none is.
    warn_after: Micros,
    /// How many in a row, and since when.
    refusals: Cell<u32>,
    since: Cell<Micros>,
    refused_at: Cell<Micros>,
    has_named_holder: Cell<bool>,
    has_warned_self_deadlock: Cell<bool>,
}

/// A line for the log.
#[derive(Debug)]
pub struct Message {
    pub text: String,
    /// How long the wait has lasted, if that is what it is about.
    pub waited_ms: Option<u64>,
}

impl LongWait {
    pub fn new(warn_after: Micros) -> LongWait {
        LongWait {
            warn_after,
            refusals: Cell::new(0),
            since: Cell::new(0),
            refused_at: Cell::new(0),
            has_named_holder: Cell::new(false),
            has_warned_self_deadlock: Cell::new(false),
        }
    }

    /// True if the last attempt was refused.
    #[inline]
    pub fn is_waiting(&self) -> bool {
        self.refusals.get() != 0
    }

    /// The gate was acquired.
    #[inline]
    pub fn over(&self) {
        self.refusals.set(0);
    }

    /// How long it has taken, if that was long enough for a message. Before [`LongWait::over`].
    pub fn lasted(&self, now: Micros) -> Option<Micros> {
        let waited = now.saturating_sub(self.since.get());
        let is_same_wait = now.saturating_sub(self.refused_at.get()) <= SAME_WAIT;
        (is_same_wait && self.is_long(waited)).then_some(waited)
    }

    fn is_long(&self, waited: Micros) -> bool {
        self.warn_after != 0 && waited >= self.warn_after
    }

    /// The gate was refused. `since`: who holds it, and since when, if the holder has said so at the queue.
    pub fn refused(
        &self,
        now: Micros,
        path: &Path,
        descriptor: Option<&Descriptor>,
        since: impl FnOnce() -> Option<(u32, Micros)>,
    ) -> Option<Message> {
        if !self.is_waiting() || now.saturating_sub(self.refused_at.get()) > SAME_WAIT {
            self.refusals.set(0);
            self.since.set(now);
            self.has_named_holder.set(false);
        }
        self.refused_at.set(now);
        self.refusals.set(self.refusals.get().saturating_add(1));
        let waited = now.saturating_sub(self.since.get());
        let rounds = self.refusals.get() / SELF_DEADLOCK_REFUSALS;
        let is_time = self.refusals.get() % SELF_DEADLOCK_REFUSALS == 0 && rounds.is_power_of_two();
        if is_time && !self.has_warned_self_deadlock.get() {
            if let Some(text) = descriptor.and_then(|descriptor| self_deadlock(path, descriptor)) {
                self.has_warned_self_deadlock.set(true);
                self.has_named_holder.set(true);
                return Some(Message { text, waited_ms: None });
            }
        }
        if !self.is_long(waited) || self.has_named_holder.replace(true) {
            return None;
        }
        let (holder, waited_ms) = (who_holds(descriptor?, since), waited / 1000);
        let text = format!("kanbanlock: waiting for {} for {waited_ms} ms; it is {holder}", path.display());
        Some(Message { text, waited_ms: Some(waited_ms) })
    }
}

/// One process that wraps its own flock around a kanbanlock connection waits for itself; so does the command of
/// `flock db.lock command`.
fn self_deadlock(path: &Path, descriptor: &Descriptor) -> Option<String> {
    if descriptor.is_inside() {
        return None;
    }
    let is_unused = || stats::snapshot().held == 0;
    let is_holder = || {
        holder::flock_holder(descriptor.as_fd(), descriptor.id()) == Some(std::process::id()) && is_unused()
    };
    let has_inherited = || inner_gates::is_flocked_here(descriptor.id()) && is_unused();
    // Twice, since a waiting connection tries the flock for a moment (`Hint::is_free`).
    let twice = |condition: &dyn Fn() -> bool| condition() && condition();
    let (process, path) = (std::process::id(), path.display());
    if twice(&is_holder) {
        Some(format!(
            "kanbanlock: this process (pid {process}) itself holds the flock on {path}, through a descriptor of its own, so \
             its connection waits for itself. Remove the application's flock: kanbanlock takes it for every write transaction"
        ))
    } else if twice(&has_inherited) {
        Some(format!(
            "kanbanlock: this process (pid {process}) was started by a holder of the flock on {path} and has inherited it, so \
             its connection waits for itself. Instead of flock(1), use `kanbanlock run`, which lets its command write"
        ))
    } else {
        None
    }
}

/// Whom a wait is for: "held by …".
fn who_holds(descriptor: &Descriptor, since: impl FnOnce() -> Option<(u32, Micros)>) -> String {
    if descriptor.is_inside() {
        // OFD locks have no pid (/proc/locks says -1).
        return format!("held by another of those that {} was handed down to", inner_gates::VARIABLE);
    }
    let Some(pid) = holder::flock_holder(descriptor.as_fd(), descriptor.id()) else {
        return "not held at this moment, or by a process that cannot be seen from here".to_owned();
    };
    let held = match since().filter(|(known, _)| *known == pid) {
        Some((_, since)) => format!(" for {} ms", sys::micros().saturating_sub(since) / 1000),
        None => String::new(),
    };
    format!("held by process {pid} ({}){held}", holder::command_line(pid))
}
