//! Comparing what the server sends again with what was sealed before (I6).
//!
//! Every stream begins at the start of an object of which a part is already sealed: in the window, or in
//! the regions. Those bytes must come again unchanged. A difference means that the server was rolled back.

use bytes::Bytes;
use highwater_format::{Lsn, LsnRange, Object, TimelineId};

use crate::archived::{append, read_range};
use crate::error::{AgentError, Result};
use crate::uploader::Shared;
use crate::window::What;

/// The bytes that a stream must begin with.
#[derive(Debug)]
pub(super) struct Overlap {
    timeline: TimelineId,
    range: LsnRange,
    plain: Vec<u8>,
    compared: usize,
    /// Whether nothing passes before all of it was compared; then it is `equal`.
    withholds: bool,
    equal: Bytes,
}

impl Overlap {
    /// Nothing is to be compared.
    pub(super) fn nothing(timeline: TimelineId, at: Lsn) -> Self {
        Self {
            timeline,
            range: LsnRange { start: at, end: at },
            plain: Vec::new(),
            compared: 0,
            withholds: false,
            equal: Bytes::new(),
        }
    }

    /// Reads the sealed bytes of `range` from the window and the regions.
    pub(super) async fn load(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Result<Self> {
        let held = Self::load_if_held(shared, timeline, range).await?;
        held.ok_or_else(|| cannot_read(timeline, range, "no region that was asked holds it"))
    }

    /// The same; none if the regions answered that they do not hold all of it.
    pub(super) async fn load_if_held(
        shared: &Shared,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Option<Self>> {
        let mut plain = Vec::new();
        let window = window_pieces(shared, timeline, range)?;
        while (plain.len() as u64) < range.len() {
            let next = range.start + plain.len() as u64;
            if let Some((held, bytes)) = window.iter().find(|(held, _)| held.contains(next)) {
                append(&mut plain, range, *held, bytes);
                continue;
            }
            let until = window
                .iter()
                .map(|(held, _)| held.start)
                .filter(|start| *start > next)
                .min();
            let missing = LsnRange {
                start: next,
                end: until.map_or(range.end, |until| until.min(range.end)),
            };
            match from_regions(shared, timeline, missing).await? {
                Some(bytes) => plain.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
        Ok(Some(Self {
            timeline,
            range,
            plain,
            compared: 0,
            withholds: false,
            equal: Bytes::new(),
        }))
    }

    /// Where the comparison ends.
    pub(super) fn end(&self) -> Lsn {
        self.range.end
    }

    /// Lets nothing of the stream through before all of the overlap has come again: for bytes that would be archived
    /// anew, on a timeline that has only begun.
    #[must_use]
    pub(super) fn withholding(mut self) -> Self {
        self.withholds = true;
        self
    }

    /// Compares the next bytes of the stream, and gives those that may be archived now, in order.
    pub(super) fn pass(&mut self, data: Bytes) -> Result<[Bytes; 2]> {
        let expected = self.plain.len() - self.compared;
        self.compare(&data)?;
        if !self.withholds || expected == 0 {
            return Ok([Bytes::new(), data]);
        }
        if data.len() < expected {
            return Ok([Bytes::new(), Bytes::new()]);
        }
        // They are equal: what was held back need not have been kept.
        Ok([std::mem::take(&mut self.equal), data.slice(expected..)])
    }

    /// What lies past the overlap is not looked at.
    fn compare(&mut self, data: &[u8]) -> Result<()> {
        let expected = self.plain.get(self.compared..).unwrap_or_default();
        let length = expected.len().min(data.len());
        let (expected, got) = (&expected[..length], &data[..length]);
        if expected != got {
            let same = expected.iter().zip(got).take_while(|(a, b)| a == b).count();
            let at = self.range.start + (self.compared + same) as u64;
            return Err(AgentError::Diverged {
                timeline: self.timeline,
                at,
                range: self.range,
            });
        }
        self.compared += length;
        if self.compared == self.plain.len() && !self.plain.is_empty() {
            tracing::debug!(range = %self.range, "the server's WAL equals the archive's");
            let equal = std::mem::take(&mut self.plain);
            self.compared = 0;
            if self.withholds {
                self.equal = Bytes::from(equal);
            }
        }
        Ok(())
    }
}

fn window_pieces(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Result<Vec<(LsnRange, Vec<u8>)>> {
    let mut pieces = Vec::new();
    for item in shared.window.overlapping(timeline, range) {
        let What::Wal { range: held, .. } = item.what else {
            continue;
        };
        let opened = Object::open(item.object.bytes.clone()).and_then(|object| object.plain());
        let plain =
            opened.map_err(|error| AgentError::Bug(format!("{} cannot be read back: {error}", item.key)))?;
        pieces.push((held, plain));
    }
    Ok(pieces)
}

/// Reads `range` from whichever region holds it; none if those that should answered that they do not.
async fn from_regions(shared: &Shared, timeline: TimelineId, range: LsnRange) -> Result<Option<Vec<u8>>> {
    let (mut asked, mut reasons) = (0, Vec::new());
    // One that was not read yet, or has less, is not waited for.
    let reaches = |index| {
        let at = shared.progress.position(index);
        at.is_some_and(|at| at.timeline > timeline || (at.timeline == timeline && at.lsn >= range.end))
    };
    for region in shared
        .archive
        .regions
        .iter()
        .filter(|region| reaches(region.index))
    {
        match read_range(
            &shared.archive,
            &*region.quick,
            shared.segment_size,
            timeline,
            range,
        )
        .await
        {
            Ok(Some(plain)) => return Ok(Some(plain)),
            Ok(None) => asked += 1,
            Err(error) => reasons.push(format!("{}: {error}", region.name)),
        }
    }
    match reasons.is_empty() && asked > 0 {
        true => Ok(None),
        false => Err(cannot_read(timeline, range, &reasons.join("; "))),
    }
}

fn cannot_read(timeline: TimelineId, range: LsnRange, why: &str) -> AgentError {
    AgentError::Trouble {
        what: format!(
            "timeline {timeline}: cannot read {range} back to compare it with the server's WAL ({why})"
        ),
        next: "The stream begins when a region that holds it answers".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlap(plain: &[u8]) -> Overlap {
        let range = LsnRange {
            start: Lsn(100),
            end: Lsn(100 + plain.len() as u64),
        };
        Overlap {
            timeline: TimelineId::FIRST,
            range,
            plain: plain.to_vec(),
            compared: 0,
            withholds: false,
            equal: Bytes::new(),
        }
    }

    #[test]
    fn equal_bytes_pass_in_any_pieces() {
        let mut overlap = overlap(b"abcdef");
        overlap.compare(b"ab").unwrap();
        overlap.compare(b"cdefgh").unwrap();
        overlap.compare(b"anything").unwrap();
    }

    #[test]
    fn the_first_differing_byte_is_named() {
        let mut overlap = overlap(b"abcdef");
        overlap.compare(b"abc").unwrap();
        let Err(AgentError::Diverged { at, .. }) = overlap.compare(b"dXf") else {
            panic!("must differ")
        };
        assert_eq!(at, Lsn(104));
    }

    #[test]
    fn nothing_of_a_new_timeline_passes_before_all_it_shares_was_compared() {
        let bytes = Bytes::from_static;
        let mut common = overlap(b"abcdef").withholding();
        for piece in [b"ab", b"cd"] {
            assert_eq!(common.pass(bytes(piece)).unwrap(), [bytes(b""), bytes(b"")]);
        }
        assert_eq!(
            common.pass(bytes(b"efgh")).unwrap(),
            [bytes(b"abcdef"), bytes(b"gh")]
        );
        assert_eq!(common.pass(bytes(b"ij")).unwrap(), [bytes(b""), bytes(b"ij")]);
        let mut rolled_back = overlap(b"abcdef").withholding();
        rolled_back.pass(bytes(b"abc")).unwrap();
        assert!(rolled_back.pass(bytes(b"dXf")).is_err());
        let mut nothing = overlap(b"").withholding();
        assert_eq!(nothing.pass(bytes(b"ab")).unwrap(), [bytes(b""), bytes(b"ab")]);
    }
}
