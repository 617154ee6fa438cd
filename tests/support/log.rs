//! SQLite's error log, caught: `SQLITE_CONFIG_LOG` of the whole process.

use std::ffi::c_int;
use std::path::Path;
use std::sync::{Mutex, Once};

static LINES: Mutex<Vec<(c_int, String)>> = Mutex::new(Vec::new());

/// Installs the log. Must come before anything else touches SQLite: call it first in every test of the binary.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sqlite3_config must not run beside other SQLite calls; Once makes every test of this binary
        // wait here before its first one.
        unsafe { rusqlite::trace::config_log(Some(keep)) }.unwrap();
    });
}

fn keep(code: c_int, message: &str) {
    LINES.lock().unwrap().push((code, message.to_owned()));
}

/// kanbanlock's lines so far that speak of this file.
pub fn lines_about(path: &Path) -> Vec<(c_int, String)> {
    let path = path.to_str().unwrap();
    let lines = LINES.lock().unwrap();
    lines.iter().filter(|(_, line)| line.starts_with("kanbanlock:") && line.contains(path)).cloned().collect()
}

/// kanbanlock's lines so far that contain this text.
pub fn lines_with(text: &str) -> Vec<(c_int, String)> {
    let lines = LINES.lock().unwrap();
    lines.iter().filter(|(_, line)| line.starts_with("kanbanlock:") && line.contains(text)).cloned().collect()
}
