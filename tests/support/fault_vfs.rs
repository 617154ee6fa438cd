//! # fault_vfs: a real VFS that fails on command
//!
//! NAME
//!
//! : `FaultVfs`: a complete VFS on ordinary files, made with the crate `sqlite-vfs`, which the tests put
//!   *beneath* kanbanlock, in the place of the unix VFS.
//!
//! SYNOPSIS
//!
//! ```ignore
//! #[path = "support/fault_vfs.rs"]
//! mod fault_vfs;
//!
//! let faults = FaultVfs::register("faultvfs");
//! let hits = faults.arm(Fault::new(Method::Lock, Error::Busy).to(LockKind::Exclusive).nth(2));
//! // … SQL through a connection whose real VFS is "faultvfs" …
//! assert_eq!(hits.count(), 1, "the second xLock EXCLUSIVE was never made");
//! ```
//!
//! DESCRIPTION
//!
//! A disk seldom fails while a test is looking. This VFS fails when it is told to: the n-th call of a method
//! is answered with an error and has no effect (or has its effect and is *then* answered with an error:
//! [`Fault::after`]). Everything that reached it is on record ([`Faults::events`]), so that a test can also
//! ask what did **not** reach it: a gate that is refused must leave the real VFS alone.
//!
//! ```text
//!   SQLite ──► kanbanlock ──► sqlite-vfs (C ABI) ──► FaultVfs, FileHandle, WalIndexHandle ──► std::fs::File
//!                                                        │ perform(call, effect)
//!                                                        ▼
//!                                   test ──► Faults: armed faults, the record, the locks of every file
//! ```
//!
//! LOCKS
//!
//! The five levels and the eight WAL-index slots follow `os_unix.c` (3.51) among handles of one process, to
//! the letter:
//!
//! * a level already held, or a lower one, is granted without further ado;
//! * a refused EXCLUSIVE leaves a RESERVED holder at PENDING, and a SHARED holder (hot journal) at SHARED;
//! * a slot held EXCLUSIVE is refused to everybody, its holder included; a slot already held SHARED is
//!   granted again;
//! * closing a file drops whatever it still holds.
//!
//! They exclude handles of this VFS only. A connection through another VFS may look at a file when no handle
//! of this one has it open.
//!
//! WAL-INDEX
//!
//! `sqlite-vfs` gives each connection a *copy* of a region, pulled before a lock and pushed before the unlock
//! of an exclusive slot. Whole copies pushed back would undo what another connection has written in the
//! meantime. Hence [`WalIndexHandle`] remembers the region as it came (the *base*), pushes only the bytes
//! that differ from it, and refuses WRITE (`SQLITE_BUSY`) to a handle whose copy is out of date. Regions
//! vanish with the last handle, as `-shm` does.
//!
//! CAUTION
//!
//! Properties of `sqlite-vfs` 0.2 that a test can trip over:
//!
//! * a failed xDelete is `SQLITE_DELETE` (9), an authorizer code, which the core reads as `SQLITE_INTERRUPT`;
//! * a failed xFullPathname is `SQLITE_ERROR`, a failed xCheckReservedLock `SQLITE_IOERR_UNLOCK`;
//! * `SQLITE_FCNTL_VFSNAME` and `SQLITE_FCNTL_TEMPFILENAME` answer with memory from Rust's allocator, which
//!   must not meet `sqlite3_free`: do not ask for either;
//! * a failed xOpen does not set `pMethods = NULL`;
//! * xOpen answered with `PermissionDenied` ([`Error::Denied`]) is tried again read-only, at once: two calls;
//! * xShmUnmap without the delete flag reaches nobody: slots still held then are held until xClose;
//! * pull and push happen under xShmLock and xShmBarrier; they are memory, not I/O, and cannot be made to
//!   fail here;
//! * after a failed unlock of an exclusive slot, sqlite-vfs takes that slot for held, and pulls no more: the
//!   connection sees an old WAL-index from then on, and is refused WRITE;
//! * several regions (more than 4062 frames in the WAL) are not pushed in one step: with a WAL that long, use
//!   a file from one thread at a time.
//!
//! And of this VFS: xSleep yields and reports the whole time as slept, for a test does not wait; xSync
//! counts, fails when told to, and otherwise leaves the work to the page cache: processes end here, the power
//! stays on.

#![allow(dead_code)] // Each test binary uses its own part of this.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlite_vfs::wip::{WalIndex, WalIndexLock};
use sqlite_vfs::{DatabaseHandle, OpenAccess, OpenOptions, Vfs};
pub(crate) use sqlite_vfs::{LockKind, OpenKind};

// -----------------------------------------------------------------------------------------------------------
// What can fail, and how
// -----------------------------------------------------------------------------------------------------------

