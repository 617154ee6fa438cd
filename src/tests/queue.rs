//! The fair queue alone: the real `queue.rs` in the small world of `world.rs`.
//!
//! ## Covers
//! Clients that do what `gate.rs` and `wait.rs` do with a seat ([`Client`] is a copy of those few lines, with SQLite's busy
//! handler around it): acquire, refused, sleep, try again, release, end of the transaction. Beside them foreign holders of
//! the flock, busy handlers that sleep by themselves, garbage.
//!
//! - *Exhaustive*: two clients of two transactions each, and three of one, under every schedule in which a client that
//!   could go on is interrupted at most twice, resp. once, at any operation on an atomic, a futex or the flock.
//! - *Killed, stopped, its clock set*: three clients; one of them is killed, or stopped for a second, or has its clock set
//!   forward or back, at each of its points.
//! - *Clocks that differ*, by up to 100,000 s.
//! - *Seeded*: hundreds of random schedules of up to 70 clients. A failure names its seed.
//!
//! Checked:
//! - **no lost wake**: with clients that know the queue and no slice, at no time do all sleep while the flock is free; with
//!   a slice, foreign holders, or somebody killed or stopped, never longer than a bound of leases and polls;
//! - **nobody is passed over**: who acquires was told that it is next, or overtakes, or nobody was asleep when it began to
//!   try; and who was told that it is next is not overtaken;
//! - **order**: told one after the other, by their tickets: no client has the gate twice while another one sleeps;
//! - each client gets all its transactions, in bounded time, also beside garbage;
//! - who leaves frees its entry: in the end the board is empty.
//!
//! Wrong designs ([`Sabotage`]) must be found out.
//!
//! ## Does not cover
//! Weaker memory orders than sequential consistency; schedules with more interruptions, but for the random ones; the
//! hint file (`tests/queue_hint.rs`), real processes (`tests/waiting.rs`), waiting for EXCLUSIVE and for releases.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64 as PlainU64, Ordering};

use crate::queue::{Board, ENTRIES, Enqueued, Seat};
use crate::tests::world::{self, Blow, Fate, Micros, Outcome, Plan, Random, START, Schedule, fail, simulate};

/// A design that is wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sabotage {
    None,
    /// The flock is not tried again once the seat is on the board.
    TriesOnce,
    /// `releases` is read after the refusal, not before.
    LooksTooLate,
    /// The board is looked at before the flock is unlocked.
    UnlocksLast,
    /// Who is next is not woken.
    NeverWakes,
    /// The flock is tried whoever waits.
    Barges,
    /// A seat goes without giving up waiting.
    StaysSeated,
}

/// A client of the gate.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// SQLite's default busy handler, through our xSleep.
    Default,
    /// A busy handler that sleeps by itself, so long.
    Custom(Micros),
    /// So long and up to as much more, at random.
    Irregular(Micros),
    /// As `Default`, but gives up after two refusals.
    GivesUp,
    /// Takes the flock and knows nothing of the board, like flock(1).
    Foreign,
}

#[derive(Clone, Copy, Debug)]
struct Client {
    kind: Kind,
    transactions: usize,
    /// How long it holds the gate, and how long it rests after.
    hold: Micros,
    rest: Micros,
}

const CLIENT: Client = Client { kind: Kind::Default, transactions: 1, hold: 0, rest: 0 };

/// What is to be simulated.
#[derive(Clone, Debug)]
struct Scenario {
    clients: Vec<Client>,
    slice: Micros,
    sabotage: Sabotage,
    /// Writes so many random words onto the board, this often.
    garbage: Option<(usize, Micros)>,
    /// Until then; else until each client is through.
    ends: Option<Micros>,
    /// Nobody is passed over, in order. False where somebody is late, or the owner has its slice.
    is_strict: bool,
    plan: Plan,
}

impl Scenario {
    fn new(clients: Vec<Client>) -> Scenario {
        let plan = Plan { latest: 10_000_000, ..Plan::default() };
        Scenario {
            clients,
            slice: 0,
            sabotage: Sabotage::None,
            garbage: None,
            ends: None,
            is_strict: true,
            plan,
        }
    }

