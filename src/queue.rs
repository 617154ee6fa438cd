//! The fair queue of one lock file: who is next, and how it is told.
//!
//! The flock on `<db>.lock` is the truth about who may write. This is about *waiting*: a board in shared memory on which
//! connections of many processes write that they wait, and on which the one that releases the gate says who is next.
//! Whatever stands on the board, nobody writes without the flock: a board full of garbage costs time, nothing else.
//!
//! ## Definitions
//! *Seat*: one connection's place at the board, with an `id`. *Entry*: one of the board's 63 places for those that wait.
//! *Ticket*: the number that a seat draws when it starts to wait, and keeps until it has had the gate; the lowest is next.
//! *Asleep*: in [`Seat::sleep_until_next`], wakeable. *Away*: refused, but somewhere else: about to try again, or in a
//! busy handler that sleeps by itself. *Reservation*: "until then the gate is for that seat". *Turn*: the time that a
//! seat may go on acquiring while others wait, the *slice*. *Claimed*: the one that the gate is reserved for is awake.
//! *Overtake*: to have the gate while it is reserved for one that is still waking up.
//!
//! ## Invariants
//! - **Reserve, don't grant.** Nobody takes the flock for another, nor in its sleep: a retry that does not come would leave
//!   it locked.
//! - **No barging.** While somebody lives that is asleep with a lower ticket, or while the gate is reserved for another,
//!   a seat does not try the flock; but in its own slice, and to overtake.
//! - **Overtaken for a moment only.** It takes a process some 50 µs to wake up; meanwhile the gate need not lie idle. A
//!   seat that has not waited may overtake, for [`WAKING`] after the reservation, until that is claimed. An overtaker writes
//!   on the board that it is one *before* it looks whether the reservation is claimed; who claims looks *after* that
//!   whether there is an overtaker, and then waits for it (sequentially consistent). To overtake begins no slice. An
//!   overtaker that was killed stands on the board until the next one has the gate.
//! - **No lost wake.** A waiter has its entry on the board *before* it tries the flock for the last time, and a releaser
//!   looks at the board *after* it has unlocked the flock; then it raises `releases` *before* it looks who is asleep, and a
//!   waiter looks at `releases` *after* it has marked itself asleep. Each of these pairs is sequentially consistent.
//! - **Nothing lasts.** Whatever says "wait for me" has a date: a reservation [`LEASE`], an entry until its `due`. A process
//!   that is killed or stopped delays the others by that much, and what garbage says is over as soon. A date that is too
//!   far away is none.
//! - **A date is not the truth**: who was passed over because it was late keeps its ticket, and is then next.
//!
//! All of this is safe Rust over atomics. `hint.rs` finds the memory, `wait.rs` calls [`Seat::sleep_until_next`] from
//! xSleep, `gate.rs` the rest.
//!
//! Uses: `sys`.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
#[cfg(not(test))]
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

#[cfg(not(test))]
use crate::sys;
// Unit tests decide who runs when, and what time it is.
#[cfg(test)]
use crate::tests::world::{self as sys, AtomicBool, AtomicU32, AtomicU64};

/// Microseconds of [`sys::micros`].
pub type Micros = u64;

/// How many can wait at one lock file. Whoever finds no entry sleeps and tries again, as stock SQLite does.
pub const ENTRIES: usize = 63;
/// In `Board::queued`, beside a bit for each entry: somebody waits for the next release with no entry
/// ([`Seat::wait_release`]).
const ANYBODY: u64 = 1 << ENTRIES;

/// How long the gate is kept for the one that was woken.
const LEASE: Micros = 2_000;
/// For how long after it was woken a sleeper may be overtaken. (Longer lengthens the others' waits, not the throughput.)
const WAKING: Micros = 200;
/// How long one that is awake waits for who has overtaken it, before it sleeps again.
const SPIN: Micros = 50;
/// How often the first in the queue looks by itself; the second half as often, and so on, down to [`SLOWEST_POLL`].
const POLL: Micros = 2_000;
const SLOWEST_POLL: Micros = 20_000;
/// How much later than it said a waiter may be before it counts as dead.
const GRACE: Micros = 5_000;
/// How long a seat that went away to try again is thought to be coming back.
const AWAY: Micros = 20_000;
/// No date on the board lies further ahead than this.
const HORIZON: Micros = 1_000_000;
/// An owner that asks again so soon after its release has a transaction at hand: its slice is not given away.
const TIGHT: Micros = 100;
/// Of so many polls that find a holder on the board, one tries the flock all the same: the holder may be dead.
const DISTRUST: u32 = 8;