/// A method of the real VFS, as far as a fault can be aimed at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Method {
    Open,
    /// On record, but never fails: sqlite-vfs has no way to say so.
    Close,
    Delete,
    Access,
    FullPathname,
    Read,
    Write,
    Truncate,
    Sync,
    FileSize,
    Lock,
    Unlock,
    CheckReservedLock,
    /// `xFileControl(SQLITE_FCNTL_LOCKSTATE)`
    LockState,
    /// `xFileControl(SQLITE_FCNTL_HAS_MOVED)`
    HasMoved,
    /// The first xShmMap of a handle, which opens the WAL-index.
    ShmOpen,
    ShmMap,
    /// `xShmLock` with `SQLITE_SHM_LOCK`
    ShmLock,
    /// `xShmLock` with `SQLITE_SHM_UNLOCK`
    ShmUnlock,
    /// `xShmUnmap` with the delete flag; without it the call does not come this far.
    ShmUnmap,
}

impl Method {
    pub(crate) const ALL: [Method; 20] = [
        Method::Open,
        Method::Close,
        Method::Delete,
        Method::Access,
        Method::FullPathname,
        Method::Read,
        Method::Write,
        Method::Truncate,
        Method::Sync,
        Method::FileSize,
        Method::Lock,
        Method::Unlock,
        Method::CheckReservedLock,
        Method::LockState,
        Method::HasMoved,
        Method::ShmOpen,
        Method::ShmMap,
        Method::ShmLock,
        Method::ShmUnlock,
        Method::ShmUnmap,
    ];

    /// The errors that this method of a real VFS may answer with, within its contract.
    pub(crate) fn errors(self) -> &'static [Error] {
        match self {
            Method::Close => &[],
            Method::Open | Method::ShmOpen => &[Error::Io, Error::Denied],
            Method::Read => &[Error::Io, Error::ShortRead],
            Method::Write => &[Error::Io, Error::Full],
            Method::Lock | Method::ShmLock => &[Error::Io, Error::Busy],
            _ => &[Error::Io],
        }
    }

    /// Its name in SQLite's terms.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Method::Open => "xOpen",
            Method::Close => "xClose",
            Method::Delete => "xDelete",
            Method::Access => "xAccess",
            Method::FullPathname => "xFullPathname",
            Method::Read => "xRead",
            Method::Write => "xWrite",
            Method::Truncate => "xTruncate",
            Method::Sync => "xSync",
            Method::FileSize => "xFileSize",
            Method::Lock => "xLock",
            Method::Unlock => "xUnlock",
            Method::CheckReservedLock => "xCheckReservedLock",
            Method::LockState => "xFileControl LOCKSTATE",
            Method::HasMoved => "xFileControl HAS_MOVED",
            Method::ShmOpen => "xShmMap open",
            Method::ShmMap => "xShmMap",
            Method::ShmLock => "xShmLock",
            Method::ShmUnlock => "xShmLock UNLOCK",
            Method::ShmUnmap => "xShmUnmap",
        }
    }
}

/// The way in which a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Error {
    /// EIO: the `SQLITE_IOERR_…` of the method
    Io,
    /// `SQLITE_BUSY`: the lock is refused.
    Busy,
    /// `SQLITE_FULL`: the first half is written, then the disk is full.
    Full,
    /// `SQLITE_IOERR_SHORT_READ`, and a buffer of zeros, whatever the file holds. SQLite takes a short read
    /// for the end of the file, so this one is a lie that may cost data; it has no place where data is
    /// audited.
    ShortRead,
    /// EACCES
    Denied,
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        match error {
            Error::Io => io::Error::from_raw_os_error(libc::EIO),
            Error::Busy => io::ErrorKind::WouldBlock.into(),
            Error::Full => io::ErrorKind::WriteZero.into(),
            Error::ShortRead => io::ErrorKind::UnexpectedEof.into(),
            Error::Denied => io::ErrorKind::PermissionDenied.into(),
        }
    }
}

/// An instruction: which call fails, and how. See the SYNOPSIS.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    method: Method,
    error: Error,
    nth: u64,
    persistent: bool,
    after: bool,
    file: Option<OpenKind>,
    level: Option<LockKind>,
    slot: Option<u8>,
}

impl Fault {
    /// The first call of `method` is answered with `error`. Panics if that is nothing a real VFS could
    /// answer.
    pub(crate) fn new(method: Method, error: Error) -> Fault {
        assert!(method.errors().contains(&error), "{} never answers {error:?}", method.name());
        Fault { method, error, nth: 1, persistent: false, after: false, file: None, level: None, slot: None }
    }

    /// Not the first but the `nth` call, counted from 1 and from the moment of arming.
    pub(crate) fn nth(self, nth: u64) -> Fault {
        assert!(nth > 0, "calls are counted from 1");
        Fault { nth, ..self }
    }

