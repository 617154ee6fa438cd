//! `kanbanlock run`: a command that has the database to itself.
//!
//! As `flock db.lock CMD`, but that CMD's own connections through kanbanlock may write: [`kanbanlock::Hold`] hands the gate
//! down. The holder stays the parent, and does not become CMD: CMD may close its descriptors (sudo does), and the gate is
//! held all the same as long as CMD runs.
//!
//! Signals: what the terminal sends (Ctrl-C) goes to CMD anyway, as it is in the same process group, so here it is
//! swallowed; what another process sends to this one (`kill`, `timeout`, a supervisor) is passed on to CMD. Then CMD's
//! end is waited for, and its exit status is ours.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::thread;
use std::time::Duration;

use kanbanlock::Hold;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};

use crate::failure::{self, Failure};

/// As the shells and flock(1) have it.
const NOT_EXECUTABLE: u8 = 126;
/// Ditto.
const NOT_FOUND: u8 = 127;
/// Plus the signal's number: CMD was killed.
const KILLED: i32 = 128;

/// Runs a command while nobody else writes the database; the command may.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kanbanlock run kanban.db -- ./migrate.sh
  kanbanlock run -w 10 kanban.db -- sh -c 'cp kanban.db copy.db; [ ! -e kanban.db-wal ] || cp kanban.db-wal copy.db-wal'

Exit status: the command's own; 128 + n if signal n has killed it; 1 (or -E) if the gate was not free in time;
126 or 127 if the command cannot be started.

What the command starts and leaves behind keeps the gate as long as it lives; not so with --close.")]
pub struct Args {
    /// The database; it must exist.
    #[arg(value_name = "DB")]
    database: PathBuf,

    /// How long to wait for the gate; fractions are allowed [default: for ever]
    #[arg(short = 'w', long, value_name = "SECS", value_parser = parse_seconds, conflicts_with = "nonblock")]
    timeout: Option<Duration>,

    /// Do not wait.
    #[arg(short, long)]
    nonblock: bool,

    /// Exit status if the gate was not free in time.
    #[arg(short = 'E', long, value_name = "STATUS", default_value_t = failure::NO)]
    conflict_exit_code: u8,

    /// Do not hand the gate down: the command's own connections wait as everybody's, and what it leaves behind keeps
    /// nothing.
    #[arg(short = 'o', long)]
    close: bool,

    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// `kanbanlock run`
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    std::fs::metadata(&args.database).map_err(|error| Failure::of_file(&args.database, &error))?;
    let patience = if args.nonblock { Some(Duration::ZERO) } else { args.timeout };
    let hold = Hold::acquire(&args.database, patience)
        .map_err(|error| Failure::new(failure::CANNOT_CREATE, error.to_string()))?
        .ok_or_else(|| not_in_time(&args))?;
    // From here on signals are CMD's; while we waited, they were ours.
    let signals = SignalsInfo::<WithOrigin>::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2])
        .map_err(|error| Failure::of_system("signals cannot be caught", &error))?;
    let mut child = start(&args, &hold)?;
    pass_on(signals, &child).map_err(|error| Failure::of_system("signals cannot be passed on", &error))?;
    let status =
        child.wait().map_err(|error| Failure::of_system("the command cannot be waited for", &error))?;
    drop(hold);
    Ok(ExitCode::from(exit_code(status)))
}

fn not_in_time(args: &Args) -> Failure {
    let database = args.database.display();
    let message = format!("{database}: somebody else writes; `kanbanlock status {database}` says who");
    Failure::new(args.conflict_exit_code, message)
}

fn start(args: &Args, hold: &Hold) -> Result<Child, Failure> {
    let (program, arguments) =
        args.command.split_first().ok_or_else(|| Failure::new(failure::USAGE, "no command"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    if !args.close {
        hold.hand_down(&mut command)
            .map_err(|error| Failure::of_system("the gate cannot be handed down", &error))?;
    }
    command.spawn().map_err(|error| {
        let status = match error.kind() {
            ErrorKind::NotFound => NOT_FOUND,
            ErrorKind::WouldBlock | ErrorKind::OutOfMemory => failure::OS,
            _ => NOT_EXECUTABLE,
        };
        Failure::new(status, format!("{}: {error}", program.to_string_lossy()))
    })
}

/// Passes signals of other processes on, until this process ends.
fn pass_on(mut signals: SignalsInfo<WithOrigin>, child: &Child) -> io::Result<()> {
    // Not a pid: it would be another's, once CMD is gone and waited for.
    let child = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    thread::Builder::new().spawn(move || {
        for Origin { signal, cause, .. } in &mut signals {
            if let (Cause::Sent(_), Some(signal)) = (cause, Signal::from_named_raw(signal)) {
                // It may have ended: then there is nobody to be told.
                let _ = pidfd_send_signal(&child, signal);
            }
        }
    })?;
    Ok(())
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| KILLED + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.parse().map_err(|_| "expected a number of seconds, such as 10 or 0.5".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
