//! Registration: idempotent, per copy of SQLite, and with errors that say what to do; URI options.

mod support;

use std::ffi::{c_char, c_int};
use std::fs::File;

use kanbanlock::ffi as kanbanlock_ffi;
use kanbanlock::{CheckpointPolicy, Fallback, HostApi, Options, RegisterError, register_with};
use rusqlite::{Connection, ffi};
use support::{TestDb, code, in_own_process, in_own_processes, log, unique};

#[test]
fn registering_again_changes_nothing() {
    log::install();
    kanbanlock::register().unwrap();
    let vfs = find("kanbanlock");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| kanbanlock::register().unwrap());
        }
    });
    assert_eq!(find("kanbanlock"), vfs);
    Options::new().register().unwrap();
    assert_eq!(find("kanbanlock"), vfs);
}

/// Threads that are the first to register, all at once, and go on at once: each finds everything installed. (The hooks
/// came after the VFS once: another thread's `register()` had returned by then, and its locks were POSIX locks.)
#[test]
fn threads_that_register_at_once_find_everything_installed() {
    const THREADS: usize = 4;
    in_own_processes(20, "threads_that_register_at_once_find_everything_installed", || {
        log::install();
        // What the installation looks at: it takes longer so.
        let _descriptors: Vec<_> = (0..100).map(|_| File::open("/dev/null").unwrap()).collect();
        let db = TestDb::new();
        let setup = db.open("unix");
        support::set_journal_mode(&setup, "wal");
        setup.execute_batch("CREATE TABLE t (x)").unwrap();
        setup.close().unwrap();
        let barrier = std::sync::Barrier::new(THREADS);
        let connections = std::thread::scope(|scope| {
            let threads = [(); THREADS].map(|()| {
                scope.spawn(|| {
                    barrier.wait();
                    kanbanlock::register().unwrap();
                    let connection = db.open("kanbanlock");
                    // One of them recovers the WAL; the others wait for that (else SQLITE_BUSY_RECOVERY).
                    connection.busy_timeout(std::time::Duration::from_secs(30)).unwrap();
                    connection.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)).unwrap();
                    connection
                })
            });
            threads.map(|thread| thread.join().unwrap())
        });
        let pid = format!(" {} ", std::process::id());
        let mut posix = support::proc_locks();
        posix.retain(|line| line.contains("POSIX") && line.contains(&pid));
        assert_eq!(posix, [""; 0]);
        for connection in &connections {
            let status: String = connection.query_row("PRAGMA kanbanlock", [], |row| row.get(0)).unwrap();
            assert!(status.contains("\"close_proof\":true"), "{status}");
        }
    });
}

/// Another copy of the library in the process (a second `libkanbanlock.so`) has a registry of its own. Here: a VFS with the
/// methods of ours, under another name.
#[test]
fn a_kanbanlock_of_another_library_is_not_wrapped() {
    in_own_process("a_kanbanlock_of_another_library_is_not_wrapped", || {
        log::install();
        Options::new().register().unwrap();
        let theirs =
            ffi::sqlite3_vfs { zName: c"theirs".as_ptr(), ..support::raw_file::vfs_methods("kanbanlock") };
        let theirs = Box::leak(Box::new(theirs));
        // SAFETY: a complete VFS, leaked; and it is the default from now on.
        assert_eq!(unsafe { ffi::sqlite3_vfs_register(theirs, 1) }, ffi::SQLITE_OK);
        let expected = RegisterError::RealVfsIsKanbanlock { name: "theirs".to_owned() };
        let ours = || Options::new().name("ours");
        assert_error(ours().register(), &expected, "wrap \"unix\" instead");
        assert_error(ours().real_vfs("theirs").register(), &expected, "wrap \"unix\" instead");
        ours().real_vfs("unix").register().unwrap();
        let db = TestDb::new();
        db.open("ours").execute_batch("CREATE TABLE t (x)").unwrap();
    });
}

fn find(name: &str) -> usize {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a NUL-terminated name.
    unsafe { ffi::sqlite3_vfs_find(name.as_ptr()) as usize }
}

/// The error, and that its text says what to do.
fn assert_error(result: Result<(), RegisterError>, expected: &RegisterError, advice: &str) {
    let error = result.unwrap_err();
    assert_eq!(error, *expected);
    assert!(error.to_string().contains(advice), "{error}");
}

