//! Do flock, POSIX and OFD locks exclude another process, in this very folder?
//!
//! This process locks a scratch file beside the database; another (this program again, with a hidden subcommand) tries the
//! same, and must be refused until the lock is gone. OFD against POSIX, too: that is what close-proof locks rest on.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::{Args as ClapArgs, ValueEnum};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::{Finding, LOCAL, ok, unknown, wrong};
use crate::failure::{Failure, NO};

/// Tries a lock for another process: exits with 0 if it could be had, with 1 if it was refused.
#[derive(Debug, ClapArgs)]
pub struct ProbeArgs {
    /// The scratch file.
    file: PathBuf,
    /// The kind of lock.
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Flock,
    Posix,
    Ofd,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Flock => "flock",
            Kind::Posix => "POSIX",
            Kind::Ofd => "OFD",
        }
    }

    /// Takes the lock, for writing, without waiting. False: refused.
    fn lock(self, file: &File) -> io::Result<bool> {
        let command = match self {
            Kind::Flock => {
                return match file.try_lock() {
                    Ok(()) => Ok(true),
                    Err(TryLockError::WouldBlock) => Ok(false),
                    Err(TryLockError::Error(error)) => Err(error),
                };
            }
            Kind::Posix => FcntlArg::F_SETLK,
            Kind::Ofd => FcntlArg::F_OFD_SETLK,
        };
        match fcntl(file, command(&whole_file(libc::F_WRLCK))) {
            Ok(_) => Ok(true),
            Err(Errno::EACCES | Errno::EAGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn unlock(self, file: &File) -> io::Result<()> {
        let command = match self {
            Kind::Flock => return file.unlock(),
            Kind::Posix => FcntlArg::F_SETLK,
            Kind::Ofd => FcntlArg::F_OFD_SETLK,
        };
        fcntl(file, command(&whole_file(libc::F_UNLCK)))?;
        Ok(())
    }
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    #[allow(clippy::cast_possible_truncation)] // constants below 3
    let (kind, whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
    libc::flock { l_type: kind, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 }
}

/// What is held here, and what the other process tries.
const PAIRS: [(Kind, Kind); 5] = [
    (Kind::Flock, Kind::Flock),
    (Kind::Posix, Kind::Posix),
    (Kind::Ofd, Kind::Ofd),
    (Kind::Ofd, Kind::Posix),
    (Kind::Posix, Kind::Ofd),
];

pub fn check(db: &Path) -> Vec<Finding> {
    const CHECK: &str = "locks";
    let folder = db.parent().unwrap_or(Path::new("/"));
    let scratch = match tempfile::Builder::new().prefix(".kanbanlock-probe-").tempfile_in(folder) {
        Ok(scratch) => scratch,
        Err(error) => {
            let what = format!("not tried: no scratch file in {}: {error}", folder.display());
            return vec![unknown(CHECK, what, "run it as a user who may write there")];
        }
    };
    let mut findings = Vec::new();
    for (held, tried) in PAIRS {
        let names = (held.name(), tried.name());
        match try_pair(scratch.as_file(), scratch.path(), held, tried) {
            Ok(None) => {}
            Ok(Some(what)) => {
                findings.push(wrong(CHECK, format!("{} against {}: {what}", names.0, names.1), LOCAL));
            }
            Err(error) => {
                findings.push(wrong(CHECK, format!("{} against {}: {error}", names.0, names.1), LOCAL));
            }
        }
    }
    if findings.is_empty() {
        findings.push(ok(CHECK, "flock, POSIX and OFD locks exclude another process in this folder"));
    }
    findings
}

/// `Some`: what is wrong.
fn try_pair(file: &File, path: &Path, held: Kind, tried: Kind) -> io::Result<Option<&'static str>> {
    if !held.lock(file)? {
        return Ok(Some("a lock that nobody holds is refused"));
    }
    let is_excluded = !other_process_gets(path, tried)?;
    held.unlock(file)?;
    Ok(match (is_excluded, other_process_gets(path, tried)?) {
        (false, _) => Some("another process gets a lock that is held"),
        (true, false) => Some("another process is refused a lock that was given up"),
        (true, true) => None,
    })
}

fn other_process_gets(path: &Path, kind: Kind) -> io::Result<bool> {
    let name = kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    let mut command = Command::new(std::env::current_exe()?);
    let status = command.arg("lock-probe").arg(path).arg(name).stderr(Stdio::null()).status()?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(io::Error::other(format!("the other process failed: {status}"))),
    }
}

/// `kanbanlock lock-probe`
pub fn probe(args: &ProbeArgs) -> Result<ExitCode, Failure> {
    let file = File::options().read(true).write(true).open(&args.file);
    let file = file.map_err(|error| Failure::of_file(&args.file, &error))?;
    let is_had = args.kind.lock(&file).map_err(|error| Failure::of_system(args.kind.name(), &error))?;
    Ok(if is_had { ExitCode::SUCCESS } else { ExitCode::from(NO) })
}
