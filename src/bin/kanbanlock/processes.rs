//! Which processes have a database open, and what each does there: from `/proc/PID/fd`, `fdinfo`, `maps` and `/proc/locks`
//! (proc(5)).
//!
//! ## Key operations
//! - A descriptor is told by device and inode number (statx(2) through `/proc/PID/fd/N`, of what the kernel has cached),
//!   not by its path: so it is found in another mount namespace, and under another name.
//! - `fdinfo` lists the locks that were got through a descriptor: POSIX, OFD, flock.
//! - Other users' processes cannot be looked into without root. They are counted, and `/proc/locks`, which all may read,
//!   names those that hold POSIX locks or the flock.
//!
//! ## How one sees that a process goes through kanbanlock
//! It has the lock file open with the very flags of kanbanlock's, or holds OFD locks on the database: the unix VFS alone
//! takes POSIX locks. These, without either sign, are stock SQLite's. A process that has no lock at the moment (in
//! rollback mode nobody has between transactions) and has not written yet cannot be told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};
use serde::Serialize;

use crate::failure::Failure;

/// The files of one database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum File {
    /// The database itself.
    Db,
    /// `-wal`
    Wal,
    /// `-shm`
    Shm,
    /// `-journal`
    Journal,
    /// `.lock`
    Lock,
}

impl File {
    /// All of them, with what is appended to the database's name.
    pub const ALL: [(File, &str); 5] = [
        (File::Db, ""),
        (File::Wal, "-wal"),
        (File::Shm, "-shm"),
        (File::Journal, "-journal"),
        (File::Lock, ".lock"),
    ];
}

/// `path` with something appended to its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Device (major, minor) and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Id(u32, u32, u64);

/// Kinds of locks. fcntl(2), flock(2)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of the process.
    Posix,
    /// Of the open file description.
    Ofd,
    /// flock(2), on the lock file.
    Flock,
}

/// Does a process go through kanbanlock?
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Through {
    /// It does.
    Yes,
    /// It does not.
    No,
    /// There is nothing to tell by.
    Unknown,
}

/// A process that has one of the files open, or a lock on one.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// Its pid, in this pid namespace.
    pub pid: u32,
    /// Its command line, in one line.
    pub command: String,
    /// The name of its user, or the number.
    pub user: String,
    /// Which files it has open.
    pub open: BTreeSet<File>,
    /// The locks that it holds there.
    pub locks: Vec<(File, Kind)>,
    /// It has the lock file open as kanbanlock opens it.
    pub has_gate_open: bool,
    /// Files that were at the database's paths and are deleted, which it still has open.
    pub deleted: BTreeSet<String>,
    /// The files that it has mapped to execute; empty if they may not be seen.
    pub code: BTreeSet<PathBuf>,
    /// Nothing is known but a lock.
    pub is_closed_to_us: bool,
}

impl Process {
    /// Does it have the database open? (Some have only the lock file.)
    pub fn uses_db(&self) -> bool {
        !self.deleted.is_empty()
            || self.open.iter().any(|file| *file != File::Lock)
            || self.locks.iter().any(|(file, _)| *file != File::Lock)
    }

    fn holds(&self, kind: Kind) -> bool {
        self.locks.iter().any(|(file, held)| *file != File::Lock && *held == kind)
    }

    /// It holds the flock.
    pub fn holds_gate(&self) -> bool {
        self.locks.contains(&(File::Lock, Kind::Flock))
    }

    /// Does it go through kanbanlock, and how do we know?
    pub fn through(&self) -> (Through, &'static str) {
        if self.has_gate_open {
            (Through::Yes, "has the lock file open as kanbanlock does")
        } else if self.holds(Kind::Ofd) {
            (Through::Yes, "holds close-proof (OFD) locks")
        } else if self.holds(Kind::Posix) && self.open.contains(&File::Lock) {
            (Through::No, "takes a flock of its own beside SQLite's POSIX locks")
        } else if self.holds(Kind::Posix) {
            (Through::No, "holds POSIX locks, and has not opened the lock file")
        } else if self.code.iter().any(|path| is_extension(path)) {
            (Through::Unknown, "has kanbanlock's extension loaded, and no lock now")
        } else {
            (Through::Unknown, "holds no lock now, and has not written through kanbanlock")
        }
    }
}

fn is_extension(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains("kanbanlock.so"))
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Scan {
    /// By pid.
    pub processes: Vec<Process>,
    /// So many processes could not be looked into.
    pub unseen: usize,
    /// `/proc` is mounted so that other users' processes are not even listed (hidepid, proc(5)).
    pub is_hidden: bool,
    /// Somebody who could not be looked into holds OFD locks on the database.
    pub has_unseen_ofd_locks: bool,
}

