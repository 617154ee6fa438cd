//! Row M1: files that are deleted, renamed or replaced under a live connection.
//!
//! Each scenario runs first on stock SQLite, where a commit is acknowledged and **must** be missing for whoever opens the
//! database afterwards; then through kanbanlock, where it must be refused before that. The victim is a process of its own
//! and is killed before the audit: its last close could otherwise still rescue what it had in a nameless WAL.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, ffi};
use support::agent::{Agent, Reply, Task};
use support::handles::Order;
use support::{TestDb, await_tick, code, set_journal_mode};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

const COMMIT: &str = "INSERT INTO task VALUES ('acknowledged')";

/// A process connected to a new database. `task` is checkpointed; what is in `other` is in the WAL alone.
fn victim(db: &TestDb, is_shimmed: bool, journal_mode: &str) -> Agent {
    let mut victim =
        if is_shimmed { Agent::with_db(db.path(), "kanbanlock") } else { Agent::stock_with_db(db.path()) };
    assert_eq!(victim.query(&format!("PRAGMA journal_mode = {journal_mode}")), journal_mode);
    victim.execute("CREATE TABLE task (title TEXT); INSERT INTO task VALUES ('before')").unwrap();
    victim.execute("CREATE TABLE other (x)").unwrap();
    victim.query("PRAGMA wal_checkpoint");
    victim.execute("INSERT INTO other VALUES (1)").unwrap();
    victim
}

/// What a new connection finds; nothing if the table is not there.
fn titles(db: &TestDb) -> Vec<String> {
    let connection = Connection::open_with_flags_and_vfs(db.path(), OpenFlags::default(), "unix").unwrap();
    let Ok(mut query) = connection.prepare("SELECT title FROM task ORDER BY rowid") else {
        return Vec::new();
    };
    query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
}

fn was_refused(reply: &Reply) -> bool {
    match reply {
        Ok(_) => false,
        Err((ffi::SQLITE_READONLY_DBMOVED, message)) => {
            assert_eq!(message, "attempt to write a readonly database");
            true
        }
        Err(other) => panic!("{other:?}"),
    }
}

/// `happens` to the files of a live connection; `log`: what is said of it.
fn assert_noticed(journal_mode: &str, log: &str, happens: impl Fn(&TestDb)) {
    for is_shimmed in [false, true] {
        let db = TestDb::new();
        let mut victim = victim(&db, is_shimmed, journal_mode);
        happens(&db);
        await_tick();
        let reply = victim.execute(COMMIT);
        assert_eq!(was_refused(&reply), is_shimmed, "{journal_mode}: {reply:?}");
        if is_shimmed {
            assert!(was_refused(&victim.execute("BEGIN IMMEDIATE")), "again");
            assert_eq!(
                victim.log().matches(log).count(),
                1,
                "one line, and not one for each: {}",
                victim.log()
            );
            assert_eq!(victim.query("SELECT count(*) FROM task"), "1", "reading goes on");
        }
        victim.kill();
        assert!(
            !titles(&db).contains(&"acknowledged".to_owned()),
            "{journal_mode}: lost on stock, refused here"
        );
    }
}

fn moved(db: &TestDb) {
    fs::rename(db.path(), db.dir().join("moved.db")).unwrap();
}

/// Another file takes the name, as by `mv backup.db kanban.db`.
fn replaced(path: &Path) {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    fs::rename(copy, path).unwrap();
}

#[test]
fn a_database_that_is_renamed() {
    for journal_mode in ["wal", "memory"] {
        assert_noticed(journal_mode, "kanban.db was deleted or renamed while in use", moved);
    }
}

#[test]
fn a_database_that_is_deleted() {
    for journal_mode in ["wal", "memory"] {
        let log = "kanban.db was deleted or renamed while in use";
        assert_noticed(journal_mode, log, |db| fs::remove_file(db.path()).unwrap());
    }
}

