//! # A worker process: one random action after the other
//!
//! Most are write transactions of the kanban board, each acknowledged in the log. The others are logged as what
//! they did. SQLITE_BUSY is an answer that any of them may get; any other error ends the process and fails the
//! round.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rusqlite::backup::Backup;
use rusqlite::{Connection, OpenFlags, TransactionBehavior, params};

use crate::Result;
use crate::acklog::Entry;
use crate::audit;
use crate::board::{self, CommitId, Counted};
use crate::committer::Committer;
use crate::job::{Job, Journal};
use crate::mischief;
use crate::place::beside;
use crate::prober::Prober;
use crate::session::{Signal, nanoseconds, say};

/// How often the parent hears of the progress.
const PROGRESS: Duration = Duration::from_millis(200);

/// How long a connection stays closed in an intermission, in milliseconds: the pace of the workload.
const CLOSED_MS: std::ops::Range<u64> = 0..20;

/// What a worker can do.
#[derive(Clone, Copy)]
enum Action {
    Commit,
    RollBack,
    Look,
    Checkpoint,
    Vacuum,
    Backup,
    Reopen,
    LeaveWal,
}

/// How often each is drawn, of 1000.
const WEIGHTS: [(Action, u32); 8] = [
    (Action::Commit, 800),
    (Action::RollBack, 30),
    (Action::Look, 80),
    (Action::Checkpoint, 40),
    (Action::Vacuum, 5),
    (Action::Backup, 5),
    (Action::Reopen, 30),
    (Action::LeaveWal, 10),
];

struct Worker<'a> {
    committer: Committer,
    job: &'a Job,
    random: Rng,
    prober: Option<Prober>,
    intermission: PathBuf,
}

/// The process: returns when told to stop.
pub(crate) fn run(job: &Job) -> Result<()> {
    let db = &job.database.path;
    let prober = job.stray_closes.then(|| Prober::start(db));
    let Some(committer) = Committer::begin(job)? else { return Ok(()) };
    let (random, intermission) = (Rng::with_seed(job.seed), mischief::intermission(db));
    let mut worker = Worker { committer, job, random, prober, intermission };
    let mut told = Instant::now();
    while !worker.committer.session.think() {
        worker.act()?;
        if told.elapsed() >= PROGRESS {
            worker.tell()?;
            told = Instant::now();
        }
    }
    worker.tell()
}

impl Worker<'_> {
    fn act(&mut self) -> Result<()> {
        if let Some(journal) = mischief::announced(&self.intermission) {
            return self.act_in_intermission(journal);
        }
        match draw(&mut self.random) {
            Action::Commit => self.committer.commit(board::work).map(drop),
            Action::RollBack => self.attempt("rollback", roll_back),
            Action::Look => self.look(),
            Action::Checkpoint => self.checkpoint(),
            Action::Vacuum => self.attempt("VACUUM", |conn| conn.execute_batch("VACUUM")),
            Action::Backup => self.back_up(),
            Action::Reopen => self.reopen(),
            // Other connections keep WAL mode in place: it asks for EXCLUSIVE in vain.
            Action::LeaveWal => self.switch(Journal::Delete),
        }
    }

    /// Short connections, which let the journal mode be switched.
    fn act_in_intermission(&mut self, journal: Journal) -> Result<()> {
        match self.random.u32(0..4) {
            0 => self.switch(journal)?,
            1 => self.look()?,
            _ => self.committer.commit(board::work).map(drop)?,
        }
        self.reopen()?;
        thread::sleep(Duration::from_millis(self.random.u64(CLOSED_MS)));
        Ok(())
    }

    fn reopen(&mut self) -> Result<()> {
        self.committer.session.close();
        self.did("close", 1)
    }

    fn switch(&mut self, journal: Journal) -> Result<()> {
        let set = |conn: &mut Connection| board::set_journal_mode(conn, journal);
        match self.committer.session.attempt(set)? {
            Some(mode) => self.did(&format!("journal_mode asked: {mode}"), 1),
            None => Ok(()),
        }
    }

    fn checkpoint(&mut self) -> Result<()> {
        let modes = ["PASSIVE", "FULL", "RESTART", "TRUNCATE"];
        let mode = self.random.choice(modes).unwrap_or("PASSIVE");
        // Its row says whether it was blocked, which is no error.
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        self.attempt(&format!("checkpoint {mode}"), |conn| conn.query_row(&sql, [], |_| Ok(())))
    }

    /// A snapshot agrees with itself, and has what this worker has been promised.
    fn look(&mut self) -> Result<()> {
        let (acknowledged, begin) = (self.committer.acknowledged(), Instant::now());
        let seen = self.committer.session.attempt(|conn| {
            let mode: String = conn.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
            Ok((mode, disagreements(conn, acknowledged)?))
        })?;
        match seen {
            Some((mode, seen)) if seen.is_empty() => {
                self.log(&Entry::Snapshot { ns: nanoseconds(begin)? })?;
                self.did(&format!("snapshot in mode {mode}"), 1)
            }
            Some((_, seen)) => self.violations("snapshot", seen),
            None => Ok(()),
        }
    }

    /// An online backup into a file, which must be sound and have what this worker has been promised.
    fn back_up(&mut self) -> Result<()> {
        let acknowledged = self.committer.acknowledged();
        let copy = beside(&self.job.database.path, &format!(".copy-{}", self.job.number));
        remove_database(&copy)?;
        let seen = self.committer.session.attempt(|conn| back_up(conn, &copy, acknowledged))?;
        remove_database(&copy)?;
        match seen {
            Some(Some(seen)) => {
                self.violations("backup", seen)?;
                self.did("backup", 1)
            }
            Some(None) => self.did("backup (given up)", 1),
            None => Ok(()),
        }
    }

    /// Does it once, and logs that unless it was SQLITE_BUSY.
    fn attempt(
        &mut self,
        what: &str,
        action: impl FnOnce(&mut Connection) -> rusqlite::Result<()>,
    ) -> Result<()> {
        match self.committer.session.attempt(action)? {
            Some(()) => self.did(what, 1),
            None => Ok(()),
        }
    }

    fn violations(&mut self, of: &str, seen: Vec<String>) -> Result<()> {
        seen.into_iter().try_for_each(|what| self.log(&Entry::Violation(format!("{of}: {what}"))))
    }

    fn did(&mut self, what: &str, count: u64) -> Result<()> {
        self.log(&Entry::Did { what: what.to_owned(), count })
    }

    fn log(&mut self, entry: &Entry) -> Result<()> {
        Ok(self.committer.session.log.append(entry)?)
    }

    fn tell(&mut self) -> Result<()> {
        say(&Signal::Commits(self.committer.acknowledged().seq.unsigned_abs()));
        let closes = self.prober.as_ref().map_or(0, Prober::take);
        self.did("stray close", closes)
    }
}

