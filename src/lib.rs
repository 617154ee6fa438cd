//! Cross-process write serialization for SQLite, as a VFS.
//!
//! Several processes write one SQLite file? Open it through this VFS, and every write transaction also holds
//! `flock(LOCK_EX)` on `<db>.lock`, in rollback mode and in WAL mode, DDL, VACUUM and checkpoints included. No call site can
//! forget it: SQLite itself asks for the lock. Your SQL stays as it is.
//!
//! # Start
//!
//! In Rust, with rusqlite, or any library that takes a SQLite URI:
//!
//! ```
//! use rusqlite::Connection;
//!
//! kanbanlock::register()?; // once, at start-up
//! # let dir = tempfile::tempdir()?;
//! # std::env::set_current_dir(dir.path())?;
//! let db = Connection::open("file:kanban.db?vfs=kanbanlock")?;
//! db.busy_timeout(std::time::Duration::from_secs(5))?; // waiting is in the order of arrival
//! db.execute_batch(
//!     "CREATE TABLE task (title TEXT);
//!      BEGIN IMMEDIATE; INSERT INTO task VALUES ('write docs'); COMMIT",
//! )?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! An app that opens by plain path asks for the default VFS to be kanbanlock, before its first connection:
//!
//! ```
//! kanbanlock::Options::new().make_default(true).register()?;
//! # let dir = tempfile::tempdir()?;
//! # std::env::set_current_dir(dir.path())?;
//! let db = rusqlite::Connection::open("kanban.db")?;
//! let status: String = db.query_row("PRAGMA kanbanlock", [], |row| row.get(0))?;
//! assert!(status.contains("\"vfs\":\"kanbanlock\""));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! In Python (`pip install ./python` in the repository; it builds the loadable extension):
//!
//! ```python
//! import kanbanlock
//! kanbanlock.register(default=True)     # or: db = kanbanlock.connect("kanban.db")
//! ```
//!
//! In the sqlite3 shell, with that extension:
//!
//! ```sql
//! .load /path/to/libkanbanlock.so
//! .open 'file:kanban.db?vfs=kanbanlock'
//! ```
//!
//! In a shell script the lock is flock(1)'s, and `cargo install kanbanlock --features cli` has a command for the rest:
//!
//! ```sh
//! kanbanlock status kanban.db     # who holds it, who waits, who does not go through it
//! kanbanlock doctor kanban.db     # what is wrong here, and how to put it right
//! ```
//!
//! # Limits first
//!
//! - Writers that do not go through it (`sqlite3` without the VFS, say) are excluded by SQLite's own locks
//!   alone, as ever.
//! - A transaction that begins as a reader (`BEGIN`, `BEGIN DEFERRED`) and then writes still gets SQLITE_BUSY
//!   at once if another has written meanwhile: no VFS can change that. Use `BEGIN IMMEDIATE`.
//! - Waiting is your busy timeout's: without one a refused lock is SQLITE_BUSY at once.
//! - Processes without it lose their own locks by a stray `close()`, as ever.
//! - Linux only so far, on a local file system: [which, and what was tried][file systems].
//! - After `fork()` the parent's connections are refused in the child: open new ones.
//!
//! The [README] has them all, a table of what it protects with the test that shows each, and what it costs; [FAQ] says why it
//! is made so.
//!
//! # Why
//!
//! Stock SQLite does lock across processes. What kanbanlock adds: its locks survive a stray `close()` elsewhere in the
//! process, which drops POSIX locks; two copies of SQLite in one process exclude each other; the WAL-reset race of SQLite
//! before 3.51.3 is closed; writers that wait are served in the order in which they came; a database, `-wal` or `-shm`
//! that was moved or deleted beneath a connection is noticed; and anything that can flock can hold writers off.
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
//! error log names it.
//!
//! `PRAGMA kanbanlock` answers one row of JSON: what holds for this connection, and [`stats()`].
//!
//! # Logging
//!
//! Every refusal and warning of the shim is a line in SQLite's error log: `rusqlite::trace::config_log`,
//! `sqlite3_config(SQLITE_CONFIG_LOG, …)`. With the feature `log` or `tracing` it is an event of the crate of that name,
//! too, with the target `kanbanlock`:
//!
//! | field | |
//! |---|---|
//! | message | the line, without `kanbanlock: ` |
//! | `code` | SQLite's result code: 28 (SQLITE_WARNING) is a warning, 27 (SQLITE_NOTICE) information, others are errors that the call returns |
//! | `database` | its path, if the line is about one |
//! | `waited_ms` | how long, if it is about a wait for the lock |
//!
//! A wait of [`Options::warn_after`] or longer makes two: a warning that names the holder, and information when it is
//! over (which SQLite's log does not have). Nothing is logged, or kept for it, where nobody waits and nothing is wrong.
//! Events come in the connection's thread, when the call that they are about has given up its locks; so a logger may use
//! SQLite, and even kanbanlock, though what *it* does makes no events. One that panics changes nothing. An application
//! that forwards SQLite's log to the same place has each line twice.
//!
//! # How it is built
//!
//! [ARCHITECTURE.md][architecture]; the transition table is in `src/state.rs`.
//!
//! [README]: https://github.com/kanbanlock/kanbanlock/blob/main/README.md
//! [FAQ]: https://github.com/kanbanlock/kanbanlock/blob/main/docs/FAQ.md
//! [file systems]: https://github.com/kanbanlock/kanbanlock/blob/main/docs/FILESYSTEMS.md
//! [architecture]: https://github.com/kanbanlock/kanbanlock/blob/main/ARCHITECTURE.md

#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::incompatible_msrv))]
#![warn(clippy::multiple_unsafe_ops_per_block)]

#[cfg(not(target_os = "linux"))]
compile_error!("kanbanlock supports Linux only so far");

// Which may use which is in ARCHITECTURE.md, and enforced by tests/tidy.rs.
mod descriptor;
mod driver;
mod error;
mod events;
pub mod ffi;
mod file;
mod fork;
mod gate;
mod hint;
mod hold;
mod holder;
mod host;
mod inherited;
mod inner_gates;
mod inspect;
mod io;
mod lock;
mod long_wait;
mod ofd;
mod options;
mod place;
mod queue;
mod real;
mod refusal;
mod register;
mod shim;
mod state;
mod stats;
mod sys;
mod vfs;
mod wait;

#[cfg(test)]
mod tests;

/// README's Rust blocks, compiled by `cargo test`.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

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
