//! The Rust matrix: kanbanlock under each library that opens SQLite from Rust, for real.
//!
//! ```sh
//! cargo run --manifest-path matrix/Cargo.toml --target-dir target/matrix                  # all rows
//! cargo run --manifest-path matrix/Cargo.toml --target-dir target/matrix -- sqlx diesel   # rows with such a name
//! ```
//!
//! For each row of `src/rows.rs`: writes a package and builds it (`src/packages.rs`), has two processes of it write one
//! database, and watches them (`src/judge.rs`). At the end all programs write one database together, and the examples
//! for existing apps in `examples/stacks/` run. It prints a table, and fails if anything in it is not as it should be.
//!
//! What docs/RUST.md shows must be what ran: each of its blocks of code is looked for in the program that it names.
//!
//! With `--update-locks` it writes `locks/` instead: after a change of `src/rows.rs`, or of kanbanlock's version or
//! dependencies.

mod docs;
mod judge;
mod packages;
mod rows;
mod stacks;

use std::process::ExitCode;
use std::time::Instant;

use judge::{Failure, Seen, Way};
use rows::{ROWS, Row};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (flags, names): (Vec<&str>, Vec<&str>) =
        arguments.iter().map(String::as_str).partition(|a| a.starts_with('-'));
    let update_locks = match flags.as_slice() {
        [] => false,
        ["--update-locks"] => true,
        _ => {
            eprintln!("usage: kanbanlock-matrix [--update-locks] [part of a row's name …]");
            return ExitCode::from(2);
        }
    };
    let is_wanted = |row: &&Row| names.is_empty() || names.iter().any(|name| row.package().contains(name));
    let rows: Vec<&Row> = ROWS.iter().filter(is_wanted).collect();
    if rows.is_empty() {
        eprintln!(
            "no row's package is called like that; rows: {}",
            ROWS.iter().map(Row::package).collect::<Vec<_>>().join(", ")
        );
        return ExitCode::from(2);
    }
    let result = if update_locks {
        rows.iter().try_for_each(|row| packages::update_lock(row))
    } else {
        run(&rows, names.is_empty())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(rows: &[&Row], is_whole: bool) -> Result<(), Failure> {
    docs::check()?;
    packages::build_extension()?;
    let mut table = Vec::new();
    let mut failures = Vec::new();
    let mut programs = Vec::new();
    for row in rows {
        let start = Instant::now();
        let program = match packages::build(row) {
            Ok(program) => program,
            Err(failure) => {
                failures.push(format!("{}: {failure}", row.name));
                continue;
            }
        };
        let built = start.elapsed();
        let mut cells = Vec::new();
        let mut sqlite = String::new();
        for way in [Way::ByName, Way::AsDefault, Way::Stock] {
            match judge::judge(row, &program, way).and_then(|seen| as_it_should_be(seen, way)) {
                Ok(seen) => {
                    if way == Way::ByName {
                        sqlite = seen.sqlite.join(", ");
                    }
                    cells.push(format!("{} of {}", seen.held, seen.commits));
                }
                Err(failure) => {
                    cells.push("FAILED".to_owned());
                    failures.push(format!("{}, {way:?}: {failure}", row.name));
                }
            }
        }
        cells.splice(0..0, [row.name.to_owned(), sqlite]);
        eprintln!(
            "{}: {cells:?}; built in {:.1} s, run in {:.1} s",
            row.package(),
            built.as_secs_f32(),
            (start.elapsed() - built).as_secs_f32()
        );
        table.push(cells);
        programs.push((*row, program));
    }
    if programs.len() > 1 {
        let mut cells = vec!["all of these, on one database".to_owned()];
        match judge::judge_together(&programs).and_then(|seen| as_it_should_be(seen, Way::ByName)) {
            Ok(seen) => cells.extend([
                format!("{} versions", seen.sqlite.len()),
                format!("{} of {}", seen.held, seen.commits),
                "–".to_owned(),
                "–".to_owned(),
            ]),
            Err(failure) => failures.push(format!("{}: {failure}", cells[0])),
        }
        table.push(cells);
    }
    if is_whole {
        failures.extend(stacks::run());
    }
    print(&table);
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n").into()) }
}

/// The flock is held in every write transaction through kanbanlock, and in none of stock SQLite.
fn as_it_should_be(seen: Seen, way: Way) -> Result<Seen, Failure> {
    let expected = if way == Way::Stock { 0 } else { seen.commits };
    if seen.held != expected {
        return Err(format!("the flock was held in {} of {} transactions", seen.held, seen.commits).into());
    }
    Ok(seen)
}

fn print(table: &[Vec<String>]) {
    println!("\nWrite transactions of two processes, all found by the audit, in which the flock was held:\n");
    println!("| library | SQLite | by name, WAL | as default, DELETE | stock, WAL |");
    println!("|---|---|---|---|---|");
    for cells in table {
        println!("| {} |", cells.join(" | "));
    }
}
