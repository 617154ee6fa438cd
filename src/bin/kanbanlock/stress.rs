//! `kanbanlock stress`: the audited workload of many processes, on the user's disk and with this SQLite.
//!
//! The modules are those of the main job, `examples/kanban_board/`, whose header has the picture: worker and reader
//! processes on one kanban board, and an audit that looks for every commit that SQLite acknowledged. Here it runs on
//! each VFS in turn, stock SQLite first, each on a new database in a new folder, and the results stand side by side.

#[path = "../../../examples/kanban_board/acklog.rs"]
mod acklog;
#[path = "../../../examples/kanban_board/audit.rs"]
mod audit;
#[path = "../../../examples/kanban_board/board.rs"]
mod board;
#[path = "../../../examples/kanban_board/chaos.rs"]
mod chaos;
#[path = "../../../examples/kanban_board/committer.rs"]
mod committer;
#[path = "../../../examples/kanban_board/crew.rs"]
mod crew;
#[path = "../../../examples/kanban_board/job.rs"]
mod job;
#[path = "../../../examples/kanban_board/load.rs"]
mod load;
#[path = "../../../examples/kanban_board/place.rs"]
mod place;
#[path = "../../../examples/kanban_board/reader.rs"]
mod reader;
#[path = "../../../examples/kanban_board/report.rs"]
mod report;
#[path = "../../../examples/kanban_board/sabotage.rs"]
mod sabotage;
#[path = "../../../examples/kanban_board/session.rs"]
mod session;
#[path = "../../../examples/kanban_board/worker.rs"]
mod worker;

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::failure::{self, Failure};
use chaos::Chaos;
use crew::Disturber;
use job::{Job, Role, parse_job};
use load::Load;
use place::Place;
use report::Report;
use sabotage::Sabotage;

/// Any failure in the modules ends as one line for the user, so the text is all that matters.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How this program is told to be a child; the job follows.
const CHILD: &[&str] = &["stress", "--child"];

/// Many processes write one database, on your disk; an audit looks for every commit, stock SQLite beside kanbanlock.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kanbanlock stress /srv/data
  kanbanlock stress --seconds 60 --workers 16 --journal delete --chaos .

Everything is made in a new folder in DIRECTORY, and removed unless an audit fails. The VFSes run one after the other.

Exit status: 0 if every audit passed; 1 if one failed: then that database is kept; more than 1 if it could not be run.")]
pub struct Args {
    /// A folder on the disk in question.
    #[arg(value_name = "DIRECTORY", required_unless_present = "child")]
    directory: Option<PathBuf>,

    /// VFS to run on; `unix` is stock SQLite (may be repeated)
    #[arg(long = "vfs", value_name = "NAME", default_values = ["unix", kanbanlock::VFS_NAME])]
    vfses: Vec<String>,

    #[command(flatten)]
    load: Load,

    /// Write the results as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Damage the last board before its audit, which must notice
    #[arg(long, value_enum, hide = true)]
    sabotage: Option<Sabotage>,

    /// Be the worker or reader described by this JSON
    #[arg(long, hide = true, exclusive = true, value_parser = parse_job)]
    child: Option<Job>,
}

/// `kanbanlock stress`
pub fn run(args: Args) -> std::result::Result<ExitCode, Failure> {
    match (&args.child, &args.directory) {
        (Some(job), _) => Ok(child(job)),
        (None, Some(directory)) => {
            let metadata =
                std::fs::metadata(directory).map_err(|error| Failure::of_file(directory, &error))?;
            if !metadata.is_dir() {
                return Err(Failure::new(
                    failure::NO_INPUT,
                    format!("{}: not a folder", directory.display()),
                ));
            }
            let passed =
                parent(&args, directory).map_err(|error| Failure::new(failure::IO, error.to_string()))?;
            Ok(ExitCode::from(if passed { 0 } else { failure::NO }))
        }
        (None, None) => Err(Failure::new(failure::USAGE, "name a DIRECTORY")),
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

/// All runs; false if an audit failed.
fn parent(args: &Args, directory: &std::path::Path) -> Result<bool> {
    let json = args.json.as_deref().map(File::create).transpose();
    let json = json.map_err(|error| format!("--json: {error}"))?;
    for vfs in &args.vfses {
        job::check_vfs(vfs)?;
    }
    let mut reports = Vec::new();
    for (number, vfs) in (1..).zip(&args.vfses) {
        let sabotage = args.sabotage.filter(|_| number == args.vfses.len());
        reports.push(measure(args, directory, vfs, sabotage)?);
    }
    print_table(&args.vfses, &reports);
    if let Some(json) = json {
        serde_json::to_writer_pretty(&json, &reports)?;
        writeln!(&json)?;
    }
    Ok(reports.iter().all(|report| report.passed))
}

/// One run on a new database, from the migration to the audit.
fn measure(
    args: &Args,
    directory: &std::path::Path,
    vfs: &str,
    sabotage: Option<Sabotage>,
) -> Result<Report> {
    let mut place = Place::create_in(directory)?;
    let database = args.load.database(place.db(), vfs);
    let status = board::shim_status(&database.open()?)?;
    report::print_heading(&args.load, &database, status.as_deref())?;
    let mut chaos = args.load.chaos.then(|| Chaos::new(args.load.seed));
    let chaos = chaos.as_mut().map(|chaos| chaos as &mut dyn Disturber);
    let shift = crew::run(&args.load.plan(), &database, &place, chaos)?;
    if let Some(sabotage) = sabotage {
        println!("sabotage  {}", sabotage::sabotage(&database, sabotage)?);
    }
    let checks = audit::audit(&database, &shift);
    let report = Report::new(&args.load, &database, &shift, checks)?;
    report.print_audit();
    if !report.passed {
        println!("kept      {}", place.keep().display());
    }
    println!();
    Ok(report)
}

fn print_table(vfses: &[String], reports: &[Report]) {
    let columns: Vec<_> = reports.iter().map(Report::rows).collect();
    let Some(first) = columns.first() else { return };
    let line = |name: &str, values: &mut dyn Iterator<Item = &str>| {
        println!("{name:<22}{}", values.map(|value| format!("{value:>16}")).collect::<String>());
    };
    line("", &mut vfses.iter().map(String::as_str));
    for (index, row) in first.iter().enumerate() {
        line(row.name, &mut columns.iter().filter_map(|rows| Some(rows.get(index)?.value.as_str())));
    }
    line("audit", &mut reports.iter().map(|report| if report.passed { "passed" } else { "FAILED" }));
}
