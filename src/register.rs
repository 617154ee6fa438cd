//! Registration: once for each name and copy of SQLite in the process.
//!
//! ## Invariants
//! - Keyed by SQLite copy *and* name: one shared library loaded into two copies must not splice their lists of
//!   VFSes.
//! - What is registered is leaked, and never unregistered: a connection may outlive whoever registered.
//! - Registering again with equal options changes nothing, except that it repairs what `sqlite3_shutdown` and
//!   initialize undo ("unix" is then the default again).
//! - Whoever returns from here finds the VFS complete: the atfork handlers and the hooks of `ofd.rs` are in before
//!   SQLite gets the VFS, and a second caller waits for the first. Nothing is logged meanwhile: the callback is the
//!   application's. A fork waits too (`fork.rs`), so a child can register.
//! - Which VFS is the default belongs to the copy of SQLite, not to the VFS: a later registration may ask for it, and
//!   one that does not ask does not take it back.
//!
//! Uses: `vfs`, `shim`, `fork`, `inner_gates`, `ofd`, `host`, `events`, `real`, `options`, `ffi`, `error`.

use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{RegisterError, rc};
use crate::events::{self, About};
use crate::ffi;
use crate::fork;
use crate::host::{Host, HostApi};
use crate::inner_gates;
use crate::ofd;
use crate::options::Options;
use crate::real::RealVfs;
use crate::shim::Shim;
use crate::vfs;

/// The oldest SQLite whose interface the shim relies on.
const OLDEST: std::ffi::c_int = 3_014_000;

struct Registered {
    shim: &'static Shim,
    vfs: NonNull<ffi::sqlite3_vfs>,
    /// Some registration has asked for it.
    make_default: bool,
}

// SAFETY: a Shim is never written after it is made, what it points to is valid until the process ends, and
// SQLite itself calls it from every thread; `vfs` is only handed to SQLite, which guards its list by a mutex.
unsafe impl Send for Registered {}

/// The registrations of this process, and no fork while they are at hand. (Dropped in this order.)
struct Registry {
    list: MutexGuard<'static, Vec<Registered>>,
    _no_fork: MutexGuard<'static, ()>,
}

fn registry() -> Registry {
    static REGISTRY: Mutex<Vec<Registered>> = Mutex::new(Vec::new());
    let no_fork = fork::registering();
    // The list is pushed to, and a flag in it is set, so it is whole even if a thread panicked while it held the mutex.
    Registry { list: REGISTRY.lock().unwrap_or_else(PoisonError::into_inner), _no_fork: no_fork }
}

/// # Safety
///
/// As for [`Host::new`].
pub unsafe fn register_with(api: HostApi, options: &Options) -> Result<(), RegisterError> {
    // SAFETY: as the caller says.
    let host = unsafe { Host::new(api) };
    let name = CString::new(options.name.as_str()).ok().filter(|name| !name.is_empty());
    let Some(name) = name else { return Err(RegisterError::InvalidName { name: options.name.clone() }) };
    if !host.is_threadsafe() {
        return Err(RegisterError::SingleThreaded);
    }
    if host.version() < OLDEST {
        return Err(RegisterError::TooOld { version: host.version() });
    }

    fork::install(); // before the first mutex that a fork waits for
    inner_gates::is_inside(); // reads the variable now, and not beside a setenv(3) of some later thread's
    if let Some(new) = register_once(host, name, options)? {
        log_what_is_wrong(&new);
        events::deliver();
    }
    Ok(())
}

/// What to say of a new registration, once its mutexes are released.
struct New {
    shim: &'static Shim,
    is_first_of_copy: bool,
    not_close_proof: Option<ofd::Unavailable>,
}

