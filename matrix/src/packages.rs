//! Writes a row's package, and builds it: `<target>/rows/<package>/{Cargo.toml, Cargo.lock}`, whose one binary is
//! `matrix/rows/<program>.rs` where it stands. All packages share one target folder, so that what two of them depend on
//! in the same version and with the same features is built once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::judge::Failure;
use crate::rows::Row;

/// `matrix/`
pub fn matrix() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The project's folder.
pub fn root() -> &'static Path {
    matrix().parent().expect("matrix/ is in the project's folder")
}

/// Where this program was built, and where the rows are: `<target>` of `<target>/debug/kanbanlock-matrix`.
pub fn target() -> PathBuf {
    let program = std::env::current_exe().expect("the path of this program");
    program.ancestors().nth(2).expect("<target>/debug/kanbanlock-matrix").to_owned()
}

/// Builds the row's program, and returns its path.
pub fn build(row: &Row) -> Result<PathBuf, Failure> {
    let folder = write(row)?;
    let lock = lock_file(row);
    fs::copy(&lock, folder.join("Cargo.lock")).map_err(|error| format!("{}: {error}", lock.display()))?;
    cargo(&["build", "--locked", "--quiet"], &folder.join("Cargo.toml"))?;
    Ok(target().join("debug").join(row.package()))
}

/// Where [`build_extension`] leaves it.
pub fn extension() -> PathBuf {
    target().join("debug/libkanbanlock.so")
}

/// The loadable extension, which one of the programs loads.
pub fn build_extension() -> Result<(), Failure> {
    cargo(&["build", "--locked", "--quiet"], &root().join("extension/Cargo.toml"))
}

/// Brings the row's committed lock file in line with the table and kanbanlock's own dependencies. What it has and may keep
/// it keeps; to start anew, delete it first.
pub fn update_lock(row: &Row) -> Result<(), Failure> {
    let folder = write(row)?;
    let (committed, written) = (lock_file(row), folder.join("Cargo.lock"));
    if committed.exists() {
        fs::copy(&committed, &written)?;
    }
    cargo(&["update", "--workspace", "--quiet"], &folder.join("Cargo.toml"))?;
    fs::copy(&written, &committed)?;
    Ok(())
}

fn lock_file(row: &Row) -> PathBuf {
    matrix().join("locks").join(row.package()).with_extension("lock")
}

fn write(row: &Row) -> Result<PathBuf, Failure> {
    let folder = target().join("rows").join(row.package());
    fs::create_dir_all(&folder)?;
    let manifest = format!(
        "# Written by matrix/src/packages.rs.\n\
         [package]\n\
         name = \"{package}\"\n\
         version = \"0.0.0\"\n\
         edition = \"2024\"\n\
         publish = false\n\
         \n\
         [workspace]\n\
         \n\
         [[bin]]\n\
         name = \"{package}\"\n\
         path = {program:?}\n\
         \n\
         [dependencies]\n\
         kanbanlock = {{ path = {root:?} }}\n\
         {dependencies}\n\
         \n\
         [lints.rust]\n\
         warnings = \"deny\"\n\
         \n\
         [profile.dev]\n\
         debug = false\n\
         incremental = false\n",
        package = row.package(),
        program = matrix().join("rows").join(row.program).with_extension("rs"),
        root = root(),
        dependencies = row.dependencies.join("\n"),
    );
    let path = folder.join("Cargo.toml");
    // Left alone if it is the same: cargo looks at its age.
    if fs::read_to_string(&path).is_ok_and(|written| written == manifest) {
        return Ok(folder);
    }
    fs::write(path, manifest)?;
    Ok(folder)
}

/// cargo, on this package, in the shared target folder.
pub fn cargo(arguments: &[&str], manifest: &Path) -> Result<(), Failure> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.args(arguments).arg("--manifest-path").arg(manifest).env("CARGO_TARGET_DIR", target());
    let status = command.status()?;
    if !status.success() {
        return Err(format!(
            "cargo {} --manifest-path {}: {status}. If it asks for another lock file: see `--update-locks` in matrix/src/main.rs",
            arguments.join(" "),
            manifest.display()
        )
        .into());
    }
    Ok(())
}
