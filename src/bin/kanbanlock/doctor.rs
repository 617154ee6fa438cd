//! `kanbanlock doctor`: what is wrong with a database's surroundings, and how to put it right.
//!
//! Each check is a function that makes [`Finding`]s. Nothing is repaired here. One file is written: a scratch file beside the
//! database, for the lock probe, which is removed.

mod locks;
mod sqlite;

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use clap::Args as ClapArgs;
use nix::sys::statfs::statfs;
use nix::sys::statvfs::FsFlags;
use serde::Serialize;

use crate::database::{self, Database};
use crate::failure::{Failure, NO};
use crate::ignore_broken_pipe;
use crate::processes::{self, Process, Scan, Through, beside};

pub use locks::ProbeArgs;
pub use locks::probe;

/// Looks for what makes a database unsafe, and says how to put it right.
///
/// Checks the file system, whether locks exclude there, the lock file, links, permissions, and the processes that have the
/// database open: whether they go through kanbanlock, and which SQLite they have. Exits with 1 if something is wrong.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  kanbanlock doctor kanban.db
  kanbanlock doctor kanban.db --json")]
pub struct Args {
    /// The database file.
    #[arg(value_name = "DB")]
    db: PathBuf,
    /// Prints the findings as a JSON array.
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// It could not be found out.
    Unknown,
    Wrong,
}

/// What a check has found.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

fn ok(check: &'static str, what: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Ok, what: what.into(), fix: None }
}

fn unknown(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Unknown, what: what.into(), fix: Some(fix.into()) }
}

fn wrong(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Wrong, what: what.into(), fix: Some(fix.into()) }
}

/// `kanbanlock doctor`
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let db = args.db.canonicalize().map_err(|error| Failure::of_file(&args.db, &error))?;
    let file = database::read(&db)?;
    let scan = processes::scan(&db)?;
    let is_read_only = is_on_read_only(&db);
    let findings: Vec<Finding> = [
        check_file_system(&db, &file),
        if is_read_only { not_writable("locks") } else { locks::check(&db) },
        check_links(&db)?,
        check_lock_file(&db)?,
        if is_read_only { not_writable("permissions") } else { check_permissions(&db)? },
        check_ways(&scan),
        check_deleted(&scan, &db),
        sqlite::check(&scan, &file),
    ]
    .into_iter()
    .flatten()
    .collect();
    let text = if args.json {
        serde_json::to_string_pretty(&findings).map_err(io::Error::from)? + "\n"
    } else {
        findings.iter().map(Finding::text).collect()
    };
    ignore_broken_pipe(anstream::stdout().write_all(text.as_bytes()))?;
    let is_wrong = findings.iter().any(|finding| finding.verdict == Verdict::Wrong);
    Ok(if is_wrong { ExitCode::from(NO) } else { ExitCode::SUCCESS })
}

impl Finding {
    fn text(&self) -> String {
        let (style, word) = match self.verdict {
            Verdict::Ok => (AnsiColor::Green.on_default(), "ok"),
            Verdict::Unknown => (Style::new().dimmed(), "unknown"),
            Verdict::Wrong => (AnsiColor::Red.on_default().bold(), "WRONG"),
        };
        let fix = self.fix.as_ref().map(|fix| format!("{:8} → {fix}\n", "")).unwrap_or_default();
        format!("{style}{word:8}{style:#} {}: {}\n{fix}", self.check, self.what)
    }
}

/// File systems by the magic number of statfs(2), and whether flock, POSIX and OFD locks are known to work there.
const FILE_SYSTEMS: &[(u32, &str, Verdict)] = &[
    (0x0000_ef53, "ext2, ext3 or ext4", Verdict::Ok),
    (0x5846_5342, "xfs", Verdict::Ok),
    (0x9123_683e, "btrfs", Verdict::Ok),
    (0x0102_1994, "tmpfs", Verdict::Ok),
    (0xf2f5_2010, "f2fs", Verdict::Ok),
    (0x2fc1_2fc1, "zfs", Verdict::Ok),
    (0x794c_7630, "overlay", Verdict::Ok),
    (0x0000_6969, "nfs", Verdict::Wrong),
    (0x0000_517b, "smb", Verdict::Wrong),
    (0xff53_4d42, "cifs", Verdict::Wrong),
    (0xfe53_4d42, "smb2", Verdict::Wrong),
    (0x0102_1997, "9p", Verdict::Wrong),
    (0x00c3_6400, "ceph", Verdict::Wrong),
    (0x5346_414f, "afs", Verdict::Wrong),
    (0x786f_4256, "vboxsf", Verdict::Wrong),
    (0x7371_7368, "squashfs", Verdict::Ok),
    (0xe0f5_e1e2, "erofs", Verdict::Ok),
    (0x0000_9660, "iso9660", Verdict::Ok),
    (FUSE, "fuse or virtiofs", Verdict::Unknown),
];

const FUSE: u32 = 0x6573_5546;

