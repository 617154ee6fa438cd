//! One client process: a writer or a reader.
//!
//! The parent starts this executable again with a [`Job`] in the environment. The client opens the database and
//! prepares its statements, says "ready", and waits for the end of its standard input. That is one pipe for all
//! clients, so closing it starts them together; and a parent that dies closes it too. It works for as long as the job
//! says by its own clock, writes its [`Tally`] as one line of JSON, and ends.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use rusqlite::{Connection, ErrorCode, ToSql};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::variant::{BUSY_TIMEOUT, Variant};
use crate::workload::{BEGIN, COMMIT, COUNT, Cell, INSERT, PAYLOAD, READ, beside};

/// The environment variable that holds the job, and thereby tells a client from the parent.
pub(crate) const JOB: &str = "KANBANLOCK_BENCH_JOB";

/// What a client says when it waits for the start.
pub(crate) const READY: &str = "ready";

/// What a reader pauses between two reads: readers are to disturb the writers, not to use up the processors.
const READER_PAUSE: Duration = Duration::from_millis(1);

/// What a process does.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Role {
    Writer,
    Reader,
}

/// What a process is started for.
#[derive(Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) role: Role,
    /// Its number among those of its role.
    pub(crate) number: u32,
    pub(crate) cell: Cell,
    pub(crate) variant: Variant,
    pub(crate) database: PathBuf,
    pub(crate) duration: Duration,
}

/// What a process did.
#[derive(Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Latencies in nanoseconds, serialised.
    latencies: Vec<u8>,
    /// All transactions that SQLite acknowledged.
    pub(crate) done: u32,
    /// Those of them that were acknowledged before the end of the job's duration.
    pub(crate) in_time: u32,
    /// How often SQLITE_BUSY reached the application, by statement, extended result code and whether it was early.
    pub(crate) busy: BTreeMap<String, u32>,
    /// Those that came when the attempt had taken less than [`BUSY_TIMEOUT`], by more than a tenth of a second.
    pub(crate) early: u32,
    /// User and system time of the process.
    pub(crate) cpu: Duration,
}

impl Tally {
    pub(crate) fn latencies(&self) -> Result<Histogram<u64>> {
        Ok(Deserializer::new().deserialize(&mut self.latencies.as_slice())?)
    }
}

/// An empty histogram: three digits, 100 ns to two minutes.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 120_000_000_000, 3).expect("bounds in order, digits in range")
}

/// The job of this process, if it has one.
pub(crate) fn job() -> Option<Result<Job>> {
    std::env::var(JOB).ok().map(|job| Ok(serde_json::from_str(&job)?))
}

/// Does it.
pub(crate) fn work(job: &Job) -> Result<()> {
    if job.variant.kanbanlock.is_some() {
        // SAFETY: sqlite3_config must not run beside other SQLite calls; this is the only thread, and its first one.
        unsafe { rusqlite::trace::config_log(Some(show)) }?;
        kanbanlock::register()?;
    }
    let connection = job.variant.open(&job.database, job.number)?;
    connection.pragma_update(None, "synchronous", job.cell.workload.place.synchronous())?;
    let tally = match job.role {
        Role::Writer => {
            let flock = job
                .variant
                .app_flock
                .then(|| File::create(beside(&job.database, ".app-lock")))
                .transpose()?;
            let mut writer = Writer { connection: &connection, flock, client: job.number, sequence: 0 };
            for statement in [BEGIN, INSERT, COUNT, COMMIT] {
                connection.prepare_cached(statement)?;
            }
            repeat(job, job.cell.think, || writer.transaction())?
        }
        Role::Reader => {
            connection.prepare_cached(READ)?;
            repeat(job, READER_PAUSE, || read(&connection))?
        }
    };
    // Before the connection is closed: the last one to close runs a checkpoint.
    say(&serde_json::to_string(&tally)?)
}

/// kanbanlock's lines in SQLite's log: a refused parameter, a wait that is too long, a queue that cannot be had.
fn show(_code: c_int, line: &str) {
    if line.starts_with("kanbanlock:") {
        eprintln!("{line}");
    }
}

fn say(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}

