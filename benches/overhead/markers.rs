//! Replaces a part of a Markdown file that is generated, and not a byte of the rest.

/// `text` with `table` between the two markers of that name, `<!-- name:begin -->` and `<!-- name:end -->`. They must
/// be there once each, and in this order: a file that has been edited into something else is not to be guessed at.
pub(crate) fn splice(text: &str, name: &str, table: &str) -> Result<String, String> {
    let (begin, end) = (format!("<!-- {name}:begin -->"), format!("<!-- {name}:end -->"));
    let parts = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    match parts {
        Some((before, after)) if text.matches(&begin).count() == 1 && text.matches(&end).count() == 1 => {
            Ok(format!("{before}{begin}\n\n{table}\n{end}{after}"))
        }
        _ => Err(format!("needs the markers {begin} and {end}, once each and in this order")),
    }
}
