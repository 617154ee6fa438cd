//! The lock file, opened: made if need be, vetted, and asked whether it still is what it was.
//!
//! ## Definitions
//! *In place*: the name `<db>.lock` leads to the file that the descriptor was opened on. *Ours*: the descriptor's number is
//! still open on that file. *Inside*: this process was started by a holder of the gate, and has inherited it
//! (`inner_gates.rs`).
//!
//! ## Invariants
//! - A lock file is made with the database's mode, and owner, where we may; what is there must be a regular file.
//! - A number that other code has closed, and perhaps has got again, is neither locked nor closed.
//!
//! ## Cost
//! In place: one fstat(2) once in a tick of the kernel's clock. A file that is unlinked or renamed over loses its last link,
//! and one that is renamed away changes its ctime (ext4, xfs, btrfs and tmpfs do so). Only then is the path itself looked up.
//! Within one tick the last answer stands: the check costs a third of all that the gate costs, and a replacement is an
//! accident, to be noticed soon, while SQLite's own locks still exclude.
//!
//! Uses: `fork`, `inner_gates`, `refusal`, `sys`, `error`.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::error::rc;
use crate::fork;
use crate::inner_gates;
use crate::refusal::Failure;
use crate::sys::{self, Create, FileId, Tick};

/// How often in a row a lock file may be replaced under us before the write is refused.
pub const REPLACED_LIMIT: usize = 8;

/// An open lock file.
#[derive(Debug)]
pub struct Descriptor {
    fd: OwnedFd,
    id: FileId,
    /// Usually empty; see `inner_gates.rs`.
    outer: Vec<OwnedFd>,
    /// When it was last checked that the name leads to it; `None`: not yet.
    checked: Option<Checked>,
}

#[derive(Clone, Copy, Debug)]
struct Checked {
    at: Tick,
    /// The file's ctime then.
    changed: (libc::time_t, libc::c_long),
}

/// What [`Descriptor::open`] has opened.
#[derive(Debug)]
pub struct Opened {
    pub descriptor: Descriptor,
    /// What is wrong with the gate that this process is said to have inherited.
    pub complaint: Option<String>,
}

impl Descriptor {
    /// Opens the lock file at `path`, or makes it for `database`.
    ///
    /// # Errors
    ///
    /// Why it cannot be used.
    pub fn open(path: &CStr, database: &CStr) -> Result<Opened, Failure> {
        for _ in 0..REPLACED_LIMIT {
            match sys::open(path, Create::No) {
                Ok(fd) => return Descriptor::vet(path, fd),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::of_open(path, &error)),
            }
            match create(path, database) {
                Ok(fd) => return Descriptor::vet(path, fd),
                // Another process was first: open what it has made.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Failure::of_create(path, &error)),
            }
        }
        Err(Failure::new(path, rc::CANTOPEN, "keeps appearing and disappearing; find out what removes it"))
    }

    /// What was opened, if it is a lock file.
    fn vet(path: &CStr, fd: OwnedFd) -> Result<Opened, Failure> {
        let attributes =
            sys::fstat(fd.as_fd()).map_err(|error| Failure::cannot_be(path, "examined", &error))?;
        if !attributes.is_regular() {
            return Err(Failure::not_regular(path, &attributes));
        }
        let inner_gates::Outer { descriptors: outer, complaint } = inner_gates::outer(attributes.id);
        for fd in outer.iter().chain([&fd]) {
            fork::close_in_child(fd.as_raw_fd());
        }
        let descriptor = Descriptor { fd, id: attributes.id, outer, checked: None };
        Ok(Opened { descriptor, complaint })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The file that it was opened on.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// True if the gate is an inner one.
    #[inline]
    pub fn is_inside(&self) -> bool {
        !self.outer.is_empty()
    }

    /// `Ok(false)`: refused.
    #[inline]
    pub fn try_lock(&self) -> io::Result<bool> {
        if self.is_inside() { self.try_lock_inside() } else { sys::flock_exclusive_nb(self.fd.as_fd()) }
    }

    #[inline(never)]
    fn try_lock_inside(&self) -> io::Result<bool> {
        for (depth, outer) in self.outer.iter().enumerate() {
            if !inner_gates::try_lock(outer.as_fd(), depth)? {
                return Ok(false);
            }
        }
        inner_gates::try_lock(self.fd.as_fd(), self.outer.len())
    }

    pub fn unlock(&self) -> io::Result<()> {
        inner_gates::unlock(self.fd.as_fd(), self.outer.len())
    }

    /// True if it was seen in this tick that it is in place.
    #[inline]
    pub fn is_checked(&self, now: Tick) -> bool {
        self.checked.is_some_and(|checked| checked.at == now)
    }

    /// It is to be checked again whatever the tick.
    pub fn distrust(&mut self) {
        self.checked = None;
    }

    /// True if the name `path` leads to it.
    #[inline(never)]
    pub fn check_in_place(&mut self, path: &CStr, now: Tick) -> io::Result<bool> {
        let attributes = sys::fstat(self.fd.as_fd())?;
        if attributes.links == 0 {
            return Ok(false);
        }
        let is_unchanged = self.checked.is_some_and(|checked| checked.changed == attributes.changed);
        let is_in_place = is_unchanged
            || match sys::lstat(path) {
                Ok(there) => there.id == self.id,
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                Err(error) => return Err(error),
            };
        self.checked = is_in_place.then_some(Checked { at: now, changed: attributes.changed });
        Ok(is_in_place)
    }

    /// False if other code has closed a descriptor of ours: the number is not open, or open on another file.
    #[inline(never)]
    pub fn is_ours(&self) -> bool {
        !self.outer.iter().chain([&self.fd]).any(|fd| sys::is_lost(fd, self.id))
    }

    /// Closes what is ours of it. A number that other code has closed may be the application's now.
    pub fn close(self) {
        for fd in self.outer.into_iter().chain([self.fd]) {
            fork::forget(fd.as_raw_fd());
            if sys::is_lost(&fd, self.id) {
                std::mem::forget(fd);
            }
        }
    }
}

/// A new lock file takes the database's mode, and its owner where we may: who can write the database can
/// then lock it. os_unix treats its journals the same way (`findCreateFileMode`, `robustFchown`).
fn create(path: &CStr, database: &CStr) -> io::Result<OwnedFd> {
    let database = sys::stat(database)?;
    let mode = database.mode & 0o777;
    let fd = sys::open(path, Create::New(mode))?;
    let created = sys::fstat(fd.as_fd())?;
    if created.mode & 0o777 != mode {
        // The umask took bits away. Not ours to insist: a file system without modes refuses this.
        let _ = sys::fchmod(fd.as_fd(), mode);
    }
    if (created.uid, created.gid) != (database.uid, database.gid) {
        // The owner for root alone, which is the case that matters: "if a root process opens a database
        // file, it can leave behind a journal … inaccessible to unprivileged processes" (os_unix.c). The group for its
        // members, too: else a colleague could not open what this process has made.
        let _ = sys::fchown(fd.as_fd(), database.uid, database.gid);
    }
    Ok(fd)
}