    fn seeded(mut self, seed: u64, one_in: u64) -> Scenario {
        self.plan.schedule = Schedule::Random { random: Random::new(seed), one_in };
        self
    }
}

/// What a client has seen.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    commits: usize,
    longest_wait: Micros,
}

struct Shared<'a> {
    scenario: &'a Scenario,
    board: Board,
    tallies: Mutex<Vec<Tally>>,
    /// Each client's, from its refusal until it has the gate.
    tickets: Mutex<Vec<u64>>,
    /// Who has had the gate, in order.
    history: Mutex<Vec<usize>>,
    /// Who was told that it is next, and has not had the gate since.
    told: Mutex<Option<usize>>,
    overtakings: PlainU64,
}

/// A board that is shared by reference.
#[derive(Clone, Copy, Debug)]
struct At<'a>(&'a Board);

impl AsRef<Board> for At<'_> {
    fn as_ref(&self) -> &Board {
        self.0
    }
}

/// sqliteDefaultBusyCallback's delays, in milliseconds.
const DELAYS: [Micros; 12] = [1, 2, 5, 10, 15, 20, 25, 25, 25, 50, 50, 100];

impl Shared<'_> {
    fn sabotage(&self, which: Sabotage) -> bool {
        self.scenario.sabotage == which
    }

    fn run(&self, me: usize, client: Client) {
        if let Kind::Foreign = client.kind {
            return self.run_foreign(client);
        }
        let seat = Seat::new(At(&self.board), self.scenario.slice);
        let mut random = Random::new(me as u64 + 1);
        let is_over = || self.scenario.ends.is_some_and(|ends| world::true_micros() >= START + ends);
        for _ in 0..client.transactions {
            self.transaction(me, client, &seat, &mut random);
            if client.rest != 0 {
                world::sleep(client.rest);
            }
            if is_over() {
                break;
            }
        }
        if self.sabotage(Sabotage::StaysSeated) {
            std::mem::forget(seat);
        }
    }

    fn transaction(&self, me: usize, client: Client, seat: &Seat<At<'_>>, random: &mut Random) {
        let start = world::true_micros();
        let (mut attempt, mut credit, mut is_told) = (0, 0, false);
        loop {
            let began = world::moment();
            let Err(seen) = self.acquire(seat) else {
                self.judge(me, began, is_told, seat.is_overtaking());
                break;
            };
            self.tickets.lock().unwrap()[me] = seat.ticket();
            self.told.lock().unwrap().take_if(|told| *told == me);
            match client.kind {
                Kind::Custom(micros) => world::sleep(micros),
                Kind::Irregular(micros) => world::sleep(micros + random.below(micros)),
                Kind::GivesUp if attempt == 1 => return,
                Kind::Default | Kind::GivesUp | Kind::Foreign => {
                    let limit = DELAYS[attempt.min(DELAYS.len() - 1)] * 1000 + credit;
                    let waited = seat.sleep_until_next(limit, seen, Self::probe);
                    is_told = waited.is_next;
                    if is_told {
                        *self.told.lock().unwrap() = Some(me);
                    }
                    credit = if is_told { limit.saturating_sub(waited.micros) } else { 0 };
                }
            }
            attempt += 1;
        }
        {
            let mut tallies = self.tallies.lock().unwrap();
            tallies[me].commits += 1;
            tallies[me].longest_wait = tallies[me].longest_wait.max(world::true_micros() - start);
        }
        if client.hold != 0 {
            world::sleep(client.hold);
        }
        self.release(seat);
    }

    /// `LockFile::acquire` and `acquire_contended`. `Err`: what is to be passed to [`Seat::sleep_until_next`].
    fn acquire(&self, seat: &Seat<At<'_>>) -> Result<(), u32> {
        let is_alone = seat.is_alone();
        if is_alone && world::try_flock() {
            seat.note_holder(world::micros());
            return Ok(());
        }
        let now = world::micros();
        seat.note_attempt(now);
        let mut seen = seat.release_count();
        for _ in 0..2 {
            if (seat.may_try(now) || self.sabotage(Sabotage::Barges)) && world::try_flock() {
                seat.acquired(now);
                return Ok(());
            }
            if self.sabotage(Sabotage::LooksTooLate) {
                seen = seat.release_count();
            }
            if seat.enqueue(now) == Enqueued::Before || self.sabotage(Sabotage::TriesOnce) {
                break;
            }
            if !self.sabotage(Sabotage::LooksTooLate) {
                seen = seat.release_count();
            }
        }
        Err(seen)
    }

    /// `LockFile::release_held`, and the end of the transaction.
    fn release(&self, seat: &Seat<At<'_>>) {
        seat.note_releasing();
        let tell = || {
            if !seat.is_alone() {
                seat.choose_next(world::micros());
            }
        };
        if self.sabotage(Sabotage::UnlocksLast) {
            tell();
            world::unlock_flock();
        } else {
            world::unlock_flock();
            tell();
        }
        if !self.sabotage(Sabotage::NeverWakes) {
            seat.transaction_over(world::micros);
        }
    }

    /// `Hint::is_free`
    fn probe() -> bool {
        let is_free = world::try_flock();
        if is_free {
            world::unlock_flock();
        }
        is_free
    }

    fn run_foreign(&self, client: Client) {
        for _ in 0..client.transactions {
            // flock(2) without LOCK_NB, as near as need be.
            while !world::try_flock() {
                world::sleep(100);
            }
            world::sleep(client.hold);
            world::unlock_flock();
            world::sleep(client.rest);
        }
    }

    /// `me` has the flock, and began to try at the moment `began`.
    fn judge(&self, me: usize, began: usize, is_told: bool, is_overtaking: bool) {
        self.history.lock().unwrap().push(me);
        self.overtakings.fetch_add(u64::from(is_overtaking), Ordering::Relaxed);
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        if let Some(other) = told.filter(|_| is_overtaking && self.scenario.is_strict) {
            fail(format!("{me} overtakes {other}, which was told that it is next"));
        }
        let tickets = {
            let mut tickets = self.tickets.lock().unwrap();
            let before = tickets.clone();
            tickets[me] = 0;
            before
        };
        if !self.scenario.is_strict || is_told || is_overtaking {
            return;
        }
        let comes_first = |other: usize| tickets[me] == 0 || tickets[other] < tickets[me];
        if let Some(other) =
            world::sleepers().iter().find(|other| other.since < began && comes_first(other.who))
        {
            fail(format!("{me} passes over {}, which is asleep, and nobody told it to", other.who));
        }
    }
}

