//! `kanbanlock run`: its command writes the database, and nobody else does.
//!
//! The command is an agent (tests/support/agent.rs), which opens connections through kanbanlock as any program would.
//! That this is not so without `run`: `flock_1_keeps_its_own_command_out`.

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use kanbanlock::Hold;
use rusqlite::{Connection, ffi};
use support::agent::{Agent, Reply, Task};
use support::handles::Order;
use support::{TestDb, is_flocked, set_journal_mode};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

fn database(journal_mode: &str) -> TestDb {
    let db = TestDb::new();
    let connection = Connection::open(db.path()).unwrap();
    set_journal_mode(&connection, journal_mode);
    connection.execute_batch("CREATE TABLE task (title TEXT)").unwrap();
    db
}

/// `kanbanlock run ARGS DB --`
fn run(args: &[&str], db: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kanbanlock"));
    command.arg("run").args(args).arg(db).arg("--");
    command
}

fn output(mut command: Command) -> Output {
    let _fork = support::no_fork_meanwhile();
    command.stdin(Stdio::null()).output().unwrap()
}

fn open(agent: &mut Agent, db: &TestDb) {
    agent.ask(&Task::Open(format!("file:{}?vfs=kanbanlock", db.path().display()))).unwrap();
}

const INSERT: &str = "BEGIN IMMEDIATE; INSERT INTO task VALUES ('x'); COMMIT";

fn is_busy(reply: &Reply) -> bool {
    matches!(reply, Err((ffi::SQLITE_BUSY, _)))
}

#[test]
fn a_lock_file_that_cannot_be_one_is_named_once() {
    let db = database("wal");
    fs::create_dir(db.lock_file()).unwrap();
    let mut command = run(&[], db.path());
    command.arg("true");
    let output = output(command);
    assert_eq!(output.status.code(), Some(73), "{output:?}");
    let start = format!("kanbanlock: {} is a directory", db.lock_file().display());
    assert!(String::from_utf8_lossy(&output.stderr).starts_with(&start), "{output:?}");
}

/// `process.refused` of `PRAGMA kanbanlock`.
fn refused(agent: &mut Agent) -> u64 {
    let status: serde_json::Value = serde_json::from_str(&agent.query("PRAGMA kanbanlock")).unwrap();
    status["process"]["refused"].as_u64().unwrap()
}

#[test]
fn the_command_writes_and_outsiders_do_not() {
    for journal_mode in ["delete", "wal"] {
        let db = database(journal_mode);
        let mut outsider = Agent::with_db(db.path(), "kanbanlock");
        let mut inside = Agent::within(run(&[], db.path()));
        let before = inside.ask(&Task::CountDescriptors).unwrap();
        open(&mut inside, &db);
        for _ in 0..3 {
            inside.execute(INSERT).unwrap();
            assert!(is_flocked(&db.lock_file()), "{journal_mode}: also between its transactions");
            assert!(is_busy(&outsider.execute(INSERT)), "{journal_mode}");
        }
        assert_eq!(outsider.query("SELECT count(*) FROM task"), "3", "{journal_mode}: readers go on");
        inside.ask(&Task::Close).unwrap();
        assert_eq!(inside.ask(&Task::CountDescriptors).unwrap(), before, "nothing leaks");
        assert!(inside.end().success());
        outsider.execute(INSERT).unwrap();
        assert_eq!(outsider.query("SELECT count(*) FROM task"), "4", "{journal_mode}");
    }
}

/// What `run` is for. The log says it, too.
#[test]
fn flock_1_keeps_its_own_command_out() {
    if Command::new("flock").arg("--version").output().is_err() {
        println!("SKIPPED flock_1_keeps_its_own_command_out: flock(1) from util-linux is not installed");
        return;
    }
    let db = database("wal");
    let mut flock = Command::new("flock");
    flock.arg(db.lock_file());
    let mut inside = Agent::within(flock);
    open(&mut inside, &db);
    inside.query("PRAGMA busy_timeout = 300");
    assert!(is_busy(&inside.execute(INSERT)));
    assert_eq!(inside.log().matches("use `kanbanlock run`").count(), 1, "{}", inside.log());
}

