//! The first-open storm: all workers start at once, and the database is not there yet.
//!
//! A supervisor starts its workers together, and each does what every program does at connect: open `kanban.db`, switch
//! it to WAL, create the tables unless they exist. So at one moment eight processes create one file, convert its
//! journal mode and race through the same DDL; the framework put its flock around that part too, since it was suspected
//! first. Stock SQLite gets through it: its worst answer is SQLITE_BUSY in spite of a busy timeout, and who tries
//! again succeeds. kanbanlock must be no worse: the same schema for everybody, every acknowledged row there afterwards,
//! and no failure that stock does not have. (SQLITE_BUSY itself is counted and printed, not compared.)
//!
//! Both VFSes run the same storm here, and the counts are printed side by side.

mod support;

use std::fmt;
use std::fs::File;

use rusqlite::ffi;
use support::TestDb;
use support::agent::{Agent, Reply, Task};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

const PROCESSES: usize = 8;
const ROUNDS: usize = 8;

/// How often a process tries again after SQLITE_BUSY.
const ATTEMPTS: usize = 50;

const MIGRATION: &str = "
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS task (id INTEGER PRIMARY KEY, title TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS worker (name TEXT PRIMARY KEY);
    CREATE INDEX IF NOT EXISTS task_title ON task (title);
    CREATE TRIGGER IF NOT EXISTS first_task AFTER INSERT ON worker
        WHEN NOT EXISTS (SELECT * FROM task) BEGIN INSERT INTO task (title) VALUES ('first'); END;
    PRAGMA user_version = 7;
    COMMIT";

/// What [`MIGRATION`] comes to.
const SCHEMA: &str = "first_task,sqlite_autoindex_worker_1,task,task_title,worker";

/// What a program does at connect, and its first row.
fn start_up(name: usize, migration: &str) -> Task {
    Task::Execute(format!(
        "PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; {migration};
         BEGIN IMMEDIATE; INSERT INTO worker VALUES ('worker {name}'); COMMIT"
    ))
}

fn roll_back() -> Task {
    Task::Execute("ROLLBACK".to_owned())
}

#[derive(Default)]
struct Counts {
    busy: usize,
    /// Anything but SQLITE_OK and SQLITE_BUSY.
    failures: Vec<(i32, String)>,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} times SQLITE_BUSY, {} other failures", self.busy, self.failures.len())?;
        if self.failures.is_empty() { Ok(()) } else { write!(f, ": {:?}", self.failures) }
    }
}

impl Counts {
    /// True if it succeeded.
    fn add(&mut self, reply: Reply) -> bool {
        match reply {
            Ok(_) => return true,
            Err((code, _)) if code & 0xff == ffi::SQLITE_BUSY => self.busy += 1,
            Err(failure) => self.failures.push(failure),
        }
        false
    }
}

fn start_agents(vfs: &str) -> Vec<Agent> {
    let start = |_| if vfs == "unix" { Agent::stock() } else { Agent::start() };
    (0..PROCESSES).map(start).collect()
}

/// All processes at once. Who is told SQLITE_BUSY tries again, as a program would.
fn first_open(agents: &mut [Agent], db: &TestDb, vfs: &str, migration: &str, counts: &mut Counts) {
    let starting_line = File::create(db.beside(".start")).unwrap();
    starting_line.lock().unwrap();
    let open = Task::Open(format!("file:{}?vfs={vfs}", db.path().display()));
    for (name, agent) in agents.iter_mut().enumerate() {
        agent.log(); // it has started
        agent.send(&Task::AwaitUnflocked(db.beside(".start")));
        agent.send(&open);
        agent.send(&start_up(name, migration));
        agent.send(&roll_back()); // if it has failed behind a BEGIN; nobody must wait for us to say so
    }
    drop(starting_line);
    for (name, agent) in agents.iter_mut().enumerate() {
        agent.receive().unwrap();
        assert!(counts.add(agent.receive()), "open: {counts}");
        let mut reply = agent.receive();
        let _ = agent.receive();
        for _ in 0..ATTEMPTS {
            let is_busy = matches!(&reply, Err((code, _)) if code & 0xff == ffi::SQLITE_BUSY);
            counts.add(reply.clone());
            if !is_busy {
                break;
            }
            reply = agent.ask(&start_up(name, migration));
            let _ = agent.ask(&roll_back());
        }
    }
}

/// Several rounds, a new database each round.
fn storm(vfs: &str) -> Counts {
    let mut agents = start_agents(vfs);
    let mut counts = Counts::default();
    for _ in 0..ROUNDS {
        let db = TestDb::new();
        first_open(&mut agents, &db, vfs, MIGRATION, &mut counts);
        for agent in &mut agents {
            check(agent);
        }
        for agent in &mut agents {
            agent.send(&Task::Close); // all at once, too
        }
        for agent in &mut agents {
            agent.receive().unwrap();
        }
        check(&mut Agent::stock_with_db(db.path()));
    }
    println!("{vfs}: {ROUNDS} rounds of {PROCESSES} processes: {counts}");
    counts
}

/// What this process sees: the schema, WAL mode, a sound file and every acknowledged row.
fn check(agent: &mut Agent) {
    let names = "SELECT group_concat(name) FROM (SELECT name FROM sqlite_schema ORDER BY name)";
    assert_eq!(agent.query(names), SCHEMA);
    assert_eq!(agent.query("PRAGMA user_version"), "7");
    assert_eq!(agent.query("PRAGMA journal_mode"), "wal");
    assert_eq!(agent.query("PRAGMA integrity_check"), "ok");
    assert_eq!(agent.query("SELECT count(*) FROM worker"), PROCESSES.to_string(), "acknowledged rows");
    assert_eq!(agent.query("SELECT count(*) FROM task"), "1");
}

#[test]
fn the_storm_ends_alike_on_stock_and_through_kanbanlock() {
    let stock = storm("unix");
    let shimmed = storm("kanbanlock");
    assert!(shimmed.failures.len() <= stock.failures.len(), "stock: {stock}; kanbanlock: {shimmed}");
    assert!(shimmed.failures.is_empty(), "{shimmed}");
}

/// That failures are seen and counted: a migration that does not ask whether the tables exist succeeds in one process.
#[test]
fn a_migration_that_is_not_made_for_it_fails_in_all_but_one() {
    for vfs in ["unix", "kanbanlock"] {
        let db = TestDb::new();
        let mut counts = Counts::default();
        let naive = MIGRATION.replace(" IF NOT EXISTS", "");
        first_open(&mut start_agents(vfs), &db, vfs, &naive, &mut counts);
        assert_eq!(counts.failures.len(), PROCESSES - 1, "{vfs}: {counts}");
        let is_expected = |(_, message): &(i32, String)| message.starts_with("table task already exists");
        assert!(counts.failures.iter().all(is_expected), "{vfs}: {counts}");
    }
}