#[test]
fn other_options_under_one_name_are_an_error() {
    log::install();
    let name = unique("kanbanlock");
    Options::new().name(name).register().unwrap();
    for other in [
        Options::new().name(name).checkpoint(CheckpointPolicy::Gate),
        Options::new().name(name).fallback(Fallback::Unlocked),
        Options::new().name(name).real_vfs("unix-excl"),
        Options::new().name(name).close_proof(false),
    ] {
        let expected = RegisterError::OptionsDiffer { name: name.to_owned() };
        assert_error(other.register(), &expected, "register once, at start-up");
    }
}

#[test]
fn what_cannot_be_wrapped_is_an_error() {
    log::install();
    kanbanlock::register().unwrap();
    let named = |real: &str| Options::new().name(unique("kanbanlock")).real_vfs(real);
    assert_error(
        named("no-such-vfs").register(),
        &RegisterError::RealVfsNotFound { name: Some("no-such-vfs".to_owned()) },
        "register it first",
    );
    assert_error(
        named("nul\0byte").register(),
        &RegisterError::RealVfsNotFound { name: Some("nul\0byte".to_owned()) },
        "register it first",
    );
    assert_error(
        named("unix-dotfile").register(),
        &RegisterError::RealVfsUsesLockFile { name: "unix-dotfile".to_owned() },
        "wrap \"unix\" instead",
    );
    assert_error(
        named("kanbanlock").register(),
        &RegisterError::RealVfsIsKanbanlock { name: "kanbanlock".to_owned() },
        "wrap \"unix\" instead",
    );
}

#[test]
fn names_that_cannot_be_are_errors() {
    log::install();
    for name in ["", "nul\0byte"] {
        let expected = RegisterError::InvalidName { name: name.to_owned() };
        assert_error(Options::new().name(name).register(), &expected, "not empty");
    }
    let expected = RegisterError::NameTaken { name: "unix".to_owned() };
    assert_error(Options::new().name("unix").register(), &expected, "choose another name");
}

#[test]
fn a_single_threaded_sqlite_is_an_error() {
    log::install();
    unsafe extern "C" fn no() -> c_int {
        0
    }
    let api = HostApi { threadsafe: Some(no), ..HostApi::linked() };
    // SAFETY: the linked SQLite, but for one function, which takes nothing either.
    let result = unsafe { register_with(api, &Options::new().name(unique("kanbanlock"))) };
    assert_error(result, &RegisterError::SingleThreaded, "SQLITE_THREADSAFE=1 or 2");
}

#[test]
fn a_sqlite_before_3_14_is_an_error() {
    log::install();
    unsafe extern "C" fn version() -> c_int {
        3_013_000
    }
    let api = HostApi { libversion_number: version, ..HostApi::linked() };
    // SAFETY: the linked SQLite, but for one function, which takes nothing either.
    let result = unsafe { register_with(api, &Options::new().name(unique("kanbanlock"))) };
    assert_error(result, &RegisterError::TooOld { version: 3_013_000 }, "needs 3.14 or later");
}

#[test]
fn sqlites_own_refusal_is_passed_on() {
    log::install();
    unsafe extern "C" fn refuse(_: *mut kanbanlock_ffi::sqlite3_vfs, _: c_int) -> c_int {
        ffi::SQLITE_NOMEM
    }
    let name = unique("kanbanlock");
    let api = HostApi { vfs_register: refuse, ..HostApi::linked() };
    // SAFETY: the linked SQLite, but for one function, which touches nothing.
    let result = unsafe { register_with(api, &Options::new().name(name)) };
    assert_error(result, &RegisterError::Sqlite { code: ffi::SQLITE_NOMEM }, "rescode.html");
    Options::new().name(name).register().unwrap(); // and nothing is left behind
}

/// Each copy of SQLite has its own list of VFSes. Another `sqlite3_vfs_find` is another copy.
#[test]
fn a_sqlite_with_the_wal_reset_race_is_warned_of_once_per_copy() {
    log::install();
    unsafe extern "C" fn find(name: *const c_char) -> *mut kanbanlock_ffi::sqlite3_vfs {
        // SAFETY: passed through.
        unsafe { ffi::sqlite3_vfs_find(name).cast() }
    }
    unsafe extern "C" fn affected() -> c_int {
        3_051_002
    }
    let api = HostApi { vfs_find: find, libversion_number: affected, ..HostApi::linked() };
    for _ in 0..2 {
        // SAFETY: the linked SQLite, through one wrapper, with another version number.
        unsafe { register_with(api, &Options::new().name(unique("kanbanlock"))) }.unwrap();
    }
    let warnings = log::lines_with("SQLite 3.51.2 has the WAL-reset race");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0].0, ffi::SQLITE_WARNING);
    // The real one is 3.51.3 or later, and not warned of.
    kanbanlock::register().unwrap();
    assert_eq!(log::lines_with("has the WAL-reset race").len(), 1);
}

