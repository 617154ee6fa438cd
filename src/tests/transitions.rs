//! Level 2: the state machine against its table, written a second time as data.
//!
//! ## Covers
//! The table in the header of `state.rs` is [`TABLE`]: a [`Rule`] for each row, two for some. It speaks of a
//! [`File`], a plain account of one file that is kept by replaying the history of calls: 8 slots and how each
//! was won, a level, whether the gate is held. Nothing of it is computed as `state.rs` computes it.
//!
//! From a new file, for both checkpoint policies and opened read-only, every state is visited that calls of SQLite's can
//! lead to ([`leads_on`]), poisoned or not. In each, **every** call is made: xLock and xUnlock of all 5 levels,
//! LockShared of each slot, LockExclusive and Unlock of each range of slots, xShmUnmap; and each is answered in **every**
//! way: OK, BUSY, an error; `-shm` there or not; `SQLITE_FCNTL_LOCKSTATE` unknown or any level; the reset guard won or
//! refused. For each of these:
//!
//! - exactly one row of the table fits, and the machine followed that row, asked what the row says beforehand,
//!   and has its after-state;
//! - `wants_gate()` is what the row says of the gate, and what the reasons say, counted anew from the [`File`];
//! - states and accounts correspond one to one: the fields of `State` that no method shows (`excl`, `shared`,
//!   `gated`, `lent`) are compared too, since one forgotten slot pairs one `State` with two accounts.
//!
//! Each row must be met. Deliberately wrong tables ([`wrong_tables_are_found_out`]) must not pass. It is 20,000
//! states and 6 million transitions, some seconds in a debug build.
//!
//! ## Does not cover
//! Refusals by the gate: the machine is not called then (`simulation.rs` checks that the driver does not).
//! States that need calls which SQLite does not make ([`leads_on`] says which it does). Interleavings: one file
//! only here; `model.rs` has several.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ffi::c_int;
use std::fmt;

use crate::lock::{LockLevel, ShmRequest};
use crate::state::{Ask, CheckpointPolicy, Reply, Row, State};
use crate::tests::unix_locks::{
    CKPT, LOCK_EXCLUSIVE, LOCK_SHARED, READS, READS_1_TO_4, UNLOCK_EXCLUSIVE, WRITE, mask,
};

// The account.

const NONE: u8 = 0;
const SHARED: u8 = 1;
const RESERVED: u8 = 2;
const PENDING: u8 = 3;
const EXCLUSIVE: u8 = 4;

/// How a wal-index slot is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Slot {
    Free,
    Shared,
    Exclusive,
    /// Exclusive, and won as a write transaction, a checkpoint: a reason to hold the gate.
    Gated,
}

/// One open database file, as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct File {
    /// `kanbanlock_checkpoint=gate`
    gates_checkpoints: bool,
    read_only: bool,
    level: u8,
    slots: [Slot; 8],
    /// Is the gate held?
    held: bool,
    /// Row L7w.
    lent: bool,
    /// Rows G3, G4.
    guarded: bool,
    poisoned: bool,
}

impl File {
    fn new(policy: CheckpointPolicy) -> File {
        File {
            gates_checkpoints: policy == CheckpointPolicy::Gate,
            read_only: false,
            level: NONE,
            slots: [Slot::Free; 8],
            held: false,
            lent: false,
            guarded: false,
            poisoned: false,
        }
    }

    /// The reasons to hold the gate: DESIGN §5, "Gate held ⇔ the set of reasons is non-empty".
    fn has_reason(&self) -> bool {
        let has_level = self.level >= RESERVED && !self.lent && !self.read_only;
        has_level || self.slots.contains(&Slot::Gated)
    }

    fn holds(&self, slots: u8, how: &[Slot]) -> bool {
        each(slots).any(|slot| how.contains(&self.slots[slot]))
    }

    fn with_level(self, level: u8) -> File {
        File { level, ..self }
    }

    fn with_slots(self, slots: u8, how: Slot) -> File {
        let mut file = self;
        each(slots).for_each(|slot| file.slots[slot] = how);
        file
    }

    /// LockExclusive won: what was gated before stays so, `gated` is so now.
    fn with_exclusive(self, slots: u8, gated: u8) -> File {
        let before = each(slots).filter(|&slot| self.slots[slot] == Slot::Gated);
        let gated = before.fold(gated, |gated, slot| gated | 1 << slot);
        self.with_slots(slots & !gated, Slot::Exclusive).with_slots(gated, Slot::Gated)
    }
}

fn each(slots: u8) -> impl Iterator<Item = usize> {
    (0..8).filter(move |slot| slots & (1 << slot) != 0)
}