/// A shell in between, and what it starts.
#[test]
fn a_child_of_the_command_writes() {
    let db = database("wal");
    let mut shell = run(&[], db.path());
    shell.args(["sh", "-c", r#"exec 3>/dev/null 9>/dev/null; "$@"; exit $?"#, "sh"]);
    let mut inside = Agent::within(shell);
    open(&mut inside, &db);
    inside.execute(INSERT).unwrap();
    assert!(inside.end().success());
}

/// The same gate handed down to two processes: they exclude each other, and it is the inner gate that does it, not SQLite's
/// locks, which are not asked then.
#[test]
fn connections_of_the_command_exclude_each_other() {
    for journal_mode in ["delete", "wal"] {
        let db = database(journal_mode);
        let hold = Hold::acquire(db.path(), None).unwrap().unwrap();
        let heir = || {
            let mut agent = Agent::prepared(|command| hold.hand_down(command).unwrap());
            open(&mut agent, &db);
            agent
        };
        let (mut a, mut b) = (heir(), heir());
        a.execute("BEGIN IMMEDIATE; INSERT INTO task VALUES ('a')").unwrap();
        assert!(is_busy(&b.execute("BEGIN IMMEDIATE")));
        assert_eq!(refused(&mut b), 1, "{journal_mode}");
        a.execute("COMMIT").unwrap();
        b.execute("BEGIN IMMEDIATE; INSERT INTO task VALUES ('b')").unwrap();
        // … and kill -9 leaves it free.
        b.kill();
        a.execute(INSERT).unwrap();
        assert_eq!(a.query("SELECT count(*) FROM task"), "2", "{journal_mode}");
    }
}

/// fork.rs: the child closes the connection's own descriptions, the one with the inner gate among them.
#[test]
fn a_forked_child_does_not_keep_the_inner_gate() {
    let db = database("wal");
    let hold = Hold::acquire(db.path(), None).unwrap().unwrap();
    let mut parent = Agent::prepared(|command| hold.hand_down(command).unwrap());
    open(&mut parent, &db);
    parent.execute("BEGIN IMMEDIATE; INSERT INTO task VALUES ('x')").unwrap();
    let child = Child(parent.ask(&Task::Fork).unwrap().parse().unwrap());
    parent.kill();
    assert!(child.is_alive());
    let mut other = Agent::prepared(|command| hold.hand_down(command).unwrap());
    open(&mut other, &db);
    other.execute(INSERT).unwrap();
    assert_eq!(other.query("SELECT count(*) FROM task"), "1");
}

/// An agent with descriptor 9 open on the lock file, and KANBANLOCK_HELD naming `fd`; `prepare` is a line of shell.
fn forger(db: &TestDb, prepare: &str, fd: u32) -> Agent {
    let lock_file = fs::metadata(db.lock_file()).unwrap();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("exec 9<>\"$LOCK_FILE\"\n{prepare}\nexec \"$@\""), "sh"])
        .env("LOCK_FILE", db.lock_file())
        .env("KANBANLOCK_HELD", format!("{fd}:{}:{}", lock_file.dev(), lock_file.ino()));
    let mut agent = Agent::within(shell);
    open(&mut agent, db);
    agent
}

/// Fail closed: what the variable says counts for nothing, what the kernel says of the descriptor does.
#[test]
fn a_stale_or_forged_variable_means_the_ordinary_gate() {
    let db = database("wal");
    fs::write(db.lock_file(), "").unwrap();
    for (fd, complaint) in [(9, "does not hold the lock"), (99, "is not open"), (1, "is not open")] {
        let mut forger = forger(&db, ":", fd);
        let mut outsider = Agent::start();
        outsider.ask(&Task::Flock(db.lock_file())).unwrap();
        assert!(is_busy(&forger.execute(INSERT)), "{fd}");
        assert!(forger.log().contains(complaint), "{complaint}: {}", forger.log());
        outsider.ask(&Task::Unflock).unwrap();
        forger.execute("BEGIN IMMEDIATE").unwrap();
        assert!(is_flocked(&db.lock_file()), "the ordinary gate");
        forger.execute("COMMIT").unwrap();
        assert!(!is_flocked(&db.lock_file()));
    }
    for garbage in ["", "9", "nonsense", "9:9:9:9,"] {
        let mut agent = Agent::prepared(|command| _ = command.env("KANBANLOCK_HELD", garbage));
        open(&mut agent, &db);
        agent.execute("BEGIN IMMEDIATE").unwrap();
        assert!(is_flocked(&db.lock_file()), "{garbage:?}");
    }
}

