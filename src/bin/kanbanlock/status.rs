//! `kanbanlock status`: who holds the gate, who waits, who has the database open, and how.
//!
//! Everything is read: no lock is taken, no file is written, and SQLite is not used. So it can be run at any time, also while
//! the database is "locked", and by anyone who may read it.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use clap::{Args as ClapArgs, ValueEnum};
use crossterm::event::{Event, KeyCode, KeyModifiers};
use crossterm::style::Print;
use crossterm::terminal::ClearType;
use crossterm::{cursor, event, execute, queue, terminal};
use kanbanlock::Queue;
use serde::Serialize;

use crate::database::{self, Database};
use crate::failure::{Failure, NO_INPUT, USAGE};
use crate::ignore_broken_pipe;
use crate::processes::{self, Scan, Through, command, user};

/// Shows who holds the lock of a database, who waits, and who has it open.
///
/// Takes no lock and changes nothing. Without root it sees your own processes, and says how many it could not look into.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  kanbanlock status kanban.db
  kanbanlock status kanban.db --json
  kanbanlock status kanban.db --format openmetrics
  kanbanlock status kanban.db --watch")]
pub struct Args {
    /// The database file.
    #[arg(value_name = "DB")]
    db: PathBuf,
    /// Shows it again and again, until q or Ctrl-C.
    #[arg(long, conflicts_with_all = ["json", "format"])]
    watch: bool,
    /// The time between two looks of --watch.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, requires = "watch")]
    interval: f64,
    /// The same as --format json.
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// How to print it.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// One JSON object.
    Json,
    /// For Prometheus and its kin.
    Openmetrics,
}

/// What is shown; in JSON, field by field.
#[derive(Debug, Serialize)]
struct Report {
    database: PathBuf,
    lock_file: PathBuf,
    gate: Gate,
    waiters: Vec<Waiter>,
    queue: QueueReport,
    processes: Vec<ProcessReport>,
    /// Processes that could not be looked into.
    unseen_processes: usize,
    /// Others that are not even listed (hidepid).
    hidden_processes: bool,
    /// Some of the unseen hold OFD locks on the database.
    unseen_ofd_locks: bool,
    #[serde(flatten)]
    file: Database,
}

#[derive(Debug, Serialize)]
struct Gate {
    held: bool,
    /// The process that took the flock; `None` beside `held`: it cannot be told.
    holder: Option<Person>,
    /// `None`: nobody has said.
    held_seconds: Option<f64>,
    /// Others that hold the same flock, having inherited its descriptor.
    inherited_by: Vec<Person>,
}

#[derive(Debug, Serialize)]
struct Person {
    pid: u32,
    user: String,
    command: String,
}

impl Person {
    fn new(pid: u32) -> Person {
        Person { pid, user: user(pid), command: command(pid) }
    }
}

#[derive(Debug, Serialize)]
struct Waiter {
    #[serde(flatten)]
    person: Person,
    waiting_seconds: f64,
    asleep: bool,
}

