//! A program of the matrix: kanbanlock twice in one process. It is linked into this binary, with rusqlite's bundled SQLite;
//! and it is loaded, as `libkanbanlock.so`, by the system's SQLite, which this process loads at run time. The two copies
//! take turns with one database, and exclude each other.
//!
//! Where both could be registered with one copy, the bundled one, the second is refused and says why, in either order:
//! linked first (`by-name`), loaded first (`as-default`).
//!
//! On stock SQLite (`none`) the bundled copy writes alone: two copies in one process do not exclude each other then.

mod writer;

use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

use kanbanlock::RegisterError;
use libloading::Library;
use rusqlite::{Connection, LoadExtensionGuard, TransactionBehavior, ffi, params};
use writer::{ADD, App, Failure, Note, TABLE, pause};

struct TwoCopies {
    bundled: Connection,
    system: Option<SystemConnection>,
}

impl App for TwoCopies {
    fn register(registration: &str) -> Result<(), Failure> {
        let entry_point = match registration {
            "by-name" => {
                kanbanlock::register()?;
                let refusal =
                    load_into_bundled(c"sqlite3_kanbanlock_init").expect_err("it is linked in already");
                says(&*refusal, "has a VFS named \"kanbanlock\" already")?;
                c"sqlite3_kanbanlock_init"
            }
            "as-default" => {
                load_into_bundled(c"sqlite3_kanbanlockdefault_init")?;
                let refusal = kanbanlock::register().expect_err("it is loaded already");
                if !matches!(refusal, RegisterError::NameTaken { .. }) {
                    return Err(refusal.into());
                }
                c"sqlite3_kanbanlockdefault_init"
            }
            _ => return Ok(()),
        };
        let system = System::load()?;
        system.connect(":memory:")?.load_extension(entry_point)?;
        SYSTEM.set(system).map_err(|_| "registered twice")?;
        Ok(())
    }

    fn open(database: &str) -> Result<Self, Failure> {
        let bundled = Connection::open(database)?;
        bundled.busy_timeout(Duration::from_secs(30))?;
        let system = SYSTEM.get().map(|system| system.connect(database)).transpose()?;
        if let Some(system) = &system {
            system.execute("PRAGMA busy_timeout = 30000")?;
        }
        Ok(TwoCopies { bundled, system })
    }

    fn add(&mut self, note: Note) -> Result<(), Failure> {
        match &self.system {
            Some(system) if note.number % 2 == 0 => {
                system.execute("BEGIN IMMEDIATE")?;
                system.execute(TABLE)?;
                let (writer, number) = (note.writer, note.number);
                system
                    .execute(&format!("INSERT INTO note VALUES ('{writer}', {number}, sqlite_version())"))?;
                self.bundled.busy_timeout(Duration::ZERO)?;
                let refused = self.bundled.execute_batch("BEGIN IMMEDIATE");
                says(&refused.expect_err("the other copy's transaction is open"), "database is locked")?;
                self.bundled.busy_timeout(Duration::from_secs(30))?;
                pause();
                system.execute("COMMIT")
            }
            _ => {
                let tx = self.bundled.transaction_with_behavior(TransactionBehavior::Immediate)?;
                tx.execute_batch(TABLE)?;
                tx.execute(ADD, params![note.writer, note.number])?;
                pause();
                Ok(tx.commit()?)
            }
        }
    }
}

/// The extension, built by the judge (`src/packages.rs`).
fn extension() -> Result<String, Failure> {
    Ok(std::env::var("KANBANLOCK_EXTENSION").map_err(|error| format!("KANBANLOCK_EXTENSION: {error}"))?)
}

fn load_into_bundled(entry_point: &CStr) -> Result<(), Failure> {
    let db = Connection::open_in_memory()?;
    // SAFETY: no SQL of strangers runs on this connection.
    let _allowed = unsafe { LoadExtensionGuard::new(&db) }?;
    // SAFETY: kanbanlock's own extension, of this source tree.
    Ok(unsafe { db.load_extension(extension()?, Some(entry_point)) }?)
}

