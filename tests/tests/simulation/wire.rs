//! Backend messages of PostgreSQL's protocol, as bytes.

pub(crate) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 5);
    out.push(tag);
    out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    out.extend_from_slice(body);
    out
}

/// One result set of text columns with one row, or none.
pub(crate) fn rows(names: &[&str], row: Option<&[Option<Vec<u8>>]>) -> Vec<u8> {
    let mut body = (names.len() as u16).to_be_bytes().to_vec();
    for name in names {
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&[0; 19]);
    }
    let mut out = message(b'T', &body);
    if let Some(values) = row {
        let mut body = (values.len() as u16).to_be_bytes().to_vec();
        for value in values {
            match value {
                Some(bytes) => {
                    body.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
                    body.extend_from_slice(bytes);
                }
                None => body.extend_from_slice(&[0xff; 4]),
            }
        }
        out.extend(message(b'D', &body));
    }
    out.extend(complete("SELECT"));
    out
}

pub(crate) fn text(value: impl ToString) -> Option<Vec<u8>> {
    Some(value.to_string().into_bytes())
}

pub(crate) fn complete(tag: &str) -> Vec<u8> {
    message(b'C', &[tag.as_bytes(), b"\0"].concat())
}

pub(crate) fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

pub(crate) fn error(severity: &str, code: &str, text: &str, detail: &str) -> Vec<u8> {
    let detail = match detail {
        "" => String::new(),
        detail => format!("D{detail}\0"),
    };
    let body = format!("S{severity}\0V{severity}\0C{code}\0M{text}\0{detail}\0");
    message(b'E', body.as_bytes())
}

pub(crate) fn welcome() -> Vec<u8> {
    [
        message(b'R', &[0; 4]),
        message(b'S', b"server_version\x0017.2\0"),
        message(b'S', b"in_hot_standby\0off\0"),
        message(b'K', &[0, 0, 0, 1, 0, 0, 0, 1]),
        ready(),
    ]
    .concat()
}

/// A WAL message of `CopyBoth`. `micros` is the server's clock as PostgreSQL counts.
pub(crate) fn wal(start: u64, server_end: u64, micros: i64, data: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(data.len() + 25);
    body.push(b'w');
    body.extend_from_slice(&start.to_be_bytes());
    body.extend_from_slice(&server_end.to_be_bytes());
    body.extend_from_slice(&micros.to_be_bytes());
    body.extend_from_slice(data);
    message(b'd', &body)
}

pub(crate) fn keepalive(sent: u64, micros: i64, reply: bool) -> Vec<u8> {
    let mut body = vec![b'k'];
    body.extend_from_slice(&sent.to_be_bytes());
    body.extend_from_slice(&micros.to_be_bytes());
    body.push(u8::from(reply));
    message(b'd', &body)
}

/// Takes one message off the front of `buffer`.
pub(crate) fn take(buffer: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let length = u32::from_be_bytes(buffer.get(1..5)?.try_into().ok()?) as usize;
    let body = buffer.get(5..length + 1)?.to_vec();
    let tag = buffer[0];
    buffer.drain(..length + 1);
    Some((tag, body))
}

/// What a receiver reports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Status {
    pub(crate) write: u64,
    pub(crate) flush: u64,
    pub(crate) apply: u64,
    pub(crate) reply: bool,
}

pub(crate) fn status(body: &[u8]) -> Option<Status> {
    let at = |place: usize| Some(u64::from_be_bytes(body.get(place..place + 8)?.try_into().ok()?));
    match body.first() {
        Some(b'r') => Some(Status {
            write: at(1)?,
            flush: at(9)?,
            apply: at(17)?,
            reply: *body.get(33)? != 0,
        }),
        _ => None,
    }
}

/// An LSN as PostgreSQL prints it.
pub(crate) fn lsn(at: u64) -> String {
    format!("{:X}/{:X}", at >> 32, at & 0xffff_ffff)
}

pub(crate) fn parse_lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    Some(u64::from_str_radix(high, 16).ok()? << 32 | u64::from_str_radix(low, 16).ok()?)
}
