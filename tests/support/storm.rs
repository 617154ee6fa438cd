//! Several agents that write as much as they can at once, and the audit of it.

use std::fs::File;

use super::TestDb;
use super::agent::{Agent, Patience, Storm, Tally, Task, integer};

/// SQLite's own busy handler, for a minute.
pub const PATIENT: Patience = Patience::Timeout(60_000);

/// Agents that write as much as they can at once.
pub fn storm(db: &TestDb, vfs: &str, millis: u64, ballast: usize, all: &[Patience]) -> Vec<Tally> {
    let mut agents: Vec<Agent> =
        all.iter().map(|_| if vfs == "unix" { Agent::stock() } else { Agent::start() }).collect();
    storm_of(&mut agents, db, vfs, millis, ballast, all)
}

/// The same, of these agents.
pub fn storm_of(
    agents: &mut [Agent],
    db: &TestDb,
    vfs: &str,
    millis: u64,
    ballast: usize,
    all: &[Patience],
) -> Vec<Tally> {
    storm_beside(agents, db, vfs, millis, ballast, all, || ()).0
}

/// The same, and what `beside` does from when they begin.
pub fn storm_beside<T>(
    agents: &mut [Agent],
    db: &TestDb,
    vfs: &str,
    millis: u64,
    ballast: usize,
    all: &[Patience],
    beside: impl FnOnce() -> T,
) -> (Vec<Tally>, T) {
    let start = db.beside("-start");
    let line = File::create(&start).unwrap();
    line.lock().unwrap();
    for ((writer, agent), &patience) in agents.iter_mut().enumerate().zip(all) {
        let uri = format!("file:{}?vfs={vfs}", db.path().display());
        agent.send(&Task::Storm(Storm { uri, start: start.clone(), millis, patience, writer, ballast }));
    }
    for agent in &*agents {
        agent.await_flock();
    }
    drop(line);
    let result = beside();
    let tallies: Vec<Tally> = agents.iter_mut().map(Agent::receive_tally).collect();
    audit(db, &tallies);
    (tallies, result)
}

/// Every commit that a writer was promised is there, once.
pub fn audit(db: &TestDb, tallies: &[Tally]) {
    let db = db.open("unix");
    for (writer, tally) in tallies.iter().enumerate() {
        let sql =
            "SELECT count(*), count(DISTINCT number), coalesce(max(number) + 1, 0) FROM t WHERE writer = ?1";
        let found: [i64; 3] =
            db.query_row(sql, [integer(writer)], |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?])).unwrap();
        assert_eq!(found, [integer(tally.commits); 3], "writer {writer}");
    }
}

/// (Σx)² / nΣx²: 1 if all have the same share, 1/n if one has all.
pub fn jain(tallies: &[Tally]) -> f64 {
    let shares = || tallies.iter().map(|tally| tally.commits as f64);
    let sum: f64 = shares().sum();
    sum * sum / (tallies.len() as f64 * shares().map(|share| share * share).sum::<f64>())
}

pub fn longest(tallies: &[Tally]) -> u64 {
    tallies.iter().map(|tally| tally.longest).max().unwrap()
}

pub fn commits(tallies: &[Tally]) -> u64 {
    tallies.iter().map(|tally| tally.commits).sum()
}
