//! DESIGN.md §9: what can stand at `<db>.lock`, and what becomes of a write then.
//!
//! Each odd case has its own result code and its own line in SQLite's log, saying what to do; nothing is written
//! (fail closed); readers do not notice; and once the cause is gone the same connection writes again.

mod support;

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use rusqlite::{Connection, ffi};
use support::agent::{Agent, Task};
use support::{TestDb, code, log, set_journal_mode};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// A database with one table, made without kanbanlock: no lock file yet.
fn database() -> TestDb {
    log::install();
    kanbanlock::register().unwrap();
    let db = TestDb::new();
    Connection::open(db.path()).unwrap().execute_batch("CREATE TABLE task (title TEXT)").unwrap();
    db
}

fn write(db: &Connection) -> rusqlite::Result<()> {
    db.execute_batch("INSERT INTO task VALUES ('x')")
}

fn count(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM task", [], |row| row.get(0)).unwrap()
}

/// `obstruct` puts something at the lock file's path, `clear` removes it.
fn assert_refused(expected: i32, expected_text: &str, obstruct: impl Fn(&Path), clear: impl Fn(&Path)) {
    for journal_mode in ["delete", "wal"] {
        let db = database();
        set_journal_mode(&Connection::open(db.path()).unwrap(), journal_mode);
        obstruct(&db.lock_file());
        let connection = db.open("kanbanlock");
        assert_eq!(count(&connection), 0, "readers do not notice");
        assert_eq!(code(write(&connection)), expected, "{journal_mode}");
        let lines = log::lines_about(&db.lock_file());
        let says_why =
            |(line_code, line): &(i32, String)| *line_code == expected && line.contains(expected_text);
        assert!(lines.iter().any(says_why), "{journal_mode}: {expected_text:?} not in {lines:?}");
        assert_eq!(count(&connection), 0, "nothing was written");

        clear(&db.lock_file());
        write(&connection).unwrap_or_else(|error| panic!("{journal_mode}, cause gone: {error}"));
        assert_eq!(count(&connection), 1);
    }
}

fn remove_file(path: &Path) {
    fs::remove_file(path).unwrap();
}

#[test]
fn a_symbolic_link_is_not_followed() {
    assert_refused(
        ffi::SQLITE_CANTOPEN_SYMLINK,
        "is a symbolic link to /dev/null",
        |lock| symlink("/dev/null", lock).unwrap(),
        remove_file,
    );
}

#[test]
fn a_dangling_symbolic_link_is_not_created_through() {
    assert_refused(
        ffi::SQLITE_CANTOPEN_SYMLINK,
        "is a dangling symbolic link to nowhere",
        |lock| symlink("nowhere", lock).unwrap(),
        |lock| {
            assert!(!lock.parent().unwrap().join("nowhere").exists());
            remove_file(lock);
        },
    );
}

#[test]
fn a_fifo_does_not_hang() {
    assert_refused(
        ffi::SQLITE_CANTOPEN,
        "is a FIFO, not a regular file",
        |lock| {
            let _fork = support::no_fork_meanwhile();
            assert!(Command::new("mkfifo").arg(lock).status().unwrap().success());
        },
        remove_file,
    );
}

#[test]
fn a_socket_is_refused() {
    assert_refused(
        ffi::SQLITE_CANTOPEN,
        "is a socket, not a regular file",
        |lock| drop(std::os::unix::net::UnixListener::bind(lock).unwrap()),
        remove_file,
    );
}

#[test]
fn a_directory_is_another_tools_lock() {
    assert_refused(
        ffi::SQLITE_CANTOPEN_ISDIR,
        "is a directory: another tool's lock",
        |lock| fs::create_dir(lock).unwrap(),
        |lock| fs::remove_dir(lock).unwrap(),
    );
}