struct Report {
    outcome: Outcome,
    tallies: Vec<Tally>,
    history: Vec<usize>,
    overtakings: u64,
}

fn run(scenario: &Scenario) -> Report {
    let tallies = Mutex::new(vec![Tally::default(); scenario.clients.len()]);
    let shared = Shared {
        scenario,
        board: Board::default(),
        tallies,
        tickets: Mutex::new(vec![0; scenario.clients.len()]),
        history: Mutex::default(),
        told: Mutex::default(),
        overtakings: PlainU64::new(0),
    };
    let shared = &shared;
    let mut threads: Vec<Box<dyn FnOnce() + Send + '_>> = Vec::new();
    for (me, &client) in scenario.clients.iter().enumerate() {
        threads.push(Box::new(move || shared.run(me, client)));
    }
    if let Some((words, every)) = scenario.garbage {
        threads.push(Box::new(move || litter(&shared.board, words, every)));
    }
    let mut outcome = simulate(scenario.plan.clone(), threads);
    let is_calm = scenario.garbage.is_none() && scenario.plan.fate.is_none();
    if is_calm && outcome.wrong.is_none() {
        let tidy = Seat::new(At(&shared.board), 0);
        if !tidy.is_alone() {
            outcome.wrong = Some("all have left, and the board is not empty".to_owned());
        }
    }
    let tallies = shared.tallies.lock().unwrap().clone();
    let history = shared.history.lock().unwrap().clone();
    let overtakings = shared.overtakings.load(Ordering::Relaxed);
    Report { outcome, tallies, history, overtakings }
}

