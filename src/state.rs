//! The state machine: which SQLite locks one open database file holds, and so whether it must hold the gate.
//!
//! The *gate* is the `flock(LOCK_EX)` on `<db>.lock`. It is held **exactly while there is a reason to hold
//! it**, and the reasons are a function of the state, so there is no "gate held" bit that a forgotten path
//! could leave wrong ([`State::wants_gate`]):
//!
//! ```text
//! reason 1   level >= RESERVED      (unless the gate is lent, rows L2w, L7w, or the file opened read-only, row L13)
//! reason 2   WRITE, asked for while this file held a READ slot or CKPT: a write transaction, a checkpoint
//! reason 3   CKPT, when the checkpoint policy is `gate`
//! ```
//!
//! WRITE asked for with neither READ nor CKPT is a *reader* that rebuilds the wal-index
//! (`walIndexReadHdr` in wal.c); it is not gated, nor is RECOVER: a plain SELECT must not wait for a writer.
//!
//! The machine is pure. A call of SQLite's is handled in two steps, with the real VFS's answer in between:
//! `ask_*` says what must happen before the call is forwarded, `*_done` gives the state after it. Every
//! `*_done` also names the row of the table that it followed; tests hold each row against a second copy of
//! the table (`src/tests/transitions.rs`).
//!
//! Row L2w: in WAL mode RESERVED is asked for by `sqlite3PagerSetJournalMode` alone, to delete an old rollback journal,
//! and `pager_unlock` may leave it behind for the life of the connection. It protects no write of the database file, so
//! the gate is lent, as in L7w, until EXCLUSIVE is asked for.
//!
//! Row L12: SQLite asks for EXCLUSIVE in WAL mode to delete the WAL, at the last close and when it leaves WAL mode. A
//! process that lost its SHARED lock by a stray close() may still use that WAL; its mark on the `-shm`, the DMS byte,
//! says so. SQLite 3.51 asks for the mark itself (`unixIsSharingShmNode`), older ones do not.
//!
//! Row L13: a database opened read-only is not written through this file, and its folder need not have a lock file. But
//! SQLite opens its `-wal` for writing all the same, and a checkpoint (FULL, RESTART, TRUNCATE) that finds everything
//! copied restarts or truncates it: that takes WRITE with CKPT held, hence the gate (row S2).
//!
//! Row M1: a write into a file that was deleted, renamed or replaced would be acknowledged and lost (`place.rs`).
//!
//! | row | before | call | gate | real result | after |
//! |---|---|---|---|---|---|
//! | L1 | NONE | xLock SHARED | – | any | gate unchanged |
//! | L2 | SHARED | xLock RESERVED | try; refused → BUSY, real not called | OK | RESERVED, held |
//! | L2w | SHARED, READ slot held | xLock RESERVED | – | any | if OK, RESERVED, lent |
//! | L3 | SHARED | xLock RESERVED | taken | not OK | SHARED, release, forward rc |
//! | L4 | SHARED | xLock EXCLUSIVE | try; refused → BUSY, real not called | OK | EXCLUSIVE, held |
//! | L5 | SHARED | xLock EXCLUSIVE | taken | not OK | SHARED, release |
//! | L6 | RESERVED, PENDING | xLock EXCLUSIVE | already | OK | EXCLUSIVE |
//! | L7 | RESERVED, PENDING | xLock EXCLUSIVE | already | not OK | as before, stay held |
//! | L7w | RESERVED, PENDING; `-shm` exists | xLock EXCLUSIVE | already | BUSY | lend: release; retake before the next xLock EXCLUSIVE, refused → BUSY |
//! | L8 | ≥ requested | xLock same or lower | – | any | no change |
//! | L9 | any | xUnlock SHARED | – | OK | at most SHARED; release unless a shm reason remains |
//! | L10 | any | xUnlock NONE | – | OK | NONE; release unless a shm reason remains |
//! | L11 | any | xUnlock | – | not OK | the level that `SQLITE_FCNTL_LOCKSTATE` gives, if lower; unknown → as before, stay held; lent → SHARED |
//! | L12 | SHARED, RESERVED, PENDING; `-shm` mapped | xLock EXCLUSIVE | as in L4, L6 | others use the `-shm`: BUSY, real not called | as in L5, L7, L7w |
//! | L13 | opened read-only; SHARED, RESERVED, PENDING | xLock RESERVED, EXCLUSIVE | – | any | the level if OK, no gate |
//! | S1 | any | shm LOCK·SHARED | – | any | `shared` grows if OK; release if no reason is left |
//! | S2 | free | shm LOCK·EXCL with WRITE, own READ or CKPT held | try; refused → BUSY, real not called | OK | held |
//! | S3 | free | same | taken | not OK | release |
//! | S4 | held | same | already | any | stay held |
//! | S5 | any | shm LOCK·EXCL, anything else | – | any | `excl` grows if OK |
//! | S6 | any | shm UNLOCK | – | OK | cleared; release if no reason is left (not OK: as before) |
//! | S7 | any | xShmUnmap | – | any | `excl`, `shared` empty; release if level < RESERVED |
//! | K1 | free | shm LOCK·EXCL of CKPT alone, policy `gate` | await, bounded (a slot held: try); refused → BUSY, real not called | OK | held |
//! | K2 | free | same | taken | not OK | release |
//! | K3 | free | shm LOCK·EXCL of CKPT alone, policy `auto` | WAL over 32 MB: as K1, but refused → as S5; else as S5 | any | as K1, K2 or S5 |
//! | G1 | WRITE, no CKPT | shm LOCK·EXCL of READ(1)…READ(4) | real CKPT first; refused → BUSY, not forwarded | – | as before |
//! | G2 | same | same | CKPT won | not OK | give CKPT back |
//! | G3 | same | same | CKPT won | OK | `excl` grows, guarded |
//! | G4 | guarded | shm UNLOCK of READ(1)…READ(4) | – | OK | cleared, give CKPT back |
//! | M1 | any | what needs the gate | taken; a file is not in its place → release, error | not called | as before |
//! | P1 | poisoned | an upgrade that needs the gate, or a reset | – | not called | as before; SQLITE_IOERR_LOCK |
//! | X1 | any | arguments outside the protocol | – | any | as before |
//!
//! C1 (xClose: the real file first, then the lock file) is `file.rs`'s, since the state dies with it.
//!
//! Uses: `lock`.

