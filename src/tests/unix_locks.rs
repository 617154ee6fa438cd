//! A model of the locks of os_unix.c: what the connections to one database file, each in its own process, hold.
//!
//! ```text
//! xLock, xUnlock     PENDING byte, RESERVED byte, SHARED range      (os_unix.c, the comment in unixLock)
//! xShmLock           8 slots, each read-locked by many or write-locked by one
//! ```
//!
//! A [`Locks`] is a plain value and every call is one atomic step on a slice of them, so that `model.rs` can
//! put them into a set of states, and `simulation.rs` behind a `RealLocks`.
//!
//! Out-of-protocol calls, for which os_unix has `assert()`, answer [`MISUSE`] and change nothing.
//!
//! **Not modelled:** what lies between the system calls of one xLock (PENDING won, EXCLUSIVE not yet asked for;
//! SHARED's passing read lock on PENDING); several connections in one process; the dead man's switch (DMS)
//! byte; F_SETLK failing for want of memory (`simulation.rs` injects errors itself).

use std::ffi::c_int;

use crate::error::rc;
use crate::lock::LockLevel;

/// SQLITE_MISUSE
pub const MISUSE: c_int = 21;

/// The bit of `WAL_WRITE_LOCK`.
pub const WRITE: u8 = 1;
/// The bit of `WAL_CKPT_LOCK`.
pub const CKPT: u8 = 1 << 1;
/// The bits of `WAL_READ_LOCK(0)` … `WAL_READ_LOCK(4)`.
pub const READS: u8 = 0b1111_1000;
/// The bits of `WAL_READ_LOCK(1)` … `WAL_READ_LOCK(4)`.
pub const READS_1_TO_4: u8 = 0b1111_0000;

/// `SQLITE_SHM_LOCK | SQLITE_SHM_SHARED`
pub const LOCK_SHARED: c_int = 2 | 4;
/// `SQLITE_SHM_LOCK | SQLITE_SHM_EXCLUSIVE`
pub const LOCK_EXCLUSIVE: c_int = 2 | 8;
/// `SQLITE_SHM_UNLOCK | SQLITE_SHM_SHARED`
pub const UNLOCK_SHARED: c_int = 1 | 4;
/// `SQLITE_SHM_UNLOCK | SQLITE_SHM_EXCLUSIVE`
pub const UNLOCK_EXCLUSIVE: c_int = 1 | 8;

/// Which os_unix: they differ in what a refused SHARED → EXCLUSIVE (a hot journal) leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OsUnix {
    /// Recent versions (the bundled 3.51 is one) ask for PENDING only from RESERVED: SHARED is left.
    Recent,
    /// Older versions ask for PENDING on every way to EXCLUSIVE, and keep it when that is refused.
    Older,
}

/// What one open database file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locks {
    /// `eFileLock`; above NONE the SHARED range is read-locked, at EXCLUSIVE write-locked.
    pub level: LockLevel,
    /// The RESERVED byte is write-locked.
    pub reserved: bool,
    /// The PENDING byte is write-locked.
    pending: bool,
    /// `exclMask`
    pub excl: u8,
    /// `sharedMask`
    pub shared: u8,
}

impl Locks {
    /// True if this file holds nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Locks::default()
    }
}

/// `xLock` by file `me` of `files`.
pub fn x_lock(files: &mut [Locks], me: usize, to: LockLevel, os_unix: OsUnix) -> c_int {
    use LockLevel::{Exclusive, None, Pending, Reserved, Shared};
    let before = files[me].level;
    match (before, to) {
        _ if before >= to => rc::OK,
        (None, Shared) => {
            if any_other(files, me, |other| other.pending || other.level == Exclusive) {
                return rc::BUSY;
            }
            files[me].level = Shared;
            rc::OK
        }
        (Shared, Reserved) => {
            if any_other(files, me, |other| other.reserved) {
                return rc::BUSY;
            }
            files[me].reserved = true;
            files[me].level = Reserved;
            rc::OK
        }
        (Shared | Reserved | Pending, Exclusive) => {
            if before == Reserved || (before == Shared && os_unix == OsUnix::Older) {
                if any_other(files, me, |other| other.pending) {
                    return rc::BUSY;
                }
                files[me].pending = true;
                files[me].level = Pending;
            }
            if any_other(files, me, |other| other.level > None) {
                return rc::BUSY;
            }
            files[me].level = Exclusive;
            rc::OK
        }
        _ => MISUSE,
    }
}

/// `xUnlock` by `file`.
pub fn x_unlock(file: &mut Locks, to: LockLevel) -> c_int {
    if to > LockLevel::Shared {
        return MISUSE;
    }
    if file.level > to {
        *file = Locks { level: to, reserved: false, pending: false, ..*file };
    }
    rc::OK
}

/// `xShmLock` by file `me` of `files`.
pub fn x_shm_lock(files: &mut [Locks], me: usize, offset: c_int, count: c_int, flags: c_int) -> c_int {
    let Some(mask) = mask(offset, count) else { return MISUSE };
    match flags {
        LOCK_SHARED if files[me].shared & mask == mask => rc::OK,
        LOCK_SHARED => {
            let is_excluded = |file: &Locks| file.excl & mask != 0;
            if is_excluded(&files[me]) || any_other(files, me, is_excluded) {
                return rc::BUSY;
            }
            files[me].shared |= mask;
            rc::OK
        }
        LOCK_EXCLUSIVE => {
            let is_held = |file: &Locks| (file.excl | file.shared) & mask != 0;
            if is_held(&files[me]) || any_other(files, me, is_held) {
                return rc::BUSY;
            }
            files[me].excl |= mask;
            rc::OK
        }
        UNLOCK_SHARED | UNLOCK_EXCLUSIVE => {
            files[me].excl &= !mask;
            files[me].shared &= !mask;
            rc::OK
        }
        _ => MISUSE,
    }
}

