//! The command `kanbanlock` as a whole: exit statuses, completions, manual pages; and its documentation, line by line.

use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

fn kanbanlock(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kanbanlock")).args(args).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let output = kanbanlock(args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The subcommands, as `--help` lists them.
fn subcommands() -> Vec<String> {
    let help = stdout(&["--help"]);
    let list = help.split_once("Commands:\n").unwrap().1;
    let lines = list.lines().take_while(|line| !line.is_empty());
    // The description of a command may go on in the next line, further to the right.
    let names =
        lines.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    let names: Vec<String> = names.filter(|name| *name != "help").map(str::to_owned).collect();
    for known in ["status", "doctor", "completions", "man"] {
        assert!(names.iter().any(|name| name == known), "{known}: {help}");
    }
    names
}

#[test]
fn a_wrong_command_line_is_ex_usage() {
    for wrong in [&["nonsense"][..], &[], &["man", "nonsense"], &["status"], &["doctor", "a", "b"]] {
        assert_eq!(kanbanlock(wrong).status.code(), Some(64), "{wrong:?}");
    }
    for right in [&["--help"][..], &["--version"], &["man"], &["completions", "bash"]] {
        assert_eq!(kanbanlock(right).status.code(), Some(0), "{right:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    // Standard output is a pipe that nobody reads any more.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_kanbanlock")).arg("man").stdout(writer).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stderr, b"");
}

#[test]
fn what_is_not_for_a_terminal_has_no_colours() {
    let folder = prepared();
    let db = folder.path().join("kanban.db");
    for command in ["status", "doctor"] {
        assert!(!stdout(&[command, db.to_str().unwrap()]).contains('\u{1b}'), "{command}");
        let forced = Command::new(env!("CARGO_BIN_EXE_kanbanlock"))
            .args([command, db.to_str().unwrap()])
            .env("CLICOLOR_FORCE", "1")
            .output()
            .unwrap();
        assert!(forced.stdout.contains(&0x1b), "and it has some");
    }
}

/// bash takes the completions, and they know the subcommands.
#[test]
fn completions_complete() {
    let script = r#"source /dev/stdin; COMP_WORDS=(kanbanlock stat); COMP_CWORD=1
        _kanbanlock kanbanlock stat kanbanlock; echo "${COMPREPLY[@]}""#;
    let completions = stdout(&["completions", "bash"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("completions");
    std::fs::write(&file, completions).unwrap();
    let output = Command::new("bash").args(["-c", script]).stdin(std::fs::File::open(file).unwrap()).output();
    let Ok(output) = output else {
        println!("SKIPPED: bash is not installed");
        return;
    };
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "status", "{output:?}");
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(stdout(&["completions", shell]).contains("status"), "{shell}");
    }
}

#[test]
fn each_subcommand_has_a_manual_page() {
    assert!(stdout(&["man"]).contains(".TH kanbanlock 1"));
    for name in subcommands() {
        let page = stdout(&["man", &name]);
        assert!(page.contains(&format!(".TH kanbanlock-{name} 1")), "{page}");
        assert!(page.contains(".SH DESCRIPTION") && page.contains(".SH SYNOPSIS"), "{page}");
    }
}

/// The table of docs/CLI.md, the help and the code agree.
#[test]
fn the_exit_statuses_are_documented() {
    let source = include_str!("../src/bin/kanbanlock/failure.rs");
    let values = source.lines().filter_map(|line| line.strip_prefix("pub const ")?.strip_suffix(';'));
    let values: Vec<&str> = values.filter_map(|line| line.rsplit(' ').next()).collect();
    assert!(values.len() >= 6, "{values:?}");
    let (docs, help) = (include_str!("../docs/CLI.md"), stdout(&["--help"]));
    for value in values {
        assert!(docs.contains(&format!("| {value} | ")), "docs/CLI.md: {value}");
        assert!(help.contains(&format!("\n  {value:<2}  ")), "--help: {value}: {help}");
    }
}

/// A folder with what the documentation's command lines are about: a database that nobody has open.
fn prepared() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    kanbanlock::register().unwrap();
    let uri = format!("file:{}?vfs=kanbanlock", folder.path().join("kanban.db").display());
    let db = rusqlite::Connection::open(uri).unwrap();
    db.execute_batch(
        "PRAGMA journal_mode = wal; CREATE TABLE task (title TEXT); INSERT INTO task VALUES ('docs')",
    )
    .unwrap();
    let script = folder.path().join("migrate.sh");
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    folder
}

/// The lines of each sh block.
fn shell_blocks(markdown: &str) -> Vec<Vec<&str>> {
    let blocks = markdown.split("```sh\n").skip(1);
    blocks.map(|block| block.lines().take_while(|line| *line != "```").collect()).collect()
}

/// Runs a line as a shell would, in `folder`. `stress` for a second only, and there.
fn run(line: &str, folder: &Path) {
    let line = match line.strip_prefix("kanbanlock stress ") {
        Some(rest) => {
            let rest = rest.replace("--seconds 60", "").replace("/srv/data", ".");
            &format!("kanbanlock stress --seconds 1 {rest}")
        }
        None => line,
    };
    let bin = Path::new(env!("CARGO_BIN_EXE_kanbanlock")).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let output =
        Command::new("sh").args(["-ec", line]).current_dir(folder).env("PATH", path).output().unwrap();
    if line.contains("--watch") {
        // tests/cli_status.rs has a terminal for it. Here its arguments are read, and it says what it misses.
        assert_eq!(output.status.code(), Some(64), "{line}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--watch needs a terminal"), "{output:?}");
    } else {
        assert!(output.status.success(), "{line}: {output:?}");
    }
}

#[test]
fn every_command_line_of_the_documentation_runs() {
    let documents = [
        ("README.md", include_str!("../README.md")),
        ("docs/CLI.md", include_str!("../docs/CLI.md")),
        ("docs/FILESYSTEMS.md", include_str!("../docs/FILESYSTEMS.md")),
    ];
    for (name, text) in documents {
        let mut count = 0;
        for block in shell_blocks(text) {
            let folder = prepared();
            for line in block.iter().filter(|line| line.starts_with("kanbanlock ")) {
                run(line, folder.path());
                count += 1;
            }
        }
        assert!(count >= 2, "{name}");
    }
    let install = "cargo install kanbanlock --features cli"; // .ci/run does it, with this folder's package
    assert!(shell_blocks(include_str!("../docs/CLI.md")).contains(&vec![install]));
}

#[test]
fn every_command_line_of_the_manual_pages_runs() {
    for name in subcommands() {
        let folder = prepared();
        let page = stdout(&["man", &name]).replace("\\-", "-").replace("\\\\", "\\").replace("\\*(Aq", "'");
        let lines: Vec<&str> =
            page.lines().map(str::trim).filter(|line| line.starts_with("kanbanlock ")).collect();
        assert!(!lines.is_empty(), "{name} has no example");
        for line in lines {
            run(line, folder.path());
        }
    }
}