/// Waits for the start, and then repeats `transaction` until the duration is over. One that has begun by then is
/// brought to its end, so that the longest waits are not the ones that are left out.
///
/// A transaction that meets SQLITE_BUSY is tried again at once; its latency is the time of all its attempts.
fn repeat(job: &Job, pause: Duration, mut transaction: impl FnMut() -> Result<(), Failure>) -> Result<Tally> {
    let mut latencies = histogram();
    let mut tally = Tally {
        latencies: Vec::new(),
        done: 0,
        in_time: 0,
        busy: BTreeMap::new(),
        early: 0,
        cpu: Duration::ZERO,
    };
    say(READY)?;
    std::io::stdin().lock().read_to_end(&mut Vec::new())?;
    let cpu = cpu_time();
    let end = Instant::now() + job.duration;
    loop {
        let begin = Instant::now();
        if begin >= end {
            break;
        }
        while let Err(failure) = transaction() {
            match failure {
                Failure::Busy { at, is_early } => {
                    *tally.busy.entry(at).or_default() += 1;
                    tally.early += u32::from(is_early);
                }
                Failure::Other(error) => return Err(error),
            }
        }
        let now = Instant::now();
        latencies.saturating_record(u64::try_from((now - begin).as_nanos())?);
        tally.done += 1;
        if now < end {
            tally.in_time += 1;
        }
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
    tally.cpu = cpu_time() - cpu;
    V2DeflateSerializer::new().serialize(&latencies, &mut tally.latencies)?;
    Ok(tally)
}

/// User and system time of this process so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).expect("the time used is not negative")
}

/// Why a transaction was not committed.
enum Failure {
    Busy { at: String, is_early: bool },
    Other(Box<dyn std::error::Error>),
}

impl Failure {
    /// Of `statement`, in an attempt that began at `begin`.
    fn of(error: rusqlite::Error, statement: &str, begin: Instant) -> Self {
        match error.sqlite_error() {
            Some(sqlite) if sqlite.code == ErrorCode::DatabaseBusy => {
                let is_early = begin.elapsed() + Duration::from_millis(100) < BUSY_TIMEOUT;
                let verb = statement.split(' ').next().unwrap_or_default();
                let early = if is_early { " early" } else { "" };
                Self::Busy { at: format!("{verb} ({}){early}", sqlite.extended_code), is_early }
            }
            _ => Self::Other(format!("{statement}: {error}").into()),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Other(error.into())
    }
}

struct Writer<'a> {
    connection: &'a Connection,
    /// The application's own lock file, open for life.
    flock: Option<File>,
    client: u32,
    /// Of the last commit.
    sequence: u32,
}

impl Writer<'_> {
    fn transaction(&mut self) -> Result<(), Failure> {
        if let Some(flock) = &self.flock {
            flock.lock()?;
        }
        let committed = self.attempt();
        if committed.is_err() && !self.connection.is_autocommit() {
            self.connection.execute_batch("ROLLBACK").map_err(|error| Failure::Other(error.into()))?;
        }
        if let Some(flock) = &self.flock {
            flock.unlock()?;
        }
        committed?;
        self.sequence += 1;
        Ok(())
    }

    fn attempt(&self) -> Result<(), Failure> {
        let begin = Instant::now();
        let run = |sql: &str, parameters: &[&dyn ToSql]| {
            let done = self.connection.prepare_cached(sql).and_then(|mut sql| sql.execute(parameters));
            done.map_err(|error| Failure::of(error, sql, begin))
        };
        run(BEGIN, &[])?;
        run(INSERT, &[&self.client, &(self.sequence + 1), &PAYLOAD])?;
        run(COUNT, &[])?;
        run(COMMIT, &[])?;
        Ok(())
    }
}

/// One read transaction, which must see a consistent snapshot.
fn read(connection: &Connection) -> Result<(), Failure> {
    let begin = Instant::now();
    let (counter, last): (u32, u32) = connection
        .prepare_cached(READ)
        .and_then(|mut sql| sql.query_row([], |row| Ok((row.get(0)?, row.get(1)?))))
        .map_err(|error| Failure::of(error, READ, begin))?;
    if counter == last {
        Ok(())
    } else {
        Err(Failure::Other(format!("a snapshot has {last} entries and a counter of {counter}").into()))
    }
}