// Calls and answers.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Lock(u8),
    Unlock(u8),
    ShmLockShared(u8),
    ShmLockExclusive(u8),
    ShmUnlock(u8),
    ShmUnmap,
}

use Call::{Lock, ShmLockExclusive, ShmLockShared, ShmUnlock, ShmUnmap, Unlock};

/// What the world answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The real VFS was called, and said so.
    Real(Reply),
    /// It was called, said so, and `shm_exists` is as given.
    RealWithShm(Reply, bool),
    /// It was called and failed; `SQLITE_FCNTL_LOCKSTATE` says so.
    RealWithLockState(Reply, Option<LockLevel>),
    /// It must not be called: the file is poisoned, or the reset guard was refused.
    NotCalled,
}

impl Answer {
    fn reply(self) -> Option<Reply> {
        match self {
            Answer::Real(reply) | Answer::RealWithShm(reply, _) | Answer::RealWithLockState(reply, _) => {
                Some(reply)
            }
            Answer::NotCalled => None,
        }
    }

    fn is_ok(self) -> bool {
        self.reply() == Some(Reply::Ok)
    }
}

/// Every call, and whether the exploration goes on from its result.
fn calls() -> Vec<Call> {
    let levels = || NONE..=EXCLUSIVE;
    let ranges = || {
        let all = (0..8).flat_map(|offset| (1..=8 - offset).map(move |count| (offset, count)));
        all.map(|(offset, count)| mask(offset, count).expect("a range"))
    };
    let slots = || (0..8).map(|slot| 1 << slot);
    levels()
        .map(Lock)
        .chain(levels().map(Unlock))
        .chain(slots().map(ShmLockShared))
        .chain(ranges().map(ShmLockExclusive))
        .chain(ranges().map(ShmUnlock))
        .chain([ShmUnmap])
        .collect()
}

/// True for the calls that SQLite makes (each `walLock…` in wal.c of 3.51), with READ(1) in the place of any of
/// READ(1) … READ(4), and locks taken as SQLite could: shared READ(0) or READ(1), not both at a time.
///
/// Only such calls lead on to further states; all others are tried in each state, and their result compared.
fn leads_on(file: &File, call: Call) -> bool {
    const RECOVER: u8 = 1 << 2;
    const READ_0: u8 = 1 << 3;
    const READ_1: u8 = 1 << 4;
    match call {
        Lock(_) | Unlock(_) | ShmUnmap => true,
        // walTryBeginRead, and its probes of others; sqlite3WalSnapshotCheck.
        ShmLockShared(slots) => {
            matches!(slots, READ_0 | READ_1 | CKPT | RECOVER | WRITE)
                && !file.holds(READS | RECOVER | WRITE, &[Slot::Shared])
        }
        // Writers; checkpoints; recovery (the wal-index's; with CKPT held already); the read marks; the restart.
        ShmLockExclusive(slots) => {
            matches!(slots, WRITE | CKPT | RECOVER | READ_0 | READ_1 | READS_1_TO_4)
                || slots == CKPT | RECOVER
        }
        ShmUnlock(slots) => {
            matches!(slots, WRITE | CKPT | RECOVER | READ_0 | READ_1 | READS_1_TO_4)
                || slots == CKPT | RECOVER
        }
    }
}

// The table.

/// What must be had before the call is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// Nothing: "–".
    Nothing,
    /// The gate: "try", which asks for nothing if it is held "already".
    TryGate,
    /// The gate, after a bounded wait.
    AwaitGate,
    /// CKPT on the real file.
    Guard,
    /// It is not forwarded.
    Refuse,
}

/// What becomes of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    /// "unchanged"
    Same,
    /// "held", "stay held"
    Held,
    /// "release": it was free before the call, and is so again.
    Released,
    /// "release unless a reason remains"
    UnlessReason,
}

/// A row of the table.
#[derive(Clone, Copy)]
struct Rule {
    id: &'static str,
    before: fn(&File) -> bool,
    call: fn(&File, Call) -> bool,
    first: First,
    answer: fn(Answer) -> bool,
    after: fn(File, Call, Answer) -> File,
    gate: Gate,
}

