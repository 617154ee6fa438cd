//! `kanbanlock completions` and `kanbanlock man`: made from the same definitions that read the command line.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::failure::{Failure, USAGE};
use crate::{Cli, ignore_broken_pipe};

/// Prints completions for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  kanbanlock completions bash > kanbanlock.bash")]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Prints a manual page, in roff.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kanbanlock man > kanbanlock.1\n  kanbanlock man status > kanbanlock-status.1"
)]
pub struct ManArgs {
    /// The subcommand that it is about; without, the whole command.
    command: Option<String>,
}

/// `kanbanlock completions SHELL`
pub fn completions(args: &CompletionsArgs) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "kanbanlock", &mut script);
    ignore_broken_pipe(std::io::stdout().write_all(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// `kanbanlock man [COMMAND]`
pub fn man(args: &ManArgs) -> Result<ExitCode, Failure> {
    let mut command = Cli::command();
    command.build();
    if let Some(name) = &args.command {
        // Named as git's pages are: kanbanlock-status(1).
        command = (command.find_subcommand(name).cloned())
            .ok_or_else(|| Failure::new(USAGE, format!("there is no subcommand {name}")))?;
    }
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    ignore_broken_pipe(std::io::stdout().write_all(&page))?;
    Ok(ExitCode::SUCCESS)
}
