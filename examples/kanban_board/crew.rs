//! # The parent's side: start, release, kill, restart and stop the processes
//!
//! One loop and one channel: a thread for each child turns its stdout into messages, and [`Crew::pump`] takes
//! one message or a tick at a time. Nothing is guessed from the passing of time. A child that reports Ready is
//! released when its phase has come (see session.rs), and a child is gone when its stdout is at its end and
//! it was waited for.
//!
//! A [`Disturber`] may send the workers signals meanwhile. One that is killed with SIGKILL is restarted as the
//! next incarnation. A process that ends in any other way fails the run.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal as Posix, kill_process};

use super::Result;
use super::board::Database;
use super::job::{self, Job, Role};
use super::place::{Place, beside};
use super::session::Signal;

/// How often the WAL's size is looked at, at least.
const TICK: Duration = Duration::from_millis(20);
/// How long the processes may take to start, and to stop beyond two busy timeouts, before they count as hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who works, and for how long.
pub(crate) struct Plan {
    pub(crate) workers: u32,
    pub(crate) readers: u32,
    pub(crate) duration: Duration,
    pub(crate) think: Duration,
    pub(crate) seed: u64,
    pub(crate) stray_closes: bool,
}

/// What disturbs the workers at work.
pub(crate) trait Disturber {
    /// Called at each tick, and after each message.
    fn disturb(&mut self, crew: &mut Crew<'_>);

    /// Called once when the work is over: nothing may stay disturbed.
    fn finish(&mut self, crew: &mut Crew<'_>);
}

/// What happened, for the audit and the report.
pub(crate) struct Shift {
    pub(crate) records: Vec<Record>,
    /// Processes that ended by themselves, with the reason.
    pub(crate) failures: Vec<String>,
    pub(crate) elapsed: Duration,
    pub(crate) peak_wal: u64,
}

/// One process that was.
pub(crate) struct Record {
    pub(crate) job: Job,
    /// By a [`Disturber`].
    pub(crate) killed: bool,
}

/// Runs all processes for as long as the options say, and returns when the last one is gone.
pub(crate) fn run(
    plan: &Plan,
    database: &Database,
    place: &Place,
    disturber: Option<&mut dyn Disturber>,
) -> Result<Shift> {
    let mut crew = Crew::new(plan, database, place)?;
    for number in 0..plan.workers {
        crew.hire(Role::Worker, number, 1)?;
    }
    for number in 0..plan.readers {
        crew.hire(Role::Reader, number, 1)?;
    }
    crew.gather();
    let elapsed = crew.work(disturber);
    crew.stop();
    Ok(crew.into_shift(elapsed))
}

#[derive(PartialEq)]
enum Phase {
    /// Until all are ready.
    Gathering,
    Working,
    Stopping,
}

/// A child process, and what is known of it.
struct Member {
    job: Job,
    process: Child,
    /// None once told to stop.
    stdin: Option<ChildStdin>,
    ready: bool,
    released: bool,
    killed: bool,
    gone: bool,
    commits: u64,
    failure: Option<String>,
}

/// A signal of the member with this index; None when its stdout is at its end.
type Message = (usize, Option<Signal>);

/// The processes.
pub(crate) struct Crew<'a> {
    plan: &'a Plan,
    database: &'a Database,
    place: &'a Place,
    executable: PathBuf,
    /// Every process ever started; the index is its name in messages.
    members: Vec<Member>,
    sender: Sender<Message>,
    messages: Receiver<Message>,
    phase: Phase,
    migrated: bool,
    failures: Vec<String>,
    peak_wal: u64,
}

impl<'a> Crew<'a> {
    fn new(plan: &'a Plan, database: &'a Database, place: &'a Place) -> Result<Self> {
        let (sender, messages) = mpsc::channel();
        Ok(Self {
            plan,
            database,
            place,
            executable: std::env::current_exe()?,
            members: Vec::new(),
            sender,
            messages,
            phase: Phase::Gathering,
            migrated: false,
            failures: Vec::new(),
            peak_wal: 0,
        })
    }