/// A seat that never sleeps here is passed over by all that do. After so many refusals …
const RESCUE_REFUSALS: u32 = 2;
/// … the gate is reserved for it shortly before it is expected back …
const RESCUE_AHEAD: Micros = 500;
/// … and until it comes, if that is within this time, …
const RESCUE_LONGEST: Micros = 100_000;
/// … and the board has been busy for so many times as long as the gate may lie idle for it.
const RESCUE_SHARE: Micros = 8;

const IS_AWAY: u64 = 1;
const IS_ASLEEP: u64 = 2;
const FREE: u64 = 0;
/// In a reservation: nobody may overtake.
const CLAIMED: u64 = 1;

/// A cache line of its own.
#[repr(C, align(64))]
#[derive(Debug, Default)]
struct Line<T>(T);

/// What lies in the shared memory. All zeros is an empty board.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Board {
    identity: Line<Identity>,
    /// One bit for each entry in use. What every acquire and release looks at.
    queued: Line<AtomicU64>,
    /// The process that holds the gate, and since when, in milliseconds: `pid << 40 | since`; 0: none that we know.
    holder: Line<AtomicU64>,
    turn: Line<Turn>,
    tickets: Line<AtomicU64>,
    seats: AtomicU32,
    entries: Entries,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Identity {
    magic: AtomicU64,
    device: AtomicU64,
    inode: AtomicU64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Turn {
    /// `id << 32 | end | CLAIMED`, the end in the low 32 bits of microseconds, made even; 0: none.
    reservation: AtomicU64,
    /// Raised at each release that somebody may be waiting for.
    releases: AtomicU32,
    owner: AtomicU32,
    /// The seat that overtakes, or is about to; 0: none.
    overtaker: AtomicU32,
    /// Not 0: the owner waits for EXCLUSIVE, until the last SHARED lock is gone.
    exclusive: AtomicU32,
    /// Raised by each connection that gives up SHARED meanwhile.
    shared_releases: AtomicU32,
    /// The owner has released the gate, but will ask for it again before this moment.
    kept: AtomicU64,
    /// When the gate was last left alone for a seat that was to be rescued.
    rescued: AtomicU64,
    /// Before this moment no seat is rescued.
    next_rescue: AtomicU64,
}

/// An array of so many has no `Default`.
#[repr(C)]
#[derive(Debug)]
struct Entries([Line<Entry>; ENTRIES]);

impl Default for Entries {
    fn default() -> Entries {
        Entries(std::array::from_fn(|_| Line::default()))
    }
}

#[repr(C)]
#[derive(Debug, Default)]
struct Entry {
    /// `id << 8 | IS_AWAY or IS_ASLEEP`, or [`FREE`].
    state: AtomicU64,
    ticket: AtomicU64,
    /// Its owner will be heard of before.
    due: AtomicU64,
    /// What its owner sleeps on.
    word: AtomicU32,
    /// How often in a row it was refused without sleeping here.
    refusals: AtomicU32,
    /// When it was refused last, and how long after the time before.
    refused: AtomicU64,
    interval: AtomicU64,
    /// The process that waits, and since when it has had this entry: for those that look on.
    since: AtomicU64,
    pid: AtomicU32,
}

/// An entry as somebody else sees it.
#[derive(Clone, Copy, Debug)]
struct Waiter {
    entry: usize,
    id: u32,
    ticket: u64,
    is_asleep: bool,
}

/// What the board says to somebody who only looks on ([`Board::glimpse`]).
#[derive(Clone, Debug)]
pub struct Glimpse {
    /// The process that holds the gate, and since when.
    pub holder: Option<(u32, Micros)>,
    /// Those that wait, the next first: process, since when, and whether it sleeps in [`Seat::sleep_until_next`].
    pub waiters: Vec<(u32, Micros, bool)>,
    /// How many tickets were drawn.
    pub tickets: u64,
    /// How many releases somebody waited for, modulo 2³².
    pub releases: u32,
    /// How many seats have sat here, modulo 2³².
    pub seats: u32,
}

impl Board {
    /// What the board says now. Reads only.
    pub fn glimpse(&self, now: Micros) -> Glimpse {
        let mut waiters: Vec<(u64, (u32, Micros, bool))> = Vec::new();
        for Line(entry) in &self.entries.0 {
            let state = entry.state.load(SeqCst);
            if state != FREE && is_ahead(entry.due.load(SeqCst), now) {
                let waiter = (entry.pid.load(Relaxed), entry.since.load(Relaxed), state & 0xff == IS_ASLEEP);
                waiters.push((entry.ticket.load(Relaxed), waiter));
            }
        }
        waiters.sort_by_key(|(ticket, _)| *ticket);
        Glimpse {
            holder: self.holder(),
            waiters: waiters.into_iter().map(|(_, waiter)| waiter).collect(),
            tickets: self.tickets.0.load(Relaxed),
            releases: self.turn.0.releases.load(Relaxed),
            seats: self.seats.load(Relaxed),
        }
    }

    /// "kanbanlock queue, layout 2".
    const MAGIC: u64 = u64::from_le_bytes(*b"kanbanq2");

    /// Marks new memory as the board of the lock file with these device and inode numbers.
    pub fn initialise(&self, (device, inode): (u64, u64)) {
        self.identity.0.device.store(device, Relaxed);
        self.identity.0.inode.store(inode, Relaxed);
        self.identity.0.magic.store(Board::MAGIC, SeqCst);
    }

    /// True for the board of this lock file, in this version's layout.
    pub fn is_of(&self, (device, inode): (u64, u64)) -> bool {
        let Identity { magic, device: its_device, inode: its_inode } = &self.identity.0;
        magic.load(SeqCst) == Board::MAGIC
            && its_device.load(Relaxed) == device
            && its_inode.load(Relaxed) == inode
    }

    #[cfg(test)]
    pub fn overtaker(&self) -> u32 {
        self.turn.0.overtaker.load(SeqCst)
    }

    /// The process that holds the gate, as far as it has said so, and since when.
    pub fn holder(&self) -> Option<(u32, Micros)> {
        let holder = self.holder.0.load(Relaxed);
        let pid = u32::try_from(holder >> 40).unwrap_or(0);
        (pid != 0).then_some((pid, (holder & ((1 << 40) - 1)) * 1000))
    }

    fn entry(&self, index: usize) -> &Entry {
        &self.entries.0[index % ENTRIES].0
    }

    /// Reserves the gate as `new` says, unless it is reserved. False: it is, or somebody else has reserved or acquired it
    /// since the reservation was `seen`.
    fn reserve(&self, seen: u64, new: u64, now: Micros) -> bool {
        let word = &self.turn.0.reservation;
        reserved_for(seen, now).is_none() && word.compare_exchange(seen, new, SeqCst, SeqCst).is_ok()
    }

    /// Those that wait and are alive. Dead entries are freed on the way.
    fn waiters(&self, now: Micros) -> impl Iterator<Item = Waiter> + '_ {
        let mut bits = self.queued.0.load(SeqCst) & !ANYBODY;
        std::iter::from_fn(move || {
            if bits == 0 {
                return None;
            }
            let entry = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            Some(entry)
        })
        .filter_map(move |entry| self.look(entry, now))
    }

    fn look(&self, index: usize, now: Micros) -> Option<Waiter> {
        let entry = self.entry(index);
        let state = entry.state.load(SeqCst);
        if state != FREE && is_ahead(entry.due.load(SeqCst), now) {
            let id = u32::try_from(state >> 8).ok()?;
            let ticket = entry.ticket.load(Relaxed);
            return Some(Waiter { entry: index, id, ticket, is_asleep: state & 0xff == IS_ASLEEP });
        }
        if state != FREE {
            self.free(index, state); // dead
        } else if self.is_queued(index) && entry.state.load(SeqCst) == FREE {
            // Left behind. (The bit that we have seen is mostly an old one.)
            self.free(index, FREE);
        }
        None
    }

    fn is_queued(&self, index: usize) -> bool {
        self.queued.0.load(SeqCst) & 1 << index != 0
    }

    /// Frees an entry in this state. The bit first: whoever claims the entry then sets it after.
    fn free(&self, index: usize, state: u64) {
        let entry = self.entry(index);
        self.queued.0.fetch_and(!(1 << index), SeqCst);
        if entry.state.compare_exchange(state, FREE, SeqCst, SeqCst).is_err() {
            // Its owner is back, or it has another one.
            self.queued.0.fetch_or(1 << index, SeqCst);
        }
    }

    /// Whose turn it is next: the lowest ticket of those asleep, or one that has to be rescued.
    fn next(&self, now: Micros) -> Option<(Waiter, Micros)> {
        let sleeper =
            self.waiters(now).filter(|waiter| waiter.is_asleep).min_by_key(|waiter| waiter.ticket)?;
        let rescued = self.rescue(&sleeper, now);
        Some(rescued.unwrap_or((sleeper, LEASE)))
    }

    /// The busy handler of the application may sleep where nobody can wake it. While others sleep here and pass the gate
    /// on to each other, it would find the gate taken each time. So now and then the gate is left alone until it comes
    /// back, which is soon if it comes at regular times.
    fn rescue(&self, sleeper: &Waiter, now: Micros) -> Option<(Waiter, Micros)> {
        let turn = &self.turn.0;
        if is_ahead(turn.next_rescue.load(Relaxed), now + 1) {
            return None;
        }
        let is_stranded = |waiter: &Waiter| {
            let entry = self.entry(waiter.entry);
            !waiter.is_asleep
                && waiter.ticket < sleeper.ticket
                && entry.refusals.load(Relaxed) >= RESCUE_REFUSALS
        };
        let stranded = self.waiters(now).filter(is_stranded).min_by_key(|waiter| waiter.ticket)?;
        let entry = self.entry(stranded.entry);
        let interval = entry.interval.load(Relaxed);
        let expected = entry.refused.load(Relaxed).saturating_add(interval);
        // Until shortly before, the others can go on; and it may be late: twice as long, and a little.
        let wait = expected.saturating_sub(now);
        let lease = expected.saturating_add(interval).saturating_add(LEASE).saturating_sub(now);
        if wait > RESCUE_AHEAD + interval / 8 || !(1..=RESCUE_LONGEST).contains(&lease) {
            return None;
        }
        turn.rescued.store(now, Relaxed);
        turn.next_rescue.store(now + RESCUE_SHARE * lease, Relaxed);
        Some((stranded, lease))
    }
}