/// Writes random words, small numbers and extremes, all over the board.
fn litter(board: &Board, words: usize, every: Micros) {
    let mut random = Random::new(every);
    let address = std::ptr::from_ref(board).cast::<PlainU64>();
    let length = size_of::<Board>() / 8;
    for _ in 0..20 {
        world::sleep(every);
        for _ in 0..words {
            let place = usize::try_from(random.below(length as u64)).unwrap();
            let value = match random.below(6) {
                0 => u64::MAX,
                1 => 0,
                2 => random.below(256),
                3 => world::micros() + random.below(2_000_000),
                _ => random.bits(),
            };
            // SAFETY: within the board, which is made of atomics and of padding.
            let word = unsafe { address.add(place) };
            // SAFETY: aligned to 8; the board is shared by reference with threads of which one at a time runs.
            unsafe { &*word }.store(value, Ordering::SeqCst);
        }
    }
}

fn expect_right(scenario: &Scenario, what: &str) -> Report {
    let result = run(scenario);
    let Outcome { wrong, last, .. } = &result.outcome;
    assert_eq!(*wrong, None, "{what}{last}");
    result
}

/// Every schedule with at most so many interruptions, until one is wrong: how many there are, or what is wrong.
fn explore(scenario: &Scenario, interruptions: usize, most: usize) -> Result<usize, String> {
    let mut choices = Vec::new();
    for count in 1.. {
        let mut scenario = scenario.clone();
        scenario.plan.schedule = Schedule::Replay { choices, next: 0, interruptions };
        let Report { outcome, .. } = run(&scenario);
        if let Some(wrong) = outcome.wrong {
            return Err(format!("schedule {count}: {wrong}{}", outcome.last));
        }
        match world::next_choices(outcome.choices) {
            Some(next) if count < most => choices = next,
            Some(_) => return Err(format!("more than {most} schedules")),
            None => return Ok(count),
        }
    }
    unreachable!()
}

fn clients(count: usize, client: Client) -> Vec<Client> {
    vec![client; count]
}

#[test]
fn no_schedule_of_a_few_clients_loses_a_wake_or_passes_anybody_over() {
    let two = Scenario::new(clients(2, Client { transactions: 2, ..CLIENT }));
    let two = explore(&two, 2, 200_000).unwrap_or_else(|wrong| panic!("{wrong}"));
    let three = Scenario::new(clients(3, CLIENT));
    let three = explore(&three, 1, 200_000).unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("two clients: {two} schedules; three: {three}");
}

#[test]
fn wrong_designs_are_found_out() {
    for sabotage in [
        Sabotage::TriesOnce,
        Sabotage::LooksTooLate,
        Sabotage::UnlocksLast,
        Sabotage::NeverWakes,
        Sabotage::Barges,
        Sabotage::StaysSeated,
    ] {
        let mut few = Scenario::new(clients(2, CLIENT));
        few.sabotage = sabotage;
        // Who comes again at once may overtake, and does for others what they were not told; who rests does not.
        let some = |count: usize, transactions: usize, rest: Micros| {
            let mut some = Scenario::new(clients(count, Client { transactions, hold: 100, rest, ..CLIENT }));
            some.clients[0].kind = Kind::GivesUp;
            some.clients[1].hold = 10_000;
            some.sabotage = sabotage;
            some
        };
        let (tight, resting) = (some(3, 2, 0), some(4, 3, 300));
        let wrong = |seed: u64| {
            let scenario = if seed % 2 == 0 { &tight } else { &resting };
            run(&scenario.clone().seeded(seed, 4)).outcome.wrong
        };
        let at_random = || (1..=500).find_map(wrong);
        let found = explore(&few, 2, 100_000).err().or_else(at_random);
        let found = found.unwrap_or_else(|| panic!("{sabotage:?} was not found out"));
        println!("{sabotage:?}: {}", found.lines().next().unwrap_or_default());
    }
    let mut deaf = Scenario::new(clients(3, Client { transactions: 2, hold: 100, ..CLIENT }));
    deaf.plan.is_deaf = true;
    let found = (1..=100).find_map(|seed| run(&deaf.clone().seeded(seed, 4)).outcome.wrong);
    assert!(found.is_some(), "a futex that wakes nobody");
}

/// How long the gate may lie idle because somebody that it was kept for is gone: a reservation (2 ms), an entry's date
/// (pause 20 ms at most, and 5 ms), and then a poll that believes the board one time in eight (2 ms each).
const DEAD: Micros = 45_000;