/// The variable is stale, and one of the process's own connections gets the number: its flock is not an outer one for the
/// next connection. Which number that is depends; so all of them.
#[test]
fn an_own_descriptor_with_the_number_of_a_closed_one_does_not_count() {
    let db = database("wal");
    fs::write(db.lock_file(), "").unwrap();
    let uri = format!("file:{}?vfs=kanbanlock", db.path().display());
    for fd in 3..24 {
        let mut agent = forger(&db, "exec 9>&-", fd);
        let mut order = |handle, order| agent.order(handle, order).unwrap().result;
        for handle in [0, 1] {
            order(handle, Order::Open(uri.clone())).unwrap();
        }
        order(0, Order::Run("BEGIN IMMEDIATE".to_owned())).unwrap();
        assert!(is_busy(&order(1, Order::Run("BEGIN IMMEDIATE".to_owned()))), "{fd}");
        assert_eq!(refused(&mut agent), 1, "{fd}: by the gate, before SQLite's own lock was asked");
    }
}

/// The same forger, for whom the kernel speaks: so it is the lock that decided above. A shared one is not it.
#[test]
fn a_descriptor_that_holds_the_flock_counts() {
    if Command::new("flock").arg("--version").output().is_err() {
        println!(
            "SKIPPED a_descriptor_that_holds_the_flock_counts: flock(1) from util-linux is not installed"
        );
        return;
    }
    let db = database("wal");
    fs::write(db.lock_file(), "").unwrap();
    forger(&db, "flock 9", 9).execute(INSERT).unwrap();
    let mut shared = forger(&db, "flock -s 9", 9);
    assert!(is_busy(&shared.execute(INSERT)));
}

/// Somebody unlocks what was handed down: the next acquire takes it again, or is refused.
#[test]
fn an_unlocked_outer_gate_is_taken_again_first() {
    if Command::new("flock").arg("--version").output().is_err() {
        println!(
            "SKIPPED an_unlocked_outer_gate_is_taken_again_first: flock(1) from util-linux is not installed"
        );
        return;
    }
    let db = database("wal");
    fs::write(db.lock_file(), "").unwrap();
    // The shell stays, and unlocks the flock when it is told to through a file.
    let told = db.beside(".told");
    let mut agent = forger(
        &db,
        &format!("flock 9; (until [ -e '{0}' ]; do :; done; flock -u 9; rm '{0}') &", told.display()),
        9,
    );
    agent.execute(INSERT).unwrap();
    fs::write(&told, "").unwrap();
    while told.exists() {
        std::thread::yield_now();
    }
    assert!(!is_flocked(&db.lock_file()));
    let mut outsider = Agent::start();
    outsider.ask(&Task::Flock(db.lock_file())).unwrap();
    assert!(is_busy(&agent.execute(INSERT)));
    outsider.ask(&Task::Unflock).unwrap();
    agent.execute("BEGIN IMMEDIATE").unwrap();
    assert!(is_flocked(&db.lock_file()));
}

#[test]
fn the_command_goes_on_when_run_is_killed() {
    let db = database("wal");
    let mut outsider = Agent::with_db(db.path(), "kanbanlock");
    let mut inside = Agent::within(run(&[], db.path()));
    open(&mut inside, &db);
    inside.kill_wrapper();
    inside.execute(INSERT).unwrap();
    assert!(is_busy(&outsider.execute(INSERT)), "the command has inherited the gate");
    drop(inside);
    outsider.ask(&Task::AwaitUnflocked(db.lock_file())).unwrap();
    outsider.execute(INSERT).unwrap();
}

