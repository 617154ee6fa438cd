//! The command `kanbanlock` as a whole: exit statuses, completions, the man page.

use std::process::{Command, Output};

fn kanbanlock(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kanbanlock")).args(args).output().unwrap()
}

#[test]
fn a_wrong_command_line_is_ex_usage() {
    for wrong in [&["nonsense"][..], &[], &["man", "nonsense"]] {
        assert_eq!(kanbanlock(wrong).status.code(), Some(64), "{wrong:?}");
    }
    for right in [&["--help"][..], &["--version"], &["man"], &["completions", "bash"]] {
        assert_eq!(kanbanlock(right).status.code(), Some(0), "{right:?}");
    }
}
