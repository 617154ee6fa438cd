//! Close-proof locks (DESIGN.md §7), call by call: the hooks, called as os_unix calls them.
//!
//! The functions come from the unix VFS's table (`xGetSystemCall`), after registration. What they have locked is asked
//! with F_GETLK on a descriptor that the hooks do not know: POSIX and OFD locks conflict even within a process, so a
//! lock of either kind by another owner shows.

mod support;

use std::ffi::{CString, c_char, c_int, c_void};
use std::fs::File;
use std::mem::{transmute, zeroed};
use std::os::fd::AsRawFd;
use std::path::Path;

use kanbanlock::Options;
use rusqlite::ffi;
use support::raw_file::{vfs, vfs_methods};
use support::{TestDb, code, in_own_process, log};

type Fcntl = unsafe extern "C" fn(c_int, c_int, *mut c_void) -> c_int;
type Open = unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int;
type Close = unsafe extern "C" fn(c_int) -> c_int;

fn system_call(name: &str) -> unsafe extern "C" fn() {
    let name = CString::new(name).unwrap();
    let methods = vfs_methods("unix");
    // SAFETY: the method of a registered VFS, called with it and a NUL-terminated name.
    unsafe { methods.xGetSystemCall.unwrap()(vfs("unix"), name.as_ptr()) }.unwrap()
}

/// A descriptor of the unix VFS's, opened and used through the table of system calls.
struct Hooked(c_int);

