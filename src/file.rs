//! An open file of the shim, as it lies in SQLite's memory.
//!
//! ```text
//! sqlite3_file* ─►  ┌ ShimFile ──────────────┬ real file ─────────────┐
//!                   │ base.pMethods  open ───┼─► pMethods  …          │   szOsFile = ours + the real VFS's
//!                   └─────────────────│──────┴────────────────────────┘
//!                                     └─► OpenFile, on the heap: driver, gate, paths
//! ```
//!
//! Position-independent: nothing points into this memory, since appendvfs moves an open file object. Every
//! offset is a multiple of 8: the super-journal code of pager.c puts a second file at an unrounded `szOsFile`.
//!
//! Only main database files have this shape. Every other file (journals, WAL, temporary files) is opened by
//! the real VFS in the same memory, with its own methods, and never comes back to us.
//!
//! Uses: `driver`, `gate`, `lock`, `fork`, `inherited`, `ofd`, `place`, `real`, `shim`, `sys`, `stats`, `options`,
//! `events`, `error`, `ffi`.

use std::cell::Cell;
use std::ffi::{CStr, c_int};
use std::mem::{align_of, size_of};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use crate::driver::Driver;
use crate::error::rc;
use crate::events::About;
use crate::ffi;
use crate::fork;
use crate::gate::{Fallback, LockFile, with_suffix};
use crate::inherited;
use crate::lock::{Environment, Purpose};
use crate::ofd;
use crate::options::FileOptions;
use crate::place::{Names, Place};
use crate::real::{RealFile, WalIndex};
use crate::shim::Shim;
use crate::sys::{self, ErrnoGuard, FileId};

/// Our part of the memory; the real file lies right behind it.
#[repr(C)]
#[derive(Debug)]
struct ShimFile {
    base: ffi::sqlite3_file,
    open: *mut OpenFile,
}

const _: () = assert!(size_of::<ShimFile>() % 8 == 0, "the real file behind must be aligned");
const _: () = assert!(align_of::<ShimFile>() <= 8, "SQLite's memory is aligned to 8");

/// `szOsFile` for a shim around a VFS with files of `real` bytes.
pub fn shim_file_size(real: c_int) -> Option<c_int> {
    let ours = c_int::try_from(size_of::<ShimFile>()).ok()?;
    let sum = ours.checked_add(real)?;
    sum.checked_add(7).map(|padded| padded & !7)
}

/// `UNIX_SHM_DMS` (os_unix.c): "deadman switch". Who has a `-shm` open holds a read lock on this byte of it.
const SHM_DMS_BYTE: libc::off_t = 128;

/// What we know of an open database file.
#[derive(Debug)]
pub struct OpenFile {
    /// The locks.
    pub driver: Driver<LockFile>,
    /// The VFS that opened it.
    pub shim: &'static Shim,
    options: FileOptions,
    /// The database file; `None` if the real VFS keeps it where no path leads.
    id: Option<FileId>,
    /// Held as long as the file is open.
    _close_proof_wish: Option<ofd::Wish>,
    /// For the child of a fork; `None`: the real VFS has no hooks, so it cannot be cut off.
    pub inherited: Option<inherited::Record>,
    /// Its names, and whether they still lead to it.
    pub place: Place,
    /// The `fork::generation` that opened it.
    generation: u32,
    has_warned_inherited: Cell<bool>,
}

impl OpenFile {
    /// A database file just opened by the real VFS. `writable`: not SQLITE_OPEN_READONLY. One that is not has a gate for what
    /// it can write all the same: row L13.
    ///
    /// # Errors
    ///
    /// A message: it was replaced meanwhile, or cannot have the close-proof locks that it wishes for, or not do without.
    pub fn new(
        shim: &'static Shim,
        real: RealFile,
        database: &CStr,
        options: FileOptions,
        writable: bool,
    ) -> Result<OpenFile, String> {
        let gate = LockFile::new(shim.host, database, options.fallback, options.waiting);
        let driver =
            if writable { Driver::new(options.checkpoint, gate) } else { Driver::new_read_only(gate) };
        let names = Names {
            database: database.to_owned(),
            wal: with_suffix(database, "-wal"),
            shm: with_suffix(database, "-shm"),
        };
        // SQLite resolves symbolic links: a name that is one is not SQLite's, and no file has its place by it.
        let named = sys::lstat(database).ok();
        let has_place = named.is_some_and(|there| there.is_regular());
        let id = if has_place { named } else { sys::stat(database).ok() }.map(|there| there.id);
        // After lstat(2), so that `id` is what the real VFS has open.
        let has_moved = real.has_moved();
        if has_moved == Some(true) {
            return Err(format!("{} was replaced while it was being opened: open it again", path(database)));
        }
        let placed = id.filter(|_| has_place && has_moved == Some(false));
        let place = Place::new(shim.host, names, placed, options.fallback == Fallback::Unlocked);
        let close_proof_wish = match id {
            Some(id) => wish_for_close_proof(shim, id, place.names(), options)?,
            None => None,
        };
        let copy_index = ofd::copy_index(&shim.host, shim.real);
        let inherited = copy_index.zip(id).map(|(copy_index, id)| inherited::Record::new(copy_index, id));
        Ok(OpenFile {
            driver,
            shim,
            _close_proof_wish: close_proof_wish,
            id,
            options,
            inherited,
            place,
            generation: fork::generation(),
            has_warned_inherited: Cell::new(false),
        })
    }

