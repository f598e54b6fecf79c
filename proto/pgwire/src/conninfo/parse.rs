//! The `keyword = value` form of a connection string.

use crate::error::PgError;

/// Splits a connection string into pairs, with libpq's rules for quotes and backslashes.
pub(super) fn parse(text: &str) -> Result<Vec<(String, String)>, PgError> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| c == '=' || c.is_whitespace())
            .unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let Some(after) = after.trim_start().strip_prefix('=') else {
            // The text may be a password that slipped out of its quotes: it is not repeated.
            return Err(PgError::config(
                format!("item {} of the connection string has no \"=\"", pairs.len() + 1),
                "write keyword=value pairs, and values with spaces in single quotes",
            ));
        };
        if name.is_empty() {
            return Err(PgError::config(
                format!(
                    "item {} of the connection string has no keyword before \"=\"",
                    pairs.len() + 1
                ),
                "write keyword=value pairs",
            ));
        }
        let (value, after) = value(name, after.trim_start())?;
        pairs.push((name.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// Takes one value off the front: quoted, or up to the next white space.
fn value<'a>(name: &str, text: &'a str) -> Result<(String, &'a str), PgError> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            c if !quoted && c.is_whitespace() => return Ok((value, &text[at..])),
            c => value.push(c),
        }
    }
    match quoted {
        true => Err(PgError::config(
            format!("the value of {name:?} has no closing quote"),
            "add the quote",
        )),
        false => Ok((value, "")),
    }
}
