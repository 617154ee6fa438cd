//! A small world for `queue.rs`: threads of which one at a time runs, as a scheduler says; a clock that it turns; one flock.
//!
//! In unit tests the queue's atomics, its futex and its clock are those of this file (`use crate::tests::world as sys`).
//! Outside a simulation they are the real ones. Inside, each operation on an atomic, on a futex or on the flock is a
//! *point*: there the scheduler may let another thread go on, kill the running one (its flock is then free, as the kernel
//! sees to), or stop it for a time. Time stands still while a thread can run, but for what [`Plan::point_takes`] says, and
//! then jumps to the next moment at which one wakes up.
//!
//! Why not loom or shuttle: neither has a clock, a futex with a timeout, or a thread that is killed, and the queue is made
//! of these. What is lost: the operations are sequentially consistent here, whatever their `Ordering` says. The queue's
//! pairs that matter (its header, "No lost wake") are SeqCst; what its Relaxed ones could do beyond that is not explored.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Write;
use std::panic::Location;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{self, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::sys;

pub type Micros = u64;

/// When a simulation begins: late enough that clocks can be set back.
pub const START: Micros = 1_000_000_000_000;

thread_local! {
    /// The simulation that this thread is part of, and its number there.
    static ME: RefCell<Option<(Arc<World>, usize)>> = const { RefCell::new(None) };
}

/// Runs `body` with this thread's simulation; `None` outside one.
fn here<T>(body: impl FnOnce(&World, usize) -> T) -> Option<T> {
    ME.with(|me| me.borrow().as_ref().map(|(world, me)| body(world, *me)))
}

#[track_caller]
fn point() {
    let place = Location::caller();
    here(|world, me| world.point(me, place));
}

macro_rules! atomic {
    ($name:ident, $value:ty $(, $method:ident)*) => {
        /// As in `std`, but each operation is a point.
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name(atomic::$name);

        #[allow(dead_code)] // each type has them all
        impl $name {
            pub fn new(value: $value) -> $name {
                $name(atomic::$name::new(value))
            }
            #[track_caller]
            pub fn load(&self, order: Ordering) -> $value {
                point();
                self.0.load(order)
            }
            #[track_caller]
            pub fn store(&self, value: $value, order: Ordering) {
                point();
                self.0.store(value, order);
            }
            #[track_caller]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                point();
                self.0.swap(value, order)
            }
            #[track_caller]
            pub fn compare_exchange(
                &self, old: $value, new: $value, success: Ordering, failure: Ordering,
            ) -> Result<$value, $value> {
                point();
                self.0.compare_exchange(old, new, success, failure)
            }
            $(#[track_caller]
            pub fn $method(&self, value: $value, order: Ordering) -> $value {
                point();
                self.0.$method(value, order)
            })*
        }
    };
}
atomic!(AtomicBool, bool);
atomic!(AtomicU32, u32, fetch_add);
atomic!(AtomicU64, u64, fetch_add, fetch_or, fetch_and);

/// The thread's clock. Who reads it takes a microsecond for it.
pub fn micros() -> Micros {
    let read = |world: &World, me: usize| {
        let mut state = world.state();
        state.now += 1;
        state.now.saturating_add_signed(state.threads[me].clock)
    };
    here(read).unwrap_or_else(sys::micros)
}

/// The time of the simulation itself.
pub fn true_micros() -> Micros {
    here(|world, _| world.state().now).unwrap()
}

pub fn sleep(micros: Micros) {
    if here(|world, me| world.sleep(me, None, micros)).is_none() {
        sys::sleep(micros);
    }
}

#[track_caller]
pub fn futex_wait(word: &AtomicU32, expected: u32, micros: Micros) {
    let place = Location::caller();
    let wait = |world: &World, me| {
        world.point(me, place);
        // Nobody runs between this look and the sleep: as in the kernel.
        if word.0.load(Ordering::SeqCst) == expected {
            world.sleep(me, Some(address(word)), micros);
        }
    };
    if here(wait).is_none() {
        sys::futex_wait(&word.0, expected, micros);
    }
}

#[track_caller]
pub fn futex_wake(word: &AtomicU32, count: i32) {
    let place = Location::caller();
    let wake = |world: &World, me| {
        world.point(me, place);
        world.wake(address(word), usize::try_from(count).unwrap());
    };
    if here(wake).is_none() {
        sys::futex_wake(&word.0, count);
    }
}