/// One connection's place at a board.
///
/// Atomics, although one thread at a time uses a connection: a thread may hold on to the seat of a connection that has
/// moved to another one since (`wait.rs`). Then both get on, and one of them may sleep a moment too long.
#[derive(Debug)]
pub struct Seat<B: AsRef<Board>> {
    board: B,
    id: u32,
    pid: u32,
    /// How long it may go on acquiring while others wait.
    slice: Micros,
    /// 0: not waiting.
    ticket: AtomicU64,
    /// [`ENTRIES`]: none.
    entry: AtomicU32,
    /// As in [`Entry`], where others may see it; an entry is lost when the seat is late, this is not.
    refusals: AtomicU32,
    refused: AtomicU64,
    interval: AtomicU64,
    /// When it last released the gate with others waiting; 0: it has asked for it again since.
    released: AtomicU64,
    is_tight: AtomicBool,
    /// It has asked for the gate in this transaction; and in the last.
    has_asked: AtomicBool,
    is_writer: AtomicBool,
    /// Those that wait with no entry are to be woken too.
    wakes_all: AtomicBool,
    /// When its slice ends, if the turn is its own.
    turn_ends: AtomicU64,
    /// It has released the gate and told nobody, since it was to ask again within its slice.
    owes: AtomicBool,
    /// The entry to wake, plus one; 0: none.
    pending_wake: AtomicU32,
    /// `Turn::overtaker` is this seat.
    overtakes: AtomicBool,
}

