//! What the examples share: a directory of their own, a look at the lock file, a claim that is checked, and a
//! child process that ends with them.
//!
//! Not needed in an app. Each example does what an app does in its own file.

use std::error::Error;
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::process::Child;

use tempfile::TempDir;

/// Makes a new directory and works in it, so that the examples can name their files as an app would:
/// `kanban.db`. It is removed when the result is dropped, so keep that longer than any connection.
pub fn enter_fresh_dir() -> io::Result<TempDir> {
    let dir = tempfile::tempdir()?;
    std::env::set_current_dir(dir.path())?;
    Ok(dir)
}

/// True while any connection of any process holds `flock(LOCK_EX)` on `<database>.lock`.
///
/// It tries the lock itself, through a descriptor of its own: `File::try_lock` is `flock(LOCK_EX | LOCK_NB)` on
/// Linux. A lock that was free is given back when the descriptor is closed, on return.
#[allow(clippy::incompatible_msrv, reason = "rust-version is the library's; File::try_lock needs 1.89")]
pub fn is_locked(database: &str) -> io::Result<bool> {
    let path = format!("{database}.lock");
    let in_context = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
    let lock_file = File::open(&path).map_err(in_context)?;
    match lock_file.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(in_context(error)),
    }
}

/// Prints the claim if it holds, and otherwise is an error: an example never prints what is not so.
pub fn check(claim: &str, holds: bool) -> Result<(), Box<dyn Error>> {
    if !holds {
        return Err(format!("this does not hold: {claim}").into());
    }
    writeln!(io::stdout(), "{claim}")?;
    Ok(())
}

/// A child process that does not outlive this value: an example that fails leaves nothing running.
#[allow(dead_code, reason = "not every example needs another process")]
pub struct ChildGuard(pub Child);

impl Drop for ChildGuard {
    fn drop(&mut self) {
        // Both do nothing if it has ended and been waited for, as it has unless the example failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
