//! Level 4: the real driver under a seeded simulation.
//!
//! ## Covers
//! Three connections, each a real `Driver` with a [`FakeGate`] over a model of os_unix (`unix_locks.rs`), make
//! random calls: mostly those that SQLite could make next, some raw ones, outside the protocol too (row X1).
//! Any call may meet a fault: the real VFS answers BUSY or an error without doing anything, does it and still
//! answers an error, or panics; the gate fails with an error of its own. An outsider takes and releases the
//! gate. `-shm` is there or not; `SQLITE_FCNTL_LOCKSTATE` answers or not; files are poisoned.
//!
//! The fakes write down what they are asked, and in which order. After each call [`Simulation::judge`] holds
//! that, and the answer, against this file's own account of each connection ([`Account`]):
//!
//! - the gate is acquired before the real VFS is called, and released after it; never twice;
//! - refused, or failed: the real VFS was not called, the answer is SQLITE_BUSY, or the error;
//! - a call that needs no gate does not touch it: a reader never does;
//! - a restart of the WAL is preceded by winning CKPT, and CKPT is given back after it;
//! - **at the instant** when the real VFS grants a write lock, and when the gate is released, the gate is held
//!   by its connection for every write lock that it holds;
//! - between calls the gate is held exactly while there is a reason, by the account and by `wants_gate()`;
//! - poisoned: what needs the gate is SQLITE_IOERR_LOCK and not forwarded; an unlock is;
//! - at the end, everything unlocked and unmapped, the gate is free.
//!
//! Wrong drivers and gates ([`Sabotage`]) must be found out.
//!
//! ## Seeds
//! Each run has a new seed; a failure prints it with the shortest sequence that still fails. To see it again:
//! `KANBANLOCK_SEED=<number> cargo test --lib simulation`. Nothing is written to disk.
//!
//! ## Does not cover
//! Interleavings within a call: a call is one step here, `model.rs` has them all. Waiting: the bounded wait of
//! row K1 is one attempt here. The lock file itself: `gate.rs`'s own tests, and the tests with processes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use crate::driver::Driver;
use crate::error::rc;
use crate::gate::Gate;
use crate::lock::{Environment, LockLevel, Purpose, RealLocks};
use crate::state::CheckpointPolicy;
use crate::tests::unix_locks::{
    self, CKPT, LOCK_EXCLUSIVE, LOCK_SHARED, Locks, OsUnix, READS, READS_1_TO_4, UNLOCK_EXCLUSIVE,
    UNLOCK_SHARED, WRITE,
};

const CONNECTIONS: usize = 3;
const NONE: c_int = 0;
const SHARED: c_int = 1;
const RESERVED: c_int = 2;
const PENDING: c_int = 3;
const EXCLUSIVE: c_int = 4;

// What happens.

/// A call of SQLite's on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Lock(c_int),
    Unlock(c_int),
    Shm(c_int, c_int, c_int),
    Unmap,
}

use Call::{Lock, Shm, Unlock, Unmap};

/// What a call meets in the real VFS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// What the model of os_unix answers.
    None,
    /// This code, nothing done.
    Fails(c_int),
    /// This code, although done.
    DoneButFails(c_int),
    Panics,
    /// Does it, and then panics.
    DoneButPanics,
}

/// What the world is like during one call.
#[derive(Clone, Copy, Debug)]
struct Weather {
    fault: Fault,
    /// The fault meets the call of this number: the guard's CKPT is a call of its own.
    fault_at: usize,
    /// The gate fails with this code.
    gate_fails: Option<c_int>,
    shm_exists: bool,
    /// Others use the `-shm` that this file has mapped.
    others_use_shm: bool,
    /// A file is not in its place: this code.
    moved: Option<c_int>,
    tells_lock_state: bool,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    /// The call of that number, of those that SQLite could make next.
    Next(usize, usize, Weather),
    /// Any call at all.
    Raw(usize, Call, Weather),
    /// The outsider takes the gate if it is free, or releases it.
    Outsider,
    /// A callback panics before the driver is reached.
    Poison(usize),
}

/// One test case.
#[derive(Clone, Debug)]
struct Script {
    policy: CheckpointPolicy,
    os_unix: OsUnix,
    acts: Vec<Act>,
}

fn script() -> impl Strategy<Value = Script> {
    let policy = prop_oneof![Just(CheckpointPolicy::Free), Just(CheckpointPolicy::Gate)];
    let os_unix = prop_oneof![Just(OsUnix::Recent), Just(OsUnix::Older)];
    (policy, os_unix, prop::collection::vec(act(), 0..160)).prop_map(|(policy, os_unix, acts)| Script {
        policy,
        os_unix,
        acts,
    })
}