    /// Every later call fails, too, until [`Faults::disarm`].
    pub(crate) fn persistent(self) -> Fault {
        Fault { persistent: true, ..self }
    }

    /// The call has its effect, and is answered with the error nevertheless.
    pub(crate) fn after(self) -> Fault {
        Fault { after: true, ..self }
    }

    /// Only calls on files of this kind.
    pub(crate) fn on(self, file: OpenKind) -> Fault {
        Fault { file: Some(file), ..self }
    }

    /// Only xLock or xUnlock to this level.
    pub(crate) fn to(self, level: LockKind) -> Fault {
        Fault { level: Some(level), ..self }
    }

    /// Only xShmLock on a range with this slot in it.
    pub(crate) fn slot(self, slot: u8) -> Fault {
        Fault { slot: Some(slot), ..self }
    }

    pub(crate) fn method(&self) -> Method {
        self.method
    }

    fn aims_at(&self, call: &Call) -> bool {
        self.method == call.method
            && self.file.is_none_or(|file| call.file == Some(file))
            && self.level.is_none_or(|level| call.level == Some(level))
            && self.slot.is_none_or(|slot| call.slots.contains(&slot))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.method.name())?;
        if let Some(level) = self.level {
            write!(f, " {}", level_name(level))?;
        }
        if let Some(slot) = self.slot {
            write!(f, " {}", slot_names(&(slot..slot + 1)))?;
        }
        if let Some(file) = self.file {
            write!(f, " ({file:?})")?;
        }
        let (after, from) =
            (if self.after { ", after its effect" } else { "" }, if self.persistent { "from " } else { "" });
        write!(f, " {:?}, {from}call {}{after}", self.error, self.nth)
    }
}

/// How often an armed fault has struck.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hits(Arc<AtomicU64>);

impl Hits {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

// -----------------------------------------------------------------------------------------------------------
// The record
// -----------------------------------------------------------------------------------------------------------

/// The gate, as somebody sees it who shares nothing with the connection but the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// There is no lock file (yet), hence nobody holds it.
    Absent,
    Free,
    Held,
}

impl Gate {
    /// Looks at `<db>.lock` through an open file description of its own: `flock(LOCK_EX | LOCK_NB)`. A lock
    /// that it gets, it drops at once.
    pub(crate) fn of(db: &Path) -> Gate {
        match File::open(lock_path(db)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Gate::Absent,
            Err(error) => panic!("open {}: {error}", lock_path(db).display()),
            Ok(file) => match file.try_lock() {
                Ok(()) => Gate::Free,
                Err(TryLockError::WouldBlock) => Gate::Held,
                Err(TryLockError::Error(error)) => panic!("flock {}: {error}", lock_path(db).display()),
            },
        }
    }

    pub(crate) fn is_held(self) -> bool {
        self == Gate::Held
    }
}

/// `<db>.lock`
pub(crate) fn lock_path(db: &Path) -> PathBuf {
    let mut path = db.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// One call as it reaches the real VFS.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    /// The handle, counted from 1 in the order of xOpen; 0: a call to the VFS and not to a file.
    pub(crate) handle: u64,
    pub(crate) file: Option<OpenKind>,
    /// The database that the file belongs to, as far as its name tells.
    pub(crate) db: Option<PathBuf>,
    /// xLock, xUnlock: the level asked for.
    pub(crate) level: Option<LockKind>,
    /// xShmLock: the slots.
    pub(crate) slots: Range<u8>,
    pub(crate) exclusive: bool,
}

impl Call {
    /// Whether the gate is of interest when this call comes. A look costs three system calls, and most calls
    /// read. LOCKSTATE is kanbanlock's own question, asked to find out about the gate.
    fn concerns_gate(&self) -> bool {
        match self.method {
            Method::Read | Method::FileSize | Method::LockState => false,
            Method::Close => self.file == Some(OpenKind::MainDb),
            _ => true,
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.method, self.level) {
            (Method::ShmLock, _) => {
                let mode = if self.exclusive { "EXCLUSIVE" } else { "SHARED" };
                write!(f, "xShmLock {} {mode}", slot_names(&self.slots))
            }
            (Method::ShmUnlock, _) => write!(f, "xShmLock {} UNLOCK", slot_names(&self.slots)),
            (method, Some(level)) => write!(f, "{} {}", method.name(), level_name(level)),
            (method, None) => match self.file {
                Some(file) => write!(f, "{} {file:?}", method.name()),
                None => write!(f, "{}", method.name()),
            },
        }
    }
}

/// A call, its answer, and the gate at that moment.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) call: Call,
    /// `OK`, `BUSY`, `FULL`, `SHORT_READ`, `DENIED`, `NOENT` or `IOERR`
    pub(crate) answer: &'static str,
    /// The highest level that any handle on the database held when the call came.
    pub(crate) level: LockKind,
    /// The gate of the database when the call came; None unless [`Faults::watch`] asked for it, and for calls
    /// that do not concern it.
    pub(crate) gate: Option<Gate>,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.call, self.answer)
    }
}

