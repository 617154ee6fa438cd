//! # Where a run's files are
//!
//! ```text
//! kanban.db        the database, with SQLite's -wal, -shm, -journal and kanbanlock's .lock beside it
//! kanban.db.acks/  the acknowledgement log of each process, one file per incarnation
//! ```
//!
//! The database is a new file, always: `O_CREAT|O_EXCL` refuses whatever exists already, so no data of the
//! user's can be lost. Without `--db` it lives in a temporary directory on the disk that Cargo builds on
//! (`/tmp` is memory on many systems), removed at the end unless it is worth a look.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::Result;
use super::job::{self, Role};

/// The files of one run.
pub(crate) struct Place {
    db: PathBuf,
    acks: PathBuf,
    temporary: Option<TempDir>,
}

impl Place {
    /// Creates the empty database file and the directory of the acknowledgement logs.
    #[allow(dead_code, reason = "kanbanlock stress is told a directory")]
    pub(crate) fn create(db: Option<&Path>) -> Result<Self> {
        match db {
            Some(path) => Self::at(path, None),
            None => Self::create_in(&parent_of_temporary()?),
        }
    }

    /// The same in a new, temporary directory in this one.
    pub(crate) fn create_in(parent: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("kanban-")
            .tempdir_in(parent)
            .map_err(|error| format!("cannot create a directory in {}: {error}", parent.display()))?;
        Self::at(&directory.path().join("kanban.db"), Some(directory))
    }

    fn at(path: &Path, temporary: Option<TempDir>) -> Result<Self> {
        let db = create_database(path)?;
        let acks = beside(&db, ".acks");
        fs::create_dir(&acks).map_err(|error| {
            let _ = fs::remove_file(&db); // the empty one we created above
            format!(
                "cannot create the directory {}: {error}; remove it, or choose another --db",
                acks.display()
            )
        })?;
        Ok(Self { db, acks, temporary })
    }

    /// The database, as an absolute path without symbolic links.
    pub(crate) fn db(&self) -> &Path {
        &self.db
    }

    /// The acknowledgement log of one incarnation.
    pub(crate) fn log(&self, role: Role, number: u32, incarnation: u32) -> PathBuf {
        self.acks.join(format!("{}-{number}.{incarnation}.jsonl", job::name(role)))
    }

    /// Takes the empty files of a run that never began away again.
    #[allow(dead_code, reason = "the soak's databases are temporary")]
    pub(crate) fn discard(&self) {
        let _ = fs::remove_dir(&self.acks);
        let _ = fs::remove_file(&self.db);
    }

    /// Leaves the files where they are and says where that is.
    pub(crate) fn keep(&mut self) -> &Path {
        if let Some(directory) = self.temporary.take() {
            let _ = directory.keep();
        }
        &self.db
    }
}

/// `path` with a suffix on its last component: `kanban.db`, `kanban.db-wal`.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn create_database(path: &Path) -> Result<PathBuf> {
    for suffix in ["-wal", "-journal"] {
        let leftover = beside(path, suffix);
        if leftover.exists() {
            return Err(format!(
                "{} exists: it belongs to some database; choose another --db",
                leftover.display()
            )
            .into());
        }
    }
    OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => format!(
            "{} exists, and this program never touches a file that it did not create; \
             remove it, or choose another --db",
            path.display()
        ),
        ErrorKind::NotFound => {
            format!("cannot create {}: {error}; create its directory first", path.display())
        }
        _ => format!("cannot create {}: {error}; choose another --db", path.display()),
    })?;
    let absolute = path.canonicalize()?;
    if absolute.to_str().is_none() {
        fs::remove_file(&absolute)?;
        return Err(
            format!("{} is not UTF-8, as SQLite wants it; choose another --db", path.display()).into()
        );
    }
    Ok(absolute)
}

/// In Cargo's target directory (recognised by the tag that Cargo puts there), else the system's.
fn parent_of_temporary() -> Result<PathBuf> {
    let executable = std::env::current_exe()?;
    let target = executable.ancestors().find(|directory| directory.join("CACHEDIR.TAG").is_file());
    let parent = target.map_or_else(std::env::temp_dir, |target| target.join("tmp"));
    fs::create_dir_all(&parent)
        .map_err(|error| format!("cannot create {}: {error}; name a file with --db", parent.display()))?;
    Ok(parent)
}
