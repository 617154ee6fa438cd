//! Level 3: every interleaving of 2–4 connections, by explicit-state breadth-first search.
//!
//! ## Covers
//! Each connection runs a [`Program`]: the lock calls of one transaction, checkpoint or recovery, in SQLite's
//! order, with what SQLite does when one is BUSY. It is driven by the real `State`, in the steps of `driver.rs`,
//! and others may act between any two of them:
//!
//! ```text
//! acquire the gate (or the guard's CKPT)  →  real VFS  →  give back the guard's CKPT  →  release the gate
//! ```
//!
//! Beside them, at any time: an outsider (`flock kanban.db.lock cmd`) takes the free gate, or releases it; a
//! connection crashes, and all that it holds is gone. Under each checkpoint policy; under `auto` (row K3) a checkpoint finds
//! the WAL short or long, as it comes, and if long it waits for the gate, or has waited long enough. In every state:
//!
//! - **I1** at most one holds the gate;
//! - **I2** the gate is held while there is a reason: EXCLUSIVE; RESERVED, unless lent (L7w); WRITE as a writer;
//!   CKPT under the policy `gate`, or under `auto` if it was had with the gate. So, with I1, there are never two writers,
//!   nor one beside the outsider. And between two calls it is held for no other reason;
//! - **I3** some schedule lets everyone finish, without a crash and without a busy handler that gives up;
//! - **I4** a reader never asks for the gate, not even to rebuild the wal-index;
//! - **I5** no WAL restart while a checkpointer is between reading the wal-index header and its end;
//! - **I6** who has finished holds nothing: no lock, no slot, no gate.
//!
//! Wrong designs must be found out ([`Design`]), each by the invariant that it breaks; the shortest
//! counterexamples are printed.
//!
//! ## Busy handlers
//! Where SQLite calls the busy handler, a program goes on trying for ever; where it does not (an upgrade inside
//! a read transaction, CKPT), it gives up. I3 is thus harder than reality, where handlers time out.
//!
//! ## Bounds
//! A connection runs its program as often as it likes, or goes away. All pairs of programs, under the three policies
//! and over both kinds of os_unix (`unix_locks.rs`); all triples, checkpoints free; four foursomes. Half a
//! million worlds, a few seconds in a debug build.
//!
//! **Not covered:** fairness and livelock (I3 asks for *some* schedule); steps inside one call of the real VFS
//! (see `unix_locks.rs`); errors of the real VFS and of the gate (`simulation.rs`); what the data in the
//! wal-index says, so any connection may restart the WAL, recover, or find a hot journal; a change of journal
//! mode between two transactions of one connection; `locking_mode=EXCLUSIVE`; more than one database (ATTACH).

use std::collections::HashMap;
use std::ffi::c_int;
use std::fmt::{self, Write};
use std::hash::{BuildHasherDefault, Hasher};

use crate::error::rc;
use crate::lock::{LockLevel, ShmRequest};
use crate::state::{Ask, CheckpointPolicy, Reply, Row, State};
use crate::tests::unix_locks::{
    self, CKPT, LOCK_EXCLUSIVE, LOCK_SHARED, Locks, OsUnix, UNLOCK_EXCLUSIVE, UNLOCK_SHARED, WRITE,
};

use LockLevel::{Exclusive, None as NoLock, Reserved, Shared};

// What SQLite does.

/// One call of SQLite's, or a moment that an invariant speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Lock(LockLevel),
    Unlock(LockLevel),
    /// xShmLock: offset, count, flags.
    Shm(c_int, c_int, c_int),
    Mark(Mark),
}

use Call::{Lock, Mark as At, Shm, Unlock};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// A checkpointer reads the wal-index header.
    HeaderRead,
    /// It has done all that it does by that header.
    CheckpointDone,
    /// The WAL is restarted: the wal-index header now says "empty".
    Restart,
}