#[test]
fn a_database_that_is_replaced() {
    for journal_mode in ["wal", "memory"] {
        let log = "kanban.db was replaced by another file while in use";
        assert_noticed(journal_mode, log, |db| {
            // A backup that is put back: -wal and -shm go with the old file, as the manual of backups says.
            replaced(db.path());
            let _ = (fs::remove_file(db.beside("-wal")), fs::remove_file(db.beside("-shm")));
        });
    }
}

/// Who opens it by the link has journals, WAL and lock file elsewhere, since SQLite resolves the link.
#[test]
fn a_database_that_is_moved_leaving_a_link() {
    assert_noticed("wal", "kanban.db was replaced by another file while in use", |db| {
        moved(db);
        symlink(db.dir().join("moved.db"), db.path()).unwrap();
    });
}

/// In rollback mode with a journal file SQLite looks itself, and answers the same.
#[test]
fn stock_sqlite_notices_in_rollback_mode_what_we_answer() {
    for is_shimmed in [false, true] {
        let db = TestDb::new();
        let mut victim = victim(&db, is_shimmed, "delete");
        moved(&db);
        await_tick();
        assert!(was_refused(&victim.execute(COMMIT)));
    }
}

#[test]
fn a_wal_that_is_deleted() {
    let log = "kanban.db-wal was deleted or renamed while in use";
    assert_noticed("wal", log, |db| fs::remove_file(db.beside("-wal")).unwrap());
}

#[test]
fn a_wal_that_is_replaced() {
    let log = "kanban.db-wal was replaced by another file while in use";
    assert_noticed("wal", log, |db| replaced(&db.beside("-wal")));
}

/// `cp backup.db-wal kanban.db-wal` and `> kanban.db-wal` leave the file, but not what is in it.
#[test]
fn a_wal_that_is_truncated() {
    let log = "kanban.db-wal was truncated, overwritten or made anew while in use";
    assert_noticed("wal", log, |db| fs::write(db.beside("-wal"), "").unwrap());
}

/// A process that comes after the deletion finds the wal-index of the one that is still there, and makes an empty WAL: it
/// writes on from the middle.
#[test]
fn a_wal_made_anew_by_a_process_that_comes_later() {
    for is_shimmed in [false, true] {
        let db = TestDb::new();
        let first = victim(&db, false, "wal");
        fs::remove_file(db.beside("-wal")).unwrap();
        let mut late = if is_shimmed {
            Agent::with_db(db.path(), "kanbanlock")
        } else {
            Agent::stock_with_db(db.path())
        };
        let reply = late.execute(COMMIT);
        assert_eq!(was_refused(&reply), is_shimmed, "{reply:?}");
        first.kill();
        late.kill();
        assert_eq!(titles(&db), ["before"], "lost on stock, refused here");
    }
}

/// A second process makes a `-shm` of its own: the two no longer see each other's locks and frames, and one commit
/// overwrites the other in the WAL.
fn assert_shm_noticed(happens: impl Fn(&TestDb)) {
    for is_shimmed in [false, true] {
        let db = TestDb::new();
        let mut victim = victim(&db, is_shimmed, "wal");
        happens(&db);
        let mut peer = Agent::stock_with_db(db.path());
        peer.execute("INSERT INTO task VALUES ('of the peer')").unwrap();
        await_tick();
        let reply = victim.execute(COMMIT);
        assert_eq!(was_refused(&reply), is_shimmed, "{reply:?}");
        if is_shimmed {
            let log = "kanban.db-shm was replaced by another file while in use";
            assert!(victim.log().contains(log), "{}", victim.log());
        }
        victim.kill();
        peer.kill();
        let titles = titles(&db);
        let acknowledged: &[&str] =
            if is_shimmed { &["of the peer"] } else { &["of the peer", "acknowledged"] };
        let is_complete = acknowledged.iter().all(|title| titles.contains(&(*title).to_owned()));
        assert_eq!(is_complete, is_shimmed, "{titles:?}");
    }
}

#[test]
fn a_shm_that_is_deleted() {
    assert_shm_noticed(|db| fs::remove_file(db.beside("-shm")).unwrap());
}

