//! The hint file `<db>.lock-queue`: what can stand there, and what becomes of the queue then.
//!
//! In each case writers go on, none of their commits is lost or made twice, and there is one line in the log where the user
//! has to do something. Once the cause is gone, the queue works again: those who wait sleep in its memory.

mod support;

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::Connection;
use support::agent::{Agent, Task};
use support::storm::{PATIENT, commits, jain, longest, storm_of};
use support::{TestDb, set_journal_mode};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

/// Writers at once in each case, and for how many milliseconds.
const WRITERS: usize = 4;
const MILLIS: u64 = 250;

fn database() -> TestDb {
    let db = TestDb::new();
    set_up(&db);
    db
}

fn set_up(db: &TestDb) {
    let connection = Connection::open(db.path()).unwrap();
    set_journal_mode(&connection, "wal");
    connection.execute_batch("CREATE TABLE t (writer, number, ballast)").unwrap();
    File::create(db.lock_file()).unwrap();
}

fn hint(db: &TestDb) -> PathBuf {
    db.beside(".lock-queue")
}

fn waiting_agent(db: &TestDb) -> Agent {
    let mut agent = Agent::with_db(db.path(), "kanbanlock");
    agent.execute("PRAGMA busy_timeout = 60000").unwrap();
    agent
}

/// Writers all at once, audited; their logs.
fn write_at_once(db: &TestDb, meanwhile: impl FnOnce(&AtomicBool) + Send) -> Vec<String> {
    Connection::open(db.path()).unwrap().execute_batch("DELETE FROM t").unwrap();
    let mut agents: Vec<Agent> = (0..WRITERS).map(|_| Agent::start()).collect();
    let is_over = AtomicBool::new(false);
    let tallies = std::thread::scope(|scope| {
        scope.spawn(|| meanwhile(&is_over));
        let tallies = storm_of(&mut agents, db, "kanbanlock", MILLIS, 0, &[PATIENT; WRITERS]);
        is_over.store(true, Ordering::Relaxed);
        tallies
    });
    assert!(tallies.iter().all(|tally| tally.commits > 0 && tally.busy == 0), "{tallies:?}");
    println!("{} commits", commits(&tallies));
    agents.iter_mut().map(Agent::log).collect()
}

/// Two that wait sleep in the memory that the hint file leads to.
fn assert_queue_works(db: &TestDb) {
    let mut agents = [waiting_agent(db), waiting_agent(db), waiting_agent(db)];
    assert_all_meet(&mut agents);
    assert_eq!(agents.iter_mut().map(Agent::log).collect::<String>(), "");
}

/// While the first of them holds the gate, the others sleep in the queue's memory; and then get it, in order. On a busy
/// machine one that does not run for 5 ms when it should have looked (`GRACE` in queue.rs) is passed over; so the order
/// may be another for as long as the machine is busy, but not for ever.
fn assert_all_meet(agents: &mut [Agent]) {
    let expected: Vec<String> = (1..agents.len()).map(|number| number.to_string()).collect();
    let orders: Vec<String> =
        (0..ROUNDS).map_while(|_| Some(order(agents)).filter(|order| *order != expected.join(","))).collect();
    assert!(orders.len() < ROUNDS, "{orders:?}");
}

/// How often the order may be another.
const ROUNDS: usize = 20;

/// In which order they get the gate; each of them does.
fn order(agents: &mut [Agent]) -> String {
    let (holder, waiters) = agents.split_first_mut().unwrap();
    holder.execute("DELETE FROM t WHERE writer = 100; BEGIN IMMEDIATE").unwrap();
    for (number, waiter) in (1..).zip(&mut *waiters) {
        waiter.send(&Task::Execute(format!("INSERT INTO t VALUES (100, {number}, NULL)")));
        waiter.await_asleep(true);
    }
    holder.execute("COMMIT").unwrap();
    waiters.iter_mut().for_each(|waiter| drop(waiter.receive().unwrap()));
    holder.query("SELECT group_concat(number) FROM (SELECT number FROM t WHERE writer = 100 ORDER BY rowid)")
}

/// Something stands in the way until `clear`: polling, one line from each connection that waited.
fn assert_polls(expected: &str, obstruct: impl Fn(&Path), clear: impl Fn(&Path)) {
    let db = database();
    obstruct(&hint(&db));
    assert_polls_at(&db, expected);
    clear(&hint(&db));
    assert_queue_works(&db);
}

