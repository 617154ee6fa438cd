//! # The command line

use std::fs::File;
use std::path::PathBuf;

use clap::Parser;

use crate::Result;
use crate::job::{Job, parse_job};
use crate::load::Load;
use crate::sabotage::Sabotage;

/// A kanban board shared by many processes: SQLite under contention, audited.
#[derive(Parser)]
#[command(name = "kanban_board")]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) load: Load,

    /// VFS to open the database through; `unix` is stock SQLite
    #[arg(long, value_name = "NAME", default_value = kanbanlock::VFS_NAME)]
    pub(crate) vfs: String,

    /// Database to create and keep; it must not exist yet [default: a temporary one]
    #[arg(long, value_name = "PATH")]
    pub(crate) db: Option<PathBuf>,

    /// Keep the temporary database (a failed audit always keeps it)
    #[arg(long)]
    pub(crate) keep: bool,

    /// Write the result as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Damage the board before the audit, which must notice
    #[arg(long, value_enum, hide = true)]
    pub(crate) sabotage: Option<Sabotage>,

    /// Be the worker or reader described by this JSON
    #[arg(long, hide = true, exclusive = true, value_parser = parse_job)]
    pub(crate) child: Option<Job>,
}

impl Options {
    /// Creates the `--json` file, so that a wrong path is reported before the run and not after it.
    pub(crate) fn create_json(&self) -> Result<Option<File>> {
        let Some(path) = &self.json else { return Ok(None) };
        let file = File::create(path)
            .map_err(|error| format!("--json: cannot write {}: {error}", path.display()))?;
        Ok(Some(file))
    }
}