    /// Runs `call`, unless this is the child of a fork and the file the parent's: then `failure`.
    #[inline]
    pub fn unless_inherited(&self, failure: c_int, call: impl FnOnce() -> c_int) -> c_int {
        if self.generation == fork::generation() { call() } else { self.refuse_inherited(failure) }
    }

    fn about(&self) -> About<'_> {
        About { database: Some(&self.place.names().database), waited_ms: None }
    }

    #[cold]
    fn refuse_inherited(&self, failure: c_int) -> c_int {
        if !self.has_warned_inherited.replace(true) {
            self.shim.host.log(
                failure,
                "kanbanlock: this connection was opened before fork() and is used in the child: it can neither lock nor \
                 write. Open a connection of its own in the child",
                self.about(),
            );
        }
        failure
    }

    #[cold]
    fn ask_who_uses_shm(&self) -> bool {
        let _errno = ErrnoGuard::new();
        let others = |shm| ofd::is_locked_by_others(&self.shim.host, self.shim.real, shm, SHM_DMS_BYTE);
        self.place.shm().and_then(others).unwrap_or(false)
    }

    /// The answer to `PRAGMA kanbanlock`: one row of JSON.
    pub fn status(&self) -> String {
        let state = self.driver.state();
        let lock_file = json_string(&self.driver.gate().path().to_string_lossy());
        let totals = crate::stats::snapshot();
        format!(
            "{{\"version\":{version},\"vfs\":{vfs},\"real_vfs\":{real_vfs},\"lock_file\":{lock_file},\
             \"close_proof\":{close_proof},\
             \"level\":\"{level}\",\"held\":{held},\"checkpoint\":\"{checkpoint}\",\"fallback\":\"{fallback}\",\
             \"process\":{{\"acquired\":{acquired},\"held\":{held_now},\"refused\":{refused},\
             \"replaced\":{replaced},\"unlocked\":{unlocked},\"resets_deferred\":{resets_deferred}}}}}",
            version = json_string(env!("CARGO_PKG_VERSION")),
            vfs = json_string(&self.shim.name.to_string_lossy()),
            real_vfs = json_string(&self.shim.real.name()),
            close_proof = self.id.is_some_and(|id| ofd::is_close_proof(&self.shim.host, self.shim.real, id)),
            level = state.level().name(),
            held = state.wants_gate(),
            checkpoint = self.options.checkpoint.as_str(),
            fallback = self.options.fallback.as_str(),
            acquired = totals.acquired,
            held_now = totals.held,
            refused = totals.refused,
            replaced = totals.replaced,
            unlocked = totals.unlocked,
            resets_deferred = totals.resets_deferred,
        )
    }
}

fn wish_for_close_proof(
    shim: &Shim,
    id: FileId,
    names: &Names,
    options: FileOptions,
) -> Result<Option<ofd::Wish>, String> {
    if options.close_proof == Some(true) {
        ofd::install(shim.host, shim.real)
            .map_err(|reason| format!("kanbanlock_close_proof=on is not possible here: {reason}"))?;
    }
    let is_close_proof = options.close_proof.unwrap_or(shim.options.close_proof);
    ofd::wish(&shim.host, shim.real, id, &names.shm, is_close_proof).map_err(|ofd::Contradiction| {
        let (wished, other) = if is_close_proof { ("on", "off") } else { ("off", "on") };
        format!(
            "{} is open in this process with kanbanlock_close_proof={other} (the plain unix VFS counts as on), and \
             cannot be opened with {wished} beside it: give all connections the same value, or close the others first",
            path(&names.database)
        )
    })
}

fn path(path: &CStr) -> std::borrow::Cow<'_, str> {
    path.to_string_lossy()
}

impl Environment for OpenFile {
    /// A WAL connection may hold SHARED for life then.
    fn shm_exists(&self) -> bool {
        let _errno = ErrnoGuard::new();
        sys::lstat(&self.place.names().shm).is_ok()
    }

    /// As `unixIsSharingShmNode` of SQLite 3.51; false if it cannot be known (no hooks, hence no table of locks).
    #[inline]
    fn others_use_shm(&self) -> bool {
        self.place.has_mapped_shm() && self.ask_who_uses_shm()
    }

    #[inline]
    fn check_places(&self, purpose: Purpose) -> Result<(), c_int> {
        self.place.check(purpose)
    }

    fn invalidate_place_check(&self) {
        self.place.doubt();
    }

    #[inline]
    fn wal_changes(&self) -> u32 {
        self.place.wal_index().map_or(0, WalIndex::changes)
    }

    fn wal_size(&self) -> u64 {
        self.place.wal_index().and_then(WalIndex::wal_size).unwrap_or(0)
    }
}