use crate::lock::{LockLevel, ShmRequest, ShmSlots};

/// When a checkpoint takes the gate. URI parameter `kanbanlock_checkpoint`.
///
/// In WAL mode a checkpoint copies finished transactions into the database file and excludes other
/// checkpoints by SQLite's own CKPT lock, so it needs no gate to be correct. (A checkpoint of mode FULL,
/// RESTART or TRUNCATE also takes WRITE, and with it the gate, whatever the policy.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckpointPolicy {
    /// `auto` (default): a checkpoint takes the gate, after a bounded wait, when the WAL has grown over 32 MB; if it is
    /// not to be had, it goes on without. Keeps the WAL of a saturated database bounded.
    #[default]
    Auto,
    /// `free`: passive checkpoints do not take the gate and run beside writers.
    Free,
    /// `gate`: every checkpoint takes the gate, after a bounded wait. Keeps a saturated WAL small, at
    /// the price of write throughput; while an outside `flock <db>.lock` is held nothing is copied into
    /// the database file either.
    Gate,
}

/// What the driver must do before it forwards a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Forward at once.
    Forward,
    /// Take the gate first (LOCK_NB). Refused: answer SQLITE_BUSY, do not forward.
    TakeGate,
    /// Take the gate first, waiting a bounded time: this file holds no lock that others wait for.
    AwaitGate,
    /// The reset guard: win CKPT on the real file first. Refused: answer SQLITE_BUSY, do not forward.
    GuardReset,
    /// Poisoned: answer SQLITE_IOERR_LOCK, do not forward.
    Refuse,
}

/// The real VFS's answer, as far as the machine cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// SQLITE_OK
    Ok,
    /// SQLITE_BUSY, in any extended form.
    Busy,
    /// Any other result code.
    Error,
}