#[test]
fn run_ends_when_the_command_is_killed() {
    let db = database("delete");
    let mut outsider = Agent::with_db(db.path(), "kanbanlock");
    let mut inside = Agent::within(run(&[], db.path()));
    open(&mut inside, &db);
    inside.execute("BEGIN IMMEDIATE; INSERT INTO task VALUES ('x')").unwrap();
    let pid = inside.ask(&Task::Pid).unwrap().parse().unwrap();
    // SAFETY: the agent, alive: it has just answered.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    assert_eq!(inside.wait().code(), Some(128 + libc::SIGKILL));
    outsider.execute(INSERT).unwrap();
    assert_eq!(outsider.query("SELECT count(*) FROM task"), "1", "the killed transaction was rolled back");
}

/// As with flock(1): whoever has inherited the descriptor holds the gate.
#[test]
fn what_the_command_leaves_behind_keeps_the_gate_but_with_close() {
    let db = database("wal");
    let mut inside = Agent::within(run(&[], db.path()));
    let child = Child(inside.ask(&Task::Fork).unwrap().parse().unwrap());
    assert!(inside.end().success());
    assert!(child.is_alive());
    assert!(is_flocked(&db.lock_file()));
    drop(child);
    Agent::start().ask(&Task::AwaitUnflocked(db.lock_file())).unwrap();

    let mut inside = Agent::within(run(&["--close"], db.path()));
    open(&mut inside, &db);
    assert!(is_busy(&inside.execute(INSERT)), "nothing was handed down");
    let child = Child(inside.ask(&Task::Fork).unwrap().parse().unwrap());
    assert!(inside.end().success());
    assert!(child.is_alive());
    assert!(!is_flocked(&db.lock_file()));
}

/// A run in a run excludes its siblings within the outer one.
#[test]
fn runs_nest() {
    let db = database("wal");
    let mut outsider = Agent::with_db(db.path(), "kanbanlock");
    let hold = Hold::acquire(db.path(), None).unwrap().unwrap();
    let mut sibling = Agent::prepared(|command| hold.hand_down(command).unwrap());
    open(&mut sibling, &db);
    sibling.execute(INSERT).unwrap();

    let mut nested = run(&["-n"], db.path());
    hold.hand_down(&mut nested).unwrap();
    let mut innermost = Agent::within(nested);
    open(&mut innermost, &db);
    for _ in 0..3 {
        innermost.execute(INSERT).unwrap();
        assert!(is_busy(&sibling.execute(INSERT)));
        assert!(is_busy(&outsider.execute(INSERT)));
    }
    assert_eq!(refused(&mut sibling), 3);
    // A third one, beside the second: it is not its turn.
    let mut beside = run(&["-n"], db.path());
    hold.hand_down(&mut beside).unwrap();
    beside.arg("true");
    assert_eq!(output(beside).status.code(), Some(1));

    assert!(innermost.end().success());
    sibling.execute(INSERT).unwrap();
    assert!(is_busy(&outsider.execute(INSERT)));
    drop((hold, sibling));
    outsider.ask(&Task::AwaitUnflocked(db.lock_file())).unwrap();
    outsider.execute(INSERT).unwrap();
}

#[test]
fn two_databases_at_once() {
    let (a, b) = (database("wal"), database("delete"));
    let mut both = run(&[], a.path());
    let second = run(&[], b.path());
    both.arg(second.get_program()).args(second.get_args());
    let mut inside = Agent::within(both);
    for db in [&a, &b] {
        open(&mut inside, db);
        inside.execute(INSERT).unwrap();
        assert!(is_busy(&Agent::with_db(db.path(), "kanbanlock").execute(INSERT)));
    }
    assert!(inside.end().success());
    assert!(!is_flocked(&a.lock_file()) && !is_flocked(&b.lock_file()));
}

