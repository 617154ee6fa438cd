//! The one place that orders the gate and the real locks.
//!
//! Every call of SQLite's that changes a lock comes through here, and takes the same path:
//!
//! ```text
//! state: what must happen first?   →   acquire the gate   →   real VFS   →   state: what now?   →   release the gate
//!          (Ask)                        (LOCK_NB)                               (no reason left?)
//! ```
//!
//! ## Invariants
//! - **Acquire gate → real. Release real → gate.** So "a write transaction holds its real lock ⇒ the flock is
//!   held" is true at every instant, also for an outsider's `flock kanban.db.lock cmd`. (Row L7w lends the gate
//!   while the real lock is RESERVED or PENDING: nothing is written to the database file at those levels.)
//! - **Never wait here**, but for a checkpoint under `kanbanlock_checkpoint=gate` (K1), when this file holds no
//!   lock that another could be waiting for. RESERVED is asked for with SHARED held, WRITE with a read mark
//!   held: waiting for the gate with those is a deadlock of two.
//! - After each call the gate is held exactly while the state has a reason for it.
//! - xUnlock never answers SQLITE_BUSY of our making; releasing the gate cannot fail.
//!
//! Uses: `state`, `gate`, `lock`, `stats`, `error`.

use std::cell::Cell;
use std::ffi::c_int;

use crate::error::rc;
use crate::gate::Gate;
use crate::lock::{Environment, LockLevel, Purpose, RealLocks, ShmRequest, ShmSlots};
use crate::state::{Ask, CheckpointPolicy, Reply, Row, State};
use crate::stats;

/// A WAL of more bytes than this is not checkpointed beside writers (policy `auto`): it would grow without end.
const LONG_WAL: u64 = 32 << 20;

/// The locks of one open database file. SQLite serialises the calls on a file, so cells are enough.
#[derive(Debug)]
pub struct Driver<G> {
    state: Cell<State>,
    policy: CheckpointPolicy,
    /// The wal-index's change counter when the read transaction began.
    snapshot: Cell<u32>,
    /// WRITE was won with a snapshot that is not the newest: SQLite will give it back at once.
    is_stale: Cell<bool>,
    gate: G,
}

impl<G: Gate> Driver<G> {
    /// A file just opened, holding nothing.
    pub fn new(policy: CheckpointPolicy, gate: G) -> Driver<G> {
        Driver::of(State::new(policy), policy, gate)
    }

    /// The same of a file that was opened read-only: row L13.
    pub fn new_read_only(gate: G) -> Driver<G> {
        Driver::of(State::new_read_only(), CheckpointPolicy::Free, gate)
    }

    fn of(state: State, policy: CheckpointPolicy, gate: G) -> Driver<G> {
        let (snapshot, is_stale) = (Cell::new(0), Cell::new(false));
        Driver { state: Cell::new(state), policy, snapshot, is_stale, gate }
    }

    /// The state now.
    pub fn state(&self) -> State {
        self.state.get()
    }

    /// The gate.
    pub fn gate(&self) -> &G {
        &self.gate
    }

    /// Row P1: a callback panicked.
    pub fn poison(&self) {
        self.state.set(self.state.get().poison());
    }

    /// `xLock`: rows L1–L8, L12, L13, M1.
    #[inline]
    pub fn x_lock(&self, real: &impl RealLocks, level: c_int, environment: &impl Environment) -> c_int {
        let Some(to) = LockLevel::from_raw(level) else {
            return real.x_lock(level); // X1
        };
        let purpose = if to == LockLevel::Exclusive { Purpose::Exclusive } else { Purpose::Write };
        if let Err(code) = self.admit(real, environment, self.state.get().ask_lock(to), purpose) {
            return code;
        }
        let before = self.state.get().level();
        if to == LockLevel::Exclusive {
            self.gate.exclusive_begin();
        }
        let is_shared = self.state.get().raises_to_exclusive(to) && environment.others_use_shm();
        let code = if is_shared { rc::BUSY } else { real.x_lock(level) }; // L12
        let is_refused = rc::primary(code) == rc::BUSY;
        match to {
            LockLevel::Exclusive => self.gate.exclusive_end(is_refused && before >= LockLevel::Reserved),
            LockLevel::Shared if is_refused && !self.state.get().is_read_only() => self.gate.shared_refused(),
            _ => {}
        }
        if is_refused {
            self.gate.answers_busy();
        }
        let (after, _) = self.state.get().lock_done(to, reply(code), || environment.shm_exists());
        self.settle(after);
        code
    }

    /// `xUnlock`: rows L9–L11.
    #[inline]
    pub fn x_unlock(&self, real: &impl RealLocks, level: c_int) -> c_int {
        let code = real.x_unlock(level);
        let Some(to) = LockLevel::from_raw(level) else {
            return code; // X1
        };
        let before = self.state.get();
        let (after, _) = before.unlock_done(to, reply(code), || real.lock_state());
        self.settle(after);
        // Not after a refused SHARED, which SQLite follows up with this call, too.
        if to == LockLevel::None && before.level() > LockLevel::None {
            self.gate.transaction_over();
        }
        code
    }

