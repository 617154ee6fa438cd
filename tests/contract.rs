//! The VFS contract, called through the C interface as SQLite calls it (DESIGN.md §5, "VFS contract").
//!
//! Each line of that list has bitten a real shim; each has a test here. Files are opened in buffers filled with
//! 0xAA, since the memory that SQLite gives is not zeroed.

mod support;

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kanbanlock::Options;
use rusqlite::ffi;
use support::raw_file::{
    LOCK_EXCLUSIVE, LOCK_SHARED, MAIN_DB, READ_WRITE, RawFile, UNLOCK_EXCLUSIVE, UNLOCK_SHARED, vfs,
    vfs_methods,
};
use support::tap_vfs::{Call, FileKind, Method, Observer, Tap};
use support::{Stack, TestDb, unique};

/// Remembers the calls that reach the real VFS.
#[derive(Default)]
struct Recorder {
    calls: Mutex<Vec<String>>,
    closes: AtomicUsize,
}

impl Recorder {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Observer for Recorder {
    fn before(&self, call: Call<'_>) -> Option<c_int> {
        if call.method == Method::Close && call.kind == FileKind::Database {
            self.closes.fetch_add(1, Ordering::Relaxed);
        }
        self.calls.lock().unwrap().push(call.to_string());
        None
    }
}

#[test]
fn sizes_are_multiples_of_8_and_have_room_for_the_real_file() {
    let stack = Stack::new(Arc::new(Recorder::default()));
    let (ours, real) = (vfs_methods(stack.kanbanlock), vfs_methods(stack.real));
    assert_eq!(ours.szOsFile % 8, 0);
    assert!(ours.szOsFile > real.szOsFile);
    assert_eq!(ours.mxPathname, real.mxPathname);
}

#[test]
fn a_method_that_the_real_vfs_lacks_is_null_here_too() {
    kanbanlock::register().unwrap();
    let stack = Stack::new(Arc::new(Recorder::default())); // a tap has no xDlOpen, and no xSetSystemCall
    let ours = vfs_methods(stack.kanbanlock);
    assert!(ours.xDlOpen.is_none() && ours.xSetSystemCall.is_none() && ours.xCurrentTime.is_none());
    assert!(ours.xDelete.is_some() && ours.xSleep.is_some());
    let on_unix = vfs_methods("kanbanlock");
    assert!(on_unix.xDlOpen.is_some() && on_unix.xSetSystemCall.is_some());
}

/// The version is the real *file's*, at each open; no method under an advertised version is NULL.
#[test]
fn a_file_advertises_the_real_files_version() {
    for version in [1, 2, 3] {
        let stack = Stack::with(Arc::new(Recorder::default()), Options::new(), version);
        let db = TestDb::new();
        let mut file = RawFile::main_db(stack.kanbanlock, &db);
        let methods = file.methods();
        assert_eq!(methods.iVersion, version);
        assert_eq!(methods.xShmMap.is_some(), version >= 2);
        assert_eq!(methods.xShmLock.is_some(), version >= 2);
        assert_eq!(methods.xShmBarrier.is_some(), version >= 2);
        assert_eq!(methods.xShmUnmap.is_some(), version >= 2);
        assert_eq!(methods.xFetch.is_some(), version >= 3);
        assert_eq!(methods.xUnfetch.is_some(), version >= 3);
        file.close();
        // And SQLite gets along with it: WAL mode needs version 2.
        let connection = db.open(stack.kanbanlock);
        let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).unwrap();
        assert_eq!(mode, if version >= 2 { "wal" } else { "delete" });
        connection.execute_batch("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
    }
}

/// `unix-none` advertises version 3 with a NULL xShmMap: that must not be passed on.
#[test]
fn a_real_file_without_shared_memory_is_advertised_as_version_1() {
    let name = unique("kanbanlock-none");
    Options::new().name(name).real_vfs("unix-none").register().unwrap();
    let db = TestDb::new();
    let mut real = RawFile::main_db("unix-none", &db);
    assert!(real.methods().iVersion >= 2 && real.methods().xShmMap.is_none(), "else this test shows nothing");
    let mut file = RawFile::main_db(name, &db);
    assert_eq!(file.methods().iVersion, 1);
    file.close();
    real.close();
}

#[test]
fn other_files_are_the_real_vfss_own() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    std::fs::write(db.path(), "").unwrap(); // a journal takes its mode from the database
    let journal = format!("{}-journal", db.path().display());
    let flags = READ_WRITE | ffi::SQLITE_OPEN_MAIN_JOURNAL;
    let mut real = RawFile::open("unix", &journal, &[], flags).map_err(|(code, _)| code).unwrap();
    let mut ours = RawFile::open("kanbanlock", &journal, &[], flags).map_err(|(code, _)| code).unwrap();
    assert_eq!(ours.methods_ptr(), real.methods_ptr());
    ours.close();
    real.close();
}