/// Looks at all processes but this one. `db`: without symbolic links.
///
/// # Errors
///
/// There is no `/proc`.
pub fn scan(db: &Path) -> Result<Scan, Failure> {
    let mut files = BTreeMap::new();
    for (file, suffix) in File::ALL {
        if let Ok(Stat { id, .. }) = stat(CWD, beside(db, suffix)) {
            files.insert(id, file);
        }
    }
    let names = fs::read_dir("/proc").map_err(|error| Failure::of_system("/proc", &error))?;
    let pids = names.filter_map(|name| name.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let pids: Vec<u32> = pids.filter(|pid| *pid != std::process::id()).collect();
    let mut scan = Scan { is_hidden: !Path::new("/proc/1").exists(), ..Scan::default() };
    // Each descriptor of each process is a system call of some 4 µs: a thread for each processor, up to a handful, each
    // with every so-manieth process, since neighbours are often alike.
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(8);
    let parts: Vec<Scan> = std::thread::scope(|scope| {
        let part = |first| pids.iter().copied().skip(first).step_by(threads);
        let look_at = |first| {
            let (part, files) = (part(first), &files);
            scope.spawn(move || look_at_all(part, db, files))
        };
        let started: Vec<_> = (1..threads).map(look_at).collect();
        let own = look_at_all(part(0), db, &files);
        let others = started
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        others.chain([own]).collect()
    });
    for part in parts {
        scan.processes.extend(part.processes);
        scan.unseen += part.unseen;
    }
    let ofd_locks = |process: &Process| process.locks.iter().filter(|(_, kind)| *kind == Kind::Ofd).count();
    let seen_ofd_locks = scan.processes.iter().map(ofd_locks).sum();
    scan.add_from_proc_locks(&files, seen_ofd_locks)?;
    scan.processes.sort_by_key(|process| process.pid);
    Ok(scan)
}

fn look_at_all(pids: impl Iterator<Item = u32>, db: &Path, files: &BTreeMap<Id, File>) -> Scan {
    let mut scan = Scan::default();
    for pid in pids {
        match look(pid, db, files) {
            Ok(Some(mut process)) => {
                process.describe();
                process.code = executable_maps(pid);
                scan.processes.push(process);
            }
            // A process of the kernel, or one that has ended, has no command line and no descriptors.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                scan.unseen +=
                    usize::from(fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()));
            }
            _ => {}
        }
    }
    scan
}

impl Scan {
    /// The locks of processes that we could not look into.
    fn add_from_proc_locks(
        &mut self,
        files: &BTreeMap<Id, File>,
        seen_ofd_locks: usize,
    ) -> Result<(), Failure> {
        let of_system = |error| Failure::of_system("/proc/locks", &error);
        // Not less than a page at a time: between two read(2) the kernel may skip a lock (fs/seq_file.c).
        let locks = BufReader::with_capacity(1 << 16, fs::File::open("/proc/locks").map_err(of_system)?);
        let mut ofd_locks = 0;
        for line in locks.lines() {
            let Some(lock) = parse_lock(&line.map_err(of_system)?) else { continue };
            let Some(&file) = files.get(&lock.id) else { continue };
            let Some(pid) = lock.pid else {
                ofd_locks += usize::from(lock.kind == Kind::Ofd);
                continue;
            };
            let known = self.processes.iter_mut().find(|process| process.pid == pid);
            let is_gone = || !Path::new(&format!("/proc/{pid}")).exists();
            match known {
                Some(process) if process.is_closed_to_us => process.locks.push((file, lock.kind)),
                Some(_) => {}
                // Inherited by a child, or the process has ended since we looked.
                None if is_gone() || fs::read_dir(format!("/proc/{pid}/fd")).is_ok() => {}
                None => {
                    let mut process = Process { pid, is_closed_to_us: true, ..Process::default() };
                    process.locks.push((file, lock.kind));
                    process.describe();
                    self.processes.push(process);
                }
            }
        }
        self.has_unseen_ofd_locks = self.unseen > 0 && ofd_locks > seen_ofd_locks;
        Ok(())
    }
}

impl Process {
    fn describe(&mut self) {
        self.command = command(self.pid);
        self.user = user(self.pid);
    }
}

/// The command line of a process, in one line without control characters.
pub fn command(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = if line.is_empty() { fs::read(format!("/proc/{pid}/comm")).unwrap_or_default() } else { line };
    let text = String::from_utf8_lossy(&line);
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.trim() {
        "" => "(ended)".to_owned(),
        text => text.to_owned(),
    }
}