fn act() -> impl Strategy<Value = Act> {
    // One is busier than the others: it gets further.
    let who = prop_oneof![3 => Just(0_usize), 1 => 1..CONNECTIONS];
    prop_oneof![
        600 => (who.clone(), 0..1000_usize, weather()).prop_map(|(who, number, weather)| Act::Next(who, number, weather)),
        40 => (who.clone(), call(), weather()).prop_map(|(who, call, weather)| Act::Raw(who, call, weather)),
        10 => Just(Act::Outsider),
        1 => who.prop_map(Act::Poison),
    ]
}

fn call() -> impl Strategy<Value = Call> {
    let flags = prop_oneof![
        Just(LOCK_SHARED),
        Just(LOCK_EXCLUSIVE),
        Just(UNLOCK_SHARED),
        Just(UNLOCK_EXCLUSIVE),
        0..16_i32,
    ];
    prop_oneof![
        (-1..6_i32).prop_map(Lock),
        (-1..6_i32).prop_map(Unlock),
        (-1..9_i32, -1..9_i32, flags).prop_map(|(offset, count, flags)| Shm(offset, count, flags)),
        Just(Unmap),
    ]
}

fn weather() -> impl Strategy<Value = Weather> {
    const BUSY_RECOVERY: c_int = rc::BUSY | (1 << 8);
    let code = prop_oneof![
        4 => Just(rc::BUSY),
        1 => Just(BUSY_RECOVERY),
        4 => Just(rc::IOERR_LOCK),
        1 => Just(rc::IOERR_UNLOCK),
        1 => Just(rc::NOMEM),
    ];
    let fault = prop_oneof![
        600 => Just(Fault::None),
        40 => code.prop_map(Fault::Fails),
        15 => Just(Fault::DoneButFails(rc::IOERR_UNLOCK)),
        1 => prop_oneof![Just(Fault::Panics), Just(Fault::DoneButPanics)],
    ];
    let gate_fails =
        prop_oneof![40 => Just(None), 1 => Just(Some(rc::CANTOPEN)), 1 => Just(Some(rc::IOERR_LOCK))];
    let others_use_shm = prop_oneof![9 => Just(false), 1 => Just(true)];
    let moved = prop_oneof![40 => Just(None), 1 => Just(Some(rc::READONLY_DBMOVED))];
    (fault, 0..3_usize, gate_fails, any::<bool>(), others_use_shm, moved, any::<bool>()).prop_map(
        |(fault, fault_at, gate_fails, shm_exists, others_use_shm, moved, tells_lock_state)| Weather {
            fault,
            fault_at: fault_at / 2, // the first call twice as often as the second
            gate_fails,
            shm_exists,
            others_use_shm,
            moved,
            tells_lock_state,
        },
    )
}

// The world beneath the drivers.

/// What the fakes were asked during one call, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Granted,
    Refused,
    GateFailed(c_int),
    /// The real VFS was called, and answered.
    Real(Call, c_int),
    Panicked,
    /// The driver asked whether the files are in their places, for EXCLUSIVE or not.
    Looked(Purpose),
    /// The driver told that they may not be any more.
    Doubted,
    /// The driver was told that others use the `-shm`.
    SharedShm,
    Released,
}

const WRITE_SLOT: c_int = 0;
const GUARD: Call = Shm(1, 1, LOCK_EXCLUSIVE);
const UNGUARD: Call = Shm(1, 1, UNLOCK_EXCLUSIVE);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Connection(usize),
    Outsider,
}

/// A wrong driver, or a wrong gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sabotage {
    None,
    /// The driver releases the gate, then unlocks.
    ReleasesFirst,
    /// The driver calls the real VFS, then acquires the gate.
    AcquiresLast,
    /// The driver forwards a call although it was refused.
    ForwardsRefused,
    /// The driver takes the gate for readers too.
    GatesReaders,
    /// The driver drops the guard's CKPT before the restart is over.
    DropsGuard,
    /// The gate is granted while another holds it.
    GrantsTwice,
    /// The gate is not released, but says so.
    KeepsGate,
}

struct World {
    locks: [Locks; CONNECTIONS],
    accounts: [Account; CONNECTIONS],
    gate: Option<Holder>,
    events: Vec<Event>,
    /// What was wrong at an instant within a call.
    wrong: Vec<String>,
    weather: Weather,
    os_unix: OsUnix,
    sabotage: Sabotage,
}

/// What SQLite was told that one connection holds; the reasons are counted from this.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    level: c_int,
    excl: u8,
    shared: u8,
    /// Rows L2w, L7w.
    is_lent: bool,
    /// WRITE is held as a writer.
    is_writer: bool,
    /// CKPT is held, and was asked for alone under the policy `gate`.
    is_gated_checkpoint: bool,
    /// The reset guard has CKPT.
    is_guarded: bool,
    is_poisoned: bool,
}

impl Account {
    fn has_reason(&self) -> bool {
        (self.level >= RESERVED && !self.is_lent) || self.is_writer || self.is_gated_checkpoint
    }