fn assert_polls_at(db: &TestDb, expected: &str) {
    let logs = write_at_once(db, |_| ());
    for log in &logs {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("no fair queue")).collect();
        assert!(lines.len() <= 1 && lines.iter().all(|line| line.contains(expected)), "{log}");
    }
    assert!(logs.concat().contains(expected), "nobody said why: {logs:?}");
}

fn remove_file(path: &Path) {
    fs::remove_file(path).unwrap();
}

#[test]
fn something_else_in_the_hint_file() {
    assert_polls("remove it", |hint| fs::write(hint, "#!/bin/sh\n").unwrap(), remove_file);
    assert_polls("remove it", |hint| fs::write(hint, vec![0xff; 100_000]).unwrap(), remove_file);
}

#[test]
fn a_hint_file_of_another_version() {
    assert_polls("remove it", |hint| fs::write(hint, "kanbanlock queue 2\n1 2 3 4\n").unwrap(), remove_file);
}

#[test]
fn a_directory() {
    let remove = |hint: &Path| fs::remove_dir(hint).unwrap();
    assert_polls("it is a directory; remove it", |hint| fs::create_dir(hint).unwrap(), remove);
}

#[test]
fn a_symbolic_link_is_not_followed() {
    assert_polls(
        "it is a symbolic link; remove it",
        |hint| symlink("elsewhere", hint).unwrap(),
        |hint| {
            assert!(!hint.parent().unwrap().join("elsewhere").exists());
            remove_file(hint);
        },
    );
}

#[test]
fn a_fifo_does_not_hang() {
    let make = |hint: &Path| {
        let _fork = support::no_fork_meanwhile();
        assert!(std::process::Command::new("mkfifo").arg(hint).status().unwrap().success());
    };
    assert_polls("it is not a regular file; remove it", make, remove_file);
}

/// What leads nowhere is written anew, without a word.
#[test]
fn a_hint_that_leads_nowhere_is_replaced() {
    let own = std::process::id();
    for text in [
        String::new(),
        "kanbanlock queue 1\n".to_owned(),
        "kanbanlock queue 1\n1 2 3".to_owned(),
        "kanbanlock queue 1\nx y z t\n".to_owned(),
        // Of this pid namespace: a process that does not exist, and a descriptor that is something else.
        namespaced(&format!("{} 3 4", i32::MAX)),
        namespaced(&format!("{own} 0 4")),
        namespaced(&format!("{own} 999999 4")),
    ] {
        let db = database();
        fs::write(hint(&db), &text).unwrap();
        let logs = write_at_once(&db, |_| ());
        assert_eq!(logs.concat(), "", "{text:?}");
        assert_queue_works(&db);
    }
}

/// Whoever writes a hint file may be stopped by a full disk, or killed, after any byte of it.
#[test]
fn a_half_written_hint_is_replaced() {
    let db = database();
    let mut agents = [waiting_agent(&db), waiting_agent(&db), waiting_agent(&db)];
    assert_all_meet(&mut agents);
    let whole = fs::read(hint(&db)).unwrap();
    for length in 0..whole.len() {
        fs::write(hint(&db), &whole[..length]).unwrap();
        assert_all_meet(&mut agents);
        assert_ne!(fs::read(hint(&db)).unwrap(), &whole[..length]);
    }
    // A longer one that was overwritten, and not cut yet.
    fs::write(hint(&db), [&whole, &b"17\n"[..]].concat()).unwrap();
    assert_all_meet(&mut agents);
    assert_eq!(agents.iter_mut().map(Agent::log).collect::<String>(), "");
}

/// It holds the hint file's flock, and does not go on.
#[test]
fn whoever_writes_the_hint_is_stopped_meanwhile() {
    let db = database();
    fs::write(hint(&db), "kanbanlock qu").unwrap();
    let file = File::open(hint(&db)).unwrap();
    file.lock().unwrap();
    assert_polls_at(&db, "its flock is held by somebody else");
    drop(file);
    assert_queue_works(&db);
}

