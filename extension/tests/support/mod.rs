//! What the extension's tests share: the library itself, built; a database; the flock, probed.

#![allow(dead_code)] // each test binary uses its own part

use std::env;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

/// `libkanbanlock.so`, as cargo builds it with the profile and target folder of this test.
///
/// Cargo does not build a cdylib for the integration tests of its package, so this asks it to.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let test = env::current_exe().unwrap();
        let profile = test.ancestors().nth(2).expect("<target>/<profile>/deps/<test>");
        let target = profile.parent().unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo
            .args(["build", "--quiet", "--locked", "-p", "kanbanlock-extension", "--target-dir"])
            .arg(target);
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "{cargo:?}");
        profile.join("libkanbanlock.so")
    })
}

/// A database in a folder of its own.
pub struct TestDb {
    dir: TempDir,
}

impl TestDb {
    pub fn new() -> TestDb {
        TestDb { dir: tempfile::tempdir().unwrap() }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self) -> PathBuf {
        self.dir().join("kanban.db")
    }

    pub fn uri(&self) -> String {
        format!("file:{}?vfs=kanbanlock", self.path().display())
    }

    /// True if somebody holds the flock on `<db>.lock`.
    pub fn is_flocked(&self) -> bool {
        let file = match File::open(self.dir().join("kanban.db.lock")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return false,
            file => file.unwrap(),
        };
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => true,
            locked => {
                locked.unwrap();
                // Not by closing it: a child that another test starts at this moment has it open, until it execs.
                file.unlock().unwrap();
                false
            }
        }
    }
}

/// A write transaction through this connection: true if it holds the flock, and no longer than that.
pub fn holds_the_flock(connection: &rusqlite::Connection, db: &TestDb) -> bool {
    connection
        .execute_batch("CREATE TABLE IF NOT EXISTS t (x); BEGIN IMMEDIATE; INSERT INTO t VALUES (1)")
        .unwrap();
    let held = db.is_flocked();
    connection.execute_batch("COMMIT").unwrap();
    assert!(!db.is_flocked());
    held
}
