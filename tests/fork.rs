//! fork(2): a child must not keep the parent's locks alive, nor use the parent's connections.

mod support;

use support::TestDb;
use support::agent::{Agent, Task};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// The parent is killed in the middle of a transaction while a forked child lives on.
#[test]
fn a_forked_child_does_not_keep_a_dead_parents_lock() {
    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let mut parent = Agent::with_db(db.path(), "kanbanlock");
        parent.query(&format!("PRAGMA journal_mode = {journal_mode}"));
        parent
            .execute("CREATE TABLE t (x); INSERT INTO t VALUES (1); BEGIN IMMEDIATE; UPDATE t SET x = 2")
            .unwrap();
        let child = Child(parent.ask(&Task::Fork).unwrap().parse().unwrap());
        let mut outsider = Agent::start();
        assert!(!outsider.is_free(&db.lock_file()), "the parent holds it");
        parent.kill();
        assert!(child.is_alive());
        assert!(outsider.is_free(&db.lock_file()), "{journal_mode}");
        let mut writer = Agent::with_db(db.path(), "kanbanlock");
        writer.execute("BEGIN IMMEDIATE; UPDATE t SET x = x + 10; COMMIT").unwrap();
        assert_eq!(writer.query("SELECT x FROM t"), "11", "the dead parent's transaction was rolled back");
    }
}

/// That this is a real danger: the same with an application's own flock.
#[test]
fn an_applications_own_flock_lives_on_in_the_child() {
    let db = TestDb::new();
    let mut parent = Agent::start();
    parent.ask(&Task::Flock(db.lock_file())).unwrap();
    let child = Child(parent.ask(&Task::Fork).unwrap().parse().unwrap());
    parent.kill();
    assert!(child.is_alive());
    assert!(!Agent::start().is_free(&db.lock_file()));
}

/// The fork does not disturb the parent: its flock and its OFD locks are on descriptions that the child has only closed.
#[test]
fn the_parent_keeps_its_locks_and_goes_on() {
    let db = TestDb::new();
    let mut parent = Agent::with_db(db.path(), "kanbanlock");
    parent
        .execute("CREATE TABLE t (x); INSERT INTO t VALUES (1); BEGIN IMMEDIATE; UPDATE t SET x = 2")
        .unwrap();
    let _child = Child(parent.ask(&Task::Fork).unwrap().parse().unwrap());
    assert!(!Agent::start().is_free(&db.lock_file()));
    let mut stock = Agent::stock_with_db(db.path());
    assert!(stock.execute("BEGIN IMMEDIATE").is_err());
    parent.execute("COMMIT").unwrap();
    stock.execute("UPDATE t SET x = x + 1").unwrap();
    assert_eq!(parent.query("SELECT x FROM t"), "3");
}

/// A connection that is carried into the child can neither lock nor write there, and the parent's transaction survives
/// the attempt.
#[test]
fn an_inherited_connection_is_refused_in_the_child() {
    for journal_mode in ["delete", "wal"] {
        let db = TestDb::new();
        let mut parent = Agent::with_db(db.path(), "kanbanlock");
        parent.query(&format!("PRAGMA journal_mode = {journal_mode}"));
        parent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
        let in_child =
            |parent: &mut Agent, sql: &str| parent.ask(&Task::ExecuteInChild(sql.to_owned())).unwrap();
        assert_eq!(in_child(&mut parent, "INSERT INTO t VALUES (2)"), "refused", "{journal_mode}");
        assert_eq!(in_child(&mut parent, "SELECT * FROM t"), "refused", "{journal_mode}");

        parent
            .execute(
                "PRAGMA cache_size = 2; BEGIN IMMEDIATE; INSERT INTO t SELECT hex(zeroblob(9000)) FROM t",
            )
            .unwrap();
        in_child(&mut parent, "COMMIT");
        in_child(&mut parent, "ROLLBACK");
        parent.execute("INSERT INTO t VALUES (3); COMMIT").unwrap();
        assert_eq!(parent.query("SELECT count(*) FROM t"), "3", "{journal_mode}");
        assert_eq!(parent.query("PRAGMA integrity_check"), "ok", "{journal_mode}");
    }
}

/// A forked child, killed when dropped.
struct Child(i32);

impl Child {
    fn is_alive(&self) -> bool {
        // SAFETY: signal 0 only asks.
        unsafe { libc::kill(self.0, 0) == 0 }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own grandchild, alive until now (its alarm is a minute away).
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}