    fn is_upgrade(&self, call: Call) -> bool {
        matches!(
            (self.level, call),
            (SHARED, Lock(RESERVED)) | (SHARED | RESERVED | PENDING, Lock(EXCLUSIVE))
        )
    }

    /// Row L2w: an upgrade, but it needs no gate.
    fn reserves_in_wal_mode(&self, call: Call) -> bool {
        (self.level, call) == (SHARED, Lock(RESERVED)) && self.shared & READS != 0
    }

    /// WRITE as a writer or checkpointer.
    fn is_write(&self, call: Call) -> bool {
        let is_transaction = self.shared & READS != 0 || self.excl & CKPT != 0;
        is_transaction && exclusive_slots(call).is_some_and(|slots| slots & WRITE != 0)
    }

    fn needs_gate(&self, call: Call, policy: CheckpointPolicy) -> bool {
        let is_checkpoint = policy == CheckpointPolicy::Gate && exclusive_slots(call) == Some(CKPT);
        let is_upgrade = self.is_upgrade(call) && !self.reserves_in_wal_mode(call);
        is_upgrade || self.is_write(call) || is_checkpoint
    }

    fn is_reset(&self, call: Call) -> bool {
        exclusive_slots(call) == Some(READS_1_TO_4)
            && self.excl & WRITE != 0
            && self.excl & CKPT == 0
            && !self.is_guarded
    }

    fn ends_reset(&self, call: Call) -> bool {
        self.is_guarded && unlock_slots(call).is_some_and(|slots| slots & READS_1_TO_4 == READS_1_TO_4)
    }
}

fn exclusive_slots(call: Call) -> Option<u8> {
    match call {
        Shm(offset, count, LOCK_EXCLUSIVE) => unix_locks::mask(offset, count),
        _ => None,
    }
}

fn unlock_slots(call: Call) -> Option<u8> {
    match call {
        Shm(offset, count, UNLOCK_SHARED | UNLOCK_EXCLUSIVE) => unix_locks::mask(offset, count),
        _ => None,
    }
}

impl World {
    /// A call reaches the real VFS.
    fn real(&mut self, who: usize, call: Call) -> c_int {
        let number = self.events.iter().filter(|event| matches!(event, Event::Real(..))).count();
        let fault = if number == self.weather.fault_at { self.weather.fault } else { Fault::None };
        let code = match fault {
            Fault::Panics | Fault::DoneButPanics => {
                if fault == Fault::DoneButPanics {
                    self.os_unix(who, call);
                }
                self.events.push(Event::Panicked);
                // Unlike panic!, it does not run the panic hook, which would fill the log.
                resume_unwind(Box::new("the real VFS panics"));
            }
            Fault::None => self.os_unix(who, call),
            // os_unix never fails to unmap; another VFS may say so, but the slots are gone.
            Fault::Fails(code) if call != Unmap => code,
            // A lock that fails although it is won does not exist; an unlock that does, does.
            Fault::DoneButFails(code)
                if matches!(call, Lock(_) | Shm(_, _, LOCK_SHARED | LOCK_EXCLUSIVE)) =>
            {
                code
            }
            Fault::Fails(code) | Fault::DoneButFails(code) => {
                self.os_unix(who, call);
                code
            }
        };
        self.events.push(Event::Real(call, code));
        code
    }

    fn os_unix(&mut self, who: usize, call: Call) -> c_int {
        let before = self.locks[who];
        let code = match call {
            Lock(to) => match LockLevel::from_raw(to) {
                Some(to) => unix_locks::x_lock(&mut self.locks, who, to, self.os_unix),
                None => unix_locks::MISUSE,
            },
            Unlock(to) => match LockLevel::from_raw(to) {
                Some(to) => unix_locks::x_unlock(&mut self.locks[who], to),
                None => unix_locks::MISUSE,
            },
            Shm(offset, count, flags) => unix_locks::x_shm_lock(&mut self.locks, who, offset, count, flags),
            Unmap => {
                unix_locks::x_shm_unmap(&mut self.locks[who]);
                rc::OK
            }
        };
        let account = self.accounts[who];
        let is_higher = self.locks[who].level > before.level && self.locks[who].level >= LockLevel::Reserved;
        let is_writer = code == rc::OK && account.is_write(call);
        // After a panic a real lock may be there that SQLite was not told of. It will not build on it; Act::Raw may.
        let is_raw = account.is_poisoned && !account.is_upgrade(call);
        let needs_none = is_raw || account.reserves_in_wal_mode(call);
        if (is_higher || is_writer) && !needs_none && self.gate != Some(Holder::Connection(who)) {
            self.wrong.push(format!("{call:?} is granted while the gate is {:?}", self.gate));
        }
        code
    }

    /// The gate is about to be released: is what it stands for unlocked?
    fn check_release(&mut self, who: usize) {
        let (locks, account) = (self.locks[who], self.accounts[who]);
        if account.is_poisoned {
            return; // a panic may have left a real lock that the driver knows nothing of, and SQLite neither
        }
        // RESERVED and PENDING may be lent by this very call, which `judge` looks into.
        if locks.level == LockLevel::Exclusive || (account.is_writer && locks.excl & WRITE != 0) {
            self.wrong.push(format!("the gate is released with {locks:?} still held"));
        }
    }
}

