//! `kill -9` at a named step: an [`Observer`] beneath kanbanlock that sends SIGKILL to its own process.
//!
//! The steps are named after what the shim does; where each one is among the calls of the real VFS:
//!
//! ```text
//! flock taken │ real lock │ writes … │ real unlock │ flock released
//!             ▲           ▲ ▲▲▲      ▲             ▲
//!      GateTaken   RealLocked  Writing  BeforeUnlock  RealUnlocked
//! ```
//!
//! A step under the gate matches only while the flock really is held, so a kill that fires has had its premise.

use std::ffi::c_int;
use std::sync::Mutex;

use rusqlite::ffi;
use serde::{Deserialize, Serialize};

use super::tap_vfs::{Call, FileKind, Method, Observer};

/// Where to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// The gate was taken, the real write lock was not yet.
    GateTaken,
    /// The real write lock was taken.
    RealLocked,
    /// Before a write, truncate or sync of the database, the journal or the WAL in a write transaction.
    Writing,
    /// Before the real write lock is given up.
    BeforeUnlock,
    /// The real write lock was given up, the gate was not yet.
    RealUnlocked,
    /// Any call from SQLITE_FCNTL_CKPT_START to SQLITE_FCNTL_CKPT_DONE.
    Checkpoint,
    /// Any call while RECOVER is being locked, held, or unlocked.
    WalRecovery,
    /// Any call from SHARED → EXCLUSIVE to the unlock: who goes that way in rollback mode has found a hot journal.
    HotJournalRollback,
}

/// Kills its process at the `nth` matching call, counted from 1.
pub struct Killer {
    step: Step,
    nth: usize,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    matches: usize,
    level: c_int,
    is_in_checkpoint: bool,
    is_in_recovery: bool,
    is_rolling_back: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    /// After it was answered with this code.
    After(c_int),
}

impl Killer {
    pub fn new(step: Step, nth: usize) -> Killer {
        Killer { step, nth, seen: Mutex::default() }
    }

    fn see(&self, call: Call<'_>, when: When) {
        let mut seen = self.seen.lock().unwrap();
        if when == When::Before {
            seen.enter(call.method);
        }
        if self.step.matches(&seen, call, when) {
            seen.matches += 1;
            if seen.matches == self.nth {
                kill_this_process();
            }
        }
        if let When::After(code) = when {
            seen.leave(call.method, code);
        }
    }
}

impl Observer for Killer {
    fn before(&self, call: Call<'_>) -> Option<c_int> {
        self.see(call, When::Before);
        None
    }

    fn after(&self, call: Call<'_>, code: c_int) {
        self.see(call, When::After(code));
    }
}

impl Seen {
    fn enter(&mut self, method: Method) {
        match method {
            Method::FileControl(ffi::SQLITE_FCNTL_CKPT_START) => self.is_in_checkpoint = true,
            Method::Lock(ffi::SQLITE_LOCK_EXCLUSIVE) if self.level == ffi::SQLITE_LOCK_SHARED => {
                self.is_rolling_back = true;
            }
            method if is_lock(method) && covers(method, RECOVER) => self.is_in_recovery = true,
            _ => {}
        }
    }

    fn leave(&mut self, method: Method, code: c_int) {
        match method {
            Method::FileControl(ffi::SQLITE_FCNTL_CKPT_DONE) => self.is_in_checkpoint = false,
            Method::Lock(level) if code == ffi::SQLITE_OK => self.level = level,
            Method::Unlock(level) if code == ffi::SQLITE_OK => {
                self.level = level;
                self.is_rolling_back = false;
            }
            method if covers(method, RECOVER) && !is_lock(method) => self.is_in_recovery = false,
            _ => {}
        }
    }
}

impl Step {
    fn matches(self, seen: &Seen, call: Call<'_>, when: When) -> bool {
        let is_before = when == When::Before;
        let is_write = matches!(call.method, Method::Write | Method::Truncate | Method::Sync);
        match self {
            Step::GateTaken => is_write_lock(call.method) && is_before && is_gated(call),
            Step::RealLocked => {
                is_write_lock(call.method) && when == When::After(ffi::SQLITE_OK) && is_gated(call)
            }
            Step::Writing => is_write && is_before && !seen.is_in_checkpoint && is_gated(call),
            Step::BeforeUnlock => is_unlock(call.method) && is_before && is_gated(call),
            Step::RealUnlocked => is_unlock(call.method) && !is_before && is_gated(call),
            Step::Checkpoint => seen.is_in_checkpoint,
            Step::WalRecovery => seen.is_in_recovery,
            Step::HotJournalRollback => seen.is_rolling_back && is_gated(call),
        }
    }
}

/// Slots of the wal-index: `WAL_WRITE_LOCK`, `WAL_RECOVER_LOCK` in wal.c.
const WRITE: c_int = 0;
const RECOVER: c_int = 2;

fn covers(method: Method, slot: c_int) -> bool {
    matches!(method, Method::ShmLock { offset, count, flags }
        if flags & ffi::SQLITE_SHM_EXCLUSIVE != 0 && (offset..offset + count).contains(&slot))
}

/// An xShmLock that locks (and not unlocks).
fn is_lock(method: Method) -> bool {
    matches!(method, Method::ShmLock { flags, .. } if flags & ffi::SQLITE_SHM_LOCK != 0)
}

fn is_write_lock(method: Method) -> bool {
    match method {
        Method::Lock(level) => level >= ffi::SQLITE_LOCK_RESERVED,
        method => is_lock(method) && covers(method, WRITE),
    }
}

fn is_unlock(method: Method) -> bool {
    matches!(method, Method::Unlock(_)) || (!is_lock(method) && covers(method, WRITE))
}

/// Is the flock of this call's database held? (By this process: nobody else is there.)
fn is_gated(call: Call<'_>) -> bool {
    let database = match call.kind {
        FileKind::Database => call.path,
        FileKind::Wal => call.path.strip_suffix("-wal").unwrap(),
        FileKind::Journal => call.path.strip_suffix("-journal").unwrap(),
        FileKind::Other => return false,
    };
    super::is_flocked(format!("{database}.lock").as_ref())
}

fn kill_this_process() -> ! {
    // SAFETY: SIGKILL to this very process, "cannot be caught, blocked, or ignored" (signal(7)).
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    unreachable!("kill(2) has returned from SIGKILL to the calling process");
}
