//! The planner itself: one target, one line of descent, the best base.

use highwater_config::Exit;
use highwater_format::{Lsn, LsnRange, Time, TimelineId};

use crate::{
    catalog::{BrokenChain, Catalog},
    target::{Request, Target},
};

use super::{
    Amount, Answer, Answers, Mark, Plan, Question, Reason, Refusal, ResolvedTarget, Span, Stop,
    base::{Base, Line},
    say,
};

/// What the planner has come to.
#[derive(Debug, Clone)]
pub enum Step {
    /// The plan.
    Done(Box<Plan>),
    /// Answer this and plan again.
    Ask(Question),
}

/// Plans for `request`, or asks what it must know first.
///
/// # Errors
///
/// [`Refusal`] when the target cannot be reached from what can be read.
pub fn plan(catalog: &Catalog, request: &Request, answers: &Answers) -> Result<Step, Refusal> {
    let planner = Planner {
        catalog,
        request,
        answers,
        regions: catalog.readable(),
    };
    match planner.plan() {
        Ok(plan) => Ok(Step::Done(Box::new(plan))),
        Err(Halt::Ask(question)) => Ok(Step::Ask(question)),
        Err(Halt::Refuse(refusal)) => Err(planner.with_unreadable(*refusal)),
    }
}

/// Why planning does not go on now.
enum Halt {
    Ask(Question),
    Refuse(Box<Refusal>),
}

impl From<Refusal> for Halt {
    fn from(refusal: Refusal) -> Self {
        Self::Refuse(Box::new(refusal))
    }
}

/// How recovery is told to stop.
enum Cut {
    /// Not at all: replay what there is.
    End,
    /// As soon as the backup is consistent.
    Immediate,
    /// At the first record that begins at or after an LSN: after it, or before it.
    At { lsn: Lsn, inclusive: bool },
}

struct Planner<'a> {
    catalog: &'a Catalog,
    request: &'a Request,
    answers: &'a Answers,
    regions: Vec<usize>,
}

