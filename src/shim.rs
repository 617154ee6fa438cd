//! One registered VFS: the copy of SQLite that it serves, the VFS that it wraps, and its defaults.
//!
//! Leaked at registration and never freed or changed: open files and SQLite's list of VFSes point to it.
//!
//! Uses: `host`, `real`, `options`.

use std::ffi::CString;

use crate::host::Host;
use crate::options::Options;
use crate::real::RealVfs;

/// What `sqlite3_vfs.pAppData` points to.
#[derive(Debug)]
pub struct Shim {
    /// The copy of SQLite that calls us.
    pub host: Host,
    /// The VFS that we call.
    pub real: RealVfs,
    /// The name that we are registered under.
    pub name: CString,
    /// What it was registered with.
    pub options: Options,
}