#[rustfmt::skip]
const TABLE: [Rule; 34] = [
    Rule { id: "L1",  before: |f| f.level == NONE,
           call: |_, c| c == Lock(SHARED), first: First::Nothing,
           answer: any, after: |f, _, a| if a.is_ok() { f.with_level(SHARED) } else { f }, gate: Gate::Same },
    Rule { id: "L2",  before: |f| is_writable(f) && f.level == SHARED && !reads_wal(f),
           call: |_, c| c == Lock(RESERVED), first: First::TryGate,
           answer: ok, after: |f, _, _| f.with_level(RESERVED), gate: Gate::Held },
    Rule { id: "L2w", before: |f| is_writable(f) && f.level == SHARED && reads_wal(f),
           call: |_, c| c == Lock(RESERVED), first: First::Nothing,
           answer: ok, after: |f, _, _| File { lent: true, ..f.with_level(RESERVED) }, gate: Gate::Same },
    Rule { id: "L2w", before: |f| is_writable(f) && f.level == SHARED && reads_wal(f),
           call: |_, c| c == Lock(RESERVED), first: First::Nothing,
           answer: not_ok, after: same, gate: Gate::Same },
    Rule { id: "L3",  before: |f| is_writable(f) && f.level == SHARED && !reads_wal(f),
           call: |_, c| c == Lock(RESERVED), first: First::TryGate,
           answer: not_ok, after: same, gate: Gate::UnlessReason },
    Rule { id: "L4",  before: |f| is_writable(f) && f.level == SHARED,
           call: |_, c| c == Lock(EXCLUSIVE), first: First::TryGate,
           answer: ok, after: |f, _, _| f.with_level(EXCLUSIVE), gate: Gate::Held },
    Rule { id: "L5",  before: |f| is_writable(f) && f.level == SHARED,
           call: |_, c| c == Lock(EXCLUSIVE), first: First::TryGate,
           answer: not_ok, after: same, gate: Gate::UnlessReason },
    Rule { id: "L6",  before: |f| is_writable(f) && is_between(f),
           call: |_, c| c == Lock(EXCLUSIVE), first: First::TryGate,
           answer: ok, after: |f, _, _| File { lent: false, ..f.with_level(EXCLUSIVE) }, gate: Gate::Held },
    Rule { id: "L7",  before: |f| is_writable(f) && is_between(f),
           call: |_, c| c == Lock(EXCLUSIVE), first: First::TryGate,
           answer: |a| not_ok(a) && !busy_with_shm(a), after: |f, _, _| File { lent: false, ..f }, gate: Gate::Held },
    Rule { id: "L7w", before: |f| is_writable(f) && is_between(f),
           call: |_, c| c == Lock(EXCLUSIVE), first: First::TryGate,
           answer: busy_with_shm, after: |f, _, _| File { lent: true, ..f }, gate: Gate::UnlessReason },
    Rule { id: "L8",  before: always,
           call: |f, c| matches!(c, Lock(to) if to <= f.level), first: First::Nothing,
           answer: any, after: same, gate: Gate::Same },
    Rule { id: "L9",  before: always,
           call: |_, c| c == Unlock(SHARED), first: First::Nothing,
           answer: ok, after: |f, _, _| File { lent: false, ..f.with_level(f.level.min(SHARED)) }, gate: Gate::UnlessReason },
    Rule { id: "L10", before: always,
           call: |_, c| c == Unlock(NONE), first: First::Nothing,
           answer: ok, after: |f, _, _| File { lent: false, ..f.with_level(NONE) }, gate: Gate::UnlessReason },
    Rule { id: "L11", before: always,
           call: |_, c| matches!(c, Unlock(NONE | SHARED)), first: First::Nothing,
           answer: not_ok, after: |f, _, a| as_lock_state_says(f, a), gate: Gate::UnlessReason },
    Rule { id: "L13", before: |f| f.read_only,
           call: is_upgrade, first: First::Nothing,
           answer: any, after: |f, c, a| if a.is_ok() { f.with_level(locked(c)) } else { f }, gate: Gate::Same },
    Rule { id: "S1",  before: always,
           call: |_, c| matches!(c, ShmLockShared(_)), first: First::Nothing,
           answer: any, after: shared, gate: Gate::UnlessReason },
    Rule { id: "S2",  before: |f| is_sane(f) && !f.held,
           call: is_write, first: First::TryGate,
           answer: ok, after: exclusive_gated, gate: Gate::Held },
    Rule { id: "S3",  before: |f| is_sane(f) && !f.held,
           call: is_write, first: First::TryGate,
           answer: not_ok, after: same, gate: Gate::Released },
    Rule { id: "S4",  before: |f| is_sane(f) && f.held,
           call: |f, c| is_write(f, c) || is_gated_checkpoint(f, c), first: First::TryGate,
           answer: any, after: exclusive_gated, gate: Gate::Held },
    Rule { id: "S5",  before: always,
           call: is_other_exclusive, first: First::Nothing,
           answer: any, after: exclusive, gate: Gate::Same },
    Rule { id: "S6",  before: always,
           call: |f, c| matches!(c, ShmUnlock(_)) && !ends_reset(f, c), first: First::Nothing,
           answer: any, after: cleared, gate: Gate::UnlessReason },
    Rule { id: "S6",  before: always,
           call: ends_reset, first: First::Nothing,
           answer: not_ok, after: same, gate: Gate::Same },
    Rule { id: "S7",  before: always,
           call: |_, c| c == ShmUnmap, first: First::Nothing,
           answer: any, after: |f, _, _| File { guarded: false, ..f.with_slots(0xff, Slot::Free) }, gate: Gate::UnlessReason },
    Rule { id: "K1",  before: |f| is_sane(f) && !f.held && has_no_slot(f),
           call: is_gated_checkpoint, first: First::AwaitGate,
           answer: ok, after: exclusive_gated, gate: Gate::Held },
    Rule { id: "K1",  before: |f| is_sane(f) && !f.held && !has_no_slot(f),
           call: is_gated_checkpoint, first: First::TryGate,
           answer: ok, after: exclusive_gated, gate: Gate::Held },
    Rule { id: "K2",  before: |f| is_sane(f) && !f.held && has_no_slot(f),
           call: is_gated_checkpoint, first: First::AwaitGate,
           answer: not_ok, after: same, gate: Gate::Released },
    Rule { id: "K2",  before: |f| is_sane(f) && !f.held && !has_no_slot(f),
           call: is_gated_checkpoint, first: First::TryGate,
           answer: not_ok, after: same, gate: Gate::Released },
    Rule { id: "G1",  before: is_sane,
           call: is_reset, first: First::Guard,
           answer: not_called, after: same, gate: Gate::Same },
    Rule { id: "G2",  before: is_sane,
           call: is_reset, first: First::Guard,
           answer: not_ok, after: same, gate: Gate::Same },
    Rule { id: "G3",  before: is_sane,
           call: is_reset, first: First::Guard,
           answer: ok, after: |f, c, a| File { guarded: true, ..exclusive(f, c, a) }, gate: Gate::Same },
    Rule { id: "G4",  before: always,
           call: ends_reset, first: First::Nothing,
           answer: ok, after: |f, c, a| File { guarded: false, ..cleared(f, c, a) }, gate: Gate::UnlessReason },
    Rule { id: "P1",  before: |f| f.poisoned,
           call: |f, c| needs_gate(f, c) || is_reset(f, c), first: First::Refuse,
           answer: not_called, after: same, gate: Gate::Same },
    Rule { id: "X1",  before: always,
           call: is_strange_lock, first: First::Nothing,
           answer: any, after: same, gate: Gate::Same },
    Rule { id: "X1",  before: always,
           call: is_strange_unlock, first: First::Nothing,
           answer: any, after: same, gate: Gate::Same },
];

