//! The command `kanbanlock`: who holds the lock, who waits, is this database safe. Feature `cli`; docs/CLI.md.
//!
//! Each subcommand is a module with its `Args` and `run(Args) -> Result<ExitCode, Failure>`. The command knows the library
//! by its public interface only.

mod backup;
mod database;
mod docs;
mod doctor;
mod failure;
mod processes;
mod run;
mod status;
mod stress;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;

use failure::Failure;

/// Looks at, checks and guards SQLite databases that are written through kanbanlock.
#[derive(Debug, Parser)]
#[command(name = "kanbanlock", version, max_term_width = 100, after_long_help = EXIT_STATUS)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// In `--help` and in the man page.
const EXIT_STATUS: &str = "\
Exit status, as flock(1)'s:
  0   it worked, or nothing is wrong
  1   the answer is no: something is wrong (doctor), the lock was not free in time (run), a commit was lost (stress)
  64  the command line is wrong
  65  the file is not a database
  66  the database is not there, or may not be read
  71  the system refused: no /proc, no process, no memory
  73  the output cannot be created
  74  reading or writing failed
`kanbanlock run` otherwise exits with the status of its command.";

#[derive(Debug, clap::Subcommand)]
enum Command {
    Status(status::Args),
    Doctor(doctor::Args),
    #[command(hide = true)]
    LockProbe(doctor::ProbeArgs),
    Run(run::Args),
    Backup(backup::Args),
    Stress(Box<stress::Args>),
    Completions(docs::CompletionsArgs),
    Man(docs::ManArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let status = if error.use_stderr() { failure::USAGE } else { 0 };
            // Nobody reads it: nothing more to say.
            let _ = error.print();
            return ExitCode::from(status);
        }
    };
    let result = match cli.command {
        Command::Status(args) => status::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::LockProbe(args) => doctor::probe(&args),
        Command::Run(args) => run::run(args),
        Command::Backup(args) => backup::run(args),
        Command::Stress(args) => stress::run(*args),
        Command::Completions(args) => docs::completions(&args),
        Command::Man(args) => docs::man(&args),
    };
    result.unwrap_or_else(|Failure { status, message }| {
        anstream::eprintln!("kanbanlock: {message}");
        ExitCode::from(status)
    })
}

/// For what is printed: a reader that has gone (`kanbanlock man | head`) is no failure.
fn ignore_broken_pipe(result: std::io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
