//! # kanban_board: kanbanlock's main job
//!
//! N worker *processes* share one kanban board in one SQLite database on disk. All of them race the schema
//! migration at the start; then they create, claim and finish tasks, change the schema in the middle, and are
//! watched by reader processes. At the end an audit looks for every commit that SQLite acknowledged, and a
//! table says how fast and how fair it was.
//!
//! ```text
//! cargo run --release --example kanban_board                   # through kanbanlock
//! cargo run --release --example kanban_board -- --vfs unix     # the same on stock SQLite
//! cargo run --release --example kanban_board -- --chaos        # with kill -9 at random moments
//! cargo run --release --example kanban_board -- --help
//! ```
//!
//! Exit status: 0 if the audit passed, 1 if it failed or a process died by itself, 2 if the run could not be
//! made.
//!
//! ```text
//! main ── options   what to run
//!   │──── load      how much of it
//!   │──── place     where the run's files are
//!   │──── crew      parent's side: starts, releases, signals, restarts and stops the processes
//!   │       │─ chaos    kills them
//!   │       │─ job      what each is told
//!   │       ┆ stdin, stdout (pipes)
//!   │     session   child's side of the same, with the connection and the retry on SQLITE_BUSY
//!   │       │─ worker, reader   the two loops
//!   │       │─ committer        commits, each acknowledged
//!   │       │─ board            the schema and every transaction on it
//!   │       └─ acklog           what SQLite acknowledged, logged outside the database
//!   │──── sabotage  damages the board, so that the audit must fail
//!   │──── audit     is every acknowledged commit there, does everything agree?
//!   └──── report    the table and the JSON
//! ```
//!
//! Most of these modules are the soak's as well (`examples/soak`), and those of `kanbanlock stress`
//! (`src/bin/kanbanlock/stress.rs`): they name each other by `super::`.
//!
//! The parent has no connection open while the children run.
//!
//! CAUTION: SIGKILL leaves the page cache alone. The audit therefore judges isolation and locking; it says
//! nothing about a power loss.
#![forbid(unsafe_code)]

mod acklog;
mod audit;
mod board;
mod chaos;
mod committer;
mod crew;
mod job;
mod load;
mod options;
mod place;
mod reader;
mod report;
mod sabotage;
mod session;
mod worker;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::chaos::Chaos;
use crate::crew::Disturber;
use crate::job::{Job, Role};
use crate::options::Options;
use crate::place::Place;
use crate::report::Report;

/// Any failure here ends as one line for the user, so the text is all that matters.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How this program is told to be a child; the job follows.
const CHILD: &[&str] = &["--child"];

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(job) = &options.child {
        return child(job);
    }
    match parent(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("kanban_board: {error}");
            ExitCode::from(2)
        }
    }
}

/// One worker or reader process.
fn child(job: &Job) -> ExitCode {
    let done = match job.role {
        Role::Worker => worker::run(job),
        Role::Reader => reader::run(job),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            session::say(&session::Signal::Failed(error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// The whole run; false if the audit failed.
fn parent(options: &Options) -> Result<bool> {
    job::check_vfs(&options.vfs)?;
    let json = options.create_json()?;
    let mut place = Place::create(options.db.as_deref())?;
    let database = options.load.database(place.db(), &options.vfs);
    let status = database.open().and_then(|conn| Ok(board::shim_status(&conn)?));
    let status = status.inspect_err(|_| place.discard())?;
    report::print_heading(&options.load, &database, status.as_deref())?;

    let mut chaos = options.load.chaos.then(|| Chaos::new(options.load.seed));
    let chaos = chaos.as_mut().map(|chaos| chaos as &mut dyn Disturber);
    let shift = crew::run(&options.load.plan(), &database, &place, chaos)?;
    if let Some(sabotage) = options.sabotage {
        println!("sabotage  {}", sabotage::sabotage(&database, sabotage)?);
    }
    let checks = audit::audit(&database, &shift);
    let report = Report::new(&options.load, &database, &shift, checks)?;
    report.print();
    if let Some(json) = json {
        serde_json::to_writer_pretty(&json, &report)?;
        writeln!(&json)?;
    }
    if options.keep || options.db.is_some() || !report.passed {
        println!("\nkept      {}", place.keep().display());
    }
    Ok(report.passed)
}
