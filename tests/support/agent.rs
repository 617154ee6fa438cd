//! Helper processes: the test binary runs itself again, and does as it is told through a socket.
//!
//! A test binary that uses agents needs one test of this form, which is the agent's main function when the
//! binary runs as one, and nothing otherwise:
//!
//! ```ignore
//! #[test]
//! fn agent_process() {
//!     support::agent::serve_if_asked();
//! }
//! ```
//!
//! Commands and replies are JSON lines. Every command is answered, so tests wait for answers and need no sleep.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use super::handles::{Answer, Handles, Order};
use super::killer::{Killer, Step};

const ROLE: &str = "KANBANLOCK_TEST_AGENT";
const STOCK: &str = "KANBANLOCK_TEST_AGENT_STOCK";

/// What an agent can do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// Open a database by URI (kanbanlock is registered); `busy_timeout` 0.
    Open(String),
    /// Open a database through kanbanlock on a tap that kills the agent at the `nth` call of `step`.
    OpenDoomed {
        path: PathBuf,
        step: Step,
        nth: usize,
    },
    /// `execute_batch`.
    Execute(String),
    /// The first column of the first row, as text.
    Query(String),
    Close,
    /// Try `flock(LOCK_EX|LOCK_NB)` and let go again: `true` if it was free.
    IsFree(PathBuf),
    /// `flock(LOCK_EX)`, and keep it.
    Flock(PathBuf),
    Unflock,
    /// Wait until nobody holds `flock(LOCK_EX)` on this file: a starting line that several agents leave at once.
    AwaitUnflocked(PathBuf),
    /// kanbanlock's lines in SQLite's log.
    Log,
    /// Register kanbanlock now (in a stock agent).
    Register,
    /// Open the file and close it again, as any code in the process might.
    StrayClose(PathBuf),
    /// fork(2): the child lives until this agent's socket is closed by everybody. Answers its pid.
    Fork,
    /// fork(2): the child, with all that it has inherited, connects to this socket and serves there. Answers its pid.
    ForkServing(PathBuf),
    /// The number of open descriptors.
    CountDescriptors,
    /// The agent's own process id: it may have been started by another than its parent here.
    Pid,
    /// One stat(2) of a path that is not there, to be found in a trace of system calls.
    Mark(PathBuf),
    /// An order to the database handle of that number; the reply is its [`Answer`] in JSON.
    Handle(usize, Order),
    /// The same, without waiting for the handle's answer …
    HandleLater(usize, Order),
    /// … which this one asks for.
    HandleAnswer(usize),
    /// `execute_batch` as [`Timed`], in JSON.
    Timed(String),
    /// Short write transactions, one after the other; the reply is a [`Tally`] in JSON.
    Storm(Storm),
}

/// Inserts `(writer, 0)`, `(writer, 1)` … into `t (writer, number)`, each in a transaction of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Storm {
    pub uri: String,
    /// It begins when nobody holds the flock on this file.
    pub start: PathBuf,
    pub millis: u64,
    pub patience: Patience,
    pub writer: usize,
    /// Bytes of ballast in each row.
    pub ballast: usize,
}

/// A busy handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Patience {
    /// SQLite's own, of so many milliseconds.
    Timeout(u64),
    /// Sleeps so many milliseconds by itself each time.
    Sleeps(u64),
    /// Ditto, of 1 to so many milliseconds.
    SleepsUpTo(u64),
}

/// What a [`Storm`] came to.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    pub commits: u64,
    /// How often the answer was SQLITE_BUSY.
    pub busy: u64,
    /// The longest transaction, in microseconds.
    pub longest: u64,
    /// The largest size of `<db>-wal` that was seen, in bytes.
    pub wal: u64,
}

/// What [`Task::Timed`] came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Timed {
    pub reply: Reply,
    /// How long it took, in microseconds.
    pub micros: u64,
}

/// A reply: text, or SQLite's extended result code and message.
pub type Reply = Result<String, (i32, String)>;

/// A helper process. Killed (SIGKILL) when dropped.
pub struct Agent {
    process: Child,
    /// The agent's own, if it is a child of `process`.
    unshared: Option<u32>,
    requests: UnixStream,
    replies: BufReader<UnixStream>,
}

impl Agent {
    pub fn start() -> Agent {
        Agent::run(Command::new(std::env::current_exe().unwrap()))
    }

    /// An agent that does not register kanbanlock: plain SQLite.
    pub fn stock() -> Agent {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(STOCK, "1");
        Agent::run(command)
    }

