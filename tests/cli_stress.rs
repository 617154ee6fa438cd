//! `kanbanlock stress`: stock SQLite beside kanbanlock, audited; and the audit can fail.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn stress(directory: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kanbanlock"));
    command
        .arg("stress")
        .args(["--workers", "3", "--readers", "1", "--seconds", "1"])
        .args(args)
        .arg(directory);
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn both_columns_pass_their_audit_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("result.json");
    let output = stress(directory.path(), &["--chaos", "--json", json.to_str().unwrap()]);
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{printed}{}", text(&output.stderr));
    let words = |name: &str| -> Vec<String> {
        let line = printed.lines().rfind(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert!(printed.lines().any(|line| line.split_whitespace().eq(["unix", "kanbanlock"])), "{printed}");
    assert_eq!(words("audit "), ["audit", "passed", "passed"], "{printed}");
    assert_eq!(words("commits/s").len(), 3, "{printed}");

    let results: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    for (result, vfs) in results.as_array().unwrap().iter().zip(["unix", "kanbanlock"]) {
        assert_eq!((result["vfs"].as_str(), result["passed"].as_bool()), (Some(vfs), Some(true)), "{result}");
        assert!(result["commits"].as_u64() > Some(0), "{result}");
    }
    fs::remove_file(json).unwrap();
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0, "the folders it made are gone");
}

#[test]
fn a_lost_commit_is_found_and_its_database_kept() {
    let directory = tempfile::tempdir().unwrap();
    let output = stress(directory.path(), &["--vfs", "kanbanlock", "--sabotage", "lose-commit"]);
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}{}", text(&output.stderr));
    assert!(printed.contains("FAIL  acknowledged commits"), "{printed}");
    let kept = printed.lines().find_map(|line| line.strip_prefix("kept")).unwrap().trim();
    assert!(
        Path::new(kept).is_file() && Path::new(kept).starts_with(directory.path().canonicalize().unwrap())
    );
}

#[test]
fn what_cannot_be_run_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    assert_eq!(stress(&missing, &[]).status.code(), Some(66));
    let output = stress(directory.path(), &["--vfs", "nonsense"]);
    assert_eq!(output.status.code(), Some(74));
    assert!(text(&output.stderr).contains("try kanbanlock or unix"), "{}", text(&output.stderr));
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
}
