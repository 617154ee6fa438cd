//! "No allocation per lock call": a global allocator that counts, around whole transactions' worth of lock calls through
//! the C interface. One test, a binary of its own: the allocator is the whole process's. It counts each thread apart, since
//! libtest's main thread allocates when it likes.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use rusqlite::ffi;
use support::TestDb;
use support::raw_file::{LOCK_EXCLUSIVE, LOCK_SHARED, RawFile, UNLOCK_EXCLUSIVE, UNLOCK_SHARED};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is System's; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller says.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// How often `work` allocates in five rounds, each in a tick of its own: what is done once a tick is done in each.
fn allocations(mut work: impl FnMut()) -> u64 {
    let mut count = || {
        support::await_tick();
        let before = ALLOCATIONS.get();
        work();
        ALLOCATIONS.get() - before
    };
    (0..5).map(|_| count()).sum()
}

#[test]
fn lock_calls_do_not_allocate() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let mut file = RawFile::main_db("kanbanlock", &db);
    let rollback_mode = |file: &mut RawFile| {
        for level in [ffi::SQLITE_LOCK_SHARED, ffi::SQLITE_LOCK_RESERVED, ffi::SQLITE_LOCK_EXCLUSIVE] {
            assert_eq!(file.lock(level), ffi::SQLITE_OK);
        }
        assert_eq!(file.unlock(ffi::SQLITE_LOCK_SHARED), ffi::SQLITE_OK);
        assert_eq!(file.unlock(ffi::SQLITE_LOCK_NONE), ffi::SQLITE_OK);
    };
    rollback_mode(&mut file); // opens the lock file, makes the first lock call of a descriptor
    assert_eq!(allocations(|| rollback_mode(&mut file)), 0);

    assert_eq!(file.lock(ffi::SQLITE_LOCK_SHARED), ffi::SQLITE_OK);
    file.map_shm();
    let wal_mode = |file: &mut RawFile| {
        assert_eq!(file.shm_lock(3, 1, LOCK_SHARED), ffi::SQLITE_OK);
        assert_eq!(file.shm_lock(0, 1, LOCK_EXCLUSIVE), ffi::SQLITE_OK);
        assert_eq!(file.shm_lock(4, 4, LOCK_EXCLUSIVE), ffi::SQLITE_OK); // with the reset guard
        assert_eq!(file.shm_lock(4, 4, UNLOCK_EXCLUSIVE), ffi::SQLITE_OK);
        assert_eq!(file.shm_lock(0, 1, UNLOCK_EXCLUSIVE), ffi::SQLITE_OK);
        assert_eq!(file.shm_lock(3, 1, UNLOCK_SHARED), ffi::SQLITE_OK);
    };
    assert_eq!(allocations(|| wal_mode(&mut file)), 0);
    assert!(kanbanlock::stats().acquired >= 11, "else this shows nothing");
    assert_ne!(allocations(|| drop(vec![1])), 0, "and counting works");
    file.close();
}
