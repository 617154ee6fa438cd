//! The parent's side of one run: one variant in one cell, for a few seconds.
//!
//! While the clients work the parent sleeps, but for a look at the size of the WAL every [`TICK`].

use std::fs::read_to_string;
use std::io::{BufRead, BufReader, PipeReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::Result;
use crate::client::{JOB, Job, READY, Role, Tally};
use crate::variant::Variant;
use crate::workload::{Cell, beside};

/// How often the WAL's size is looked at.
const TICK: Duration = Duration::from_millis(100);

/// Ticks beyond the run's duration without a word from a client that count as a hang. They are counted and not
/// timed, so that a machine that was paused is not mistaken for one.
const PATIENCE: u32 = 600;

/// A look at the WAL that comes this much too late means that the parent did not run meanwhile, and most likely the
/// clients did not either: someone stopped the processes, or the machine slept.
const PAUSE: Duration = Duration::from_secs(1);

/// What one run brought.
pub(crate) struct Run {
    /// By the client's number.
    pub(crate) writers: Vec<Tally>,
    pub(crate) readers: Vec<Tally>,
    /// Bytes; 0 where there is none.
    pub(crate) peak_wal: u64,
    /// The part of the machine's processor time that went neither to the clients nor to idling: other programs', and
    /// the kernel's own threads.
    pub(crate) foreign_cpu: f64,
    /// The run was paused for a second or more, so its latencies are not SQLite's.
    pub(crate) was_paused: bool,
}

impl Run {
    /// Starts the clients on a fresh database in `directory`, lets them work for `duration`, and audits.
    pub(crate) fn make(cell: Cell, variant: &Variant, duration: Duration, directory: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("kanbanlock-contention-").tempdir_in(directory)?;
        let database = directory.path().join("contention.db");
        cell.workload.create(&database)?;
        let mut crew = Crew::start(cell, variant, duration, &database)?;
        let tallies = crew.work(duration, &database)?;
        crew.wait()?;
        let run = Self::of(tallies, &crew)?;
        let commits: Vec<u32> = run.writers.iter().map(|tally| tally.done).collect();
        cell.workload.audit(&database, &commits).map_err(|error| keep(error, directory))?;
        Ok(run)
    }

    fn of(tallies: Vec<Tally>, crew: &Crew) -> Result<Self> {
        let clients: f64 = tallies.iter().map(|tally| tally.cpu.as_secs_f64()).sum();
        let [busy, total] = crew.cpu.ok_or("the run was not begun")?;
        let mut writers = tallies;
        let readers = writers.split_off(crew.writers);
        Ok(Self {
            writers,
            readers,
            peak_wal: crew.peak_wal,
            foreign_cpu: ((busy - clients) / total).max(0.0),
            was_paused: crew.was_paused,
        })
    }
}

/// Leaves the files of a failed audit where they are, and says where.
fn keep(error: Box<dyn std::error::Error>, directory: TempDir) -> Box<dyn std::error::Error> {
    format!("{error}; kept in {}", directory.keep().display()).into()
}

/// A line of a client, or its end.
type Message = (usize, Option<String>);

/// The processes of a run.
struct Crew {
    clients: Vec<Child>,
    writers: usize,
    messages: Receiver<Message>,
    /// The pipe whose end starts the clients.
    start: Option<std::io::PipeWriter>,
    peak_wal: u64,
    /// Processor time of the machine over the run in seconds: not idle, and all of it.
    cpu: Option<[f64; 2]>,
    was_paused: bool,
}

impl Crew {
    /// Starts the clients and waits until each has the database open.
    fn start(cell: Cell, variant: &Variant, duration: Duration, database: &Path) -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        let (sender, messages) = mpsc::channel();
        let mut crew = Self {
            clients: Vec::new(),
            writers: usize::try_from(cell.writers)?,
            messages,
            start: Some(writer),
            peak_wal: 0,
            cpu: None,
            was_paused: false,
        };
        let writers = (0..cell.writers).map(|number| (Role::Writer, number));
        for (role, number) in writers.chain((0..cell.readers).map(|number| (Role::Reader, number))) {
            let variant = variant.clone();
            let job = Job { role, number, cell, variant, database: database.to_owned(), duration };
            crew.hire(&job, &reader, &sender)?;
        }
        let mut ready = 0;
        while ready < crew.clients.len() {
            match crew.messages.recv_timeout(TICK * PATIENCE)? {
                (_, Some(line)) if line == READY => ready += 1,
                (client, line) => return Err(crew.unexpected(client, line)),
            }
        }
        Ok(crew)
    }

    fn hire(&mut self, job: &Job, start: &PipeReader, sender: &Sender<Message>) -> Result<()> {
        let mut client = Command::new(std::env::current_exe()?)
            .env(JOB, serde_json::to_string(job)?)
            .stdin(start.try_clone()?)
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = client.stdout.take().ok_or("no pipe")?;
        listen(self.clients.len(), stdout, sender.clone());
        self.clients.push(client);
        Ok(())
    }

    /// Lets the clients work, and returns what they did.
    fn work(&mut self, duration: Duration, database: &Path) -> Result<Vec<Tally>> {
        let wal = beside(database, "-wal");
        let mut tallies: Vec<Option<Tally>> = self.clients.iter().map(|_| None).collect();
        let before = processor_time()?;
        self.start = None;
        let mut silent = 0;
        while tallies.iter().any(Option::is_none) {
            let asked = Instant::now();
            let message = self.messages.recv_timeout(TICK);
            self.was_paused |= asked.elapsed() > TICK + PAUSE;
            self.peak_wal = self.peak_wal.max(std::fs::metadata(&wal).map_or(0, |wal| wal.len()));
            match message {
                Ok((client, Some(line))) => {
                    if self.cpu.is_none() {
                        let [busy, total] = processor_time()?;
                        self.cpu = Some([busy - before[0], total - before[1]]);
                    }
                    tallies[client] = Some(serde_json::from_str(&line)?);
                    silent = 0;
                }
                Ok((client, None)) if tallies[client].is_some() => {}
                Ok((client, None)) => return Err(self.unexpected(client, None)),
                Err(RecvTimeoutError::Timeout) => silent += 1,
                Err(RecvTimeoutError::Disconnected) => return Err("the clients are gone".into()),
            }
            if TICK * silent > duration + TICK * PATIENCE {
                let hung: Vec<usize> =
                    (0..tallies.len()).filter(|&client| tallies[client].is_none()).collect();
                return Err(
                    format!("hung: clients {hung:?} (readers are those from {})", self.writers).into()
                );
            }
        }
        Ok(tallies.into_iter().flatten().collect())
    }

    /// Waits for the end of every client.
    fn wait(&mut self) -> Result<()> {
        for client in &mut self.clients {
            let status = client.wait()?;
            if !status.success() {
                return Err(format!("a client failed after its work: {status}").into());
            }
        }
        Ok(())
    }

    fn unexpected(&mut self, client: usize, line: Option<String>) -> Box<dyn std::error::Error> {
        match line {
            Some(line) => format!("client {client} said {line:?}").into(),
            // Its end of file has come, so it is about to end; what it has to say about it is on stderr.
            None => format!("client {client} ended early: {:?}", self.clients[client].wait()).into(),
        }
    }
}

impl Drop for Crew {
    /// After an error, too, no process stays behind. (One that has been waited for is not signalled.)
    fn drop(&mut self) {
        for client in &mut self.clients {
            let _ = client.kill();
            let _ = client.wait();
        }
    }
}

/// Passes a client's lines on, and its end of file.
fn listen(client: usize, stdout: ChildStdout, sender: Sender<Message>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
            let _ = sender.send((client, Some(line)));
        }
        let _ = sender.send((client, None));
    });
}

/// Processor time of the whole machine since its start in seconds: not idle, and all of it. proc_stat(5): user, nice,
/// system, idle, iowait, irq, softirq, steal, in hundredths of a second on every Linux that Rust's std runs on.
fn processor_time() -> Result<[f64; 2]> {
    let stat = read_to_string("/proc/stat")?;
    let times =
        stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).ok_or("/proc/stat: no cpu line")?;
    let times: Vec<f64> =
        times.split_whitespace().take(8).map(str::parse).collect::<Result<_, std::num::ParseFloatError>>()?;
    let total: f64 = times.iter().sum();
    let idle: f64 = times.iter().skip(3).take(2).sum();
    Ok([(total - idle) / 100.0, total / 100.0])
}
