//! Replaces the part of a Markdown file that is generated, and not a byte of the rest.

const BEGIN: &str = "<!-- overhead:begin -->";
const END: &str = "<!-- overhead:end -->";

/// `text` with `table` between the two markers. They must be there once each, and in this order: a file
/// that has been edited into something else is not to be guessed at.
pub(crate) fn splice(text: &str, table: &str) -> Result<String, String> {
    let parts = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    match parts {
        Some((before, after)) if text.matches(BEGIN).count() == 1 && text.matches(END).count() == 1 => {
            Ok(format!("{before}{BEGIN}\n\n{table}\n{END}{after}"))
        }
        _ => Err(format!("needs the markers {BEGIN} and {END}, once each and in this order")),
    }
}