/// A string in JSON (RFC 8259, section 7).
fn json_string(text: &str) -> String {
    let mut json = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            c if c < ' ' => json.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => json.push(c),
        }
    }
    json.push('"');
    json
}

/// A handle to the memory of one file: a copied pointer, as `RealFile` is.
#[derive(Clone, Copy, Debug)]
pub struct FileHandle(NonNull<ShimFile>);

impl FileHandle {
    /// # Safety
    ///
    /// `file` points to `szOsFile` writable bytes of a VFS of ours, aligned to 8, which stay in place as long
    /// as the handle is used; and SQLite serialises the calls on this file.
    #[inline]
    pub unsafe fn new(file: *mut ffi::sqlite3_file) -> FileHandle {
        // SAFETY: SQLite never passes a null file, and the caller says that there is memory behind it.
        FileHandle(unsafe { NonNull::new_unchecked(file.cast()) })
    }

    /// The real file behind ours.
    #[inline]
    pub fn real(self) -> RealFile {
        // SAFETY: FileHandle::new: szOsFile bytes, of which ShimFile is only the first part (shim_file_size).
        let behind = unsafe { self.0.add(1) };
        // SAFETY: x_open has had the real VFS open its file here before any handle's real() is used, and it
        // stays open until x_close, the last call on the file.
        unsafe { RealFile::new(behind.cast()) }
    }

    /// "pMethods = NULL before anything can fail", here and in the real file behind: the memory is not zeroed, and a real
    /// VFS may fail without having touched it. (SQLite will not call xClose then, nor shall we.)
    pub fn set_closed(self) {
        let no_methods = || ffi::sqlite3_file { pMethods: std::ptr::null() };
        // SAFETY: FileHandle::new: szOsFile bytes, of which ShimFile is only the first part (shim_file_size).
        let behind = unsafe { self.0.add(1) };
        // SAFETY: the real file starts there, and its first field, pMethods, is a plain pointer, written without being read.
        unsafe { behind.cast::<ffi::sqlite3_file>().write(no_methods()) };
        // SAFETY: FileHandle::new: writable memory; both fields are plain pointers, written without being read.
        unsafe { self.0.write(ShimFile { base: no_methods(), open: std::ptr::null_mut() }) }
    }

    /// Hands the file to SQLite.
    pub fn set_open(self, open: Box<OpenFile>, methods: &'static ffi::sqlite3_io_methods) {
        let open = Box::into_raw(open);
        // SAFETY: FileHandle::new: writable memory; both fields are plain pointers, written without being read.
        unsafe { self.0.write(ShimFile { base: ffi::sqlite3_file { pMethods: methods }, open }) }
    }

    /// Row C1: closes the real file first, then the lock file.
    pub fn close(self) -> c_int {
        let code = self.real().x_close();
        // SAFETY: FileHandle::new: readable; set_open has written the field, since SQLite closes open files only.
        let open = unsafe { (*self.0.as_ptr()).open };
        self.set_closed();
        // SAFETY: `open` came from Box::into_raw in set_open, and set_closed has just forgotten it: this is the
        // only owner, and x_close the last call on the file, so no reference from open() is left.
        drop(unsafe { Box::from_raw(open) });
        code
    }

    /// Runs `body` on the open file. A panic poisons the file (row P1), is logged, and becomes `failure`.
    #[inline]
    pub fn guarded(self, failure: c_int, body: impl FnOnce(&OpenFile, RealFile) -> c_int) -> c_int {
        // SAFETY: FileHandle::new: readable; set_open has written the field before SQLite makes this call.
        let open = unsafe { (*self.0.as_ptr()).open };
        // SAFETY: set_open's box, freed only by close(), the last call on the file. It is shared from here on:
        // what changes is in cells, so a call that the real VFS makes back into us would find no `&mut`.
        let open = unsafe { &*open };
        catch_unwind(AssertUnwindSafe(|| body(open, self.real()))).unwrap_or_else(|_| {
            open.driver.poison();
            open.shim.host.log(
                failure,
                "kanbanlock: a callback panicked (a bug: please report it). This connection grants no more \
                 write locks; close it and open another",
                open.about(),
            );
            failure
        })
    }
}

/// Runs a callback that has no file yet. A panic becomes `failure`.
pub fn guarded(failure: c_int, body: impl FnOnce() -> c_int) -> c_int {
    debug_assert_ne!(rc::primary(failure), rc::OK);
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_8_and_do_not_overflow() {
        assert_eq!(shim_file_size(0), Some(16));
        assert_eq!(shim_file_size(1), Some(24));
        assert_eq!(shim_file_size(120), Some(136));
        assert_eq!(shim_file_size(c_int::MAX), None);
        assert_eq!(shim_file_size(c_int::MAX - 16), None);
    }

    #[test]
    fn json_strings_escape_what_json_cannot_hold() {
        assert_eq!(json_string("/tmp/a b.db.lock"), "\"/tmp/a b.db.lock\"");
        assert_eq!(json_string("\"\\\n\u{1}é"), "\"\\\"\\\\\\u000a\\u0001é\"");
    }
}