    /// `xShmLock`: rows S1–S6, K1–K3, M1 and the reset guard, G1–G4.
    #[inline]
    pub fn x_shm_lock(
        &self,
        real: &impl RealLocks,
        offset: c_int,
        count: c_int,
        flags: c_int,
        environment: &impl Environment,
    ) -> c_int {
        let Some(request) = ShmRequest::from_raw(offset, count, flags) else {
            return real.x_shm_lock(offset, count, flags); // X1
        };
        if request == ShmRequest::LockExclusive(ShmSlots::CKPT) && self.policy == CheckpointPolicy::Auto {
            self.gate_checkpoints(environment.wal_size() > LONG_WAL);
        }
        let ask = self.state.get().ask_shm(request);
        match self.admit(real, environment, ask, Purpose::Write) {
            // K3: it has waited long enough. Without the gate it cannot finish while others write, but it is correct.
            Err(rc::BUSY) if ask == Ask::AwaitGate && self.policy == CheckpointPolicy::Auto => {
                self.gate_checkpoints(false);
            }
            Err(code) => return code,
            Ok(()) => {}
        }
        let code = real.x_shm_lock(offset, count, flags);
        let before = self.state.get();
        let (after, row) = before.shm_done(request, reply(code));
        if code == rc::OK {
            self.watch_snapshot(request, environment);
        } else if rc::primary(code) == rc::BUSY {
            self.gate.answers_busy();
        }
        if matches!(row, Row::G2 | Row::G4) {
            // If this fails, CKPT stays ours until xShmUnmap: nobody checkpoints, and nothing is lost.
            let _ = real.unlock_ckpt();
        }
        self.settle(after);
        // Not after READ was held exclusively, to move a read mark before the transaction or to restart the WAL in it.
        if matches!(request, ShmRequest::Unlock(slots) if before.shares(slots & ShmSlots::READS)) {
            self.gate.transaction_over();
        }
        code
    }

    /// Policy `auto` is one of the two others, from one checkpoint to the next.
    fn gate_checkpoints(&self, gates_checkpoints: bool) {
        self.state.set(self.state.get().with_gated_checkpoints(gates_checkpoints));
    }

    /// "If another connection has written to the database file since the time the read transaction on this connection was
    /// started, then this write is disallowed" (`sqlite3WalBeginWriteTransaction`, wal.c): WRITE is won, and given back at
    /// once. SQLite then waits as if it had been refused, and wants the gate.
    #[inline]
    fn watch_snapshot(&self, request: ShmRequest, environment: &impl Environment) {
        match request {
            ShmRequest::LockShared(_) => self.snapshot.set(environment.wal_changes()),
            ShmRequest::LockExclusive(slots) if slots.intersects(ShmSlots::WRITE) => {
                self.is_stale.set(environment.wal_changes() != self.snapshot.get());
            }
            ShmRequest::Unlock(slots)
                if slots.intersects(ShmSlots::WRITE) && self.is_stale.replace(false) =>
            {
                self.gate.wanted_in_vain();
            }
            _ => {}
        }
    }

    /// `xShmUnmap`: row S7.
    pub fn x_shm_unmap(&self, real: &impl RealLocks, delete: c_int) -> c_int {
        let code = real.x_shm_unmap(delete);
        let (after, _) = self.state.get().unmap_done();
        self.settle(after);
        code
    }

    /// Everything that must be won before the call is forwarded; `Err` is the answer if it is not.
    #[inline(always)]
    fn admit(
        &self,
        real: &impl RealLocks,
        environment: &impl Environment,
        ask: Ask,
        purpose: Purpose,
    ) -> Result<(), c_int> {
        if ask == Ask::Forward { Ok(()) } else { self.win(real, environment, ask, purpose) }
    }

    #[inline(never)]
    fn win(
        &self,
        real: &impl RealLocks,
        environment: &impl Environment,
        ask: Ask,
        purpose: Purpose,
    ) -> Result<(), c_int> {
        let acquired = match ask {
            Ask::TakeGate => self.gate.try_acquire()?,
            Ask::AwaitGate => self.gate.await_acquire()?,
            Ask::Forward => return Ok(()),
            Ask::GuardReset => return self.guard_reset(real),
            Ask::Refuse => return Err(rc::IOERR_LOCK),
        };
        if !acquired {
            self.gate.answers_busy();
            environment.invalidate_place_check();
            return Err(rc::BUSY);
        }
        // Row M1: the gate is given back.
        environment.check_places(purpose).inspect_err(|_| self.settle(self.state.get()))
    }

    /// Row G1. A checkpointer holds CKPT from before it reads the wal-index header until it is done, so a
    /// restart that holds CKPT cannot fall into its window. BUSY is harmless: `walRestartLog` goes on appending.
    fn guard_reset(&self, real: &impl RealLocks) -> Result<(), c_int> {
        match real.lock_ckpt() {
            rc::OK => Ok(()),
            code if rc::primary(code) == rc::BUSY => {
                stats::RESETS_DEFERRED.increment();
                Err(rc::BUSY)
            }
            code => Err(code),
        }
    }

    /// The last step of every call: the real lock is as `after` says, so now the gate can follow.
    #[inline]
    fn settle(&self, after: State) {
        self.state.set(after);
        if !after.wants_gate() {
            self.gate.release();
        }
        debug_assert!(
            after.is_poisoned() || self.gate.is_held() == after.wants_gate(),
            "gate held ⇔ there is a reason: {after:?}"
        );
    }
}

#[inline]
fn reply(code: c_int) -> Reply {
    match rc::primary(code) {
        rc::OK => Reply::Ok,
        rc::BUSY => Reply::Busy,
        _ => Reply::Error,
    }
}
