//! # soak: everything at once, for as long as you like, audited
//!
//! ```text
//! cargo run --release --example soak -- --minutes 30
//! cargo run --release --example soak -- --minutes 1 --vfs unix     # stock SQLite: expected to fail
//! cargo run --release --example soak -- --minutes 1 --vfs unix --no-stray-closes    # expected to hold
//! ```
//!
//! A run is a sequence of rounds. In each, worker processes share one new database on disk and do, at random:
//! write transactions, DDL, rollbacks, snapshots, checkpoints of all kinds, VACUUM, online backups, switches of
//! the journal mode, closing and reopening. Meanwhile
//!
//! - a *stray-close prober* in each worker opens and closes the database's files all the time, as any code of
//!   the process might: without close-proof locks this cancels the locks of the whole process;
//! - an *outsider* takes `flock(LOCK_EX)` on `<db>.lock` and sees to it that nothing is written while it has it;
//! - the parent sends SIGKILL, SIGSTOP and SIGCONT, and declares *intermissions* with short connections only, so
//!   that the last connection closes now and then and the journal mode can leave WAL.
//!
//! At the end of a round everything stops, and the audit of the kanban board looks for every acknowledged commit.
//!
//! Ten bad rounds end the run. Exit status: 0 if all was well, 1 if a round was bad (the first bad one's database is
//! kept), 2 if the run could not be made.
//!
//! ```text
//! main ── options, mischief, report
//!   │──── place, crew, session, committer, board, acklog, audit   those of examples/kanban_board
//!   └──── child processes:  worker ── prober
//!                           outsider
//! ```
//!
//! The signals, pauses and durations are the workload; nothing waits for time to pass where it could wait for an
//! event. The seed determines what is drawn, not how processes interleave.
#![forbid(unsafe_code)]

#[path = "../kanban_board/acklog.rs"]
mod acklog;
#[path = "../kanban_board/audit.rs"]
mod audit;
#[path = "../kanban_board/board.rs"]
mod board;
#[path = "../kanban_board/chaos.rs"]
mod chaos;
#[path = "../kanban_board/committer.rs"]
mod committer;
#[path = "../kanban_board/crew.rs"]
mod crew;
#[path = "../kanban_board/job.rs"]
mod job;
mod mischief;
mod options;
mod outsider;
#[path = "../kanban_board/place.rs"]
mod place;
mod prober;
mod report;
#[path = "../kanban_board/session.rs"]
mod session;
mod worker;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser as _;
use fastrand::Rng;

use crate::job::{Job, Role};
use crate::mischief::Mischief;
use crate::options::Options;
use crate::place::Place;
use crate::report::{Report, Round};

/// The run ends early after this many bad rounds.
const BAD_ENOUGH: usize = 10;

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
            eprintln!("soak: {error}");
            ExitCode::from(2)
        }
    }
}

/// One worker, or the outsider.
fn child(job: &Job) -> ExitCode {
    let done = match job.role {
        Role::Worker => worker::run(job),
        Role::Reader => outsider::run(job),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            session::say(&session::Signal::Failed(error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// The whole run; false if a round was bad.
fn parent(options: &Options) -> Result<bool> {
    job::check_vfs(&options.vfs)?;
    let json = options.create_json()?;
    let mut report = Report::new(options);
    report.print_heading();
    let mut random = Rng::with_seed(options.seed);
    let start = Instant::now();
    while report.bad() < BAD_ENOUGH {
        let Some(left) = options.duration().checked_sub(start.elapsed()) else { break };
        let mut place = Place::create(None)?;
        let round = round(options, &place, random.u64(..), left)?;
        round.print();
        if report.add(round) {
            report.keep(place.keep());
        }
    }
    report.print();
    if let Some(json) = json {
        serde_json::to_writer_pretty(&json, &report)?;
        writeln!(&json)?;
    }
    Ok(report.bad() == 0)
}

/// One round on a new database, from the migration to the audit.
fn round(options: &Options, place: &Place, seed: u64, left: Duration) -> Result<Round> {
    let mut random = Rng::with_seed(seed);
    let database = options.database(place.db(), &mut random);
    let plan = options.plan(left, &mut random);
    let mut mischief = Mischief::new(&database.path, random.fork());
    let shift = crew::run(&plan, &database, place, Some(&mut mischief))?;
    let checks = audit::audit(&database, &shift);
    Round::new(seed, &database, &shift, mischief.into_deeds(), checks)
}