#[test]
fn unknown_options_and_values_do_not_open() {
    log::install();
    kanbanlock::register().unwrap();
    for (parameters, culprit, valid) in [
        (
            "kanbanlock_chekpoint=gate",
            "\"kanbanlock_chekpoint\"",
            "kanbanlock_checkpoint, kanbanlock_fallback",
        ),
        ("kanbanlock_checkpoint=often", "\"often\"", "free, gate"),
        ("kanbanlock_fallback=yes", "\"yes\"", "refuse, unlocked"),
        ("kanbanlock_fallback=", "\"\"", "refuse, unlocked"),
        ("kanbanlock_=1", "\"kanbanlock_\"", "kanbanlock_checkpoint"),
    ] {
        let db = TestDb::new();
        let result = db.try_open_uri(&format!("vfs=kanbanlock&{parameters}"));
        assert_eq!(code(result), ffi::SQLITE_CANTOPEN, "{parameters}");
        let lines = log::lines_with(culprit);
        assert!(lines.iter().any(|(_, line)| line.contains(valid)), "{parameters}: {lines:?}");
        assert!(!db.path().exists());
    }
}

#[test]
fn options_come_from_the_registration_and_the_uri_overrides_them() {
    log::install();
    let name = unique("kanbanlock");
    Options::new()
        .name(name)
        .checkpoint(CheckpointPolicy::Gate)
        .fallback(Fallback::Unlocked)
        .register()
        .unwrap();
    let options_of = |parameters: &str| {
        let db = TestDb::new();
        let connection = db.try_open_uri(&format!("vfs={name}{parameters}")).unwrap();
        let status: String = connection.query_row("PRAGMA kanbanlock", [], |row| row.get(0)).unwrap();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        (status["checkpoint"].as_str().unwrap().to_owned(), status["fallback"].as_str().unwrap().to_owned())
    };
    assert_eq!(options_of(""), ("gate".to_owned(), "unlocked".to_owned()));
    assert_eq!(options_of("&kanbanlock_checkpoint=free"), ("free".to_owned(), "unlocked".to_owned()));
    assert_eq!(options_of("&kanbanlock_fallback=refuse"), ("gate".to_owned(), "refuse".to_owned()));
}

/// SQLite before 3.31 has no sqlite3_uri_key: the options still work.
#[test]
fn without_uri_key_the_known_options_are_read_all_the_same() {
    log::install();
    let name = unique("kanbanlock");
    let api = HostApi { uri_key: None, threadsafe: None, ..HostApi::linked() };
    // SAFETY: the linked SQLite.
    unsafe { register_with(api, &Options::new().name(name)) }.unwrap();
    let db = TestDb::new();
    let connection = db.try_open_uri(&format!("vfs={name}&kanbanlock_checkpoint=gate")).unwrap();
    let status: String = connection.query_row("PRAGMA kanbanlock", [], |row| row.get(0)).unwrap();
    assert!(status.contains("\"checkpoint\":\"gate\""), "{status}");
    let result = TestDb::new().try_open_uri(&format!("vfs={name}&kanbanlock_checkpoint=often"));
    assert_eq!(code(result), ffi::SQLITE_CANTOPEN);
}

#[test]
fn stats_count_what_happened() {
    log::install();
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let (a, b) = (db.open("kanbanlock"), db.open("kanbanlock"));
    let before = kanbanlock::stats();
    a.execute_batch("CREATE TABLE t (x); BEGIN IMMEDIATE").unwrap();
    assert!(kanbanlock::stats().held >= 1);
    assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
    a.execute_batch("COMMIT").unwrap();
    let after = kanbanlock::stats();
    assert!(after.acquired >= before.acquired + 2);
    assert!(after.refused > before.refused);
}

#[test]
fn a_plain_path_stays_on_the_default_vfs() {
    log::install();
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    Connection::open(db.path()).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    assert!(!db.lock_file().exists());
}
