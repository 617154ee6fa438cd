//! The parent's side: starts one process per lane, has them run round after round, checks what they did.
//!
//! The order of the lanes within a round must not favour one. Lane `start + i * step (mod n)` is the `i`th
//! to run; over `n (n - 1)` rounds `start` and `step` take all their values, and because the number of
//! lanes is prime, each lane is then in each position, and right behind each other lane, equally often.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::Result;
use crate::client::{Ask, JOB, Job};
use crate::workload::{Lane, PerLane, Workload, lock_file};

/// The database of which every lane of every sitting gets a copy.
pub(crate) struct Template {
    workload: Workload,
    directory: TempDir,
    sittings: Cell<usize>,
}

impl Template {
    pub(crate) fn new(workload: Workload) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("kanbanlock-overhead-")
            .tempdir_in(workload.place.directory()?)?;
        let template = Self { workload, directory, sittings: Cell::new(0) };
        workload.create(&template.database())?;
        Ok(template)
    }

    fn database(&self) -> PathBuf {
        self.directory.path().join("template.db")
    }
}

/// What one set of processes measured.
#[derive(Default)]
pub(crate) struct Sitting {
    /// The whole time of each lane.
    pub(crate) total: PerLane<Duration>,
    /// Nanoseconds per transaction of each lane, for each round of a full batch.
    pub(crate) rounds: Vec<PerLane<f64>>,
}

impl Sitting {
    /// Has every lane run `transactions`, after one batch to warm up. Each takes another seat (file, place in
    /// the order of starting) than in the sitting before.
    pub(crate) fn hold(template: &Template, transactions: u64) -> Result<Self> {
        let workload = template.workload;
        let batch = workload.batch();
        let directory = TempDir::new_in(&template.directory)?;
        let lanes = workload.lanes();
        let first = template.sittings.replace(template.sittings.get() + 1);
        let mut peers = Vec::new();
        for seat in 0..lanes.len() {
            let database = directory.path().join(format!("{seat}.db"));
            std::fs::copy(template.database(), &database)?;
            peers.push(Peer::start(lanes[(first + seat) % lanes.len()], workload, database)?);
        }
        for peer in &mut peers {
            peer.run(batch)?;
        }
        let mut sitting = Self::default();
        let mut left = u32::try_from(transactions)?;
        for round in 0.. {
            let size = batch.min(left);
            if size == 0 {
                break;
            }
            let mut per_transaction = PerLane::default();
            for position in order(round, peers.len()) {
                let peer = &mut peers[position];
                let time = peer.run(size)?;
                sitting.total[peer.lane] += time;
                per_transaction[peer.lane] = time.as_secs_f64() * 1e9 / f64::from(size);
            }
            if size == batch {
                sitting.rounds.push(per_transaction);
            }
            left -= size;
        }
        for peer in peers {
            let lane = peer.lane.name();
            peer.finish(workload).map_err(|error| format!("lane `{lane}`: {error}"))?;
        }
        Ok(sitting)
    }
}

/// The lanes in the order in which they run in `round`.
fn order(round: usize, lanes: usize) -> impl Iterator<Item = usize> {
    assert!(matches!(lanes, 3 | 5), "a prime number of lanes");
    let step = 1 + round / lanes % (lanes - 1);
    (0..lanes).map(move |i| (round + i * step) % lanes)
}

/// A lane's process, as the parent has it.
struct Peer {
    lane: Lane,
    database: PathBuf,
    process: Child,
    /// None once there is nothing more to ask.
    asks: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// Transactions asked for, the untimed ones included.
    asked: u32,
}

impl Peer {
    fn start(lane: Lane, workload: Workload, database: PathBuf) -> Result<Self> {
        let job = Job { lane, workload, database };
        let mut process = Command::new(std::env::current_exe()?)
            .env(JOB, serde_json::to_string(&job)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let asks = process.stdin.take();
        let answers = BufReader::new(process.stdout.take().ok_or("no pipe")?);
        Ok(Self { lane, database: job.database, process, asks, answers, asked: 0 })
    }

    fn ask(&mut self, ask: Ask) -> Result<u64> {
        let asks = self.asks.as_mut().ok_or("nothing more may be asked")?;
        let mut line = serde_json::to_string(&ask)?;
        line.push('\n');
        asks.write_all(line.as_bytes())?;
        line.clear();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(format!("lane `{}` ended early", self.lane.name()).into());
        }
        Ok(line.trim_end().parse()?)
    }

    fn run(&mut self, transactions: u32) -> Result<Duration> {
        self.asked += 1 + transactions;
        Ok(Duration::from_nanos(self.ask(Ask::Run(transactions))?))
    }

    /// Verifies the lane and ends its process. See the header of `main.rs`.
    fn finish(mut self, workload: Workload) -> Result<()> {
        self.ask(Ask::Begin)?;
        let inside = is_locked(&self.database)?;
        let kinds = kinds_of_lock(self.process.id())?;
        let done = self.ask(Ask::Rollback)?;
        let outside = is_locked(&self.database)?;
        if (inside, outside) != (self.lane.holds_flock(), false) {
            return Err(format!("flock held: {inside} inside, {outside} outside a write transaction").into());
        }
        if workload.operation.is_lock() && !kinds.iter().eq([self.lane.kind_of_lock()]) {
            return Err(format!("SQLite's locks are {kinds:?}, not {}", self.lane.kind_of_lock()).into());
        }
        if done != u64::from(self.asked) {
            return Err(format!("{} transactions asked for, {done} done", self.asked).into());
        }
        self.asks = None;
        let status = self.process.wait()?;
        if !status.success() {
            return Err(status.to_string().into());
        }
        match self.lane {
            Lane::FlockPair => Ok(()), // it has no transactions
            _ => workload.audit(&self.database, self.asked),
        }
    }
}

impl Drop for Peer {
    /// After an error, too, no process stays behind. (One that has been waited for is not signalled.)
    fn drop(&mut self) {
        self.asks = None;
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The kinds of fcntl(2) lock that a process holds, as the kernel lists them for each of its descriptors: `POSIX`, the
/// process's own, or `OFDLCK`, an open file description's. (Not by `/proc/locks`: that is the whole machine's list, and
/// while others lock and unlock, a reader of it may miss lines.)
fn kinds_of_lock(process: u32) -> Result<BTreeSet<String>> {
    let mut kinds = BTreeSet::new();
    for descriptor in std::fs::read_dir(format!("/proc/{process}/fdinfo"))? {
        let info = std::fs::read_to_string(descriptor?.path())?;
        let locks = info.lines().filter_map(|line| line.strip_prefix("lock:"));
        kinds.extend(locks.filter_map(|lock| lock.split_whitespace().nth(1)).map(str::to_owned));
    }
    kinds.remove("FLOCK");
    Ok(kinds)
}

/// Whether someone holds the flock on the database's lock file, asked without making one.
fn is_locked(database: &Path) -> Result<bool> {
    let file = match File::open(lock_file(database)) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    match file.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}