fn answer<T>(result: &io::Result<T>) -> &'static str {
    match result.as_ref().map_err(io::Error::kind) {
        Ok(_) => "OK",
        Err(io::ErrorKind::WouldBlock) => "BUSY",
        Err(io::ErrorKind::WriteZero) => "FULL",
        Err(io::ErrorKind::UnexpectedEof) => "SHORT_READ",
        Err(io::ErrorKind::PermissionDenied) => "DENIED",
        Err(io::ErrorKind::NotFound) => "NOENT",
        Err(_) => "IOERR",
    }
}

fn level_name(level: LockKind) -> &'static str {
    match level {
        LockKind::None => "NONE",
        LockKind::Shared => "SHARED",
        LockKind::Reserved => "RESERVED",
        LockKind::Pending => "PENDING",
        LockKind::Exclusive => "EXCLUSIVE",
    }
}

fn slot_names(slots: &Range<u8>) -> String {
    const NAMES: [&str; SLOTS] =
        ["WRITE", "CKPT", "RECOVER", "READ(0)", "READ(1)", "READ(2)", "READ(3)", "READ(4)"];
    NAMES[usize::from(slots.start)..usize::from(slots.end)].join("+")
}

// -----------------------------------------------------------------------------------------------------------
// Faults: the test's side
// -----------------------------------------------------------------------------------------------------------

/// The controls of one registered [`FaultVfs`]: what is to fail, what has happened, what is locked.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    desk: Mutex<Desk>,
    files: Mutex<HashMap<String, Node>>,
    next_handle: AtomicU64,
}

#[derive(Debug, Default)]
struct Desk {
    armed: Vec<Armed>,
    events: Vec<Event>,
    is_watching: bool,
}

#[derive(Debug)]
struct Armed {
    fault: Fault,
    /// Calls that the fault aimed at, so far.
    seen: u64,
    hits: Hits,
}

impl Faults {
    /// Arms one more fault. Of several that aim at the same call, the first armed decides; all of them count
    /// it.
    pub(crate) fn arm(&self, fault: Fault) -> Hits {
        let hits = Hits::default();
        self.desk().armed.push(Armed { fault, seen: 0, hits: hits.clone() });
        hits
    }

    /// From here on nothing fails.
    pub(crate) fn disarm(&self) {
        self.desk().armed.clear();
    }

    /// From here on each event tells whether the gate of its database was held. Not while another *thread*
    /// writes through a gate: the look itself takes the flock for an instant.
    pub(crate) fn watch(&self) {
        self.desk().is_watching = true;
    }

    /// Forgets the record.
    pub(crate) fn clear(&self) {
        self.desk().events.clear();
    }

    /// The record since the beginning, or since [`Faults::clear`].
    pub(crate) fn events(&self) -> Vec<Event> {
        self.desk().events.clone()
    }

    /// The lock calls of the record: `xLock RESERVED -> OK`, `xShmLock WRITE EXCLUSIVE -> BUSY`, `xShmLock
    /// WRITE UNLOCK -> OK`.
    pub(crate) fn locks(&self) -> Vec<String> {
        let is_lock = |event: &&Event| {
            matches!(event.call.method, Method::Lock | Method::Unlock | Method::ShmLock | Method::ShmUnlock)
        };
        self.desk().events.iter().filter(is_lock).map(ToString::to_string).collect()
    }

    /// How often `method` was called, according to the record.
    pub(crate) fn calls(&self, method: Method) -> usize {
        self.desk().events.iter().filter(|event| event.call.method == method).count()
    }

    /// The highest level that any handle on `db` holds.
    pub(crate) fn level(&self, db: &Path) -> LockKind {
        self.with_node(db, |node| {
            let levels = node.levels.values().copied();
            levels.fold(LockKind::None, |highest, level| if level > highest { level } else { highest })
        })
        .unwrap_or_default()
    }

    /// The handle that holds a WAL-index slot of `db` EXCLUSIVE.
    pub(crate) fn holder(&self, db: &Path, slot: u8) -> Option<u64> {
        self.with_node(db, |node| node.shm.slots[usize::from(slot)].exclusive).flatten()
    }

    /// Whether anybody holds what a writer of `db` holds: RESERVED or more, or the slot WRITE.
    pub(crate) fn has_writer(&self, db: &Path) -> bool {
        self.level(db) > LockKind::Shared || self.holder(db, 0).is_some()
    }

    /// How many handles have `db` open.
    pub(crate) fn open_handles(&self, db: &Path) -> usize {
        self.with_node(db, |node| node.levels.len()).unwrap_or(0)
    }

    fn with_node<T>(&self, db: &Path, look: impl FnOnce(&Node) -> T) -> Option<T> {
        self.files().get(db.to_str()?).map(look)
    }

