//! Cross-process write serialization for SQLite, as a VFS.
//!
//! A VFS named `kanbanlock` wraps SQLite's default unix VFS. When SQLite takes a write lock, the shim also
//! takes `flock(LOCK_EX)` on `<db>.lock`, and holds it exactly as long. Nothing in the application changes but
//! the name that it opens:
//!
//! ```
//! use rusqlite::Connection;
//!
//! kanbanlock::register()?; // once, at start-up
//! # let dir = tempfile::tempdir()?;
//! # std::env::set_current_dir(dir.path())?;
//! let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
//! db.execute_batch("CREATE TABLE task (title TEXT); INSERT INTO task VALUES ('write docs')")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it does not do
//!
//! - Writers that do not go through it (`sqlite3` without the VFS, say) are excluded by SQLite's own locks
//!   alone, as ever.
//! - A transaction that begins as a reader (`BEGIN`, `BEGIN DEFERRED`) and then writes still gets SQLITE_BUSY
//!   at once if another has written meanwhile: no VFS can change that. Use `BEGIN IMMEDIATE`.
//! - Processes without it lose their own locks by a stray `close()`, as ever.
//! - Linux only so far, on a local file system.
//!
//! # Options
//!
//! As URI parameters of one connection, or as [`Options`] of a registration:
//!
//! | URI parameter | values | meaning |
//! |---|---|---|
//! | `kanbanlock_checkpoint` | `auto` (default), `free`, `gate` | [`CheckpointPolicy`] |
//! | `kanbanlock_fallback` | `refuse` (default), `unlocked` | [`Fallback`] |
//! | `kanbanlock_close_proof` | `on` (default), `off` | [`Options::close_proof`] |
//! | `kanbanlock_slice_us` | 0 to 100000 (default 1000) | [`Options::slice`] |
//! | `kanbanlock_warn_ms` | 0 to 4294967295 (default 2000; 0: never) | [`Options::warn_after`] |
//!
//! An unknown `kanbanlock_…` parameter or value fails the open with SQLITE_CANTOPEN, and a line in SQLite's
//! error log names it. Every refusal and warning of the shim goes to that log:
//! `rusqlite::trace::config_log`, `sqlite3_config(SQLITE_CONFIG_LOG, …)`.
//!
//! `PRAGMA kanbanlock` answers one row of JSON: what holds for this connection, and [`stats()`].
//!
//! # How it is built
//!
//! ARCHITECTURE.md in the repository; the transition table is in `src/state.rs`.

#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::incompatible_msrv))]
#![warn(clippy::multiple_unsafe_ops_per_block)]

#[cfg(not(target_os = "linux"))]
compile_error!("kanbanlock supports Linux only so far");

// Which may use which is in ARCHITECTURE.md, and enforced by tests/tidy.rs.
mod driver;
mod error;
mod events;
pub mod ffi;
mod file;
mod fork;
mod gate;
mod held;
mod hint;
mod hold;
mod host;
mod inspect;
mod io;
mod lock;
mod ofd;
mod options;
mod place;
mod queue;
mod real;
mod register;
mod shim;
mod state;
mod stats;
mod sys;
mod vfs;
mod wait;

#[cfg(test)]
mod tests;

pub use error::RegisterError;
pub use gate::Fallback;
pub use hold::{Hold, HoldError};
pub use host::HostApi;
pub use inspect::{Holder, Inspection, Queue, Waiter, inspect};
pub use options::Options;
pub use state::CheckpointPolicy;
pub use stats::Stats;

/// The name of the VFS, for `?vfs=kanbanlock`.
pub const VFS_NAME: &str = "kanbanlock";

/// Registers the VFS [`VFS_NAME`] with the SQLite that this binary is linked with: `Options::new().register()`.
///
/// Idempotent and thread-safe. Call it once, before the first connection is opened.
///
/// # Errors
///
/// See [`Options::register`].
pub fn register() -> Result<(), RegisterError> {
    Options::new().register()
}

impl Options {
    /// Registers a VFS with these options with the SQLite that this binary is linked with.
    ///
    /// Idempotent and thread-safe: again with equal options, it succeeds and changes nothing. Only
    /// [`make_default`](Options::make_default) may be added later.
    ///
    /// # Errors
    ///
    /// [`RegisterError`] says what to do. Nothing was registered then.
    pub fn register(&self) -> Result<(), RegisterError> {
        // SAFETY: HostApi::linked names the functions of the one SQLite that is linked into this binary; a
        // linked library is not unloaded before the process ends.
        unsafe { register::register_with(HostApi::linked(), self) }
    }
}

/// Registers a VFS with another copy of SQLite in this process.
///
/// # Safety
///
/// Every function of `api` is the one that its field names, all of one and the same copy of SQLite, and that
/// copy stays loaded until the process ends.
///
/// # Errors
///
/// See [`Options::register`].
pub unsafe fn register_with(api: HostApi, options: &Options) -> Result<(), RegisterError> {
    // SAFETY: as the caller says.
    unsafe { register::register_with(api, options) }
}

/// What kanbanlock has done in this process so far, over all its connections.
pub fn stats() -> Stats {
    stats::snapshot()
}