/// The user of a process.
pub fn user(pid: u32) -> String {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = fs::metadata(format!("/proc/{pid}")) else { return "?".to_owned() };
    let uid = nix::unistd::Uid::from_raw(metadata.uid());
    let name = nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.name);
    name.unwrap_or_else(|| uid.to_string())
}

struct Stat {
    id: Id,
    is_deleted: bool,
}

/// statx(2). "AT_STATX_DONT_SYNC: Don't synchronize anything, but rather just take whatever the system has cached if
/// possible": a dead network mount in some process does not hang us.
fn stat(folder: impl std::os::fd::AsFd, path: impl rustix::path::Arg) -> io::Result<Stat> {
    let fields = StatxFlags::INO | StatxFlags::NLINK;
    let stat = statx(folder, path, AtFlags::STATX_DONT_SYNC, fields)?;
    let id = Id(stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
    Ok(Stat { id, is_deleted: stat.stx_nlink == 0 })
}

/// `None`: it has none of the files open.
fn look(pid: u32, db: &Path, files: &BTreeMap<Id, File>) -> io::Result<Option<Process>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder: OwnedFd = openat(CWD, format!("/proc/{pid}/fd"), flags, Mode::empty())?;
    let mut process = Process { pid, ..Process::default() };
    for entry in rustix::fs::Dir::read_from(&folder)? {
        let Ok(entry) = entry else { break };
        let fd = entry.file_name();
        if fd.to_bytes().starts_with(b".") {
            continue;
        }
        // It may be closed by now.
        let Ok(stat) = stat(&folder, fd) else { continue };
        if stat.is_deleted {
            let link = rustix::fs::readlinkat(&folder, fd, Vec::new())?;
            if let Some(suffix) = deleted(&link.to_string_lossy(), db) {
                process.deleted.insert(suffix.to_owned());
            }
        }
        if let Some(&file) = files.get(&stat.id) {
            process.open.insert(file);
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.to_string_lossy()))
                .unwrap_or_default();
            process.add_info(file, &info);
        }
    }
    let is_interesting = !process.open.is_empty() || !process.deleted.is_empty();
    Ok(is_interesting.then_some(process))
}

/// What follows the database's name in the path of a deleted file of it: "If the file has been deleted, … (deleted)". proc(5)
fn deleted<'a>(link: &'a str, db: &Path) -> Option<&'a str> {
    let suffix = link.strip_suffix(" (deleted)")?.strip_prefix(db.to_str()?)?;
    ["", "-wal", "-shm", ".lock"].contains(&suffix).then_some(suffix)
}

impl Process {
    /// A descriptor's `fdinfo`.
    fn add_info(&mut self, file: File, info: &str) {
        for line in info.lines() {
            if let Some(flags) = line.strip_prefix("flags:") {
                let flags = i32::from_str_radix(flags.trim(), 8).unwrap_or(0);
                let ours = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
                self.has_gate_open |= file == File::Lock && flags & ours == ours;
            } else if let Some(lock) = line.strip_prefix("lock:").and_then(parse_lock) {
                self.locks.push((file, lock.kind));
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Lock {
    kind: Kind,
    /// `None`: an OFD lock has no owner that is a process.
    pid: Option<u32>,
    id: Id,
}

/// A line of `/proc/locks`: `1: POSIX  ADVISORY  WRITE 4711 fe:00:131 0 EOF`. Not one that waits (`1: -> …`).
fn parse_lock(line: &str) -> Option<Lock> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let kind = match fields.next()? {
        "POSIX" => Kind::Posix,
        "OFDLCK" => Kind::Ofd,
        "FLOCK" => Kind::Flock,
        _ => return None,
    };
    let pid = fields.nth(2)?.parse().ok();
    let mut id = fields.next()?.split(':');
    let major = u32::from_str_radix(id.next()?, 16).ok()?;
    let minor = u32::from_str_radix(id.next()?, 16).ok()?;
    Some(Lock { kind, pid, id: Id(major, minor, id.next()?.parse().ok()?) })
}

/// The files that a process has mapped to execute: the sixth field of `/proc/PID/maps`.
fn executable_maps(pid: u32) -> BTreeSet<PathBuf> {
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    let path = |line: &str| {
        let is_code = line.split(' ').nth(1)?.contains('x');
        let path = &line[line.find('/')?..];
        is_code.then(|| PathBuf::from(path))
    };
    maps.lines().filter_map(path).collect()
}
