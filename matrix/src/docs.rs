//! docs/RUST.md and the programs of the matrix agree: what a reader copies is what ran.

use std::fs;

use crate::judge::Failure;
use crate::packages::{matrix, root};
use crate::rows::ROWS;

/// Each block of code that follows a line `<!-- matrix: PROGRAM -->` stands, with other line ends and indentation, in
/// `rows/PROGRAM.rs`, where the database's name is the variable `database`. Each program has such a block, and each row's
/// name is in the table.
pub fn check() -> Result<(), Failure> {
    let path = root().join("docs/RUST.md");
    check_text(&fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?)
}

fn check_text(text: &str) -> Result<(), Failure> {
    let mut shown = Vec::new();
    for part in text.split("<!-- matrix: ").skip(1) {
        let (program, rest) = part.split_once(" -->").ok_or("docs/RUST.md: a marker without its end")?;
        let block = rest.split("```").nth(1).and_then(|block| block.strip_prefix("rust\n"));
        let block = block.ok_or_else(|| format!("docs/RUST.md: no block of Rust for {program}"))?;
        let source = fs::read_to_string(matrix().join("rows").join(program).with_extension("rs"))?;
        if !words(&source).contains(&words(block)) {
            return Err(format!("docs/RUST.md: this is not in matrix/rows/{program}.rs:\n{block}").into());
        }
        shown.push(program);
    }
    for row in ROWS {
        if !shown.contains(&row.program) {
            return Err(format!("docs/RUST.md: no block for {}", row.program).into());
        }
        if !text.contains(&format!("\n| {} |", row.name)) {
            return Err(format!("docs/RUST.md: {} is not in its table", row.name).into());
        }
    }
    Ok(())
}

/// Without blanks, which rustfmt places by the length of a line, and with the variable for the literal.
fn words(code: &str) -> String {
    let names = ["\"file:kanban.db?vfs=kanbanlock\"", "\"sqlite:kanban.db?vfs=kanbanlock\""];
    let code = names.iter().fold(code.to_owned(), |code, name| code.replace(name, "database"));
    code.split_whitespace().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_true_and_a_changed_one_is_found_out() {
        check().unwrap();
        let page = fs::read_to_string(root().join("docs/RUST.md")).unwrap();
        for (from, to) in [
            ("Connection::open(", "Connection::unlock("),
            ("| diesel 2.3 |", "| diesel 9.9 |"),
            ("matrix: sqlx", "matrx"),
        ] {
            assert!(page.contains(from));
            check_text(&page.replace(from, to)).expect_err(from);
        }
    }
}