impl Hooked {
    fn open(path: &Path, flags: c_int) -> Hooked {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the type that os_unix calls it by.
        let open = unsafe { transmute::<unsafe extern "C" fn(), Open>(system_call("open")) };
        // SAFETY: a NUL-terminated path.
        let fd = unsafe { open(path.as_ptr(), flags | libc::O_CREAT | libc::O_CLOEXEC, 0o644) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        Hooked(fd)
    }

    fn fcntl(&self, cmd: c_int, arg: *mut c_void) -> c_int {
        // SAFETY: the type that os_unix calls it by, but for its being variadic.
        let fcntl = unsafe { transmute::<unsafe extern "C" fn(), Fcntl>(system_call("fcntl")) };
        // SAFETY: the test passes what `cmd` calls for.
        unsafe { fcntl(self.0, cmd, arg) }
    }

    /// F_SETLK of one byte.
    fn lock(&self, kind: c_int, byte: i64) -> std::io::Result<()> {
        let mut request = flock(kind, byte);
        match self.fcntl(libc::F_SETLK, (&raw mut request).cast()) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// F_GETLK of one byte: the kind of lock in the way of a write lock.
    fn probe(&self, byte: i64) -> c_int {
        let mut request = flock(libc::F_WRLCK, byte);
        assert_eq!(self.fcntl(libc::F_GETLK, (&raw mut request).cast()), 0);
        c_int::from(request.l_type)
    }

    fn close(self) {
        // SAFETY: the type that os_unix calls it by.
        let close = unsafe { transmute::<unsafe extern "C" fn(), Close>(system_call("close")) };
        // SAFETY: our own descriptor, not used again.
        assert_eq!(unsafe { close(self.0) }, 0);
    }
}

fn flock(kind: c_int, byte: i64) -> libc::flock {
    // SAFETY: all-zero is a valid flock structure.
    let mut flock: libc::flock = unsafe { zeroed() };
    flock.l_type = i16::try_from(kind).unwrap();
    flock.l_whence = i16::try_from(libc::SEEK_SET).unwrap();
    (flock.l_start, flock.l_len) = (byte, 1);
    flock
}

/// The kind of lock on a byte, seen by a stranger. (His descriptor stays open: closing it would be a stray close.)
fn seen(stranger: &File, byte: i64) -> c_int {
    let mut request = flock(libc::F_WRLCK, byte);
    // SAFETY: an open descriptor and a flock structure.
    assert_eq!(unsafe { libc::fcntl(stranger.as_raw_fd(), libc::F_GETLK, &raw mut request) }, 0);
    c_int::from(request.l_type)
}

fn file() -> (TestDb, File) {
    log::install();
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    let stranger =
        File::options().read(true).write(true).create(true).truncate(true).open(db.path()).unwrap();
    (db, stranger)
}

/// Rule 1: only F_SETLK, F_GETLK and F_SETLKW change; everything else passes untouched.
#[test]
fn other_commands_pass_untouched() {
    let (db, _stranger) = file();
    let hooked = Hooked::open(db.path(), libc::O_RDWR);
    let flags = hooked.fcntl(libc::F_GETFD, std::ptr::null_mut());
    assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    assert_eq!(hooked.fcntl(libc::F_GETFL, std::ptr::null_mut()) & libc::O_ACCMODE, libc::O_RDWR);
    hooked.close();
}

/// Rule 2: one owner for all descriptors of an inode; a stray close cancels nothing; the last close gives all up.
#[test]
fn descriptors_of_one_inode_share_one_owner_until_the_last_close() {
    let (db, stranger) = file();
    let (a, b) = (Hooked::open(db.path(), libc::O_RDWR), Hooked::open(db.path(), libc::O_RDWR));
    a.lock(libc::F_WRLCK, 1).unwrap();
    b.lock(libc::F_WRLCK, 2).unwrap();
    assert_eq!((a.probe(2), b.probe(1)), (libc::F_UNLCK, libc::F_UNLCK), "no lock is in its own owner's way");
    drop(File::open(db.path()).unwrap());
    assert_eq!(
        (seen(&stranger, 1), seen(&stranger, 2)),
        (libc::F_WRLCK, libc::F_WRLCK),
        "after a stray close"
    );
    b.lock(libc::F_UNLCK, 1).unwrap();
    assert_eq!(seen(&stranger, 1), libc::F_UNLCK, "given up through the other descriptor");
    a.close();
    assert_eq!(seen(&stranger, 2), libc::F_WRLCK);
    b.close();
    assert_eq!(seen(&stranger, 2), libc::F_UNLCK);
}

/// Rule 1: open file description locks want `l_pid` to be 0, or they are EINVAL; os_unix leaves there what was on its stack.
/// Whether a lock can be had at the second call too, whose EINVAL would not become a POSIX lock, and F_GETLK's answer.
#[test]
fn l_pid_may_be_anything() {
    let (db, stranger) = file();
    let hooked = Hooked::open(db.path(), libc::O_RDWR);
    for byte in [1, 2] {
        let mut request = flock(libc::F_WRLCK, byte);
        request.l_pid = 7;
        assert_eq!(hooked.fcntl(libc::F_SETLK, (&raw mut request).cast()), 0);
        let mut request = flock(libc::F_WRLCK, byte);
        // SAFETY: an open descriptor and a flock structure.
        assert_eq!(unsafe { libc::fcntl(stranger.as_raw_fd(), libc::F_GETLK, &raw mut request) }, 0);
        assert_eq!(request.l_pid, -1, "an open file description's");
    }
    let mut request = flock(libc::F_WRLCK, 1);
    request.l_pid = 7;
    assert_eq!(hooked.fcntl(libc::F_GETLK, (&raw mut request).cast()), 0);
    assert_eq!(c_int::from(request.l_type), libc::F_UNLCK, "its own lock is not in its way");
    hooked.close();
}

/// Rule 3: "the file descriptor open mode doesn't match with the type of lock requested" is EBADF, as with F_SETLK.
#[test]
fn a_write_lock_through_a_read_only_descriptor_is_ebadf() {
    let (db, stranger) = file();
    let read_only = Hooked::open(db.path(), libc::O_RDONLY);
    let error = read_only.lock(libc::F_WRLCK, 1).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    read_only.lock(libc::F_RDLCK, 1).unwrap();
    assert_eq!(seen(&stranger, 1), libc::F_RDLCK);
    // Rule 4: a writer that comes later can write-lock all the same.
    let writer = Hooked::open(db.path(), libc::O_RDWR);
    writer.lock(libc::F_WRLCK, 2).unwrap();
    read_only.close();
    writer.close();
}

/// -1 is what SQLITE_FCNTL_NULL_IO leaves in an open file. The kernel answers, as it does without the hooks.
#[test]
fn a_negative_descriptor_is_ebadf() {
    let (_db, _stranger) = file();
    let none = Hooked(-1);
    for cmd in [libc::F_SETLK, libc::F_SETLKW, libc::F_GETLK] {
        let mut request = flock(libc::F_RDLCK, 1);
        assert_eq!(none.fcntl(cmd, (&raw mut request).cast()), -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
    }
    assert_eq!(none.fcntl(libc::F_GETFD, std::ptr::null_mut()), -1);
    // SAFETY: the type that os_unix calls it by.
    let close = unsafe { transmute::<unsafe extern "C" fn(), Close>(system_call("close")) };
    // SAFETY: an integer that is no descriptor.
    assert_eq!(unsafe { close(-1) }, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
}

/// SQLITE_FCNTL_NULL_IO in the middle of a transaction: the same answers as stock's, and no abort.
#[test]
fn null_io_is_answered_as_by_stock() {
    /// "Used to cause file descriptors to be closed", <https://www.sqlite.org/c3ref/c_fcntl_begin_atomic_write.html>
    const NULL_IO: c_int = 43;
    let answers = |vfs: &str, journal_mode: &str| {
        let db = TestDb::new();
        let connection = db.open(vfs);
        support::set_journal_mode(&connection, journal_mode);
        connection.execute_batch("CREATE TABLE t (x); BEGIN; SELECT * FROM t").unwrap();
        // SAFETY: an open connection, and an opcode that takes no argument.
        let controlled = unsafe {
            ffi::sqlite3_file_control(connection.handle(), c"main".as_ptr(), NULL_IO, std::ptr::null_mut())
        };
        let mut answers = vec![controlled];
        for sql in ["COMMIT", "SELECT * FROM t", "INSERT INTO t VALUES (1)"] {
            let result = connection.execute_batch(sql);
            answers.push(result.err().map_or(0, |error| code(Err::<(), _>(error))));
        }
        let is_closed = connection.close().is_ok();
        (answers, is_closed)
    };
    in_own_process("null_io_is_answered_as_by_stock", || {
        log::install();
        let stock = ["delete", "wal"].map(|mode| answers("unix", mode));
        assert_eq!(stock[0].0[0], ffi::SQLITE_OK, "this SQLite knows it");
        assert!(stock[0].0.iter().any(|answer| answer & 0xff == ffi::SQLITE_IOERR), "{stock:?}");
        kanbanlock::register().unwrap();
        for vfs in ["unix", "kanbanlock"] {
            assert_eq!(["delete", "wal"].map(|mode| answers(vfs, mode)), stock, "{vfs}");
        }
    });
}

/// A lock of somebody else is EAGAIN or EACCES, and os_unix makes SQLITE_BUSY of it.
#[test]
fn a_strangers_lock_is_in_the_way() {
    let (db, stranger) = file();
    let mut request = flock(libc::F_RDLCK, 1);
    // SAFETY: an open descriptor and a flock structure.
    assert_eq!(unsafe { libc::fcntl(stranger.as_raw_fd(), libc::F_SETLK, &raw mut request) }, 0);
    let hooked = Hooked::open(db.path(), libc::O_RDWR);
    let error = hooked.lock(libc::F_WRLCK, 1).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)), "{error}");
    assert_eq!(hooked.probe(1), libc::F_RDLCK);
    hooked.close();
}

/// Rule 2: a descriptor number that was closed behind the hooks' back and comes back is a new user.
#[test]
fn a_stale_slot_is_dropped_when_the_number_comes_back() {
    in_own_process("a_stale_slot_is_dropped_when_the_number_comes_back", || {
        let (db, stranger) = file();
        let old = Hooked::open(db.path(), libc::O_RDWR);
        old.lock(libc::F_WRLCK, 1).unwrap();
        let number = old.0;
        // SAFETY: our own descriptor; this is the close that the hooks do not see.
        assert_eq!(unsafe { libc::close(number) }, 0);
        let other = TestDb::new();
        let new = Hooked::open(other.path(), libc::O_RDWR);
        assert_eq!(new.0, number, "the lowest free number");
        assert_eq!(seen(&stranger, 1), libc::F_UNLCK, "the old file's lock went with its last user");
        new.lock(libc::F_WRLCK, 1).unwrap();
        assert_eq!(seen(&stranger, 1), libc::F_UNLCK, "and the new lock is on the new file");
        new.close();
    });
}

/// Rule 2: nothing is inherited through exec.
#[test]
fn every_descriptor_is_close_on_exec() {
    let db = {
        let (db, _stranger) = file();
        db
    };
    let connection = db.open("kanbanlock");
    connection.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t (x); BEGIN IMMEDIATE").unwrap();
    let listing = std::process::Command::new("ls").args(["-l", "/proc/self/fd"]).output().unwrap();
    let listing = String::from_utf8(listing.stdout).unwrap();
    assert!(!listing.contains("kanban.db"), "{listing}");
    assert!(listing.contains("/dev/null") || listing.contains("pipe"), "else this shows nothing: {listing}");
}

/// Rule 6: threads that open, lock and close at once neither deadlock nor disturb each other.
#[test]
fn threads_do_not_disturb_each_other() {
    log::install();
    kanbanlock::register().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let db = TestDb::new();
                let stranger = File::create(db.path()).unwrap();
                let stranger = (stranger, File::options().read(true).write(true).open(db.path()).unwrap()).1;
                for round in 0..200 {
                    let (a, b) =
                        (Hooked::open(db.path(), libc::O_RDWR), Hooked::open(db.path(), libc::O_RDONLY));
                    a.lock(libc::F_WRLCK, round).unwrap();
                    b.lock(libc::F_RDLCK, round + 1).unwrap();
                    assert_eq!(
                        (seen(&stranger, round), seen(&stranger, round + 1)),
                        (libc::F_WRLCK, libc::F_RDLCK)
                    );
                    a.close();
                    b.close();
                    assert_eq!(seen(&stranger, round), libc::F_UNLCK);
                }
            });
        }
    });
}

