//! Is everything still in its place: the database file, its `-wal`, its `-shm`, and has the database one name only?
//!
//! ## The bug
//! A file that is deleted, renamed or replaced (`rm kanban.db-wal`, `mv backup.db kanban.db`) lives on, nameless, in whoever
//! has it open. What is committed into it is acknowledged, and nobody who opens the database afterwards finds it. In
//! rollback mode SQLite looks at the database's name before it opens a journal *file* (`databaseIsUnmoved` in pager.c);
//! in WAL mode, and with `journal_mode=MEMORY`, nothing does. A database with two names (hard links) has two WALs, two
//! `-shm` and two lock files, so two writers.
//!
//! ## Key operations
//! [`Place::check`], when the gate has just been acquired (row M1 of the table in `state.rs`): lstat(2) of each name.
//!
//! ## Invariants
//! - At most one check in a tick of the kernel's clock (as for the lock file, `gate.rs`), and one after each refusal of
//!   the gate: whoever held it may have replaced the files under it. Nothing for a reader.
//! - What was open is known by device and inode. The database's are taken when it is opened. `-wal` and `-shm` are taken
//!   when this process maps the `-shm`: SQLite has opened the WAL right before. All connections of a process share the
//!   mapping (os_unix), so they share what the first of them has seen: a connection opened after a replacement, beside
//!   one from before, is no way around.
//! - What cannot be known is not refused: a real VFS that does not know SQLITE_FCNTL_HAS_MOVED keeps its files in its own
//!   way; an error other than "there is no such file" says nothing of the file.
//! - To delete a WAL (EXCLUSIVE) is allowed when `-wal` or `-shm` are gone, if no other file has come in their place: the
//!   last close then copies what is committed into the database, and so saves it.
//! - The WAL is as long as the wal-index says: what is committed is in it. So one that was truncated in place, or
//!   overwritten by a shorter one, is noticed too, and one that SQLite has made anew, after a deletion, in a process that
//!   came later.
//!
//! Uses: `host`, `lock`, `real`, `events`, `sys`, `error`.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_int};
use std::fmt;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::rc;
use crate::events::About;
use crate::host::Host;
use crate::lock::Purpose;
use crate::real::WalIndex;
use crate::sys::{self, ErrnoGuard, FileId, Tick};

/// The names of one open database file, and what they led to.
#[derive(Debug)]
pub struct Place {
    host: Host,
    names: Names,
    /// `None`: no check.
    database: Option<FileId>,
    allows_links: bool,
    mapped: Cell<Option<Mapped>>,
    wal_index: Cell<Option<WalIndex>>,
    /// When everything was last found in its place.
    checked: Cell<Option<Tick>>,
    warned_of: Cell<Option<Trouble>>,
}

/// The names that SQLite has for a database.
#[derive(Debug)]
pub struct Names {
    /// As xOpen got it.
    pub database: CString,
    /// `<db>-wal`
    pub wal: CString,
    /// `<db>-shm`
    pub shm: CString,
}

/// What `-wal` and `-shm` were when the `-shm` was mapped.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    number: u64,
    wal: Option<FileId>,
    shm: Option<FileId>,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Moved(Which, Fate),
    /// The database has so many names.
    Links(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Database,
    Wal,
    Shm,
}

/// What became of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It leads nowhere.
    Gone,
    /// It leads to another file.
    Replaced,
    /// It lacks frames that are committed.
    Short,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fate::Gone => "was deleted or renamed while in use",
            Fate::Replaced => "was replaced by another file while in use",
            Fate::Short => "was truncated, overwritten or made anew while in use",
        })
    }
}

impl Place {
    /// The place of a database file that was just opened. `database`: what it is, if the real VFS keeps its files under
    /// their names. `allows_links`: write even if it has several.
    pub fn new(host: Host, names: Names, database: Option<FileId>, allows_links: bool) -> Place {
        Place {
            host,
            names,
            database,
            allows_links,
            mapped: Cell::new(None),
            wal_index: Cell::new(None),
            checked: Cell::new(None),
            warned_of: Cell::new(None),
        }
    }

