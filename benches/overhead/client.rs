//! One lane at work: the process that runs batches of a workload and times them.
//!
//! The parent starts this executable again with a [`Job`] in the environment, and then asks, one line of
//! JSON each; every [`Ask`] is answered by one line with a number. The end of its input ends the process.
//!
//! The clock is read here, around the batch and nothing else, so what the pipe and the wake-up cost stays
//! outside.

use std::fs::File;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::lock_calls::LockCalls;
use crate::workload::{Lane, Operation, Workload, lock_file};

/// The environment variable that holds the job, and thereby tells a lane's process from the parent.
pub(crate) const JOB: &str = "KANBANLOCK_BENCH_JOB";

/// What a lane's process is started for.
#[derive(Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) lane: Lane,
    pub(crate) workload: Workload,
    pub(crate) database: PathBuf,
}

/// What the parent asks for.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Run one transaction, which brings caches and clock speed back after the wait, and then so many more;
    /// the answer is the time of the latter in nanoseconds.
    Run(u32),
    /// Begin a write transaction and stay in it.
    Begin,
    /// Roll it back. The answer is the number of transactions run so far.
    Rollback,
}

/// The job of this process, if it has one.
pub(crate) fn job() -> Option<Result<Job>> {
    std::env::var(JOB).ok().map(|job| Ok(serde_json::from_str(&job)?))
}

/// Does what the parent asks, until it stops asking.
pub(crate) fn serve(job: Job) -> Result<()> {
    if job.lane.registers() {
        kanbanlock::register()?;
    }
    let mut client = Client::new(job)?;
    let mut answers = std::io::stdout().lock();
    for ask in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&ask?)? {
            Ask::Run(transactions) => client.run(transactions)?,
            Ask::Begin => client.begin()?,
            Ask::Rollback => client.rollback()?,
        };
        writeln!(answers, "{answer}")?;
        answers.flush()?;
    }
    Ok(())
}

struct Client {
    job: Job,
    /// None where there is none to keep: [`Lane::FlockPair`], [`Operation::OpenClose`].
    connection: Option<Connection>,
    /// Open for life beside it, if the lane has one.
    _companion: Option<Connection>,
    /// The application's own lock file, open for life.
    flock: Option<File>,
    done: u32,
}

impl Client {
    fn new(job: Job) -> Result<Self> {
        let flock = match job.lane {
            Lane::AppFlock | Lane::FlockPair => Some(File::create(lock_file(&job.database))?),
            _ => None,
        };
        let companion = job.lane.open_companion(&job.database)?;
        let mut client = Self { job, connection: None, _companion: companion, flock, done: 0 };
        if client.job.workload.operation != Operation::OpenClose {
            client.connection = client.open()?;
        }
        if let (Some(connection), true) = (&client.connection, client.job.workload.operation.is_lock()) {
            client.job.workload.operation.run(connection, 0)?;
        }
        Ok(client)
    }

    fn open(&self) -> Result<Option<Connection>> {
        if self.job.lane == Lane::FlockPair {
            return Ok(None);
        }
        let connection = self.job.lane.open(&self.job.database)?;
        connection.pragma_update(None, "synchronous", self.job.workload.place.synchronous())?;
        Ok(Some(connection))
    }

    fn run(&mut self, transactions: u32) -> Result<u64> {
        let operation = self.job.workload.operation;
        if let (Some(connection), true) = (&self.connection, operation.is_lock()) {
            let calls = LockCalls::new(connection, operation)?;
            calls.run(1)?;
            let start = Instant::now();
            calls.run(transactions)?;
            let time = start.elapsed();
            self.done += 1 + transactions;
            return Ok(u64::try_from(time.as_nanos())?);
        }
        self.run_one()?;
        let start = Instant::now();
        for _ in 0..transactions {
            self.run_one()?;
        }
        Ok(u64::try_from(start.elapsed().as_nanos())?)
    }

    fn run_one(&mut self) -> Result<()> {
        let operation = self.job.workload.operation;
        if let Some(flock) = &self.flock {
            flock.lock()?;
        }
        match &self.connection {
            Some(connection) => operation.run(connection, self.done)?,
            None if operation == Operation::OpenClose => {
                let connection = self.job.lane.open(&self.job.database)?;
                operation.run(&connection, self.done)?;
                connection.close().map_err(|(_, error)| error)?;
            }
            None => {}
        }
        if let Some(flock) = &self.flock {
            flock.unlock()?;
        }
        self.done += 1;
        Ok(())
    }

    fn begin(&mut self) -> Result<u64> {
        if let Some(flock) = &self.flock {
            flock.lock()?;
        }
        if self.connection.is_none() {
            self.connection = self.open()?;
        }
        if let Some(connection) = &self.connection {
            connection.execute_batch("BEGIN IMMEDIATE")?;
        }
        Ok(self.done.into())
    }

    fn rollback(&mut self) -> Result<u64> {
        if let Some(connection) = &self.connection {
            connection.execute_batch("ROLLBACK")?;
        }
        if self.job.workload.operation == Operation::OpenClose {
            self.connection = None;
        }
        if let Some(flock) = &self.flock {
            flock.unlock()?;
        }
        Ok(self.done.into())
    }
}