impl Planner<'_> {
    fn plan(&self) -> Result<Plan, Halt> {
        self.refuse_newer_format()?;
        let line = self.line()?;
        let bases = self.bases(&line)?;
        match &self.request.target {
            Target::Latest => self.latest(&line, &bases),
            Target::Immediate => self.immediate(&line, &bases),
            Target::Lsn(lsn) => self.lsn(&line, &bases, *lsn),
            Target::Time(time) => self.time(&line, &bases, *time),
            Target::Xid(xid) => self.search(&line, &bases, |span| Question::Xid { span, xid: *xid }),
            Target::Name(name) => self.search(&line, &bases, |span| Question::Name {
                span,
                name: name.clone(),
            }),
        }
    }

    fn refuse_newer_format(&self) -> Result<(), Halt> {
        let Some(finding) = self.catalog.findings.iter().find(|finding| finding.newer_format) else {
            return Ok(());
        };
        let mut refusal = Refusal::no(
            Reason::NewerFormat,
            format!("{}: {}", finding.key, finding.problem),
            "use the release of highwater-restore that belongs to the agent that wrote it",
        );
        refusal.exit = Exit::Damage;
        Err(refusal.into())
    }

    /// The line of descent that recovery follows.
    fn line(&self) -> Result<Line, Halt> {
        let known = self.catalog.timelines();
        let timeline = match self.request.timeline {
            Some(timeline) if !known.contains(&timeline) => {
                return Err(say::unknown_timeline(timeline, &known).into());
            }
            Some(timeline) => timeline,
            None => *known.last().ok_or_else(|| say::nothing_archived(self.catalog))?,
        };
        Line::build(self.catalog, timeline, &self.regions)
            .map_err(|broken| self.broken_history(timeline, &broken).into())
    }

    fn broken_history(&self, timeline: TimelineId, broken: &BrokenChain) -> Refusal {
        let mut refusal = Refusal::no(
            Reason::BrokenHistory { timeline },
            format!("the descent of timeline {timeline} is not known: {broken}"),
            "restore the history file, or choose another timeline with --timeline",
        );
        refusal.exit = Exit::Damage;
        refusal
    }

    /// The bases to choose from, the newest first.
    fn bases<'l>(&self, line: &'l Line) -> Result<Vec<&'l Base>, Halt> {
        let Some(wanted) = &self.request.backup else {
            if line.bases.is_empty() {
                return Err(say::no_backup(self.catalog, line).into());
            }
            return Ok(line.bases.iter().collect());
        };
        match line.bases.iter().find(|base| base.backup.id == *wanted) {
            Some(base) => Ok(vec![base]),
            None => Err(say::unknown_backup(self.catalog, line, wanted).into()),
        }
    }

    fn latest(&self, line: &Line, bases: &[&Base]) -> Result<Plan, Halt> {
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
        Ok(self.finish(line, base, &Cut::End, stop, notes))
    }

    /// Whether what lies behind the WAL of `base` was never acknowledged.
    fn ends_ragged(&self, line: &Line, base: &Base) -> bool {
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
            Some(reason) => say::hole(reason, end, &self.request.target),
            None => say::too_late(line, end, None, &self.request.target),
        }
    }

    fn immediate(&self, line: &Line, bases: &[&Base]) -> Result<Plan, Halt> {
        let base = bases.first().ok_or_else(|| say::no_backup(self.catalog, line))?;
        let stop = Stop {
            lsn: base.consistent(),
            last_commit: None,
        };
        Ok(self.finish(line, base, &Cut::Immediate, stop, Vec::new()))
    }

    fn lsn(&self, line: &Line, bases: &[&Base], lsn: Lsn) -> Result<Plan, Halt> {
        let Some(base) = bases.iter().find(|base| base.consistent() <= lsn) else {
            return Err(say::too_early(bases, &line.broken, &self.request.target).into());
        };
        if lsn > base.wal.end {
            return Err(self.beyond(line, base, None, |other| other.wal.end >= lsn).into());
        }
        let span = base.span(line.timeline());
        let (before, at_or_after) = self.records(span, lsn)?;
        let inclusive = !self.request.exclusive;
        let consistent = base.consistent();
        let (cut, stop) = match (at_or_after, before) {
            (Some(record), _) if inclusive => (Cut::At { lsn, inclusive }, record.end),
            (Some(record), _) => (Cut::At { lsn, inclusive }, record.start),
            (None, Some(last)) if last.end > consistent => (
                Cut::At {
                    lsn: last.start,
                    inclusive: true,
                },
                last.end,
            ),
            (None, _) => (Cut::Immediate, consistent),
        };
        Ok(self.finish(
            line,
            base,
            &cut,
            Stop {
                lsn: stop,
                last_commit: None,
            },
            Vec::new(),
        ))
    }

    /// PostgreSQL's rule: replay stops before the first transaction end (commit or abort) whose time is later than the
    /// target, or, exclusively, not earlier. The LSN given to it is that of the last transaction end before that one.
    ///
    /// A backup that started after the target is no base even when no transaction ended during it: what ended before it
    /// began, and after the target, is in its files.
    fn time(&self, line: &Line, bases: &[&Base], time: Time) -> Result<Plan, Halt> {
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
            let cut = kept.map_or(Cut::Immediate, |mark| Cut::At {
                lsn: mark.start,
                inclusive: true,
            });
            let stop = Stop {
                lsn: kept.map_or(base.consistent(), |mark| mark.end),
                last_commit: last_before.and_then(|mark| mark.time),
            };
            return Ok(self.finish(line, base, &cut, stop, notes));
        }
        Err(say::too_early(bases, &line.broken, &self.request.target).into())
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
    fn search(
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
            return Ok(self.finish(
                line,
                base,
                &cut,
                stop,
                vec![say::found(&self.request.target, mark)],
            ));
        }
        let end = bases.iter().map(|base| base.wal.end).max().unwrap_or(Lsn::ZERO);
        let broken = line.break_at(self.catalog, &self.regions, end);
        Err(say::not_found(line, bases, broken.as_ref(), &self.request.target).into())
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
        if let Some(reason) = line.break_at(self.catalog, &self.regions, end) {
            return say::hole(reason, end, &self.request.target);
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

    fn records(&self, span: Span, lsn: Lsn) -> Result<(Option<Mark>, Option<Mark>), Halt> {
        match self.ask(Question::Records { span, lsn })? {
            Answer::Records { before, at_or_after } => Ok((*before, *at_or_after)),
            _ => Ok((None, None)),
        }
    }

    fn commits(&self, span: Span, time: Time) -> Result<(Option<Mark>, Option<Mark>), Halt> {
        match self.ask(Question::Commits {
            span,
            time,
            or_at: self.request.exclusive,
        })? {
            Answer::Commits {
                last_before,
                first_after,
            } => Ok((*last_before, *first_after)),
            _ => Ok((None, None)),
        }
    }

    fn ask(&self, question: Question) -> Result<&Answer, Halt> {
        self.answers.get(&question).ok_or(Halt::Ask(question))
    }

    fn finish(&self, line: &Line, base: &Base, cut: &Cut, stop: Stop, mut notes: Vec<String>) -> Plan {
        match self.own_line(line, base, cut, stop.lsn) {
            Some((own, own_base)) => {
                notes.push(say::on_ancestor(line, &own));
                self.assemble(&own, &own_base, cut, stop, notes)
            }
            None => self.assemble(line, base, cut, stop, notes),
        }
    }

    /// The line of the timeline on which the target itself lies, where that is an ancestor. Recovery towards the
    /// descendant would reach the same state, but PostgreSQL would then note the new timeline as a child of the
    /// descendant, branching off before that one began.
    fn own_line(&self, line: &Line, base: &Base, cut: &Cut, stop: Lsn) -> Option<(Line, Base)> {
        let history = &line.chain.history;
        let timeline = match cut {
            Cut::End => return None,
            Cut::At { inclusive: false, .. } => history.timeline_at(stop),
            Cut::Immediate | Cut::At { .. } => history.timeline_at(stop.saturating_sub(1)),
        };
        let switch = history.switch_of(timeline)?;
        let own = Line::build(self.catalog, timeline, &self.regions).ok()?;
        let own_base = own
            .bases
            .iter()
            .find(|own| own.backup.id == base.backup.id)?
            .clone();
        let whole = own_base.wal.end >= switch.min(base.wal.end);
        whole.then_some((own, own_base))
    }

    fn assemble(&self, line: &Line, base: &Base, cut: &Cut, stop: Stop, mut notes: Vec<String>) -> Plan {
        let size = line.chain.segment_size;
        let needed = match cut {
            Cut::End => base.wal.end,
            Cut::Immediate | Cut::At { .. } => base.wal.end.min(size.segment_end(stop.lsn.saturating_sub(1))),
        };
        let wal = LsnRange::new(base.wal.start, needed);
        notes.extend(say::circumstances(self.catalog, line, &base.backup));
        let backup_regions: Vec<usize> = self.catalog.backup_regions(&base.backup.id);
        Plan {
            system_id: self.catalog.identity.system_id,
            backup_regions: self
                .regions
                .iter()
                .copied()
                .filter(|index| backup_regions.contains(index))
                .collect(),
            regions: self.regions.clone(),
            timeline: line.timeline(),
            amount: amount(line, base, wal),
            chain: line.chain.clone(),
            wal,
            wal_end: base.wal.end,
            ragged: match cut {
                Cut::End => self.ends_ragged(line, base),
                // PostgreSQL reads ahead of its target, past a break that lies close behind it. It may be told that
                // nothing follows: with a target it does not open the cluster at an end that comes too early.
                Cut::Immediate | Cut::At { .. } => {
                    line.break_at(self.catalog, &self.regions, base.wal.end).is_some()
                }
            },
            target: self.resolve(line.timeline(), cut, stop),
            backup: base.backup.clone(),
            notes,
        }
    }

    fn resolve(&self, timeline: TimelineId, cut: &Cut, stop: Stop) -> ResolvedTarget {
        let mut settings = match cut {
            Cut::End => Vec::new(),
            Cut::Immediate => vec![("recovery_target", "immediate".to_owned())],
            Cut::At { lsn, inclusive } => vec![
                ("recovery_target_lsn", lsn.to_string()),
                ("recovery_target_inclusive", inclusive.to_string()),
            ],
        };
        settings.push(("recovery_target_timeline", timeline.to_string()));
        if !matches!(cut, Cut::End) {
            settings.push(("recovery_target_action", self.request.action.as_str().to_owned()));
        }
        ResolvedTarget {
            asked: self.request.target.clone(),
            exclusive: self.request.exclusive,
            settings,
            action: self.request.action,
            stop,
        }
    }

    /// A "no" that a silent region could turn into a "yes" is not a "no".
    fn with_unreadable(&self, mut refusal: Refusal) -> Refusal {
        let settled = matches!(refusal.reason, Reason::NewerFormat | Reason::RegionUnreadable);
        let Some((region, error)) = self.catalog.unreadable().next().filter(|_| !settled) else {
            return refusal;
        };
        refusal.exit = Exit::Trouble;
        refusal.message = format!(
            "{}. This is what the readable regions hold; region {} cannot be read and may hold more: {error}",
            refusal.message, region.name
        );
        refusal.next = format!(
            "try again when region {} answers, or {}",
            region.name, refusal.next
        );
        refusal
    }
}

fn amount(line: &Line, base: &Base, wal: LsnRange) -> Amount {
    let mut objects: Vec<_> = line.chain.cover(wal).unwrap_or_default();
    objects.dedup_by_key(|source| (source.timeline, source.piece.range, source.piece.kind));
    let size = line.chain.segment_size.bytes();
    Amount {
        backup_bytes: base.backup.stored_bytes,
        backup_plain_bytes: base.backup.plain_bytes,
        packs: u64::from(base.backup.packs),
        wal_bytes: objects.iter().map(|source| source.piece.size).sum(),
        wal_objects: objects.len() as u64,
        wal_segments: wal.len().div_ceil(size),
    }
}