// The words of the table's columns.

fn always(_: &File) -> bool {
    true
}

/// Row P1 comes first.
fn is_sane(file: &File) -> bool {
    !file.poisoned
}

/// Rows L2 to L7w are not about a file that was opened read-only.
fn is_writable(file: &File) -> bool {
    is_sane(file) && !file.read_only
}

/// K1: "a slot held: try"
fn has_no_slot(file: &File) -> bool {
    file.slots == [Slot::Free; 8]
}

/// "READ slot held"
fn reads_wal(file: &File) -> bool {
    file.holds(READS, &[Slot::Shared])
}

/// RESERVED, PENDING
fn is_between(file: &File) -> bool {
    matches!(file.level, RESERVED | PENDING)
}

fn slots(call: Call) -> u8 {
    match call {
        ShmLockShared(slots) | ShmLockExclusive(slots) | ShmUnlock(slots) => slots,
        Lock(_) | Unlock(_) | ShmUnmap => 0,
    }
}

/// "as before"
fn same(file: File, _: Call, _: Answer) -> File {
    file
}

/// "`shared` grows if OK"
fn shared(file: File, call: Call, answer: Answer) -> File {
    if answer.is_ok() { file.with_slots(slots(call), Slot::Shared) } else { file }
}

/// "`excl` grows if OK"
fn exclusive(file: File, call: Call, answer: Answer) -> File {
    if answer.is_ok() { file.with_exclusive(slots(call), 0) } else { file }
}

/// The same, and it is a reason to hold the gate: WRITE, or CKPT alone.
fn exclusive_gated(file: File, call: Call, answer: Answer) -> File {
    let reason = if slots(call) == CKPT { CKPT } else { WRITE };
    if answer.is_ok() { file.with_exclusive(slots(call), reason) } else { file }
}