    /// Every call goes through here: count it, let it fail or happen, put it on record.
    ///
    /// `effect` is given the error to fail with; it is called with None for a call that shall have its
    /// effect.
    fn perform<T>(&self, call: Call, effect: impl FnOnce(Option<Error>) -> io::Result<T>) -> io::Result<T> {
        let (strike, is_watching) = {
            let mut desk = self.desk();
            (desk.strike(&call), desk.is_watching)
        };
        let gate = call.db.as_deref().filter(|_| is_watching && call.concerns_gate()).map(Gate::of);
        let level = call.db.as_deref().map(|db| self.level(db)).unwrap_or_default();

        let result = match strike {
            Some(fault) if fault.after => effect(None).and_then(|_| Err(fault.error.into())),
            Some(fault) => effect(Some(fault.error)),
            None => effect(None),
        };
        self.desk().events.push(Event { call, answer: answer(&result), level, gate });
        result
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn files(&self) -> MutexGuard<'_, HashMap<String, Node>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    /// The fault that this call is to be answered with, if any.
    fn strike(&mut self, call: &Call) -> Option<Fault> {
        let mut strike = None;
        for armed in self.armed.iter_mut().filter(|armed| armed.fault.aims_at(call)) {
            armed.seen += 1;
            let due =
                armed.seen == armed.fault.nth || (armed.fault.persistent && armed.seen > armed.fault.nth);
            if due && strike.is_none() {
                armed.hits.0.fetch_add(1, Ordering::SeqCst);
                strike = Some(armed.fault.clone());
            }
        }
        strike
    }
}

/// The database that a file belongs to. (A super-journal belongs to several.)
fn database(path: &str, kind: OpenKind) -> Option<PathBuf> {
    let name = match kind {
        OpenKind::MainDb => Some(path),
        OpenKind::MainJournal => path.strip_suffix("-journal"),
        OpenKind::Wal => path.strip_suffix("-wal"),
        _ => None,
    };
    name.map(PathBuf::from)
}

/// For an effect that a fault leaves out altogether.
fn fail(fault: Option<Error>) -> io::Result<()> {
    fault.map_or(Ok(()), |error| Err(error.into()))
}

/// A lock call as sqlite-vfs wants it answered: refused is `Ok(false)`.
fn granted(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

// -----------------------------------------------------------------------------------------------------------
// The VFS
// -----------------------------------------------------------------------------------------------------------

/// The VFS. Tests see its [`Faults`] only.
#[derive(Debug)]
pub(crate) struct FaultVfs {
    faults: Arc<Faults>,
    temporaries: AtomicU64,
    seed: AtomicU64,
}

/// Files named so are deleted by this VFS without any fault: sqlite-vfs 0.2 leaks the handle of a temporary
/// file when its deletion in xClose fails, and that leak would be laid at kanbanlock's door.
const TEMPORARY: &str = "fault-vfs-temporary";

impl FaultVfs {
    /// Registers a new VFS under `name`, for the life of the process.
    pub(crate) fn register(name: &str) -> Arc<Faults> {
        let faults = Arc::new(Faults::default());
        let vfs =
            FaultVfs { faults: faults.clone(), temporaries: AtomicU64::new(0), seed: AtomicU64::new(1) };
        sqlite_vfs::register(name, vfs, false).expect("sqlite3_vfs_register");
        faults
    }

    fn call(method: Method) -> Call {
        Call { method, handle: 0, file: None, db: None, level: None, slots: 0..0, exclusive: false }
    }
}

impl Vfs for FaultVfs {
    type Handle = FileHandle;

    fn open(&self, path: &str, options: OpenOptions) -> io::Result<FileHandle> {
        let handle = self.faults.next_handle.fetch_add(1, Ordering::SeqCst) + 1;
        let kind = options.kind;
        let db = database(path, kind);
        let call = Call { handle, file: Some(kind), db, ..FaultVfs::call(Method::Open) };
        self.faults.perform(call, |fault| {
            fail(fault)?;
            let writable = options.access != OpenAccess::Read;
            let file = File::options()
                .read(true)
                .write(writable)
                .create(options.access == OpenAccess::Create)
                .create_new(options.access == OpenAccess::CreateNew)
                .open(path)?;
            if kind == OpenKind::MainDb {
                self.faults.files().entry(path.to_owned()).or_default().levels.insert(handle, LockKind::None);
            }
            Ok(FileHandle { faults: self.faults.clone(), file, path: path.to_owned(), kind, handle })
        })
    }

    fn delete(&self, path: &str) -> io::Result<()> {
        if path.contains(TEMPORARY) {
            return fs::remove_file(path);
        }
        let db = ["-journal", "-wal"].iter().find_map(|suffix| path.strip_suffix(suffix)).map(PathBuf::from);
        self.faults.perform(Call { db, ..FaultVfs::call(Method::Delete) }, |fault| {
            fail(fault)?;
            fs::remove_file(path)
        })
    }

    /// Like os_unix: an empty file does not exist.
    fn exists(&self, path: &str) -> io::Result<bool> {
        self.faults.perform(FaultVfs::call(Method::Access), |fault| {
            fail(fault)?;
            Ok(fs::metadata(path).is_ok_and(|found| !found.is_file() || found.len() > 0))
        })
    }

    fn temporary_name(&self) -> String {
        let n = self.temporaries.fetch_add(1, Ordering::SeqCst);
        let name = format!("{TEMPORARY}-{}-{n}", std::process::id());
        std::env::temp_dir().join(name).to_str().expect("a UTF-8 path").to_owned()
    }

    /// The same in every run. (The core seeds itself from the default VFS, not from this one.)
    fn random(&self, buffer: &mut [i8]) {
        for byte in buffer {
            let state = self.seed.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            *byte = i8::from_ne_bytes([mixed.to_be_bytes()[0]]);
        }
    }

    fn sleep(&self, duration: Duration) -> Duration {
        std::thread::yield_now();
        duration
    }

    fn full_pathname<'a>(&self, path: &'a str) -> io::Result<Cow<'a, str>> {
        self.faults.perform(FaultVfs::call(Method::FullPathname), |fault| {
            fail(fault)?;
            let absolute = std::path::absolute(path)?;
            absolute
                .into_os_string()
                .into_string()
                .map(Cow::Owned)
                .map_err(|_| io::ErrorKind::InvalidInput.into())
        })
    }
}

