//! What this process has inherited of a gate: the variable `KANBANLOCK_HELD`, and the locks of a lock file by depth.
//!
//! ## The problem
//! A flock is refused to every other open file description, also to one of the same family of processes:
//! `flock db.lock sh -c 'sqlite3 db …'` keeps its own command out. `kanbanlock run` ([`crate::Hold`]) holds the gate for a
//! command whose connections go through kanbanlock themselves.
//!
//! ## Definitions
//! *Depth*: how many holders stand around this process, one in the other: 0 without any. *Lock of depth n* of a lock file:
//! for 0 the flock; for n > 0 an OFD write lock on byte n (fcntl(2)): the *inner gates*. *Outer lock*: one of a depth less
//! than ours, on an open file description that we have inherited. The variable: one `FD:DEVICE:INODE` for each of them,
//! outermost first, separated by commas; those of different lock files may be mixed.
//!
//! ## Key operations
//! A connection of a process at depth n takes the lock of depth n, on a description of its own, while the outer locks
//! are held on the inherited ones. So all connections of one family exclude each other by the inner gate, as strangers do by
//! the flock; and the flock keeps the strangers out of the family.
//!
//! ## Invariants
//! - **The variable is only a hint where to look.** A descriptor counts if it is open on this very lock file *and* the
//!   kernel says that its open file description holds the lock of its depth: `/proc/self/fdinfo/FD` lists the locks of
//!   exactly that description. And it is inheritable, as none of kanbanlock's own descriptors is: one of those may have
//!   got the number of an inherited one that was closed. The first one that does not count ends the list. So a stale or
//!   forged variable, a descriptor that was closed, another that got its number, no `/proc`: the ordinary gate, which is
//!   then refused.
//! - What counts is duplicated at once: the lock is then held for as long as the connection lives, whatever the rest of
//!   the process closes.
//! - Asking through an outer description for the lock that it holds changes nothing (flock(2): "a process may hold only one
//!   type of lock … on a file. Subsequent flock() calls on an already locked file will convert an existing lock to the new
//!   lock mode"), and takes it again if somebody has unlocked it: `descriptor.rs` does so at each acquire.
//!
//! Uses: `sys`.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use once_cell::sync::OnceCell;

use crate::sys::{self, FileId};

/// The environment variable.
pub const VARIABLE: &str = "KANBANLOCK_HELD";

/// More holders around each other than this are not believed.
const DEEPEST: usize = 64;

/// One holder's part of the variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    fd: RawFd,
    lock_file: FileId,
}

/// The outer locks of a lock file, and why there are not more of them.
#[derive(Debug, Default)]
pub struct Outer {
    /// Outermost first, O_CLOEXEC.
    pub descriptors: Vec<OwnedFd>,
    /// What the variable says of this lock file and is not so, for the user.
    pub complaint: Option<String>,
}

/// The variable, as it was when it was asked for first: at the registration, normally. (getenv(3) must not run beside a
/// setenv(3), and a process begins with one thread.)
fn variable() -> Option<&'static str> {
    static VALUE: OnceCell<Option<OsString>> = OnceCell::new();
    VALUE.get_or_init(|| std::env::var_os(VARIABLE)).as_ref()?.to_str()
}

/// True if this process was started by a holder, or says so.
pub fn is_inside() -> bool {
    variable().is_some()
}

/// The outer locks of this lock file.
pub fn outer(lock_file: FileId) -> Outer {
    let entries = variable().map(parse).unwrap_or_default();
    let mut outer = Outer::default();
    for entry in entries.iter().filter(|entry| entry.lock_file == lock_file).take(DEEPEST) {
        let depth = outer.descriptors.len();
        match adopt(*entry, depth) {
            Ok(descriptor) => outer.descriptors.push(descriptor),
            Err(reason) => {
                outer.complaint = Some(format!("descriptor {} {reason}", entry.fd));
                break;
            }
        }
    }
    outer
}

fn adopt(entry: Entry, depth: usize) -> Result<OwnedFd, String> {
    if !sys::is_open_on(entry.fd, entry.lock_file) {
        let hint = "it was closed on the way (Python's subprocess does so, but with close_fds=False)";
        return Err(format!("is not open on it here: {hint}"));
    }
    // A copy first: what is looked at is then what is kept.
    let copy = sys::duplicate_number(entry.fd).map_err(|error| format!("cannot be duplicated: {error}"))?;
    let is_it = sys::fstat(copy.as_fd()).is_ok_and(|attributes| attributes.id == entry.lock_file);
    if is_it && sys::is_inheritable(entry.fd) && holds(copy.as_fd(), depth) {
        Ok(copy)
    } else {
        Err("does not hold the lock".to_owned())
    }
}