#[test]
fn a_failed_open_leaves_no_methods() {
    kanbanlock::register().unwrap();
    let (code, mut file) = RawFile::open("kanbanlock", "/nonexistent/kanban.db", &[], MAIN_DB).err().unwrap();
    assert_eq!(ffi::SQLITE_CANTOPEN, code & 0xff);
    assert!(file.methods_ptr().is_null());

    let db = TestDb::new();
    let path = db.path().to_str().unwrap();
    let misspelt = ["kanbanlock_chekpoint", "gate"];
    let (code, mut file) = RawFile::open("kanbanlock", path, &misspelt, MAIN_DB).err().unwrap();
    assert_eq!(code, ffi::SQLITE_CANTOPEN);
    assert!(file.methods_ptr().is_null());
    assert!(!db.path().exists(), "the real file was not even opened");
}

/// "xClose will be called even if xOpen fails", if pMethods is set: by us, for the real file.
#[test]
fn a_real_open_that_fails_half_way_is_closed() {
    let recorder = Arc::new(Recorder::default());
    let tap = unique("tap");
    let half_way = Tap { fail_open_with: Some(ffi::SQLITE_IOERR), ..Tap::new(tap, "unix", recorder.clone()) };
    half_way.register();
    let name = unique("kanbanlock");
    Options::new().name(name).real_vfs(tap).register().unwrap();
    let db = TestDb::new();
    let (code, mut file) = RawFile::open(name, db.path().to_str().unwrap(), &[], MAIN_DB).err().unwrap();
    assert_eq!(code, ffi::SQLITE_IOERR);
    assert_eq!(recorder.closes.load(Ordering::Relaxed), 1);
    assert!(file.methods_ptr().is_null());
}

/// A real VFS that fails without setting pMethods (sqlite-vfs does) leaves what was in the memory: it must not be called.
#[test]
fn a_real_open_that_fails_carelessly_is_not_closed() {
    struct FailOpen;
    impl Observer for FailOpen {
        fn before(&self, call: Call<'_>) -> Option<c_int> {
            (call.method == Method::Open && call.kind == FileKind::Database).then_some(ffi::SQLITE_IOERR)
        }
    }
    let stack = Stack::new(Arc::new(FailOpen));
    let db = TestDb::new();
    let path = db.path().to_str().unwrap();
    let (code, mut file) = RawFile::open(stack.kanbanlock, path, &[], MAIN_DB).err().unwrap();
    assert_eq!(code, ffi::SQLITE_IOERR);
    assert!(file.methods_ptr().is_null());
}

/// The real VFS gets the same name pointer: URI parameters live behind its NUL. unix reads `psow` from there.
#[test]
fn uri_parameters_reach_the_real_vfs() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let path = db.path().to_str().unwrap();
    let characteristics = |parameters: &[&str]| {
        let flags = MAIN_DB | ffi::SQLITE_OPEN_URI;
        let mut file =
            RawFile::open("kanbanlock", path, parameters, flags).map_err(|(code, _)| code).unwrap();
        let x_device_characteristics = file.methods().xDeviceCharacteristics.unwrap();
        // SAFETY: open.
        let answer = unsafe { x_device_characteristics(file.ptr()) };
        file.close();
        answer & ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
    };
    assert_eq!(characteristics(&["psow", "0"]), 0);
    assert_ne!(characteristics(&["psow", "1"]), 0);
}

/// appendvfs moves an open file object.
#[test]
fn an_open_file_may_be_moved_in_memory() {
    let recorder = Arc::new(Recorder::default());
    let stack = Stack::new(recorder.clone());
    let db = TestDb::new();
    let mut file = RawFile::main_db(stack.kanbanlock, &db);
    assert_eq!(file.lock(ffi::SQLITE_LOCK_SHARED), ffi::SQLITE_OK);
    let mut moved = file.move_elsewhere();
    assert_eq!(moved.lock(ffi::SQLITE_LOCK_RESERVED), ffi::SQLITE_OK);
    assert!(support::is_flocked(&db.lock_file()));
    assert_eq!(moved.unlock(ffi::SQLITE_LOCK_NONE), ffi::SQLITE_OK);
    assert!(!support::is_flocked(&db.lock_file()));
    moved.close();
}