/// `None`: it was registered before.
fn register_once(host: Host, name: CString, options: &Options) -> Result<Option<New>, RegisterError> {
    let mut registry = registry();
    let same_name = |one: &&mut Registered| one.shim.host.is_same_copy(&host) && one.shim.name == name;
    if let Some(registered) = registry.list.iter_mut().find(same_name) {
        if !registered.shim.options.is_same_vfs(options) {
            return Err(RegisterError::OptionsDiffer { name: options.name.clone() });
        }
        registered.make_default |= options.make_default;
        return publish(registered).map(|()| None);
    }
    if !host.vfs_find(Some(&name)).is_null() {
        return Err(RegisterError::NameTaken { name: options.name.clone() });
    }

    let real = find_real(&host, options, &registry.list)?;
    let shim: &'static Shim = Box::leak(Box::new(Shim { host, real, name, options: options.clone() }));
    let Some(structure) = vfs::structure(shim) else {
        return Err(RegisterError::RealVfsNotFound { name: options.real_vfs.clone() });
    };
    let not_close_proof = if options.close_proof { ofd::install(host, real).err() } else { None };
    let vfs = NonNull::from(Box::leak(Box::new(structure)));
    let registered = Registered { shim, vfs, make_default: options.make_default };
    publish(&registered)?;
    let is_first_of_copy = !registry.list.iter().any(|one| one.shim.host.is_same_copy(&host));
    registry.list.push(registered);
    Ok(Some(New { shim, is_first_of_copy, not_close_proof }))
}

fn publish(registered: &Registered) -> Result<(), RegisterError> {
    let Registered { shim, vfs, make_default } = *registered;
    // SAFETY: a complete VFS (vfs::structure), leaked, and registered with its own copy of SQLite only.
    let code = unsafe { shim.host.vfs_register(vfs.as_ptr(), make_default) };
    if code == rc::OK { Ok(()) } else { Err(RegisterError::Sqlite { code }) }
}

/// The VFS to wrap: the one that is asked for, or the default; if that is one of ours, what *it* wraps.
fn find_real(host: &Host, options: &Options, registry: &[Registered]) -> Result<RealVfs, RegisterError> {
    let name = options.real_vfs.as_deref();
    let not_found = || RegisterError::RealVfsNotFound { name: name.map(str::to_owned) };
    let c_name = name.map(CString::new).transpose().map_err(|_| not_found())?;
    let found = NonNull::new(host.vfs_find(c_name.as_deref())).ok_or_else(not_found)?;
    let real = match (registry.iter().find(|one| one.vfs == found), name) {
        (Some(_), Some(name)) => return Err(RegisterError::RealVfsIsKanbanlock { name: name.to_owned() }),
        (Some(ours), None) => ours.shim.real,
        // SAFETY: sqlite3_vfs_find returns a registered VFS; that it stays so is the caller's part.
        (None, _) => unsafe { RealVfs::new(found) },
    };
    if vfs::is_kanbanlock(real) {
        // Of another copy of this library, or with another VFS around it.
        return Err(RegisterError::RealVfsIsKanbanlock { name: real.name() });
    }
    match real.name() {
        // DOTLOCK_SUFFIX in os_unix.c: a directory at "<db>.lock".
        name if name == "unix-dotfile" => Err(RegisterError::RealVfsUsesLockFile { name }),
        _ => Ok(real),
    }
}

fn log_what_is_wrong(new: &New) {
    let host = new.shim.host;
    if let Some(reason) = new.not_close_proof {
        host.log(
            rc::WARNING,
            &format!(
                "kanbanlock: no close-proof locks for VFS {:?}: {reason}. A close() of the database elsewhere in \
                 this process cancels SQLite's own locks",
                new.shim.name
            ),
            About::default(),
        );
    }
    if new.is_first_of_copy && host.has_wal_reset_race() {
        warn_of_wal_reset_race(&host);
    }
}

fn warn_of_wal_reset_race(host: &Host) {
    let version = host.version();
    host.log(
        rc::WARNING,
        &format!(
            "kanbanlock: SQLite {}.{}.{} has the WAL-reset race (https://www.sqlite.org/wal.html#walresetbug), \
             which can corrupt a database in WAL mode. Writes through kanbanlock are protected; those of \
             processes without it are not. Upgrade to SQLite 3.51.3 or later",
            version / 1_000_000,
            version / 1000 % 1000,
            version % 1000,
        ),
        About::default(),
    );
}
