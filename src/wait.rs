//! xSleep: the time between a refusal and the next attempt.
//!
//! SQLite's busy handler (`sqlite3_busy_timeout`) sleeps 1, 2, 5, 10 … 100 ms through `xSleep` of the connection's VFS, and
//! adds up *what it asked for*. So the sleep can end early, when the gate is reserved for this connection, and then must
//! nearly always end in success, since the attempts are numbered, too.
//!
//! ## Key operations
//! A refusal leaves a note in the thread ([`refused`]), which the next xSleep of the thread takes ([`sleep`]): "this seat
//! wants the gate". Another connection that answers SQLITE_BUSY takes it away. Without a fresh note the real VFS sleeps,
//! in full: `sqlite3_sleep()` has nothing to do with us.
//!
//! ## Invariants
//! - A wait is never shorter than SQLite asked for, taken over all its sleeps, unless the gate was had: what was not slept
//!   because a sleep ended early, and to no avail, is slept later. The last sleep of a busy timeout, which is mostly
//!   shorter than the one before, ends early only if another connection says that it is our turn.
//! - Nor is it longer by more than [`OVERDRAFT`]: a wait for the gate takes that much of its later sleeps in advance. An
//!   attempt in between would be refused, and disturb: in rollback mode it takes SHARED, which the owner's COMMIT waits for.
//!
//! Uses: `hint`, `queue`, `sys`.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use crate::hint::SharedHint;
use crate::queue::{Micros, Seat, Waited};
use crate::sys;

/// A connection's seat.
pub type ConnectionSeat = Seat<SharedHint>;

/// How much longer than asked for a connection sleeps, in all, before it tries again.
const OVERDRAFT: Micros = 12_000;
/// A note that is older than this was for a sleep that did not come.
const FRESH: Micros = 20_000;

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Its turn to acquire the gate.
    Gate,
    /// Any release of the gate: it wants to read, in rollback mode.
    Release,
    /// That others give up SHARED, so that it gets EXCLUSIVE.
    Exclusive,
}

/// How many sleeps of one wait may end early because of something that can happen again before we are there. (A turn that
/// is reserved cannot.) All sleeps of a busy timeout of 5 s are 60.
const EARLY: u32 = 8;

/// What the thread knows of its last refusal.
#[derive(Debug)]
struct Note {
    seat: Weak<ConnectionSeat>,
    want: Want,
    /// How many sleeps of this wait have ended early.
    early: u32,
    /// [`Seat::release_count`], or for EXCLUSIVE [`Seat::wants_exclusive`], from before the refusal.
    seen: u32,
    /// When it was refused; `None`: it has slept since.
    refused: Option<Micros>,
    /// What earlier sleeps of this wait have left of the [`OVERDRAFT`], and of what they were asked for.
    balance: Micros,
    /// When the last sleep of this wait was over, or it began.
    woke: Micros,
    /// What the last sleep of this wait was asked for.
    requested: Micros,
}

thread_local! {
    static NOTE: RefCell<Option<Note>> = const { RefCell::new(None) };
}

/// What `seat` wants was refused, in this thread. `seen`: [`Seat::release_count`] or [`Seat::wants_exclusive`], from before.
pub fn refused(seat: &Arc<ConnectionSeat>, want: Want, seen: u32, now: Micros) {
    with_note(|note| {
        let seat = Arc::downgrade(seat);
        // The same wait goes on, if it is the same connection's and it has just slept.
        let (balance, requested, early, woke) = match note {
            Some(old) if old.seat.ptr_eq(&seat) && now.saturating_sub(old.woke) <= FRESH => {
                (old.balance, old.requested, old.early, old.woke)
            }
            _ => (OVERDRAFT, 0, 0, now),
        };
        *note = Some(Note { seat, want, early, seen, refused: Some(now), balance, requested, woke });
    });
}

/// The gate was acquired, in this thread, after waiting for it: the wait is over.
pub fn over() {
    with_note(|note| *note = None);
}

/// A connection at `seat`, or at none, answers SQLITE_BUSY in this thread: a note of another connection's is not for the
/// sleep that follows. (That one was tried with a timeout of 0, say.)
pub fn not_for_another(seat: Option<&Arc<ConnectionSeat>>) {
    with_note(|note| {
        let is_own = |note: &mut Note| seat.is_some_and(|seat| note.seat.as_ptr() == Arc::as_ptr(seat));
        drop(note.take_if(|note| !is_own(note)));
    });
}

/// A wait for what the note says, as far as the next sleep is concerned.
struct Wait {
    seat: Arc<ConnectionSeat>,
    want: Want,
    seen: u32,
    balance: Micros,
    may_end_early: bool,
    is_last: bool,
}

/// Begins a sleep of the wait that the note is about; `None`: there is none.
fn begin(requested: Micros) -> Option<Wait> {
    let now = sys::micros();
    with_note(|note| {
        let note = note.as_mut()?;
        let is_fresh = note.refused.take().is_some_and(|refused| now.saturating_sub(refused) <= FRESH);
        if !is_fresh {
            (note.balance, note.early) = (OVERDRAFT, 0); // another wait than the last one
        }
        // The rest of a busy timeout: after a refusal there is no other. (Or a new wait: no harm done.)
        let is_last = requested < note.requested;
        if is_last {
            note.early = 0;
        }
        note.requested = requested;
        let seat = note.seat.upgrade().filter(|seat| is_fresh && !seat.board().0.is_inherited())?;
        let Note { want, seen, balance, .. } = *note;
        Some(Wait { seat, want, seen, balance, may_end_early: note.early < EARLY, is_last })
    })?
}

/// xSleep: sleeps for `requested`, or until it is this thread's connection's turn. `real` is the real VFS's.
pub fn sleep(requested: Micros, real: impl FnOnce()) {
    let Some(wait) = begin(requested) else { return real() };
    let Wait { seat, want, seen, balance, may_end_early, is_last } = wait;
    let limit = match want {
        Want::Gate => requested + balance,
        // These are not sure of success when they return: the overdraft stays.
        Want::Release | Want::Exclusive => requested + balance.saturating_sub(OVERDRAFT),
    };
    let Waited { micros, is_next } = match want {
        // Who holds the gate without knowing of the queue may have it again before we are there. Not on the last attempt.
        Want::Gate => seat.sleep_until_next(limit, seen, || !is_last && seat.board().0.is_free()),
        Want::Release if may_end_early => seat.wait_release(limit, seen),
        Want::Exclusive if may_end_early => seat.wait_exclusive(limit, seen),
        Want::Release | Want::Exclusive => {
            sys::sleep(limit);
            Waited { micros: limit, is_next: false }
        }
    };
    with_note(|note| {
        if let Some(note) = note {
            note.balance = (requested + balance).saturating_sub(micros);
            note.early += u32::from(is_next);
            note.woke = sys::micros();
        }
    });
}

/// Nothing if the thread is about to end, and its note is gone.
fn with_note<T>(body: impl FnOnce(&mut Option<Note>) -> T) -> Option<T> {
    NOTE.try_with(|note| body(&mut note.borrow_mut())).ok()
}