#[test]
fn a_shm_that_is_replaced() {
    assert_shm_noticed(|db| replaced(&db.beside("-shm")));
}

/// Two names, two WALs, two lock files: two writers, of whom each believes that the other does not exist.
#[test]
fn a_database_with_two_names() {
    for is_shimmed in [false, true] {
        let db = TestDb::new();
        let mut victim = victim(&db, is_shimmed, "wal");
        let other_name = db.dir().join("other.db");
        fs::hard_link(db.path(), &other_name).unwrap();
        let mut peer = Agent::stock_with_db(&other_name);
        peer.execute("INSERT INTO task VALUES ('of the peer')").unwrap();
        await_tick();
        let reply = victim.execute(COMMIT);
        if is_shimmed {
            let (code, message) = reply.unwrap_err();
            assert_eq!(
                (code, message.as_str()),
                (ffi::SQLITE_READONLY, "attempt to write a readonly database")
            );
            assert!(victim.log().contains("has 2 names (hard links)"), "{}", victim.log());
            assert_eq!(victim.query("SELECT count(*) FROM task"), "1", "reading goes on");
        } else {
            reply.unwrap();
        }
        for mut agent in [victim, peer] {
            agent.query("PRAGMA wal_checkpoint");
            agent.kill();
        }
        let count = |path: &Path| {
            let connection = Connection::open_with_flags_and_vfs(path, OpenFlags::default(), "unix").unwrap();
            connection.query_row("SELECT count(*) FROM task", [], |row| row.get::<_, i64>(0)).unwrap()
        };
        let found = [count(db.path()), count(&other_name)];
        if !is_shimmed {
            assert!(found.iter().all(|&count| count < 3), "three were acknowledged: {found:?}");
        }
    }
}

/// The one way out is the lock file's: it is the lock file that cannot do its work.
#[test]
fn two_names_may_be_allowed() {
    let db = TestDb::new();
    let mut agent = Agent::start();
    let open =
        |parameters: &str| Task::Open(format!("file:{}?vfs=kanbanlock{parameters}", db.path().display()));
    agent.ask(&open("&kanbanlock_fallback=unlocked")).unwrap();
    agent.execute("CREATE TABLE task (title TEXT)").unwrap();
    let other_name = db.dir().join("other.db");
    fs::hard_link(db.path(), &other_name).unwrap();
    for _ in 0..2 {
        await_tick();
        agent.execute(COMMIT).unwrap();
    }
    assert_eq!(agent.log().matches("Writing all the same: kanbanlock_fallback=unlocked").count(), 1);
    agent.ask(&open("")).unwrap();
    assert_eq!(agent.execute(COMMIT).unwrap_err().0, ffi::SQLITE_READONLY);
    fs::remove_file(other_name).unwrap();
    agent.execute(COMMIT).unwrap();
}

/// What was replaced while its holder kept the gate is noticed in any case, tick or no tick: this is how a careful
/// script does it.
#[test]
fn a_database_that_is_replaced_under_the_flock() {
    let db = TestDb::new();
    let mut agent = victim(&db, true, "wal");
    let mut script = Agent::start();
    for _ in 0..20 {
        agent.execute("INSERT INTO task VALUES ('x')").unwrap();
        script.ask(&Task::Flock(db.lock_file())).unwrap();
        assert_eq!(agent.execute(COMMIT).unwrap_err().0, ffi::SQLITE_BUSY);
        let elsewhere = db.dir().join("elsewhere");
        fs::rename(db.path(), &elsewhere).unwrap();
        script.ask(&Task::Unflock).unwrap();
        assert!(was_refused(&agent.execute(COMMIT)));
        fs::rename(elsewhere, db.path()).unwrap();
    }
}