/// Programs of FUSE whose files are on other machines: `fuse.NAME` in `/proc/self/mountinfo`. The kernel locks files of FUSE
/// for this machine alone, unless the program asks for the locks.
const REMOTE_FUSE: &[&str] =
    &["sshfs", "rclone", "s3fs", "gcsfuse", "curlftpfs", "glusterfs", "cephfs", "davfs"];

const LOCAL: &str = "move the database to a local disk (ext4, xfs, btrfs, tmpfs)";

fn not_writable(check: &'static str) -> Vec<Finding> {
    vec![ok(check, "not tried: nothing can be written here")]
}

/// The file system, or its mount here: "Mount read-only", statfs(2).
fn is_on_read_only(db: &Path) -> bool {
    statfs(db).is_ok_and(|statfs| statfs.flags().contains(FsFlags::ST_RDONLY))
}

fn check_file_system(db: &Path, file: &Database) -> Vec<Finding> {
    const CHECK: &str = "file system";
    let (magic, is_read_only) = match statfs(db) {
        Ok(statfs) => (statfs.filesystem_type().0, statfs.flags().contains(FsFlags::ST_RDONLY)),
        Err(error) => return vec![unknown(CHECK, format!("statfs(2): {error}"), LOCAL)],
    };
    // A long, of which the number is the low half.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::unnecessary_cast)]
    let magic = magic as u32;
    let (name, verdict) = match fuse_program(db).filter(|_| magic == FUSE) {
        Some(program) if REMOTE_FUSE.contains(&&*program) => (format!("fuse.{program}"), Verdict::Wrong),
        Some(program) => (format!("fuse.{program}"), Verdict::Unknown),
        None => file_system(magic),
    };
    if is_read_only && is_wal(file) && !beside(db, "-shm").exists() {
        let what = format!(
            "{name}, read-only: a database in WAL mode, and there is no -shm, nor can SQLite make one to read it"
        );
        let fix = "PRAGMA journal_mode = DELETE before it goes there, or open it with immutable=1";
        return vec![wrong(CHECK, what, fix)];
    }
    if is_read_only {
        return vec![ok(CHECK, format!("{name}, read-only: nobody writes by this path"))];
    }
    vec![match verdict {
        Verdict::Ok => ok(CHECK, name),
        Verdict::Unknown => {
            let what =
                format!("{name}: what is behind it cannot be seen, the probe below is about this machine");
            unknown(CHECK, what, LOCAL)
        }
        Verdict::Wrong => {
            let what =
                format!("{name}: locks may not reach other machines, and -shm cannot be shared with them");
            wrong(CHECK, what, LOCAL)
        }
    }]
}

/// Of the mount that `db` is on: NAME of the type `fuse.NAME`. proc_pid_mountinfo(5)
fn fuse_program(db: &Path) -> Option<String> {
    let device = fs::metadata(db).ok()?.dev();
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let program = file_system.split(' ').next()?.strip_prefix("fuse.")?;
        (mount.split(' ').nth(2)? == device).then(|| program.to_owned())
    })
}

fn file_system(magic: u32) -> (String, Verdict) {
    let known = FILE_SYSTEMS.iter().find(|(number, ..)| *number == magic);
    known.map_or_else(
        || (format!("of an unknown type ({magic:#x})"), Verdict::Unknown),
        |(_, name, verdict)| ((*name).to_owned(), *verdict),
    )
}

fn check_links(db: &Path) -> Result<Vec<Finding>, Failure> {
    const CHECK: &str = "hard links";
    let links = fs::metadata(db).map_err(|error| Failure::of_file(db, &error))?.nlink();
    Ok(vec![if links > 1 {
        let what =
            format!("the database has {links} names; under another, the lock file and -wal are others, too");
        let fix = format!("find the others (find / -xdev -samefile {}) and remove them", db.display());
        wrong(CHECK, what, fix)
    } else {
        ok(CHECK, "the database has one name")
    }])
}

fn check_lock_file(db: &Path) -> Result<Vec<Finding>, Failure> {
    const CHECK: &str = "lock file";
    let path = beside(db, ".lock");
    let lock = match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(vec![ok(CHECK, "not there yet: nobody has written through kanbanlock")]);
        }
        attributes => attributes.map_err(|error| Failure::of_file(&path, &error))?,
    };
    let path = path.display();
    let odd = |what: &str, fix: String| vec![wrong(CHECK, format!("{path} is {what}; writers fail"), fix)];
    let kind = lock.file_type();
    if kind.is_symlink() {
        return Ok(odd("a symbolic link", format!("rm {path}")));
    }
    if kind.is_dir() {
        let fix =
            format!("it is another tool's lock (unix-dotfile, mkdir): stop that tool, then rmdir {path}");
        return Ok(odd("a directory", fix));
    }
    if !kind.is_file() {
        let what = if kind.is_fifo() { "a FIFO" } else { "not a regular file" };
        return Ok(odd(what, format!("rm {path}")));
    }
    let findings = differences(CHECK, db, &beside(db, ".lock"))?;
    Ok(if findings.is_empty() {
        vec![ok(CHECK, "a regular file, with the database's owner and mode")]
    } else {
        findings
    })
}