/// The database's own files need no more space, and what is missing is a line of text, or a name for it.
#[test]
fn the_disk_is_full() {
    let is_allowed = support::in_own_namespace(&["--mount"], "the_disk_is_full", || {
        for fill in [fill_up, use_all_names_up] {
            let disk = tempfile::tempdir().unwrap();
            run("mount", &["-t", "tmpfs", "-o", "size=256m,nr_inodes=64", "kanbanlock-test"], disk.path());
            {
                let db = database_in(disk.path());
                // The longest WAL that there will be, and a database with room: neither grows any more.
                let keeper = db.open("unix");
                keeper
                    .execute_batch("INSERT INTO t VALUES (-1, 0, zeroblob(64 << 20)); DELETE FROM t")
                    .unwrap();
                File::create(db.beside("-start")).unwrap();
                let filled = fill(disk.path());
                assert_polls_at(&db, "No space left on device (os error 28): free some space");
                assert_polls_at(&db, "No space left on device (os error 28): free some space");
                filled.into_iter().for_each(|file| fs::remove_file(file).unwrap());
                assert_queue_works(&db);
            }
            run("umount", &[], disk.path());
        }
    });
    if !is_allowed {
        println!("SKIPPED: needs to mount a small disk: root, or user namespaces");
    }
}

fn database_in(folder: &Path) -> TestDb {
    let db = TestDb::new_in(folder);
    set_up(&db);
    db
}

fn run(program: &str, arguments: &[&str], path: &Path) {
    let _fork = support::no_fork_meanwhile();
    assert!(std::process::Command::new(program).args(arguments).arg(path).status().unwrap().success());
}

/// Until nothing can be written any more.
fn fill_up(folder: &Path) -> Vec<PathBuf> {
    let path = folder.join("large");
    let mut file = File::create(&path).unwrap();
    let error = std::io::copy(&mut std::io::repeat(1), &mut file).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    vec![path]
}

/// Until no file can be created any more.
fn use_all_names_up(folder: &Path) -> Vec<PathBuf> {
    let names = (0..).map(|number| folder.join(format!("small-{number}")));
    names.take_while(|path| File::create_new(path).is_ok()).collect()
}

fn namespaced(rest: &str) -> String {
    use std::os::unix::fs::MetadataExt;
    format!("kanbanlock queue 1\n{} {rest}\n", fs::metadata("/proc/self/ns/pid").unwrap().ino())
}

#[test]
fn the_hint_of_another_database_is_not_believed() {
    let (db, other) = (database(), database());
    let mut holder = waiting_agent(&other);
    let mut waiter = waiting_agent(&other);
    holder.execute("BEGIN IMMEDIATE").unwrap();
    waiter.send(&Task::Execute("BEGIN IMMEDIATE; COMMIT".to_owned()));
    waiter.await_asleep(true);
    fs::copy(hint(&other), hint(&db)).unwrap();
    assert_eq!(write_at_once(&db, |_| ()).concat(), "");
    assert_ne!(fs::read(hint(&other)).unwrap(), fs::read(hint(&db)).unwrap());
    assert_queue_works(&db);
    holder.execute("COMMIT").unwrap();
    waiter.receive().unwrap();
}

#[test]
fn truncated_deleted_and_littered_while_in_use() {
    let meddle: [fn(&Path); 4] = [
        |hint| drop(OpenOptions::new().write(true).truncate(true).open(hint)),
        |hint| drop(fs::remove_file(hint)),
        |hint| drop(fs::rename(hint, hint.with_extension("away"))),
        |hint| {
            if hint.exists() {
                let _ = fs::write(hint, namespaced("9 9 9 9"));
            }
        },
    ];
    for meddle in meddle {
        let db = database();
        let path = hint(&db);
        let again_and_again = |is_over: &AtomicBool| {
            while !is_over.load(Ordering::Relaxed) {
                meddle(&path);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        };
        let _ = write_at_once(&db, again_and_again);
        // The last word was perhaps the meddler's.
        assert_queue_works(&db);
    }
}

#[test]
fn nobody_can_take_the_memory_away() {
    let db = database();
    assert_queue_works(&db);
    let mut agents = [waiting_agent(&db), waiting_agent(&db)];
    let [holder, waiter] = &mut agents;
    holder.execute("BEGIN IMMEDIATE").unwrap();
    waiter.send(&Task::Execute("BEGIN IMMEDIATE; COMMIT".to_owned()));
    waiter.await_asleep(true);
    let (pid, fd) = publisher(&db);
    let memory = OpenOptions::new().write(true).open(format!("/proc/{pid}/fd/{fd}")).unwrap();
    let length = memory.metadata().unwrap().len();
    assert!(length > 0);
    for size in [0, 1, length - 1, length + 1] {
        assert_eq!(memory.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM), "{size}");
    }
    holder.execute("COMMIT").unwrap();
    waiter.receive().unwrap();
}

