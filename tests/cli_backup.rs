//! `kanbanlock backup`: one committed state, verified, or nothing.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use support::agent::{Agent, Task};
use support::{TestDb, is_flocked, set_journal_mode};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// A database of some hundred pages; each of its transactions adds a row to `log` and counts it in `counter`.
fn database(journal_mode: &str) -> TestDb {
    let db = TestDb::new();
    let connection = Connection::open(db.path()).unwrap();
    set_journal_mode(&connection, journal_mode);
    connection
        .execute_batch(
            "CREATE TABLE counter (n INTEGER); INSERT INTO counter VALUES (0);
             CREATE TABLE log (n INTEGER PRIMARY KEY, x);
             CREATE TABLE filler (x);
             WITH RECURSIVE i(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM i WHERE n < 300)
             INSERT INTO filler SELECT zeroblob(4000) FROM i;
             PRAGMA user_version = 7",
        )
        .unwrap();
    db
}

const COMMIT: &str = "BEGIN IMMEDIATE; UPDATE counter SET n = n + 1;
                      INSERT INTO log SELECT n, randomblob(500) FROM counter; COMMIT;";

/// How many transactions a database says it has seen, by each of its two accounts.
fn accounts(path: &Path) -> (i64, i64) {
    let db = Connection::open(path).unwrap();
    db.busy_timeout(std::time::Duration::from_secs(60)).unwrap();
    let row = "SELECT (SELECT n FROM counter), (SELECT count(*) FROM log WHERE n <= (SELECT n FROM counter))";
    db.query_row(row, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
}

fn backup(args: &[&str], db: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kanbanlock"));
    command.arg("backup").args(args).arg(db).arg(out).stdin(Stdio::null());
    command
}

fn start(mut command: Command) -> Child {
    let _fork = support::no_fork_meanwhile();
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn output(command: Command) -> Output {
    start(command).wait_with_output().unwrap()
}

fn assert_done(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn assert_refused(output: &Output, status: i32, why: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{message}");
    assert!(message.contains(why), "{why:?} is not in {message}");
}

/// The unfinished copy beside `out`, once it is there.
fn await_partial(out: &Path) -> PathBuf {
    loop {
        if let Some(partial) = partials(out.parent().unwrap()).pop() {
            return partial;
        }
        std::thread::yield_now();
    }
}

fn partials(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "partial")).collect()
}

#[test]
fn what_is_in_the_wal_is_in_the_copy() {
    let db = database("wal");
    let mut writer = Agent::with_db(db.path(), "kanbanlock");
    writer.query("PRAGMA wal_autocheckpoint = 0");
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    writer.execute(COMMIT).unwrap();
    let (out, raw) = (db.beside(".copy"), db.beside(".raw"));
    let done = output(backup(&[], db.path(), &out));
    assert_done(&done);
    assert!(String::from_utf8_lossy(&done.stdout).contains("user_version 7, journal mode wal"), "{done:?}");
    assert!(!db.beside(".copy-wal").exists() && partials(db.dir()).is_empty());
    assert_eq!(accounts(&out), (1, 1));
    // What a copy of the file is worth.
    fs::copy(db.path(), &raw).unwrap();
    assert_eq!(accounts(&raw), (0, 0), "the acknowledged commit is not in it");
}

#[test]
fn a_copy_made_under_writes_is_one_committed_state() {
    for (journal_mode, args) in
        [("wal", &[][..]), ("delete", &[]), ("wal", &["--hold"]), ("delete", &["--hold"])]
    {
        let db = database(journal_mode);
        let mut writer = Agent::with_db(db.path(), "kanbanlock");
        writer.query("PRAGMA busy_timeout = 60000");
        writer.execute("PRAGMA synchronous = OFF").unwrap();
        writer.send(&Task::Execute(COMMIT.repeat(100_000)));
        while accounts(db.path()).0 == 0 {
            std::thread::yield_now();
        }
        let before = accounts(db.path()).0;
        let out = db.beside(".copy");
        let args = [&["--pages", "16", "--pause", "1"], args].concat();
        assert_done(&output(backup(&args, db.path(), &out)));
        let after = accounts(db.path()).0;
        let (counted, logged) = accounts(&out);
        assert_eq!(counted, logged, "{journal_mode} {args:?}");
        assert!(
            (before..=after).contains(&counted),
            "{journal_mode} {args:?}: {before} … {counted} … {after}"
        );
        if journal_mode == "wal" && !args.contains(&"--hold") {
            assert!(counted < after, "the writer went on meanwhile");
        }
    }
}

/// Why the source is read in one transaction: otherwise every commit of another connection is a new beginning.
#[test]
fn without_a_read_transaction_a_backup_starts_again_and_again() {
    let db = database("wal");
    let finishes = |begin: &str| {
        let source = Connection::open(db.path()).unwrap();
        source.execute_batch(begin).unwrap();
        let writer = Connection::open(db.path()).unwrap();
        let mut copy = Connection::open_in_memory().unwrap();
        let backup = Backup::new(&source, &mut copy).unwrap();
        backup.step(1).unwrap();
        let steps = 2 * backup.progress().pagecount;
        (0..steps).any(|_| {
            writer.execute_batch(COMMIT).unwrap();
            backup.step(1).unwrap() == StepResult::Done
        })
    };
    assert!(finishes("BEGIN; SELECT * FROM counter"));
    assert!(!finishes(""));
}

#[test]
fn with_hold_nobody_writes_meanwhile() {
    let db = database("wal");
    let out = db.beside(".copy");
    for (args, is_held) in [(&["--hold"][..], true), (&[], false)] {
        let args = [&["--pages", "1", "--pause", "5"], args].concat();
        let child = start(backup(&args, db.path(), &out));
        await_partial(&out);
        assert_eq!(is_flocked(&db.lock_file()), is_held, "{args:?}");
        let mut writer = Agent::with_db(db.path(), "kanbanlock");
        assert_eq!(writer.execute(COMMIT).is_err(), is_held, "{args:?}");
        assert_done(&child.wait_with_output().unwrap());
        assert!(!is_flocked(&db.lock_file()));
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn killed_midway_it_leaves_out_as_it_was() {
    let db = database("wal");
    let out = db.beside(".copy");
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        for force in [false, true] {
            let args = ["--pages", "1", "--pause", "10", "--force"];
            if force {
                fs::write(&out, "something else").unwrap();
            }
            let child = start(backup(&args[..if force { 5 } else { 4 }], db.path(), &out));
            let partial = await_partial(&out);
            // SAFETY: our child, not waited for yet.
            assert_eq!(unsafe { libc::kill(child.id().try_into().unwrap(), signal) }, 0);
            let status = child.wait_with_output().unwrap().status;
            let found = fs::read_to_string(&out).ok();
            assert_eq!(found.as_deref(), force.then_some("something else"));
            if signal == libc::SIGKILL {
                fs::remove_file(partial).unwrap();
            } else {
                assert_eq!(status.code(), Some(130));
            }
            assert!(partials(db.dir()).is_empty());
            let _ = fs::remove_file(&out);
        }
    }
}

#[test]
fn out_is_not_overwritten_by_accident() {
    let db = database("wal");
    let (out, hard, soft) = (db.beside(".copy"), db.beside(".hard"), db.beside(".soft"));
    fs::hard_link(db.path(), &hard).unwrap();
    symlink(db.path(), &soft).unwrap();
    for database_itself in [db.path(), &hard, &soft] {
        assert_refused(
            &output(backup(&["--force"], db.path(), database_itself)),
            73,
            "is the database itself",
        );
    }
    fs::write(&out, "something else").unwrap();
    assert_refused(&output(backup(&[], db.path(), &out)), 73, "--force replaces it");
    assert_eq!(fs::read_to_string(&out).unwrap(), "something else");
    assert_refused(&output(backup(&[], db.path(), &db.dir().join("nowhere/copy"))), 73, "make it first");
    assert_refused(&output(backup(&["--force"], db.path(), db.dir())), 73, "not a regular file");
    fs::write(db.beside(".copy-journal"), "a hot journal, perhaps").unwrap();
    assert_refused(&output(backup(&["--force"], db.path(), &out)), 73, "OUT is in use");
    fs::remove_file(db.beside(".copy-journal")).unwrap();
    assert!(partials(db.dir()).is_empty());

    fs::set_permissions(db.path(), Permissions::from_mode(0o640)).unwrap();
    assert_done(&output(backup(&["--force"], db.path(), &out)));
    assert_eq!(accounts(&out), (0, 0));
    assert_eq!(fs::metadata(&out).unwrap().mode() & 0o777, 0o640, "the database's mode");
}

#[test]
fn a_source_that_is_none_says_so() {
    let db = database("delete");
    let out = db.beside(".copy");
    assert_refused(&output(backup(&[], &db.beside(".missing"), &out)), 66, "No such file");
    let text = db.beside(".text");
    fs::write(&text, "not a database, but longer than a header, which has a hundred bytes: ".repeat(9))
        .unwrap();
    assert_refused(&output(backup(&[], &text, &out)), 65, "not a database");

    let mut writer = Agent::with_db(db.path(), "kanbanlock");
    writer.execute("BEGIN EXCLUSIVE").unwrap();
    assert_refused(&output(backup(&["-w", "0"], db.path(), &out)), 1, "locked");
    writer.execute("ROLLBACK; BEGIN IMMEDIATE").unwrap();
    assert_refused(&output(backup(&["-w", "0", "--hold"], db.path(), &out)), 1, "somebody else writes");
    assert_done(&output(backup(&["-w", "0"], db.path(), &out)));
}

/// A damaged database gives a damaged copy, which is not put in place.
#[test]
fn a_copy_that_fails_its_check_is_thrown_away() {
    let db = database("delete");
    let connection = Connection::open(db.path()).unwrap();
    connection
        .execute_batch("INSERT INTO log SELECT rowid, 'x' FROM filler; CREATE INDEX log_x ON log (n, x)")
        .unwrap();
    let page: u32 = connection
        .query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'log_x'", [], |row| row.get(0))
        .unwrap();
    connection.close().unwrap();
    let file = fs::File::options().write(true).open(db.path()).unwrap();
    file.write_all_at(&[0x55; 16], u64::from(page) * 4096 - 32).unwrap(); // among its entries
    let out = db.beside(".copy");
    assert_refused(&output(backup(&[], db.path(), &out)), 74, "integrity_check says");
    assert!(!out.exists() && partials(db.dir()).is_empty());
}
