//! Lock levels and wal-index lock slots, as plain values.
//!
//! SQLite knows two families of locks on one database file:
//!
//! ```text
//! rollback mode   xLock / xUnlock      NONE < SHARED < RESERVED < PENDING < EXCLUSIVE   LockLevel
//! WAL mode        xShmLock             WRITE=0 CKPT=1 RECOVER=2 READ(0)…READ(4)=3…7     ShmSlots
//! ```
//!
//! <https://www.sqlite.org/lockingv3.html#locking> and
//! <https://www.sqlite.org/walformat.html#wal_locks> define them. This file gives each a type whose
//! invalid values do not exist, and converts from the raw integers of the C interface; a raw value
//! outside the protocol converts to `None` and is row X1 of the transition table (`state.rs`).
//!
//! Uses: nothing.

use std::ffi::c_int;
use std::ops::{BitAnd, BitOr};

/// A lock level of rollback mode; the order is SQLite's (`SQLITE_LOCK_NONE` … `SQLITE_LOCK_EXCLUSIVE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LockLevel {
    /// No lock: "the database may be neither read nor written".
    #[default]
    None = 0,
    /// "The database may be read but not written. Any number of processes can hold SHARED locks".
    Shared = 1,
    /// "The process is planning on writing to the database file at some point in the future".
    Reserved = 2,
    /// "Waiting on all current SHARED locks to clear so that it can get an EXCLUSIVE lock".
    /// SQLite does not ask for it by name: os_unix may stay here after a refused EXCLUSIVE.
    Pending = 3,
    /// "An EXCLUSIVE lock is needed in order to write to the database file."
    Exclusive = 4,
}

impl LockLevel {
    /// The level behind a raw argument of `xLock`/`xUnlock`; `None` for any other integer.
    #[inline]
    pub fn from_raw(raw: c_int) -> Option<LockLevel> {
        match raw {
            0 => Some(LockLevel::None),
            1 => Some(LockLevel::Shared),
            2 => Some(LockLevel::Reserved),
            3 => Some(LockLevel::Pending),
            4 => Some(LockLevel::Exclusive),
            _ => None,
        }
    }

    /// SQLite's name for it.
    pub fn name(self) -> &'static str {
        match self {
            LockLevel::None => "NONE",
            LockLevel::Shared => "SHARED",
            LockLevel::Reserved => "RESERVED",
            LockLevel::Pending => "PENDING",
            LockLevel::Exclusive => "EXCLUSIVE",
        }
    }
}

/// A set of wal-index lock slots: one bit for each of the 8 slots (`SQLITE_SHM_NLOCK`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ShmSlots(u8);

impl ShmSlots {
    /// `SQLITE_SHM_NLOCK`: "The xShmLock method on sqlite3_io_methods may use values between 0 and
    /// this upper bound as its \"offset\" argument." <https://www.sqlite.org/c3ref/c_shm_nlock.html>
    const COUNT: c_int = 8;

    /// No slot.
    pub const EMPTY: ShmSlots = ShmSlots(0);
    /// `WAL_WRITE_LOCK`: appending to the WAL, or rebuilding the wal-index.
    pub const WRITE: ShmSlots = ShmSlots(1 << 0);
    /// `WAL_CKPT_LOCK`: copying frames from the WAL into the database.
    pub const CKPT: ShmSlots = ShmSlots(1 << 1);
    // Slot 2, `WAL_RECOVER_LOCK` (rebuilding the wal-index), needs no name here: row S5 is for any slot.
    /// `WAL_READ_LOCK(0)` … `WAL_READ_LOCK(4)`: a read transaction holds one of them, shared.
    pub const READS: ShmSlots = ShmSlots(0b1111_1000);
    /// `WAL_READ_LOCK(1)` … `WAL_READ_LOCK(4)`: taken at once, exclusively, to restart the WAL.
    pub const READS_1_TO_4: ShmSlots = ShmSlots(0b1111_0000);

    /// The slots `offset … offset+count-1`; `None` if the range is empty or leaves the 8 slots.
    #[inline]
    pub fn from_range(offset: c_int, count: c_int) -> Option<ShmSlots> {
        let end = offset.checked_add(count)?;
        if offset < 0 || count < 1 || end > Self::COUNT {
            return None;
        }
        // end <= 8, so the difference of the two powers is a byte: the bits offset … end-1.
        u8::try_from((1 << end) - (1 << offset)).ok().map(ShmSlots)
    }

    /// True if the set has no slot.
    pub fn is_empty(self) -> bool {
        self == Self::EMPTY
    }

    /// True if the two sets share a slot.
    pub fn intersects(self, other: ShmSlots) -> bool {
        !(self & other).is_empty()
    }

    /// True if every slot of `other` is in this set.
    pub fn contains(self, other: ShmSlots) -> bool {
        self & other == other
    }

    /// This set without the slots of `other`.
    #[must_use]
    pub fn without(self, other: ShmSlots) -> ShmSlots {
        ShmSlots(self.0 & !other.0)
    }
}

impl BitOr for ShmSlots {
    type Output = ShmSlots;
    fn bitor(self, other: ShmSlots) -> ShmSlots {
        ShmSlots(self.0 | other.0)
    }
}

impl BitAnd for ShmSlots {
    type Output = ShmSlots;
    fn bitand(self, other: ShmSlots) -> ShmSlots {
        ShmSlots(self.0 & other.0)
    }
}

