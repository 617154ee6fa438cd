//! `kill -9` at every step of a transaction, a checkpoint, a recovery and a rollback.
//!
//! The fear that comes with every lock file: a worker is killed (by the OOM killer, by its supervisor) at just the wrong
//! moment, the lock stays behind, and no writer gets in until somebody deletes a file by hand. Protocols that write a
//! pid into the lock file, or make a directory, have that moment. A flock(2) has not: it goes with the last descriptor
//! of its open file description, which the kernel closes before the parent can learn of the death. What stays behind
//! is what SQLite can deal with: a hot journal, a WAL with half a transaction, a wal-index that must be rebuilt.
//!
//! Here the victim kills itself beneath the shim, at the n-th call of a named step (`support/killer.rs`), for n = 1, 2,
//! 3… until a whole script goes by without a kill. After each kill, seen from other processes:
//!
//! - the gate is free;
//! - the next writer gets in at once, without a busy timeout;
//! - the audit: what was acknowledged is there; beside it at most the one transaction that was being committed; and
//!   each transaction has seen its predecessor, whole.

mod support;

use std::fs;

use support::TestDb;
use support::agent::{Agent, Task};
use support::killer::Step;

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// More calls than any step of any script has.
const LIMIT: usize = 1_000;

/// The id of the transaction after the kill, above all others.
const NEXT_WRITER: i64 = 900;

/// Small pages, and rows that fill them: a transaction is many writes.
const SCHEMA: &str = "
    CREATE TABLE work (id INTEGER PRIMARY KEY, seen NOT NULL);
    CREATE TABLE pad (v INTEGER NOT NULL, filler);
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3)
    INSERT INTO pad SELECT 0, zeroblob(400) FROM n";

/// So that a transaction is written out before its COMMIT, too.
const SPILL: &str = "PRAGMA cache_size = 2";

/// The body of a transaction: it notes which one it has seen before it, in every page of `pad`.
fn body(id: i64) -> String {
    format!(
        "INSERT INTO work SELECT {id}, group_concat(DISTINCT v) FROM pad;
         UPDATE pad SET v = {id}"
    )
}

fn transaction(id: i64) -> String {
    format!("BEGIN IMMEDIATE; {}; COMMIT", body(id))
}

/// One thing that the victim does.
#[derive(Clone, Copy)]
enum Action {
    Transaction(i64),
    Sql(&'static str),
    Close,
}

impl Action {
    fn task(self) -> Task {
        match self {
            Action::Transaction(id) => Task::Execute(transaction(id)),
            Action::Sql(sql) => Task::Execute(sql.to_owned()),
            Action::Close => Task::Close,
        }
    }
}

/// Transactions, DDL, one that is rolled back, and the close.
const WRITES: &[Action] = &[
    Action::Sql(SPILL),
    Action::Transaction(101),
    Action::Sql("CREATE TABLE extra (x)"),
    Action::Sql("BEGIN IMMEDIATE; UPDATE pad SET v = -1; ROLLBACK"),
    Action::Transaction(102),
    Action::Close,
];

/// Each kind of checkpoint, with a restart of the WAL behind it.
const CHECKPOINTS: &[Action] = &[
    Action::Transaction(101),
    Action::Sql("PRAGMA wal_checkpoint(PASSIVE)"),
    Action::Transaction(102),
    Action::Sql("PRAGMA wal_checkpoint(TRUNCATE)"),
    Action::Transaction(103),
    Action::Close,
];

/// What a process does that finds the remains of another one.
const READ_AND_WRITE: &[Action] =
    &[Action::Sql("SELECT count(*) FROM work"), Action::Transaction(101), Action::Close];

/// A database to start from, copied for each kill.
struct Template {
    db: TestDb,
    acknowledged: Vec<i64>,
}

impl Template {
    /// Closed in good order.
    fn clean(journal_mode: &str) -> Template {
        let db = TestDb::new();
        let mut agent = Agent::with_db(db.path(), "kanbanlock");
        agent.execute("PRAGMA page_size = 512").unwrap();
        assert_eq!(agent.query(&format!("PRAGMA journal_mode = {journal_mode}")), journal_mode);
        agent.execute(SCHEMA).unwrap();
        agent.execute(&transaction(1)).unwrap();
        agent.ask(&Task::Close).unwrap();
        Template { db, acknowledged: vec![1] }
    }

