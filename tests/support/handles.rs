//! Several database handles in one process, each on a thread of its own.
//!
//! A handle is one connection that does as it is ordered, one order after another. It has a thread because a
//! cursor, a SELECT left open between two orders, borrows its connection: it stays on the thread's stack while
//! the thread takes further orders for the same connection. No order is left unanswered, whatever it is.

use std::ffi::c_int;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Rows, ffi};
use serde::{Deserialize, Serialize};

use super::agent::{Reply, failure};

/// What a handle can do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Open by URI, `busy_timeout` 0. A handle that is open is closed first.
    Open(String),
    Close,
    /// One statement, to its end.
    Run(String),
    /// One SELECT, to its first row, and left open. A cursor that is open is ended first.
    Cursor(String),
    /// The cursor's next row.
    Step,
    EndCursor,
}

/// What a handle answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// All rows as text, or the error.
    pub result: Reply,
    pub transaction: Transaction,
    /// False between BEGIN and its end.
    pub autocommit: bool,
}

/// `sqlite3_txn_state` of the main database (BEGIN IMMEDIATE also locks the temporary one, which is private).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transaction {
    None,
    Read,
    Write,
}

/// In place of an SQLite result code: the handle is not open.
pub const CLOSED: c_int = -2;

/// The handles of a process, by number; each comes to be with its first order.
#[derive(Default)]
pub struct Handles(Vec<(Sender<Order>, Receiver<Answer>)>);

impl Handles {
    pub fn obey(&mut self, number: usize, order: Order) -> Answer {
        self.give(number, order);
        self.answer_of(number)
    }

    /// Does not wait for the answer.
    pub fn give(&mut self, number: usize, order: Order) {
        while self.0.len() <= number {
            let (orders_in, orders) = channel();
            let (answers, answers_out) = channel();
            std::thread::spawn(move || Handle { orders, answers }.serve());
            self.0.push((orders_in, answers_out));
        }
        self.0[number].0.send(order).unwrap();
    }

    /// Waits for the answer to [`Handles::give`].
    pub fn answer_of(&mut self, number: usize) -> Answer {
        self.0[number].1.recv().unwrap()
    }
}

struct Handle {
    orders: Receiver<Order>,
    answers: Sender<Answer>,
}

impl Handle {
    fn serve(self) {
        let mut db = None;
        let mut next = self.orders.recv().ok();
        while let Some(order) = next {
            next = match (order, &db) {
                (Order::Cursor(sql), Some(open)) => self.serve_with_cursor(open, &sql),
                (order, _) => {
                    let result = perform(&mut db, order);
                    self.answer(db.as_ref(), result)
                }
            };
        }
    }

    /// Serves until an order comes that ends the cursor, and returns that order.
    fn serve_with_cursor(&self, db: &Connection, sql: &str) -> Option<Order> {
        let mut statement = match db.prepare(sql) {
            Ok(statement) => statement,
            Err(error) => return self.answer(Some(db), Err(failure(error))),
        };
        let mut rows = statement.raw_query();
        let mut next = self.answer(Some(db), step(&mut rows));
        loop {
            next = match next? {
                Order::Step => self.answer(Some(db), step(&mut rows)),
                Order::Run(sql) => self.answer(Some(db), run(db, &sql)),
                order @ (Order::Open(_) | Order::Close | Order::Cursor(_) | Order::EndCursor) => {
                    return Some(order);
                }
            };
        }
    }

    /// Answers, and waits for the next order.
    fn answer(&self, db: Option<&Connection>, result: Reply) -> Option<Order> {
        let answer = Answer {
            result,
            transaction: db.map_or(Transaction::None, transaction),
            autocommit: db.is_none_or(Connection::is_autocommit),
        };
        self.answers.send(answer).ok()?;
        self.orders.recv().ok()
    }
}

/// An order to a handle that has no cursor.
fn perform(db: &mut Option<Connection>, order: Order) -> Reply {
    match (order, db.as_ref()) {
        (Order::Open(uri), _) => {
            close(db)?;
            let new = Connection::open(uri).map_err(failure)?;
            new.busy_timeout(Duration::ZERO).map_err(failure)?;
            *db = Some(new);
            Ok(String::new())
        }
        (_, None) => Err((CLOSED, "not open".to_owned())),
        (Order::Close, _) => close(db),
        (Order::Run(sql), Some(db)) => run(db, &sql),
        (Order::Step | Order::EndCursor | Order::Cursor(_), _) => Ok("no cursor".to_owned()),
    }
}

fn close(db: &mut Option<Connection>) -> Reply {
    match db.take().map(Connection::close) {
        None | Some(Ok(())) => Ok(String::new()),
        Some(Err((_, error))) => Err(failure(error)),
    }
}

fn run(db: &Connection, sql: &str) -> Reply {
    let mut statement = db.prepare(sql).map_err(failure)?;
    let mut rows = statement.raw_query();
    let mut text = String::new();
    while let Some(row) = next_row(&mut rows)? {
        text.push_str(&row);
        text.push('\n');
    }
    Ok(text)
}

fn step(rows: &mut Rows<'_>) -> Reply {
    Ok(next_row(rows)?.unwrap_or_else(|| "no more rows".to_owned()))
}

fn next_row(rows: &mut Rows<'_>) -> Result<Option<String>, (c_int, String)> {
    let Some(row) = rows.next().map_err(failure)? else { return Ok(None) };
    let columns = row.as_ref().column_count();
    let column = |index| match row.get_ref_unwrap(index) {
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        value => format!("{value:?}"),
    };
    Ok(Some((0..columns).map(column).collect::<Vec<_>>().join("|")))
}

fn transaction(db: &Connection) -> Transaction {
    // SAFETY: an open connection, and a NUL-terminated schema name.
    match unsafe { ffi::sqlite3_txn_state(db.handle(), c"main".as_ptr()) } {
        ffi::SQLITE_TXN_NONE => Transaction::None,
        ffi::SQLITE_TXN_READ => Transaction::Read,
        ffi::SQLITE_TXN_WRITE => Transaction::Write,
        other => panic!("sqlite3_txn_state: {other}"),
    }
}