/// A file beside the database should have its owner and mode: else there are users who can use one and not the other.
fn differences(check: &'static str, db: &Path, file: &Path) -> Result<Vec<Finding>, Failure> {
    let attributes = |path: &Path| fs::metadata(path).map_err(|error| Failure::of_file(path, &error));
    let like = attributes(db)?;
    let there = match fs::metadata(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        attributes => attributes.map_err(|error| Failure::of_file(file, &error))?,
    };
    let (db, path) = (db.display(), file.display());
    let mut findings = Vec::new();
    if (there.uid(), there.gid()) != (like.uid(), like.gid()) {
        let what = format!(
            "{path} belongs to {}:{}, the database to {}:{}",
            there.uid(),
            there.gid(),
            like.uid(),
            like.gid()
        );
        findings.push(wrong(check, what, format!("chown --reference={db} {path}")));
    }
    let (mode, wanted) = (there.mode() & 0o777, like.mode() & 0o777);
    if mode != wanted {
        let what = format!("{path} has mode {mode:03o}, the database {wanted:03o}");
        findings.push(wrong(check, what, format!("chmod --reference={db} {path}")));
    }
    Ok(findings)
}

fn check_permissions(db: &Path) -> Result<Vec<Finding>, Failure> {
    const CHECK: &str = "permissions";
    let mut findings = Vec::new();
    for suffix in ["-wal", "-shm", "-journal"] {
        findings.extend(differences(CHECK, db, &beside(db, suffix))?);
    }
    let folder = db.parent().unwrap_or(Path::new("/"));
    let attributes = |path: &Path| fs::metadata(path).map_err(|error| Failure::of_file(path, &error));
    let (file, folder_attributes) = (attributes(db)?, attributes(folder)?);
    if file.mode() & 0o222 == 0 {
        let what = format!("{} is read-only for everybody", db.display());
        findings.push(wrong(CHECK, what, format!("chmod u+w {}, if it is to be written", db.display())));
    } else if folder_attributes.mode() & 0o222 == 0 {
        let what = format!("nobody may create files in {}: SQLite needs a journal there", folder.display());
        findings.push(wrong(CHECK, what, format!("chmod u+w {}", folder.display())));
    } else if let Some(path) = [db, folder].into_iter().find(|path| !is_writable(path)) {
        let what = format!("you may not write {}", path.display());
        findings.push(unknown(CHECK, what, "no matter if those who write run as other users"));
    }
    if findings.is_empty() {
        findings.push(ok(CHECK, "the database and its folder can be written, its files are alike"));
    }
    Ok(findings)
}

fn is_writable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

/// A process, for a message.
fn named(process: &Process) -> String {
    let command: String = process.command.chars().take(60).collect();
    format!("process {} ({}, {command})", process.pid, process.user)
}

fn check_ways(scan: &Scan) -> Vec<Finding> {
    const CHECK: &str = "through kanbanlock";
    let mut findings = Vec::new();
    let users: Vec<&Process> = scan.processes.iter().filter(|process| process.uses_db()).collect();
    for process in &users {
        let (through, why) = process.through();
        let what = format!("{} {why}", named(process));
        match through {
            Through::Yes => {}
            Through::No => findings.push(wrong(
                CHECK,
                what,
                "open the database through kanbanlock there: file:…?vfs=kanbanlock, or make it the default VFS",
            )),
            Through::Unknown => findings.push(unknown(CHECK, what, "look again while it writes")),
        }
    }
    if scan.unseen > 0 || scan.is_hidden {
        let what = if scan.is_hidden {
            "other users' processes are hidden (hidepid)".to_owned()
        } else {
            format!("{} processes could not be looked into", scan.unseen)
        };
        findings.push(unknown(CHECK, what, "run it as root"));
    }
    if findings.is_empty() {
        let what = match users.len() {
            0 => "nobody has the database open".to_owned(),
            count => format!("all {count} that have the database open"),
        };
        findings.push(ok(CHECK, what));
    }
    findings
}

fn check_deleted(scan: &Scan, db: &Path) -> Vec<Finding> {
    const CHECK: &str = "deleted files";
    let mut findings = Vec::new();
    for process in &scan.processes {
        for suffix in &process.deleted {
            let what =
                format!("{} still has a deleted {} open", named(process), beside(db, suffix).display());
            let fix =
                "restart that process, check what it wrote last, and find out what deletes SQLite's files";
            findings.push(wrong(CHECK, what, fix));
        }
    }
    if findings.is_empty() {
        findings.push(ok(CHECK, "nobody has a deleted database, -wal, -shm or .lock open"));
    }
    findings
}

/// True for a database in WAL mode.
fn is_wal(file: &Database) -> bool {
    file.journal_mode == "wal"
}