/// Since when a seat waits that was refused ([`Seat::enqueue`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enqueued {
    /// From now on: the flock must be tried once more, since whoever released it meanwhile may not have seen this seat.
    Now,
    /// It did before.
    Before,
}

/// What [`Seat::sleep_until_next`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waited {
    /// How long it slept.
    pub micros: Micros,
    /// True: what it waited for has happened. False: the time is over.
    pub is_next: bool,
}

impl<B: AsRef<Board>> Seat<B> {
    /// A new seat at `board`.
    pub fn new(board: B, slice: Micros) -> Seat<B> {
        // 0 means nobody. After four billion connections an old number may come again; by then its entry is long dead.
        let id = board.as_ref().seats.fetch_add(1, Relaxed).wrapping_add(1).max(1);
        Seat {
            board,
            id,
            pid: std::process::id(),
            slice,
            ticket: AtomicU64::new(0),
            entry: AtomicU32::new(NO_ENTRY),
            refusals: AtomicU32::new(0),
            refused: AtomicU64::new(0),
            interval: AtomicU64::new(0),
            released: AtomicU64::new(0),
            is_tight: AtomicBool::new(false),
            has_asked: AtomicBool::new(false),
            is_writer: AtomicBool::new(true),
            wakes_all: AtomicBool::new(false),
            turn_ends: AtomicU64::new(0),
            owes: AtomicBool::new(false),
            pending_wake: AtomicU32::new(0),
            overtakes: AtomicBool::new(false),
        }
    }

    /// The process that holds the gate, and since when, as far as it has said so.
    pub fn holder(&self) -> Option<(u32, Micros)> {
        self.at().holder()
    }

    /// The board, and what keeps it in place.
    pub fn board(&self) -> &B {
        &self.board
    }

    fn at(&self) -> &Board {
        self.board.as_ref()
    }

    /// True if nobody waits: then the gate is the flock, and nothing else need be asked.
    #[inline]
    pub fn is_alone(&self) -> bool {
        self.at().queued.0.load(SeqCst) == 0
    }

    /// To be read before [`Seat::may_try`], and passed to [`Seat::sleep_until_next`].
    pub fn release_count(&self) -> u32 {
        self.at().turn.0.releases.load(SeqCst)
    }

    /// The connection asks for the gate.
    pub fn note_attempt(&self, now: Micros) {
        self.has_asked.store(true, Relaxed);
        let released = self.released.swap(0, Relaxed);
        if released != 0 {
            self.is_tight.store(now.saturating_sub(released) < TIGHT, Relaxed);
        }
    }

