//! Who competes: ways to open the database and to wait for one's turn.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};

use crate::Result;

/// The longest that every variant waits within one statement.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How a client waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Waiting {
    /// `sqlite3_busy_timeout(5000)`: SQLite's own handler, 1, 2, 5 … 100 ms.
    BusyTimeout,
    /// A busy handler of the application's that sleeps 1 ms at a time, not through SQLite, for up to 5 s.
    OwnHandler,
    /// Every second client the one, every second the other.
    Mixed,
}

/// One competitor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Variant {
    pub(crate) name: String,
    /// URI parameters beside `vfs=kanbanlock`, without a leading `&`; None: stock SQLite, `vfs=unix`.
    pub(crate) kanbanlock: Option<String>,
    pub(crate) waiting: Waiting,
    /// The application takes a blocking flock of its own around each transaction.
    pub(crate) app_flock: bool,
}

/// The baseline of all ratios.
pub(crate) const STOCK: &str = "stock";
/// What README's table shows beside it.
pub(crate) const KANBANLOCK: &str = "kanbanlock";

impl Variant {
    /// All that have a name by themselves: the first four are the default.
    pub(crate) fn named(parameters: &str) -> [Self; 6] {
        let variant = |name: &str, shimmed: bool, waiting, app_flock| Self {
            name: name.to_owned(),
            kanbanlock: shimmed.then(|| parameters.to_owned()),
            waiting,
            app_flock,
        };
        [
            variant(STOCK, false, Waiting::BusyTimeout, false),
            variant("stock-1ms", false, Waiting::OwnHandler, false),
            variant("app-flock", false, Waiting::BusyTimeout, true),
            variant(KANBANLOCK, true, Waiting::BusyTimeout, false),
            variant("kanbanlock-1ms", true, Waiting::OwnHandler, false),
            variant("kanbanlock-mixed", true, Waiting::Mixed, false),
        ]
    }

    /// kanbanlock with these URI parameters.
    pub(crate) fn kanbanlock(name: &str, parameters: &str) -> Self {
        Self {
            name: name.to_owned(),
            kanbanlock: Some(parameters.to_owned()),
            waiting: Waiting::BusyTimeout,
            app_flock: false,
        }
    }

    /// Opens `database` as client number `client` of this variant does. An unknown VFS or parameter is an error of
    /// SQLite's.
    pub(crate) fn open(&self, database: &Path, client: u32) -> Result<Connection> {
        let path = database.to_str().ok_or("the database's path is not UTF-8")?;
        if path.contains(['?', '#', '%']) {
            return Err(format!("{path} would have to be escaped in a URI: choose another --dir").into());
        }
        let uri = match &self.kanbanlock {
            None => format!("file:{path}?vfs=unix"),
            Some(parameters) => format!("file:{path}?vfs={}&{parameters}", kanbanlock::VFS_NAME),
        };
        let flags =
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection =
            Connection::open_with_flags(&uri, flags).map_err(|error| format!("{uri}: {error}"))?;
        match (self.waiting, client % 2) {
            (Waiting::BusyTimeout, _) | (Waiting::Mixed, 0) => connection.busy_timeout(BUSY_TIMEOUT)?,
            (Waiting::OwnHandler | Waiting::Mixed, _) => connection.busy_handler(Some(sleep_1_ms))?,
        }
        Ok(connection)
    }
}

thread_local! {
    /// When the present wait began.
    static WAITING_SINCE: std::cell::Cell<Option<Instant>> = const { std::cell::Cell::new(None) };
}

/// The busy handler that users write: again after a millisecond, for up to [`BUSY_TIMEOUT`].
fn sleep_1_ms(calls_before: i32) -> bool {
    if calls_before == 0 {
        WAITING_SINCE.set(Some(Instant::now()));
    }
    let in_time = WAITING_SINCE.get().is_some_and(|since| since.elapsed() < BUSY_TIMEOUT);
    if in_time {
        std::thread::sleep(Duration::from_millis(1));
    }
    in_time
}