/// root may open and create everything, so these two run as `nobody`, in an agent started by setpriv(1).
fn can_drop_privileges(test: &str) -> bool {
    // SAFETY: no arguments, cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    let has_setpriv = Command::new("setpriv").arg("--version").output().is_ok_and(|out| out.status.success());
    if is_root && !has_setpriv {
        println!("SKIPPED {test}: running as root, and setpriv(1) from util-linux is not installed");
    }
    !is_root || has_setpriv
}

/// Opens everything to others, so that `nobody` gets as far as the lock file.
fn open_to_others(db: &TestDb) {
    fs::set_permissions(db.dir(), Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(db.path(), Permissions::from_mode(0o666)).unwrap();
}

#[test]
fn an_unreadable_lock_file_says_whose_fault_it_is() {
    if !can_drop_privileges("an_unreadable_lock_file_says_whose_fault_it_is") {
        return;
    }
    let db = database();
    open_to_others(&db);
    File::create(db.lock_file()).unwrap();
    fs::set_permissions(db.lock_file(), Permissions::from_mode(0o000)).unwrap();
    let mut agent = Agent::unprivileged();
    agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
    assert_eq!(agent.query("SELECT count(*) FROM task"), "0");
    let (code, message) = agent.execute("INSERT INTO task VALUES ('x')").unwrap_err();
    assert_eq!((code, message.as_str()), (ffi::SQLITE_PERM, "access permission denied"));
    assert!(agent.log().contains("may not open it for reading and writing"), "{}", agent.log());
    fs::set_permissions(db.lock_file(), Permissions::from_mode(0o666)).unwrap();
    agent.execute("INSERT INTO task VALUES ('x')").unwrap();
}

#[test]
fn a_read_only_folder_refuses_writes_and_a_prepared_lock_file_helps() {
    if !can_drop_privileges("a_read_only_folder_refuses_writes_and_a_prepared_lock_file_helps") {
        return;
    }
    let db = database();
    open_to_others(&db);
    fs::set_permissions(db.dir(), Permissions::from_mode(0o555)).unwrap();
    let mut agent = Agent::unprivileged();
    agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
    agent.query("PRAGMA journal_mode = MEMORY"); // no journal file, so the lock file alone is in the way
    assert_eq!(agent.query("SELECT count(*) FROM task"), "0");
    let (code, message) = agent.execute("INSERT INTO task VALUES ('x')").unwrap_err();
    assert_eq!(
        (code, message.as_str()),
        (ffi::SQLITE_READONLY_DIRECTORY, "attempt to write a readonly database")
    );
    assert!(agent.log().contains("may not create files in its folder"), "{}", agent.log());

    File::create(db.lock_file()).unwrap();
    fs::set_permissions(db.lock_file(), Permissions::from_mode(0o666)).unwrap();
    agent.execute("INSERT INTO task VALUES ('x')").unwrap();
}

#[test]
fn another_tools_text_in_the_lock_file_stays_as_it_is() {
    let db = database();
    fs::write(db.lock_file(), "4711\nsome other tool\n").unwrap();
    let inode = fs::metadata(db.lock_file()).unwrap().ino();
    let connection = db.open("kanbanlock");
    write(&connection).unwrap();
    connection.close().unwrap();
    let mut text = String::new();
    File::open(db.lock_file()).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "4711\nsome other tool\n");
    assert_eq!(fs::metadata(db.lock_file()).unwrap().ino(), inode, "never unlinked");
}

#[test]
fn the_lock_file_takes_the_databases_mode_whatever_the_umask() {
    for mode in [0o600, 0o660, 0o666] {
        let db = database();
        fs::set_permissions(db.path(), Permissions::from_mode(mode)).unwrap();
        write(&db.open("kanbanlock")).unwrap();
        assert_eq!(fs::metadata(db.lock_file()).unwrap().mode() & 0o777, mode);
        assert_eq!(fs::metadata(db.lock_file()).unwrap().len(), 0, "never written");
    }
}