/// Where the hint file says that the memory is.
fn publisher(db: &TestDb) -> (u32, u32) {
    let text = fs::read_to_string(hint(db)).unwrap();
    let mut numbers = text.lines().nth(1).unwrap().split(' ').skip(1).map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// The memory lives as long as somebody has it mapped; whoever comes after the publisher makes new memory, and those who
/// wait in the old one move.
#[test]
fn the_publisher_is_killed_while_others_wait() {
    let db = database();
    let insert = |writer| Task::Execute(format!("INSERT INTO t VALUES ({writer}, 0, NULL)"));
    let mut publishing = waiting_agent(&db);
    let mut agents: Vec<Agent> = (0..3).map(|_| waiting_agent(&db)).collect();
    let [holder, waiter, newcomer] = &mut agents[..] else { unreachable!() };
    holder.execute("BEGIN IMMEDIATE").unwrap();
    publishing.send(&insert(0));
    publishing.await_asleep(true);
    waiter.send(&insert(1));
    waiter.await_asleep(true);
    let pid = publishing.pid();
    assert_eq!(publisher(&db).0, pid, "the first that was refused");
    publishing.kill();
    newcomer.send(&insert(2));
    newcomer.await_asleep(true);
    holder.execute("COMMIT").unwrap();
    waiter.receive().unwrap();
    newcomer.receive().unwrap();
    assert_eq!(holder.query("SELECT count(*) FROM t"), "2");
    assert_ne!(publisher(&db).0, pid);
    assert_eq!(agents.iter_mut().map(Agent::log).collect::<String>(), "");
    drop(agents);
    assert_queue_works(&db);
}

#[test]
fn publishers_are_killed_again_and_again() {
    let db = database();
    let kill = |is_over: &AtomicBool| {
        while !is_over.load(Ordering::Relaxed) {
            // A bystander that waits, and publishes if nobody else has, dies.
            let bystander = waiting_agent(&db);
            drop(bystander);
            let _ = fs::remove_file(hint(&db));
        }
    };
    assert_eq!(write_at_once(&db, kill).concat(), "");
    assert_queue_works(&db);
}

/// A process number that was used again, for a process that does not let others look: whose it is is not asked.
#[test]
fn a_hint_that_leads_to_an_unrelated_process_of_another_user_is_replaced() {
    let db = database();
    let world = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    fs::write(hint(&db), namespaced("1 0 4")).unwrap(); // init is root's
    [db.dir(), db.path(), &db.lock_file(), &hint(&db)].into_iter().for_each(world);
    let mut agents: Vec<Agent> = (0..3).map(|_| unprivileged(&db)).collect();
    assert_all_meet(&mut agents);
    assert_eq!(agents.iter_mut().map(Agent::log).collect::<String>(), "");
}

fn unprivileged(db: &TestDb) -> Agent {
    let mut agent = Agent::unprivileged();
    agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
    agent.execute("PRAGMA busy_timeout = 60000").unwrap();
    agent
}

/// … is left alone; but not when its process is gone.
#[test]
fn the_memory_of_another_user() {
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: needs root, to become somebody else");
        return;
    }
    let db = database();
    let world = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    [db.dir(), db.path(), &db.lock_file()].into_iter().for_each(world);
    let publisher = publish(&db, waiting_agent(&db));
    let before = fs::read(hint(&db)).unwrap();
    world(&hint(&db));
    let mut agents: Vec<Agent> = (0..3).map(|_| unprivileged(&db)).collect();
    poll_beside(&mut agents, "let one user open this database");
    assert_eq!(fs::read(hint(&db)).unwrap(), before);
    publisher.kill();
    let mut agents: Vec<Agent> = (0..3).map(|_| unprivileged(&db)).collect();
    assert_all_meet(&mut agents);
    assert_eq!(agents.iter_mut().map(Agent::log).collect::<String>(), "");
}