/// The queue's board is the outsiders': who waits there must not come before the command that they wait for.
#[test]
fn sleeping_outsiders_do_not_keep_the_command_out() {
    for journal_mode in ["delete", "wal"] {
        let db = database(journal_mode);
        let mut inside = Agent::within(run(&[], db.path()));
        open(&mut inside, &db);
        if journal_mode == "delete" {
            // The outsider's attempt to write begins with a SHARED lock, which may be in the way of a COMMIT for a moment.
            inside.query("PRAGMA busy_timeout = 5000");
        }
        let mut outsider = Agent::with_db(db.path(), "kanbanlock");
        outsider.query("PRAGMA busy_timeout = 60000");
        outsider.send(&Task::Execute(INSERT.to_owned()));
        outsider.await_asleep(true);
        for number in 0..100 {
            let done = inside.execute(INSERT);
            assert!(done.is_ok(), "{journal_mode}, {number}: {done:?}");
        }
        assert!(inside.end().success());
        outsider.receive().unwrap();
        assert_eq!(outsider.query("SELECT count(*) FROM task"), "101");
    }
}

#[test]
fn exit_statuses_are_flock_1s() {
    let db = database("wal");
    let status = |args: &[&str], command: &[&str]| {
        let mut run = run(args, db.path());
        run.args(command);
        output(run).status.code()
    };
    assert_eq!(status(&[], &["true"]), Some(0));
    assert_eq!(status(&[], &["sh", "-c", "exit 7"]), Some(7));
    assert_eq!(status(&[], &["sh", "-c", "kill -9 $$"]), Some(137));
    assert_eq!(status(&[], &["/no/such/command"]), Some(127));
    assert_eq!(status(&[], &["/"]), Some(126));
    assert!(!is_flocked(&db.lock_file()));

    let mut holder = Agent::start();
    holder.ask(&Task::Flock(db.lock_file())).unwrap();
    assert_eq!(status(&["-n"], &["true"]), Some(1));
    assert_eq!(status(&["-w", "0.05"], &["true"]), Some(1));
    assert_eq!(status(&["-n", "-E", "9"], &["true"]), Some(9));
    assert_eq!(status(&["-n", "-w", "1"], &["true"]), Some(64), "which of the two?");
    assert_eq!(status(&["-w", "soon"], &["true"]), Some(64));
    holder.ask(&Task::Unflock).unwrap();
    assert_eq!(status(&["-n"], &["true"]), Some(0));
    assert_eq!(status(&[], &[]), Some(64), "no command");

    let missing = db.beside(".missing");
    let mut run = run(&[], &missing);
    run.arg("true");
    let output = output(run);
    assert_eq!(output.status.code(), Some(66));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No such file"), "{output:?}");
    assert!(!db.beside(".missing.lock").exists());
}

/// `run` waits for a holder that goes.
#[test]
fn it_waits_for_its_turn() {
    let db = database("wal");
    let mut writer = Agent::with_db(db.path(), "kanbanlock");
    writer.execute("BEGIN IMMEDIATE; INSERT INTO task VALUES ('x')").unwrap();
    let mut waiting = Agent::within(run(&["-w", "60"], db.path()));
    waiting.send(&Task::Pid);
    waiting.await_asleep(true);
    writer.execute("COMMIT").unwrap();
    waiting.receive().unwrap();
    assert!(is_busy(&writer.execute(INSERT)));
}

/// What another process sends to `run` is passed on; the command decides what becomes of it.
#[test]
fn signals_are_passed_on() {
    let db = database("wal");
    let mut command = run(&[], db.path());
    command.args(["sh", "-c", "trap 'exit 42' TERM; echo ready; while :; do sleep 0.01; done"]);
    let mut process = {
        let _fork = support::no_fork_meanwhile();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    // SAFETY: our child, not waited for yet.
    assert_eq!(unsafe { libc::kill(process.id().try_into().unwrap(), libc::SIGTERM) }, 0);
    assert_eq!(process.wait().unwrap().code(), Some(42));
}

/// A forked child, killed when dropped.
struct Child(i32);

impl Child {
    fn is_alive(&self) -> bool {
        // SAFETY: signal 0 only asks.
        unsafe { libc::kill(self.0, 0) == 0 }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own grandchild, alive until now (its alarm is a minute away).
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}