/// Rows L2 and S2: refused means that the real VFS hears nothing, and the answer is exactly SQLITE_BUSY.
#[test]
fn a_refused_gate_is_plain_busy_and_the_real_vfs_is_not_called() {
    let recorder = Arc::new(Recorder::default());
    let stack = Stack::new(recorder.clone());
    let db = TestDb::new();
    let mut file = RawFile::main_db(stack.kanbanlock, &db);
    let outsider = std::fs::File::create(db.lock_file()).unwrap();
    outsider.lock().unwrap();

    assert_eq!(file.lock(ffi::SQLITE_LOCK_SHARED), ffi::SQLITE_OK);
    recorder.take();
    assert_eq!(file.lock(ffi::SQLITE_LOCK_RESERVED), ffi::SQLITE_BUSY);
    assert_eq!(file.lock(ffi::SQLITE_LOCK_EXCLUSIVE), ffi::SQLITE_BUSY);
    assert_eq!(recorder.take(), [""; 0]);

    file.map_shm();
    assert_eq!(file.shm_lock(3, 1, LOCK_SHARED), ffi::SQLITE_OK);
    recorder.take();
    assert_eq!(file.shm_lock(0, 1, LOCK_EXCLUSIVE), ffi::SQLITE_BUSY);
    assert_eq!(recorder.take(), [""; 0]);
    assert_eq!(file.shm_lock(3, 1, UNLOCK_SHARED), ffi::SQLITE_OK);

    // Row S5: a reader's WRITE, to rebuild the wal-index, asks nobody.
    recorder.take();
    assert_eq!(file.shm_lock(0, 1, LOCK_EXCLUSIVE), ffi::SQLITE_OK);
    assert_eq!(file.shm_lock(1, 2, LOCK_EXCLUSIVE), ffi::SQLITE_OK);
    assert_eq!(recorder.take(), ["xShmLock lock exclusive WRITE", "xShmLock lock exclusive CKPT+RECOVER"]);
    assert_eq!(file.shm_lock(1, 2, UNLOCK_EXCLUSIVE), ffi::SQLITE_OK);
    assert_eq!(file.shm_lock(0, 1, UNLOCK_EXCLUSIVE), ffi::SQLITE_OK);
    file.close();
}

/// Row X1: what is outside SQLite's protocol is forwarded as it is. Here the tap answers it: os_unix would
/// fail an assert.
#[test]
fn strange_arguments_are_forwarded_unchanged() {
    struct Strange;
    impl Observer for Strange {
        fn before(&self, call: Call<'_>) -> Option<c_int> {
            match call.method {
                Method::Lock(level @ (-1 | 5 | 99)) | Method::Unlock(level @ (-1 | 99)) => Some(1000 + level),
                Method::ShmLock { offset, count, flags } if offset < 0 || count != 1 || flags == 99 => {
                    Some(77)
                }
                _ => None,
            }
        }
    }
    let stack = Stack::new(Arc::new(Strange));
    let db = TestDb::new();
    let mut file = RawFile::main_db(stack.kanbanlock, &db);
    assert_eq!(file.lock(99), 1099);
    assert_eq!(file.lock(-1), 999);
    assert_eq!(file.lock(5), 1005);
    assert_eq!(file.unlock(99), 1099);
    assert_eq!(file.shm_lock(-1, 1, LOCK_EXCLUSIVE), 77);
    assert_eq!(file.shm_lock(0, 9, LOCK_EXCLUSIVE), 77);
    assert_eq!(file.shm_lock(0, 1, 99), 77);
    assert!(!db.lock_file().exists());
    file.close();
}

#[test]
fn file_controls_keep_their_answers() {
    let recorder = Arc::new(Recorder::default());
    let stack = Stack::new(recorder.clone());
    let db = TestDb::new();
    let mut file = RawFile::main_db(stack.kanbanlock, &db);
    assert_eq!(file.file_control(987_654, ptr::null_mut()), ffi::SQLITE_NOTFOUND);
    let mut level: c_int = -1;
    assert_eq!(file.file_control(ffi::SQLITE_FCNTL_LOCKSTATE, (&raw mut level).cast()), ffi::SQLITE_OK);
    assert_eq!(level, 0);

    let mut name: *mut c_char = ptr::null_mut();
    assert_eq!(file.file_control(ffi::SQLITE_FCNTL_VFSNAME, (&raw mut name).cast()), ffi::SQLITE_OK);
    // SAFETY: SQLITE_OK, so a NUL-terminated string from sqlite3_malloc.
    let text = unsafe { CStr::from_ptr(name) }.to_str().unwrap().to_owned();
    // SAFETY: ditto, and ours to free.
    unsafe { ffi::sqlite3_free(name.cast()) };
    assert_eq!(text, format!("{}/unix", stack.kanbanlock));

    // Rule 8: a build with SETLK_TIMEOUT must not be told that blocking locks work.
    recorder.take();
    let mut timeout: c_int = 100;
    let lock_timeout = 34; // SQLITE_FCNTL_LOCK_TIMEOUT
    assert_eq!(file.file_control(lock_timeout, (&raw mut timeout).cast()), ffi::SQLITE_NOTFOUND);
    assert_eq!(recorder.take(), [""; 0], "not forwarded");
    file.close();
}