/// Lets `agent` be refused, so that it makes the hint file.
fn publish(db: &TestDb, mut agent: Agent) -> Agent {
    let mut holder = waiting_agent(db);
    holder.execute("BEGIN IMMEDIATE").unwrap();
    agent.send(&Task::Execute("INSERT INTO t VALUES (0, 0, NULL)".to_owned()));
    agent.await_asleep(true);
    holder.execute("COMMIT").unwrap();
    agent.receive().unwrap();
    agent
}

/// The first of them holds the gate, the others poll, each with one line in the log; and then get it.
fn poll_beside(agents: &mut [Agent], expected: &str) {
    let (holder, waiters) = agents.split_first_mut().unwrap();
    holder.execute("BEGIN IMMEDIATE").unwrap();
    for waiter in &mut *waiters {
        waiter.send(&Task::Execute("INSERT INTO t VALUES (1, 0, NULL)".to_owned()));
        waiter.await_asleep(false);
    }
    holder.execute("COMMIT").unwrap();
    for waiter in waiters {
        waiter.receive().unwrap();
        let log = waiter.log();
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("no fair queue") && log.contains(expected), "{log}");
    }
}

/// Another container's hint file is left alone while that container lives. After that, and this is what a restarted
/// container finds on its volume, it is replaced.
#[test]
fn the_memory_of_another_pid_namespace() {
    let db = database();
    let Some(mut inside) = Agent::unshared(&["--pid", "--mount-proc"]) else {
        println!("SKIPPED: needs a pid namespace: root, or user namespaces");
        return;
    };
    let uri = format!("file:{}?vfs=kanbanlock", db.path().display());
    inside.ask(&Task::Open(uri)).unwrap();
    inside.execute("PRAGMA busy_timeout = 60000").unwrap();
    assert_eq!(inside.ask(&Task::Pid).unwrap(), "1");
    let inside = publish(&db, inside);
    let before = fs::read(hint(&db)).unwrap();
    assert_eq!(publisher(&db).0, 1);
    let mut outside: Vec<Agent> = (0..3).map(|_| waiting_agent(&db)).collect();
    poll_beside(&mut outside, "share a pid namespace");
    assert_eq!(fs::read(hint(&db)).unwrap(), before);
    // All of them beside each other, audited.
    assert_polls_at(&db, "share a pid namespace");
    inside.kill();
    assert_queue_works(&db);
}

/// … or one that cannot be seen, where `/proc` is mounted with hidepid, and on another machine.
#[test]
fn the_memory_of_a_process_that_cannot_be_seen() {
    let db = database();
    let text = namespaced(&format!("{} 3 77", i32::MAX));
    fs::write(hint(&db), &text).unwrap();
    // It keeps the byte that says that inode 77 is there.
    let file = File::open(hint(&db)).unwrap();
    // SAFETY: a structure of integers, for which all zeroes are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_start, lock.l_len) = (i16::try_from(libc::F_RDLCK).unwrap(), 77, 1);
    // SAFETY: an open descriptor, and the structure that the command takes.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }, 0);
    assert_polls_at(&db, "cannot be seen from here");
    assert_eq!(fs::read_to_string(hint(&db)).unwrap(), text);
    drop(file);
    assert_queue_works(&db);
}