fn address(word: &AtomicU32) -> usize {
    std::ptr::from_ref(word).addr()
}

/// flock(LOCK_EX|LOCK_NB) on the simulation's lock file, through a description of the thread's own.
#[track_caller]
pub fn try_flock() -> bool {
    point();
    here(|world, me| {
        let mut state = world.state();
        let is_free = state.flock.is_none();
        if is_free {
            state.flock = Some(me);
        }
        is_free
    })
    .unwrap()
}

#[track_caller]
pub fn unlock_flock() {
    point();
    here(|world, me| {
        let mut state = world.state();
        assert_eq!(state.flock, Some(me), "unlocked by who has it");
        state.flock = None;
        state.idle = 0;
    });
}

/// What a thread of the simulation sees of the others.
#[derive(Clone, Copy, Debug)]
pub struct Sleeper {
    pub who: usize,
    /// [`moment`], when it fell asleep.
    pub since: usize,
}

/// Who sleeps on a futex now.
pub fn sleepers() -> Vec<Sleeper> {
    let look = |world: &World, _| {
        let state = world.state();
        let asleep = state.threads.iter().enumerate().filter_map(|(who, thread)| match thread.status {
            Status::Asleep { word: Some(_), since, .. } => Some(Sleeper { who, since }),
            _ => None,
        });
        asleep.collect()
    };
    here(look).unwrap()
}

/// How many points there have been.
pub fn moment() -> usize {
    here(|world, _| world.state().points).unwrap()
}

/// Ends the simulation: something is wrong.
pub fn fail(what: String) -> ! {
    here(|world, _| world.state().end(Some(what)));
    resume_unwind(Box::new(Over))
}

/// What happens to a thread at its `point`-th point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    pub who: usize,
    pub point: usize,
    pub what: Blow,
}

/// … namely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    Killed,
    /// For so long.
    Stopped(Micros),
    /// Its clock is set forward or back by so much.
    ClockSet(i64),
}

/// How a simulation is to go.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub schedule: Schedule,
    pub fate: Option<Fate>,
    /// By how much each thread's clock differs from the simulation's; 0 for those not named.
    pub clocks: Vec<i64>,
    /// So many points take a microsecond; 0: time stands still while somebody can run.
    pub points_per_micro: usize,
    /// futex(2) wakes nobody.
    pub is_deaf: bool,
    /// The longest time that all may sleep while some wait on a futex and the flock is free.
    pub longest_idle: Micros,
    /// The end of time.
    pub latest: Micros,
}

/// Which thread goes on at a point.
#[derive(Clone, Debug)]
pub enum Schedule {
    /// One of `one_in` points lets another thread go on.
    Random { random: Random, one_in: u64 },
    /// The choices made so far, each of so many; and how often a thread that could go on may still be interrupted.
    Replay { choices: Vec<(usize, usize)>, next: usize, interruptions: usize },
}

impl Default for Schedule {
    fn default() -> Schedule {
        Schedule::Random { random: Random(1), one_in: 4 }
    }
}

/// Numbers from a seed: xorshift64*, Vigna 2016.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.bits() >> 16) % limit
    }
}

impl Schedule {
    /// One of `options`, of which the first is to go on as before if `is_free` is false.
    fn choose(&mut self, options: &[usize], is_free: bool) -> usize {
        match self {
            Schedule::Random { random, one_in } => {
                if !is_free && random.below(*one_in) != 0 {
                    return options[0];
                }
                options[usize::try_from(random.below(options.len() as u64)).unwrap()]
            }
            Schedule::Replay { choices, next, interruptions } => {
                if options.len() == 1 || (!is_free && *interruptions == 0) {
                    return options[0];
                }
                if *next == choices.len() {
                    choices.push((0, options.len()));
                }
                let (choice, of) = choices[*next];
                assert_eq!(of, options.len(), "the same choices lead to the same point");
                *next += 1;
                *interruptions -= usize::from(!is_free && choice != 0);
                options[choice]
            }
        }
    }
}

/// The choices after these, depth first; `None`: there are no others.
pub fn next_choices(mut choices: Vec<(usize, usize)>) -> Option<Vec<(usize, usize)>> {
    while let Some((choice, of)) = choices.pop() {
        if choice + 1 < of {
            choices.push((choice + 1, of));
            return Some(choices);
        }
    }
    None
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ready,
    Asleep { word: Option<usize>, until: Micros, since: usize },
    Gone,
}