/// "cleared (not OK: as before)"
fn cleared(file: File, call: Call, answer: Answer) -> File {
    if answer.is_ok() { file.with_slots(slots(call), Slot::Free) } else { file }
}

/// "shm LOCK·EXCL with WRITE, own READ or CKPT held"
fn is_write(file: &File, call: Call) -> bool {
    matches!(call, ShmLockExclusive(slots) if slots & WRITE != 0)
        && (file.holds(READS, &[Slot::Shared]) || file.holds(CKPT, &[Slot::Exclusive, Slot::Gated]))
}

/// "shm LOCK·EXCL of CKPT alone, policy `gate`"
fn is_gated_checkpoint(file: &File, call: Call) -> bool {
    file.gates_checkpoints && call == ShmLockExclusive(CKPT)
}

/// "shm LOCK·EXCL of READ(1)…READ(4)" with "WRITE, no CKPT", and no guard yet
fn is_reset(file: &File, call: Call) -> bool {
    call == ShmLockExclusive(READS_1_TO_4)
        && file.holds(WRITE, &[Slot::Exclusive, Slot::Gated])
        && !file.holds(CKPT, &[Slot::Exclusive, Slot::Gated])
        && !file.guarded
}

/// "anything else"
fn is_other_exclusive(file: &File, call: Call) -> bool {
    matches!(call, ShmLockExclusive(_))
        && !is_write(file, call)
        && !is_gated_checkpoint(file, call)
        && !is_reset(file, call)
}

/// "guarded", "shm UNLOCK of READ(1)…READ(4)"
fn ends_reset(file: &File, call: Call) -> bool {
    file.guarded && matches!(call, ShmUnlock(slots) if slots & READS_1_TO_4 == READS_1_TO_4)
}

/// "SHARED, RESERVED, PENDING", "xLock RESERVED, EXCLUSIVE"
fn is_upgrade(file: &File, call: Call) -> bool {
    match call {
        Lock(RESERVED) => file.level == SHARED,
        Lock(EXCLUSIVE) => matches!(file.level, SHARED | RESERVED | PENDING),
        _ => false,
    }
}

/// The level asked for.
fn locked(call: Call) -> u8 {
    if let Lock(to) = call { to } else { panic!("{call:?} is no xLock") }
}

/// "an upgrade that needs the gate", of either family of locks
fn needs_gate(file: &File, call: Call) -> bool {
    (is_upgrade(file, call) && !file.read_only) || is_write(file, call) || is_gated_checkpoint(file, call)
}

/// xLock that skips a level, or names PENDING
fn is_strange_lock(file: &File, call: Call) -> bool {
    matches!(
        (file.level, call),
        (NONE, Lock(RESERVED | PENDING | EXCLUSIVE)) | (SHARED | RESERVED, Lock(PENDING))
    )
}

/// xUnlock to a level that no unlock leads to
fn is_strange_unlock(_: &File, call: Call) -> bool {
    matches!(call, Unlock(RESERVED | PENDING | EXCLUSIVE))
}

/// "the level that LOCKSTATE gives, if lower; unknown → as before; lent → SHARED"
fn as_lock_state_says(file: File, answer: Answer) -> File {
    let level = match answer {
        Answer::RealWithLockState(_, Some(level)) => file.level.min(level as u8),
        _ if file.lent => SHARED,
        _ => file.level,
    };
    File { lent: file.lent && matches!(level, RESERVED | PENDING), ..file.with_level(level) }
}

fn any(answer: Answer) -> bool {
    answer.reply().is_some()
}

fn ok(answer: Answer) -> bool {
    answer.is_ok()
}

fn not_ok(answer: Answer) -> bool {
    any(answer) && !ok(answer)
}

fn not_called(answer: Answer) -> bool {
    answer == Answer::NotCalled
}

fn busy_with_shm(answer: Answer) -> bool {
    answer == Answer::RealWithShm(Reply::Busy, true)
}

// The comparison.

/// How often each row was met, and how much was visited.
#[derive(Debug, Default)]
struct Tally {
    rows: BTreeMap<&'static str, u64>,
    states: u64,
    transitions: u64,
}

/// The machine and the table disagree.
#[derive(Debug)]
struct Mismatch {
    rows: Vec<&'static str>,
    before: File,
    call: Call,
    answer: Answer,
    what: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { rows, before, call, answer, what } = self;
        write!(
            f,
            "row {}: {what}\n  before: {before:?}\n  call:   {call:?}\n  answer: {answer:?}",
            rows.join(", ")
        )
    }
}

/// How the file was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Writable(CheckpointPolicy),
    ReadOnly,
}

const GATED: Kind = Kind::Writable(CheckpointPolicy::Gate);

