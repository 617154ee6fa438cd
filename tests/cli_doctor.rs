//! `kanbanlock doctor`: a sound database passes, and each fault is planted once and found by the check that is for it.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use support::TestDb;
use support::agent::{Agent, Task};
use support::system_sqlite::{System, SystemConnection};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

#[derive(Debug, Deserialize)]
struct Finding {
    check: String,
    verdict: String,
    what: String,
    fix: Option<String>,
}

/// The exit status, and what was found.
fn doctor_with(db: &Path, environment: &[(&str, &Path)]) -> (i32, Vec<Finding>) {
    let _fork = support::no_fork_meanwhile();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kanbanlock"));
    let output =
        command.args(["doctor", "--json"]).arg(db).envs(environment.iter().copied()).output().unwrap();
    let findings = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), findings)
}

fn doctor(db: &Path) -> (i32, Vec<Finding>) {
    doctor_with(db, &[])
}

/// All is well, but for what cannot be known.
fn assert_sound(db: &Path) {
    let (status, findings) = doctor(db);
    assert!(findings.iter().all(|finding| finding.verdict != "wrong"), "{findings:#?}");
    assert_eq!(status, 0);
}

/// Exactly this check finds something wrong, and says so in these words; and there is a way out.
fn assert_found((status, findings): (i32, Vec<Finding>), check: &str, words: &str) {
    let wrong: Vec<&Finding> = findings.iter().filter(|finding| finding.verdict == "wrong").collect();
    let is_it = |finding: &&&Finding| finding.check == check && finding.what.contains(words);
    assert!(wrong.iter().any(|finding| is_it(&finding)), "no {check}: {words}: {findings:#?}");
    assert!(wrong.iter().all(|finding| finding.check == check), "{wrong:#?}");
    assert!(
        wrong.iter().all(|finding| finding.fix.as_ref().is_some_and(|fix| !fix.is_empty())),
        "{wrong:#?}"
    );
    assert_eq!(status, 1);
}

/// A database that somebody has written through kanbanlock, and nobody has open.
fn written() -> TestDb {
    let db = TestDb::new();
    let mut agent = Agent::with_db(db.path(), "kanbanlock");
    agent.query("PRAGMA journal_mode = wal");
    agent.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
    agent.ask(&Task::Close).unwrap();
    db
}

#[test]
fn a_sound_database_passes_also_while_it_is_written() {
    let db = written();
    assert_sound(db.path());
    let mut agent = Agent::with_db(db.path(), "kanbanlock");
    agent.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (2)").unwrap();
    assert_sound(db.path());
    let (_, findings) = doctor(db.path());
    let expected = ["file system", "locks", "hard links", "lock file", "permissions", "deleted files"];
    for check in expected.into_iter().chain(["through kanbanlock", "SQLite"]) {
        assert!(findings.iter().any(|finding| finding.check == check), "{check} was not checked");
    }
    let sqlite = findings.iter().find(|finding| finding.check == "SQLite").unwrap();
    assert!(sqlite.what.contains(&format!("SQLite {}", rusqlite::version())), "{sqlite:?}");
}

/// A library that stands in for a system call, loaded before the C library (LD_PRELOAD, ld.so(8)).
fn preload(folder: &Path, source: &str) -> PathBuf {
    let (c, library) = (folder.join("fault.c"), folder.join("fault.so"));
    fs::write(&c, source).unwrap();
    let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&c).status().unwrap();
    assert!(status.success());
    library
}

#[test]
fn a_network_file_system_is_found() {
    let db = written();
    let source = "#define _GNU_SOURCE\n#include <sys/vfs.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n\
        int statfs(const char *path, struct statfs *b) {\n\
        int rc = syscall(SYS_statfs, path, b); b->f_type = 0x6969; return rc; }\n\
        int statfs64(const char *path, struct statfs64 *b) { return statfs(path, (struct statfs *)b); }\n";
    let library = preload(db.dir(), source);
    assert_found(doctor_with(db.path(), &[("LD_PRELOAD", &library)]), "file system", "nfs");
}

/// As a file system that has no flock answers: FUSE passes its program's answer on.
#[test]
fn locks_that_are_not_supported_are_found() {
    let db = written();
    let source = "#include <errno.h>\nint flock(int fd, int operation) { errno = EOPNOTSUPP; return -1; }\n";
    let library = preload(db.dir(), source);
    let found = doctor_with(db.path(), &[("LD_PRELOAD", &library)]);
    assert_found(found, "locks", "flock against flock: Operation not supported");
}

/// A statfs(2) that adds ST_RDONLY, 1, to what the kernel says.
fn preload_read_only(folder: &Path) -> PathBuf {
    let source = "#define _GNU_SOURCE\n#include <sys/vfs.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n\
        int statfs(const char *path, struct statfs *b) {\n\
        int rc = syscall(SYS_statfs, path, b); b->f_flags |= 1; return rc; }\n\
        int statfs64(const char *path, struct statfs64 *b) { return statfs(path, (struct statfs *)b); }\n";
    preload(folder, source)
}

/// As on squashfs (`tests/filesystems/run.py` has one): in WAL mode SQLite cannot even read, without a `-shm`.
#[test]
fn a_wal_on_a_read_only_file_system_is_found() {
    let db = written();
    let library = preload_read_only(db.dir());
    let environment: &[(&str, &Path)] = &[("LD_PRELOAD", &library)];
    assert_found(doctor_with(db.path(), environment), "file system", "nor can SQLite make one");

    rusqlite::Connection::open(db.path()).unwrap().execute_batch("PRAGMA journal_mode = delete").unwrap();
    let (status, findings) = doctor_with(db.path(), environment);
    assert!(findings.iter().all(|finding| finding.verdict == "ok"), "{findings:#?}");
    assert_eq!(status, 0);
}