#[derive(Clone)]
struct Fake {
    world: Rc<RefCell<World>>,
    who: usize,
}

impl RealLocks for Fake {
    fn x_lock(&self, level: c_int) -> c_int {
        self.real(Lock(level))
    }
    fn x_unlock(&self, level: c_int) -> c_int {
        self.real(Unlock(level))
    }
    fn x_shm_lock(&self, offset: c_int, count: c_int, flags: c_int) -> c_int {
        self.real(Shm(offset, count, flags))
    }
    fn x_shm_unmap(&self, _delete: c_int) -> c_int {
        self.real(Unmap)
    }
    fn lock_state(&self) -> Option<LockLevel> {
        let world = self.world.borrow();
        world.weather.tells_lock_state.then(|| world.locks[self.who].level)
    }
}

impl Environment for Fake {
    fn shm_exists(&self) -> bool {
        self.world.borrow().weather.shm_exists
    }
    fn others_use_shm(&self) -> bool {
        let mut world = self.world.borrow_mut();
        if world.weather.others_use_shm {
            world.events.push(Event::SharedShm);
        }
        world.weather.others_use_shm
    }
    fn check_places(&self, purpose: Purpose) -> Result<(), c_int> {
        let mut world = self.world.borrow_mut();
        world.events.push(Event::Looked(purpose));
        if world.gate != Some(Holder::Connection(self.who)) {
            world.wrong.push("the places are looked at without the gate".to_owned());
        }
        world.weather.moved.map_or(Ok(()), Err)
    }
    fn wal_changes(&self) -> u32 {
        0
    }
    fn wal_size(&self) -> u64 {
        0
    }
    fn invalidate_place_check(&self) {
        self.world.borrow_mut().events.push(Event::Doubted);
    }
}

impl Fake {
    fn real(&self, call: Call) -> c_int {
        self.world.borrow_mut().real(self.who, call)
    }
}

struct FakeGate {
    fake: Fake,
    is_held: Cell<bool>,
}

impl Gate for FakeGate {
    fn try_acquire(&self) -> Result<bool, c_int> {
        let mut world = self.fake.world.borrow_mut();
        if self.is_held.get() {
            world.wrong.push("the gate is acquired twice".to_owned());
        }
        if let Some(code) = world.weather.gate_fails {
            world.events.push(Event::GateFailed(code));
            return Err(code);
        }
        if world.gate.is_some() && world.sabotage != Sabotage::GrantsTwice {
            world.events.push(Event::Refused);
            return Ok(false);
        }
        world.gate = Some(Holder::Connection(self.fake.who));
        world.events.push(Event::Granted);
        self.is_held.set(true);
        Ok(true)
    }

    fn await_acquire(&self) -> Result<bool, c_int> {
        self.try_acquire()
    }

    fn transaction_over(&self) {}

    fn wanted_in_vain(&self) {}

    fn shared_refused(&self) {}

    fn answers_busy(&self) {}

    fn exclusive_begin(&self) {}

    fn exclusive_end(&self, _: bool) {}

    fn release(&self) {
        if !self.is_held.replace(false) {
            return;
        }
        let mut world = self.fake.world.borrow_mut();
        world.check_release(self.fake.who);
        world.events.push(Event::Released);
        if world.sabotage != Sabotage::KeepsGate {
            world.gate = None;
        }
    }

    fn is_held(&self) -> bool {
        self.is_held.get()
    }
}

// The simulation.

/// How often what was seen: a simulation in which nothing happens proves nothing.
type Sights = BTreeMap<&'static str, u64>;

struct Simulation {
    world: Rc<RefCell<World>>,
    drivers: Vec<Driver<FakeGate>>,
    policy: CheckpointPolicy,
    sights: Sights,
}

const CALM: Weather = Weather {
    fault: Fault::None,
    fault_at: 0,
    gate_fails: None,
    shm_exists: true,
    others_use_shm: false,
    moved: None,
    tells_lock_state: true,
};

impl Simulation {
    fn new(script: &Script, sabotage: Sabotage) -> Simulation {
        let world = Rc::new(RefCell::new(World {
            locks: Default::default(),
            accounts: Default::default(),
            gate: None,
            events: vec![],
            wrong: vec![],
            weather: CALM,
            os_unix: script.os_unix,
            sabotage,
        }));
        let gate = |who| FakeGate { fake: Fake { world: Rc::clone(&world), who }, is_held: Cell::new(false) };
        let drivers = (0..CONNECTIONS).map(|who| Driver::new(script.policy, gate(who))).collect();
        Simulation { world, drivers, policy: script.policy, sights: Sights::new() }
    }

