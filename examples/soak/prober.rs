//! # The stray-close prober
//!
//! A thread that opens and closes the files of the database, as a backup tool, a checksum or a `File::open` to see
//! whether it exists would in the same process. POSIX drops all of the process' fcntl locks on a file when any
//! descriptor of it is closed (fcntl(2)); close-proof locks are not dropped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::place::beside;

/// SQLite's files, and the gate's.
const SUFFIXES: [&str; 5] = ["", "-shm", "-wal", "-journal", ".lock"];
/// The pace of the workload.
const PAUSE: Duration = Duration::from_millis(1);

/// Counts the stray closes of this process, which go on until it ends.
pub(crate) struct Prober(Arc<AtomicU64>);

impl Prober {
    /// Starts the thread.
    pub(crate) fn start(db: &Path) -> Self {
        let files: Vec<PathBuf> = SUFFIXES.iter().map(|suffix| beside(db, suffix)).collect();
        let closes = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&closes);
        thread::spawn(move || {
            loop {
                // Dropped, so closed, at once.
                let closed = files.iter().filter(|file| File::open(file).is_ok()).count();
                counter.fetch_add(closed as u64, Ordering::Relaxed);
                thread::sleep(PAUSE);
            }
        });
        Self(closes)
    }

    /// How many there were since the last call.
    pub(crate) fn take(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed)
    }
}
