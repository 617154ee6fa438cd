//! `make_default`: connections opened by plain path go through kanbanlock too. One test, a process of its own:
//! the default VFS is the whole process's.

mod support;

use kanbanlock::Options;
use rusqlite::{Connection, ffi};
use support::{TestDb, is_flocked};

fn holds_the_flock_in_a_transaction(connection: &Connection, db: &TestDb) -> bool {
    connection.execute_batch("CREATE TABLE IF NOT EXISTS t (x); BEGIN IMMEDIATE").unwrap();
    let held = is_flocked(&db.lock_file());
    connection.execute_batch("COMMIT").unwrap();
    held
}

#[test]
fn a_plain_path_goes_through_the_default_vfs() {
    let db = TestDb::new();
    let before = Connection::open(db.path()).unwrap();
    assert!(!holds_the_flock_in_a_transaction(&before, &db), "not yet registered");

    // A VFS that is registered already becomes the default when a later registration asks for it.
    Options::new().register().unwrap();
    assert!(!holds_the_flock_in_a_transaction(&Connection::open(db.path()).unwrap(), &db));
    let options = Options::new().make_default(true);
    options.register().unwrap();
    let plain = Connection::open(db.path()).unwrap();
    assert!(holds_the_flock_in_a_transaction(&plain, &db));
    assert!(!holds_the_flock_in_a_transaction(&before, &db), "opened before: still on the old default");
    let by_name = db.open("unix");
    assert!(!holds_the_flock_in_a_transaction(&by_name, &db), "another VFS can still be asked for");

    // Registering again without make_default does not take it back.
    Options::new().register().unwrap();
    assert!(holds_the_flock_in_a_transaction(&Connection::open(db.path()).unwrap(), &db));

    // A second registration wraps what the first one wraps, not the first one: else each write would wait for
    // its own flock.
    Options::new().name("second").register().unwrap();
    assert!(holds_the_flock_in_a_transaction(&db.open("second"), &db));
    drop((before, plain, by_name));

    // "After sqlite3_shutdown + initialize, unix is the default again": registering again repairs that.
    // SAFETY: no connection is open, and no other thread uses SQLite.
    unsafe { ffi::sqlite3_shutdown() };
    // SAFETY: ditto.
    unsafe { ffi::sqlite3_initialize() };
    assert!(!holds_the_flock_in_a_transaction(&Connection::open(db.path()).unwrap(), &db));
    options.register().unwrap();
    assert!(holds_the_flock_in_a_transaction(&Connection::open(db.path()).unwrap(), &db));
}
