//! The lines of SQLite's log as events of the crates `log` and `tracing`, where the features of those names are on.
//!
//! Without the features nothing is kept and nothing delivered: `ENABLED` is false, and the compiler drops the rest.
//!
//! ## Key operations
//! [`note`] keeps an event in the thread. [`deliver`] hands what was kept to the application's logger.
//!
//! ## Invariants
//! - A logger is called where its thread is in no lock call: a connection has just given up its last lock, is about to
//!   sleep, was opened or closed. A line comes up earlier, with locks of SQLite's or the gate held, and in a hook of `ofd.rs`
//!   even os_unix's mutexes, which are not recursive. So a logger may use SQLite, and kanbanlock, itself.
//! - What a logger does makes no further events: they would come back to it without end. SQLite's log has the lines.
//! - A panic of a logger ends here. The panic hook has said what there is to say.
//!
//! Uses: `error`, `sys`.

#![cfg_attr(not(any(feature = "log", feature = "tracing")), allow(dead_code))]

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

#[cfg(any(feature = "log", feature = "tracing"))]
use crate::error::rc;
use crate::sys::ErrnoGuard;

/// Somebody wants events.
pub const ENABLED: bool = cfg!(any(feature = "log", feature = "tracing"));

/// The events' target.
#[cfg(any(feature = "log", feature = "tracing"))]
const TARGET: &str = "kanbanlock";

/// So many are kept in a thread; SQLite's log has them all. (A thread whose connections are all plain `unix` ones
/// comes by the hooks of `ofd.rs`, and delivers nothing.)
const LIMIT: usize = 32;

/// What a line is about, where that is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct About<'a> {
    /// The database file.
    pub database: Option<&'a CStr>,
    /// How long a connection has waited for the gate.
    pub waited_ms: Option<u64>,
}

struct Event {
    code: c_int,
    database: Option<String>,
    waited_ms: Option<u64>,
    message: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Nothing,
    Pending,
    Delivering,
}

thread_local! {
    static STAGE: Cell<Stage> = const { Cell::new(Stage::Nothing) };
    static PENDING: RefCell<Vec<Event>> = const { RefCell::new(Vec::new()) };
}

/// Keeps a line for [`deliver`]. Its level: SQLITE_NOTICE is information, SQLITE_WARNING a warning, the rest are errors.
pub fn note(code: c_int, message: &str, about: About) {
    if !ENABLED || STAGE.get() == Stage::Delivering {
        return;
    }
    let event = Event {
        code,
        database: about.database.map(|path| path.to_string_lossy().into_owned()),
        waited_ms: about.waited_ms,
        // The target says it.
        message: message.strip_prefix("kanbanlock: ").unwrap_or(message).to_owned(),
    };
    // No thread-local storage any more: the thread is about to end.
    let _ = PENDING.try_with(|pending| {
        let mut pending = pending.borrow_mut();
        if pending.len() < LIMIT {
            pending.push(event);
        }
        STAGE.set(Stage::Pending);
    });
}

/// Hands over what this thread has kept. To be called with no lock held, and no borrow of a cell.
#[inline]
pub fn deliver() {
    if ENABLED && STAGE.get() == Stage::Pending {
        deliver_all();
    }
}

#[cold]
#[inline(never)]
fn deliver_all() {
    let _errno = ErrnoGuard::new();
    STAGE.set(Stage::Delivering);
    for event in PENDING.try_with(RefCell::take).unwrap_or_default() {
        for emit in LOGGERS {
            // What a panic carries is not dropped: that may panic, too.
            catch_unwind(AssertUnwindSafe(|| emit(&event))).unwrap_or_else(std::mem::forget);
        }
    }
    STAGE.set(Stage::Nothing);
}

const LOGGERS: &[fn(&Event)] = &[
    #[cfg(feature = "log")]
    to_log,
    #[cfg(feature = "tracing")]
    to_tracing,
];

#[cfg(feature = "log")]
fn to_log(event: &Event) {
    let level = match event.code {
        rc::NOTICE => log::Level::Info,
        rc::WARNING => log::Level::Warn,
        _ => log::Level::Error,
    };
    let Event { code, database, waited_ms, message } = event;
    log::log!(target: TARGET, level, code = *code, database = database.as_deref(), waited_ms = *waited_ms; "{message}");
}

#[cfg(feature = "tracing")]
fn to_tracing(event: &Event) {
    let Event { code, database, waited_ms, message } = event;
    // A call site has one level.
    macro_rules! event {
        ($level:ident) => {
            tracing::event!(
                target: TARGET,
                tracing::Level::$level,
                code,
                database = database.as_deref(),
                waited_ms,
                "{message}"
            )
        };
    }
    match *code {
        rc::NOTICE => event!(INFO),
        rc::WARNING => event!(WARN),
        _ => event!(ERROR),
    }
}
