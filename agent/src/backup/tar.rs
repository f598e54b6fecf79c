//! The tar archives inside `BASE_BACKUP`, parsed as they arrive.
//!
//! Owns: turning bytes cut anywhere into entries and slices of file content, without copying content and
//! without I/O. Accepts what PostgreSQL writes (ustar headers, octal and base-256 numbers, archives with and
//! without the two zero blocks at the end) and GNU long names. Everything else is an error that names the
//! offset: a backup that was half understood must not be stored.
//! Does not own: where content goes, or what the paths are relative to.

use thiserror::Error;

const BLOCK: usize = 512;
/// Longest path or link target taken from a GNU long-name record. PATH_MAX on Linux is 4,096.
const LONGEST_NAME: u64 = 16 * 1024;

/// What one archive member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TarKind {
    /// A regular file; its content follows.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// The header of one member. The path is relative, without `./`, `..`, or a trailing slash; it is empty for
/// the archive's own root directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TarEntry {
    pub(crate) path: String,
    pub(crate) kind: TarKind,
    pub(crate) mode: u32,
    pub(crate) mtime: i64,
    pub(crate) size: u64,
    pub(crate) link: Option<String>,
}

/// What the parser found next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TarEvent<'a> {
    /// A member begins.
    Entry(TarEntry),
    /// Content of the regular file that began last.
    Data(&'a [u8]),
    /// All content of that file has been given. Follows every regular file, empty ones too.
    FileEnd,
}

/// Why an archive was refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the tar archive sent by PostgreSQL cannot be read at byte {offset}: {what}")]
pub(crate) struct TarError {
    offset: u64,
    what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    File,
    LongName,
    LongLink,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Content { of: Content, left: u64, padding: usize },
    Padding(usize),
    Trailer,
}

/// Incremental parser of one archive.
#[derive(Debug)]
pub(crate) struct TarParser {
    state: State,
    block: Box<[u8; BLOCK]>,
    filled: usize,
    offset: u64,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl TarParser {
    pub(crate) fn new() -> TarParser {
        TarParser {
            state: State::Header,
            block: Box::new([0; BLOCK]),
            filled: 0,
            offset: 0,
            long_name: None,
            long_link: None,
        }
    }

    /// The next thing in `input`, which is advanced past what was used. `None`: all of it was used.
    pub(crate) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<TarEvent<'a>>, TarError> {
        loop {
            match self.state {
                State::Content {
                    of: Content::File,
                    left: 0,
                    padding,
                } => {
                    self.state = after_content(padding);
                    return Ok(Some(TarEvent::FileEnd));
                }
                State::Content { left: 0, padding, .. } => self.state = after_content(padding),
                _ if input.is_empty() => return Ok(None),
                State::Content { of, left, padding } => {
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    let data = self.take(input, take);
                    self.state = State::Content {
                        of,
                        left: left - take as u64,
                        padding,
                    };
                    match of {
                        Content::File => return Ok(Some(TarEvent::Data(data))),
                        Content::LongName => self.long_name.get_or_insert_default().extend_from_slice(data),
                        Content::LongLink => self.long_link.get_or_insert_default().extend_from_slice(data),
                    }
                }
                State::Padding(left) => {
                    let take = left.min(input.len());
                    self.take(input, take);
                    self.state = after_content(left - take);
                }
                State::Trailer => {
                    if input.iter().any(|byte| *byte != 0) {
                        return Err(self.error("data follow the end-of-archive block".into()));
                    }
                    self.take(input, input.len());
                }
                State::Header => {
                    if let Some(entry) = self.header(input)? {
                        return Ok(Some(TarEvent::Entry(entry)));
                    }
                }
            }
        }
    }

    /// Call at the end of the archive: an archive that stops inside a member is an error.
    pub(crate) fn finish(&self) -> Result<(), TarError> {
        let whole = match self.state {
            State::Header => self.filled == 0 && self.long_name.is_none() && self.long_link.is_none(),
            State::Trailer => self.offset.is_multiple_of(BLOCK as u64),
            State::Content { .. } | State::Padding(_) => false,
        };
        if whole {
            Ok(())
        } else {
            Err(self.error("the archive ends inside a member".into()))
        }
    }

