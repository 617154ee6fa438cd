//! What kanbanlock costs in system calls, counted by strace(1) beside the plain unix VFS: two flock(2) for a write
//! transaction, nothing for a read. In a tick of the kernel's clock the first write transaction also looks at names: three
//! fstat(2) of the lock file, one lstat(2) of the database, in WAL mode one of `-wal` and one of `-shm`, and one open(2) of
//! a queue's hint file that is not there.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::TestDb;
use support::agent::{Agent, Task};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

const TRANSACTIONS: usize = 10;

fn strace_works() -> bool {
    Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "true"])
        .status()
        .is_ok_and(|status| status.success())
}

type Counts = BTreeMap<String, i64>;

/// System calls between the two marks of a trace, by name.
fn count_between_marks(trace: &Path, begin: &Path, end: &Path) -> Counts {
    let text = std::fs::read_to_string(trace).unwrap();
    let between = text
        .lines()
        .skip_while(|line| !line.contains(begin.to_str().unwrap()))
        .skip(1)
        .take_while(|line| !line.contains(end.to_str().unwrap()));
    let mut counts = Counts::new();
    for line in between {
        // "4711 flock(5, LOCK_EX|LOCK_NB) = 0"; a call that strace shows in two parts counts at its first.
        let call = line.split_once(' ').map_or("", |(_, call)| call.trim_start());
        if let Some((name, _)) = call.split_once('(').filter(|(name, _)| !name.starts_with('<')) {
            // glibc's fstat is the system call newfstatat on a descriptor, with an empty path.
            let name = if call.contains("\"\", {") && name == "newfstatat" { "fstat" } else { name };
            *counts.entry(name.to_owned()).or_default() += 1;
        }
    }
    assert_ne!(counts, Counts::new(), "an empty trace shows nothing");
    counts
}

/// System calls of some transactions on a connection that is warm: the lock file is open already.
fn count(vfs: &str, journal_mode: &str, sql: &str) -> Counts {
    let db = TestDb::new();
    let trace = db.dir().join("trace");
    let (begin, end) = (PathBuf::from("/kanbanlock-begin"), PathBuf::from("/kanbanlock-end"));
    let mut agent = Agent::traced(&trace);
    agent.ask(&Task::Open(format!("file:{}?vfs={vfs}", db.path().display()))).unwrap();
    agent.query(&format!("PRAGMA journal_mode = {journal_mode}"));
    agent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
    agent.execute(&sql.repeat(2)).unwrap();
    agent.ask(&Task::Mark(begin.clone())).unwrap();
    agent.execute(&sql.repeat(TRANSACTIONS)).unwrap();
    agent.ask(&Task::Mark(end.clone())).unwrap();
    drop(agent);
    count_between_marks(&trace, &begin, &end)
}

/// What kanbanlock does more than unix.
fn difference(journal_mode: &str, sql: &str) -> Counts {
    let mut counts = count("kanbanlock", journal_mode, sql);
    for (name, stock) in count("unix", journal_mode, sql) {
        *counts.entry(name).or_default() -= stock;
    }
    counts.retain(|_, difference| *difference != 0);
    counts
}

#[test]
fn a_write_transaction_costs_two_flocks_and_once_a_tick_a_look_at_each_name() {
    if !strace_works() {
        println!("SKIPPED: strace(1) is not installed, or may not trace here");
        return;
    }
    for (journal_mode, names) in [("delete", 1), ("wal", 3)] {
        for sql in ["UPDATE t SET x = x + 1;", "BEGIN IMMEDIATE; UPDATE t SET x = x + 1; COMMIT;"] {
            let mut difference = difference(journal_mode, sql);
            let times = i64::try_from(TRANSACTIONS).unwrap();
            // Is the descriptor still ours, before and after; is the file still in its place?
            for (look, most) in [("fstat", 3), ("openat", 1)] {
                let looks = difference.remove(look).unwrap_or(0);
                assert!((0..=most * times).contains(&looks), "{journal_mode}: {sql}: {looks} {look}");
            }
            // glibc's lstat(2) is the system call newfstatat; stock makes some too, of the journal's name.
            let lstats = difference.remove("newfstatat").unwrap_or(0);
            assert!((0..=names * times).contains(&lstats), "{journal_mode}: {sql}: {lstats} lstat");
            assert_eq!(lstats % names, 0, "{journal_mode}: {sql}: each name, or none");
            assert_eq!(difference, Counts::from([("flock".to_owned(), 2 * times)]), "{journal_mode}: {sql}");
        }
    }
}

#[test]
fn a_read_transaction_costs_nothing() {
    if !strace_works() {
        println!("SKIPPED: strace(1) is not installed, or may not trace here");
        return;
    }
    for journal_mode in ["delete", "wal"] {
        let difference = difference(journal_mode, "SELECT x FROM t;");
        assert_eq!(difference, Counts::new(), "{journal_mode}");
    }
}