/// A row of the table above.
#[allow(missing_docs)] // the table is the documentation
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Row {
    L1,
    L2,
    L2w,
    L3,
    L4,
    L5,
    L6,
    L7,
    L7w,
    L8,
    L9,
    L10,
    L11,
    L13,
    S1,
    S2,
    S3,
    S4,
    S5,
    S6,
    S7,
    K1,
    K2,
    G2,
    G3,
    G4,
    X1,
}

/// The locks of one open database file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    /// Reason 3: the checkpoint policy is `gate`, or `auto` for a long WAL (row K3).
    gates_checkpoints: bool,
    /// Row L13: the database was opened read-only.
    read_only: bool,
    level: LockLevel,
    excl: ShmSlots,
    shared: ShmSlots,
    /// The part of `excl` that is a reason to hold the gate (reasons 2 and 3).
    gated: ShmSlots,
    /// Rows L2w, L7w: level is RESERVED or PENDING, but the gate is lent until the next xLock EXCLUSIVE.
    lent: bool,
    /// Rows G1–G4: the reset guard holds CKPT on the real file, unknown to SQLite.
    guarded: bool,
    /// Row P1: a callback panicked; what this state says may be wrong, so nothing new is granted.
    poisoned: bool,
}

impl State {
    /// A file just opened.
    pub fn new(policy: CheckpointPolicy) -> State {
        State { gates_checkpoints: policy == CheckpointPolicy::Gate, ..State::default() }
    }

    /// A file just opened read-only. None of its checkpoints copies anything, so none takes the gate for CKPT.
    pub fn new_read_only() -> State {
        State { read_only: true, ..State::default() }
    }

    /// Row L13.
    #[inline]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// True while there is a reason to hold the gate. The driver makes it so after each call.
    #[inline]
    pub fn wants_gate(&self) -> bool {
        (self.level >= LockLevel::Reserved && !self.lent && !self.read_only) || !self.gated.is_empty()
    }

    /// Row K3: what `auto` means for the next checkpoint.
    #[must_use]
    pub fn with_gated_checkpoints(self, gates_checkpoints: bool) -> State {
        State { gates_checkpoints, ..self }
    }

    /// True if this file holds one of `slots` shared: if a READ slot, it is in a read transaction.
    #[inline]
    pub fn shares(&self, slots: ShmSlots) -> bool {
        self.shared.intersects(slots)
    }

    /// The level that SQLite holds through this file.
    pub fn level(&self) -> LockLevel {
        self.level
    }

    /// True while the reset guard holds CKPT on the real file (rows G3, G4).
    #[cfg(test)]
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// True after [`State::poison`].
    pub fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Row P1: from now on every call that needs the gate is refused.
    #[must_use]
    pub fn poison(self) -> State {
        State { poisoned: true, ..self }
    }

    /// Before `xLock(to)`.
    #[inline]
    pub fn ask_lock(&self, to: LockLevel) -> Ask {
        match self.is_upgrade(to) && !self.read_only {
            true if self.poisoned => Ask::Refuse,
            true if !self.reserves_in_wal_mode(to) => self.ask_gate(),
            _ => Ask::Forward,
        }
    }

    /// After `xLock(to)` was forwarded. `shm_exists` is called only where row L7 must be told from L7w.
    #[inline]
    pub fn lock_done(self, to: LockLevel, reply: Reply, shm_exists: impl Fn() -> bool) -> (State, Row) {
        use LockLevel::{Exclusive, None, Pending, Reserved, Shared};
        let ok = reply == Reply::Ok;
        let (after, row) = match (self.level, to) {
            (before, to) if before >= to => (self, Row::L8),
            _ if self.read_only && self.is_upgrade(to) => {
                (State { level: if ok { to } else { self.level }, ..self }, Row::L13)
            }
            (None, Shared) if ok => (State { level: Shared, ..self }, Row::L1),
            (None, Shared) => (self, Row::L1),
            (Shared, Reserved) if self.reserves_in_wal_mode(to) && ok => {
                (State { level: Reserved, lent: true, ..self }, Row::L2w)
            }
            (Shared, Reserved) if self.reserves_in_wal_mode(to) => (self, Row::L2w),
            (Shared, Reserved) if ok => (State { level: Reserved, ..self }, Row::L2),
            (Shared, Reserved) => (self, Row::L3),
            (Shared, Exclusive) if ok => (State { level: Exclusive, ..self }, Row::L4),
            (Shared, Exclusive) => (self, Row::L5),
            (Reserved | Pending, Exclusive) if ok => {
                (State { level: Exclusive, lent: false, ..self }, Row::L6)
            }
            (Reserved | Pending, Exclusive) if reply == Reply::Busy && shm_exists() => {
                (State { lent: true, ..self }, Row::L7w)
            }
            (Reserved | Pending, Exclusive) => (State { lent: false, ..self }, Row::L7),
            _ => (self, Row::X1),
        };
        after.check();
        (after, row)
    }