/// Visits every state, makes every call with every answer.
fn compare(table: &[Rule], kind: Kind) -> Result<Tally, Mismatch> {
    let mut tally = Tally::default();
    let mut pairs = Pairs::default();
    let start = match kind {
        Kind::Writable(policy) => (State::new(policy), File::new(policy)),
        Kind::ReadOnly => {
            (State::new_read_only(), File { read_only: true, ..File::new(CheckpointPolicy::Free) })
        }
    };
    pairs.insert(start).expect("the first pair");
    let mut visited = HashSet::from([start.0]);
    let mut queue = VecDeque::from([start]);
    let calls = calls();
    while let Some((state, file)) = queue.pop_front() {
        tally.states += 1;
        let poisoned = (state.poison(), File { poisoned: true, ..file });
        assert!(poisoned.0.is_poisoned(), "row P1: {poisoned:?}");
        pairs.insert(poisoned).unwrap_or_else(|what| panic!("row P1: {what}"));
        if visited.insert(poisoned.0) {
            queue.push_back(poisoned);
        }
        for &call in &calls {
            let ask = ask(&state, call);
            let rules: Vec<&Rule> =
                table.iter().filter(|rule| (rule.before)(&file) && (rule.call)(&file, call)).collect();
            for answer in answers(ask, call) {
                tally.transitions += 1;
                let fits: Vec<&Rule> = rules.iter().copied().filter(|rule| (rule.answer)(answer)).collect();
                let mismatch = |what| {
                    let rows = fits.iter().map(|rule| rule.id).collect();
                    Mismatch { rows, before: file, call, answer, what }
                };
                let [rule] = fits[..] else {
                    return Err(mismatch(format!("{} rows fit, not one", fits.len())));
                };
                *tally.rows.entry(rule.id).or_default() += 1;
                let after = follow(rule, file, call, answer, ask, state).map_err(mismatch)?;
                if after.0 == state && after.1 == file {
                    continue;
                }
                pairs.insert(after).map_err(mismatch)?;
                if leads_on(&file, call) && visited.insert(after.0) {
                    queue.push_back(after);
                }
            }
        }
    }
    Ok(tally)
}

/// One transition, by the table and by the machine.
fn follow(
    rule: &Rule,
    file: File,
    call: Call,
    answer: Answer,
    ask: Ask,
    state: State,
) -> Result<(State, File), String> {
    let expected = match rule.first {
        First::Nothing => Ask::Forward,
        First::TryGate if file.held => Ask::Forward,
        First::TryGate => Ask::TakeGate,
        First::AwaitGate => Ask::AwaitGate,
        First::Guard => Ask::GuardReset,
        First::Refuse => Ask::Refuse,
    };
    if ask != expected {
        return Err(format!("the machine asks {ask:?}, the row {expected:?}"));
    }
    let after = (rule.after)(file, call, answer);
    let held = match rule.gate {
        Gate::Same => file.held,
        Gate::Held => true,
        Gate::Released => false,
        Gate::UnlessReason => after.has_reason(),
    };
    let after = File { held, ..after };
    if after.has_reason() != held {
        return Err(format!("the row leaves the gate {}, against the reasons: {after:?}", gate_name(held)));
    }
    let (state, row) = act(state, call, answer);
    if row.as_ref().is_some_and(|row| row != rule.id) {
        return Err(format!("the machine follows row {row:?}"));
    }
    if state.wants_gate() != held {
        return Err(format!("the machine wants the gate {}: {state:?}", gate_name(state.wants_gate())));
    }
    let seen = (state.level() as u8, state.is_guarded(), state.is_poisoned());
    if seen != (after.level, after.guarded, after.poisoned) {
        return Err(format!("the machine comes to {state:?}, the row to {after:?}"));
    }
    Ok((state, after))
}

fn gate_name(held: bool) -> &'static str {
    if held { "held" } else { "free" }
}

/// States and accounts, one to one.
#[derive(Default)]
struct Pairs {
    files: HashMap<State, File>,
    states: HashMap<File, State>,
}

impl Pairs {
    /// Fails if either of the two has another partner.
    fn insert(&mut self, (state, file): (State, File)) -> Result<(), String> {
        if let Some(&before) = self.files.get(&state) {
            return check_same(before, file);
        }
        self.files.insert(state, file);
        let before = self.states.insert(file, state);
        before.map_or(Ok(()), |before| check_same(before, state))
    }
}

fn check_same<T: PartialEq + fmt::Debug>(before: T, now: T) -> Result<(), String> {
    if before == now {
        Ok(())
    } else {
        Err(format!("what came to {before:?} elsewhere comes to {now:?} here"))
    }
}

