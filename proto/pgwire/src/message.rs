//! Decoding of message bodies, with every length checked.
//!
//! Only what this crate uses. Bodies come from a peer that may be hostile: each reader returns
//! `None` for anything short, and the caller turns that into an error that names the request.

use bytes::{Buf, Bytes};

use crate::error::PgError;
use crate::frame::Frame;

/// Message types, as the protocol names them.
pub(crate) mod tag {
    pub(crate) const AUTHENTICATION: u8 = b'R';
    pub(crate) const BACKEND_KEY_DATA: u8 = b'K';
    pub(crate) const COMMAND_COMPLETE: u8 = b'C';
    pub(crate) const COPY_DATA: u8 = b'd';
    pub(crate) const COPY_DONE: u8 = b'c';
    pub(crate) const COPY_IN: u8 = b'G';
    pub(crate) const COPY_OUT: u8 = b'H';
    pub(crate) const COPY_BOTH: u8 = b'W';
    pub(crate) const DATA_ROW: u8 = b'D';
    pub(crate) const EMPTY_QUERY: u8 = b'I';
    pub(crate) const ERROR: u8 = b'E';
    pub(crate) const NEGOTIATE_VERSION: u8 = b'v';
    pub(crate) const NOTICE: u8 = b'N';
    pub(crate) const NOTIFICATION: u8 = b'A';
    pub(crate) const PARAMETER_STATUS: u8 = b'S';
    pub(crate) const READY: u8 = b'Z';
    pub(crate) const ROW_DESCRIPTION: u8 = b'T';

    /// Whether a server may send this in the simple query and copy protocols.
    pub(crate) fn is_known(tag: u8) -> bool {
        matches!(
            tag,
            AUTHENTICATION
                | BACKEND_KEY_DATA
                | COMMAND_COMPLETE
                | COPY_DATA
                | COPY_DONE
                | COPY_IN
                | COPY_OUT
                | COPY_BOTH
                | DATA_ROW
                | EMPTY_QUERY
                | ERROR
                | NEGOTIATE_VERSION
                | NOTICE
                | NOTIFICATION
                | PARAMETER_STATUS
                | READY
                | ROW_DESCRIPTION
        )
    }
}

/// Takes a NUL-terminated string off the front.
pub(crate) fn take_cstr(body: &mut Bytes) -> Option<Bytes> {
    let end = body.iter().position(|byte| *byte == 0)?;
    let text = body.split_to(end);
    body.advance(1);
    Some(text)
}

pub(crate) fn take_u8(body: &mut Bytes) -> Option<u8> {
    body.try_get_u8().ok()
}

pub(crate) fn take_u32(body: &mut Bytes) -> Option<u32> {
    body.try_get_u32().ok()
}

pub(crate) fn take_u64(body: &mut Bytes) -> Option<u64> {
    body.try_get_u64().ok()
}

/// One row: `None` for NULL.
pub(crate) type Row = Vec<Option<Bytes>>;

/// Column names of a `RowDescription`.
pub(crate) fn columns(mut body: Bytes) -> Option<Vec<String>> {
    let count = body.try_get_u16().ok()?;
    // Bounded by what is there (19 bytes is the least a column takes), not by what is claimed.
    let mut names = Vec::with_capacity(usize::from(count).min(body.len() / 19));
    for _ in 0..count {
        let name = take_cstr(&mut body)?;
        // Table oid, attribute, type oid, type length, modifier, format.
        const REST: usize = 4 + 2 + 4 + 2 + 4 + 2;
        if body.len() < REST {
            return None;
        }
        body.advance(REST);
        names.push(String::from_utf8_lossy(&name).into_owned());
    }
    Some(names)
}

/// Values of a `DataRow`, as slices of it.
pub(crate) fn row(mut body: Bytes) -> Option<Row> {
    let count = body.try_get_u16().ok()?;
    let mut values = Vec::with_capacity(usize::from(count).min(body.len() / 4));
    for _ in 0..count {
        let len = body.try_get_i32().ok()?;
        if len == -1 {
            values.push(None);
            continue;
        }
        let len = usize::try_from(len).ok().filter(|len| *len <= body.len())?;
        values.push(Some(body.split_to(len)));
    }
    Some(values)
}

/// Name and value of a `ParameterStatus`.
pub(crate) fn parameter(mut body: Bytes) -> Option<(String, String)> {
    let name = take_cstr(&mut body)?;
    let value = take_cstr(&mut body)?;
    Some((
        String::from_utf8_lossy(&name).into_owned(),
        String::from_utf8_lossy(&value).into_owned(),
    ))
}

/// Text of one column that must not be NULL.
pub(crate) fn text<'a>(row: &'a Row, column: usize, name: &str, during: &str) -> Result<&'a str, PgError> {
    optional_text(row, column, during)?
        .ok_or_else(|| PgError::protocol(during, format!("column {name} is missing or NULL")))
}

/// Text of one column.
pub(crate) fn optional_text<'a>(
    row: &'a Row,
    column: usize,
    during: &str,
) -> Result<Option<&'a str>, PgError> {
    let Some(Some(value)) = row.get(column) else {
        return Ok(None);
    };
    std::str::from_utf8(value)
        .map(Some)
        .map_err(|_| PgError::protocol(during, format!("column {} is not valid UTF-8", column + 1)))
}

/// Parses one column that must not be NULL.
pub(crate) fn parsed<T: std::str::FromStr>(
    row: &Row,
    column: usize,
    name: &str,
    during: &str,
) -> Result<T, PgError> {
    let value = text(row, column, name, during)?;
    value
        .parse()
        .map_err(|_| PgError::protocol(during, format!("column {name} has the unusable value {value:?}")))
}

/// The error for a message that has no place here.
pub(crate) fn unexpected(frame: &Frame, during: &str) -> PgError {
    PgError::protocol(
        during,
        format!("message {:?} has no place here", char::from(frame.tag)),
    )
}

/// The error for a body that is shorter than its fields.
pub(crate) fn short(what: &str, during: &str) -> PgError {
    PgError::protocol(during, format!("{what} is cut short"))
}

#[cfg(test)]
mod tests;