    /// After `xUnlock(to)` was forwarded. `lock_state` is called only after an error (row L11).
    #[inline]
    pub fn unlock_done(
        self,
        to: LockLevel,
        reply: Reply,
        lock_state: impl FnOnce() -> Option<LockLevel>,
    ) -> (State, Row) {
        let (level, row) = match (to, reply) {
            (LockLevel::Reserved | LockLevel::Pending | LockLevel::Exclusive, _) => (self.level, Row::X1),
            (LockLevel::Shared, Reply::Ok) => (self.level.min(to), Row::L9),
            (LockLevel::None, Reply::Ok) => (to, Row::L10),
            // Never above the level before: an older os_unix tells of the PENDING that a refused EXCLUSIVE (L5) has
            // left, and the gate was released then. Unknown: the gate stays if it is held; if it is lent, whatever
            // comes next must ask for it, as from SHARED.
            (_, Reply::Busy | Reply::Error) => {
                let unknown = if self.lent { LockLevel::Shared } else { self.level };
                (lock_state().unwrap_or(unknown).min(self.level), Row::L11)
            }
        };
        let lent = self.lent && matches!(level, LockLevel::Reserved | LockLevel::Pending);
        let after = State { level, lent, ..self };
        after.check();
        (after, row)
    }

    /// Before `xShmLock(request)`.
    #[inline]
    pub fn ask_shm(&self, request: ShmRequest) -> Ask {
        let ShmRequest::LockExclusive(slots) = request else {
            return Ask::Forward;
        };
        match self.gated_part(slots) {
            ShmSlots::EMPTY if self.is_unguarded_reset(slots) && self.poisoned => Ask::Refuse,
            ShmSlots::EMPTY if self.is_unguarded_reset(slots) => Ask::GuardReset,
            ShmSlots::EMPTY => Ask::Forward,
            // `sqlite3_snapshot_recover` asks for CKPT with a READ slot held: then nothing may wait.
            ShmSlots::CKPT if self.ask_gate() == Ask::TakeGate && self.holds_no_slot() => Ask::AwaitGate,
            _ => self.ask_gate(),
        }
    }

    /// After `xShmLock(request)` was forwarded (for [`Ask::GuardReset`]: with CKPT won).
    #[inline]
    pub fn shm_done(self, request: ShmRequest, reply: Reply) -> (State, Row) {
        let ok = reply == Reply::Ok;
        let (after, row) = match request {
            ShmRequest::LockShared(slots) if ok => {
                // os_unix says BUSY to a slot that this file holds exclusively. A VFS that grants it has the last
                // word: the slot is shared now.
                let (excl, gated) = (self.excl.without(slots), self.gated.without(slots));
                (State { shared: self.shared | slots, excl, gated, ..self }, Row::S1)
            }
            ShmRequest::LockShared(_) => (self, Row::S1),
            ShmRequest::LockExclusive(slots) => self.lock_exclusive_done(slots, ok),
            ShmRequest::Unlock(_) if !ok => (self, Row::S6),
            ShmRequest::Unlock(slots) => {
                let after = State {
                    excl: self.excl.without(slots),
                    shared: self.shared.without(slots),
                    gated: self.gated.without(slots),
                    ..self
                };
                if self.guarded && slots.contains(ShmSlots::READS_1_TO_4) {
                    (State { guarded: false, ..after }, Row::G4)
                } else {
                    (after, Row::S6)
                }
            }
        };
        after.check();
        (after, row)
    }