#[derive(Debug, Default, Serialize)]
struct QueueReport {
    /// Why the queue could not be looked at.
    unseen: Option<String>,
    /// `None`: there is no queue, or it is unseen.
    counters: Option<Counters>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Counters {
    connections: u32,
    waits: u64,
    releases: u32,
}

#[derive(Debug, Serialize)]
struct ProcessReport {
    #[serde(flatten)]
    person: Person,
    kanbanlock: Through,
    why: &'static str,
}

/// `kanbanlock status`
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let db = args.db.canonicalize().map_err(|error| Failure::of_file(&args.db, &error))?;
    if args.watch {
        watch(&db, args.interval)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = gather(&db)?;
    let format = if args.json { Format::Json } else { args.format };
    let text = match format {
        Format::Text => report.text(),
        Format::Json => serde_json::to_string_pretty(&report).map_err(io::Error::from)? + "\n",
        Format::Openmetrics => report.metrics(),
    };
    ignore_broken_pipe(anstream::stdout().write_all(text.as_bytes()))?;
    Ok(ExitCode::SUCCESS)
}

fn gather(db: &Path) -> Result<Report, Failure> {
    let file = database::read(db)?;
    let scan = processes::scan(db)?;
    // Last, since it is what changes fastest.
    let seen = kanbanlock::inspect(db)
        .map_err(|error| Failure::new(NO_INPUT, format!("{}: {error}", db.display())))?;
    let (unseen, counters) = match seen.queue {
        Queue::Seen { connections, waits, releases, .. } => {
            (None, Some(Counters { connections, waits, releases }))
        }
        Queue::Unseen(reason) => (Some(reason), None),
        _ => (None, None),
    };
    // Not in /proc/locks under a device that is known here (another mount namespace): then what fdinfo showed.
    let holding = || scan.processes.iter().filter(|process| process.holds_gate()).map(|process| process.pid);
    let holder = seen.holder.map(|holder| holder.pid).or_else(|| holding().next());
    let gate = Gate {
        held: holder.is_some(),
        holder: holder.map(Person::new),
        held_seconds: seen.holder.and_then(|holder| holder.held).map(|held| held.as_secs_f64()),
        inherited_by: match holder {
            Some(holder) => holding().filter(|pid| *pid != holder).map(Person::new).collect(),
            None => Vec::new(),
        },
    };
    let waiters = seen.waiters.iter().map(|waiter| Waiter {
        person: Person::new(waiter.pid),
        waiting_seconds: waiter.waiting.as_secs_f64(),
        asleep: waiter.is_asleep,
    });
    let waiters = waiters.collect();
    let Scan { processes, unseen: unseen_processes, is_hidden, has_unseen_ofd_locks } = scan;
    let users = processes.into_iter().filter(processes::Process::uses_db).map(|process| {
        let (kanbanlock, why) = process.through();
        let person = Person { pid: process.pid, user: process.user, command: process.command };
        ProcessReport { person, kanbanlock, why }
    });
    Ok(Report {
        database: db.to_owned(),
        lock_file: seen.lock_file,
        gate,
        waiters,
        queue: QueueReport { unseen, counters },
        processes: users.collect(),
        unseen_processes,
        hidden_processes: is_hidden,
        unseen_ofd_locks: has_unseen_ofd_locks,
        file,
    })
}

const BOLD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default();
const DIM: Style = Style::new().dimmed();

fn styled(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// A duration as a person reads it.
fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

impl Report {
    fn text(&self) -> String {
        let mut lines = vec![styled(BOLD, self.database.display())];
        let mut line = |title: &str, text: String| lines.push(format!("{title:<10}{text}"));
        line("gate", self.gate_text());
        for inherited in &self.gate.inherited_by {
            line("", format!("  inherited by {}", one(inherited)));
        }
        for (index, waiter) in self.waiters.iter().enumerate() {
            let state = if waiter.asleep { "" } else { ", about to try" };
            let waiting = seconds(waiter.waiting_seconds);
            let title = if index == 0 { "waiting" } else { "" };
            line(title, format!("{}. {}, for {waiting}{state}", index + 1, one(&waiter.person)));
        }
        if let Some(reason) = &self.queue.unseen {
            line("waiting", format!("unknown: {}-queue: {reason}", self.lock_file.display()));
        }
        if let Some(Counters { connections, waits, releases }) = self.queue.counters {
            line("queue", format!("{connections} connections, {waits} waits, {releases} releases so far"));
        }
        line("journal", self.journal_text());
        for (index, process) in self.processes.iter().enumerate() {
            let (style, word) = match process.kanbanlock {
                Through::Yes => (GOOD, "through kanbanlock"),
                Through::No => (BAD, "NOT through kanbanlock"),
                Through::Unknown => (DIM, "cannot be told"),
            };
            let title = if index == 0 { "open by" } else { "" };
            line(title, format!("{}: {} ({})", one(&process.person), styled(style, word), process.why));
        }
        if self.processes.is_empty() {
            line("open by", "nobody that can be seen".to_owned());
        }
        if self.unseen_processes > 0 || self.hidden_processes {
            let count = if self.hidden_processes {
                "the processes of other users".to_owned()
            } else {
                format!("{} processes", self.unseen_processes)
            };
            let locks = if self.unseen_ofd_locks { "; one of them holds OFD locks here" } else { "" };
            line("unseen", format!("{count}: run as root to look into them{locks}"));
        }
        lines.join("\n") + "\n"
    }

    fn gate_text(&self) -> String {
        let Some(holder) = &self.gate.holder else { return styled(GOOD, "free") };
        let held = match self.gate.held_seconds {
            Some(held) => format!(", for {}", seconds(held)),
            None => String::new(),
        };
        format!("{} by {}{held}", styled(BAD, "held"), one(holder))
    }

    fn journal_text(&self) -> String {
        let mut text = format!("{}, database {}", self.file.journal_mode, bytes(self.file.size));
        if let Some(size) = self.file.wal_bytes {
            let _ = write!(text, ", -wal {}", bytes(size));
        }
        match self.file.wal_index {
            Some(index) => {
                let _ = write!(text, ", {} of {} frames not checkpointed", index.pending, index.frames);
            }
            None if self.file.wal_bytes.is_some_and(|size| size > 0) => {
                text.push_str(", to be recovered at the next open (there is no usable -shm)");
            }
            None => {}
        }
        if self.file.has_journal {
            text.push_str(", -journal of a transaction that goes on or was cut off");
        }
        text
    }

    /// <https://prometheus.io/docs/specs/om/open_metrics_spec/>
    fn metrics(&self) -> String {
        let mut text = String::new();
        let path = self.database.display().to_string();
        let path = path.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let mut family = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
            let _ = writeln!(text, "# TYPE kanbanlock_{name} {kind}\n# HELP kanbanlock_{name} {help}");
            let total = if kind == "counter" { "_total" } else { "" };
            for (label, value) in samples {
                let _ = writeln!(text, "kanbanlock_{name}{total}{{db=\"{path}\"{label}}} {value}");
            }
        };
        let through = |wanted| {
            let count = self.processes.iter().filter(|process| process.kanbanlock == wanted).count();
            u32::try_from(count).map_or(f64::INFINITY, f64::from)
        };
        let count = |count: usize| u32::try_from(count).map_or(f64::INFINITY, f64::from);
        let longest = self.waiters.iter().map(|waiter| waiter.waiting_seconds).fold(0.0, f64::max);
        family(
            "gate_held",
            "gauge",
            "1 while somebody holds the flock.",
            &[("", f64::from(u8::from(self.gate.held)))],
        );
        if let Some(held) = self.gate.held_seconds {
            family("gate_held_seconds", "gauge", "For how long it has been held.", &[("", held)]);
        }
        family("waiters", "gauge", "Connections in the queue.", &[("", count(self.waiters.len()))]);
        family("longest_wait_seconds", "gauge", "Of those in the queue now.", &[("", longest)]);
        let by_way = [
            (",through=\"yes\"", through(Through::Yes)),
            (",through=\"no\"", through(Through::No)),
            (",through=\"unknown\"", through(Through::Unknown)),
        ];
        family("processes", "gauge", "Processes that have the database open.", &by_way);
        family(
            "unseen_processes",
            "gauge",
            "Processes that could not be looked into.",
            &[("", count(self.unseen_processes))],
        );
        #[allow(clippy::cast_precision_loss)] // beyond 2⁵³ bytes
        let size = self.file.wal_bytes.unwrap_or(0) as f64;
        family("wal_bytes", "gauge", "The size of -wal.", &[("", size)]);
        if let Some(index) = self.file.wal_index {
            family("wal_frames", "gauge", "Valid frames in -wal.", &[("", f64::from(index.frames))]);
            family(
                "wal_pending_frames",
                "gauge",
                "Frames not checkpointed yet.",
                &[("", f64::from(index.pending))],
            );
        }
        if let Some(Counters { connections, waits, releases }) = self.queue.counters {
            #[allow(clippy::cast_precision_loss)] // beyond 2⁵³ waits
            let waits = waits as f64;
            family(
                "queue_connections",
                "counter",
                "Connections that came to the queue.",
                &[("", f64::from(connections))],
            );
            family("queue_waits", "counter", "Waits that were begun.", &[("", waits)]);
            family(
                "queue_releases",
                "counter",
                "Releases while somebody waited.",
                &[("", f64::from(releases))],
            );
        }
        text + "# EOF\n"
    }
}

fn one(person: &Person) -> String {
    let mut command: String = person.command.chars().take(60).collect();
    if command.len() < person.command.len() {
        command.push('…');
    }
    format!("{} {} [{command}]", person.pid, person.user)
}

/// The terminal in the state that `watch` needs; as it was, on drop.
struct Screen;

impl Screen {
    fn new() -> io::Result<Screen> {
        terminal::enable_raw_mode()?;
        let screen = Screen;
        execute!(io::stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = execute!(io::stdout(), cursor::Show, terminal::LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}

fn watch(db: &Path, interval: f64) -> Result<(), Failure> {
    let interval = Duration::try_from_secs_f64(interval).ok().filter(|interval| *interval >= MIN_INTERVAL);
    let interval = interval.ok_or_else(|| {
        Failure::new(USAGE, format!("--interval: at least {} s", MIN_INTERVAL.as_secs_f64()))
    })?;
    if !io::stdout().is_terminal() {
        return Err(Failure::new(USAGE, "--watch needs a terminal; use --json or --format openmetrics"));
    }
    // An error is shown on the terminal as it was.
    let mut report = gather(db)?;
    let screen = Screen::new()?;
    loop {
        draw(&report)?;
        let next = std::time::Instant::now() + interval;
        while let Some(left) = next.checked_duration_since(std::time::Instant::now()) {
            if !event::poll(left)? {
                break;
            }
            match event::read()? {
                Event::Key(key) if is_quit(key.code, key.modifiers) => return Ok(()),
                Event::Resize(..) => break,
                _ => {}
            }
        }
        report = match gather(db) {
            Err(failure) => {
                drop(screen);
                return Err(failure);
            }
            report => report?,
        };
    }
}

const MIN_INTERVAL: Duration = Duration::from_millis(50);

fn is_quit(code: KeyCode, modifiers: KeyModifiers) -> bool {
    let is_interrupt = code == KeyCode::Char('c') && modifiers.contains(KeyModifiers::CONTROL);
    is_interrupt || matches!(code, KeyCode::Char('q') | KeyCode::Esc)
}

/// Line by line over the last picture, so that it does not flicker.
fn draw(report: &Report) -> io::Result<()> {
    let (_, rows) = terminal::size()?;
    let mut out = io::stdout().lock();
    // anstream would take the cursor's movements out with the colours.
    let is_plain = anstream::AutoStream::choice(&out) == anstream::ColorChoice::Never;
    queue!(out, cursor::MoveTo(0, 0), terminal::DisableLineWrap)?;
    let text = format!("{}\n{}", styled(DIM, "q: quit"), report.text());
    // The last row stays empty: a line feed there would scroll.
    for line in text.lines().take(usize::from(rows.saturating_sub(1))) {
        let line = if is_plain { anstream::adapter::strip_str(line).to_string() } else { line.to_owned() };
        queue!(out, Print(line), terminal::Clear(ClearType::UntilNewLine), cursor::MoveToNextLine(1))?;
    }
    queue!(out, terminal::Clear(ClearType::FromCursorDown), terminal::EnableLineWrap)?;
    out.flush()
}