#[test]
fn whoever_is_killed_or_stopped_anywhere_delays_the_others_by_little() {
    let mut worst = [0, 0];
    for seed in 1..=6 {
        let calm = Scenario::new(clients(3, Client { transactions: 3, hold: 300, rest: 50, ..CLIENT }));
        let mut calm = calm.seeded(seed, 3);
        calm.slice = 1000 * (seed % 2);
        calm.is_strict = false;
        calm.plan.longest_idle = DEAD;
        let points = expect_right(&calm, "nobody is killed").outcome.points[0];
        for point in 1..=points {
            for what in [Blow::Killed, Blow::Stopped(1_000_000)] {
                let mut scenario = calm.clone();
                scenario.plan.fate = Some(Fate { who: 0, point, what });
                let place = usize::from(what != Blow::Killed);
                let what = format!("seed {seed}, {what:?} at point {point}");
                let result = expect_right(&scenario, &what);
                let others = &result.tallies[1..];
                assert!(others.iter().all(|tally| tally.commits == 3), "{what}: {others:?}");
                worst[place] = result.outcome.longest_idle.max(worst[place]);
            }
        }
    }
    println!("longest idle in us: killed {}, stopped {}", worst[0], worst[1]);
}

/// Far further than any date on the board may lie ahead, further than one period of its 32-bit ones, a little further,
/// and just so far.
const JUMPS: [i64; 4] = [100_000_000_000, 5_000_000_000, 1_500_000, 95_000];

/// How long the gate may lie idle because a clock was set: the longest reservation that anybody believes (100 ms), and a
/// poll.
const SET: Micros = 110_000;

#[test]
fn a_clock_that_is_set_anywhere_costs_little_time_and_no_turn() {
    let mut worst = [0, 0];
    for seed in 1..=2 {
        let calm = Scenario::new(clients(3, Client { transactions: 3, hold: 300, rest: 50, ..CLIENT }));
        let mut calm = calm.seeded(seed, 3);
        calm.slice = 1000 * (seed % 2);
        calm.is_strict = false;
        calm.plan.longest_idle = SET;
        let points = expect_right(&calm, "no clock is set").outcome.points[0];
        for point in 1..=points {
            for (place, by) in (point..).zip(JUMPS) {
                // Each forward and back, but not at the same point.
                let by = if place % 2 == 0 { by } else { -by };
                let mut scenario = calm.clone();
                scenario.plan.fate = Some(Fate { who: 0, point, what: Blow::ClockSet(by) });
                let what = format!("seed {seed}, set by {by} us at point {point}");
                let result = expect_right(&scenario, &what);
                let tallies = &result.tallies;
                assert!(tallies.iter().all(|tally| tally.commits == 3), "{what}: {tallies:?}");
                let longest = tallies.iter().map(|tally| tally.longest_wait).max().unwrap();
                worst = [result.outcome.longest_idle.max(worst[0]), longest.max(worst[1])];
            }
        }
    }
    println!("a clock is set: longest idle {} us, longest wait {} us", worst[0], worst[1]);
}