/// Their monotonic clocks differ by 100,000 s, and they meet at one board: as holder, as the one that made it, and waiting.
#[test]
fn processes_of_another_time_namespace() {
    let db = database();
    let ahead = || {
        let mut agent = Agent::unshared(&["--time", "--monotonic", "100000"])?;
        agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
        agent.execute("PRAGMA busy_timeout = 60000").unwrap();
        Some(agent)
    };
    // SAFETY: no arguments, cannot fail. (In a user namespace of its own it would poll, as another user's process does.)
    if unsafe { libc::geteuid() } != 0 || ahead().is_none() {
        println!("SKIPPED: needs root, to make a time namespace");
        return;
    }
    let namespace = |agent: &Agent| fs::read_link(format!("/proc/{}/ns/time", agent.pid())).unwrap();
    for is_ahead in [[false, true, false, true], [true, false, true, false]] {
        let _ = fs::remove_file(hint(&db));
        let mut agents =
            is_ahead.map(|is_ahead| if is_ahead { ahead().unwrap() } else { waiting_agent(&db) });
        assert_ne!(namespace(&agents[0]), namespace(&agents[1]));
        assert_all_meet(&mut agents);
        assert_eq!(agents.iter_mut().map(Agent::log).collect::<String>(), "");
        // In a tight loop, too, nobody is starved.
        Connection::open(db.path()).unwrap().execute_batch("DELETE FROM t").unwrap();
        let tallies = storm_of(&mut agents, &db, "kanbanlock", 1000, 0, &[PATIENT; 4]);
        println!(
            "{} commits, Jain {:.3}, longest {} us",
            commits(&tallies),
            jain(&tallies),
            longest(&tallies)
        );
        assert!(jain(&tallies) > 0.9, "{tallies:?}");
    }
}

/// A read-only hint file, or none in a folder that may not be written to: of a process that is not root.
#[test]
fn without_permission_there_is_polling() {
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: needs root, to become somebody else");
        return;
    }
    for may_exist in [true, false] {
        let db = database();
        set_journal_mode(&Connection::open(db.path()).unwrap(), "delete");
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        mode(db.path(), 0o666);
        mode(&db.lock_file(), 0o666);
        if may_exist {
            fs::write(hint(&db), "").unwrap();
            mode(&hint(&db), 0o444);
        }
        mode(db.dir(), 0o555);
        let mut agents: Vec<Agent> = (0..3).map(|_| Agent::unprivileged()).collect();
        for agent in &mut agents {
            agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
            agent.execute("PRAGMA busy_timeout = 60000; PRAGMA journal_mode = memory").unwrap();
        }
        let (holder, waiters) = agents.split_first_mut().unwrap();
        holder.execute("BEGIN IMMEDIATE").unwrap();
        for waiter in &mut *waiters {
            waiter.send(&Task::Execute("INSERT INTO t VALUES (0, 0, NULL)".to_owned()));
            waiter.await_asleep(false);
        }
        holder.execute("COMMIT").unwrap();
        for waiter in &mut *waiters {
            waiter.receive().unwrap();
            let log = waiter.log();
            assert_eq!(log.lines().filter(|line| line.contains("no fair queue")).count(), 1, "{log}");
            assert!(log.contains("give it the lock file's owner and mode"), "{log}");
        }
        assert_eq!(holder.query("SELECT count(*) FROM t"), "2");
        mode(db.dir(), 0o755);
    }
}

/// With the sysctl vm.memfd_noexec at 2 a memory file that could be executed is not made at all; and no program is in it,
/// whatever the mode of the database.
#[test]
fn the_memory_is_not_executable() {
    kanbanlock::register().unwrap();
    let db = database();
    fs::set_permissions(db.path(), Permissions::from_mode(0o755)).unwrap();
    fs::remove_file(db.lock_file()).unwrap(); // it takes the database's mode when it is made
    let (a, b) = (support::open(db.path(), "kanbanlock"), support::open(db.path(), "kanbanlock"));
    a.execute_batch("BEGIN IMMEDIATE").unwrap();
    b.execute_batch("BEGIN IMMEDIATE").unwrap_err();
    let text = fs::read_to_string(hint(&db)).unwrap();
    let number: libc::c_int = text.split_whitespace().nth(5).unwrap().parse().unwrap();
    let memory = fs::metadata(format!("/proc/self/fd/{number}")).unwrap();
    assert_eq!(memory.permissions().mode() & 0o777, 0o644);
    const NOEXEC_SEAL: libc::c_uint = 8;
    // SAFETY: a NUL-terminated name.
    let probe = unsafe { libc::memfd_create(c"probe".as_ptr(), NOEXEC_SEAL) };
    if probe == -1 {
        return; // before Linux 6.3
    }
    // SAFETY: just made.
    unsafe { libc::close(probe) };
    const SEAL_EXEC: libc::c_int = 0x20;
    // SAFETY: the memory's number, open as long as a or b is.
    assert_ne!(unsafe { libc::fcntl(number, libc::F_GET_SEALS) } & SEAL_EXEC, 0);
}