fn draw(random: &mut Rng) -> Action {
    let mut point = random.u32(0..WEIGHTS.iter().map(|(_, weight)| weight).sum());
    for (action, weight) in WEIGHTS {
        match point.checked_sub(weight) {
            Some(rest) => point = rest,
            None => return action,
        }
    }
    Action::Commit
}

/// A large transaction whose pages spill out of the cache before it is rolled back.
fn roll_back(conn: &mut Connection) -> rusqlite::Result<()> {
    conn.pragma_update(None, "cache_size", 16)?;
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    tx.execute("UPDATE tasks SET body = randomblob(400)", [])?;
    tx.rollback()?;
    conn.pragma_update(None, "cache_size", -2000)
}

/// What is wrong in one snapshot.
fn disagreements(conn: &mut Connection, acknowledged: CommitId) -> rusqlite::Result<Vec<String>> {
    let tx = conn.transaction()?;
    let counted = Counted::default().advance(&tx)?;
    let mut seen = board::disagreements(&tx, counted, true)?;
    let CommitId { worker, incarnation, seq } = acknowledged;
    let present: i64 = tx
        .prepare_cached(
            "SELECT count(*) FROM task_events WHERE worker = ?1 AND incarnation = ?2 AND seq <= ?3",
        )?
        .query_row(params![worker, incarnation, seq], |row| row.get(0))?;
    if present != seq {
        seen.push(format!("{present} commits of {seq} that were acknowledged to {worker}.{incarnation}"));
    }
    if counted.advance(&tx)? != counted {
        seen.push("events appeared inside a snapshot".to_owned());
    }
    tx.commit()?;
    Ok(seen)
}

/// What is wrong in a backup. None if others wrote so much that it was given up.
fn back_up(
    conn: &mut Connection,
    copy: &Path,
    acknowledged: CommitId,
) -> rusqlite::Result<Option<Vec<String>>> {
    /// Pages for one step, and how many steps: a write by another process lets it begin again.
    const STEPS: (i32, u32) = (200, 200);
    let mut copy = Connection::open_with_flags_and_vfs(copy, OpenFlags::default(), "unix")?;
    copy.pragma_update(None, "synchronous", "off")?;
    if !step_through(&Backup::new(conn, &mut copy)?, STEPS)? {
        return Ok(None);
    }
    let mut seen = audit::damage(&copy)?;
    seen.extend(disagreements(&mut copy, acknowledged)?);
    Ok(Some(seen))
}

fn step_through(backup: &Backup<'_, '_>, (pages, steps): (i32, u32)) -> rusqlite::Result<bool> {
    use rusqlite::backup::StepResult;
    for _ in 0..steps {
        if backup.step(pages)? == StepResult::Done {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes a copy, one of a killed predecessor's included.
fn remove_database(path: &Path) -> Result<()> {
    for suffix in ["", "-journal", "-wal", "-shm"] {
        match fs::remove_file(beside(path, suffix)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}