/// An open file.
#[derive(Debug)]
pub(crate) struct FileHandle {
    faults: Arc<Faults>,
    file: File,
    path: String,
    kind: OpenKind,
    handle: u64,
}

impl FileHandle {
    fn call(&self, method: Method) -> Call {
        let db = database(&self.path, self.kind);
        Call { handle: self.handle, file: Some(self.kind), db, ..FaultVfs::call(method) }
    }

    /// Runs `operation` on the state that all handles on this file share.
    fn with_node<T>(&self, operation: impl FnOnce(&mut Node) -> T) -> T {
        operation(self.faults.files().entry(self.path.clone()).or_default())
    }
}

impl Drop for FileHandle {
    fn drop(&mut self) {
        let closed = self.faults.perform(self.call(Method::Close), |_| {
            let mut files = self.faults.files();
            if let Some(node) = files.get_mut(&self.path) {
                node.levels.remove(&self.handle);
                node.shm.close(self.handle);
                if node.levels.is_empty() {
                    files.remove(&self.path);
                }
            }
            Ok(())
        });
        debug_assert!(closed.is_ok());
    }
}

impl DatabaseHandle for FileHandle {
    type WalIndex = WalIndexHandle;

    fn size(&self) -> io::Result<u64> {
        self.faults.perform(self.call(Method::FileSize), |fault| {
            fail(fault)?;
            Ok(self.file.metadata()?.len())
        })
    }

    /// A short read fills the rest with zeros, as `sqlite3_io_methods` demands.
    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.faults.perform(self.call(Method::Read), |fault| match fault {
            None => read_or_zero(&self.file, buffer, offset),
            Some(error) => {
                buffer.fill(0);
                Err(error.into())
            }
        })
    }

    fn write_all_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.faults.perform(self.call(Method::Write), |fault| {
            if fault == Some(Error::Full) {
                self.file.write_all_at(&data[..data.len() / 2], offset)?;
            }
            fail(fault)?;
            self.file.write_all_at(data, offset)
        })
    }

    fn sync(&mut self, _data_only: bool) -> io::Result<()> {
        self.faults.perform(self.call(Method::Sync), fail)
    }

    fn set_len(&mut self, size: u64) -> io::Result<()> {
        self.faults.perform(self.call(Method::Truncate), |fault| {
            fail(fault)?;
            self.file.set_len(size)
        })
    }

    fn lock(&mut self, level: LockKind) -> io::Result<bool> {
        let call = Call { level: Some(level), ..self.call(Method::Lock) };
        granted(self.faults.perform(call, |fault| {
            fail(fault)?;
            self.with_node(|node| node.lock(self.handle, level))
        }))
    }

    fn unlock(&mut self, level: LockKind) -> io::Result<bool> {
        let call = Call { level: Some(level), ..self.call(Method::Unlock) };
        granted(self.faults.perform(call, |fault| {
            fail(fault)?;
            self.with_node(|node| node.unlock(self.handle, level))
        }))
    }

    fn reserved(&mut self) -> io::Result<bool> {
        self.faults.perform(self.call(Method::CheckReservedLock), |fault| {
            fail(fault)?;
            Ok(self.with_node(|node| node.levels.values().any(|&level| level > LockKind::Shared)))
        })
    }

    fn current_lock(&self) -> io::Result<LockKind> {
        self.faults.perform(self.call(Method::LockState), |fault| {
            fail(fault)?;
            Ok(self.with_node(|node| node.level(self.handle)))
        })
    }

    fn moved(&self) -> io::Result<bool> {
        self.faults.perform(self.call(Method::HasMoved), |fault| {
            fail(fault)?;
            let mine = self.file.metadata()?;
            let there = fs::metadata(&self.path);
            Ok(!there.is_ok_and(|there| (there.dev(), there.ino()) == (mine.dev(), mine.ino())))
        })
    }

    fn wal_index(&self, _readonly: bool) -> io::Result<WalIndexHandle> {
        self.faults.perform(self.call(Method::ShmOpen), |fault| {
            fail(fault)?;
            Ok(WalIndexHandle::open(&self.faults, &self.path, self.handle))
        })
    }
}