#[test]
fn locks_that_do_not_exclude_are_found() {
    let db = written();
    let no_flock = preload(db.dir(), "int flock(int fd, int operation) { return 0; }\n");
    let found = doctor_with(db.path(), &[("LD_PRELOAD", &no_flock)]);
    assert_found(found, "locks", "flock against flock: another process gets a lock that is held");
    let source = "#include <stdarg.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n\
        int fcntl(int fd, int command, ...) {\n\
        va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);\n\
        if (command == 37 /* F_OFD_SETLK */) return 0;\n\
        return syscall(SYS_fcntl, fd, command, argument); }\n";
    let no_ofd = preload(db.dir(), source);
    let found = doctor_with(db.path(), &[("LD_PRELOAD", &no_ofd)]);
    assert_found(found, "locks", "OFD against POSIX: another process gets a lock that is held");
}

#[test]
fn the_probe_leaves_nothing_behind() {
    let db = written();
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(db.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    doctor(db.path());
    assert_eq!(names(), before);
}

#[test]
fn a_hard_link_is_found() {
    let db = written();
    fs::hard_link(db.path(), db.dir().join("other.db")).unwrap();
    assert_found(doctor(db.path()), "hard links", "2 names");
}

#[test]
fn each_odd_lock_file_is_found() {
    let db = written();
    let lock = db.lock_file();
    fs::remove_file(&lock).unwrap();
    assert_sound(db.path());

    std::os::unix::fs::symlink("elsewhere", &lock).unwrap();
    assert_found(doctor(db.path()), "lock file", "symbolic link");
    fs::remove_file(&lock).unwrap();

    fs::create_dir(&lock).unwrap();
    assert_found(doctor(db.path()), "lock file", "directory");
    fs::remove_dir(&lock).unwrap();

    assert!(Command::new("mkfifo").arg(&lock).status().unwrap().success());
    assert_found(doctor(db.path()), "lock file", "FIFO");
}

#[test]
fn a_lock_file_that_not_all_writers_can_open_is_found() {
    let db = written();
    fs::set_permissions(db.lock_file(), PermissionsExt::from_mode(0o400)).unwrap();
    assert_found(doctor(db.path()), "lock file", "mode 400");
    let mode = fs::metadata(db.path()).unwrap().permissions();
    fs::set_permissions(db.lock_file(), mode).unwrap();
    assert_sound(db.path());
    match std::os::unix::fs::chown(db.lock_file(), Some(65534), Some(65534)) {
        Ok(()) => assert_found(doctor(db.path()), "lock file", "belongs to 65534:65534"),
        Err(error) => println!("SKIPPED: the part about another owner needs root: {error}"),
    }
}

#[test]
fn permissions_that_keep_writers_out_are_found() {
    let db = written();
    let set = |path: &Path, mode| fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    set(db.path(), 0o444);
    set(&db.lock_file(), 0o444);
    assert_found(doctor(db.path()), "permissions", "read-only for everybody");
    set(db.path(), 0o644);
    set(&db.lock_file(), 0o644);

    fs::write(db.beside("-wal"), "").unwrap();
    set(&db.beside("-wal"), 0o600);
    assert_found(doctor(db.path()), "permissions", "-wal has mode 600, the database 644");
    fs::remove_file(db.beside("-wal")).unwrap();

    set(db.dir(), 0o555);
    let found = doctor(db.path());
    set(db.dir(), 0o755);
    assert_found(found, "permissions", "nobody may create files");
}

#[test]
fn a_process_that_bypasses_kanbanlock_is_found() {
    let db = written();
    let mut agent = Agent::stock_with_db(db.path());
    assert_eq!(agent.query("SELECT x FROM t"), "1");
    assert_found(doctor(db.path()), "through kanbanlock", &format!("process {}", agent.pid()));
}

#[test]
fn a_deleted_wal_that_is_still_open_is_found() {
    let db = written();
    let mut agent = Agent::with_db(db.path(), "kanbanlock");
    agent.execute("INSERT INTO t VALUES (2)").unwrap();
    assert_sound(db.path());
    fs::remove_file(db.beside("-wal")).unwrap();
    assert_found(doctor(db.path()), "deleted files", "kanban.db-wal open");
}

/// And what is in them: the system's SQLite of Debian 12, 3.40.1, has the WAL-reset race.
#[test]
fn two_copies_of_sqlite_and_one_with_the_wal_reset_race_are_found() {
    let Some(system) = System::load_or_skip() else { return };
    let db = written();
    let connection = SystemConnection::open(&system, &format!("file:{}", db.path().display()));
    assert_eq!(connection.execute("SELECT * FROM t"), 0);
    let (status, findings) = doctor(db.path());
    assert_eq!(status, 1);
    let says = |words: &str| {
        findings.iter().any(|finding| finding.verdict == "wrong" && finding.what.contains(words))
    };
    assert!(says("2 copies of SQLite"), "{findings:#?}");
    // SAFETY: a function without arguments, of a library that stays loaded.
    let version = unsafe { (system.api().libversion_number)() };
    if version < 3_051_003 && ![3_044_006, 3_050_007].contains(&version) {
        let text = format!("SQLite {}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000);
        assert!(says(&text) && says("WAL-reset race"), "{text}: {findings:#?}");
    } else {
        println!("SKIPPED: the system's SQLite ({version}) does not have the WAL-reset race");
    }
}
