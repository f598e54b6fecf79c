//! What may be answered to PostgreSQL when it asks for a segment, given what the regions list. Pure.
//!
//! Owns: the rule that a segment is "not there" only when it is proven to lie past the end. PostgreSQL takes "not
//! there" for the end of the archive, opens the cluster and drops everything after it; a wrong answer is data loss.
//!
//! A segment is served when its bytes are there up to the end that the restore was planned for (zeros follow: that
//! is what the rest of the newest segment looks like on the server too). It lies past the end when no byte of it is
//! there, the plan's end is not behind its start, nothing newer is listed anywhere, and every region has been seen:
//! just now, or completely when the restore was planned. What is listed behind a ragged end does not count as newer:
//! the plan saw the break and knows that nothing behind it was ever acknowledged, or that the target lies before it
//! (PostgreSQL reads ahead; with a target it refuses to open at an end that comes too early). A restore that was not planned by this program
//! (no [`TimelineFacts`]) has no such proof, so every region must answer just now, and a hole inside the segment is one too.

use highwater_format::coverage::{Coverage, Piece};
use highwater_format::lsn::{Lsn, LsnRange};

use crate::recovery::facts::TimelineFacts;

/// What one region says about a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The region.
    pub region: String,
    /// It was read completely when the restore was planned.
    pub was_read: bool,
    /// What it lists, or why it cannot be read.
    pub listed: Result<Listed, String>,
}

/// What a region has for a segment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// Pieces that hold bytes of the segment.
    pub pieces: Vec<Piece>,
    /// Where an object behind the segment begins, if there is one.
    pub later: Option<Lsn>,
}

impl Listed {
    /// Where WAL begins that lies behind a hole at `until`, inside the segment or past it.
    fn behind(&self, until: Lsn) -> Option<Lsn> {
        let beyond = self.pieces.iter().filter(|piece| piece.range.end > until);
        beyond.map(|piece| piece.range.start).min().or(self.later)
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Serve these pieces; zeros from `until` on.
    Serve {
        /// In order.
        pieces: Vec<Piece>,
        /// End of what is there, or of the segment.
        until: Lsn,
    },
    /// Proven to lie past the end.
    PastEnd(String),
    /// Not there, and WAL behind it is listed. Of an agent that stores several objects at once it is there a moment later.
    Hole(String),
    /// Neither there nor proven past the end.
    Refuse(String),
}

/// Decides about the segment `range`.
#[must_use]
pub fn judge(range: LsnRange, known: Option<&TimelineFacts>, seen: &[Seen], coverage: &Coverage) -> Verdict {
    let until = coverage.contiguous_end(range.start).min(range.end);
    // A timeline that nothing was recorded on after its switch point has nothing to serve.
    let needed = known.map(|known| {
        if known.end > known.begin {
            known.end.min(range.end)
        } else {
            range.start
        }
    });
    match needed {
        Some(needed) if until > range.start && until >= needed => serve(range, until, coverage),
        Some(needed) if needed > range.start => {
            let missing = LsnRange::new(until, needed);
            Verdict::Refuse(format!(
                "the archive lacks WAL {missing}, which the plan of this restore had{}",
                why(seen)
            ))
        }
        None if until == range.end => serve(range, until, coverage),
        None if until > range.start => match all_say_nothing_later(seen, until, false) {
            Ok(_) => serve(range, until, coverage),
            Err(no) => {
                no.into_verdict(|reason| format!("the archive has WAL up to {until} only, and {reason}"))
            }
        },
        _ if known.is_some_and(|known| known.ragged) => match enough_answer(seen) {
            Ok(proof) => Verdict::PastEnd(proof),
            Err(reason) => Verdict::Refuse(reason),
        },
        _ => match all_say_nothing_later(seen, until, known.is_some()) {
            Ok(proof) => Verdict::PastEnd(proof),
            Err(no) => no.into_verdict(|reason| reason),
        },
    }
}

fn serve(range: LsnRange, until: Lsn, coverage: &Coverage) -> Verdict {
    match coverage.cover(LsnRange::new(range.start, until)) {
        Ok(pieces) => Verdict::Serve { pieces, until },
        Err(hole) => Verdict::Refuse(hole.to_string()),
    }
}

/// Whether a region was asked that shows that the break of a ragged end is still there.
fn enough_answer(seen: &[Seen]) -> Result<String, String> {
    if seen.iter().any(|region| region.listed.is_ok()) {
        let proof =
            "the plan of this restore ends before it, at a break that recovery does not have to cross";
        return Ok(proof.to_owned());
    }
    Err(format!("no region can be read{}", why(seen)))
}

/// Why there is no proof.
enum NoProof {
    Hole(String),
    Unread(String),
}

impl NoProof {
    fn into_verdict(self, say: impl Fn(String) -> String) -> Verdict {
        match self {
            Self::Hole(reason) => Verdict::Hole(say(reason)),
            Self::Unread(reason) => Verdict::Refuse(say(reason)),
        }
    }
}

/// Whether nothing is listed that reaches beyond `until`, and enough regions were asked to know.
fn all_say_nothing_later(seen: &[Seen], until: Lsn, planned: bool) -> Result<String, NoProof> {
    let mut answered = 0_usize;
    for region in seen {
        match &region.listed {
            Ok(listed) => {
                // What came into the segment since is behind the planned end, whole or not.
                let later = if planned {
                    listed.later
                } else {
                    listed.behind(until)
                };
                if let Some(later) = later {
                    let name = &region.region;
                    let reason = format!("region {name} has WAL at {later}, behind a hole");
                    return Err(NoProof::Hole(reason));
                }
                answered += 1;
            }
            // What the plan did not know of is not part of its proof, and the operator went on without it.
            Err(_) if planned => {}
            Err(problem) => {
                let reason = format!("region {} cannot be read: {problem}", region.region);
                return Err(NoProof::Unread(reason));
            }
        }
    }
    if answered == 0 {
        let reason = format!("no region can be read{}", why(seen));
        return Err(NoProof::Unread(reason));
    }
    let unread: Vec<_> = seen.iter().filter(|region| region.listed.is_err()).collect();
    let proof = "no region lists it or anything behind it";
    Ok(match unread.as_slice() {
        [] => proof.to_owned(),
        regions => {
            let name = |region: &&Seen| {
                let when = if region.was_read {
                    "read when the restore was planned"
                } else {
                    "left out by the plan"
                };
                format!("{} ({when})", region.region)
            };
            let names: Vec<_> = regions.iter().map(name).collect();
            format!("{proof}; not read just now: {}", names.join(", "))
        }
    })
}

/// The regions that cannot be read, for a message.
fn why(seen: &[Seen]) -> String {
    let unread = seen
        .iter()
        .filter_map(|region| region.listed.as_ref().err().map(|error| (&region.region, error)));
    unread
        .map(|(region, error)| format!("; region {region} cannot be read: {error}"))
        .collect()
}

#[cfg(test)]
#[path = "prove_tests.rs"]
mod tests;