/// Rule 8: a file system without OFD locks keeps its POSIX locks, with one line in the log.
#[test]
fn einval_at_the_first_lock_falls_back_to_posix_locks() {
    unsafe extern "C" fn without_ofd(fd: c_int, cmd: c_int, arg: *mut c_void) -> c_int {
        if matches!(cmd, libc::F_OFD_SETLK | libc::F_OFD_SETLKW | libc::F_OFD_GETLK) {
            // SAFETY: this thread's errno.
            unsafe { *libc::__errno_location() = libc::EINVAL };
            return -1;
        }
        // SAFETY: passed through.
        unsafe { libc::fcntl(fd, cmd, arg) }
    }
    in_own_process("einval_at_the_first_lock_falls_back_to_posix_locks", || {
        log::install();
        let methods = vfs_methods("unix");
        // SAFETY: a function pointer stays one; os_unix casts it back.
        let call = unsafe { transmute::<Fcntl, unsafe extern "C" fn()>(without_ofd) };
        // SAFETY: the method of a registered VFS; no connection is open.
        let code = unsafe { methods.xSetSystemCall.unwrap()(vfs("unix"), c"fcntl".as_ptr(), Some(call)) };
        assert_eq!(code, ffi::SQLITE_OK);
        kanbanlock::register().unwrap();
        let db = TestDb::new();
        let connection = db.open("kanbanlock");
        connection.execute_batch("CREATE TABLE t (x); BEGIN IMMEDIATE").unwrap();
        assert!(holds_posix_locks(db.path()), "on POSIX locks");
        connection.execute_batch("INSERT INTO t VALUES (1); COMMIT").unwrap();
        assert_eq!(log::lines_about(db.path()).len(), 1, "{:?}", log::lines_about(db.path()));
        assert!(log::lines_with("EINVAL").len() == 1);
    });
}

/// The lock lines of /proc/self/fdinfo for the descriptors on this path.
fn holds_posix_locks(path: &Path) -> bool {
    let on_path = |fd: &std::ffi::OsString| {
        std::fs::read_link(Path::new("/proc/self/fd").join(fd)).is_ok_and(|target| target == path)
    };
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().file_name());
    let descriptors: Vec<_> = descriptors.filter(on_path).collect();
    assert!(!descriptors.is_empty());
    descriptors.iter().any(|fd| {
        std::fs::read_to_string(Path::new("/proc/self/fdinfo").join(fd))
            .is_ok_and(|info| info.contains("POSIX"))
    })
}

#[test]
fn close_proof_locks_can_be_turned_off() {
    in_own_process("close_proof_locks_can_be_turned_off", || {
        Options::new().close_proof(false).register().unwrap();
        let db = TestDb::new();
        let connection = db.open("kanbanlock");
        connection.execute_batch("CREATE TABLE t (x); BEGIN IMMEDIATE").unwrap();
        assert!(holds_posix_locks(db.path()));
        let status: String = connection.query_row("PRAGMA kanbanlock", [], |row| row.get(0)).unwrap();
        assert!(status.contains("\"close_proof\":false"), "{status}");
    });
}
