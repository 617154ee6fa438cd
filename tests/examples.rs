//! Every example runs, checks its own claims, and prints exactly what `examples/expected/<name>.txt` says.
//!
//! Each runs under odd conditions: two copies at the same time, in a working directory that is also the one
//! for temporary files, and whose name is hostile to URIs and shells. Nothing may be left there.
//!
//! `cargo test` builds the examples; `cargo test --test examples` does not, and then fails with the command that
//! does, be they missing or out of date.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// One test for each example, and the list of them all.
macro_rules! examples {
    ($($name:ident),* $(,)?) => {
        const EXAMPLES: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                run_two_at_a_time(stringify!($name));
            }
        )*
    };
}

examples![adopt_by_default, adopt_by_uri, adopt_pool, attach, busy_timeout, shell_backup];

#[test]
fn every_example_is_listed_here() {
    assert_eq!(stems("examples", "rs"), EXAMPLES, "examples/*.rs, and those that are tested");
    assert_eq!(
        stems("examples/expected", "txt"),
        EXAMPLES,
        "examples/expected/*.txt, and those that are tested"
    );
}

fn run_two_at_a_time(name: &str) {
    let program = built_example(name);
    let odd = tempfile::Builder::new().prefix("odd ?vfs=unix&#%20'\"$;").tempdir().expect("a directory");
    let start = || -> io::Result<Child> {
        Command::new(&program)
            .current_dir(&odd)
            .env("TMPDIR", odd.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    for copy in [start(), start()] {
        let output = copy.and_then(Child::wait_with_output).expect("the example can be run");
        assert_as_expected(name, &output);
    }
    let left: Vec<_> = fs::read_dir(&odd).expect("the directory is still there").collect();
    assert!(left.is_empty(), "{name} has left files behind: {left:?}");
}

fn assert_as_expected(name: &str, output: &Output) {
    let printed = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    if printed.starts_with("skipped: ") {
        assert!(env::var_os("CI").is_none(), "{name} must run in CI, but: {printed}");
        eprintln!("{name} {printed}");
        return;
    }
    let path = manifest_dir().join("examples/expected").join(name).with_extension("txt");
    let expected = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        output.status.success() && complaints.is_empty() && printed == expected,
        "{name}: {status}\n\
         standard error:\n{complaints}\n\
         standard output, `-` expected, `+` printed:\n{diff}\n\
         If it is right as it is: cargo run --example {name} > examples/expected/{name}.txt",
        status = output.status,
        diff = diff(&expected, &printed),
    );
}

/// The lines that differ, without those that are equal before and after them.
fn diff(expected: &str, printed: &str) -> String {
    let expected: Vec<_> = expected.split('\n').collect();
    let printed: Vec<_> = printed.split('\n').collect();
    let before = expected.iter().zip(&printed).take_while(|(a, b)| a == b).count();
    let (expected, printed) = (&expected[before..], &printed[before..]);
    let after = expected.iter().rev().zip(printed.iter().rev()).take_while(|(a, b)| a == b).count();
    let minus = expected[..expected.len() - after].iter().map(|line| format!("-{line}\n"));
    let plus = printed[..printed.len() - after].iter().map(|line| format!("+{line}\n"));
    let changed: String = minus.chain(plus).collect();
    format!(" ({before} equal lines)\n{changed} ({after} equal lines)\n")
}

#[test]
fn a_diff_shows_the_lines_that_differ() {
    assert_eq!(diff("a\nb\nc\n", "a\nx\ny\nc\n"), " (1 equal lines)\n-b\n+x\n+y\n (2 equal lines)\n");
    assert_eq!(diff("a\n", "a"), " (1 equal lines)\n-\n (0 equal lines)\n");
    assert_eq!(diff("a\na\n", "a\n"), " (1 equal lines)\n-a\n (1 equal lines)\n");
}

/// The example's binary: this test is `<target>/<profile>/deps/…`, the example `<target>/<profile>/examples/…`.
fn built_example(name: &str) -> PathBuf {
    const ADVICE: &str = "run `cargo build --examples` first, with the profile and target of this test \
                          (or `cargo test` without `--test`, which does so by itself)";
    let test = env::current_exe().expect("the path of this test");
    let profile = test.ancestors().nth(2).expect("<target>/<profile>/deps/<test>");
    let program = profile.join("examples").join(name);
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let built = modified(&program).unwrap_or_else(|error| panic!("{}: {error}; {ADVICE}", program.display()));
    for source in sources(&program) {
        // A source that has gone is out of date, too.
        let is_older = modified(&source).is_ok_and(|changed| changed <= built);
        assert!(is_older, "{name} is older than {}; {ADVICE}", source.display());
    }
    program
}

/// The files that cargo built `program` from: `<program>.d`, in the format of a makefile.
fn sources(program: &Path) -> Vec<PathBuf> {
    let path = program.with_extension("d");
    let rule = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (_, sources) = rule.trim_end().split_once(": ").expect("<program>: <source> <source> …");
    let escaped = sources.replace("\\ ", "\0");
    escaped.split(' ').map(|source| manifest_dir().join(source.replace('\0', " "))).collect()
}

/// The names of the files in a directory of the project that have this extension, without it, sorted.
fn stems(dir: &str, extension: &str) -> Vec<String> {
    let entries = fs::read_dir(manifest_dir().join(dir)).expect("a directory of the project");
    let paths = entries.map(|entry| entry.expect("a directory entry").path());
    let matching = paths.filter(|path| path.extension() == Some(OsStr::new(extension)));
    let stem = |path: PathBuf| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let mut stems: Vec<String> = matching.filter_map(stem).collect();
    stems.sort();
    stems
}

fn manifest_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