    /// May this seat try the flock now? If so, [`Seat::acquired`], [`Seat::enqueue`] or [`Seat::give_way`] follows.
    pub fn may_try(&self, now: Micros) -> bool {
        let reservation = self.at().turn.0.reservation.load(SeqCst);
        if let Some(id) = reserved_for(reservation, now) {
            return id == self.id || self.overtake(reservation, now);
        }
        let ticket = match self.ticket.load(Relaxed) {
            0 => u64::MAX,
            ticket => ticket,
        };
        self.has_turn(now) || !self.at().waiters(now).any(|waiter| waiter.is_asleep && waiter.ticket < ticket)
    }

    /// Begins to overtake, if this seat may.
    fn overtake(&self, reservation: u64, now: Micros) -> bool {
        let turn = &self.at().turn.0;
        let left = Micros::from(halves(reservation)[1].wrapping_sub(low(now)));
        let has_waited = self.ticket.load(Relaxed) != 0;
        if reservation & CLAIMED != 0 || has_waited || left + WAKING < LEASE {
            return false;
        }
        if turn.overtaker.compare_exchange(0, self.id, SeqCst, SeqCst).is_err() {
            return false;
        }
        self.overtakes.store(true, Relaxed);
        let is_unclaimed = turn.reservation.load(SeqCst) == reservation;
        if !is_unclaimed {
            self.give_way(now);
        }
        is_unclaimed
    }

    /// It was to overtake, and has not had the flock: whoever has waited for that is told.
    pub fn give_way(&self, now: Micros) {
        if self.stop_overtaking() {
            self.hand_over(now);
            self.wake();
        }
    }

    /// False: it was not overtaking.
    #[inline]
    fn stop_overtaking(&self) -> bool {
        let overtakes = self.overtakes.load(Relaxed);
        if overtakes {
            self.overtakes.store(false, Relaxed);
            let _ = self.at().turn.0.overtaker.compare_exchange(self.id, 0, SeqCst, SeqCst);
        }
        overtakes
    }

    #[cfg(test)]
    pub fn is_overtaking(&self) -> bool {
        self.overtakes.load(Relaxed)
    }

    /// The gate is reserved for this seat, which is awake: nobody overtakes it from now on, and who does is waited for.
    /// False: it is not through yet, or the reservation is over.
    fn claim(&self, reservation: u64) -> bool {
        let turn = &self.at().turn.0;
        let claimed = reservation | CLAIMED;
        let is_claimed = reservation == claimed
            || turn.reservation.compare_exchange(reservation, claimed, SeqCst, SeqCst).is_ok();
        if !is_claimed {
            return false;
        }
        let end = sys::micros() + SPIN;
        while turn.overtaker.load(SeqCst) != 0 {
            if sys::micros() >= end {
                return false;
            }
            std::hint::spin_loop();
        }
        true
    }

    /// Within its own slice.
    fn has_turn(&self, now: Micros) -> bool {
        let turn = &self.at().turn.0;
        turn.owner.load(Relaxed) == self.id && is_ahead(self.turn_ends.load(Relaxed), now + 1)
    }

    /// The seat was refused: it waits.
    pub fn enqueue(&self, now: Micros) -> Enqueued {
        self.give_way(now);
        if self.owes.load(Relaxed) {
            // The slice has ended between the release and now.
            self.hand_over(now);
            self.wake();
        }
        self.unreserve();
        let is_new = self.ticket.load(Relaxed) == 0;
        if is_new {
            self.draw();
        }
        let since = now.saturating_sub(self.refused.swap(now, Relaxed));
        if is_new {
            self.refusals.store(1, Relaxed);
            self.interval.store(0, Relaxed);
        } else if since != 0 {
            // 0: the second try of the same attempt.
            self.refusals.store(self.refusals.load(Relaxed).saturating_add(1), Relaxed);
            self.interval.store(since, Relaxed);
        }
        if let Some(entry) = self.publish(now) {
            let interval = self.interval.load(Relaxed);
            entry.refused.store(now, Relaxed);
            entry.interval.store(interval, Relaxed);
            entry.refusals.store(self.refusals.load(Relaxed), Relaxed);
            // One that sleeps elsewhere is expected back after as long as the last time, or twice that.
            entry.due.store(now + AWAY + 2 * interval.min(RESCUE_LONGEST), SeqCst);
        }
        if is_new { Enqueued::Now } else { Enqueued::Before }
    }

    /// Draws a ticket.
    fn draw(&self) {
        let last = self.at().tickets.0.fetch_add(1, Relaxed);
        // 0 would be none, and u64::MAX comes after all.
        self.ticket.store(last.wrapping_add(1).max(1), Relaxed);
    }