/// The advice of the log: whoever closes last copies the nameless WAL into the database. Nothing that was acknowledged
/// before the deletion is lost.
#[test]
fn the_last_close_rescues_what_is_in_a_deleted_wal() {
    for deleted in ["-wal", "-shm"] {
        let db = TestDb::new();
        let mut agent = victim(&db, true, "wal");
        agent.execute("INSERT INTO task VALUES ('in the WAL')").unwrap();
        fs::remove_file(db.beside(deleted)).unwrap();
        await_tick();
        assert!(was_refused(&agent.execute(COMMIT)));
        agent.ask(&Task::Close).unwrap();
        assert_eq!(titles(&db), ["before", "in the WAL"], "{deleted}");
        agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
        agent.execute(COMMIT).unwrap();
    }
}

/// … but not over another's: a WAL that came in its place is neither overwritten nor deleted by the close.
#[test]
fn the_last_close_leaves_anothers_wal_alone() {
    let db = TestDb::new();
    let mut agent = victim(&db, true, "wal");
    agent.execute("INSERT INTO task VALUES ('in the WAL')").unwrap();
    replaced(&db.beside("-wal"));
    await_tick();
    agent.ask(&Task::Close).unwrap();
    assert!(db.beside("-wal").exists());
    assert_eq!(titles(&db), ["before", "in the WAL"], "the copy is whole, as it happens");
}

/// A connection that is opened after a replacement, beside one from before, shares the old `-shm` with it (os_unix maps
/// it once for a process): it is no way around.
#[test]
fn a_new_connection_beside_an_old_one_is_refused_too() {
    for suffix in ["-wal", "-shm"] {
        let db = TestDb::new();
        let mut agent = victim(&db, true, "wal");
        replaced(&db.beside(suffix));
        await_tick();
        let uri = format!("file:{}?vfs=kanbanlock", db.path().display());
        agent.order(0, Order::Open(uri.clone())).unwrap().result.unwrap();
        assert!(was_refused(&agent.order(0, Order::Run(COMMIT.to_owned())).unwrap().result), "{suffix}");
        // As the log says: close them all.
        agent.order(0, Order::Close).unwrap();
        agent.ask(&Task::Open(uri)).unwrap();
        agent.execute(COMMIT).unwrap();
    }
}

/// What is not an accident goes on as ever; a file that is put back is in its place again.
#[test]
fn legitimate_changes_are_not_refused() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let connection = db.open("kanbanlock");
    connection.execute_batch("CREATE TABLE task (title TEXT)").unwrap();
    let write = || {
        await_tick();
        connection.execute_batch(COMMIT)
    };
    for journal_mode in ["wal", "delete", "wal", "truncate", "persist", "memory", "off", "wal"] {
        set_journal_mode(&connection, journal_mode);
        write().unwrap();
        connection.execute_batch("VACUUM").unwrap();
        write().unwrap();
    }
    // The WAL goes with the last connection, and comes back with the next one.
    let second = db.open("kanbanlock");
    second.execute_batch(COMMIT).unwrap();
    drop(second);
    write().unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    write().unwrap();

    let elsewhere = db.dir().join("elsewhere");
    fs::rename(db.path(), &elsewhere).unwrap();
    assert_eq!(code(write()), ffi::SQLITE_READONLY_DBMOVED);
    fs::rename(&elsewhere, db.path()).unwrap();
    write().unwrap();

    // Opened by a symbolic link: SQLite resolves it, and the name that it leads to counts.
    let link = db.dir().join("link.db");
    symlink(db.path(), &link).unwrap();
    let by_link = support::open(&link, "kanbanlock");
    by_link.execute_batch(COMMIT).unwrap();
    fs::remove_file(link).unwrap();
    await_tick();
    by_link.execute_batch(COMMIT).unwrap();

    // No name at all.
    for name in [":memory:", ""] {
        let nameless = support::open(Path::new(name), "kanbanlock");
        nameless.execute_batch("CREATE TABLE task (title TEXT)").unwrap();
        nameless.execute_batch(COMMIT).unwrap();
    }
    // Deleted, and then closed.
    fs::remove_file(db.path()).unwrap();
    connection.close().unwrap();
}