    /// Left by a process that was killed in its third transaction.
    fn crashed(journal_mode: &str) -> Template {
        let mut template = Template::clean(journal_mode);
        let mut agent = Agent::with_db(template.db.path(), "kanbanlock");
        agent.execute(SPILL).unwrap();
        agent.execute(&transaction(2)).unwrap();
        template.acknowledged.push(2);
        agent.execute(&format!("BEGIN IMMEDIATE; {}", body(3))).unwrap();
        agent.kill();
        let remains = template.db.beside(if journal_mode == "wal" { "-wal" } else { "-journal" });
        assert_ne!(remains.metadata().unwrap().len(), 0, "there is something to recover");
        template
    }

    /// The copy has no `-shm`: as after the last process has gone, its content counts for nothing.
    fn copy(&self) -> TestDb {
        let copy = TestDb::new();
        for suffix in ["", "-wal", "-journal"] {
            let from = self.db.beside(suffix);
            if from.exists() {
                fs::copy(from, copy.beside(suffix)).unwrap();
            }
        }
        copy
    }
}

/// How a victim's script ended.
struct Ending {
    acknowledged: Vec<i64>,
    /// `None`: it came to its end.
    killed_during: Option<Action>,
}

fn run(script: &[Action], db: &TestDb, step: Step, nth: usize) -> Ending {
    let mut victim = Agent::start();
    victim.ask(&Task::OpenDoomed { path: db.path().to_owned(), step, nth }).unwrap();
    let mut acknowledged = Vec::new();
    for action in script {
        match victim.ask_doomed(&action.task()) {
            None => return Ending { acknowledged, killed_during: Some(*action) },
            Some(reply) => reply.unwrap(),
        };
        if let Action::Transaction(id) = action {
            acknowledged.push(*id);
        }
    }
    Ending { acknowledged, killed_during: None }
}

/// The processes that look at what the victim leaves behind.
struct Survivors {
    outsider: Agent,
    writer: Agent,
}

impl Survivors {
    fn new() -> Survivors {
        Survivors { outsider: Agent::start(), writer: Agent::start() }
    }

    /// `Err`: what is wrong.
    fn judge(&mut self, db: &TestDb, template: &Template, ending: &Ending) -> Result<(), String> {
        ensure(self.outsider.is_free(&db.lock_file()), || "the gate is held".to_owned())?;

        // At once: nobody else is there, and there is no busy timeout.
        self.writer.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
        let next = self.writer.execute(&transaction(NEXT_WRITER));
        ensure(next.is_ok(), || format!("the next writer: {next:?}"))?;

        let history = history(&mut self.writer)?;
        let mut expected = template.acknowledged.clone();
        expected.extend(&ending.acknowledged);
        if let Some(Action::Transaction(id)) = ending.killed_during
            && history.contains(&id)
        {
            expected.push(id); // committed, but not acknowledged
        }
        expected.push(NEXT_WRITER);
        ensure(history == expected, || format!("transactions {history:?}, expected {expected:?}"))?;

        let integrity = self.writer.query("PRAGMA integrity_check");
        ensure(integrity == "ok", || format!("integrity_check: {integrity}"))?;
        self.writer.ask(&Task::Close).unwrap();
        ensure(self.outsider.is_free(&db.lock_file()), || "the next writer has left the gate held".to_owned())
    }
}

fn ensure(is_so: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(otherwise()) }
}

/// The ids of all transactions in the database, each of which has seen exactly its predecessor.
fn history(agent: &mut Agent) -> Result<Vec<i64>, String> {
    let sql = "SELECT group_concat(seen || ' ' || id) FROM (SELECT * FROM work ORDER BY id)";
    let rows = agent.ask(&Task::Query(sql.to_owned())).map_err(|failure| format!("{failure:?}"))?;
    let mut ids = Vec::new();
    for row in rows.split(',') {
        let predecessor = ids.last().unwrap_or(&0).to_string();
        let id = row.strip_prefix(&predecessor).and_then(|row| row.strip_prefix(' '));
        let id = id.and_then(|id| id.parse().ok());
        ids.push(id.ok_or_else(|| format!("half a transaction, or one lost: {rows}"))?);
    }
    Ok(ids)
}

