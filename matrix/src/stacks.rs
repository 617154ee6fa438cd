//! The examples for existing apps, `examples/stacks/*`: each is a package of its own, runs, and prints what its
//! `expected.txt` says.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::judge::Failure;
use crate::packages::{cargo, root, target};

/// Runs them all; returns the failures.
pub fn run() -> Vec<String> {
    let folder = root().join("examples/stacks");
    let mut packages: Vec<_> = match fs::read_dir(&folder) {
        Ok(entries) => entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.join("Cargo.toml").exists())
            .collect(),
        Err(error) => return vec![format!("{}: {error}", folder.display())],
    };
    packages.sort();
    let report =
        |package: &Path| run_one(package).err().map(|failure| format!("{}: {failure}", package.display()));
    packages.iter().filter_map(|package| report(package)).collect()
}

fn run_one(package: &Path) -> Result<(), Failure> {
    cargo(&["build", "--locked", "--quiet"], &package.join("Cargo.toml"))?;
    let name = package.file_name().ok_or("no name")?;
    let output = Command::new(target().join("debug").join(name)).output()?;
    let (printed, complaints) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let expected = fs::read_to_string(package.join("expected.txt"))?;
    if !output.status.success() || printed != expected {
        return Err(format!(
            "{}; standard error:\n{complaints}\nexpected:\n{expected}\nprinted:\n{printed}",
            output.status
        )
        .into());
    }
    eprintln!("{}: as expected", package.display());
    Ok(())
}