    /// After `xShmUnmap`, whatever it answered: os_unix has dropped every slot.
    pub fn unmap_done(self) -> (State, Row) {
        let none = ShmSlots::EMPTY;
        let after = State { excl: none, shared: none, gated: none, guarded: false, ..self };
        after.check();
        (after, Row::S7)
    }

    fn lock_exclusive_done(self, slots: ShmSlots, ok: bool) -> (State, Row) {
        let gated = self.gated_part(slots);
        let guard = self.is_unguarded_reset(slots);
        let row = match (gated, self.wants_gate(), ok) {
            (ShmSlots::EMPTY, _, true) if guard => Row::G3,
            (ShmSlots::EMPTY, _, false) if guard => Row::G2,
            (ShmSlots::EMPTY, _, _) => Row::S5,
            (_, true, _) => Row::S4,
            (ShmSlots::CKPT, false, true) => Row::K1,
            (ShmSlots::CKPT, false, false) => Row::K2,
            (_, false, true) => Row::S2,
            (_, false, false) => Row::S3,
        };
        if !ok {
            return (self, row);
        }
        let after = State {
            excl: self.excl | slots,
            shared: self.shared.without(slots),
            gated: self.gated | gated,
            guarded: self.guarded || guard,
            ..self
        };
        (after, row)
    }

    /// True for the three upgrades of SQLite's locking protocol that lead to a write.
    fn is_upgrade(&self, to: LockLevel) -> bool {
        use LockLevel::{Exclusive, Pending, Reserved, Shared};
        matches!((self.level, to), (Shared, Reserved) | (Shared | Reserved | Pending, Exclusive))
    }

    /// Row L2w.
    fn reserves_in_wal_mode(&self, to: LockLevel) -> bool {
        to == LockLevel::Reserved && self.shared.intersects(ShmSlots::READS)
    }

    /// Rows L4–L7, L12.
    #[inline]
    pub fn raises_to_exclusive(&self, to: LockLevel) -> bool {
        to == LockLevel::Exclusive && self.is_upgrade(to)
    }

    fn ask_gate(&self) -> Ask {
        match (self.poisoned, self.wants_gate()) {
            (true, _) => Ask::Refuse,
            (false, true) => Ask::Forward,
            (false, false) => Ask::TakeGate,
        }
    }

    fn holds_no_slot(&self) -> bool {
        (self.excl | self.shared).is_empty()
    }

    /// Which of `slots`, asked for exclusively now, would be a reason to hold the gate.
    fn gated_part(&self, slots: ShmSlots) -> ShmSlots {
        let in_transaction = self.shared.intersects(ShmSlots::READS) || self.excl.intersects(ShmSlots::CKPT);
        if slots.contains(ShmSlots::WRITE) && in_transaction {
            ShmSlots::WRITE
        } else if slots == ShmSlots::CKPT && self.gates_checkpoints {
            ShmSlots::CKPT
        } else {
            ShmSlots::EMPTY
        }
    }

    /// True if this request is `walRestartLog`'s: a writer, not a checkpointer, is about to restart the WAL.
    fn is_unguarded_reset(&self, slots: ShmSlots) -> bool {
        slots == ShmSlots::READS_1_TO_4
            && self.excl.contains(ShmSlots::WRITE)
            && !self.excl.contains(ShmSlots::CKPT)
            && !self.guarded
    }

    /// The invariants, checked after each transition in debug builds.
    fn check(&self) {
        debug_assert!(self.excl.contains(self.gated), "S2, K1: a gated slot is held: {self:?}");
        debug_assert!(!self.excl.intersects(self.shared), "S1, S5: excl and shared are disjoint: {self:?}");
        debug_assert!(
            !self.lent || matches!(self.level, LockLevel::Reserved | LockLevel::Pending),
            "L2w, L7w: only RESERVED and PENDING lend the gate: {self:?}"
        );
    }
}
