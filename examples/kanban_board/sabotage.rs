//! # Sabotage: the audit fails when it should
//!
//! Damages a board in ways that only one check of the audit each can notice.

use clap::ValueEnum;
use rusqlite::TransactionBehavior;

use super::Result;
use super::board::Database;

/// Ways to damage the board, each of which only one check of the audit can notice.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Sabotage {
    /// Take an acknowledged commit's event away and correct the counter
    LoseCommit,
    /// Change a counter
    SkewCounter,
    /// Change a task's status and correct the counters
    FlipStatus,
}

/// Damages the board; says how.
pub(crate) fn sabotage(database: &Database, how: Sabotage) -> Result<&'static str> {
    // A create is never a task's last event once the task was claimed, and was surely acknowledged if the same
    // incarnation committed again.
    let (what, first, then) = match how {
        Sabotage::LoseCommit => (
            "took an acknowledged commit's event away",
            "DELETE FROM task_events WHERE id = (
                 SELECT c.id FROM task_events c JOIN task_events l USING (worker, incarnation)
                 WHERE c.kind = 'create' AND l.seq > c.seq
                   AND EXISTS (SELECT 1 FROM task_events n WHERE n.task_id = c.task_id AND n.id > c.id)
                 LIMIT 1)",
            "UPDATE counters SET value = value - 1 WHERE name = 'events'",
        ),
        Sabotage::SkewCounter => {
            ("added 1 to a counter", "UPDATE counters SET value = value + 1 WHERE name = 'done'", "")
        }
        Sabotage::FlipStatus => (
            "set a finished task to todo",
            "UPDATE tasks SET status = 'todo' WHERE id = (SELECT id FROM tasks WHERE status = 'done' LIMIT 1)",
            "UPDATE counters SET value = value + iif(name = 'todo', 1, -1) WHERE name IN ('todo', 'done')",
        ),
    };
    let mut conn = database.open()?;
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if tx.execute(first, [])? != 1 {
        return Err("--sabotage: nothing to damage yet; run for longer".into());
    }
    tx.execute_batch(then)?;
    tx.commit()?;
    Ok(what)
}