/// `hint.rs` keeps processes of different time namespaces apart, as far as it knows them. If it did not: they free each
/// other's entries and believe none of each other's dates, so they poll beside each other.
#[test]
fn clients_whose_clocks_differ_all_get_their_turns() {
    for by in JUMPS.into_iter().flat_map(|by| [by, -by]) {
        let (mut idle, mut wait) = (0, 0);
        for seed in 1..=10 {
            let client = Client { transactions: 6, hold: 300, rest: 50 * (seed % 3), ..CLIENT };
            let mut scenario = Scenario::new(clients(5, client)).seeded(seed, 5);
            scenario.is_strict = false;
            scenario.slice = 1000 * (seed % 2);
            scenario.plan.clocks = vec![by, by, 0, 0, -by / 2];
            scenario.plan.longest_idle = SET;
            let what = format!("clocks {by} us apart, seed {seed}");
            let result = expect_right(&scenario, &what);
            let tallies = &result.tallies;
            assert!(tallies.iter().all(|tally| tally.commits == 6), "{what}: {tallies:?}");
            idle = result.outcome.longest_idle.max(idle);
            wait = tallies.iter().map(|tally| tally.longest_wait).fold(wait, Micros::max);
        }

        let mut tight = Scenario::new(clients(5, Client { transactions: usize::MAX, hold: 60, ..CLIENT }));
        tight = tight.seeded(1, 20);
        (tight.ends, tight.slice, tight.is_strict) = (Some(500_000), 1000, false);
        tight.plan.points_per_micro = 30;
        tight.plan.clocks = vec![by];
        tight.plan.longest_idle = SET;
        let result = expect_right(&tight, &format!("one clock is {by} us ahead"));
        let [alone, others @ ..] = &result.tallies[..] else { unreachable!() };
        println!(
            "{by} us apart: longest idle {idle} us, longest wait {wait} us; in a tight loop {} commits beside {}, longest \
             waits {} and {} us",
            alone.commits,
            others.iter().map(|tally| tally.commits).sum::<usize>(),
            alone.longest_wait,
            others.iter().map(|tally| tally.longest_wait).max().unwrap_or(0),
        );
        assert!(result.tallies.iter().all(|tally| tally.commits > 0), "{by} us: {:?}", result.tallies);
    }
}