#[derive(Debug)]
struct Thread {
    status: Status,
    points: usize,
    /// How far its clock is ahead.
    clock: i64,
}

/// What thread 0 and all others see; one at a time, so nobody waits for this mutex.
#[derive(Debug)]
struct State {
    plan: Plan,
    threads: Vec<Thread>,
    running: usize,
    now: Micros,
    points: usize,
    flock: Option<usize>,
    /// How long all have slept since the flock was unlocked.
    idle: Micros,
    longest_idle: Micros,
    /// The last points: when, who, where.
    last: VecDeque<(Micros, usize, &'static Location<'static>)>,
    is_over: bool,
    wrong: Option<String>,
}

#[derive(Debug)]
struct World {
    state: Mutex<State>,
    turns: Vec<Condvar>,
}

/// What is thrown to end a thread.
struct Over;

/// How a simulation went.
#[derive(Debug)]
pub struct Outcome {
    /// What is wrong.
    pub wrong: Option<String>,
    /// The last points before that: thread and line.
    pub last: String,
    /// How many points each thread has passed.
    pub points: Vec<usize>,
    /// The longest time that all slept while some waited on a futex and the flock was free.
    pub longest_idle: Micros,
    /// Of [`Schedule::Replay`].
    pub choices: Vec<(usize, usize)>,
}