    fn take<'a>(&mut self, input: &mut &'a [u8], count: usize) -> &'a [u8] {
        let (taken, rest) = input.split_at(count);
        *input = rest;
        self.offset += count as u64;
        taken
    }

    fn header(&mut self, input: &mut &[u8]) -> Result<Option<TarEntry>, TarError> {
        let take = (BLOCK - self.filled).min(input.len());
        let part = self.take(input, take);
        self.block[self.filled..self.filled + take].copy_from_slice(part);
        self.filled += take;
        if self.filled < BLOCK {
            return Ok(None);
        }
        self.filled = 0;
        if self.block.iter().all(|byte| *byte == 0) {
            self.state = State::Trailer;
            return Ok(None);
        }
        self.check_header()?;
        let size = self.number("size", 124, 12)?;
        let padding = padding_after(size);
        match self.block[156] {
            kind @ (b'L' | b'K') => {
                if size == 0 || size > LONGEST_NAME {
                    return Err(self.error(format!("a long name of {size} bytes")));
                }
                let of = if kind == b'L' {
                    Content::LongName
                } else {
                    Content::LongLink
                };
                self.state = State::Content {
                    of,
                    left: size,
                    padding,
                };
                Ok(None)
            }
            b'0' | 0 => {
                self.state = State::Content {
                    of: Content::File,
                    left: size,
                    padding,
                };
                self.entry(TarKind::File, size).map(Some)
            }
            kind @ (b'5' | b'2') if size == 0 => {
                let kind = if kind == b'5' {
                    TarKind::Directory
                } else {
                    TarKind::Symlink
                };
                self.entry(kind, 0).map(Some)
            }
            b'5' | b'2' => Err(self.error("a directory or link with content".into())),
            other => Err(self.error(format!("member type {:?} is not known", char::from(other)))),
        }
    }

    fn check_header(&self) -> Result<(), TarError> {
        if &self.block[257..262] != b"ustar" {
            return Err(self.error("a header without the ustar magic".into()));
        }
        let stated = self.number("checksum", 148, 8)?;
        let blanks = 8 * u64::from(b' ');
        let sum: u64 = self.block[..148]
            .iter()
            .chain(&self.block[156..])
            .map(|byte| u64::from(*byte))
            .sum();
        if stated != sum + blanks {
            return Err(self.error(format!("header checksum {stated}, calculated {}", sum + blanks)));
        }
        Ok(())
    }

    fn entry(&mut self, kind: TarKind, size: u64) -> Result<TarEntry, TarError> {
        let path = match self.long_name.take() {
            Some(name) => until_nul(&name).to_vec(),
            None => self.short_path(),
        };
        let link = match (kind, self.long_link.take()) {
            (TarKind::Symlink, Some(link)) => Some(until_nul(&link).to_vec()),
            (TarKind::Symlink, None) => Some(until_nul(&self.block[157..257]).to_vec()),
            (_, Some(_)) => return Err(self.error("a long link name before something else".into())),
            (_, None) => None,
        };
        let link = link.map(|link| self.text("link target", link)).transpose()?;
        if link.as_deref() == Some("") {
            return Err(self.error("a symbolic link without a target".into()));
        }
        let path = self.text("file name", path)?;
        let path = self.clean(&path)?;
        if path.is_empty() && kind != TarKind::Directory {
            return Err(self.error("a member without a name".into()));
        }
        let mode = u32::try_from(self.number("mode", 100, 8)? & 0o7777).unwrap_or_default();
        // A time before 1970 arrives as the two's complement, as PostgreSQL writes it.
        let mtime = self.number("mtime", 136, 12)?.cast_signed();
        Ok(TarEntry {
            path,
            kind,
            mode,
            mtime,
            size,
            link,
        })
    }

    fn short_path(&self) -> Vec<u8> {
        let name = until_nul(&self.block[..100]);
        // Old GNU archives ("ustar  ") keep other things where POSIX has the prefix.
        let prefix = if self.block[262] == 0 {
            until_nul(&self.block[345..500])
        } else {
            &[]
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    fn text(&self, what: &str, bytes: Vec<u8>) -> Result<String, TarError> {
        String::from_utf8(bytes).map_err(|bad| {
            let name = String::from_utf8_lossy(bad.as_bytes()).into_owned();
            self.error(format!(
                "{what} {name:?} is not UTF-8; rename or remove the file and back up again"
            ))
        })
    }

    fn clean(&self, path: &str) -> Result<String, TarError> {
        let path = path.strip_prefix("./").unwrap_or(path).trim_end_matches('/');
        let path = if path == "." { "" } else { path };
        let outside = path.starts_with('/') || path.split('/').any(|part| matches!(part, ".." | "."));
        if outside || path.contains("//") {
            return Err(self.error(format!("path {path:?} does not lie in the data directory")));
        }
        Ok(path.to_owned())
    }

    /// Octal digits with blanks around them, or big-endian binary when the first byte is 0x80.
    fn number(&self, what: &str, at: usize, len: usize) -> Result<u64, TarError> {
        let field = &self.block[at..at + len];
        if field[0] == 0x80 {
            let (high, low) = field[1..].split_at((len - 1).saturating_sub(8));
            if high.iter().any(|byte| *byte != 0) {
                return Err(self.error(format!("{what} is too large")));
            }
            return Ok(low.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte)));
        }
        let digits = until_nul(field).trim_ascii();
        let octal = |value: u64, digit: &u8| match digit {
            b'0'..=b'7' => Some((value << 3) | u64::from(digit - b'0')),
            _ => None,
        };
        digits.iter().try_fold(0, octal).ok_or_else(|| {
            self.error(format!(
                "{what} {:?} is not a number",
                String::from_utf8_lossy(field)
            ))
        })
    }

    fn error(&self, what: String) -> TarError {
        TarError {
            offset: self.offset,
            what,
        }
    }
}

fn after_content(padding: usize) -> State {
    if padding == 0 {
        State::Header
    } else {
        State::Padding(padding)
    }
}

fn padding_after(size: u64) -> usize {
    let over = usize::try_from(size % BLOCK as u64).unwrap_or_default();
    if over == 0 { 0 } else { BLOCK - over }
}

fn until_nul(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    &field[..end]
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