#[test]
fn roots_lock_file_takes_the_databases_owner() {
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!(
            "SKIPPED roots_lock_file_takes_the_databases_owner: not root, so it may not give files away"
        );
        return;
    }
    let db = database();
    std::os::unix::fs::chown(db.path(), Some(65534), Some(65534)).unwrap();
    write(&db.open("kanbanlock")).unwrap();
    let lock = fs::metadata(db.lock_file()).unwrap();
    assert_eq!((lock.uid(), lock.gid()), (65534, 65534));
}

/// A lock on a file that no name leads to locks nobody out.
#[test]
fn a_deleted_lock_file_is_noticed_within_a_tick() {
    let db = database();
    let connection = db.open("kanbanlock");
    write(&connection).unwrap();
    remove_file(&db.lock_file());
    support::await_tick();
    connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(support::is_flocked(&db.lock_file()), "the new file is locked");
    connection.execute_batch("COMMIT").unwrap();
    let lines = log::lines_about(&db.lock_file());
    assert!(lines.iter().any(|(_, line)| line.contains("was deleted or replaced while in use")), "{lines:?}");
}

#[test]
fn a_lock_file_replaced_while_held_brings_both_connections_to_the_new_one() {
    let db = database();
    let (a, b) = (db.open("kanbanlock"), db.open("kanbanlock"));
    write(&a).unwrap();
    write(&b).unwrap();
    a.execute_batch("BEGIN IMMEDIATE").unwrap();
    remove_file(&db.lock_file());
    File::create(db.lock_file()).unwrap();
    // b takes the new file's flock, but SQLite's own lock, which a still holds, keeps b out (row L3).
    assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
    assert!(!support::is_flocked(&db.lock_file()), "b has given the gate back");
    a.execute_batch("COMMIT").unwrap();
    support::await_tick();
    a.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(support::is_flocked(&db.lock_file()));
    assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
}

/// Refused on a dead file: the holder of the old file must not keep us out of the new one.
#[test]
fn a_holder_of_a_replaced_lock_file_does_not_refuse_us() {
    let db = database();
    let connection = db.open("kanbanlock");
    write(&connection).unwrap();
    let mut outsider = Agent::start();
    outsider.ask(&Task::Flock(db.lock_file())).unwrap();
    assert_eq!(code(write(&connection)), ffi::SQLITE_BUSY);
    remove_file(&db.lock_file());
    write(&connection).unwrap();
}

#[test]
fn a_lock_file_replaced_by_a_symbolic_link_is_refused() {
    let db = database();
    let connection = db.open("kanbanlock");
    write(&connection).unwrap();
    let elsewhere = db.dir().join("elsewhere.lock");
    fs::rename(db.lock_file(), &elsewhere).unwrap();
    symlink(&elsewhere, db.lock_file()).unwrap();
    support::await_tick();
    assert_eq!(code(write(&connection)), ffi::SQLITE_CANTOPEN_SYMLINK);
}

/// The number under which this process has the file open.
fn number_of(path: &Path) -> RawFd {
    let links = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let mut links = links.filter(|link| fs::read_link(link).is_ok_and(|target| target == path));
    let number = links.next().expect("it is open").file_name().unwrap().to_str().unwrap().parse().unwrap();
    assert_eq!(links.next(), None, "once");
    number
}

/// Some code closes a number twice, and the application then opens a file that gets it: `ours` is that file from now on.
fn take_number(ours: RawFd, file: &File) {
    // SAFETY: two numbers; this is the accident that is under test.
    assert_eq!(unsafe { libc::dup2(file.as_raw_fd(), ours) }, ours);
}

fn is_open_on(number: RawFd, file: &File) -> bool {
    fs::metadata(format!("/proc/self/fd/{number}"))
        .is_ok_and(|there| there.ino() == file.metadata().unwrap().ino())
}

