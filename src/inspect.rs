//! Looking on from outside: who holds the gate of a database, and who waits.
//!
//! Nothing is locked, created or written, so no writer is refused because somebody looks: whether the gate is held is read
//! in `/proc/locks` rather than tried, and the queue's board is mapped read-only. The database file is not opened.
//!
//! Uses: `gate`, `hint`, `holder`, `queue`, `sys`.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::gate::with_suffix;
use crate::hint::{self, NoBoard};
use crate::holder;
use crate::queue::{Glimpse, Micros};
use crate::sys;

/// What [`inspect()`] saw of one database's gate: a moment that may be over.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// `<db>.lock`, symbolic links to the database resolved. It need not exist: then nobody has written yet.
    pub lock_file: PathBuf,
    /// Who holds the gate; `None`: nobody in this pid namespace.
    pub holder: Option<Holder>,
    /// Who waits in the fair queue, the next first.
    pub waiters: Vec<Waiter>,
    /// Whether the queue could be seen.
    pub queue: Queue,
}

/// Who holds the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// The process that took the flock. Others may have inherited it (fork(2)), and it may have ended since.
    pub pid: u32,
    /// For how long, with milliseconds; `None`: the holder has not said, since it does not use kanbanlock or nobody has
    /// ever waited.
    pub held: Option<Duration>,
}

/// One that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiter {
    /// Its process.
    pub pid: u32,
    /// For how long.
    pub waiting: Duration,
    /// True: it sleeps in the queue and will be woken. False: it is about to try, or sleeps elsewhere.
    pub is_asleep: bool,
}

/// What is known of the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Queue {
    /// There is none: nobody has ever waited, or those who did are gone.
    None,
    /// It was seen. Counted since the queue was made, over all processes.
    #[non_exhaustive]
    Seen {
        /// Connections that have come to know of the queue.
        connections: u32,
        /// Waits that were begun.
        waits: u64,
        /// Releases of the gate while somebody waited, modulo 2³².
        releases: u32,
    },
    /// There is one, but it could not be looked at: why.
    Unseen(String),
}

/// Looks at the gate of the database `db`, without disturbing anybody.
///
/// Who holds the flock is what `/proc/locks` says (proc(5)), hence for processes of this pid namespace. The queue of
/// another user's processes is [`Queue::Unseen`] without the privilege to look into `/proc/PID/fd` (ptrace(2),
/// PTRACE_MODE_READ_FSCREDS).
///
/// # Errors
///
/// The database does not exist, or `/proc/locks` or the lock file's attributes cannot be read.
pub fn inspect(db: &Path) -> io::Result<Inspection> {
    let db = CString::new(db.canonicalize()?.into_os_string().into_vec())?;
    let path = with_suffix(&db, ".lock");
    let lock_file = PathBuf::from(std::ffi::OsStr::from_bytes(path.to_bytes()));
    let id = match sys::lstat(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Inspection { lock_file, holder: None, waiters: Vec::new(), queue: Queue::None });
        }
        attributes => attributes?.id,
    };
    let pid = holder::read_flock_holder(&path, id)?;
    let now = sys::micros();
    let elapsed = |since: Micros| Duration::from_micros(now.saturating_sub(since));
    let (glimpse, queue) = match hint::view(&path, id, |board| board.glimpse(now)) {
        Ok(glimpse) => {
            let Glimpse { seats, tickets, releases, .. } = glimpse;
            (Some(glimpse), Queue::Seen { connections: seats, waits: tickets, releases })
        }
        Err(NoBoard::Nobody) => (None, Queue::None),
        Err(NoBoard::Because(reason)) => (None, Queue::Unseen(reason)),
    };
    // What the board says is used only where the kernel says the same.
    let said = glimpse.as_ref().and_then(|glimpse| glimpse.holder);
    let held = |pid| said.filter(|(said, _)| *said == pid).map(|(_, since)| elapsed(since));
    let waiters = glimpse.map(|glimpse| glimpse.waiters).unwrap_or_default().into_iter();
    Ok(Inspection {
        lock_file,
        holder: pid.map(|pid| Holder { pid, held: held(pid) }),
        waiters: waiters
            .map(|(pid, since, is_asleep)| Waiter { pid, waiting: elapsed(since), is_asleep })
            .collect(),
        queue,
    })
}
