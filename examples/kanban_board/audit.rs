//! # The audit: is every acknowledged commit there, and does everything agree?
//!
//! Runs in the parent on a fresh connection when all other processes are gone. `PRAGMA integrity_check` alone
//! is satisfied with a well-formed file that has lost data; so the acknowledgement logs are gone through line
//! by line, and each commit in them is looked up in the database. The other way round, a commit that is in the
//! database and not in a log is the last one of a killed process, or an error.

use std::path::Path;

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, params};
use serde::Serialize;

use super::Result;
use super::acklog::{self, Entry};
use super::board::{self, Counted, DDL, Database, MIGRATIONS};
use super::crew::{Record, Shift};
use super::job::{self, Role};

/// How many findings of a check are printed.
const SHOWN: usize = 5;

/// One check's outcome.
#[derive(Serialize)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) passed: bool,
    pub(crate) detail: String,
}

/// A check: what was found good, or the error to be printed.
type CheckFn = fn(&Connection, &[Record]) -> Result<String>;

const CHECKS: [(&str, CheckFn); 10] = [
    ("integrity_check", integrity),
    ("foreign_key_check", foreign_keys),
    ("acknowledged commits", acknowledged),
    ("unacknowledged commits", unacknowledged),
    ("counters", counters),
    ("task status", statuses),
    ("task runs", runs),
    ("migrations", migrations),
    ("DDL", schema),
    ("snapshots", snapshots),
];

/// Makes every check, whatever the others say.
pub(crate) fn audit(database: &Database, shift: &Shift) -> Vec<Check> {
    let conn = match database.open() {
        Ok(conn) => conn,
        Err(error) => return vec![Check::new("open", Err(error))],
    };
    let mut checks = vec![Check::new("processes", processes(shift))];
    checks.extend(CHECKS.map(|(name, check)| Check::new(name, check(&conn, &shift.records))));
    checks
}

impl Check {
    fn new(name: &'static str, outcome: Result<String>) -> Self {
        match outcome {
            Ok(detail) => Self { name, passed: true, detail },
            Err(error) => Self { name, passed: false, detail: error.to_string() },
        }
    }
}

fn processes(shift: &Shift) -> Result<String> {
    let killed = shift.records.iter().filter(|record| record.killed).count();
    nothing_in(&shift.failures)?;
    Ok(format!("{} ran, {killed} killed on purpose, none failed", shift.records.len()))
}

fn integrity(conn: &Connection, _: &[Record]) -> Result<String> {
    nothing_in(&damage(conn)?)?;
    Ok("ok".to_owned())
}

/// What `PRAGMA integrity_check` finds.
pub(crate) fn damage(conn: &Connection) -> rusqlite::Result<Vec<String>> {
    rows(conn, "SELECT * FROM pragma_integrity_check WHERE integrity_check <> 'ok'")
}

fn foreign_keys(conn: &Connection, _: &[Record]) -> Result<String> {
    nothing_in(&rows(conn, "SELECT * FROM pragma_foreign_key_check")?)?;
    Ok("ok".to_owned())
}

/// Every commit in the logs is in the database.
fn acknowledged(conn: &Connection, records: &[Record]) -> Result<String> {
    let mut lookup =
        conn.prepare("SELECT 1 FROM task_events WHERE worker = ?1 AND incarnation = ?2 AND seq = ?3")?;
    let (mut commits, mut lost) = (0_u64, Vec::new());
    for Record { job, .. } in workers(records) {
        for entry in acklog::entries(&job.log)? {
            let Entry::Commit { seq, .. } = entry? else { continue };
            commits += 1;
            if !lookup.exists(params![job.number, job.incarnation, seq])? {
                lost.push(format!("lost: commit {seq} of worker {}.{}", job.number, job.incarnation));
            }
        }
    }
    nothing_in(&lost)?;
    if commits == 0 {
        return Err("nothing was committed, so nothing was audited".into());
    }
    Ok(format!("all {commits} are in the database"))
}

/// A commit without acknowledgement is the last one of a killed process; and no commit comes from nowhere.
fn unacknowledged(conn: &Connection, records: &[Record]) -> Result<String> {
    let mut count = conn.prepare(
        "SELECT count(*), coalesce(sum(seq > ?3), 0) FROM task_events WHERE worker = ?1 AND incarnation = ?2",
    )?;
    let (mut known, mut in_flight, mut wrong) = (0_i64, 0_i64, Vec::new());
    for Record { job, killed } in workers(records) {
        let last = last_acknowledged(&job.log)?;
        let (commits, beyond): (i64, i64) = count
            .query_row(params![job.number, job.incarnation, last], |row| Ok((row.get(0)?, row.get(1)?)))?;
        known += commits;
        in_flight += beyond;
        if beyond > i64::from(*killed) {
            wrong.push(format!("{beyond} commits of worker {}.{} not logged", job.number, job.incarnation));
        }
    }
    let all: i64 = conn.query_row("SELECT count(*) FROM task_events", [], |row| row.get(0))?;
    if all != known {
        wrong.push(format!("{all} commits in the database, {known} by known processes"));
    }
    nothing_in(&wrong)?;
    Ok(format!("{in_flight} by killed processes, none by others"))
}