/// kanbanlock's descriptors in this process: numbers and files.
fn our_descriptors(db: &TestDb) -> Vec<(RawFd, std::path::PathBuf)> {
    let (queue, lock) = (db.beside(".lock-queue"), db.lock_file());
    let all = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
        let link = entry.unwrap().path();
        Some((link.file_name()?.to_str()?.parse().ok()?, fs::read_link(&link).ok()?))
    });
    let is_ours = |file: &Path| {
        file == queue || file == lock || file.to_str().unwrap().starts_with("/memfd:kanbanlock-queue")
    };
    all.filter(|(_, file)| is_ours(file)).collect()
}

fn says_that_it_was_closed(db: &TestDb) -> usize {
    let lines = log::lines_about(&db.lock_file());
    lines.iter().filter(|(_, line)| line.contains("has closed the descriptor of")).count()
}

/// The number of the lock file's descriptor is another file's: that one is neither locked nor unlocked nor closed, here or in
/// a forked child, and the lock file is locked as ever.
#[test]
fn a_descriptor_that_other_code_closed_is_the_applications() {
    support::in_own_process("a_descriptor_that_other_code_closed_is_the_applications", || {
        let db = database();
        let connection = db.open("kanbanlock");
        write(&connection).unwrap();
        let number = number_of(&db.lock_file());
        let other = File::create(db.dir().join("other")).unwrap();
        let mut outsider = Agent::start();
        outsider.ask(&Task::Flock(db.lock_file())).unwrap();
        take_number(number, &other);
        support::await_tick();
        assert_eq!(code(write(&connection)), ffi::SQLITE_BUSY, "the outsider is respected");
        outsider.ask(&Task::Unflock).unwrap();

        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert!(support::is_flocked(&db.lock_file()));
        assert!(!support::is_flocked(&db.dir().join("other")));
        connection.execute_batch("COMMIT").unwrap();
        assert_eq!(says_that_it_was_closed(&db), 1);

        // SAFETY: the child makes system calls only.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: as above.
                let is_open = unsafe { libc::fcntl(number, libc::F_GETFD) } != -1;
                // SAFETY: as above.
                unsafe { libc::_exit(if is_open { 0 } else { 1 }) }
            }
            child => {
                let mut status = -1;
                // SAFETY: our child, and a place for its status.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert_eq!(status, 0, "the forked child has closed the application's descriptor");
            }
        }
        connection.close().unwrap();
        assert!(is_open_on(number, &other), "nor is it closed here");
    });
}

/// The same within a transaction: our flock is gone with the descriptor, which is noticed at the release; the application's
/// flock stays.
#[test]
fn a_descriptor_that_other_code_closed_under_a_transaction_is_not_unlocked() {
    support::in_own_process(
        "a_descriptor_that_other_code_closed_under_a_transaction_is_not_unlocked",
        || {
            let db = database();
            let connection = db.open("kanbanlock");
            connection.execute_batch("BEGIN IMMEDIATE").unwrap();
            let number = number_of(&db.lock_file());
            let other = File::create(db.dir().join("other")).unwrap();
            other.lock().unwrap();
            take_number(number, &other);
            assert!(!support::is_flocked(&db.lock_file()), "what nobody can prevent");
            support::await_tick();
            connection.execute_batch("INSERT INTO task VALUES ('x'); COMMIT").unwrap();
            assert!(support::is_flocked(&db.dir().join("other")), "the application's own flock");
            assert_eq!(says_that_it_was_closed(&db), 1);
            connection.execute_batch("BEGIN IMMEDIATE").unwrap();
            assert!(support::is_flocked(&db.lock_file()), "again");
            connection.execute_batch("COMMIT").unwrap();
            connection.close().unwrap();
            assert!(is_open_on(number, &other));
        },
    );
}