/// Kills at every call of the step. Gives a verdict on each kill, with the number of the call.
fn verdicts(
    step: Step,
    template: &Template,
    script: &[Action],
    meddle: impl Fn(&TestDb),
) -> Vec<Result<(), String>> {
    let mut survivors = Survivors::new();
    let mut verdicts = Vec::new();
    for nth in 1..=LIMIT {
        let db = template.copy();
        let ending = run(script, &db, step, nth);
        if ending.killed_during.is_none() {
            survivors.judge(&db, template, &ending).unwrap();
            return verdicts;
        }
        meddle(&db);
        let verdict = survivors.judge(&db, template, &ending);
        verdicts.push(verdict.map_err(|wrong| format!("call {nth}: {wrong}")));
    }
    panic!("{step:?}: still being killed after {LIMIT} calls");
}

fn kill_everywhere(step: Step, journal_mode: &str, template: &Template, script: &[Action]) {
    let verdicts = verdicts(step, template, script, |_| ());
    println!("{journal_mode}, {step:?}: {} kills", verdicts.len());
    assert!(!verdicts.is_empty(), "{journal_mode}, {step:?} is never reached, so this shows nothing");
    let wrong: Vec<String> = verdicts.into_iter().filter_map(Result::err).collect();
    assert_eq!(wrong, [""; 0], "{journal_mode}, {step:?}");
}

fn kill_in_transactions(step: Step) {
    for journal_mode in ["delete", "wal"] {
        kill_everywhere(step, journal_mode, &Template::clean(journal_mode), WRITES);
    }
}

#[test]
fn between_the_gate_and_the_real_lock() {
    kill_in_transactions(Step::GateTaken);
}

#[test]
fn after_the_real_lock() {
    kill_in_transactions(Step::RealLocked);
}

#[test]
fn in_the_middle_of_the_writes() {
    kill_in_transactions(Step::Writing);
}

#[test]
fn before_the_real_unlock() {
    kill_in_transactions(Step::BeforeUnlock);
}

#[test]
fn between_the_real_unlock_and_the_release_of_the_gate() {
    kill_in_transactions(Step::RealUnlocked);
}

#[test]
fn in_the_middle_of_a_checkpoint() {
    kill_everywhere(Step::Checkpoint, "wal", &Template::clean("wal"), CHECKPOINTS);
}

#[test]
fn in_the_middle_of_wal_recovery() {
    kill_everywhere(Step::WalRecovery, "wal", &Template::crashed("wal"), READ_AND_WRITE);
}

#[test]
fn in_the_middle_of_a_hot_journals_rollback() {
    kill_everywhere(Step::HotJournalRollback, "delete", &Template::crashed("delete"), READ_AND_WRITE);
}

/// That the verdict can be bad: what SQLite needs for its recovery is taken away after the kill.
#[test]
fn the_audit_notices_a_recovery_that_did_not_take_place() {
    for (journal_mode, suffix) in [("delete", "-journal"), ("wal", "-wal")] {
        let remove = |db: &TestDb| {
            let _ = fs::remove_file(db.beside(suffix)); // it need not be there at each call
        };
        let verdicts = verdicts(Step::Writing, &Template::clean(journal_mode), WRITES, remove);
        let wrong = verdicts.iter().filter(|verdict| verdict.is_err()).count();
        println!("{journal_mode}, without {suffix}: {wrong} of {} found wrong", verdicts.len());
        assert_ne!(wrong, 0, "{journal_mode}");
    }
}

/// And a lock that outlives its owner: as if a forked child had kept the flock of a dead worker.
#[test]
fn a_gate_that_is_still_held_is_noticed() {
    let template = Template::clean("delete");
    let db = template.copy();
    let ending = run(WRITES, &db, Step::GateTaken, 1);
    let mut child = Agent::start();
    child.ask(&Task::Flock(db.lock_file())).unwrap();
    assert_eq!(Survivors::new().judge(&db, &template, &ending), Err("the gate is held".to_owned()));
}