    /// Starts a process, which will report Ready.
    fn hire(&mut self, role: Role, number: u32, incarnation: u32) -> Result<()> {
        let job = Job {
            role,
            number,
            incarnation,
            database: self.database.clone(),
            log: self.place.log(role, number, incarnation),
            think: self.plan.think,
            seed: self.plan.seed ^ (u64::from(incarnation) << 32 | u64::from(number)),
            stray_closes: self.plan.stray_closes,
        };
        let mut process = Command::new(&self.executable)
            .args(super::CHILD)
            .arg(serde_json::to_string(&job)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", self.executable.display()))?;
        if let Some(stdout) = process.stdout.take() {
            listen(self.members.len(), stdout, self.sender.clone());
        }
        let stdin = process.stdin.take();
        self.members.push(Member {
            job,
            process,
            stdin,
            ready: false,
            released: false,
            killed: false,
            gone: false,
            commits: 0,
            failure: None,
        });
        Ok(())
    }

    /// Waits until every process is at the barrier.
    fn gather(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.members.iter().all(|member| member.ready) && self.failures.is_empty() {
            self.pump();
            if Instant::now() > deadline {
                self.failures.push(format!("not every process started within {} s", PATIENCE.as_secs()));
            }
        }
    }

    /// Releases the processes and lets them work; returns how long that was.
    fn work(&mut self, mut disturber: Option<&mut dyn Disturber>) -> Duration {
        let duration = self.plan.duration;
        let bar = progress_bar(duration);
        self.phase = Phase::Working;
        self.release();
        let start = Instant::now();
        while start.elapsed() < duration && self.failures.is_empty() {
            self.pump();
            if let Some(disturber) = &mut disturber {
                disturber.disturb(self);
            }
            self.draw(&bar, start.elapsed());
        }
        if let Some(disturber) = disturber {
            disturber.finish(self);
        }
        let elapsed = start.elapsed();
        bar.finish_and_clear();
        elapsed
    }

    /// Tells every process to stop and waits for the last one.
    fn stop(&mut self) {
        self.phase = Phase::Stopping;
        for member in &mut self.members {
            member.stdin = None;
        }
        let patience = PATIENCE + 2 * self.database.busy_timeout;
        let deadline = Instant::now() + patience;
        while !self.members.iter().all(|member| member.gone) {
            self.pump();
            if Instant::now() > deadline {
                self.give_up(patience);
            }
        }
    }

    /// Kills the processes that hang; their end is noticed as any other's.
    fn give_up(&mut self, patience: Duration) {
        for member in self.members.iter_mut().filter(|member| !member.gone) {
            let hung = || format!("hung: it did not stop within {} s", patience.as_secs());
            member.failure.get_or_insert_with(hung);
            let _ = member.process.kill();
        }
    }

    /// Handles one message, or none if none comes within a tick.
    fn pump(&mut self) {
        if let Ok((index, signal)) = self.messages.recv_timeout(TICK) {
            match signal {
                Some(Signal::Ready) => self.members[index].ready = true,
                Some(Signal::Migrated) => self.migrated = true,
                Some(Signal::Commits(commits)) => self.members[index].commits = commits,
                Some(Signal::Failed(reason)) => self.members[index].failure = Some(reason),
                None => self.depart(index),
            }
            self.release();
        }
        let wal = std::fs::metadata(beside(&self.database.path, "-wal"));
        self.peak_wal = self.peak_wal.max(wal.map_or(0, |wal| wal.len()));
    }

    /// Lets those go on that wait at the barrier: workers at once, readers when there is something to read.
    fn release(&mut self) {
        if self.phase != Phase::Working {
            return;
        }
        for member in self.members.iter_mut().filter(|member| member.ready && !member.released) {
            if member.job.role == Role::Worker || self.migrated {
                // A failure means that the process is gone, and its end of file is on its way to us.
                let _ = member.stdin.as_mut().map(|stdin| stdin.write_all(b"go\n"));
                member.released = true;
            }
        }
    }

    /// Takes note of the end of a process; a killed one is succeeded by its next incarnation.
    fn depart(&mut self, index: usize) {
        let member = &mut self.members[index];
        member.gone = true;
        member.stdin = None;
        let stopping = self.phase == Phase::Stopping;
        let unexpected = match member.process.wait() {
            Err(error) => Some(format!("cannot be waited for: {error}")),
            Ok(_) if member.killed => None,
            Ok(status) if stopping && status.success() => None,
            Ok(status) => Some(format!("ended by itself, {status}")),
        };
        let Job { role, number, incarnation, .. } = member.job;
        if let Some(reason) = member.failure.take().or(unexpected) {
            self.failures.push(format!("{} {number}.{incarnation}: {reason}", job::name(role)));
        } else if self.phase == Phase::Working {
            if let Err(error) = self.hire(role, number, incarnation + 1) {
                self.failures.push(error.to_string());
            }
        }
    }

    /// The workers that are alive, by index.
    pub(crate) fn workers(&self) -> Vec<usize> {
        let alive = |member: &Member| member.job.role == Role::Worker && !member.killed && !member.gone;
        (0..self.members.len()).filter(|index| alive(&self.members[*index])).collect()
    }

    /// Sends a signal. The process was not waited for unless it is gone, so its id is still its own.
    pub(crate) fn signal(&mut self, index: usize, signal: Posix) {
        let member = &mut self.members[index];
        if member.gone {
            return;
        }
        member.killed |= signal == Posix::KILL;
        if let Err(error) = kill_process(Pid::from_child(&member.process), signal) {
            member.failure = Some(format!("cannot be sent {signal:?}: {error}"));
        }
    }

    fn draw(&self, bar: &ProgressBar, elapsed: Duration) {
        let commits: u64 = self.members.iter().map(|member| member.commits).sum();
        let kills = self.members.iter().filter(|member| member.killed).count();
        bar.set_position(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
        bar.set_message(format!(
            "{} commits, {kills} kills, WAL up to {}",
            HumanCount(commits),
            HumanBytes(self.peak_wal)
        ));
    }

    fn into_shift(mut self, elapsed: Duration) -> Shift {
        let members = std::mem::take(&mut self.members);
        let records =
            members.into_iter().map(|member| Record { job: member.job, killed: member.killed }).collect();
        Shift { records, failures: std::mem::take(&mut self.failures), elapsed, peak_wal: self.peak_wal }
    }
}

/// A run that could not be finished leaves no process behind.
impl Drop for Crew<'_> {
    fn drop(&mut self) {
        for member in self.members.iter_mut().filter(|member| !member.gone) {
            let _ = member.process.kill();
            let _ = member.process.wait();
        }
    }
}

/// Passes a child's signals on, and its end of file.
fn listen(index: usize, stdout: ChildStdout, sender: Sender<Message>) {
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
            let signal = serde_json::from_str(&line)
                .unwrap_or_else(|error| Signal::Failed(format!("said {line:?}: {error}")));
            let _ = sender.send((index, Some(signal)));
        }
        let _ = sender.send((index, None));
    });
}

/// Hidden by indicatif where there is no terminal.
fn progress_bar(duration: Duration) -> ProgressBar {
    let bar = ProgressBar::new(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
    let style = ProgressStyle::with_template("{bar:30} {elapsed:>4}  {msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