/// The same for the descriptors of the queue: its memory, its hint file, and the one that tries the flock.
#[test]
fn the_queues_descriptors_that_other_code_closed_are_the_applications() {
    support::in_own_process("the_queues_descriptors_that_other_code_closed_are_the_applications", || {
        let db = database();
        let (a, b) = (db.open("kanbanlock"), db.open("kanbanlock"));
        a.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
        a.execute_batch("COMMIT").unwrap();
        let open = our_descriptors(&db);
        let locks = open.iter().filter(|(_, file)| *file == db.lock_file()).map(|(number, _)| *number);
        assert_eq!((locks.clone().count(), open.len()), (3, 5), "a's, b's, the queue's: {open:?}");
        // The queue's was opened last.
        let rest = open.iter().filter(|(_, file)| *file != db.lock_file()).map(|(number, _)| *number);
        let lost: Vec<_> = rest.chain(locks.max()).collect();
        let other = File::create(db.dir().join("other")).unwrap();
        lost.iter().for_each(|number| take_number(*number, &other));
        support::await_tick();
        write(&a).unwrap();
        a.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
        a.execute_batch("COMMIT").unwrap();
        write(&b).unwrap();
        a.close().unwrap();
        b.close().unwrap();
        assert!(lost.iter().all(|number| is_open_on(*number, &other)), "{lost:?}");
    });
}

/// Nobody has taken the number: EBADF.
#[test]
fn a_descriptor_that_other_code_closed_is_opened_again() {
    support::in_own_process("a_descriptor_that_other_code_closed_is_opened_again", || {
        let db = database();
        let connection = db.open("kanbanlock");
        for begun in [false, true] {
            write(&connection).unwrap();
            if begun {
                connection.execute_batch("BEGIN IMMEDIATE").unwrap();
            }
            // SAFETY: a number; this is the accident that is under test.
            assert_eq!(unsafe { libc::close(number_of(&db.lock_file())) }, 0);
            support::await_tick();
            if begun {
                connection.execute_batch("COMMIT").unwrap();
            }
            connection.execute_batch("BEGIN IMMEDIATE").unwrap();
            assert!(support::is_flocked(&db.lock_file()));
            connection.execute_batch("COMMIT").unwrap();
            assert_eq!(says_that_it_was_closed(&db), if begun { 2 } else { 1 });
        }
    });
}

/// Where a standard descriptor is closed, the next file that is opened gets its number, and what somebody prints goes there.
#[test]
fn no_descriptor_of_ours_is_a_standard_one() {
    support::in_own_process("no_descriptor_of_ours_is_a_standard_one", || {
        let db = database();
        let (a, b) = (db.open("kanbanlock"), db.open("kanbanlock"));
        // SAFETY: standard input; nobody reads it.
        assert_eq!(unsafe { libc::close(0) }, 0);
        a.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert_eq!(code(b.execute_batch("BEGIN IMMEDIATE")), ffi::SQLITE_BUSY);
        a.execute_batch("COMMIT").unwrap();
        let open = our_descriptors(&db);
        assert!(open.len() >= 5, "a's and b's lock file, the queue's three: {open:?}");
        assert!(open.iter().all(|(number, _)| *number >= 3), "{open:?}");
    });
}

/// A member of the database's group may not give the lock file to the database's owner, but to its group: a colleague can
/// then lock it.
#[test]
fn a_members_lock_file_takes_the_databases_group() {
    // SAFETY: no arguments, cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    if !is_root || !can_drop_privileges("a_members_lock_file_takes_the_databases_group") {
        println!(
            "SKIPPED a_members_lock_file_takes_the_databases_group: not root, so it may not choose groups"
        );
        return;
    }
    let db = database();
    open_to_others(&db);
    std::os::unix::fs::chown(db.path(), Some(1), Some(1234)).unwrap();
    fs::set_permissions(db.path(), Permissions::from_mode(0o660)).unwrap();
    let mut member = Agent::unprivileged_in(&["--groups=1234"]);
    member.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
    member.execute("INSERT INTO task VALUES ('x')").unwrap();
    let lock = fs::metadata(db.lock_file()).unwrap();
    assert_eq!((lock.uid(), lock.gid(), lock.mode() & 0o777), (65534, 1234, 0o660));
}