    /// The same, with the database open through the plain unix VFS.
    pub fn stock_with_db(path: &Path) -> Agent {
        let mut agent = Agent::stock();
        agent.ask(&Task::Open(format!("file:{}?vfs=unix", path.display()))).unwrap();
        agent
    }

    /// An agent that is not root (uid 65534, if this process is root).
    pub fn unprivileged() -> Agent {
        Agent::unprivileged_in(&["--clear-groups"])
    }

    /// The same; `groups`: what setpriv(1) is told of its groups.
    pub fn unprivileged_in(groups: &[&str]) -> Agent {
        // SAFETY: no arguments, cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            return Agent::start();
        }
        // The build folder may be closed to others: run a copy.
        let copy = std::env::temp_dir().join(format!("{}-{}", super::unique("agent"), std::process::id()));
        std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        std::fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534"]).args(groups).arg(&copy);
        let mut agent = Agent::run(command);
        agent.log(); // it has started, so its file can go
        std::fs::remove_file(copy).unwrap();
        agent
    }

    /// An agent that `wrapper` starts: a command line that ends where another begins. Killing the agent kills the
    /// wrapper; the agent itself goes when it notices that nobody asks any more.
    pub fn within(mut wrapper: Command) -> Agent {
        wrapper.arg(std::env::current_exe().unwrap());
        Agent::run(wrapper)
    }

    /// An agent in namespaces of its own: unshare(1) with these arguments. `None`: not allowed here.
    pub fn unshared(arguments: &[&str]) -> Option<Agent> {
        let mut command = super::unshare(arguments)?;
        command.args(["--fork", "--kill-child"]);
        let mut agent = Agent::within(command);
        agent.log(); // it has started
        let parent = agent.process.id();
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
        agent.unshared = Some(children.trim().parse().unwrap());
        Some(agent)
    }

    /// An agent whose process `prepare` has had its say about.
    pub fn prepared(prepare: impl FnOnce(&mut Command)) -> Agent {
        let mut command = Command::new(std::env::current_exe().unwrap());
        prepare(&mut command);
        Agent::run(command)
    }

    fn run(mut command: Command) -> Agent {
        let _fork = super::no_fork_meanwhile();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let process = command
            .args(["--exact", "agent_process", "--nocapture"])
            .env(ROLE, "1")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Agent { process, unshared: None, replies: BufReader::new(ours.try_clone().unwrap()), requests: ours }
    }

    /// An agent whose system calls strace(1) writes to `trace`.
    pub fn traced(trace: &Path) -> Agent {
        let mut command = Command::new("strace");
        command.arg("-qq").arg("-f").arg("-o").arg(trace).arg(std::env::current_exe().unwrap());
        Agent::run(command)
    }

    /// An agent with the database open through that VFS.
    pub fn with_db(path: &Path, vfs: &str) -> Agent {
        let mut agent = Agent::start();
        agent.ask(&Task::Open(format!("file:{}?vfs={vfs}", path.display()))).unwrap();
        agent
    }

    /// Sends a task without waiting for its answer.
    pub fn send(&mut self, task: &Task) {
        let mut line = serde_json::to_vec(task).unwrap();
        line.push(b'\n');
        self.requests.write_all(&line).unwrap();
    }

    /// Waits for the next answer.
    pub fn receive(&mut self) -> Reply {
        self.receive_or_death().unwrap_or_else(|| panic!("the agent died: {:?}", self.process.wait()))
    }

    fn receive_or_death(&mut self) -> Option<Reply> {
        let mut line = String::new();
        let length = self.replies.read_line(&mut line).unwrap();
        (length != 0).then(|| serde_json::from_str(&line).unwrap())
    }

    pub fn ask(&mut self, task: &Task) -> Reply {
        self.send(task);
        self.receive()
    }

    /// Lets a task go on that has called [`pause`].
    pub fn resume(&mut self) {
        self.requests.write_all(b"\n").unwrap();
    }

    /// [`Agent::ask`] for an agent that may be killed by it: `None`, and its process is gone, if SIGKILL has.
    pub fn ask_doomed(&mut self, task: &Task) -> Option<Reply> {
        use std::os::unix::process::ExitStatusExt;
        self.send(task);
        if let Some(reply) = self.receive_or_death() {
            return Some(reply);
        }
        let status = self.process.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "the agent died, but not as planned: {status}");
        None
    }

    pub fn execute(&mut self, sql: &str) -> Reply {
        self.ask(&Task::Execute(sql.to_owned()))
    }

    pub fn query(&mut self, sql: &str) -> String {
        self.ask(&Task::Query(sql.to_owned())).unwrap()
    }

    /// kanbanlock's lines in the agent's SQLite log so far.
    pub fn log(&mut self) -> String {
        self.ask(&Task::Log).unwrap()
    }

    pub fn is_free(&mut self, lock_file: &Path) -> bool {
        self.ask(&Task::IsFree(lock_file.to_owned())).unwrap() == "true"
    }

    /// Gives one of the agent's database handles an order. `None`: the agent has died of it.
    pub fn order(&mut self, handle: usize, order: Order) -> Option<Answer> {
        self.send(&Task::Handle(handle, order));
        let answer = self.receive_or_death()?;
        Some(serde_json::from_str(&answer.unwrap()).unwrap())
    }

    /// The answer to [`Task::Timed`].
    pub fn receive_timed(&mut self) -> Timed {
        serde_json::from_str(&self.receive().unwrap()).unwrap()
    }

    pub fn execute_timed(&mut self, sql: &str) -> Timed {
        self.send(&Task::Timed(sql.to_owned()));
        self.receive_timed()
    }

    /// The answer to [`Task::Storm`].
    pub fn receive_tally(&mut self) -> Tally {
        serde_json::from_str(&self.receive().unwrap()).unwrap()
    }

    /// SIGSTOP, SIGCONT.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits until one of the agent's threads sleeps in the queue: in futex(2), on a word of the queue's memory. In a stock
    /// process: in the sleep of SQLite's busy handler.
    pub fn await_asleep(&self, is_queued: bool) {
        let process = PathBuf::from(format!("/proc/{}", self.pid()));
        self.await_call(|number, argument| {
            if is_queued {
                number == libc::SYS_futex
                    && queue_memory(&process).iter().any(|range| range.contains(&argument))
            } else {
                number == libc::SYS_clock_nanosleep || number == libc::SYS_nanosleep
            }
        });
    }

    /// Waits until SIGSTOP has done its work.
    pub fn await_stopped(&self) {
        // "(5) …: One of the following characters", proc(5), /proc/pid/stat, after the name in parentheses.
        let is_stopped = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        while !is_stopped() {
            std::thread::yield_now();
        }
    }

    /// Waits until one of the agent's threads sleeps in flock(2).
    pub fn await_flock(&self) {
        self.await_call(|number, _| number == libc::SYS_flock);
    }

    /// Until one of its threads is in a system call of that number and first argument.
    fn await_call(&self, is_it: impl Fn(libc::c_long, u64) -> bool) {
        let threads = PathBuf::from(format!("/proc/{}/task", self.pid()));
        loop {
            for thread in std::fs::read_dir(&threads).unwrap() {
                // "the system call number …, followed by the values of its arguments", proc(5).
                let call =
                    std::fs::read_to_string(thread.unwrap().path().join("syscall")).unwrap_or_default();
                let mut fields = call.split_ascii_whitespace();
                let number = fields.next().and_then(|number| number.parse().ok());
                let argument = fields.next().and_then(|word| parse_hex(word.trim_start_matches("0x")));
                if number.zip(argument).is_some_and(|(number, argument)| is_it(number, argument)) {
                    return;
                }
            }
            std::thread::sleep(Duration::from_micros(200)); // leaves the processor to it
        }
    }

    /// As this process sees it.
    pub fn pid(&self) -> u32 {
        self.unshared.unwrap_or_else(|| self.process.id())
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn parse_hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// Where a process has mapped the queue's memory.
fn queue_memory(process: &Path) -> Vec<std::ops::Range<u64>> {
    let maps = std::fs::read_to_string(process.join("maps")).unwrap_or_default();
    let queue = maps.lines().filter(|line| line.contains("/memfd:kanbanlock-queue"));
    queue
        .filter_map(|line| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            Some(parse_hex(from)?..parse_hex(to)?)
        })
        .collect()
}