/// One that sleeps is overtaken by an owner whose slice is not over, and sleeps again; then comes `end`. The board after the
/// sleeper has had the gate, for which it waits less long than the slice.
fn overtaken_within_the_slice(end: impl FnOnce(&Seat<At<'_>>) + Send) -> Board {
    let board = Board::default();
    let is_free = AtomicBool::new(false);
    let owner = || {
        let seat = Seat::new(At(&board), 900_000);
        assert!(seat.may_try(world::micros()));
        seat.acquired(world::micros());
        world::sleep(500);
        // Not tight, so the gate is reserved for the sleeper; and then, before that is awake, it comes again.
        seat.note_releasing();
        seat.choose_next(world::micros());
        seat.note_attempt(world::micros());
        assert!(seat.may_try(world::micros()) && seat.is_overtaking());
        seat.acquired(world::micros());
        seat.wake();
        world::sleep(500);
        is_free.store(true, Ordering::SeqCst);
        end(&seat);
        std::mem::forget(seat);
    };
    let sleeper = || {
        let seat = Seat::new(At(&board), 0);
        world::sleep(100);
        let seen = seat.release_count();
        assert_eq!(seat.enqueue(world::micros()), Enqueued::Now);
        let waited = seat.sleep_until_next(500_000, seen, || is_free.load(Ordering::SeqCst));
        assert!(waited.is_next, "{waited:?}");
        seat.acquired(world::micros());
    };
    let plan = Plan { latest: 10_000_000, longest_idle: 10_000_000, ..Plan::default() };
    assert_eq!(simulate(plan, vec![Box::new(owner), Box::new(sleeper)]).wrong, None);
    board
}

#[test]
fn who_has_overtaken_hands_over_although_its_slice_is_not_over() {
    let board = overtaken_within_the_slice(|owner| {
        owner.note_releasing();
        owner.choose_next(world::micros());
        owner.transaction_over(world::micros);
    });
    assert_eq!(board.overtaker(), 0);
}

#[test]
fn an_overtaker_that_is_killed_is_forgotten() {
    assert_eq!(overtaken_within_the_slice(|_| {}).overtaker(), 0);
}

#[test]
fn random_schedules_of_many_clients() {
    let (mut longest, mut overtakings) = (0, 0);
    for seed in 1..=200 {
        let mut random = Random::new(seed);
        let count = 2 + usize::try_from(random.below(7)).unwrap();
        let client = |random: &mut Random| Client {
            kind: Kind::Default,
            transactions: 6,
            hold: random.below(2) * random.below(3000),
            rest: random.below(2) * random.below(3000),
        };
        let some: Vec<Client> = (0..count).map(|_| client(&mut random)).collect();
        let scenario = Scenario::new(some).seeded(seed, 2 + random.below(20));
        let result = expect_right(&scenario, &format!("seed {seed}"));
        assert!(result.tallies.iter().all(|tally| tally.commits == 6), "seed {seed}");
        overtakings += result.overtakings;

        // The owner goes on within its slice: it may be passed over then, but not for long.
        let mut sliced = scenario;
        (sliced.slice, sliced.is_strict) = (1000, false);
        sliced.plan.points_per_micro = 20;
        sliced.plan.longest_idle = 8_000;
        longest = longest.max(expect_right(&sliced, &format!("seed {seed}, slice")).outcome.longest_idle);
    }
    println!("longest idle with a slice: {longest} us; {overtakings} transactions overtook");
    assert!(overtakings > 100, "{overtakings}");
}

#[test]
fn more_waiters_than_slots() {
    let many = clients(ENTRIES + 7, Client { transactions: 2, hold: 50, ..CLIENT });
    let mut scenario = Scenario::new(many).seeded(1, 50);
    // Who finds no entry sleeps as SQLite says, up to 100 ms at a time.
    scenario.is_strict = false;
    scenario.plan.longest_idle = 110_000;
    let result = expect_right(&scenario, "70 clients");
    assert!(result.tallies.iter().all(|tally| tally.commits == 2));
}

#[test]
fn a_foreign_holder_is_noticed_without_a_wake() {
    for seed in 1..=60 {
        let foreign = Client { kind: Kind::Foreign, transactions: 4, hold: 3000, rest: 2500 };
        let mut some = clients(3, Client { transactions: 5, hold: 200, rest: 300, ..CLIENT });
        some.push(foreign);
        let mut scenario = Scenario::new(some).seeded(seed, 5);
        scenario.is_strict = false;
        scenario.plan.longest_idle = 6_000; // a lease, a poll, and some
        let result = expect_right(&scenario, &format!("seed {seed}"));
        assert!(result.tallies[..3].iter().all(|tally| tally.commits == 5));
    }
}

#[test]
fn garbage_on_the_board_costs_time_and_nothing_else() {
    let mut longest = 0;
    for seed in 1..=150 {
        let client = Client { transactions: 8, hold: 300, rest: 200, ..CLIENT };
        let mut scenario = Scenario::new(clients(4, client)).seeded(seed, 7);
        scenario.is_strict = false;
        scenario.slice = 1000 * (seed % 2);
        scenario.garbage = Some((1 + usize::try_from(seed * 7 % 600).unwrap(), 1000 + seed * 10));
        scenario.plan.longest_idle = 2_000_000;
        scenario.plan.latest = 60_000_000;
        let result = expect_right(&scenario, &format!("seed {seed}"));
        assert!(result.tallies.iter().all(|tally| tally.commits == 8), "seed {seed}");
        longest = longest.max(result.outcome.longest_idle);
    }
    println!("longest idle beside garbage: {longest} us");
}

/// Shares of the gate: one client with a busy handler of its own, beside eight with SQLite's.
fn shares(kind: Kind, hold: Micros, slice: Micros) -> (usize, usize, Micros) {
    let mut some = clients(8, Client { transactions: usize::MAX, hold, ..CLIENT });
    some.push(Client { kind, ..some[0] });
    let mut scenario = Scenario::new(some).seeded(1, 20);
    (scenario.ends, scenario.slice, scenario.is_strict) = (Some(1_000_000), slice, false);
    scenario.plan.points_per_micro = 30;
    scenario.plan.longest_idle = 200_000;
    let result = expect_right(&scenario, "shares");
    let custom = result.tallies[8];
    (custom.commits, result.history.len(), custom.longest_wait)
}

#[test]
fn a_busy_handler_that_sleeps_by_itself_gets_a_share() {
    for micros in [1, 5, 20].map(|ms| ms * 1000) {
        for kind in [Kind::Custom(micros), Kind::Irregular(micros)] {
            let (own, all, wait) = shares(kind, 60, 1000);
            println!("{kind:?}: {own} turns of {all}, longest wait {wait} us");
            // Regular: at the third attempt, mostly. Irregular: it may miss its date some times.
            let longest =
                if matches!(kind, Kind::Custom(_)) { 5 * micros + 20_000 } else { 20 * micros + 20_000 };
            assert!(wait <= longest, "{kind:?}: waited {wait} us");
        }
    }
}