/// Row L13: in a folder that cannot be written a read-only connection reads, and answers a checkpoint that restarts nothing
/// as stock does. One that would needs the lock file.
#[test]
fn a_read_only_connection_needs_a_lock_file_to_restart_the_wal() {
    if !can_drop_privileges("a_read_only_connection_needs_a_lock_file_to_restart_the_wal") {
        return;
    }
    let db = database();
    open_to_others(&db);
    let writer = Connection::open_with_flags_and_vfs(db.path(), Default::default(), "unix").unwrap();
    set_journal_mode(&writer, "wal");
    write(&writer).unwrap();
    writer.query_row("PRAGMA wal_checkpoint", [], |_| Ok(())).unwrap();
    fs::set_permissions(db.dir(), Permissions::from_mode(0o555)).unwrap();
    let open = |vfs: &str| {
        let mut agent = Agent::unprivileged();
        agent.ask(&Task::Open(format!("file:{}?mode=ro&vfs={vfs}", db.path().display()))).unwrap();
        assert_eq!(agent.query("SELECT count(*) FROM task"), "1");
        assert_eq!(agent.query("PRAGMA wal_checkpoint(PASSIVE)"), "0");
        agent
    };
    let truncate = Task::Query("PRAGMA wal_checkpoint(TRUNCATE)".to_owned());
    let refused = open("kanbanlock").ask(&truncate).unwrap_err();
    assert_eq!(refused, (ffi::SQLITE_READONLY_DIRECTORY, "attempt to write a readonly database".to_owned()));
    let unlocked = open("kanbanlock&kanbanlock_fallback=unlocked").ask(&truncate);
    assert_eq!(unlocked, Ok("0".to_owned()));
    assert_eq!(open("unix").ask(&truncate), Ok("0".to_owned()), "stock");
}

/// `kanbanlock_fallback=unlocked` is the only way out, and it says so.
#[test]
fn fallback_unlocked_writes_and_logs_once() {
    let db = database();
    fs::create_dir(db.lock_file()).unwrap();
    let connection = db.try_open_uri("vfs=kanbanlock&kanbanlock_fallback=unlocked").unwrap();
    let before = kanbanlock::stats().unlocked;
    write(&connection).unwrap();
    write(&connection).unwrap();
    assert!(kanbanlock::stats().unlocked >= before + 2);
    let lines = log::lines_about(&db.lock_file());
    let warnings: Vec<_> =
        lines.iter().filter(|(_, line)| line.contains("Writing WITHOUT the lock")).collect();
    assert_eq!(warnings.len(), 1, "{lines:?}");

    fs::remove_dir(db.lock_file()).unwrap();
    connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(support::is_flocked(&db.lock_file()), "the cause is gone");
    connection.execute_batch("COMMIT").unwrap();
    assert!(!support::is_flocked(&db.lock_file()));
}

/// … but another holder is not a broken lock file.
#[test]
fn fallback_unlocked_does_not_ignore_a_holder() {
    let db = database();
    let connection = db.try_open_uri("vfs=kanbanlock&kanbanlock_fallback=unlocked").unwrap();
    write(&connection).unwrap();
    let mut outsider = Agent::start();
    outsider.ask(&Task::Flock(db.lock_file())).unwrap();
    assert_eq!(code(write(&connection)), ffi::SQLITE_BUSY);
}

