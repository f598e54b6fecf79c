//! The planner: one target, one line of descent, the bases to choose from.
//!
//! Owns: what is settled before the target is looked at (may this program read the archive, which timeline, which
//! backups), asking what only the WAL can tell, and that a "no" is none while a region is silent. Does not own: what
//! each kind of target needs (`targets`), nor the plan that comes of it (`assemble`).

use highwater_config::Exit;
use highwater_format::{Lsn, Time, TimelineId};

use crate::{
    catalog::{BrokenChain, Catalog},
    target::{Action, Request, Target},
};

use super::{
    Answer, Answers, Mark, Plan, Question, Reason, Refusal, Span,
    base::{Base, Line},
    say,
    timeline::{self, PassedOver},
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
pub(super) enum Halt {
    Ask(Question),
    Refuse(Box<Refusal>),
}

impl From<Refusal> for Halt {
    fn from(refusal: Refusal) -> Self {
        Self::Refuse(Box::new(refusal))
    }
}

/// The question, and what is known so far.
pub(super) struct Planner<'a> {
    pub(super) catalog: &'a Catalog,
    pub(super) request: &'a Request,
    pub(super) answers: &'a Answers,
    pub(super) regions: Vec<usize>,
}

impl Planner<'_> {
    fn plan(&self) -> Result<Plan, Halt> {
        self.refuse_newer_format()?;
        let (timeline, passed_over) = self.timeline()?;
        let line = self.line(timeline)?;
        let bases = self.bases(&line)?;
        let mut plan = self.to_target(&line, &bases)?;
        self.refuse_unnamed_successor(plan.timeline)?;
        plan.notes.extend(passed_over.iter().map(say::passed_over));
        Ok(plan)
    }

    fn to_target(&self, line: &Line, bases: &[&Base]) -> Result<Plan, Halt> {
        match &self.request.target {
            Target::Latest => self.latest(line, bases),
            Target::Immediate => self.immediate(line, bases),
            Target::Lsn(lsn) => self.lsn(line, bases, *lsn),
            Target::Time(time) => self.time(line, bases, *time),
            Target::Xid(xid) => self.search(line, bases, |span| Question::Xid { span, xid: *xid }),
            Target::Name(name) => self.search(line, bases, |span| Question::Name {
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

    /// The timeline asked for; otherwise the latest, with those that were passed over for it.
    fn timeline(&self) -> Result<(TimelineId, Vec<PassedOver>), Halt> {
        let Some(timeline) = self.request.timeline else {
            let latest = timeline::latest(self.catalog, &self.regions);
            return latest.ok_or_else(|| say::nothing_archived(self.catalog).into());
        };
        let known = self.catalog.timelines();
        if !known.contains(&timeline) {
            return Err(say::unknown_timeline(timeline, &known).into());
        }
        Ok((timeline, Vec::new()))
    }

    /// The line of descent that recovery follows.
    fn line(&self, timeline: TimelineId) -> Result<Line, Halt> {
        let line = Line::build(self.catalog, timeline, &self.regions)
            .map_err(|broken| self.broken_history(timeline, &broken))?;
        let ancestors = line.chain.history.entries.iter().map(|entry| entry.timeline);
        for timeline in ancestors.chain([timeline]) {
            let copies = self.catalog.differing_histories(timeline);
            if !copies.is_empty() {
                return Err(say::differing_histories(self.catalog, timeline, &copies).into());
            }
        }
        Ok(line)
    }

    /// PostgreSQL promotes to the first free number behind the target's timeline, and asks for one history file after
    /// the other to find it (`findNewestTimeLine`). A timeline that is there but has lost its history is no free number,
    /// and its file cannot be had: the server would end when all is replayed, however often it is started.
    fn refuse_unnamed_successor(&self, timeline: TimelineId) -> Result<(), Halt> {
        if self.request.action != Action::Promote {
            return Ok(());
        }
        let known = self.catalog.timelines();
        let next = |timeline: &TimelineId| TimelineId::new(timeline.get().checked_add(1)?);
        let taken = std::iter::successors(next(&timeline), next).take_while(|number| known.contains(number));
        for successor in taken {
            if self.catalog.history(successor).is_none() {
                return Err(say::unnamed_successor(self.catalog, timeline, successor).into());
            }
        }
        Ok(())
    }

    /// A server that is promoted on its way to a descendant notes its new timeline as a child of that one, and at a place
    /// before that one began: switch points that go back, which nothing here reads. So it must go to the ancestor itself, and
    /// PostgreSQL goes to none without its history file.
    pub(super) fn refuse_unnamed_ancestor(&self, line: &Line, ancestor: TimelineId) -> Result<(), Halt> {
        if self.request.action != Action::Promote || self.catalog.history(ancestor).is_some() {
            return Ok(());
        }
        Err(say::unnamed_ancestor(self.catalog, line, ancestor).into())
    }

    fn broken_history(&self, timeline: TimelineId, broken: &BrokenChain) -> Refusal {
        let reason = match broken {
            BrokenChain::HistoryMissing { .. } => Reason::BrokenHistory { timeline },
            BrokenChain::Contradiction { .. } => Reason::DifferingHistories { timeline },
        };
        let mut refusal = Refusal::no(
            reason,
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

    pub(super) fn records(&self, span: Span, lsn: Lsn) -> Result<(Option<Mark>, Option<Mark>), Halt> {
        match self.ask(Question::Records { span, lsn })? {
            Answer::Records { before, at_or_after } => Ok((*before, *at_or_after)),
            _ => Ok((None, None)),
        }
    }

    pub(super) fn commits(&self, span: Span, time: Time) -> Result<(Option<Mark>, Option<Mark>), Halt> {
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

    pub(super) fn ask(&self, question: Question) -> Result<&Answer, Halt> {
        self.answers.get(&question).ok_or(Halt::Ask(question))
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