/// Runs the threads of a simulation to their end.
pub fn simulate(plan: Plan, threads: Vec<Box<dyn FnOnce() + Send + '_>>) -> Outcome {
    let count = threads.len();
    let ready = |me: usize| Thread {
        status: Status::Ready,
        points: 0,
        clock: plan.clocks.get(me).copied().unwrap_or_default(),
    };
    let threads_of_state = (0..count).map(ready).collect();
    let state = State {
        plan,
        threads: threads_of_state,
        running: usize::MAX,
        now: START,
        points: 0,
        flock: None,
        idle: 0,
        longest_idle: 0,
        last: VecDeque::new(),
        is_over: false,
        wrong: None,
    };
    let turns = (0..count).map(|_| Condvar::new()).collect();
    let world = Arc::new(World { state: Mutex::new(state), turns });
    std::thread::scope(|scope| {
        for (me, body) in threads.into_iter().enumerate() {
            let world = Arc::clone(&world);
            scope.spawn(move || world.run(me, body));
        }
        let mut state = world.state();
        state.next(None);
        let first = state.running;
        drop(state);
        world.turns[first].notify_one();
    });
    let mut state = world.state();
    let choices = match &mut state.plan.schedule {
        Schedule::Replay { choices, .. } => std::mem::take(choices),
        Schedule::Random { .. } => Vec::new(),
    };
    Outcome {
        wrong: state.wrong.take(),
        last: last_points(&state.last),
        points: state.threads.iter().map(|thread| thread.points).collect(),
        longest_idle: state.longest_idle,
        choices,
    }
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn run(self: Arc<World>, me: usize, body: Box<dyn FnOnce() + Send + '_>) {
        ME.with(|place| *place.borrow_mut() = Some((Arc::clone(&self), me)));
        let result = catch_unwind(AssertUnwindSafe(|| {
            drop(self.await_turn(self.state(), me));
            body();
        }));
        ME.with(|place| *place.borrow_mut() = None);
        let mut state = self.state();
        state.threads[me].status = Status::Gone;
        if let Err(panic) = result {
            if !panic.is::<Over>() {
                state.end(Some(format!("thread {me} panicked: {}", text(&*panic))));
            }
        }
        state.next(None);
        self.pass_on(&state);
    }

    fn pass_on(&self, state: &State) {
        if state.is_over {
            self.turns.iter().for_each(Condvar::notify_one);
        } else {
            self.turns[state.running].notify_one();
        }
    }

    fn await_turn<'a>(&'a self, mut state: MutexGuard<'a, State>, me: usize) -> MutexGuard<'a, State> {
        while state.running != me && !state.is_over {
            state = self.turns[me].wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        if state.is_over {
            drop(state);
            resume_unwind(Box::new(Over));
        }
        state
    }

    fn point(&self, me: usize, place: &'static Location<'static>) {
        if std::thread::panicking() {
            return; // what a seat does on drop, when all is over
        }
        let mut state = self.state();
        state.points += 1;
        state.threads[me].points += 1;
        let now = state.now;
        state.last.push_back((now, me, place));
        if state.last.len() > 250 {
            state.last.pop_front();
        }
        if state.plan.points_per_micro != 0 && state.points % state.plan.points_per_micro == 0 {
            state.now += 1;
        }
        if let Some(fate) = state.plan.fate.filter(|fate| fate.who == me) {
            if fate.point == state.threads[me].points {
                match fate.what {
                    Blow::Killed => {
                        state.threads[me].status = Status::Gone;
                        if state.flock == Some(me) {
                            (state.flock, state.idle) = (None, 0);
                        }
                    }
                    Blow::Stopped(micros) => {
                        let (until, since) = (state.now + micros, state.points);
                        state.threads[me].status = Status::Asleep { word: None, until, since };
                    }
                    Blow::ClockSet(by) => state.threads[me].clock += by,
                }
            }
        }
        self.switch(state, me);
    }

    fn sleep(&self, me: usize, word: Option<usize>, micros: Micros) {
        if std::thread::panicking() {
            return;
        }
        let mut state = self.state();
        let (until, since) = (state.now + micros, state.points);
        state.threads[me].status = Status::Asleep { word, until, since };
        self.switch(state, me);
    }

    fn wake(&self, address: usize, count: usize) {
        let mut state = self.state();
        if state.plan.is_deaf {
            return;
        }
        let is_on = |thread: &&mut Thread| matches!(thread.status, Status::Asleep { word, .. } if word == Some(address));
        state.threads.iter_mut().filter(is_on).take(count).for_each(|thread| thread.status = Status::Ready);
    }

    fn switch(&self, mut state: MutexGuard<'_, State>, me: usize) {
        state.next(Some(me));
        if state.running != me || state.is_over {
            self.pass_on(&state);
            drop(self.await_turn(state, me));
        }
    }
}

impl State {
    fn end(&mut self, wrong: Option<String>) {
        self.is_over = true;
        self.wrong = self.wrong.take().or(wrong);
    }

    /// Decides who runs now.
    fn next(&mut self, before: Option<usize>) {
        if self.is_over {
            return;
        }
        loop {
            let is_ready = |who: &usize| self.threads[*who].status == Status::Ready;
            let mut ready: Vec<usize> = (0..self.threads.len()).filter(is_ready).collect();
            if !ready.is_empty() {
                let at = before.and_then(|before| ready.iter().position(|&who| who == before));
                if let Some(at) = at {
                    ready[..=at].rotate_right(1);
                }
                self.running = self.plan.schedule.choose(&ready, at.is_none());
                return;
            }
            if !self.pass_time() {
                return;
            }
        }
    }

    /// All sleep: on to the next moment. False: that was the last.
    fn pass_time(&mut self) -> bool {
        let dates = self.threads.iter().filter_map(|thread| match thread.status {
            Status::Asleep { until, .. } => Some(until),
            _ => None,
        });
        let Some(next) = dates.min() else {
            self.end(None);
            return false;
        };
        let is_wanted =
            self.threads.iter().any(|thread| matches!(thread.status, Status::Asleep { word: Some(_), .. }));
        if self.flock.is_none() && is_wanted {
            self.idle += next.saturating_sub(self.now);
            self.longest_idle = self.longest_idle.max(self.idle);
            if self.idle > self.plan.longest_idle {
                let wrong = format!("all sleep, some for the gate, which is free for {} µs now", self.idle);
                self.end(Some(wrong));
                return false;
            }
        }
        self.now = self.now.max(next);
        if self.now > START + self.plan.latest {
            self.end(Some(format!("not done after {} µs: {:?}", self.plan.latest, self.threads)));
            return false;
        }
        for thread in &mut self.threads {
            if matches!(thread.status, Status::Asleep { until, .. } if until <= self.now) {
                thread.status = Status::Ready;
            }
        }
        true
    }
}

/// `thread: line line …`, a line for each time that a thread goes on.
fn last_points(last: &VecDeque<(Micros, usize, &'static Location<'static>)>) -> String {
    let mut text = String::new();
    let mut before = None;
    for (now, who, place) in last {
        if before != Some((now, who)) {
            let _ = write!(text, "\nat {now}, {who}:");
        }
        let file = if place.file().contains("tests") { "test " } else { "" };
        let _ = write!(text, " {file}{}", place.line());
        before = Some((now, who));
    }
    text
}

fn text(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal.or_else(|| panic.downcast_ref().cloned()).unwrap_or_default()
}