/// The machine, first step.
fn ask(state: &State, call: Call) -> Ask {
    match call {
        Lock(to) => state.ask_lock(level(to)),
        ShmLockShared(_) | ShmLockExclusive(_) | ShmUnlock(_) => state.ask_shm(request(call)),
        Unlock(_) | ShmUnmap => Ask::Forward,
    }
}

/// The machine, second step, and the row that it names.
fn act(state: State, call: Call, answer: Answer) -> (State, Option<String>) {
    let Some(reply) = answer.reply() else { return (state, None) };
    let (state, row) = match call {
        Lock(to) => state.lock_done(level(to), reply, || answer == Answer::RealWithShm(reply, true)),
        Unlock(to) => state.unlock_done(level(to), reply, || match answer {
            Answer::RealWithLockState(_, level) => level,
            _ => panic!("LOCKSTATE is for errors: {call:?} {answer:?}"),
        }),
        ShmLockShared(_) | ShmLockExclusive(_) | ShmUnlock(_) => state.shm_done(request(call), reply),
        ShmUnmap => state.unmap_done(),
    };
    (state, Some(format!("{row:?}")))
}

/// The ways in which the world can answer `call`.
fn answers(ask: Ask, call: Call) -> Vec<Answer> {
    const REPLIES: [Reply; 3] = [Reply::Ok, Reply::Busy, Reply::Error];
    if ask == Ask::Refuse {
        return vec![Answer::NotCalled];
    }
    let levels = || [None].into_iter().chain((NONE..=EXCLUSIVE).map(|raw| Some(level(raw))));
    let mut answers: Vec<Answer> = match call {
        Lock(_) => {
            REPLIES.iter().flat_map(|&r| [false, true].map(|shm| Answer::RealWithShm(r, shm))).collect()
        }
        Unlock(NONE | SHARED) => [Reply::Busy, Reply::Error]
            .iter()
            .flat_map(|&r| levels().map(move |level| Answer::RealWithLockState(r, level)))
            .chain([Answer::Real(Reply::Ok)])
            .collect(),
        _ => REPLIES.map(Answer::Real).to_vec(),
    };
    if ask == Ask::GuardReset {
        answers.push(Answer::NotCalled);
    }
    answers
}

fn level(raw: u8) -> LockLevel {
    LockLevel::from_raw(c_int::from(raw)).expect("a level")
}

fn request(call: Call) -> ShmRequest {
    let slots = slots(call);
    let (offset, count) = (slots.trailing_zeros(), slots.count_ones());
    let flags = match call {
        ShmLockShared(_) => LOCK_SHARED,
        ShmLockExclusive(_) => LOCK_EXCLUSIVE,
        ShmUnlock(_) => UNLOCK_EXCLUSIVE,
        Lock(_) | Unlock(_) | ShmUnmap => panic!("{call:?} is no xShmLock"),
    };
    let raw = |number: u32| c_int::try_from(number).expect("at most 8");
    ShmRequest::from_raw(raw(offset), raw(count), flags).expect("a request")
}

// The tests.

#[test]
fn the_machine_follows_the_table_with_free_checkpoints() {
    meets_all_rows_but(&["K1", "K2", "L13"], Kind::Writable(CheckpointPolicy::Free));
}

#[test]
fn the_machine_follows_the_table_with_gated_checkpoints() {
    meets_all_rows_but(&["L13"], GATED);
}

/// Row L13, and WRITE with CKPT held takes the gate as ever: row S2.
#[test]
fn the_machine_follows_the_table_for_a_file_opened_read_only() {
    let upgrades = ["L2", "L2w", "L3", "L4", "L5", "L6", "L7", "L7w"];
    meets_all_rows_but(&[&upgrades[..], &["K1", "K2"]].concat(), Kind::ReadOnly);
}

/// Row K3: `auto` is one of the two others, from one checkpoint to the next. Which one is the driver's to say.
#[test]
fn auto_gates_a_checkpoint_or_does_not() {
    let checkpoint = request(ShmLockExclusive(CKPT));
    let auto = State::new(CheckpointPolicy::Auto);
    assert_eq!(auto.ask_shm(checkpoint), Ask::Forward, "until it is told otherwise");
    let long = auto.with_gated_checkpoints(true);
    assert_eq!(long.ask_shm(checkpoint), Ask::AwaitGate, "K3, as K1");
    let (gated, row) = long.shm_done(checkpoint, Reply::Ok);
    assert_eq!((gated.wants_gate(), row), (true, Row::K1));
    let (done, _) = gated.shm_done(request(ShmUnlock(CKPT)), Reply::Ok);
    assert!(!done.wants_gate());
    let refused = long.with_gated_checkpoints(false);
    let (free, row) = refused.shm_done(checkpoint, Reply::Ok);
    assert_eq!((free.wants_gate(), row), (false, Row::S5), "K3, refused: as S5");
}