    /// The seat's entry, on the board; claimed if it has none, or has lost it because it was late.
    fn publish(&self, now: Micros) -> Option<&Entry> {
        let board = self.at();
        let away = u64::from(self.id) << 8 | IS_AWAY;
        let index = self.entry.load(Relaxed) as usize;
        if index < ENTRIES && board.entry(index).state.load(SeqCst) >> 8 == u64::from(self.id) {
            board.queued.0.fetch_or(1 << index, SeqCst);
            return Some(board.entry(index));
        }
        for (index, Line(entry)) in (0_u32..).zip(&board.entries.0) {
            let state = entry.state.load(SeqCst);
            let is_dead = state == FREE || !is_ahead(entry.due.load(SeqCst), now);
            if is_dead && entry.state.compare_exchange(state, away, SeqCst, SeqCst).is_ok() {
                entry.ticket.store(self.ticket.load(Relaxed), Relaxed);
                entry.refusals.store(0, Relaxed);
                entry.since.store(now, Relaxed);
                entry.pid.store(self.pid, Relaxed);
                entry.due.store(now + AWAY, SeqCst);
                board.queued.0.fetch_or(1 << index, SeqCst);
                self.entry.store(index, Relaxed);
                return Some(entry);
            }
        }
        self.entry.store(NO_ENTRY, Relaxed);
        None
    }

    /// The seat has the flock.
    pub fn acquired(&self, now: Micros) {
        let turn = &self.at().turn.0;
        // Over long ago, and unlike any other: whoever has looked at the board before that, and is about to reserve the gate
        // for one that slept then, this seat above all, sees that somebody has had it since.
        let seen = turn.reservation.load(SeqCst);
        if self.refusals.load(Relaxed) >= RESCUE_REFUSALS && reserved_for(seen, now) == Some(self.id) {
            // It has come. What the gate did not lie idle for, others need not make up for.
            let idle = now.saturating_sub(turn.rescued.load(Relaxed)).min(RESCUE_LONGEST);
            turn.next_rescue.store(now + RESCUE_SHARE * idle, Relaxed);
        }
        if reserved_for(seen, now).is_none_or(|id| id == self.id) {
            let over = reservation(self.id, now.saturating_sub(HORIZON), CLAIMED);
            let _ = turn.reservation.compare_exchange(seen, over, SeqCst, SeqCst);
        }
        self.owes.store(false, Relaxed);
        let has_waited = self.ticket.swap(0, Relaxed) != 0;
        if self.overtakes.load(Relaxed) {
            return self.note_holder(now);
        }
        if turn.overtaker.load(Relaxed) != 0 {
            turn.overtaker.store(0, Relaxed); // killed, or about to be refused
        }
        if has_waited || !self.has_turn(now) {
            turn.owner.store(self.id, Relaxed);
            turn.kept.store(0, Relaxed);
            self.turn_ends.store(now + self.slice, Relaxed);
        }
        self.leave();
        self.note_holder(now);
    }

    /// Writes on the board who holds the gate.
    #[inline]
    pub fn note_holder(&self, now: Micros) {
        self.has_asked.store(true, Relaxed);
        self.at().holder.0.store(u64::from(self.pid) << 40 | (now / 1000) & ((1 << 40) - 1), Relaxed);
    }

    /// The flock will be unlocked now.
    #[inline]
    pub fn note_releasing(&self) {
        self.exclusive_over();
        self.at().holder.0.store(0, Relaxed);
    }

    /// The flock was unlocked while somebody waited: says who is next. [`Seat::wake`] then wakes it.
    pub fn choose_next(&self, now: Micros) {
        let board = self.at();
        let has_overtaken = self.stop_overtaking();
        board.turn.0.releases.fetch_add(1, SeqCst);
        self.released.store(now, Relaxed);
        if board.queued.0.load(Relaxed) & ANYBODY != 0 {
            board.queued.0.fetch_and(!ANYBODY, SeqCst);
            self.wakes_all.store(true, Relaxed);
        }
        if !has_overtaken && self.has_turn(now) && self.is_tight.load(Relaxed) {
            self.owes.store(true, Relaxed);
            board.turn.0.kept.store(self.turn_ends.load(Relaxed), Relaxed);
        } else {
            self.hand_over(now);
        }
    }

    fn hand_over(&self, now: Micros) {
        self.owes.store(false, Relaxed);
        let board = self.at();
        board.turn.0.kept.store(0, Relaxed);
        self.unreserve();
        let seen = board.turn.0.reservation.load(SeqCst);
        let next = match reserved_for(seen, now) {
            // It may have claimed that, and gone to sleep again since it was overtaken.
            Some(id) if seen & CLAIMED != 0 => board.waiters(now).find(|waiter| waiter.id == id),
            // It was woken, or will be.
            Some(_) => None,
            None => board.next(now).and_then(|(next, lease)| {
                let claimed = if next.is_asleep { 0 } else { CLAIMED };
                board.reserve(seen, reservation(next.id, now + lease, claimed), now).then_some(next)
            }),
        };
        if let Some(next) = next.filter(|next| next.is_asleep) {
            self.pending_wake.store(u32::try_from(next.entry).map_or(0, |entry| entry + 1), Relaxed);
        }
    }