impl Agent {
    /// Lets the agent end by itself, and waits for what started it.
    pub fn end(mut self) -> ExitStatus {
        self.requests.shutdown(Shutdown::Write).unwrap();
        self.process.wait().unwrap()
    }

    /// Waits until the process that was started, the agent or its wrapper, has ended.
    pub fn wait(&mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    /// SIGKILL to the wrapper; the agent goes on.
    pub fn kill_wrapper(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The agent's main function, if this process is one.
pub fn serve_if_asked() {
    serve_if_asked_with(|_| ());
}

/// The same, with VFSes of the test's own: in an agent, `register_more` registers them, and is told whether
/// kanbanlock is registered (it is not in a stock agent).
pub fn serve_if_asked_with(register_more: impl FnOnce(bool)) {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    super::log::install();
    let is_shimmed = std::env::var_os(STOCK).is_none();
    if is_shimmed {
        kanbanlock::register().unwrap();
    }
    register_more(is_shimmed);
    Worker::default().serve(std::io::stdin().lock(), UnixStream::from(reply_socket()));
    // Skip libtest's own ending: the parent has closed its end, so nobody is interested.
    std::process::exit(0);
}

/// Stops an agent in the middle of a task, from an observer of a call that the task makes. The parent receives
/// `note` ahead of the task's own answer, and lets the task go on with [`Agent::resume`].
pub fn pause(note: &str) {
    let mut parent = UnixStream::from(reply_socket());
    let mut line = serde_json::to_vec(&Reply::Ok(note.to_owned())).unwrap();
    line.push(b'\n');
    parent.write_all(&line).unwrap();
    // Past the buffer of our own standard input, which is empty: the parent sends nothing before an answer.
    let mut newline = [0];
    parent.read_exact(&mut newline).unwrap();
}

/// The socket is our standard input; it is also where the replies go.
fn reply_socket() -> OwnedFd {
    use std::os::fd::AsFd;
    std::io::stdin().as_fd().try_clone_to_owned().unwrap()
}

#[derive(Default)]
struct Worker {
    db: Option<Connection>,
    handles: Handles,
    flock: Option<File>,
}

impl Worker {
    fn perform(&mut self, task: Task) -> Reply {
        let ok = || Ok(String::new());
        match task {
            Task::Open(uri) => {
                let db = Connection::open(uri).map_err(failure)?;
                db.busy_timeout(Duration::ZERO).map_err(failure)?;
                self.db = Some(db);
                ok()
            }
            Task::OpenDoomed { path, step, nth } => {
                let stack = super::Stack::new(Arc::new(Killer::new(step, nth)));
                self.db = Some(super::open(&path, stack.kanbanlock));
                ok()
            }
            Task::Execute(sql) => self.db().execute_batch(&sql).map_err(failure).and_then(|()| ok()),
            Task::Query(sql) => self
                .db()
                .query_row(&sql, [], |row| row.get::<_, rusqlite::types::Value>(0))
                .map(|value| match value {
                    rusqlite::types::Value::Integer(integer) => integer.to_string(),
                    rusqlite::types::Value::Text(text) => text,
                    other => format!("{other:?}"),
                })
                .map_err(failure),
            Task::Close => {
                self.db = None;
                ok()
            }
            Task::IsFree(path) => Ok((!super::is_flocked(&path)).to_string()),
            Task::Flock(path) => {
                let file = File::options().create(true).truncate(false).write(true).open(path).unwrap();
                file.lock().unwrap();
                self.flock = Some(file);
                ok()
            }
            Task::Unflock => {
                self.flock = None;
                ok()
            }
            Task::AwaitUnflocked(path) => {
                File::open(path).unwrap().lock_shared().unwrap();
                ok()
            }
            Task::Register => {
                kanbanlock::register().unwrap();
                ok()
            }
            Task::StrayClose(path) => {
                drop(File::open(path).unwrap());
                ok()
            }
            Task::Fork => Ok(fork_idle_child().to_string()),
            Task::ForkServing(socket) => Ok(self.fork_serving(&socket).to_string()),
            Task::CountDescriptors => Ok(std::fs::read_dir("/proc/self/fd").unwrap().count().to_string()),
            Task::Pid => Ok(std::process::id().to_string()),
            Task::Mark(path) => {
                assert!(std::fs::metadata(path).is_err());
                ok()
            }
            Task::Timed(sql) => {
                let start = Instant::now();
                let reply = self.db().execute_batch(&sql).map_err(failure).and_then(|()| ok());
                let micros = u64::try_from(start.elapsed().as_micros()).unwrap();
                Ok(serde_json::to_string(&Timed { reply, micros }).unwrap())
            }
            Task::Storm(storm) => Ok(serde_json::to_string(&run_storm(&storm)).unwrap()),
            Task::Handle(number, order) => {
                Ok(serde_json::to_string(&self.handles.obey(number, order)).unwrap())
            }
            Task::HandleLater(number, order) => {
                self.handles.give(number, order);
                ok()
            }
            Task::HandleAnswer(number) => Ok(serde_json::to_string(&self.handles.answer_of(number)).unwrap()),
            Task::Log => {
                let lines = super::log::lines_with("");
                Ok(lines.into_iter().map(|(code, line)| format!("({code}) {line}\n")).collect())
            }
        }
    }

    fn db(&self) -> &Connection {
        self.db.as_ref().expect("Task::Open first")
    }

    /// A child that goes on as an agent of its own.
    fn fork_serving(&mut self, socket: &Path) -> i32 {
        // SAFETY: the agent's worker thread forks while its other thread (libtest's main) only waits, so no lock that the
        // child may need is held by a thread that it does not have; and the child never returns to its caller.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let stream = UnixStream::connect(socket).unwrap();
            self.serve(BufReader::new(stream.try_clone().unwrap()), stream);
            std::process::exit(0);
        }
        pid
    }

    /// Does as it is told, until nobody tells any more.
    fn serve(&mut self, requests: impl BufRead, mut replies: impl Write) {
        for line in requests.lines() {
            let Ok(line) = line else { break };
            let reply = self.perform(serde_json::from_str(&line).unwrap());
            let mut line = serde_json::to_vec(&reply).unwrap();
            line.push(b'\n');
            if replies.write_all(&line).is_err() {
                break;
            }
        }
    }
}

/// A child that does nothing but live until it is killed with its process group, or the test ends.
fn fork_idle_child() -> i32 {
    let (mut from_child, mut to_parent) = std::io::pipe().unwrap();
    // SAFETY: the child calls write(2), alarm(2) and pause(2), which are async-signal-safe, and never returns into Rust.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let _ = to_parent.write_all(b"!"); // fork(2) is over in the child too: its atfork handlers have run
        // SAFETY: the child goes when its parent's test does: PR_SET_PDEATHSIG would be too early (the test kills the
        // parent), so an alarm ends it at the latest.
        unsafe { libc::alarm(60) };
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
    from_child.read_exact(&mut [0]).unwrap();
    pid
}

/// The longest sleep of [`sleep_by_itself`] in milliseconds, and whether they are all as long.
static SLEEP: AtomicU64 = AtomicU64::new(0);
static IS_REGULAR: AtomicBool = AtomicBool::new(true);

/// A busy handler as applications write them: SQLite's xSleep does not hear of it.
fn sleep_by_itself(_count: i32) -> bool {
    let longest = SLEEP.load(Ordering::Relaxed);
    let millis = if IS_REGULAR.load(Ordering::Relaxed) { longest } else { fastrand::u64(1..=longest) };
    std::thread::sleep(Duration::from_millis(millis));
    true
}

/// As SQLite counts.
pub fn integer(number: impl TryInto<i64, Error: std::fmt::Debug>) -> i64 {
    number.try_into().unwrap()
}

fn run_storm(storm: &Storm) -> Tally {
    let db = Connection::open(&storm.uri).unwrap();
    match storm.patience {
        Patience::Timeout(millis) => db.busy_timeout(Duration::from_millis(millis)).unwrap(),
        Patience::Sleeps(millis) | Patience::SleepsUpTo(millis) => {
            SLEEP.store(millis, Ordering::Relaxed);
            IS_REGULAR.store(matches!(storm.patience, Patience::Sleeps(_)), Ordering::Relaxed);
            db.busy_handler(Some(sleep_by_itself)).unwrap();
        }
    }
    db.execute_batch("PRAGMA synchronous = OFF").unwrap();
    let ballast = vec![0_u8; storm.ballast];
    let wal = db.path().map(|path| format!("{path}-wal")).unwrap();
    let mut begin = db.prepare("BEGIN IMMEDIATE").unwrap();
    let mut insert = db.prepare("INSERT INTO t VALUES (?1, ?2, ?3)").unwrap();
    let mut commit = db.prepare("COMMIT").unwrap();
    let mut tally = Tally::default();
    File::open(&storm.start).unwrap().lock_shared().unwrap();
    let end = Instant::now() + Duration::from_millis(storm.millis);
    while Instant::now() < end {
        let start = Instant::now();
        let mut transaction = || {
            begin.execute([])?;
            insert.execute((integer(storm.writer), integer(tally.commits), &ballast))?;
            commit.execute([])
        };
        match transaction().map_err(failure) {
            Ok(_) => tally.commits += 1,
            Err((code, _)) if code & 0xff == rusqlite::ffi::SQLITE_BUSY => {
                tally.busy += 1;
                if !db.is_autocommit() {
                    db.execute_batch("ROLLBACK").unwrap();
                }
            }
            Err(error) => panic!("{error:?}"),
        }
        tally.longest = tally.longest.max(u64::try_from(start.elapsed().as_micros()).unwrap());
        tally.wal = tally.wal.max(std::fs::metadata(&wal).map_or(0, |wal| wal.len()));
    }
    tally
}

/// SQLite's extended result code, and the message.
pub fn failure(error: rusqlite::Error) -> (i32, String) {
    match error {
        rusqlite::Error::SqliteFailure(code, message) => (code.extended_code, message.unwrap_or_default()),
        other => (-1, other.to_string()),
    }
}