    fn run(&mut self, script: &Script) -> Result<(), String> {
        for (index, &act) in script.acts.iter().enumerate() {
            self.act(act).map_err(|what| format!("act {index}, {act:?}: {what}"))?;
        }
        self.end().map_err(|what| format!("at the end: {what}"))
    }

    fn act(&mut self, act: Act) -> Result<(), String> {
        match act {
            Act::Next(who, number, weather) => {
                let calls = self.next_calls(who);
                self.call(who, calls[number % calls.len()], weather)
            }
            Act::Raw(who, call, weather) => self.call(who, call, weather),
            Act::Outsider => {
                let mut world = self.world.borrow_mut();
                world.gate = match world.gate {
                    None => Some(Holder::Outsider),
                    Some(Holder::Outsider) => None,
                    held => held,
                };
                Ok(())
            }
            Act::Poison(who) => {
                self.drivers[who].poison();
                self.world.borrow_mut().accounts[who].is_poisoned = true;
                Ok(())
            }
        }
    }

    /// What SQLite could call next on this connection. It may do so more than once, and out of its order.
    fn next_calls(&self, who: usize) -> Vec<Call> {
        let Account { level, excl, shared, .. } = self.world.borrow().accounts[who];
        let mut calls = match level {
            NONE => vec![Lock(SHARED)],
            SHARED => vec![Lock(RESERVED), Lock(EXCLUSIVE), Unlock(NONE)],
            EXCLUSIVE => vec![Lock(SHARED), Unlock(SHARED), Unlock(NONE)],
            _ => vec![Lock(EXCLUSIVE), Lock(EXCLUSIVE), Unlock(SHARED), Unlock(NONE)],
        };
        for slot in 0..8 {
            let bit = 1 << slot;
            match (excl & bit != 0, shared & bit != 0) {
                (true, _) if bit & READS_1_TO_4 == 0 => calls.push(Shm(slot, 1, UNLOCK_EXCLUSIVE)),
                (true, _) => calls.push(Shm(4, 4, UNLOCK_EXCLUSIVE)),
                (_, true) => calls.push(Shm(slot, 1, UNLOCK_SHARED)),
                _ if matches!(bit, WRITE | CKPT) => calls.push(Shm(slot, 1, LOCK_EXCLUSIVE)),
                _ if bit & READS != 0 && shared & READS == 0 => calls.push(Shm(slot, 1, LOCK_SHARED)),
                _ => {}
            }
        }
        if excl & WRITE != 0 {
            calls.push(Shm(1, 2, LOCK_EXCLUSIVE));
            calls.push(Shm(4, 4, LOCK_EXCLUSIVE));
        } else {
            calls.push(Unmap);
        }
        calls
    }

    /// Makes one call, and judges it.
    fn call(&mut self, who: usize, call: Call, weather: Weather) -> Result<(), String> {
        let before = {
            let mut world = self.world.borrow_mut();
            world.events.clear();
            world.weather = weather;
            world.accounts[who]
        };
        let held_before = self.holds_gate(who);
        let answer = catch_unwind(AssertUnwindSafe(|| self.drive(who, call, weather)));
        if let Err(panic) = &answer {
            // As file.rs does. Only the panic that was asked for: an assertion of the driver's is a finding.
            if !self.world.borrow().events.contains(&Event::Panicked) {
                let text = panic.downcast_ref::<String>().map_or("", |text| text);
                return Err(format!("the driver panics: {text}"));
            }
            self.drivers[who].poison();
        }
        let answer = answer.unwrap_or(rc::IOERR_LOCK);
        let events = self.world.borrow().events.clone();
        self.judge(who, call, answer, &events, before, held_before)
            .map_err(|what| format!("{what}: {call:?} answered {answer}, {events:?}, before: {before:?}"))
    }

    /// The driver, or the sabotaged one.
    fn drive(&self, who: usize, call: Call, weather: Weather) -> c_int {
        let driver = &self.drivers[who];
        let real = Fake { world: Rc::clone(&self.world), who };
        let gate = driver.gate();
        let (sabotage, account) = {
            let world = self.world.borrow();
            (world.sabotage, world.accounts[who])
        };
        let ends_reason = match call {
            Unlock(NONE | SHARED) => !Account { level: NONE, ..account }.has_reason(),
            Shm(WRITE_SLOT, 1, UNLOCK_EXCLUSIVE) => !Account { is_writer: false, ..account }.has_reason(),
            _ => false,
        };
        match sabotage {
            Sabotage::ReleasesFirst if weather.fault == Fault::None && ends_reason => gate.release(),
            Sabotage::AcquiresLast if account.needs_gate(call, self.policy) && !account.has_reason() => {
                let code = real.real(call);
                if code == rc::OK {
                    let _ = gate.try_acquire();
                }
                return code;
            }
            Sabotage::GatesReaders if matches!(call, Lock(SHARED)) && !gate.is_held() => {
                let _ = gate.try_acquire();
            }
            Sabotage::DropsGuard if account.ends_reset(call) => {
                let _ = real.unlock_ckpt();
            }
            _ => {}
        }
        let code = match call {
            Lock(level) => driver.x_lock(&real, level, &real),
            Unlock(level) => driver.x_unlock(&real, level),
            Shm(offset, count, flags) => driver.x_shm_lock(&real, offset, count, flags, &real),
            Unmap => driver.x_shm_unmap(&real, 0),
        };
        let was_refused = self.world.borrow().events.contains(&Event::Refused);
        if sabotage == Sabotage::ForwardsRefused && was_refused {
            return real.real(call);
        }
        code
    }