#[test]
fn exactly_our_pragma_is_answered() {
    let recorder = Arc::new(Recorder::default());
    let stack = Stack::new(recorder.clone());
    let db = TestDb::new();
    let connection = db.open(stack.kanbanlock);
    connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    let answer: String = connection.query_row("PRAGMA KanbanLock", [], |row| row.get(0)).unwrap();
    let status: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(status["vfs"], stack.kanbanlock);
    assert_eq!(status["real_vfs"], stack.real);
    assert_eq!(status["lock_file"], db.lock_file().to_str().unwrap());
    assert_eq!(status["level"], "RESERVED");
    assert_eq!(status["held"], true);
    assert_eq!(status["checkpoint"], "auto");
    assert_eq!(status["fallback"], "refuse");
    assert!(status["process"]["acquired"].as_u64().unwrap() >= 1);
    connection.execute_batch("COMMIT").unwrap();

    recorder.take();
    let pragma = format!("xFileControl({}) Database", ffi::SQLITE_FCNTL_PRAGMA);
    connection.query_row("PRAGMA page_size", [], |_| Ok(())).unwrap();
    assert!(recorder.take().contains(&pragma), "others' pragmas are forwarded");
    assert!(connection.query_row("PRAGMA kanbanlocks", [], |_| Ok(())).is_err(), "not ours: no row");
}

/// xGetLastError reads errno: it must be the real VFS's.
#[test]
fn our_own_system_calls_leave_errno_alone() {
    struct SetErrno;
    impl Observer for SetErrno {
        fn after(&self, call: Call<'_>, _code: c_int) {
            if matches!(call.method, Method::Unlock(_)) {
                set_errno(libc::EXDEV);
            }
        }
    }
    let stack = Stack::new(Arc::new(SetErrno));
    let db = TestDb::new();
    let mut file = RawFile::main_db(stack.kanbanlock, &db);
    file.lock(ffi::SQLITE_LOCK_SHARED);
    // The release comes after the real unlock.
    assert_eq!(file.lock(ffi::SQLITE_LOCK_RESERVED), ffi::SQLITE_OK);
    assert_eq!(file.unlock(ffi::SQLITE_LOCK_SHARED), ffi::SQLITE_OK);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EXDEV));
    // A refusal calls nobody else: flock(2) has set EWOULDBLOCK, and it must not show.
    let outsider = std::fs::File::open(db.lock_file()).unwrap();
    outsider.lock().unwrap();
    set_errno(libc::EDOM);
    assert_eq!(file.lock(ffi::SQLITE_LOCK_RESERVED), ffi::SQLITE_BUSY);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EDOM));
    file.close();
}

fn set_errno(errno: c_int) {
    // SAFETY: this thread's errno.
    unsafe { *libc::__errno_location() = errno };
}

#[test]
fn system_calls_and_paths_are_those_of_the_real_vfs() {
    kanbanlock::register().unwrap();
    let (ours, real) = (vfs_methods("kanbanlock"), vfs_methods("unix"));
    // SAFETY: registered VFSes, called with themselves.
    let call =
        |methods: &ffi::sqlite3_vfs, vfs| unsafe { methods.xGetSystemCall.unwrap()(vfs, c"fcntl".as_ptr()) };
    let ours_call = call(&ours, vfs("kanbanlock")).map(|f| f as usize);
    assert_eq!(ours_call, call(&real, vfs("unix")).map(|f| f as usize));
    assert!(ours_call.is_some());

    let db = TestDb::new();
    std::fs::write(db.path(), "").unwrap();
    let link = db.dir().join("link.db");
    std::os::unix::fs::symlink(db.path(), &link).unwrap();
    let full_path = |methods: &ffi::sqlite3_vfs, vfs| {
        let link = CString::new(link.to_str().unwrap()).unwrap();
        let mut out = vec![0_u8; usize::try_from(methods.mxPathname).unwrap() + 1];
        let size = c_int::try_from(out.len()).unwrap();
        // SAFETY: registered VFSes, called with themselves, and a buffer of that size.
        let code =
            unsafe { methods.xFullPathname.unwrap()(vfs, link.as_ptr(), size, out.as_mut_ptr().cast()) };
        (code, CStr::from_bytes_until_nul(&out).unwrap().to_owned())
    };
    let answer = full_path(&ours, vfs("kanbanlock"));
    assert_eq!(answer, full_path(&real, vfs("unix")));
    assert_eq!(answer.0, ffi::SQLITE_OK_SYMLINK, "a success that is not SQLITE_OK");
}