/// An application that kept its own flock around BEGIN IMMEDIATE … COMMIT waits for itself.
#[test]
fn a_self_deadlock_is_named_in_the_log() {
    let db = database();
    let mut agent = Agent::with_db(db.path(), "kanbanlock");
    agent.execute("INSERT INTO task VALUES ('x')").unwrap();
    agent.query("PRAGMA busy_timeout = 300");

    // Another process's flock: an ordinary wait, nothing to report.
    let mut outsider = Agent::start();
    outsider.ask(&Task::Flock(db.lock_file())).unwrap();
    assert_eq!(agent.execute("INSERT INTO task VALUES ('y')").unwrap_err().0, ffi::SQLITE_BUSY);
    assert_eq!(agent.log(), "");
    outsider.ask(&Task::Unflock).unwrap();

    // Its own.
    agent.ask(&Task::Flock(db.lock_file())).unwrap();
    for _ in 0..2 {
        assert_eq!(agent.execute("INSERT INTO task VALUES ('z')").unwrap_err().0, ffi::SQLITE_BUSY);
    }
    assert_eq!(agent.log().matches("its connection waits for itself").count(), 1, "{}", agent.log());
    agent.ask(&Task::Unflock).unwrap();
    agent.execute("INSERT INTO task VALUES ('z')").unwrap();
}

/// A wait over `kanbanlock_warn_ms` says in the log, once, whom it is for: another connection, or a foreign flock.
#[test]
fn a_long_wait_names_the_holder() {
    let db = database();
    let uri = format!("file:{}?vfs=kanbanlock&kanbanlock_warn_ms=50", db.path().display());
    let mut waiter = Agent::start();
    waiter.ask(&Task::Open(uri)).unwrap();
    waiter.query("PRAGMA busy_timeout = 300");
    let mut holder = Agent::with_db(db.path(), "kanbanlock");
    // Who has waited once is at the queue, where the holder then says since when.
    holder.execute("BEGIN IMMEDIATE").unwrap();
    waiter.execute("INSERT INTO task VALUES ('x')").unwrap_err();
    holder.execute("COMMIT").unwrap();
    waiter.execute("INSERT INTO task VALUES ('x')").unwrap();
    support::await_tick();
    holder.execute("BEGIN IMMEDIATE; COMMIT; BEGIN IMMEDIATE").unwrap();
    let before = waiter.log();
    waiter.execute("INSERT INTO task VALUES ('x')").unwrap_err();
    waiter.execute("INSERT INTO task VALUES ('x')").unwrap_err();
    holder.execute("COMMIT").unwrap();
    waiter.execute("INSERT INTO task VALUES ('x')").unwrap();
    let log = waiter.log();
    assert_eq!(before.matches("is held by process").count(), 1, "{before}");
    for part in [&format!("is held by process {} (", holder.pid()), "agent_process", ") for "] {
        assert!(log.lines().last().unwrap_or_default().contains(part), "no {part}: {log}");
    }

    holder.ask(&Task::Flock(db.lock_file())).unwrap();
    waiter.execute("INSERT INTO task VALUES ('x')").unwrap_err();
    let log = waiter.log();
    let holder_process = format!("process {} (", holder.pid());
    assert!(log.lines().last().unwrap_or_default().contains(&holder_process), "no {holder_process}: {log}");
    holder.ask(&Task::Unflock).unwrap();

    // By default not after so short a time.
    let mut patient = Agent::with_db(db.path(), "kanbanlock");
    patient.query("PRAGMA busy_timeout = 300");
    holder.execute("BEGIN IMMEDIATE").unwrap();
    patient.execute("INSERT INTO task VALUES ('x')").unwrap_err();
    assert_eq!(patient.log(), "");
}

/// flock(1) is the shell's door to the same lock.
#[test]
fn flock_1_excludes_writers_and_is_excluded() {
    if Command::new("flock").arg("--version").output().is_err() {
        println!(
            "SKIPPED flock_1_excludes_writers_and_is_excluded: flock(1) from util-linux is not installed"
        );
        return;
    }
    let db = database();
    let connection = db.open("kanbanlock");
    connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    let flock = |command: &str| {
        let _fork = support::no_fork_meanwhile();
        Command::new("flock").arg("-n").arg(db.lock_file()).args(["-c", command]).status().unwrap().success()
    };
    assert!(!flock("true"), "held");
    connection.execute_batch("COMMIT").unwrap();
    assert!(flock("true"), "free");
}