    fn holds_gate(&self, who: usize) -> bool {
        self.world.borrow().gate == Some(Holder::Connection(who))
    }

    /// Holds what happened against the account, and keeps the account.
    fn judge(
        &mut self,
        who: usize,
        call: Call,
        answer: c_int,
        events: &[Event],
        before: Account,
        held_before: bool,
    ) -> Result<(), String> {
        if let Some(what) = self.world.borrow().wrong.first() {
            return Err(what.clone());
        }
        let needs_gate = before.needs_gate(call, self.policy);
        let (first, rest) = events.split_first().map_or((None, events), |(first, rest)| (Some(*first), rest));
        let is_gate = |event: &Event| matches!(event, Event::Granted | Event::Refused | Event::GateFailed(_));
        check(!rest.iter().any(is_gate), "the gate is asked for late")?;
        let last = events.len().saturating_sub(1);
        let is_early = |(index, event): (usize, &Event)| *event == Event::Released && index != last;
        check(!events.iter().enumerate().any(is_early), "the gate is released before the end")?;

        // Not forwarded: poisoned, refused, failed.
        if before.is_poisoned && (needs_gate || before.is_upgrade(call) || before.is_reset(call)) {
            self.see("P1: refused");
            check(events.is_empty() && answer == rc::IOERR_LOCK, "poisoned, and yet it goes on")?;
            return self.check_between(who);
        }
        let asks_gate = first.as_ref().is_some_and(is_gate);
        check(
            asks_gate == (needs_gate && !held_before),
            "the gate is asked for without need, or not asked for",
        )?;
        let code = match first {
            Some(Event::Refused) => Some(rc::BUSY),
            Some(Event::GateFailed(code)) => Some(code),
            _ => None,
        };
        if let Some(code) = code {
            self.see(if code == rc::BUSY { "the gate is refused" } else { "the gate fails" });
            let expected: &[Event] = if first == Some(Event::Refused) { &[Event::Doubted] } else { &[] };
            check(rest == expected && answer == code, "refused, and yet it goes on")?;
            return self.check_between(who);
        }

        // Row M1: after each acquisition, and only then.
        let looks = events.iter().filter(|event| matches!(event, Event::Looked(_))).count();
        check(
            looks == usize::from(first == Some(Event::Granted)),
            "the places are not looked at once for each acquisition",
        )?;
        if first == Some(Event::Granted) {
            let is_exclusive = call == Lock(EXCLUSIVE);
            let looked = Event::Looked(if is_exclusive { Purpose::Exclusive } else { Purpose::Write });
            check(rest.first() == Some(&looked), "the places are not looked at next, for what it is")?;
            let moved = self.world.borrow().weather.moved;
            if let Some(code) = moved {
                check(rest == [looked, Event::Released] && answer == code, "moved, and yet it goes on")?;
                self.see("M1: a file is not in its place");
                return self.check_between(who);
            }
        }

        if before.is_lent && first == Some(Event::Granted) {
            self.see("L7w: the lent gate is retaken");
        }

        // Not forwarded, and yet answered as if the real VFS had refused: row L12.
        if events.contains(&Event::SharedShm) {
            self.see("L12: others use the -shm");
            check(
                call == Lock(EXCLUSIVE) && before.is_upgrade(call),
                "asked who uses the -shm without need",
            )?;
            let is_forwarded = events.iter().any(|event| matches!(event, Event::Real(..)));
            check(!is_forwarded && answer == rc::BUSY, "others use the -shm, and yet it goes on")?;
            self.keep(who, call, answer, before);
            return self.check_between(who);
        }

        // Forwarded, after the reset guard where there is one.
        let calls: Vec<(Call, c_int)> = events
            .iter()
            .filter_map(|event| if let Event::Real(call, code) = event { Some((*call, *code)) } else { None })
            .collect();
        let is_reset = before.is_reset(call);
        if events.contains(&Event::Panicked) {
            self.see("the real VFS panics");
            self.world.borrow_mut().accounts[who].is_poisoned = true;
            return Ok(());
        }
        let expected = match calls[..] {
            [(GUARD, code)] if is_reset && code != rc::OK => {
                self.see("G1: no reset during a checkpoint");
                check(
                    answer == if rc::primary(code) == rc::BUSY { rc::BUSY } else { code },
                    "not the guard's answer",
                )?;
                return self.check_between(who);
            }
            [(GUARD, rc::OK), (forwarded, rc::OK)] if is_reset => (forwarded, rc::OK),
            [(GUARD, rc::OK), (forwarded, code), (UNGUARD, _)] if is_reset => (forwarded, code),
            [(forwarded, rc::OK), (UNGUARD, _)] if before.ends_reset(call) => (forwarded, rc::OK),
            [(forwarded, code)] if !is_reset && (code != rc::OK || !before.ends_reset(call)) => {
                (forwarded, code)
            }
            _ => return Err("these are not the calls that belong to it".to_owned()),
        };
        check(expected == (call, answer), "it is not forwarded as it is, or not answered as it was")?;
        self.keep(who, call, answer, before);
        self.check_between(who)
    }

