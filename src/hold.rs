//! The gate without a connection: [`Hold`].
//!
//! ## Key operations
//! [`Hold::acquire`] takes the gate as a connection would, in the queue with them; [`Hold::hand_down`] lets a program that is
//! started meanwhile write all the same (`inner_gates.rs`). Dropped, it closes the lock file and does not unlock it, so
//! that what it was handed down to keeps the gate.
//!
//! Uses: `gate`, `fork`, `host`, `wait`, `events`.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::events;
use crate::fork;
use crate::gate::{Fallback, LockFile, Waiting};
use crate::host::{Host, HostApi};
use crate::wait;

/// How long the first wait between two attempts is, and the longest, where there is no queue that ends it early.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(25);

/// The gate of a database, `flock(LOCK_EX)` on `<db>.lock`, held without a connection: nobody writes the database through
/// kanbanlock meanwhile, not even this process, but for the programs that it is [handed down](Hold::hand_down) to.
///
/// Readers go on. This is what `kanbanlock run` does:
///
/// ```no_run
/// use std::process::Command;
/// use std::time::Duration;
///
/// let patience = Some(Duration::from_secs(5));
/// let hold = kanbanlock::Hold::acquire("kanban.db".as_ref(), patience)?.ok_or("somebody else holds it")?;
/// let mut command = Command::new("./migrate.sh");
/// hold.hand_down(&mut command)?;
/// command.status()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Hold(LockFile);

/// Why a gate cannot be had at all; the text says what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldError(String);

impl fmt::Display for HoldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for HoldError {}

impl Hold {
    /// Takes the gate of the database at `database`, which must exist, and waits for it: at most `patience`, or for ever.
    /// `None`: others had it all the time.
    ///
    /// It waits in the queue of the connections that wait, and in its turn. With a patience of zero it tries once, and does
    /// not jump that queue.
    ///
    /// # Errors
    ///
    /// There is no such database, or its lock file cannot be used.
    pub fn acquire(database: &Path, patience: Option<Duration>) -> Result<Option<Hold>, HoldError> {
        let in_words = |error: &dyn fmt::Display| HoldError(format!("{}: {error}", database.display()));
        // As SQLite does: the lock file stands beside what a symbolic link leads to.
        let path = database.canonicalize().map_err(|error| in_words(&error))?;
        let path = CString::new(path.as_os_str().as_bytes()).map_err(|error| in_words(&error))?;
        fork::install(); // there need not be a registration
        let lock_file = LockFile::new(linked(), &path, Fallback::Refuse, Waiting { slice: 0, warn_after: 0 });
        let start = Instant::now();
        let mut pause = FIRST_PAUSE;
        while !lock_file.try_hold().map_err(HoldError)? {
            let left = patience.map_or(Duration::MAX, |patience| patience.saturating_sub(start.elapsed()));
            if left.is_zero() {
                wait::over();
                events::deliver();
                return Ok(None);
            }
            events::deliver();
            let now = pause.min(left);
            wait::sleep(u64::try_from(now.as_micros()).unwrap_or(u64::MAX), || std::thread::sleep(now));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(Some(Hold(lock_file)))
    }

    /// `<db>.lock`
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Lets the program of `command` write the database, and what that starts in turn. To be called before it is started;
    /// `command` is to be dropped afterwards, since it shares in the gate.
    ///
    /// The program inherits the gate's open file description, and the environment variable `KANBANLOCK_HELD` that tells
    /// its kanbanlock which one that is. **Whoever has inherited it holds the gate too**, for as long as it lives or has
    /// that descriptor open: also a background process that outlives this `Hold`.
    ///
    /// # Errors
    ///
    /// No descriptor left (EMFILE).
    pub fn hand_down(&self, command: &mut Command) -> io::Result<()> {
        self.0.hand_down(command)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.leave_to_heirs();
        events::deliver();
    }
}

fn linked() -> Host {
    // SAFETY: HostApi::linked names the functions of the one SQLite that is linked into this binary, which is not unloaded
    // before the process ends.
    unsafe { Host::new(HostApi::linked()) }
}