/// Row C1: the real file first; the flock goes last, with the descriptor.
#[test]
fn close_closes_the_real_file_before_the_lock_file() {
    struct HeldAtClose(Mutex<Vec<bool>>);
    impl Observer for HeldAtClose {
        fn before(&self, call: Call<'_>) -> Option<c_int> {
            if (call.method, call.kind) == (Method::Close, FileKind::Database) {
                self.0.lock().unwrap().push(support::is_flocked(format!("{}.lock", call.path).as_ref()));
            }
            None
        }
    }
    let observer = Arc::new(HeldAtClose(Mutex::default()));
    let stack = Stack::new(observer.clone());
    let db = TestDb::new();
    let mut file = RawFile::main_db(stack.kanbanlock, &db);
    file.lock(ffi::SQLITE_LOCK_SHARED);
    file.lock(ffi::SQLITE_LOCK_RESERVED);
    file.close(); // os_unix drops the locks without calling xUnlock
    assert_eq!(*observer.0.lock().unwrap(), [true]);
    assert!(!support::is_flocked(&db.lock_file()));
}

/// Rows L7 and L7w: a writer that waits for EXCLUSIVE keeps the gate, but lends it between its attempts where a
/// `-shm` file says that a WAL connection may be holding SHARED for life while it waits for the gate.
#[test]
fn a_writer_that_waits_for_exclusive_lends_the_gate_to_wal_connections() {
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let mut leaving = RawFile::main_db("kanbanlock", &db);
    let mut other = RawFile::main_db("kanbanlock", &db);
    assert_eq!(other.lock(ffi::SQLITE_LOCK_SHARED), ffi::SQLITE_OK);
    assert_eq!(leaving.lock(ffi::SQLITE_LOCK_SHARED), ffi::SQLITE_OK);
    assert_eq!(leaving.lock(ffi::SQLITE_LOCK_RESERVED), ffi::SQLITE_OK);

    // L7: no -shm. The gate stays.
    assert_eq!(leaving.lock(ffi::SQLITE_LOCK_EXCLUSIVE), ffi::SQLITE_BUSY);
    assert!(support::is_flocked(&db.lock_file()));

    // L7w: lent after the refusal, so the WAL connection gets its turn …
    other.map_shm();
    assert_eq!(leaving.lock(ffi::SQLITE_LOCK_EXCLUSIVE), ffi::SQLITE_BUSY);
    assert!(!support::is_flocked(&db.lock_file()));
    assert_eq!(other.shm_lock(3, 1, LOCK_SHARED), ffi::SQLITE_OK);
    assert_eq!(other.shm_lock(0, 1, LOCK_EXCLUSIVE), ffi::SQLITE_OK);
    // … and the first must win it back before its next attempt.
    assert_eq!(leaving.lock(ffi::SQLITE_LOCK_EXCLUSIVE), ffi::SQLITE_BUSY);
    assert!(support::is_flocked(&db.lock_file()), "the WAL connection's");
    assert_eq!(other.shm_lock(0, 1, UNLOCK_EXCLUSIVE), ffi::SQLITE_OK);
    assert!(!support::is_flocked(&db.lock_file()));
    assert_eq!(other.shm_lock(3, 1, UNLOCK_SHARED), ffi::SQLITE_OK);
    other.close();
    assert_eq!(leaving.lock(ffi::SQLITE_LOCK_EXCLUSIVE), ffi::SQLITE_OK);
    assert!(support::is_flocked(&db.lock_file()));
    assert_eq!(leaving.unlock(ffi::SQLITE_LOCK_NONE), ffi::SQLITE_OK);
    assert!(!support::is_flocked(&db.lock_file()));
    leaving.close();
}