fn last_acknowledged(log: &Path) -> Result<i64> {
    let mut last = 0;
    for entry in acklog::entries(log)? {
        if let Entry::Commit { seq, .. } = entry? {
            last = seq;
        }
    }
    Ok(last)
}

fn counters(conn: &Connection, _: &[Record]) -> Result<String> {
    nothing_in(&board::disagreements(conn, Counted::default().advance(conn)?, true)?)?;
    Ok("each is what it counts".to_owned())
}

fn statuses(conn: &Connection, _: &[Record]) -> Result<String> {
    let findings = rows(
        conn,
        "SELECT 'task', t.id, 'is', t.status, 'its last event says', e.status
         FROM tasks t
         LEFT JOIN task_events e ON e.id = (SELECT max(id) FROM task_events WHERE task_id = t.id)
         WHERE e.status IS NOT t.status",
    )?;
    nothing_in(&findings)?;
    Ok("each is what the task's last event says".to_owned())
}

fn runs(conn: &Connection, _: &[Record]) -> Result<String> {
    let findings = rows(
        conn,
        "SELECT 'task', t.id, 'is', t.status, 'open runs:', count(r.id)
         FROM tasks t LEFT JOIN task_runs r ON r.task_id = t.id AND r.outcome IS NULL
         GROUP BY t.id HAVING count(r.id) <> (t.status = 'doing')",
    )?;
    nothing_in(&findings)?;
    Ok("one is open for each task in doing, none else".to_owned())
}

fn migrations(conn: &Connection, _: &[Record]) -> Result<String> {
    let version: u32 = conn.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let made: u32 =
        conn.query_row("SELECT count(*) FROM task_events WHERE kind = 'migrate'", [], |row| row.get(0))?;
    let steps = MIGRATIONS.len();
    if version as usize != steps || made as usize != steps {
        return Err(format!("user_version is {version}, {made} made, of {steps}").into());
    }
    Ok(format!("each of {steps} made once"))
}

/// Each worker's scratch table is where the worker's last change of the schema left it.
fn schema(conn: &Connection, records: &[Record]) -> Result<String> {
    let mut last = conn.prepare(
        "SELECT kind FROM task_events WHERE worker = ?1 AND kind LIKE '% %' ORDER BY id DESC LIMIT 1",
    )?;
    let mut wrong = Vec::new();
    for Record { job, .. } in workers(records).filter(|record| record.job.incarnation == 1) {
        let kind: Option<String> = last.query_row([job.number], |row| row.get(0)).optional()?;
        let expected = DDL.iter().position(|(name, _)| Some(*name) == kind.as_deref());
        let expected = expected.map_or(0, |index| (index + 1) % DDL.len());
        let stage = board::ddl_stage(conn, job.number)?;
        if stage != expected {
            wrong.push(format!("scratch_{} is at stage {stage}, not {expected}", job.number));
        }
    }
    nothing_in(&wrong)?;
    let changes: i64 =
        conn.query_row("SELECT count(*) FROM task_events WHERE kind LIKE '% %'", [], |row| row.get(0))?;
    Ok(format!("{changes} changes, the schema is what they made it"))
}

fn snapshots(_: &Connection, records: &[Record]) -> Result<String> {
    let (mut good, mut violations) = (0_u64, Vec::new());
    for Record { job, .. } in records {
        for entry in acklog::entries(&job.log)? {
            match entry? {
                Entry::Snapshot { .. } => good += 1,
                Entry::Violation(what) => {
                    violations.push(format!("{} {}: {what}", job::name(job.role), job.number));
                }
                Entry::Commit { .. } | Entry::Busy { .. } | Entry::Did { .. } => {}
            }
        }
    }
    nothing_in(&violations)?;
    Ok(format!("{good}, each in agreement with itself"))
}

fn workers(records: &[Record]) -> impl Iterator<Item = &Record> {
    records.iter().filter(|record| record.job.role == Role::Worker)
}

/// The result of a query that should find nothing, one text for each row.
fn rows(conn: &Connection, sql: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = conn.prepare(sql)?;
    let columns = statement.column_count();
    let text = |row: &rusqlite::Row<'_>| -> rusqlite::Result<String> {
        let values: Vec<String> =
            (0..columns).map(|i| row.get(i).map(show)).collect::<rusqlite::Result<_>>()?;
        Ok(values.join(" "))
    };
    statement.query_map([], text)?.collect()
}

fn show(value: Value) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::Integer(integer) => integer.to_string(),
        Value::Real(real) => real.to_string(),
        Value::Text(text) => text,
        Value::Blob(blob) => format!("{} bytes", blob.len()),
    }
}

/// An error that names the first few findings, if there are any.
fn nothing_in(findings: &[String]) -> Result<()> {
    if findings.is_empty() {
        return Ok(());
    }
    let mut text = findings.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    if findings.len() > SHOWN {
        text.push_str(&format!("; and {} more", findings.len() - SHOWN));
    }
    Err(text.into())
}