/// A label, a call, where to go on after OK, and where after BUSY. Several places: SQLite may choose any.
type Step = (&'static str, Call, &'static [&'static str], &'static [&'static str]);

/// The calls of one connection, from open to close.
struct Program {
    name: &'static str,
    /// I4: it does not change the database, so it must not ask for the gate.
    reads_only: bool,
    /// It asks for WRITE as a writer or checkpointer (otherwise: to rebuild the wal-index).
    writes_wal: bool,
    /// With it in the game, there is a `-shm` file.
    is_wal: bool,
    steps: &'static [Step],
}

/// Where a program ends.
const END: &str = "";
const NEVER: &[&str] = &[];

/// A slot, as offset and count of xShmLock.
const fn lock_shared(slot: c_int) -> Call {
    Shm(slot, 1, LOCK_SHARED)
}
const fn lock(slot: c_int) -> Call {
    Shm(slot, 1, LOCK_EXCLUSIVE)
}
const fn unlock_shared(slot: c_int) -> Call {
    Shm(slot, 1, UNLOCK_SHARED)
}
const fn unlock(slot: c_int) -> Call {
    Shm(slot, 1, UNLOCK_EXCLUSIVE)
}
const WRITE_SLOT: c_int = 0;
const CKPT_SLOT: c_int = 1;
const READ_0: c_int = 3;
const READ_1: c_int = 4;

/// Rollback mode: SELECT.
const READER: Program = Program {
    name: "reader",
    reads_only: true,
    writes_wal: false,
    is_wal: false,
    steps: &[
        ("begin", Lock(Shared), &["end"], &["begin"]), // pager_wait_on_lock
        ("end", Unlock(NoLock), &["begin", END], NEVER),
    ],
};

/// Rollback mode: BEGIN IMMEDIATE … COMMIT. sqlite3BtreeBeginTrans unlocks before it calls the busy handler.
const WRITER: Program = Program {
    name: "writer",
    reads_only: false,
    writes_wal: false,
    is_wal: false,
    steps: &[
        ("begin", Lock(Shared), &["reserve"], &["begin"]),
        ("reserve", Lock(Reserved), &["commit", "roll back"], &["back off"]),
        ("back off", Unlock(NoLock), &["begin"], NEVER),
        ("commit", Lock(Exclusive), &["written"], &["commit"]), // pager_wait_on_lock, with RESERVED
        ("roll back", Unlock(Shared), &["end"], NEVER),
        ("written", Unlock(Shared), &["end"], NEVER),
        ("end", Unlock(NoLock), &["begin", END], NEVER),
    ],
};

/// Rollback mode: BEGIN; SELECT; UPDATE; COMMIT. No busy handler for the upgrade.
const UPGRADER: Program = Program {
    name: "upgrader",
    reads_only: false,
    writes_wal: false,
    is_wal: false,
    steps: &[
        ("begin", Lock(Shared), &["upgrade"], &["begin"]),
        ("upgrade", Lock(Reserved), &["commit"], &["end"]),
        ("commit", Lock(Exclusive), &["end"], &["commit"]),
        ("end", Unlock(NoLock), &["begin", END], NEVER),
    ],
};

/// Rollback mode: SELECT that finds a hot journal; the last connection of a WAL database does the same.
const HOT_JOURNAL: Program = Program {
    name: "hot journal",
    reads_only: false,
    writes_wal: false,
    is_wal: false,
    steps: &[
        ("begin", Lock(Shared), &["roll back"], &["begin"]),
        ("roll back", Lock(Exclusive), &["rolled back"], &["back off"]), // pagerLockDb: no busy handler there
        ("back off", Unlock(NoLock), &["begin"], NEVER),                 // but at sqlite3BtreeBeginTrans
        ("rolled back", Unlock(Shared), &["end"], NEVER),
        ("end", Unlock(NoLock), &["begin", END], NEVER),
    ],
};

/// PRAGMA journal_mode=DELETE on a WAL database: sqlite3PagerCloseWal, then a transaction in rollback mode.
const LEAVE_WAL: Program = Program {
    name: "leave WAL",
    reads_only: false,
    writes_wal: false,
    is_wal: true,
    steps: &[
        ("begin", Lock(Shared), &["close WAL"], &["begin"]),
        ("close WAL", Lock(Exclusive), &["closed"], &["still open"]), // pagerExclusiveLock
        ("still open", Unlock(Shared), &["end"], NEVER),
        ("closed", Unlock(Shared), &["reserve"], NEVER),
        ("reserve", Lock(Reserved), &["commit"], &["back off"]),
        ("back off", Unlock(NoLock), &["again"], NEVER),
        ("again", Lock(Shared), &["reserve"], &["again"]),
        ("commit", Lock(Exclusive), &["written"], &["commit"]),
        ("written", Unlock(Shared), &["end"], NEVER),
        ("end", Unlock(NoLock), &["begin", END], NEVER),
    ],
};

/// WAL mode: SELECT. SHARED is kept for the connection's life, as in every program below.
const WAL_READER: Program = Program {
    name: "WAL reader",
    reads_only: true,
    writes_wal: false,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["begin", "new mark"], &["open"]),
        ("new mark", lock(READ_1), &["marked"], &["begin"]), // walTryBeginRead: aReadMark[1]
        ("marked", unlock(READ_1), &["begin"], NEVER),
        ("begin", lock_shared(READ_1), &["end"], &["begin"]), // WAL_RETRY
        ("end", unlock_shared(READ_1), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

/// WAL mode: BEGIN IMMEDIATE … COMMIT.
const WAL_WRITER: Program = Program {
    name: "WAL writer",
    reads_only: false,
    writes_wal: true,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["begin"], &["open"]),
        ("begin", lock_shared(READ_1), &["write"], &["begin"]),
        ("write", lock(WRITE_SLOT), &["commit"], &["back off"]),
        ("back off", unlock_shared(READ_1), &["begin"], NEVER), // unlockBtreeIfUnused, then the busy handler
        ("commit", unlock(WRITE_SLOT), &["end"], NEVER),
        ("end", unlock_shared(READ_1), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

/// WAL mode: BEGIN; SELECT; UPDATE; COMMIT. No busy handler for the upgrade.
const WAL_UPGRADER: Program = Program {
    name: "WAL upgrader",
    reads_only: false,
    writes_wal: true,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["begin"], &["open"]),
        ("begin", lock_shared(READ_1), &["upgrade"], &["begin"]),
        ("upgrade", lock(WRITE_SLOT), &["commit"], &["end"]),
        ("commit", unlock(WRITE_SLOT), &["end"], NEVER),
        ("end", unlock_shared(READ_1), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

/// WAL mode: a writer that finds the WAL wholly checkpointed, and starts it anew: walRestartLog.
const WAL_RESTARTER: Program = Program {
    name: "WAL restarter",
    reads_only: false,
    writes_wal: true,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["begin"], &["open"]),
        ("begin", lock_shared(READ_0), &["write"], &["begin"]),
        ("write", lock(WRITE_SLOT), &["restart"], &["back off"]),
        ("back off", unlock_shared(READ_0), &["begin"], NEVER),
        ("restart", Shm(4, 4, LOCK_EXCLUSIVE), &["restarts"], &["read on"]), // "if( rc==SQLITE_OK )", and on
        ("restarts", At(Mark::Restart), &["restarted"], NEVER),
        ("restarted", Shm(4, 4, UNLOCK_EXCLUSIVE), &["read on"], NEVER),
        ("read on", unlock_shared(READ_0), &["again"], NEVER),
        ("again", lock_shared(READ_1), &["commit"], &["again"]), // walTryBeginRead until not WAL_RETRY
        ("commit", unlock(WRITE_SLOT), &["end"], NEVER),
        ("end", unlock_shared(READ_1), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

/// PRAGMA wal_checkpoint(PASSIVE), and automatic checkpoints. It is BUSY at once where another has a lock.
const CHECKPOINTER: Program = Program {
    name: "checkpointer",
    reads_only: false,
    writes_wal: false,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["begin"], &["open"]),
        ("begin", lock(CKPT_SLOT), &["read header"], &["close"]),
        ("read header", At(Mark::HeaderRead), &["mark"], NEVER),
        ("mark", lock(READ_1), &["marked"], &["copy"]),
        ("marked", unlock(READ_1), &["copy"], NEVER),
        ("copy", lock(READ_0), &["copied"], &["done"]),
        ("copied", unlock(READ_0), &["done"], NEVER),
        ("done", At(Mark::CheckpointDone), &["end"], NEVER),
        ("end", unlock(CKPT_SLOT), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

/// PRAGMA wal_checkpoint(FULL) and (RESTART): walBusyLock calls the busy handler, with CKPT and WRITE held.
const FULL_CHECKPOINTER: Program = Program {
    name: "full checkpointer",
    reads_only: false,
    writes_wal: true,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["begin"], &["open"]),
        ("begin", lock(CKPT_SLOT), &["write"], &["close"]),
        ("write", lock(WRITE_SLOT), &["read header"], &["write"]),
        ("read header", At(Mark::HeaderRead), &["mark"], NEVER),
        ("mark", lock(READ_1), &["marked"], &["mark"]),
        ("marked", unlock(READ_1), &["copy"], NEVER),
        ("copy", lock(READ_0), &["copied"], &["copy"]),
        ("copied", unlock(READ_0), &["done", "wait for readers"], NEVER),
        ("wait for readers", Shm(4, 4, LOCK_EXCLUSIVE), &["restarts"], &["wait for readers"]),
        ("restarts", At(Mark::Restart), &["restarted"], NEVER),
        ("restarted", Shm(4, 4, UNLOCK_EXCLUSIVE), &["done"], NEVER),
        ("done", At(Mark::CheckpointDone), &["end write"], NEVER),
        ("end write", unlock(WRITE_SLOT), &["end"], NEVER),
        ("end", unlock(CKPT_SLOT), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

/// A WAL reader that finds no good wal-index, and rebuilds it: walIndexReadHdr, walIndexRecover.
const RECOVERER: Program = Program {
    name: "recoverer",
    reads_only: true,
    writes_wal: false,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["write"], &["open"]),
        ("write", lock(WRITE_SLOT), &["recover", "not needed"], &["write", "probe"]),
        ("probe", lock_shared(2), &["probed"], &["write"]), // walTryBeginRead: is it in recovery?
        ("probed", unlock_shared(2), &["write"], NEVER),
        ("recover", Shm(1, 2, LOCK_EXCLUSIVE), &["rewrite"], &["not needed"]),
        ("rewrite", lock(READ_1), &["marked"], &["recovered"]),
        ("marked", unlock(READ_1), &["recovered"], NEVER),
        ("recovered", Shm(1, 2, UNLOCK_EXCLUSIVE), &["end write"], NEVER),
        ("not needed", unlock(WRITE_SLOT), &["begin", "write"], NEVER),
        ("end write", unlock(WRITE_SLOT), &["begin"], NEVER),
        ("begin", lock_shared(READ_1), &["end"], &["begin"]),
        ("end", unlock_shared(READ_1), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

/// WAL mode: sqlite3_snapshot_recover, in a read transaction.
const SNAPSHOT_RECOVERER: Program = Program {
    name: "snapshot recoverer",
    reads_only: false,
    writes_wal: false,
    is_wal: true,
    steps: &[
        ("open", Lock(Shared), &["begin"], &["open"]),
        ("begin", lock_shared(READ_1), &["recover"], &["begin"]),
        ("recover", lock(CKPT_SLOT), &["recovered"], &["end"]), // sqlite3WalSnapshotRecover
        ("recovered", unlock(CKPT_SLOT), &["end"], NEVER),
        ("end", unlock_shared(READ_1), &["begin", "close"], NEVER),
        ("close", Unlock(NoLock), &[END], NEVER),
    ],
};

const PROGRAMS: [&Program; 13] = [
    &READER,
    &WRITER,
    &UPGRADER,
    &HOT_JOURNAL,
    &LEAVE_WAL,
    &WAL_READER,
    &WAL_WRITER,
    &WAL_UPGRADER,
    &WAL_RESTARTER,
    &CHECKPOINTER,
    &FULL_CHECKPOINTER,
    &RECOVERER,
    &SNAPSHOT_RECOVERER,
];

// The shim, right and wrong.

/// The design under test; all but the first are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Design {
    /// DESIGN §5, `driver.rs`.
    Shim,
    /// Waits for the gate inside xLock and xShmLock.
    Blocking,
    /// Row L7w is missing: never lends.
    NeverLends,
    /// Rows G1–G4 are missing.
    NoResetGuard,
    /// Knows xLock only.
    NoWal,
    /// Releases the gate, then unlocks.
    ReleasesFirst,
    /// Locks, then acquires the gate.
    AcquiresLast,
    /// Takes the gate for every WRITE, recovery's too.
    GatesRecovery,
    /// The gate is a lock of the process (fcntl): it does not exclude the process's other connections.
    PosixGate,
    /// Releases the gate in xUnlock only: a WAL transaction leaves it held.
    ForgetsShmUnlock,
    /// K1, K3: waits for the gate also when it holds a slot that others wait for.
    AwaitsWithSlots,
    /// K3: goes on without the gate when it has waited long enough, and takes it for had.
    TakesItForHad,
}

/// Some connections, and the design that they share.
struct Scenario {
    programs: Vec<&'static Program>,
    /// The steps of each program, with labels resolved.
    steps: Vec<Vec<Resolved>>,
    policy: CheckpointPolicy,
    os_unix: OsUnix,
    design: Design,
}

/// A [`Step`] without labels: where to go on is a place in the program, or `None` for [`END`].
struct Resolved {
    call: Call,
    ok: Vec<Place>,
    busy: Vec<Place>,
}

type Place = Option<u8>;

/// The largest scenario.
const MOST: usize = 4;

/// All that there is. Unused places for connections stay as [`Connection::gone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    connections: [Connection; MOST],
    /// What each holds of the real VFS's locks.
    locks: [Locks; MOST],
    outsider_holds_gate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Connection {
    /// The step that it is at; `None`: finished, or crashed.
    place: Place,
    phase: Phase,
    state: State,
    holds_gate: bool,
    /// Row L7w, by this file's own account.
    is_lent: bool,
    /// Between [`Mark::HeaderRead`] and [`Mark::CheckpointDone`].
    is_checkpointing: bool,
}

/// Where a connection is within a call: between which two lines of `driver.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Before the call.
    Call,
    /// What must be won first is won; the real VFS is next.
    Forward,
    /// The real VFS has answered OK (true) or BUSY; the guard's CKPT goes back next.
    GiveBack(bool),
    /// The gate follows next; then SQLite is told OK (true) or BUSY.
    Settle(bool),
}

/// Who did what: an edge of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    OutsiderTakesGate,
    OutsiderReleasesGate,
    Crash { who: usize },
    Step { who: usize, place: u8, did: Did },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Did {
    ReachMark,
    FindLongWal,
    AcquireGate,
    RefuseGate,
    WinGuard,
    RefuseGuard,
    /// The real VFS answered OK (true) or BUSY.
    CallReal(bool),
    GiveBackGuard,
    ReleaseGate,
}

impl Connection {
    fn new(policy: CheckpointPolicy) -> Connection {
        Connection { place: Some(0), ..Connection::gone(policy) }
    }

    /// Finished or crashed: it holds nothing.
    fn gone(policy: CheckpointPolicy) -> Connection {
        Connection {
            place: None,
            phase: Phase::Call,
            state: State::new(policy),
            holds_gate: false,
            is_lent: false,
            is_checkpointing: false,
        }
    }
}

impl Scenario {
    fn new(
        programs: &[&'static Program],
        policy: CheckpointPolicy,
        os_unix: OsUnix,
        design: Design,
    ) -> Scenario {
        assert!(programs.len() <= MOST);
        let steps = programs.iter().map(|program| resolve(program.steps)).collect();
        Scenario { programs: programs.to_vec(), steps, policy, os_unix, design }
    }

    fn start(&self) -> World {
        let mut connections = [Connection::gone(self.policy); MOST];
        connections[..self.programs.len()].fill(Connection::new(self.policy));
        World { connections, locks: [Locks::default(); MOST], outsider_holds_gate: false }
    }

    /// Every world that is one action away.
    fn next(&self, world: &World) -> Vec<(Action, World)> {
        let mut next = Vec::new();
        if world.outsider_holds_gate {
            next.push((Action::OutsiderReleasesGate, World { outsider_holds_gate: false, ..*world }));
        } else if world.connections.iter().all(|connection| !connection.holds_gate) {
            next.push((Action::OutsiderTakesGate, World { outsider_holds_gate: true, ..*world }));
        }
        for who in 0..self.programs.len() {
            let Some(place) = world.connections[who].place else { continue };
            let mut crashed = *world;
            crashed.connections[who] = Connection::gone(self.policy);
            crashed.locks[who] = Locks::default();
            next.push((Action::Crash { who }, crashed));
            let step = &self.steps[who][usize::from(place)];
            let turn = Turn { scenario: self, who, place, step };
            next.extend(
                turn.take(*world).into_iter().map(|(did, world)| (Action::Step { who, place, did }, world)),
            );
        }
        next
    }

    fn is_gate_free(&self, world: &World, who: usize) -> bool {
        let others = || (0..MOST).filter(|&other| other != who);
        let excludes = |other: usize| self.design != Design::PosixGate && world.connections[other].holds_gate;
        !world.outsider_holds_gate && !others().any(excludes)
    }

    fn shm_exists(&self) -> bool {
        self.design != Design::NeverLends && self.programs.iter().any(|program| program.is_wal)
    }

    /// The invariants of a world that are about the world alone; `Err` names the broken one.
    fn check(&self, world: &World) -> Result<(), &'static str> {
        let holders = world.connections.iter().filter(|connection| connection.holds_gate).count();
        check(holders + usize::from(world.outsider_holds_gate) <= 1, "I1")?;
        for (who, program) in self.programs.iter().enumerate() {
            let Connection { place, phase, state, holds_gate, is_lent, .. } = world.connections[who];
            let locks = world.locks[who];
            let is_writing = locks.level == Exclusive || (program.writes_wal && locks.excl & WRITE != 0);
            let has_reason = is_writing
                || (locks.reserved && !is_lent)
                || (self.policy == CheckpointPolicy::Gate
                    && program.is_checkpoint()
                    && locks.excl & CKPT != 0)
                || (self.policy == CheckpointPolicy::Auto && state.wants_gate());
            check(holds_gate || !has_reason, "I2")?;
            check(!holds_gate || has_reason || phase != Phase::Call, "I2")?;
            let is_gone = world.connections[who] == Connection::gone(self.policy) && locks.is_empty();
            check(place.is_some() || is_gone, "I6")?;
        }
        Ok(())
    }

    /// The invariants about what is being done; `world` is the one before.
    fn check_action(&self, world: &World, action: Action) -> Result<(), &'static str> {
        let Action::Step { who, place, did } = action else { return Ok(()) };
        let asks_for_gate = matches!(did, Did::AcquireGate | Did::RefuseGate);
        check(!(asks_for_gate && self.programs[who].reads_only), "I4")?;
        let is_restart = self.steps[who][usize::from(place)].call == At(Mark::Restart);
        let is_checkpointing = |other: usize| other != who && world.connections[other].is_checkpointing;
        check(!(is_restart && (0..MOST).any(is_checkpointing)), "I5")
    }
}

fn check(holds: bool, invariant: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(invariant) }
}

fn resolve(steps: &[Step]) -> Vec<Resolved> {
    let place = |label: &&str| {
        let index = steps.iter().position(|step| step.0 == *label);
        assert!(index.is_some() || *label == END, "no step {label:?}");
        index.map(|index| u8::try_from(index).expect("a short program"))
    };
    let places = |labels: &[&str]| labels.iter().map(place).collect();
    steps.iter().map(|&(_, call, ok, busy)| Resolved { call, ok: places(ok), busy: places(busy) }).collect()
}

impl Program {
    fn is_checkpoint(&self) -> bool {
        self.steps.iter().any(|step| step.1 == lock(CKPT_SLOT))
    }
}

/// One connection's next action.
struct Turn<'a> {
    scenario: &'a Scenario,
    who: usize,
    place: u8,
    step: &'a Resolved,
}

impl Turn<'_> {
    fn take(&self, world: World) -> Vec<(Did, World)> {
        match world.connections[self.who].phase {
            Phase::Call => self.admit(world),
            Phase::Forward => self.forward(world),
            Phase::GiveBack(ok) => {
                let mut world = world;
                assert_eq!(
                    unix_locks::x_shm_lock(&mut world.locks, self.who, 1, 1, UNLOCK_EXCLUSIVE),
                    rc::OK
                );
                self.settle(world, ok, Did::GiveBackGuard)
            }
            Phase::Settle(ok) => self.follow(world, ok),
        }
    }

    /// `Driver::x_shm_lock`, row K3: a checkpoint finds the WAL short, or long; once for each call.
    fn admit(&self, world: World) -> Vec<(Did, World)> {
        let state = world.connections[self.who].state;
        let is_undecided = self.scenario.policy == CheckpointPolicy::Auto
            && self.is_checkpoint()
            && state != state.with_gated_checkpoints(true);
        if !is_undecided {
            return self.admit_under_policy(world);
        }
        let mut next = self.admit_under_policy(self.with_gated_checkpoints(world, false));
        next.push((Did::FindLongWal, self.with_gated_checkpoints(world, true)));
        next
    }

    fn is_checkpoint(&self) -> bool {
        self.step.call == lock(CKPT_SLOT)
    }

    fn with_gated_checkpoints(&self, mut world: World, gates_checkpoints: bool) -> World {
        let connection = &mut world.connections[self.who];
        connection.state = connection.state.with_gated_checkpoints(gates_checkpoints);
        world
    }

    /// `Driver::admit`
    fn admit_under_policy(&self, world: World) -> Vec<(Did, World)> {
        let Turn { scenario, who, .. } = *self;
        if let At(mark) = self.step.call {
            let mut world = world;
            match mark {
                Mark::HeaderRead => world.connections[who].is_checkpointing = true,
                Mark::CheckpointDone => world.connections[who].is_checkpointing = false,
                Mark::Restart => {}
            }
            return self.answer(world, true, Did::ReachMark);
        }
        match self.ask(&world.connections[who]) {
            Ask::Forward if self.releases_first(&world.connections[who]) => {
                let mut world = self.at(world, Phase::Forward);
                world.connections[who].holds_gate = false;
                vec![(Did::ReleaseGate, world)]
            }
            Ask::Forward => self.forward(world),
            Ask::TakeGate | Ask::AwaitGate if scenario.design == Design::AcquiresLast => self.forward(world),
            Ask::TakeGate | Ask::AwaitGate if scenario.is_gate_free(&world, who) => {
                let mut world = self.at(world, Phase::Forward);
                world.connections[who].holds_gate = true;
                vec![(Did::AcquireGate, world)]
            }
            Ask::TakeGate | Ask::AwaitGate if scenario.design == Design::Blocking => vec![],
            Ask::TakeGate if scenario.design == Design::AwaitsWithSlots && self.is_checkpoint() => vec![],
            // Until then it waits: others go on, and it may find the gate free.
            Ask::AwaitGate if scenario.policy == CheckpointPolicy::Auto => {
                if scenario.design == Design::TakesItForHad {
                    return self.forward(world);
                }
                self.forward(self.with_gated_checkpoints(world, false))
            }
            Ask::TakeGate | Ask::AwaitGate => self.answer(world, false, Did::RefuseGate),
            Ask::GuardReset if scenario.design == Design::NoResetGuard => self.forward(world),
            Ask::GuardReset => {
                let mut world = self.at(world, Phase::Forward);
                match unix_locks::x_shm_lock(&mut world.locks, who, 1, 1, LOCK_EXCLUSIVE) {
                    rc::OK => vec![(Did::WinGuard, world)],
                    _ => self.answer(world, false, Did::RefuseGuard),
                }
            }
            Ask::Refuse => panic!("nothing is poisoned here"),
        }
    }

    fn ask(&self, connection: &Connection) -> Ask {
        match self.step.call {
            Lock(to) => connection.state.ask_lock(to),
            Shm(offset, count, flags) => {
                let ask = connection.state.ask_shm(request(offset, count, flags));
                let is_write = flags == LOCK_EXCLUSIVE && offset == WRITE_SLOT;
                match self.scenario.design {
                    Design::NoWal if ask == Ask::TakeGate => Ask::Forward,
                    Design::GatesRecovery if is_write && !connection.holds_gate => Ask::TakeGate,
                    _ => ask,
                }
            }
            Unlock(_) | At(_) => Ask::Forward,
        }
    }

    /// [`Design::ReleasesFirst`]
    fn releases_first(&self, connection: &Connection) -> bool {
        let after = match self.step.call {
            Unlock(to) => connection.state.unlock_done(to, Reply::Ok, || None).0,
            Shm(offset, count, flags) if flags == UNLOCK_EXCLUSIVE => {
                connection.state.shm_done(request(offset, count, flags), Reply::Ok).0
            }
            _ => return false,
        };
        self.scenario.design == Design::ReleasesFirst && connection.holds_gate && !after.wants_gate()
    }

    /// The real VFS, and the state after it.
    fn forward(&self, mut world: World) -> Vec<(Did, World)> {
        let Turn { scenario, who, .. } = *self;
        let before = world.locks[who].level;
        let code = match self.step.call {
            Lock(to) => unix_locks::x_lock(&mut world.locks, who, to, scenario.os_unix),
            Unlock(to) => unix_locks::x_unlock(&mut world.locks[who], to),
            Shm(offset, count, flags) => unix_locks::x_shm_lock(&mut world.locks, who, offset, count, flags),
            At(_) => panic!("a mark is no call"),
        };
        assert!(matches!(code, rc::OK | rc::BUSY), "{} is outside the protocol", self.describe());
        let ok = code == rc::OK;
        let reply = if ok { Reply::Ok } else { Reply::Busy };
        let connection = &mut world.connections[who];
        let (state, row) = match self.step.call {
            Lock(to) => connection.state.lock_done(to, reply, || scenario.shm_exists()),
            Unlock(to) => connection.state.unlock_done(to, reply, || None),
            Shm(offset, count, flags) => connection.state.shm_done(request(offset, count, flags), reply),
            At(_) => panic!("a mark is no call"),
        };
        connection.state = state;
        let lends = self.step.call == Lock(Exclusive) && !ok && before >= Reserved && scenario.shm_exists();
        connection.is_lent = lends || (connection.is_lent && matches!(self.step.call, Shm(..)));
        if matches!(row, Row::G2 | Row::G4) && scenario.design != Design::NoResetGuard {
            return vec![(Did::CallReal(ok), self.at(world, Phase::GiveBack(ok)))];
        }
        self.settle(world, ok, Did::CallReal(ok))
    }

    /// `Driver::settle`: a step of its own only if the gate has to follow.
    fn settle(&self, world: World, ok: bool, did: Did) -> Vec<(Did, World)> {
        let connection = &world.connections[self.who];
        if self.wants_gate(connection) == connection.holds_gate {
            return self.answer(world, ok, did);
        }
        vec![(did, self.at(world, Phase::Settle(ok)))]
    }

    fn wants_gate(&self, connection: &Connection) -> bool {
        match self.scenario.design {
            Design::NoWal => connection.state.level() >= Reserved && !connection.is_lent,
            Design::ForgetsShmUnlock if matches!(self.step.call, Shm(..)) => connection.holds_gate,
            _ => connection.state.wants_gate(),
        }
    }

    fn follow(&self, mut world: World, ok: bool) -> Vec<(Did, World)> {
        let holds_gate = world.connections[self.who].holds_gate;
        if !holds_gate && !self.scenario.is_gate_free(&world, self.who) {
            return vec![]; // Design::AcquiresLast waits
        }
        world.connections[self.who].holds_gate = !holds_gate;
        self.answer(world, ok, if holds_gate { Did::ReleaseGate } else { Did::AcquireGate })
    }

    /// SQLite has its answer, and goes on.
    fn answer(&self, world: World, ok: bool, did: Did) -> Vec<(Did, World)> {
        let places = if ok { &self.step.ok } else { &self.step.busy };
        assert!(!places.is_empty(), "{} is not told BUSY", self.describe());
        let go_on = |&place: &Place| {
            let mut world = self.at(
                self.with_gated_checkpoints(world, self.scenario.policy == CheckpointPolicy::Gate),
                Phase::Call,
            );
            world.connections[self.who].place = place;
            (did, world)
        };
        places.iter().map(go_on).collect()
    }

    fn at(&self, mut world: World, phase: Phase) -> World {
        world.connections[self.who].phase = phase;
        world
    }

    fn describe(&self) -> String {
        let program = self.scenario.programs[self.who];
        let name = char::from(b"ABCD"[self.who]);
        let (label, call, ..) = program.steps[usize::from(self.place)];
        format!("{name} ({}), at \"{label}\": {call:?}", program.name)
    }
}

fn request(offset: c_int, count: c_int, flags: c_int) -> ShmRequest {
    ShmRequest::from_raw(offset, count, flags).expect("a request of SQLite's")
}

// The search.

#[derive(Clone, Copy, Debug, Default)]
struct Size {
    worlds: usize,
    steps: usize,
}

/// A way into trouble, the shortest that there is.
struct Counterexample {
    invariant: &'static str,
    trace: String,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is broken by:\n{}", self.invariant, self.trace)
    }
}

/// Hashes worlds; the standard hasher takes most of the time in a debug build.
#[derive(Default)]
struct Quick(u64);

impl Hasher for Quick {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u8(*byte);
        }
    }
    fn write_u8(&mut self, byte: u8) {
        self.write_u64(u64::from(byte));
    }
    fn write_isize(&mut self, discriminant: isize) {
        self.write_u64(discriminant.cast_unsigned() as u64);
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    fn finish(&self) -> u64 {
        self.0.rotate_left(20)
    }
}

/// Every world found so far, and how.
struct Graph {
    worlds: Vec<World>,
    /// The first way there: from which world, by which action.
    ways: Vec<Option<(usize, Action)>>,
    /// From which worlds one comes there without a crash (I3).
    before: Vec<Vec<usize>>,
}

/// Searches all of a scenario.
fn explore(scenario: &Scenario) -> Result<Size, Counterexample> {
    let start = scenario.start();
    let mut graph = Graph { worlds: vec![start], ways: vec![None], before: vec![vec![]] };
    let mut indices = HashMap::<World, usize, BuildHasherDefault<Quick>>::from_iter([(start, 0)]);
    let mut size = Size::default();
    while size.worlds < graph.worlds.len() {
        let from = size.worlds;
        let world = graph.worlds[from];
        size.worlds += 1;
        scenario.check(&world).map_err(|invariant| graph.counterexample(scenario, invariant, from, None))?;
        for (action, next) in scenario.next(&world) {
            size.steps += 1;
            scenario
                .check_action(&world, action)
                .map_err(|invariant| graph.counterexample(scenario, invariant, from, Some(action)))?;
            let to = *indices.entry(next).or_insert_with(|| graph.add(next, from, action));
            if !matches!(action, Action::Crash { .. }) {
                graph.before[to].push(from);
            }
        }
    }
    match graph.stuck() {
        Some(world) => Err(graph.counterexample(scenario, "I3", world, None)),
        None => Ok(size),
    }
}

impl Graph {
    fn add(&mut self, world: World, from: usize, action: Action) -> usize {
        self.worlds.push(world);
        self.ways.push(Some((from, action)));
        self.before.push(vec![]);
        self.worlds.len() - 1
    }

    /// The first world from which not everyone can finish.
    fn stuck(&self) -> Option<usize> {
        let is_end = |&index: &usize| self.worlds[index].connections.iter().all(|c| c.place.is_none());
        let mut queue: Vec<usize> = (0..self.worlds.len()).filter(is_end).collect();
        let mut can_finish = vec![false; self.worlds.len()];
        queue.iter().for_each(|&end| can_finish[end] = true);
        while let Some(index) = queue.pop() {
            for &before in &self.before[index] {
                if !can_finish[before] {
                    can_finish[before] = true;
                    queue.push(before);
                }
            }
        }
        can_finish.iter().position(|can_finish| !can_finish)
    }

    fn counterexample(
        &self,
        scenario: &Scenario,
        invariant: &'static str,
        mut index: usize,
        last: Option<Action>,
    ) -> Counterexample {
        let mut actions: Vec<Action> = last.into_iter().collect();
        while let Some((from, action)) = self.ways[index] {
            actions.push(action);
            index = from;
        }
        let mut trace = String::new();
        for action in actions.into_iter().rev() {
            match action {
                Action::Step { who, place, did } => {
                    let turn = Turn { scenario, who, place, step: &scenario.steps[who][usize::from(place)] };
                    writeln!(trace, "  {} -> {did:?}", turn.describe()).expect("a String");
                }
                other => writeln!(trace, "  {other:?}").expect("a String"),
            }
        }
        Counterexample { invariant, trace }
    }
}

// The tests.

fn explore_all(scenarios: &[(&[&'static Program], OsUnix)], policies: &[CheckpointPolicy]) {
    let mut total = Size::default();
    for &(programs, os_unix) in scenarios {
        for &policy in policies {
            let scenario = Scenario::new(programs, policy, os_unix, Design::Shim);
            let size =
                explore(&scenario).unwrap_or_else(|counterexample| panic!("{policy:?}: {counterexample}"));
            total.worlds += size.worlds;
            total.steps += size.steps;
        }
    }
    println!("{} scenarios x {} policies: {total:?}", scenarios.len(), policies.len());
}

const POLICIES: [CheckpointPolicy; 3] =
    [CheckpointPolicy::Free, CheckpointPolicy::Gate, CheckpointPolicy::Auto];

#[test]
fn every_two_get_along() {
    let pairs: Vec<[&'static Program; 2]> = (0..PROGRAMS.len())
        .flat_map(|first| (first..PROGRAMS.len()).map(move |second| [PROGRAMS[first], PROGRAMS[second]]))
        .collect();
    let scenarios: Vec<(&[&'static Program], OsUnix)> = pairs
        .iter()
        .flat_map(|pair| [OsUnix::Recent, OsUnix::Older].map(|os_unix| (&pair[..], os_unix)))
        .collect();
    explore_all(&scenarios, &POLICIES);
}

#[test]
fn every_three_get_along() {
    let all = 0..PROGRAMS.len();
    let triples: Vec<[&'static Program; 3]> = all
        .clone()
        .flat_map(|a| all.clone().map(move |b| (a, b)))
        .flat_map(|(a, b)| all.clone().map(move |c| (a, b, c)))
        .filter(|&(a, b, c)| a <= b && b <= c)
        .map(|(a, b, c)| [PROGRAMS[a], PROGRAMS[b], PROGRAMS[c]])
        .collect();
    let scenarios: Vec<(&[&'static Program], OsUnix)> =
        triples.iter().map(|triple| (&triple[..], OsUnix::Recent)).collect();
    explore_all(&scenarios, &[CheckpointPolicy::Free]);
}

#[test]
fn four_get_along() {
    explore_all(
        &[
            (&[&WRITER, &WRITER, &UPGRADER, &READER], OsUnix::Recent),
            (&[&WRITER, &UPGRADER, &HOT_JOURNAL, &READER], OsUnix::Older),
            (&[&LEAVE_WAL, &WAL_WRITER, &CHECKPOINTER, &RECOVERER], OsUnix::Recent),
            (&[&WAL_RESTARTER, &FULL_CHECKPOINTER, &CHECKPOINTER, &WAL_READER], OsUnix::Recent),
        ],
        &POLICIES,
    );
}

/// Each wrong design is found out, by the invariant that it breaks.
#[test]
fn wrong_designs_are_found_out() {
    let wrong: [(Design, &[&'static Program], &str); 15] = [
        // Each keeps the other from going on: one the gate, the other SHARED.
        (Design::Blocking, &[&WRITER, &WRITER], "I3"),
        // The same in WAL mode: the gate and WRITE here, a read mark there.
        (Design::Blocking, &[&FULL_CHECKPOINTER, &WAL_WRITER], "I3"),
        // SQLite's walthread test: RESERVED and the gate here, SHARED for life there.
        (Design::NeverLends, &[&LEAVE_WAL, &WAL_WRITER], "I3"),
        (Design::NoResetGuard, &[&WAL_RESTARTER, &CHECKPOINTER], "I5"),
        (Design::NoWal, &[&WAL_WRITER], "I2"),
        (Design::ReleasesFirst, &[&WRITER], "I2"),
        (Design::ReleasesFirst, &[&WAL_WRITER], "I2"),
        (Design::AcquiresLast, &[&WRITER], "I2"),
        (Design::AcquiresLast, &[&WAL_WRITER], "I2"),
        (Design::GatesRecovery, &[&RECOVERER], "I4"),
        (Design::PosixGate, &[&WRITER, &WRITER], "I1"),
        (Design::ForgetsShmUnlock, &[&WAL_WRITER], "I2"),
        // One has the gate and waits for the read mark that the other keeps while it waits for the gate.
        (Design::AwaitsWithSlots, &[&FULL_CHECKPOINTER, &SNAPSHOT_RECOVERER], "I3"),
        (Design::TakesItForHad, &[&WAL_WRITER, &CHECKPOINTER], "I2"),
        // With the gate or without, the WAL must not be restarted under a checkpointer.
        (Design::NoResetGuard, &[&WAL_RESTARTER, &CHECKPOINTER], "I5"),
    ];
    let k3_from = wrong.len() - 3;
    for (place, (design, programs, invariant)) in wrong.into_iter().enumerate() {
        let policy = if place < k3_from { CheckpointPolicy::Free } else { CheckpointPolicy::Auto };
        let scenario = Scenario::new(programs, policy, OsUnix::Recent, design);
        let found = explore(&scenario).err().unwrap_or_else(|| panic!("{design:?} passes"));
        println!("{design:?}: {found}");
        assert_eq!(found.invariant, invariant, "{design:?}: {found}");
        // It is the design that is wrong, not the programs.
        let right = Scenario::new(programs, policy, OsUnix::Recent, Design::Shim);
        explore(&right).unwrap_or_else(|counterexample| panic!("{counterexample}"));
    }
}

/// I6 and "not told BUSY": a program that forgets to unlock is found out.
#[test]
fn a_wrong_program_is_found_out() {
    const FORGETS: Program = Program {
        name: "forgets",
        reads_only: true,
        writes_wal: false,
        is_wal: false,
        steps: &[("begin", Lock(Shared), &[END], &["begin"])],
    };
    let scenario = Scenario::new(&[&FORGETS], CheckpointPolicy::Free, OsUnix::Recent, Design::Shim);
    assert_eq!(explore(&scenario).err().map(|found| found.invariant), Some("I6"));
}