    /// The connection has given up its last lock of a transaction.
    #[inline]
    pub fn transaction_over(&self, now: impl Fn() -> Micros) {
        let has_asked = self.has_asked.swap(false, Relaxed);
        self.is_writer.store(has_asked, Relaxed);
        self.stop_overtaking();
        let turn = &self.at().turn.0;
        if turn.exclusive.load(Relaxed) != 0 {
            turn.shared_releases.fetch_add(1, SeqCst);
            sys::futex_wake(&turn.shared_releases, 1);
        }
        if !has_asked && self.ticket.load(Relaxed) != 0 {
            self.give_up_turn(now());
        }
        self.wake();
    }

    /// It has waited for a lock that it could not get because of a writer, and then did not write itself.
    #[inline(never)]
    fn give_up_turn(&self, now: Micros) {
        self.leave();
        if self.unreserve() {
            self.hand_over(now);
        }
    }

    /// If the gate is reserved for this seat, it is no longer. Called when the seat was refused all the same: some do not
    /// look at the board. To be told once more that it is next would only use up its attempts.
    pub fn unreserve(&self) -> bool {
        let reservation = &self.at().turn.0.reservation;
        let old = reservation.load(SeqCst);
        // If it changed meanwhile, it is somebody else's.
        halves(old)[0] == self.id && reservation.compare_exchange(old, 0, SeqCst, SeqCst).is_ok()
    }

    /// The number that it waits with; 0: it does not.
    #[cfg(test)]
    pub fn ticket(&self) -> u64 {
        self.ticket.load(Relaxed)
    }

    /// Did its last transaction ask for the gate?
    pub fn is_writer(&self) -> bool {
        self.is_writer.load(Relaxed)
    }

    /// EXCLUSIVE is about to be asked for. What is returned is for [`Seat::wait_exclusive`].
    #[inline]
    pub fn wants_exclusive(&self) -> u32 {
        let turn = &self.at().turn.0;
        turn.exclusive.store(1, SeqCst);
        turn.shared_releases.load(SeqCst)
    }

    /// EXCLUSIVE was granted, or is given up.
    #[inline]
    pub fn exclusive_over(&self) {
        let exclusive = &self.at().turn.0.exclusive;
        if exclusive.load(Relaxed) != 0 {
            exclusive.store(0, SeqCst);
        }
    }

    /// Sleeps until a connection gives up SHARED, for at most `limit`.
    pub fn wait_exclusive(&self, limit: Micros, seen: u32) -> Waited {
        self.wait_word(&self.at().turn.0.shared_releases, limit, seen)
    }

    /// Sleeps until the gate is released, for at most `limit`; many can do that at once.
    pub fn wait_release(&self, limit: Micros, seen: u32) -> Waited {
        self.at().queued.0.fetch_or(ANYBODY, SeqCst);
        self.wait_word(&self.at().turn.0.releases, limit, seen)
    }

    fn wait_word(&self, word: &AtomicU32, limit: Micros, seen: u32) -> Waited {
        let (mut now, mut slept) = (sys::micros(), 0);
        while word.load(SeqCst) == seen && slept < limit {
            let pause = limit - slept;
            sys::futex_wait(word, seen, pause);
            slept += passed(&mut now, pause);
        }
        Waited { micros: slept, is_next: slept < limit }
    }

    /// Wakes whoever is next. Apart from [`Seat::choose_next`], since that one would run into the SHARED lock, or the
    /// processor, of a connection that is not yet through with its transaction.
    #[inline]
    pub fn wake(&self) {
        if self.pending_wake.load(Relaxed) != 0 || self.wakes_all.load(Relaxed) {
            self.wake_now();
        }
    }

    #[inline(never)]
    fn wake_now(&self) {
        if self.wakes_all.swap(false, Relaxed) {
            sys::futex_wake(&self.at().turn.0.releases, i32::MAX);
        }
        let index = self.pending_wake.swap(0, Relaxed);
        if index != 0 {
            let entry = self.at().entry(index as usize - 1);
            entry.word.fetch_add(1, SeqCst);
            sys::futex_wake(&entry.word, 1);
        }
    }