fn says(error: &dyn Error, text: &str) -> Result<(), Failure> {
    if error.to_string().contains(text) {
        Ok(())
    } else {
        Err(format!("instead of {text:?}: {error}").into())
    }
}

static SYSTEM: OnceLock<System> = OnceLock::new();

/// The system's SQLite: the functions that are needed of it, as in sqlite3.h.
#[derive(Clone, Copy)]
struct System {
    open_v2: unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, *const c_char) -> c_int,
    exec: unsafe extern "C" fn(
        *mut c_void,
        *const c_char,
        *const c_void,
        *const c_void,
        *const c_void,
    ) -> c_int,
    errmsg: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    close_v2: unsafe extern "C" fn(*mut c_void) -> c_int,
    enable_load_extension: unsafe extern "C" fn(*mut c_void, c_int) -> c_int,
    load_extension:
        unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, *mut *mut c_char) -> c_int,
}

impl System {
    fn load() -> Result<System, Failure> {
        // SAFETY: a library without initialisers that could hurt.
        let library = unsafe { Library::new("libsqlite3.so.0") };
        let library = library.map_err(|error| format!("{error} (Debian: libsqlite3-0)"))?;
        // Never unloaded: it has VFSes registered.
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: each name is that of the field, whose type is the function's.
        unsafe {
            Ok(System {
                open_v2: *library.get(b"sqlite3_open_v2")?,
                exec: *library.get(b"sqlite3_exec")?,
                errmsg: *library.get(b"sqlite3_errmsg")?,
                close_v2: *library.get(b"sqlite3_close_v2")?,
                enable_load_extension: *library.get(b"sqlite3_enable_load_extension")?,
                load_extension: *library.get(b"sqlite3_load_extension")?,
            })
        }
    }

    fn connect(&self, database: &str) -> Result<SystemConnection, Failure> {
        let database = CString::new(database)?;
        let mut db = ptr::null_mut();
        let flags = ffi::SQLITE_OPEN_READWRITE | ffi::SQLITE_OPEN_CREATE | ffi::SQLITE_OPEN_URI;
        // SAFETY: as sqlite3_open_v2 wants it.
        let code = unsafe { (self.open_v2)(database.as_ptr(), &raw mut db, flags, ptr::null()) };
        let connection = SystemConnection { system: *self, db };
        connection.check(code)?;
        Ok(connection)
    }
}

/// A connection of the system's SQLite.
struct SystemConnection {
    system: System,
    db: *mut c_void,
}

impl SystemConnection {
    fn execute(&self, sql: &str) -> Result<(), Failure> {
        let sql = CString::new(sql)?;
        // SAFETY: an open connection; no callback, and no place for an error's text.
        self.check(unsafe {
            (self.system.exec)(self.db, sql.as_ptr(), ptr::null(), ptr::null(), ptr::null())
        })
    }

    fn load_extension(&self, entry_point: &CStr) -> Result<(), Failure> {
        // SAFETY: an open connection, on which no SQL of strangers runs.
        self.check(unsafe { (self.system.enable_load_extension)(self.db, 1) })?;
        let file = CString::new(extension()?)?;
        // SAFETY: an open connection, and kanbanlock's own extension, of this source tree.
        self.check(unsafe {
            (self.system.load_extension)(self.db, file.as_ptr(), entry_point.as_ptr(), ptr::null_mut())
        })
    }

    fn check(&self, code: c_int) -> Result<(), Failure> {
        if code == ffi::SQLITE_OK {
            return Ok(());
        }
        // SAFETY: a connection, or null if there was no memory for one.
        let message = unsafe { (self.system.errmsg)(self.db) };
        // SAFETY: a string that is valid until the next call.
        let message = unsafe { CStr::from_ptr(message) };
        Err(format!("the system's SQLite: {} ({code})", message.to_string_lossy()).into())
    }
}

impl Drop for SystemConnection {
    fn drop(&mut self) {
        // SAFETY: a connection that nobody uses again, or null.
        unsafe { (self.system.close_v2)(self.db) };
    }
}

fn main() -> Result<(), Failure> {
    writer::run::<TwoCopies>()
}