fn read_or_zero(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let (mut rest, mut at) = (buffer, offset);
    while !rest.is_empty() {
        match file.read_at(rest, at) {
            Ok(0) => {
                rest.fill(0);
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(read) => {
                rest = &mut rest[read..];
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

// -----------------------------------------------------------------------------------------------------------
// Locks of one file
// -----------------------------------------------------------------------------------------------------------

/// What all handles on one database file share (`unixInodeInfo`).
#[derive(Debug, Default)]
struct Node {
    /// The level of every open handle.
    levels: BTreeMap<u64, LockKind>,
    shm: Shm,
}

impl Node {
    fn level(&self, handle: u64) -> LockKind {
        self.levels.get(&handle).copied().unwrap_or_default()
    }

    /// `unixLock`. Err(WouldBlock): refused.
    fn lock(&mut self, handle: u64, to: LockKind) -> io::Result<()> {
        let mine = self.level(handle);
        if mine >= to {
            return Ok(());
        }
        if to == LockKind::Pending || (mine == LockKind::None && to > LockKind::Shared) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }

        let others = || self.levels.iter().filter(|&(&other, _)| other != handle).map(|(_, &level)| level);
        let blocked = match to {
            LockKind::Shared => others().any(|level| level >= LockKind::Pending),
            LockKind::Reserved => others().any(|level| level >= LockKind::Reserved),
            _ => others().any(|level| level >= LockKind::Shared),
        };
        if blocked && to == LockKind::Exclusive && mine == LockKind::Reserved {
            self.levels.insert(handle, LockKind::Pending);
        }
        if blocked {
            return Err(Error::Busy.into());
        }
        self.levels.insert(handle, to);
        Ok(())
    }

    /// `posixUnlock`
    fn unlock(&mut self, handle: u64, to: LockKind) -> io::Result<()> {
        if to > LockKind::Shared {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if self.level(handle) > to {
            self.levels.insert(handle, to);
        }
        Ok(())
    }
}

// -----------------------------------------------------------------------------------------------------------
// WAL-index
// -----------------------------------------------------------------------------------------------------------

/// `SQLITE_SHM_NLOCK`
const SLOTS: usize = 8;
/// `WALINDEX_PGSZ`, the size of one region
const REGION: usize = 32768;
type Region = [u8; REGION];

/// The WAL-index of one file (`unixShmNode`).
#[derive(Debug, Default)]
struct Shm {
    users: BTreeSet<u64>,
    regions: BTreeMap<u32, Versioned>,
    slots: [Slot; SLOTS],
}

/// A region and a number that grows with every change of it.
#[derive(Clone, Debug)]
struct Versioned {
    version: u64,
    bytes: Box<Region>,
}

#[derive(Debug, Default)]
struct Slot {
    exclusive: Option<u64>,
    shared: BTreeSet<u64>,
}

impl Shm {
    fn region(&mut self, region: u32) -> &mut Versioned {
        self.regions.entry(region).or_insert_with(|| Versioned { version: 0, bytes: Box::new([0; REGION]) })
    }

    /// `unixShmLock`. Err(WouldBlock): refused.
    fn lock(&mut self, handle: u64, slots: &Range<u8>, lock: WalIndexLock) -> io::Result<()> {
        let slots = usize::from(slots.start)..usize::from(slots.end);
        let slots = self.slots.get_mut(slots).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let refused = match lock {
            WalIndexLock::None => false,
            WalIndexLock::Shared => slots.iter().any(|slot| slot.exclusive.is_some()),
            WalIndexLock::Exclusive => {
                slots.iter().any(|slot| slot.exclusive.is_some() || !slot.shared.is_empty())
            }
        };
        if refused {
            return Err(Error::Busy.into());
        }
        for slot in slots {
            match lock {
                WalIndexLock::None => slot.release(handle),
                WalIndexLock::Shared => _ = slot.shared.insert(handle),
                WalIndexLock::Exclusive => slot.exclusive = Some(handle),
            }
        }
        Ok(())
    }

    /// The handle has done with the WAL-index. The last one takes the regions along.
    fn close(&mut self, handle: u64) {
        for slot in &mut self.slots {
            slot.release(handle);
        }
        if self.users.remove(&handle) && self.users.is_empty() {
            self.regions.clear();
        }
    }
}

impl Slot {
    fn release(&mut self, handle: u64) {
        self.shared.remove(&handle);
        self.exclusive = self.exclusive.filter(|&holder| holder != handle);
    }
}

/// The WAL-index as one handle has it. See WAL-INDEX in the header.
#[derive(Debug)]
pub(crate) struct WalIndexHandle {
    faults: Arc<Faults>,
    path: String,
    handle: u64,
    /// For each region that SQLite has mapped: the base, that is what was last pulled or pushed, and the
    /// version that it is known to agree with.
    copies: BTreeMap<u32, Versioned>,
}

impl WalIndexHandle {
    /// `handle` begins to use the WAL-index of `path`. (Tests of this VFS make some without a file.)
    pub(crate) fn open(faults: &Arc<Faults>, path: &str, handle: u64) -> WalIndexHandle {
        faults.files().entry(path.to_owned()).or_default().shm.users.insert(handle);
        WalIndexHandle { faults: faults.clone(), path: path.to_owned(), handle, copies: BTreeMap::new() }
    }

    fn call(&self, method: Method) -> Call {
        let db = Some(PathBuf::from(&self.path));
        Call { handle: self.handle, file: Some(OpenKind::MainDb), db, ..FaultVfs::call(method) }
    }

    fn with_shm<T>(&self, operation: impl FnOnce(&mut Shm) -> T) -> T {
        operation(&mut self.faults.files().entry(self.path.clone()).or_default().shm)
    }

    /// Has nobody else changed a region since this handle last looked?
    fn is_current(&self, shm: &mut Shm) -> bool {
        self.copies.iter().all(|(&region, copy)| shm.region(region).version == copy.version)
    }
}

impl Drop for WalIndexHandle {
    fn drop(&mut self) {
        if let Some(node) = self.faults.files().get_mut(&self.path) {
            node.shm.close(self.handle);
        }
    }
}

impl WalIndex for WalIndexHandle {
    fn map(&mut self, region: u32) -> io::Result<Region> {
        let copy = self.faults.perform(self.call(Method::ShmMap), |fault| {
            fail(fault)?;
            Ok(self.with_shm(|shm| shm.region(region).clone()))
        })?;
        let bytes = *copy.bytes;
        self.copies.insert(region, copy);
        Ok(bytes)
    }

    fn lock(&mut self, slots: Range<u8>, lock: WalIndexLock) -> io::Result<bool> {
        let method = if lock == WalIndexLock::None { Method::ShmUnlock } else { Method::ShmLock };
        let exclusive = lock == WalIndexLock::Exclusive;
        let call = Call { slots: slots.clone(), exclusive, ..self.call(method) };
        granted(self.faults.perform(call, |fault| {
            fail(fault)?;
            self.with_shm(|shm| {
                if exclusive && slots.contains(&0) && !self.is_current(shm) {
                    return Err(Error::Busy.into());
                }
                shm.lock(self.handle, &slots, lock)
            })
        }))
    }

    fn delete(self) -> io::Result<()> {
        self.faults.perform(self.call(Method::ShmUnmap), fail)
    }

    fn pull(&mut self, region: u32, bytes: &mut Region) -> io::Result<()> {
        let copy = self.with_shm(|shm| shm.region(region).clone());
        bytes.copy_from_slice(&copy.bytes[..]);
        self.copies.insert(region, copy);
        Ok(())
    }

    fn push(&mut self, region: u32, bytes: &Region) -> io::Result<()> {
        /// Compared at one go: large enough for memcmp to pay, small enough to be mostly equal.
        const CHUNK: usize = 256;

        let Some(mut base) = self.copies.remove(&region) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        self.with_shm(|shm| {
            let shared = shm.region(region);
            if base.bytes[..] == bytes[..] {
                return;
            }
            let chunks =
                shared.bytes.chunks_mut(CHUNK).zip(bytes.chunks(CHUNK)).zip(base.bytes.chunks(CHUNK));
            for ((shared, mine), base) in chunks.filter(|((_, mine), base)| mine != base) {
                for ((shared, mine), base) in shared.iter_mut().zip(mine).zip(base) {
                    if mine != base {
                        *shared = *mine;
                    }
                }
            }
            let was_current = base.version == shared.version;
            shared.version += 1;
            if was_current {
                base.version = shared.version;
            }
        });
        base.bytes.copy_from_slice(bytes);
        self.copies.insert(region, base);
        Ok(())
    }
}
