//! What each kind of target needs: a base from which the WAL reaches it, and the record at which replay stops.
//!
//! Owns: the rule for each target, and why it cannot be reached. Does not own: the plan that comes of it (`assemble`).

use highwater_format::{Lsn, Time};

use crate::target::Target;

use super::{
    Answer, Mark, Plan, Question, Refusal, Span, Stop,
    assemble::Cut,
    base::{Base, Line},
    choose::{Halt, Planner},
    say,
};

impl Planner<'_> {
    pub(super) fn latest(&self, line: &Line, bases: &[&Base]) -> Result<Plan, Halt> {
        self.refuse_open_end()?;
        let mut notes = Vec::new();
        let reaches = |base: &&&Base| line.break_at(self.catalog, &self.regions, base.wal.end).is_none();
        let ragged = |base: &&&Base| self.ends_ragged(line, base);
        let base = match (bases.iter().find(reaches), bases.iter().find(ragged)) {
            (Some(base), _) => base,
            (None, Some(base)) => {
                notes.push(say::ragged_end(line, base.wal.end));
                base
            }
            (None, None) => return Err(self.stops_short(line, bases).into()),
        };
        let span = base.span(line.timeline());
        let (before, _) = self.records(span, span.end)?;
        let lsn = before.map_or(span.end, |mark| mark.end).max(base.consistent());
        let stop = Stop {
            lsn,
            last_commit: None,
        };
        self.finish(line, base, &Cut::End, stop, notes)
    }

    /// Whether what lies behind the WAL of `base` was never acknowledged.
    pub(super) fn ends_ragged(&self, line: &Line, base: &Base) -> bool {
        line.break_at(self.catalog, &self.regions, base.wal.end).is_some()
            && line.is_ragged_end(self.catalog, &self.regions, base.wal.end)
    }

    /// A region that does not answer may hold WAL past the end of the others: taking their end for the archive's would
    /// lose it without a word.
    fn refuse_open_end(&self) -> Result<(), Halt> {
        match self.catalog.unreadable().next() {
            None => Ok(()),
            Some((region, error)) => Err(say::open_end(region, error).into()),
        }
    }

    fn stops_short(&self, line: &Line, bases: &[&Base]) -> Refusal {
        let end = bases.iter().map(|base| base.wal.end).max().unwrap_or(Lsn::ZERO);
        match line.break_at(self.catalog, &self.regions, end) {
            Some(missing) => say::hole(line, missing, end, &self.request.target),
            None => say::too_late(line, end, None, &self.request.target),
        }
    }

    pub(super) fn immediate(&self, line: &Line, bases: &[&Base]) -> Result<Plan, Halt> {
        let base = bases.first().ok_or_else(|| say::no_backup(self.catalog, line))?;
        let (cut, stop) = self.at_consistency(line, base)?;
        self.finish(line, base, &cut, stop, Vec::new())
    }

    /// How recovery stops at the end of a backup, and where that is. A standby's copy may be consistent before the end that
    /// the standby gave the backup: PostgreSQL goes by the `pg_control` in it, which was read earlier, and told to stop as
    /// soon as it can it would leave out what the backup's end counts as in it.
    fn at_consistency(&self, line: &Line, base: &Base) -> Result<(Cut, Stop), Halt> {
        let consistent = base.consistent();
        let immediate = Stop {
            lsn: consistent,
            last_commit: None,
        };
        if !base.backup.from_standby {
            return Ok((Cut::Immediate, immediate));
        }
        let (last, _) = self.records(base.span(line.timeline()), consistent)?;
        Ok(match last {
            None => (Cut::Immediate, immediate),
            Some(last) => (Cut::behind(last), Stop::behind(last)),
        })
    }

    pub(super) fn lsn(&self, line: &Line, bases: &[&Base], lsn: Lsn) -> Result<Plan, Halt> {
        let Some(base) = bases.iter().find(|base| base.consistent() <= lsn) else {
            return Err(say::too_early(self.catalog, line, bases, self.request).into());
        };
        if lsn > base.wal.end {
            return Err(self.beyond(line, base, None, |other| other.wal.end >= lsn).into());
        }
        let span = base.span(line.timeline());
        let (before, at_or_after) = self.records(span, lsn)?;
        let inclusive = !self.request.exclusive;
        let consistent = base.consistent();
        let (cut, stop) = match (at_or_after, before) {
            (Some(record), _) if inclusive => (Cut::At { lsn, inclusive }, Stop::behind(record)),
            (Some(record), _) => (Cut::At { lsn, inclusive }, Stop::before(record)),
            (None, Some(last)) if last.end > consistent => (Cut::behind(last), Stop::behind(last)),
            (None, _) => self.at_consistency(line, base)?,
        };
        self.finish(line, base, &cut, stop, Vec::new())
    }

    /// PostgreSQL's rule: replay stops before the first transaction end (commit or abort) whose time is later than the
    /// target, or, exclusively, not earlier. The LSN given to it is that of the last transaction end before that one.
    ///
    /// A backup that started after the target is no base even when no transaction ended during it: what ended before it
    /// began, and after the target, is in its files.
    pub(super) fn time(&self, line: &Line, bases: &[&Base], time: Time) -> Result<Plan, Halt> {
        for base in bases.iter().filter(|base| base.backup.started_at <= time) {
            let span = base.span(line.timeline());
            let (last_before, first_after) = self.commits(span, time)?;
            if first_after.is_some_and(|mark| mark.end <= base.consistent()) {
                continue;
            }
            if first_after.is_none() {
                let proven = self.proven(line, &span, last_before)?;
                if proven.is_none_or(|proven| proven < time) {
                    let reaches =
                        |other: &Base| other.backup.started_at <= time && other.wal.end > base.wal.end;
                    return Err(self.beyond(line, base, proven, reaches).into());
                }
            }
            let notes = say::time_resolved(time, last_before, first_after);
            let kept = last_before.filter(|mark| mark.end > base.consistent());
            let (cut, stop) = match kept {
                None => self.at_consistency(line, base)?,
                Some(mark) => (Cut::behind(mark), Stop::behind(mark)),
            };
            let stop = Stop {
                last_commit: last_before.and_then(|mark| mark.time),
                ..stop
            };
            return self.finish(line, base, &cut, stop, notes);
        }
        Err(say::too_early(self.catalog, line, bases, self.request).into())
    }

    /// The latest time up to which the span is known to be complete.
    fn proven(&self, line: &Line, span: &Span, last: Option<Mark>) -> Result<Option<Time>, Halt> {
        let sealed = match self.ask(Question::Proven { span: *span })? {
            Answer::Time(time) => *time,
            _ => None,
        };
        let pulse = line.pulse_time(self.catalog, &self.regions, span);
        Ok(sealed.max(pulse).max(last.and_then(|mark| mark.time)))
    }

    /// Looks for one record in the newest WAL first, so that what is found is what the operator most likely means.
    pub(super) fn search(
        &self,
        line: &Line,
        bases: &[&Base],
        question: impl Fn(Span) -> Question,
    ) -> Result<Plan, Halt> {
        let mut newer: Option<&Base> = None;
        for base in bases {
            let mut span = base.span(line.timeline());
            if let Some(newer) = newer.filter(|newer| newer.wal.end == base.wal.end) {
                span.end = newer.consistent();
            }
            newer = Some(base);
            let Answer::Mark(Some(mark)) = *self.ask(question(span))? else {
                continue;
            };
            if mark.end <= base.consistent() {
                continue;
            }
            let inclusive = !self.request.exclusive;
            let cut = Cut::At {
                lsn: mark.start,
                inclusive,
            };
            let ended = matches!(self.request.target, Target::Xid(_)) && inclusive;
            let stop = Stop {
                lsn: if inclusive { mark.end } else { mark.start },
                last_commit: mark.time.filter(|_| ended),
            };
            let notes = vec![say::found(&self.request.target, mark)];
            return self.finish(line, base, &cut, stop, notes);
        }
        let first = bases.iter().map(|base| base.wal.end).min();
        let missing = first.map(|end| line.breaks(self.catalog, &self.regions, end));
        let missing = missing.unwrap_or_default();
        Err(say::not_found(line, bases, missing, &self.request.target).into())
    }

    /// The target lies behind the WAL of the best base: in a break, or past the end, or on another timeline.
    fn beyond(
        &self,
        line: &Line,
        base: &Base,
        proven: Option<Time>,
        reaches: impl Fn(&Base) -> bool,
    ) -> Refusal {
        let end = base.wal.end;
        if let Some(missing) = line.break_at(self.catalog, &self.regions, end) {
            return say::hole(line, missing, end, &self.request.target);
        }
        let mut refusal = say::too_late(line, end, proven, &self.request.target);
        let others = self
            .catalog
            .timelines()
            .into_iter()
            .filter(|timeline| *timeline != line.timeline());
        let other = others.rev().find(|timeline| {
            let other = Line::build(self.catalog, *timeline, &self.regions);
            other.is_ok_and(|other| other.bases.iter().any(&reaches))
        });
        if let Some(other) = other {
            refusal.next = format!(
                "timeline {other} reaches it: add --timeline {other} if that is the history you want"
            );
        }
        refusal
    }
}