    /// Sleeps until it is this seat's turn, for at most `limit`. `seen`: [`Seat::release_count`], from before the refusal.
    /// `is_free` tries the flock and unlocks it again: some who hold it do not know of the board, and some die.
    pub fn sleep_until_next(&self, limit: Micros, seen: u32, is_free: impl Fn() -> bool) -> Waited {
        let board = self.at();
        let (mut now, mut slept) = (sys::micros(), 0);
        let (mut seen, mut polls, mut has_polled) = (seen, 0_u32, false);
        loop {
            if self.ticket.load(Relaxed) == 0 {
                self.draw();
            }
            let Some(entry) = self.publish(now) else {
                sys::sleep(limit.saturating_sub(slept));
                return Waited { micros: limit, is_next: false };
            };
            let ticket = self.ticket.load(Relaxed);
            let ahead =
                || board.waiters(now).filter(|other| other.is_asleep && other.ticket < ticket).count();
            let before = ahead();
            let pause = (POLL * (before as Micros + 1)).min(SLOWEST_POLL);
            entry.due.store(now + pause + GRACE, SeqCst);
            let word = entry.word.load(SeqCst);
            entry.state.store(u64::from(self.id) << 8 | IS_ASLEEP, SeqCst);

            let releases = self.release_count();
            let is_released = releases != seen;
            // Mostly the board says who has the flock, and trying it would only disturb. But who does not know of the board
            // says nothing there, and who was killed still stands on it.
            let may_probe_flock = board.holder().is_none() || (has_polled && polls % DISTRUST == 0);
            let reservation = board.turn.0.reservation.load(SeqCst);
            let is_next = match reserved_for(reservation, now) {
                Some(id) => id == self.id && self.claim(reservation),
                // Within the owner's slice the flock is free between its transactions.
                None => {
                    (is_released || has_polled)
                        // Counted again: whoever was ahead may have had the gate and released it since, and have seen
                        // nobody asleep.
                        && ahead() == 0
                        && !is_ahead(board.turn.0.kept.load(Relaxed), now + 1)
                        && may_probe_flock
                        && is_free()
                        && board.reserve(reservation, self::reservation(self.id, now + LEASE, CLAIMED), now)
                }
            };
            if is_next || slept >= limit {
                entry.refusals.store(0, Relaxed);
                self.refusals.store(0, Relaxed);
                entry.due.store(now + AWAY, SeqCst);
                entry.state.store(u64::from(self.id) << 8 | IS_AWAY, SeqCst);
                return Waited { micros: slept, is_next };
            }
            seen = releases;
            let pause = pause.min(limit - slept);
            sys::futex_wait(&entry.word, word, pause);
            let nap = passed(&mut now, pause);
            slept += nap;
            has_polled = nap >= pause;
            polls += u32::from(has_polled);
        }
    }

    /// Gives up waiting.
    pub fn leave(&self) {
        self.ticket.store(0, Relaxed);
        let index = self.entry.swap(NO_ENTRY, Relaxed) as usize;
        if index >= ENTRIES {
            return;
        }
        let entry = self.at().entry(index);
        let state = entry.state.load(SeqCst);
        if state >> 8 == u64::from(self.id) {
            self.at().free(index, state);
        }
    }
}

impl<B: AsRef<Board>> Drop for Seat<B> {
    /// In the child of a fork the entry is the parent's, who still waits in it.
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            return;
        }
        self.stop_overtaking();
        self.leave();
        self.wake();
    }
}

#[allow(clippy::cast_possible_truncation)] // 64
const NO_ENTRY: u32 = ENTRIES as u32;

#[allow(clippy::cast_possible_truncation)] // that is what it is for
fn low(now: Micros) -> u32 {
    now as u32
}

#[allow(clippy::cast_possible_truncation)] // of a number that was shifted by 32 bits, or whose upper half is not asked for
fn halves(word: u64) -> [u32; 2] {
    [(word >> 32) as u32, word as u32]
}

/// How long a sleep of at most `pause` has taken that began at `now`, which is brought up to date. A clock that was set back
/// meanwhile (a restored container's) does not tell; then the sleep counts as over, lest the wait last until it has
/// caught up.
fn passed(now: &mut Micros, pause: Micros) -> Micros {
    let before = std::mem::replace(now, sys::micros());
    now.checked_sub(before).unwrap_or(pause)
}

/// For `id`, until `end`; `claimed`: [`CLAIMED`] or 0.
fn reservation(id: u32, end: Micros, claimed: u64) -> u64 {
    u64::from(id) << 32 | u64::from(low(end)) & !CLAIMED | claimed
}

/// Whom this reservation keeps the gate for.
fn reserved_for(reservation: u64, now: Micros) -> Option<u32> {
    let [id, end] = halves(reservation);
    let left = end.wrapping_sub(low(now));
    (id != 0 && left != 0 && Micros::from(left) <= RESCUE_LONGEST).then_some(id)
}

/// True if `date` lies ahead, but not absurdly far.
fn is_ahead(date: Micros, now: Micros) -> bool {
    (now..=now + HORIZON).contains(&date)
}
