//! What the healer tells: to the log, and to the snapshot that status and metrics read.

use highwater_format::{LsnRange, TimelineId};

use super::Healer;
use super::copy::Copied;
use super::lack::{self, Held, Lack};
use crate::state::Lacks;

/// Ranges and base backups that a text names.
const SHOWN: usize = 3;

impl Healer {
    /// Remembers and shows what a comparison found.
    pub(super) fn note(&mut self, ours: &Held, theirs: &[Held], lack: &Lack, partial: bool) {
        self.remember_passed();
        let floor = lack::oldest_start(std::iter::once(ours).chain(theirs));
        let gone = lack::lost(&self.before, ours, floor);
        let gone_backups: Vec<_> = lack
            .backups
            .iter()
            .filter(|id| self.backups_before.contains(*id))
            .collect();
        let lost = !gone.is_empty() || !gone_backups.is_empty();
        let words = lost.then(|| format!("{} {}", ranges(&gone), names(gone_backups.iter())));
        if lost && words != self.said {
            tracing::error!(
                region = self.region.name,
                wal = ranges(&gone),
                backups = names(gone_backups.iter()),
                "objects are gone that the region had: something outside the agent removed them"
            );
        }
        self.said = words;
        self.beyond_help = beyond_help(&gone, theirs, partial);
        self.remember(ours);
        let lacks = if lack.is_empty() {
            self.beyond_help.clone()
        } else {
            Lacks {
                wal_bytes: lack.wal_bytes() + self.beyond_help.wal_bytes,
                objects: lack.steps.len() as u64,
                backups: lack.backups.len() as u64,
                lost,
                damaged_bytes: self.damaged_bytes(),
                detail: self.with_damage(describe(lack, lost)),
            }
        };
        let now = self.clock.now();
        self.shared.state.update_region(self.region.index, |view| {
            view.lacks = lacks;
            view.compared_at = Some(now);
        });
    }

    /// What the region went on behind although nobody lists it was there once, though no comparison may have seen it.
    fn remember_passed(&mut self) {
        let snapshot = self.shared.state.snapshot();
        let view = snapshot.regions.get(self.region.index);
        for (timeline, range) in view.iter().flat_map(|view| &view.passed) {
            self.remember_runs(*timeline, &[*range]);
        }
    }

    fn remember_runs(&mut self, timeline: TimelineId, runs: &[LsnRange]) {
        let known = self.before.entry(timeline).or_default();
        *known = lack::covering(known.iter().chain(runs).copied()).runs();
    }

    fn remember(&mut self, ours: &Held) {
        for (timeline, wal) in &ours.wal {
            self.remember_runs(*timeline, &wal.runs);
        }
        let visible = ours.backups.iter().filter(|(_, base)| base.visible);
        self.backups_before.extend(visible.map(|(id, _)| id.clone()));
    }

    /// Shows what the repair could not do.
    pub(super) fn note_damage(&self) {
        if self.damaged.is_empty() {
            return;
        }
        let (bytes, detail) = (self.damaged_bytes(), self.with_damage(None));
        tracing::error!(
            region = self.region.name,
            bytes,
            "cannot be filled: the region {}",
            detail.as_deref().unwrap_or_default()
        );
        self.shared.state.update_region(self.region.index, |view| {
            view.lacks.damaged_bytes = bytes;
            view.lacks.detail = detail;
        });
    }

    fn damaged_bytes(&self) -> u64 {
        self.damaged.iter().map(|damage| damage.range.len()).sum()
    }

    /// What is damaged everywhere comes first: somebody has to act.
    fn with_damage(&self, words: Option<String>) -> Option<String> {
        let Some(first) = self.damaged.first() else {
            return words;
        };
        let mut text = first.as_lack();
        if self.damaged.len() > 1 {
            text.push_str(&format!("; and {} ranges more", self.damaged.len() - 1));
        }
        if let Some(words) = words {
            text.push_str(&format!("; {words}"));
        }
        Some(text)
    }

    /// One step of the repair was done.
    pub(super) fn step_done(&self) {
        self.shared.state.update_region(self.region.index, |view| {
            view.lacks.objects = view.lacks.objects.saturating_sub(1)
        });
    }

    /// Everything that another region has is here now.
    pub(super) fn filled(&self) {
        let lacks = self.beyond_help.clone();
        self.shared
            .state
            .update_region(self.region.index, |view| view.lacks = lacks);
    }

    /// Counts what was copied.
    pub(super) fn count(&self, copied: Copied) {
        if copied.objects > 0 {
            self.shared.state.update_region(self.region.index, |view| {
                view.healed_objects += copied.objects;
                view.healed_bytes += copied.bytes;
            });
        }
    }
}

/// What is gone here and in no other region that answers.
fn beyond_help(gone: &[(TimelineId, LsnRange)], theirs: &[Held], partial: bool) -> Lacks {
    let mut nowhere = Vec::new();
    for (timeline, range) in gone {
        let wal = theirs.iter().filter_map(|held| held.wal.get(timeline));
        let covered = lack::covering(wal.flat_map(|wal| wal.runs.iter().copied()));
        nowhere.extend(covered.holes(*range).into_iter().map(|hole| (*timeline, hole)));
    }
    if nowhere.is_empty() {
        return Lacks::default();
    }
    Lacks {
        wal_bytes: nowhere.iter().map(|(_, range)| range.len()).sum(),
        lost: true,
        detail: Some(match partial {
            true => format!("has lost WAL {}; not all other regions answer", ranges(&nowhere)),
            false => format!(
                "has lost WAL {}, which no other region holds: take a base backup",
                ranges(&nowhere)
            ),
        }),
        ..Lacks::default()
    }
}

fn describe(lack: &Lack, lost: bool) -> Option<String> {
    if lack.is_empty() {
        return None;
    }
    let verb = if lost { "has lost" } else { "lacks" };
    let mut parts = Vec::new();
    if !lack.wal.is_empty() {
        parts.push(format!("WAL {}", ranges(&lack.wal)));
    }
    if !lack.backups.is_empty() {
        parts.push(format!("base backup {}", names(lack.backups.iter())));
    }
    if parts.is_empty() {
        parts.push("gap records".into());
    }
    Some(format!(
        "{verb} {}; it is filled from the other regions",
        parts.join(" and ")
    ))
}

fn ranges(all: &[(TimelineId, LsnRange)]) -> String {
    let shown = all
        .iter()
        .map(|(timeline, range)| format!("{range} of timeline {timeline}"));
    list(shown, all.len())
}

fn names<T: std::fmt::Display>(all: impl ExactSizeIterator<Item = T>) -> String {
    let count = all.len();
    list(all.map(|id| id.to_string()), count)
}

fn list(items: impl Iterator<Item = String>, count: usize) -> String {
    let mut text = items.take(SHOWN).collect::<Vec<_>>().join(", ");
    if count > SHOWN {
        text.push_str(&format!(" and {} more", count - SHOWN));
    }
    text
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
