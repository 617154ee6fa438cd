//! The reset guard (rows G1–G4): no writer restarts the WAL while a checkpoint is under way.
//!
//! The race: a checkpointer has read the wal-index header; a writer restarts the WAL; the checkpointer then marks
//! frames as copied that are new. A checkpointer holds the CKPT slot all that time, so the guard makes a writer win
//! CKPT before it restarts. Here a file of the *plain unix VFS* plays the checkpointer, stopped inside that window:
//! a stock writer restarts the WAL under its nose, a shimmed one appends.

mod support;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use rusqlite::{Connection, ffi};
use support::raw_file::{LOCK_EXCLUSIVE, RawFile, UNLOCK_EXCLUSIVE};
use support::{TestDb, set_journal_mode};

const CKPT: std::ffi::c_int = 1;

/// The two salts of the WAL header: they change when the WAL is restarted.
/// <https://www.sqlite.org/fileformat2.html#walformat>
fn salts(db: &TestDb) -> [u8; 8] {
    let mut wal = File::open(db.beside("-wal")).unwrap();
    wal.seek(SeekFrom::Start(16)).unwrap();
    let mut salts = [0; 8];
    wal.read_exact(&mut salts).unwrap();
    salts
}

/// A WAL that is copied in full: the next write restarts it.
fn fully_checkpointed(db: &TestDb, vfs: &str) -> Connection {
    let connection = db.open(vfs);
    set_journal_mode(&connection, "wal");
    connection.execute_batch("CREATE TABLE t (x); INSERT INTO t VALUES ('before')").unwrap();
    let frames: (i64, i64) = connection
        .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| Ok((row.get(1)?, row.get(2)?)))
        .unwrap();
    assert_eq!(frames.0, frames.1, "everything is copied");
    connection
}

/// Does a write restart the WAL while a checkpointer is under way? And right after it?
fn restarts_during_and_after_a_checkpoint(vfs: &str) -> (bool, bool) {
    let db = TestDb::new();
    let connection = fully_checkpointed(&db, vfs);
    let mut checkpointer = RawFile::main_db("unix", &db);
    checkpointer.map_shm();
    assert_eq!(checkpointer.shm_lock(CKPT, 1, LOCK_EXCLUSIVE), ffi::SQLITE_OK);

    let before = salts(&db);
    connection.execute_batch("INSERT INTO t VALUES ('during')").unwrap();
    let restarted_during = salts(&db) != before;

    assert_eq!(checkpointer.shm_lock(CKPT, 1, UNLOCK_EXCLUSIVE), ffi::SQLITE_OK);
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).unwrap();
    let before = salts(&db);
    connection.execute_batch("INSERT INTO t VALUES ('after')").unwrap();
    let restarted_after = salts(&db) != before;

    // CKPT has been given back: others can checkpoint.
    assert_eq!(checkpointer.shm_lock(CKPT, 1, LOCK_EXCLUSIVE), ffi::SQLITE_OK);
    assert_eq!(checkpointer.shm_lock(CKPT, 1, UNLOCK_EXCLUSIVE), ffi::SQLITE_OK);
    checkpointer.close();
    let rows: i64 = connection.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 3);
    (restarted_during, restarted_after)
}

#[test]
fn a_stock_writer_restarts_the_wal_under_a_checkpointer() {
    assert_eq!(restarts_during_and_after_a_checkpoint("unix"), (true, true));
}

#[test]
fn a_shimmed_writer_appends_instead_and_restarts_later() {
    kanbanlock::register().unwrap();
    let before = kanbanlock::stats().resets_deferred;
    assert_eq!(restarts_during_and_after_a_checkpoint("kanbanlock"), (false, true));
    assert_eq!(kanbanlock::stats().resets_deferred, before + 1);
}
