//! The style guide as a test: the arrows of ARCHITECTURE.md, where unsafe code may live, what each file starts with.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The layers, bottom first. A file uses only files of lower layers (ARCHITECTURE.md, "The picture").
const LAYERS: &[&[&str]] = &[
    &["lock", "error", "ffi", "sys", "stats"],
    &["events"],
    &["host", "state", "real", "queue", "inner_gates", "holder", "refusal"],
    &["inherited"],
    &["ofd", "place"],
    &["fork"],
    &["hint", "descriptor"],
    &["wait", "long_wait"],
    &["gate"],
    &["driver", "options", "inspect", "hold"],
    &["shim"],
    &["file"],
    &["io"],
    &["vfs"],
    &["register"],
];

/// The files that may hold unsafe code. Everything else is safe Rust.
const UNSAFE: &[&str] = &[
    "ffi",
    "file",
    "fork",
    "hint",
    "hold",
    "host",
    "inherited",
    "io",
    "lib",
    "ofd",
    "real",
    "register",
    "sys",
    "vfs",
];

fn sources() -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            sources.insert(name, fs::read_to_string(path).unwrap());
        }
    }
    sources
}

/// The part before the unit tests, without comments.
fn code(source: &str) -> String {
    let tests = source.find("#[cfg(test)]\nmod tests {").unwrap_or(source.len());
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    source[..tests].lines().filter(is_code).collect::<Vec<_>>().join("\n")
}

/// The modules of ours that some code names: `use crate::x::…`, `crate::x::…`, `use crate::{x, …}`.
fn used_modules(code: &str) -> Vec<String> {
    let mut used = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            Some((list, _)) => used.extend(list.split(',').map(|name| first_word(name.trim()))),
            None => used.push(first_word(rest)),
        }
    }
    used
}

fn first_word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

/// Which arrows point upwards or sideways.
fn wrong_arrows(module: &str, code: &str) -> Vec<String> {
    let own = layer(module)
        .unwrap_or_else(|| panic!("{module}.rs has no layer: add it to LAYERS and ARCHITECTURE.md"));
    let lower_only = |used: &String| layer(used).is_some_and(|used| used >= own);
    used_modules(code).into_iter().filter(lower_only).map(|used| format!("{module} → {used}")).collect()
}

#[test]
fn a_file_uses_only_files_below_it() {
    for (module, source) in sources() {
        if module != "lib" {
            assert_eq!(wrong_arrows(&module, &code(&source)), [""; 0]);
        }
    }
    // And the check itself can fail.
    assert_eq!(
        wrong_arrows("gate", "use crate::driver::Driver;\nuse crate::{sys, vfs};"),
        ["gate → driver", "gate → vfs"]
    );
}

#[test]
fn each_file_says_what_it_uses_and_that_is_true() {
    for (module, source) in sources() {
        if module == "lib" {
            continue;
        }
        let header: Vec<&str> = source.lines().take_while(|line| line.starts_with("//!")).collect();
        let header = header.join(" ");
        let (_, uses) =
            header.split_once("Uses:").unwrap_or_else(|| panic!("{module}.rs: no \"Uses:\" in its header"));
        let listed: BTreeSet<String> = uses.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        let mut used: BTreeSet<String> = used_modules(&code(&source)).into_iter().collect();
        used.retain(|used| layer(used).is_some());
        assert_eq!(used, listed, "{module}.rs: left what it uses, right what its header says");
    }
}

#[test]
fn unsafe_code_is_in_the_named_files_only() {
    for (module, source) in sources() {
        let has_unsafe = code(&source).contains("unsafe");
        assert_eq!(has_unsafe, UNSAFE.contains(&module.as_str()), "{module}.rs");
    }
}

fn lines_of_unsafe_without_safety(source: &str) -> Vec<usize> {
    let lines: Vec<&str> = source.lines().collect();
    let opens = |line: &str| line.contains("unsafe {") || line.contains("unsafe impl");
    (0..lines.len())
        .filter(|&at| opens(lines[at]) && !lines[at].trim_start().starts_with("//"))
        .filter(|&at| !has_safety_above(&lines, at))
        .map(|at| at + 1)
        .collect()
}

/// The comment may stand above the statement that the block is part of: a few lines up, with only code of the same
/// statement in between.
fn has_safety_above(lines: &[&str], at: usize) -> bool {
    let above = lines[..at].iter().rev().take(8);
    let mut statement =
        above.take_while(|line| !line.trim_end().ends_with(['}', ';']) || line.contains("SAFETY:"));
    statement.any(|line| line.contains("SAFETY:"))
}

/// clippy::undocumented_unsafe_blocks does the same for blocks, but not inside macros.
#[test]
fn every_unsafe_block_has_a_safety_comment() {
    for (module, source) in sources() {
        let extern_blocks = source.replace("unsafe extern \"C\" {", "");
        assert_eq!(lines_of_unsafe_without_safety(&extern_blocks), [0; 0], "{module}.rs");
    }
    for path in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("extension/src")) {
        let source = fs::read_to_string(&path).unwrap();
        assert_eq!(lines_of_unsafe_without_safety(&source), [0; 0], "{}", path.display());
    }
    assert_eq!(lines_of_unsafe_without_safety("fn f() {\n    a();\n    unsafe { b() }\n}"), [3]);
}

#[test]
fn every_file_starts_with_a_manual_page() {
    for folder in ["src", "tests", "benches", "examples", "extension"] {
        for path in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)) {
            let source = fs::read_to_string(&path).unwrap();
            assert!(source.starts_with("//! "), "{}: begins without a //! header", path.display());
        }
    }
}

/// Prose that rustfmt does not wrap. Tables, links and rulers are as wide as they are.
#[test]
fn no_comment_is_wider_than_126_columns() {
    for folder in ["src", "tests", "benches", "examples", "extension"] {
        for path in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)) {
            let source = fs::read_to_string(&path).unwrap();
            assert_eq!(wide_comments(&source), [""; 0], "{}", path.display());
        }
    }
    assert_eq!(
        wide_comments(&format!("let a = 1;\n/// {}", "a ".repeat(62))).len(),
        1,
        "the check itself can fail"
    );
}

fn wide_comments(source: &str) -> Vec<&str> {
    let is_prose = |line: &&str| {
        let text = line.trim_start();
        text.starts_with("//") && !["//! |", "http", "----"].iter().any(|other| text.contains(other))
    };
    source.lines().filter(is_prose).filter(|line| line.trim_end().chars().count() > 126).collect()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            // tests/wal_reset and extension are packages: built on their own, they have a target folder with generated code.
            if !path.ends_with("target") {
                files.extend(rust_files(&path));
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The transition table is a contract: every row of it is named in the code's own table and in a test.
#[test]
fn every_row_of_the_table_is_tested() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let state = fs::read_to_string(root.join("src/state.rs")).unwrap();
    let rows: Vec<&str> = state
        .lines()
        .filter_map(|line| line.strip_prefix("//! | "))
        .filter_map(|line| line.split(' ').next())
        .filter(|row| row.starts_with(|c: char| "LSKGMPX".contains(c)) && row.len() <= 3)
        .collect();
    assert_eq!(rows.len(), 32, "{rows:?}");
    let mut tests: Vec<PathBuf> = rust_files(&root.join("tests"));
    tests.extend(rust_files(&root.join("src/tests")));
    let text: String = tests.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    for row in rows {
        let is_named = text.match_indices(row).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let after = text[at + row.len()..].chars().next();
            !before.into_iter().chain(after).any(char::is_alphanumeric)
        });
        assert!(is_named, "row {row} is named in no test");
    }
}