/// What one call of `xShmLock` asks for. <https://www.sqlite.org/c3ref/io_methods.html>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShmRequest {
    /// `SQLITE_SHM_LOCK | SQLITE_SHM_SHARED`
    LockShared(ShmSlots),
    /// `SQLITE_SHM_LOCK | SQLITE_SHM_EXCLUSIVE`
    LockExclusive(ShmSlots),
    /// `SQLITE_SHM_UNLOCK | SQLITE_SHM_SHARED` or `… | SQLITE_SHM_EXCLUSIVE`
    Unlock(ShmSlots),
}

impl ShmRequest {
    const UNLOCK: c_int = 1;
    const LOCK: c_int = 2;
    const SHARED: c_int = 4;
    const EXCLUSIVE: c_int = 8;

    /// The request behind raw `xShmLock` arguments; `None` if SQLite's protocol has no such call.
    #[inline]
    pub fn from_raw(offset: c_int, count: c_int, flags: c_int) -> Option<ShmRequest> {
        const LOCK_SHARED: c_int = ShmRequest::LOCK | ShmRequest::SHARED;
        const LOCK_EXCLUSIVE: c_int = ShmRequest::LOCK | ShmRequest::EXCLUSIVE;
        const UNLOCK_SHARED: c_int = ShmRequest::UNLOCK | ShmRequest::SHARED;
        const UNLOCK_EXCLUSIVE: c_int = ShmRequest::UNLOCK | ShmRequest::EXCLUSIVE;
        let slots = ShmSlots::from_range(offset, count)?;
        match flags {
            LOCK_SHARED => Some(ShmRequest::LockShared(slots)),
            LOCK_EXCLUSIVE => Some(ShmRequest::LockExclusive(slots)),
            UNLOCK_SHARED | UNLOCK_EXCLUSIVE => Some(ShmRequest::Unlock(slots)),
            _ => None,
        }
    }
}

/// The calls of `sqlite3_io_methods` that change locks, with their raw arguments and result codes.
///
/// `real.rs` implements it on a file of the real VFS; the simulation (`src/tests/simulation.rs`) on a model of one.
pub trait RealLocks {
    /// `xLock`
    fn x_lock(&self, level: c_int) -> c_int;
    /// `xUnlock`
    fn x_unlock(&self, level: c_int) -> c_int;
    /// `xShmLock`
    fn x_shm_lock(&self, offset: c_int, count: c_int, flags: c_int) -> c_int;
    /// `xShmUnmap`
    fn x_shm_unmap(&self, delete: c_int) -> c_int;
    /// The level that the real file holds, if it can tell: `SQLITE_FCNTL_LOCKSTATE`.
    fn lock_state(&self) -> Option<LockLevel>;

    /// `xShmLock` of the CKPT slot, exclusively: the reset guard's.
    fn lock_ckpt(&self) -> c_int {
        self.x_shm_lock(1, 1, ShmRequest::LOCK | ShmRequest::EXCLUSIVE)
    }

    /// Gives back what [`RealLocks::lock_ckpt`] won.
    fn unlock_ckpt(&self) -> c_int {
        self.x_shm_lock(1, 1, ShmRequest::UNLOCK | ShmRequest::EXCLUSIVE)
    }
}

/// For which lock the gate was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To write, or to checkpoint.
    Write,
    /// EXCLUSIVE: in WAL mode, to delete the WAL.
    Exclusive,
}

/// What the driver asks about the files beside the database.
///
/// `file.rs` implements it on an open file; the simulation on its weather.
pub trait Environment {
    /// Row L7w: is there a `<db>-shm`?
    fn shm_exists(&self) -> bool;
    /// Row L12: does another process, or another copy of SQLite, use the `-shm` that this file has mapped?
    fn others_use_shm(&self) -> bool;
    /// Row M1: is every file in its place? Asked when the gate was acquired.
    ///
    /// # Errors
    ///
    /// The result code to answer, already logged.
    fn check_places(&self, purpose: Purpose) -> Result<(), c_int>;
    /// How many transactions the wal-index has seen, modulo 2^32; 0 without one.
    fn wal_changes(&self) -> u32;
    /// The size of the WAL up to its last committed frame, in bytes; 0 without one.
    fn wal_size(&self) -> u64;
    /// The gate was refused: what was known of the files' places is not known any more.
    fn invalidate_place_check(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_masks() {
        assert_eq!(ShmSlots::from_range(0, 1), Some(ShmSlots::WRITE));
        let recover = ShmSlots(1 << 2);
        assert_eq!(ShmSlots::from_range(1, 2), Some(ShmSlots::CKPT | recover));
        assert_eq!(ShmSlots::from_range(4, 4), Some(ShmSlots::READS_1_TO_4));
        assert_eq!(ShmSlots::from_range(3, 5), Some(ShmSlots::READS));
        for (offset, count) in [(-1, 1), (0, 0), (0, -1), (8, 1), (4, 5), (c_int::MAX, 1), (1, c_int::MAX)] {
            assert_eq!(ShmSlots::from_range(offset, count), None, "({offset},{count})");
        }
    }

    #[test]
    fn raw_levels_round_trip_and_strangers_are_refused() {
        for raw in 0..=4 {
            assert_eq!(LockLevel::from_raw(raw).map(|level| level as c_int), Some(raw));
        }
        assert_eq!(LockLevel::from_raw(-1), None);
        assert_eq!(LockLevel::from_raw(5), None);
    }
}