    /// What SQLite knows after a call that was forwarded.
    fn keep(&mut self, who: usize, call: Call, answer: c_int, before: Account) {
        let mut world = self.world.borrow_mut();
        let Weather { shm_exists, tells_lock_state, .. } = world.weather;
        let mut after = before;
        let mut sight = None;
        match call {
            Lock(to) if LockLevel::from_raw(to).is_some() && to > before.level => {
                let is_upgrade = before.is_upgrade(call);
                if answer == rc::OK && (is_upgrade || (before.level, to) == (NONE, SHARED)) {
                    after.level = to;
                }
                if before.reserves_in_wal_mode(call) && answer == rc::OK {
                    after.is_lent = true;
                    sight = Some("L2w: RESERVED in WAL mode");
                }
                if is_upgrade && to == EXCLUSIVE {
                    let lends = rc::primary(answer) == rc::BUSY && before.level >= RESERVED && shm_exists;
                    after.is_lent = lends;
                    sight = lends.then_some("L7w: the gate is lent");
                    sight = sight
                        .or((before.is_lent && answer == rc::OK).then_some("L7w: the lent gate is retaken"));
                }
            }
            Unlock(to @ (NONE | SHARED)) => {
                if answer == rc::OK {
                    after.level = before.level.min(to);
                } else if tells_lock_state {
                    after.level = before.level.min(world.locks[who].level as c_int);
                    sight = Some("L11: LOCKSTATE tells");
                } else if before.is_lent {
                    after.level = SHARED;
                    sight = Some("L11: nobody knows, and the gate was lent");
                }
                after.is_lent = before.is_lent && matches!(after.level, RESERVED | PENDING);
            }
            Shm(offset, count, LOCK_SHARED) if answer == rc::OK => {
                let slots = unix_locks::mask(offset, count).unwrap_or(0);
                after.shared |= slots;
                after.excl &= !slots; // after an unlock that was done and yet failed
                after.is_writer &= slots & WRITE == 0;
                after.is_gated_checkpoint &= slots & CKPT == 0;
            }
            Shm(_, _, LOCK_EXCLUSIVE) if answer == rc::OK => {
                let slots = exclusive_slots(call).unwrap_or(0);
                let is_gated = before.needs_gate(call, self.policy);
                after.excl |= slots;
                after.shared &= !slots; // as above
                after.is_writer |= is_gated && slots & WRITE != 0;
                after.is_gated_checkpoint |= is_gated && slots == CKPT;
                after.is_guarded |= before.is_reset(call);
                sight = match (is_gated, before.is_reset(call)) {
                    (_, true) => Some("G3: a reset is guarded"),
                    (true, _) => Some("S2, S4, K1: a writer or a checkpoint, gated"),
                    (false, _) => (slots & WRITE != 0).then_some("S5: recovery's WRITE, not gated"),
                };
            }
            _ if unlock_slots(call).is_some() && answer == rc::OK => {
                let slots = unlock_slots(call).unwrap_or(0);
                after.excl &= !slots;
                after.shared &= !slots;
                after.is_writer &= slots & WRITE == 0;
                after.is_gated_checkpoint &= slots & CKPT == 0;
                after.is_guarded &= !before.ends_reset(call);
                sight = before.ends_reset(call).then_some("G4: the guard is given back");
            }
            Unmap => {
                after = Account {
                    level: before.level,
                    is_lent: before.is_lent,
                    is_poisoned: before.is_poisoned,
                    ..Account::default()
                };
            }
            _ => {}
        }
        sight = sight.or((answer == unix_locks::MISUSE).then_some("X1: forwarded as it is"));
        world.accounts[who] = after;
        drop(world);
        if let Some(sight) = sight {
            self.see(sight);
        }
    }

    /// Between two calls.
    fn check_between(&self, who: usize) -> Result<(), String> {
        let world = self.world.borrow();
        let account = world.accounts[who];
        let state = self.drivers[who].state();
        let is_held = world.gate == Some(Holder::Connection(who));
        let says = self.drivers[who].gate().is_held();
        check(
            state.wants_gate() == account.has_reason(),
            "the state and the account differ about the reasons",
        )?;
        check(is_held || !state.wants_gate(), "a reason, and the gate is not held")?;
        // A call that panicked has left it held; the next call that is forwarded releases it.
        check(is_held == state.wants_gate() || account.is_poisoned, "the gate is held without a reason")?;
        check(is_held == says, "the gate is not what it says")
    }