/// `xShmUnmap` by `file`.
pub fn x_shm_unmap(file: &mut Locks) {
    file.excl = 0;
    file.shared = 0;
}

/// The bits of the slots `offset … offset+count-1`: the `mask` of unixShmLock.
pub fn mask(offset: c_int, count: c_int) -> Option<u8> {
    let is_range = (0..8).contains(&offset) && (1..=8 - offset).contains(&count);
    is_range.then(|| u8::try_from((1_u16 << (offset + count)) - (1_u16 << offset)).expect("8 slots"))
}

fn any_other(files: &[Locks], me: usize, holds: impl Fn(&Locks) -> bool) -> bool {
    files.iter().enumerate().any(|(index, file)| index != me && holds(file))
}

/// The compatibility matrix of <https://www.sqlite.org/lockingv3.html#locking>, asked of the model.
#[test]
fn the_model_locks_as_the_manual_says() {
    use LockLevel::{Exclusive, None, Pending, Reserved, Shared};
    // What a second connection is answered, one row for each level of the first.
    for (first, shared, reserved, exclusive) in [
        (None, rc::OK, rc::OK, rc::OK),
        (Shared, rc::OK, rc::OK, rc::BUSY),
        (Reserved, rc::OK, rc::BUSY, rc::BUSY),
        // "No new SHARED locks are permitted against the database if a PENDING lock is active".
        (Pending, rc::BUSY, rc::BUSY, rc::BUSY),
        (Exclusive, rc::BUSY, rc::BUSY, rc::BUSY),
    ] {
        for os_unix in [OsUnix::Recent, OsUnix::Older] {
            let files = [holding(first), Locks::default()];
            let mut lock = files;
            assert_eq!(x_lock(&mut lock, 1, Shared, os_unix), shared, "SHARED beside {first:?}");
            let mut lock = [files[0], holding(Shared)];
            assert_eq!(x_lock(&mut lock, 1, Reserved, os_unix), reserved, "RESERVED beside {first:?}");
            let mut lock = [files[0], holding(Shared)];
            assert_eq!(x_lock(&mut lock, 1, Exclusive, os_unix), exclusive, "EXCLUSIVE beside {first:?}");
            let left = if exclusive == rc::OK {
                Exclusive
            } else if os_unix == OsUnix::Recent || files[0].pending {
                Shared
            } else {
                Pending
            };
            assert_eq!(lock[1].level, left, "{os_unix:?} beside {first:?}");
        }
    }
    let mut lock = [holding(Shared), holding(Reserved)];
    assert_eq!(x_lock(&mut lock, 1, Exclusive, OsUnix::Recent), rc::BUSY);
    assert_eq!(lock[1], holding(Pending), "a refused EXCLUSIVE leaves PENDING");
    assert_eq!(x_lock(&mut lock, 0, Pending, OsUnix::Recent), MISUSE);
    assert_eq!(x_unlock(&mut lock[1], Shared), rc::OK);
    assert_eq!(lock[1], holding(Shared));
}

#[test]
fn the_model_has_slots_as_unix_shm_lock() {
    for (first, second, answer) in [
        (LOCK_SHARED, LOCK_SHARED, rc::OK),
        (LOCK_SHARED, LOCK_EXCLUSIVE, rc::BUSY),
        (LOCK_EXCLUSIVE, LOCK_SHARED, rc::BUSY),
        (LOCK_EXCLUSIVE, LOCK_EXCLUSIVE, rc::BUSY),
    ] {
        let mut files = [Locks::default(); 2];
        assert_eq!(x_shm_lock(&mut files, 0, 4, 1, first), rc::OK);
        assert_eq!(x_shm_lock(&mut files, 1, 4, 1, second), answer, "{first} then {second}");
        assert_eq!(x_shm_lock(&mut files, 1, 3, 1, second), rc::OK, "another slot");
        assert_eq!(x_shm_lock(&mut files, 0, 4, 1, UNLOCK_EXCLUSIVE), rc::OK);
        assert_eq!(
            x_shm_lock(&mut files, 1, 4, 4, LOCK_EXCLUSIVE),
            if answer == rc::OK { rc::BUSY } else { rc::OK }
        );
        x_shm_unmap(&mut files[1]);
        assert!(files[1].is_empty());
    }
    for (offset, count) in [(-1, 1), (0, 0), (8, 1), (4, 5), (c_int::MAX, c_int::MAX)] {
        assert_eq!(mask(offset, count), None, "({offset},{count})");
    }
    assert_eq!(mask(3, 5), Some(READS));
    assert_eq!(mask(4, 4), Some(READS_1_TO_4));
}

/// A file at `level`, reached as SQLite reaches it by a write.
fn holding(level: LockLevel) -> Locks {
    Locks {
        level,
        reserved: level >= LockLevel::Reserved,
        pending: level >= LockLevel::Pending,
        ..Locks::default()
    }
}