fn parse(text: &str) -> Vec<Entry> {
    text.split(',').map_while(parse_entry).collect()
}

fn parse_entry(text: &str) -> Option<Entry> {
    let mut fields = text.split(':');
    let mut next = || fields.next();
    let (fd, device, inode) = (next()?, next()?, next()?);
    if fields.next().is_some() {
        return None;
    }
    Some(Entry { fd: fd.parse().ok()?, lock_file: FileId::new(device.parse().ok()?, inode.parse().ok()?) })
}

/// The variable for a process that inherits one more: `fd`, open on `lock_file`.
pub fn variable_with(fd: RawFd, lock_file: FileId) -> String {
    let (device, inode) = lock_file.numbers();
    let entry = format!("{fd}:{device}:{inode}");
    match variable() {
        Some(before) if !parse(before).is_empty() => format!("{before},{entry}"),
        _ => entry,
    }
}

/// Tries the lock of that depth. `Ok(false)`: another open file description holds it.
pub fn try_lock(fd: BorrowedFd<'_>, depth: usize) -> io::Result<bool> {
    match depth {
        0 => sys::flock_exclusive_nb(fd),
        byte => sys::ofd_lock_byte_nb(fd, byte),
    }
}

/// Gives up the lock of that depth.
pub fn unlock(fd: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    match depth {
        0 => sys::flock_unlock(fd),
        byte => sys::ofd_unlock_byte(fd, byte),
    }
}

fn holds(fd: BorrowedFd<'_>, depth: usize) -> bool {
    sys::locks_of(fd).is_ok_and(|lines| lines.lines().any(|line| is_lock_of_depth(line, depth)))
}

/// True if a descriptor of this process holds the flock on this lock file, its own or an inherited one.
pub fn is_flocked_here(lock_file: FileId) -> bool {
    let descriptors = sys::open_descriptors().unwrap_or_default();
    let mut on_it = descriptors.into_iter().filter(|(_, id)| *id == lock_file);
    on_it.any(|(fd, _)| sys::duplicate_number(fd).is_ok_and(|copy| holds(copy.as_fd(), 0)))
}

/// A line of `/proc/self/fdinfo/FD`: `lock: 1: FLOCK ADVISORY WRITE 4711 fe:00:131 0 EOF`, or
/// `lock: 1: OFDLCK ADVISORY WRITE -1 fe:00:131 1 1`. proc(5)
fn is_lock_of_depth(line: &str, depth: usize) -> bool {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let ["lock:", _, kind, "ADVISORY", "WRITE", _, _, start, end] = fields[..] else { return false };
    let byte = depth.to_string();
    match depth {
        0 => (kind, start, end) == ("FLOCK", "0", "EOF"),
        _ => kind == "OFDLCK" && start == byte && end == byte,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_read_as_far_as_it_is_one() {
        let entry = |fd, device, inode| Entry { fd, lock_file: FileId::new(device, inode) };
        assert_eq!(parse("10:7:9"), [entry(10, 7, 9)]);
        assert_eq!(parse("10:7:9,11:7:8"), [entry(10, 7, 9), entry(11, 7, 8)]);
        for garbage in ["", "x", "10", "10:7", "10:7:9:1", ",10:7:9", "10:7:-9", "99999999999:7:9"] {
            assert_eq!(parse(garbage), [], "{garbage}");
        }
        assert_eq!(
            parse("10:7:9,oops,11:7:9"),
            [entry(10, 7, 9)],
            "what stands behind it is at another depth"
        );
    }

    #[test]
    fn only_the_lock_of_the_depth_counts() {
        let flock = "lock:\t1: FLOCK  ADVISORY  WRITE 26875 fe:00:10014198 0 EOF";
        let inner = "lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:10014198 1 1";
        assert!(is_lock_of_depth(flock, 0) && is_lock_of_depth(inner, 1));
        assert!(!is_lock_of_depth(flock, 1) && !is_lock_of_depth(inner, 0) && !is_lock_of_depth(inner, 2));
        assert!(!is_lock_of_depth(&flock.replace("WRITE", "READ"), 0));
        assert!(!is_lock_of_depth(&inner.replace("OFDLCK", "POSIX"), 1));
        assert!(!is_lock_of_depth("ino:\t10014198", 0));
    }
}