    /// Everything is unlocked and unmapped, in good weather: SQLite closes the connections.
    fn end(&mut self) -> Result<(), String> {
        for who in 0..CONNECTIONS {
            self.call(who, Unmap, CALM)?;
            self.call(who, Unlock(NONE), CALM)?;
            check(!self.holds_gate(who), "the gate stays held")?;
            check(self.world.borrow().locks[who].is_empty(), "a real lock stays held")?;
        }
        check(!matches!(self.world.borrow().gate, Some(Holder::Connection(_))), "the gate is not free")
    }

    fn see(&mut self, sight: &'static str) {
        *self.sights.entry(sight).or_default() += 1;
    }
}

fn check(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

// The tests.

/// Runs random scripts; the error is the shortest one that fails.
fn simulate(seed: u64, cases: u32, sabotage: Sabotage) -> Result<Sights, String> {
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: if sabotage == Sabotage::None { 20_000 } else { 0 },
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let sights = RefCell::new(Sights::new());
    let result = TestRunner::new_with_rng(config, rng).run(&script(), |script| {
        let mut simulation = Simulation::new(&script, sabotage);
        simulation.run(&script).map_err(TestCaseError::fail)?;
        for (sight, count) in simulation.sights {
            *sights.borrow_mut().entry(sight).or_default() += count;
        }
        Ok(())
    });
    match result {
        Ok(()) => Ok(sights.into_inner()),
        Err(TestError::Fail(what, script)) => {
            let Script { policy, os_unix, acts } = script;
            let acts: String = acts.iter().map(|act| format!("  {act:?}\n")).collect();
            Err(format!(
                "KANBANLOCK_SEED={seed}: {what}\nthe shortest script that fails: {policy:?}, {os_unix:?}\n{acts}"
            ))
        }
        Err(TestError::Abort(what)) => panic!("KANBANLOCK_SEED={seed}: {what}"),
    }
}

/// `KANBANLOCK_SEED`, or a new one.
fn seed() -> u64 {
    match std::env::var("KANBANLOCK_SEED") {
        Ok(seed) => seed.parse().expect("KANBANLOCK_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0),
    }
}

#[test]
fn the_driver_keeps_its_order() {
    let seed = seed();
    println!("KANBANLOCK_SEED={seed}");
    let sights = simulate(seed, 2000, Sabotage::None).unwrap_or_else(|what| panic!("{what}"));
    println!("{sights:#?}");
    for sight in [
        "the gate is refused",
        "the gate fails",
        "the real VFS panics",
        "P1: refused",
        "L2w: RESERVED in WAL mode",
        "L7w: the gate is lent",
        "L7w: the lent gate is retaken",
        "L12: others use the -shm",
        "M1: a file is not in its place",
        "L11: LOCKSTATE tells",
        "L11: nobody knows, and the gate was lent",
        "S2, S4, K1: a writer or a checkpoint, gated",
        "S5: recovery's WRITE, not gated",
        "X1: forwarded as it is",
        "G1: no reset during a checkpoint",
        "G3: a reset is guarded",
        "G4: the guard is given back",
    ] {
        assert!(sights.contains_key(sight), "KANBANLOCK_SEED={seed}: never seen: {sight}");
    }
}

/// Each wrong driver and each wrong gate is found out, for what is wrong with it. The seed is fixed: this is about
/// the judge, not about the driver.
#[test]
fn sabotage_is_found_out() {
    let wrong: [(Sabotage, &[&str]); 7] = [
        (Sabotage::ReleasesFirst, &["the gate is released with", "the gate is released before the end"]),
        (
            Sabotage::AcquiresLast,
            &["is granted while the gate is", "the gate is asked for late", "or not asked for"],
        ),
        (Sabotage::ForwardsRefused, &["refused, and yet it goes on", "is granted while the gate is"]),
        (Sabotage::GatesReaders, &["the gate is asked for without need"]),
        (Sabotage::DropsGuard, &["these are not the calls that belong to it"]),
        (
            Sabotage::GrantsTwice,
            &["is granted while the gate is", "and the gate is not held", "or not asked for"],
        ),
        (Sabotage::KeepsGate, &["the gate is held without a reason", "the gate is not what it says"]),
    ];
    for (sabotage, findings) in wrong {
        let found = simulate(0, 2000, sabotage).expect_err("it passes");
        let first = found.lines().next().unwrap_or_default();
        println!("{sabotage:?}: {first}");
        assert!(
            findings.iter().any(|finding| first.contains(finding)),
            "{sabotage:?}: found, but for another reason: {first}"
        );
    }
}