/// Compares, and checks that every row is met but these.
fn meets_all_rows_but(others: &[&str], kind: Kind) {
    let tally = compare(&TABLE, kind).unwrap_or_else(|mismatch| panic!("{mismatch}"));
    println!("{kind:?}: {} states, {} transitions, {:?}", tally.states, tally.transitions, tally.rows);
    for rule in TABLE {
        let is_met = tally.rows.contains_key(rule.id);
        assert_ne!(is_met, others.contains(&rule.id), "{kind:?}: row {}", rule.id);
    }
}

/// Each is the table with one plausible mistake, and must be found out at the row that has it.
#[test]
fn wrong_tables_are_found_out() {
    type Change = fn(Rule) -> Rule;
    let wrong: [(&str, &str, Change); 17] = [
        ("a refused upgrade keeps the gate", "L3", |rule| Rule { gate: Gate::Held, ..rule }),
        ("RESERVED without the gate", "L2", |rule| Rule { first: First::Nothing, ..rule }),
        ("a refused EXCLUSIVE keeps the gate", "L5", |rule| Rule { gate: Gate::Held, ..rule }),
        ("a refused EXCLUSIVE comes to RESERVED", "L5", |rule| Rule {
            after: |f, _, _| f.with_level(RESERVED),
            ..rule
        }),
        ("a refused EXCLUSIVE always lends the gate", "L7", |rule| Rule {
            after: |f, _, _| File { lent: true, ..f },
            gate: Gate::UnlessReason,
            ..rule
        }),
        ("the gate is never lent", "L7w", |rule| Rule { after: |f, _, _| f, gate: Gate::Held, ..rule }),
        ("a lent gate stays lent at EXCLUSIVE", "L6", |rule| Rule {
            after: |f, _, _| f.with_level(EXCLUSIVE),
            ..rule
        }),
        ("a failed unlock counts as one", "L11", |rule| Rule { after: |f, _, _| f.with_level(NONE), ..rule }),
        ("a file opened read-only takes the gate", "L13", |rule| Rule { first: First::TryGate, ..rule }),
        ("recovery's WRITE takes the gate", "S5", |rule| Rule {
            after: |f, c, a| if a.is_ok() { f.with_exclusive(slots(c), slots(c) & WRITE) } else { f },
            gate: Gate::UnlessReason,
            ..rule
        }),
        ("a failed WRITE lets go of what was held", "S4", |rule| Rule { gate: Gate::Released, ..rule }),
        ("unlock forgets its slots", "S6", |rule| Rule { after: |f, _, _| f, ..rule }),
        ("unlock keeps the gate", "S6", |rule| Rule { gate: Gate::Same, ..rule }),
        ("unmap forgets the guard", "S7", |rule| Rule {
            after: |f, _, _| f.with_slots(0xff, Slot::Free),
            ..rule
        }),
        ("a checkpoint never waits for the gate", "K1", |rule| Rule { first: First::TryGate, ..rule }),
        ("the guard is kept", "G4", |rule| Rule {
            after: |f, c, _| f.with_slots(slots(c), Slot::Free),
            ..rule
        }),
        ("poison is forwarded", "P1", |rule| Rule { first: First::Nothing, ..rule }),
    ];
    for (name, id, change) in wrong {
        let table: Vec<Rule> =
            TABLE.into_iter().map(|rule| if rule.id == id { change(rule) } else { rule }).collect();
        let kind = if id == "L13" { Kind::ReadOnly } else { GATED };
        let mismatch = compare(&table, kind).expect_err(name);
        assert_eq!(mismatch.rows, [id], "{name}: found, but elsewhere: {mismatch}");
    }
}

/// No row is there for show: without it something has no row, and twice it is one too many.
#[test]
fn every_rule_is_needed() {
    for index in 0..TABLE.len() {
        let mut fewer = TABLE.to_vec();
        let rule = fewer.remove(index);
        let kind = if rule.id == "L13" { Kind::ReadOnly } else { GATED };
        let mismatch = compare(&fewer, kind).expect_err(rule.id);
        assert_eq!(mismatch.rows, [""; 0], "without {}: {mismatch}", rule.id);
        let mut more = TABLE.to_vec();
        more.push(rule);
        let mismatch = compare(&more, kind).expect_err(rule.id);
        assert_eq!(mismatch.rows, [rule.id; 2], "{mismatch}");
    }
}
