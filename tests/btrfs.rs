//! btrfs: who holds the lock is found, although stat(2) and `/proc/locks` have different devices for a file there.
//!
//! A small btrfs in a file, mounted. That needs root, a loop device and the file system in the kernel; where the machine does
//! not allow it, nothing is tested, and the test says so.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rusqlite::ffi;
use support::agent::{Agent, Task};
use support::{TestDb, no_fork_meanwhile};

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

fn run(command: &mut Command) -> Result<Output, String> {
    let _fork = no_fork_meanwhile();
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(output)
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// A mounted btrfs with two subvolumes, `one` and `two`; unmounted when dropped.
struct Btrfs {
    place: PathBuf,
    _files: TestDb,
}

impl Btrfs {
    fn mount() -> Result<Btrfs, String> {
        let files = TestDb::new();
        let (image, place) = (files.dir().join("image"), files.dir().join("mounted"));
        File::create(&image).unwrap().set_len(128 << 20).unwrap();
        fs::create_dir(&place).unwrap();
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image))?;
        run(Command::new("mount").args(["-t", "btrfs", "-o", "loop"]).args([&image, &place]))?;
        let btrfs = Btrfs { place, _files: files };
        for name in ["one", "two"] {
            run(Command::new("btrfs").args(["subvolume", "create"]).arg(btrfs.place.join(name)))?;
        }
        Ok(btrfs)
    }
}

impl Drop for Btrfs {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.place)) {
            println!("{}: {error}", self.place.display());
        }
    }
}

/// A database in WAL mode that has been written, by an agent that stays.
fn writer(db: &Path) -> Agent {
    let mut agent = Agent::with_db(db, "kanbanlock");
    agent.query("PRAGMA journal_mode = WAL");
    agent.execute("CREATE TABLE t (x)").unwrap();
    agent
}

fn holder(db: &Path) -> Option<u32> {
    kanbanlock::inspect(db).unwrap().holder.map(|holder| holder.pid)
}

#[test]
fn the_holder_is_found_on_btrfs() {
    if Command::new("mkfs.btrfs").arg("--version").output().is_err() {
        println!("SKIPPED the_holder_is_found_on_btrfs: mkfs.btrfs from btrfs-progs is not installed");
        return;
    }
    let btrfs = match Btrfs::mount() {
        Ok(btrfs) => btrfs,
        Err(why) => return println!("not tested, since this machine does not mount a btrfs: {why}"),
    };
    let [one, two] = ["one", "two"].map(|name| btrfs.place.join(name).join("kanban.db"));
    let lock_file = |db: &Path| db.with_extension("db.lock");
    let (mut holding, mut elsewhere) = (writer(&one), writer(&two));
    let attributes = [&one, &two].map(|db| fs::metadata(lock_file(db)).unwrap());
    assert_eq!(attributes[0].ino(), attributes[1].ino(), "inode numbers come again in each subvolume");
    assert_ne!(attributes[0].dev(), attributes[1].dev());

    assert_eq!((holder(&one), holder(&two)), (None, None));
    holding.execute("BEGIN IMMEDIATE").unwrap();
    assert_eq!(
        (holder(&one), holder(&two)),
        (Some(holding.pid()), None),
        "of one lock file, not of the other's"
    );
    elsewhere.execute("BEGIN IMMEDIATE").unwrap();
    assert_eq!((holder(&one), holder(&two)), (Some(holding.pid()), Some(elsewhere.pid())));

    let mut waiter = Agent::start();
    let uri = format!("file:{}?vfs=kanbanlock&kanbanlock_warn_ms=50", one.display());
    waiter.ask(&Task::Open(uri)).unwrap();
    waiter.query("PRAGMA busy_timeout = 300");
    assert_eq!(waiter.execute("INSERT INTO t VALUES (1)").unwrap_err().0, ffi::SQLITE_BUSY);
    let log = waiter.log();
    assert!(log.contains(&format!("is held by process {} (", holding.pid())), "{log}");

    // Its own flock: named, too.
    holding.execute("COMMIT").unwrap();
    waiter.ask(&Task::Flock(lock_file(&one))).unwrap();
    waiter.execute("INSERT INTO t VALUES (1)").unwrap_err();
    assert_eq!(waiter.log().matches("its connection waits for itself").count(), 1, "{}", waiter.log());
    for agent in [holding, elsewhere, waiter] {
        agent.kill();
    }
}