    /// The names.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// After xShmMap, whatever it answered. `wal_index`: if that was region 0.
    pub fn shm_mapped(&self, wal_index: Option<WalIndex>) {
        if wal_index.is_some() {
            self.wal_index.set(wal_index);
        }
        if self.mapped.get().is_none() {
            let _errno = ErrnoGuard::new();
            self.mapped.set(Some(lock_table().map(self.database, &self.names)));
        }
    }

    /// After xShmUnmap.
    pub fn shm_unmapped(&self) {
        self.wal_index.set(None);
        if let Some(mapped) = self.mapped.take() {
            lock_table().entries.retain(|entry| entry.mapped.number != mapped.number);
        }
    }

    /// True between xShmMap and xShmUnmap.
    #[inline]
    pub fn has_mapped_shm(&self) -> bool {
        self.mapped.get().is_some()
    }

    /// What is mapped of it.
    #[inline]
    pub fn wal_index(&self) -> Option<WalIndex> {
        self.wal_index.get()
    }

    /// The `-shm` that is mapped.
    pub fn shm(&self) -> Option<FileId> {
        self.mapped.get()?.shm
    }

    /// The gate was refused: its holder may do anything to the files.
    pub fn doubt(&self) {
        self.checked.set(None);
    }

    /// Row M1.
    ///
    /// # Errors
    ///
    /// SQLITE_READONLY_DBMOVED, or SQLITE_READONLY for a database with several names; logged.
    #[inline]
    pub fn check(&self, purpose: Purpose) -> Result<(), c_int> {
        let now = sys::tick();
        if self.checked.get() == Some(now) { Ok(()) } else { self.look(purpose, now) }
    }

    #[inline(never)]
    fn look(&self, purpose: Purpose, now: Tick) -> Result<(), c_int> {
        let _errno = ErrnoGuard::new();
        let Some(trouble) = self.trouble() else {
            self.checked.set(Some(now));
            self.warned_of.set(None);
            return Ok(());
        };
        let (code, is_allowed) = match trouble {
            Trouble::Links(_) => (rc::READONLY, self.allows_links),
            Trouble::Moved(Which::Wal | Which::Shm, Fate::Gone) => {
                (rc::READONLY_DBMOVED, purpose == Purpose::Exclusive)
            }
            Trouble::Moved(..) => (rc::READONLY_DBMOVED, false),
        };
        let about = About { database: Some(&self.names.database), waited_ms: None };
        let is_news = self.warned_of.replace(Some(trouble)) != Some(trouble);
        if is_allowed {
            if is_news && matches!(trouble, Trouble::Links(_)) {
                let line =
                    format!("{}. Writing all the same: kanbanlock_fallback=unlocked", self.message(trouble));
                self.host.log(rc::WARNING, &line, about);
            }
            return Ok(());
        }
        if is_news {
            self.host.log(code, &self.message(trouble), about);
        }
        Err(code)
    }

    /// What is wrong; of `-wal` and `-shm` rather the one that is not just gone.
    fn trouble(&self) -> Option<Trouble> {
        let database = self.database?;
        match sys::lstat(&self.names.database) {
            Ok(there) if there.id != database => {
                return Some(Trouble::Moved(Which::Database, Fate::Replaced));
            }
            Ok(there) if there.links > 1 => return Some(Trouble::Links(there.links)),
            Err(error) if leads_nowhere(&error) => return Some(Trouble::Moved(Which::Database, Fate::Gone)),
            _ => {}
        }
        let Mapped { wal, shm, .. } = self.mapped.get()?;
        let wal = wal.and_then(|was| self.fate_of_wal(was)).map(|fate| Trouble::Moved(Which::Wal, fate));
        let shm = shm.and_then(|was| fate(&self.names.shm, was)).map(|fate| Trouble::Moved(Which::Shm, fate));
        let is_worse = |trouble: &Trouble| !matches!(trouble, Trouble::Moved(_, Fate::Gone));
        wal.filter(is_worse).or(shm.filter(is_worse)).or(wal).or(shm)
    }

