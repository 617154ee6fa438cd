//! The entry point `sqlite3_kanbanlockdefault_init`. One test, a process of its own: the default VFS is the whole process's.

mod support;

use rusqlite::Connection;
use support::{TestDb, holds_the_flock, library};

fn load(entry_point: Option<&str>) {
    let boot = Connection::open_in_memory().unwrap();
    // SAFETY: nothing untrusted runs on this connection while loading is enabled.
    unsafe { boot.load_extension_enable() }.unwrap();
    // SAFETY: our own library.
    unsafe { boot.load_extension(library(), entry_point) }.unwrap();
}

#[test]
fn plain_paths_go_through_kanbanlock_once_it_is_the_default() {
    let db = TestDb::new();
    let by_plain_path = || holds_the_flock(&Connection::open(db.path()).unwrap(), &db);
    let by_uri = || holds_the_flock(&Connection::open(db.uri()).unwrap(), &db);

    assert!(!by_plain_path(), "not loaded");
    assert!(Connection::open(db.uri()).unwrap_err().to_string().contains("no such vfs: kanbanlock"));
    load(None);
    assert!(!by_plain_path(), "registered only");
    assert!(by_uri());
    load(Some("sqlite3_kanbanlockdefault_init"));
    assert!(by_plain_path());
    assert!(by_uri());
    // Loading it again without that, as a library that opens by URI may do, does not take it back.
    load(None);
    assert!(by_plain_path());
}