    /// The wal-index is read on both sides of lstat(2): a process without the gate may restart and truncate the WAL
    /// meanwhile, but the wal-index first.
    fn fate_of_wal(&self, was: FileId) -> Option<Fate> {
        let expected_size = || self.wal_index.get().and_then(WalIndex::wal_size);
        let before = expected_size();
        match sys::lstat(&self.names.wal) {
            Ok(there) if there.id != was => Some(Fate::Replaced),
            Ok(there) => {
                let is_short = before.is_some_and(|size| u64::try_from(there.size).is_ok_and(|is| is < size));
                (is_short && expected_size() == before).then_some(Fate::Short)
            }
            Err(error) => leads_nowhere(&error).then_some(Fate::Gone),
        }
    }

    fn message(&self, trouble: Trouble) -> String {
        const CLOSE: &str = "Close every connection of this process to it, then open it again";
        let database = self.names.database.to_string_lossy();
        match trouble {
            Trouble::Links(links) => format!(
                "kanbanlock: {database} has {links} names (hard links), and whoever opens it by another one uses another \
                 WAL and another lock file. Remove the other names (find -samefile)"
            ),
            Trouble::Moved(Which::Database, fate) => format!(
                "kanbanlock: {database} {fate}: a commit would go into a file that nobody else opens. {CLOSE}"
            ),
            Trouble::Moved(which, fate) => {
                let name = if which == Which::Wal { &self.names.wal } else { &self.names.shm };
                let rescue = match fate {
                    Fate::Gone => "the last one to close copies what is committed into the database",
                    Fate::Replaced => {
                        "what was committed since the last checkpoint is lost then, unless you save the old -wal first \
                         (/proc/PID/fd of a process that has it open)"
                    }
                    Fate::Short => "what was committed since the last checkpoint is not there any more",
                };
                format!(
                    "kanbanlock: {} {fate}: a commit would be lost. {CLOSE}; {rescue}",
                    name.to_string_lossy()
                )
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shm_unmapped();
    }
}

fn fate(name: &CStr, was: FileId) -> Option<Fate> {
    match sys::lstat(name) {
        Ok(there) => (there.id != was).then_some(Fate::Replaced),
        Err(error) => leads_nowhere(&error).then_some(Fate::Gone),
    }
}

fn leads_nowhere(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

// What is mapped, in the whole process. ---------------------------------------------------------------------

struct Entry {
    database: FileId,
    mapped: Mapped,
}

struct Table {
    entries: Vec<Entry>,
    last_number: u64,
}

static TABLE: Mutex<Table> = Mutex::new(Table { entries: Vec::new(), last_number: 0 });

fn lock_table() -> MutexGuard<'static, Table> {
    // A push or a retain leaves the table whole.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    fn map(&mut self, database: Option<FileId>, names: &Names) -> Mapped {
        self.last_number += 1;
        let number = self.last_number;
        let id = |name| sys::lstat(name).ok().map(|there| there.id);
        let found = || Mapped { number, wal: id(&names.wal), shm: id(&names.shm) };
        let Some(database) = database else { return found() };
        let first = self.entries.iter().find(|entry| entry.database == database);
        let mapped = first.map_or_else(found, |first| Mapped { number, ..first.mapped });
        self.entries.push(Entry { database, mapped });
        mapped
    }
}

/// The table's mutex, held across a fork.
pub struct TableGuard(MutexGuard<'static, Table>);

/// For `fork.rs`: nobody is in the middle of a change when the process is copied.
pub fn lock_for_fork() -> TableGuard {
    TableGuard(lock_table())
}

impl TableGuard {
    /// In the child, whose own connections map anew.
    pub fn clear_in_child(mut self) {
        self.0.entries.clear();
    }
}
