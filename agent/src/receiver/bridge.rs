//! Going on past WAL that the server no longer has.
//!
//! Owns: the order in which a gap comes to be. The server has said that the segment at the archive's end is removed;
//! then the place where it can be read again is found and proven by a stream, the gap is recorded, and only when as
//! many regions hold the record as the policy asks for does the next session begin behind it. Does not own: what range
//! a gap has ([`crate::gap`]), nor the base backup that ends it ([`crate::schedule`]).
//!
//! Every step can be repeated: a crash before the record leaves nothing, a crash after it leaves an archive that ends
//! behind the gap, and where only one region has the record the others get it from there.

use std::time::Duration;

use futures::future::join_all;
use highwater_format::{Gap, Lsn};
use highwater_pgwire::{Connection, Started, StreamMessage};
use tokio::time::{Instant, timeout};

use super::{Receiver, opening};
use crate::error::{AgentError, Result};
use crate::frontier::Position;
use crate::gap::{self, Ends, Search, Span};
use crate::inventory::{held, held_next, onward, timelines};
use crate::region::Region;
use crate::resume::{Resume, ServerView};
use crate::sealer::Work;
use crate::server;
use crate::state;
use crate::uploader::Shared;

/// How long the first WAL of a stream that proves a gap's end may take.
const FIRST_WAL: Duration = Duration::from_secs(20);

/// For so long a region that was not read yet is waited for: it may hold what the server no longer has. Not for ever,
/// because nothing that is committed now is archived meanwhile.
const UNREAD_REGION: Duration = Duration::from_secs(30);

/// For so long a region may take over the question what it holds behind the archive's end.
const ASKED: Duration = Duration::from_secs(10);

/// Between two attempts to give the slot up.
const PAUSE: Duration = Duration::from_secs(1);

impl Receiver {
    /// Records what is missing behind the archive's end. The next session begins after it.
    pub(super) async fn bridge(&mut self, resume: &Resume) -> Result<()> {
        let frontier = Position {
            timeline: resume.timeline,
            lsn: resume.sealed,
        };
        self.is_the_archives_end(frontier)?;
        self.is_nowhere(frontier).await?;
        let context = &self.context;
        let mut connection = server::connect(&context.conninfo).await?;
        let view = self.look_at(&mut connection).await?;
        let opening = match resume.after {
            Some(after) => Some(opening(&mut connection, resume, after).await?),
            None => None,
        };
        connection.close().await;
        self.is_the_primarys_word(frontier).await?;
        let span = self.proven(frontier, &view).await?;
        self.is_nowhere(frontier).await?;
        // What follows the gap is of a timeline that has only begun, and nothing of that could be compared.
        if let Some(opening) = opening {
            self.send(opening).await?;
        }
        let gap = Gap {
            timeline: span.timeline,
            start: span.range.start,
            end: span.range.end,
            reason: self.reason(&view),
            recorded_at: self.context.clock.now(),
            unreplayable: false,
        };
        self.record(gap).await
    }

    /// The gap begins where the archive ends, not where the part of it ends that has been read so far.
    fn is_the_archives_end(&mut self, frontier: Position) -> Result<()> {
        let progress = &self.context.shared.progress;
        let waiting = progress.furthest_waiting().is_some_and(|at| at > frontier);
        let since = *self.removed_since.get_or_insert_with(Instant::now);
        let unread = progress.has_unread() && since.elapsed() < UNREAD_REGION;
        if progress.durable().is_none() || waiting || unread {
            progress.server_lost(Some(frontier));
            return Err(AgentError::Trouble {
                what: format!(
                    "the server no longer has the WAL from {frontier} on, and a region that does not count yet may"
                ),
                next: if unread {
                    format!(
                        "The agent goes on when every region has answered, at the latest after {} s as the policy says",
                        UNREAD_REGION.as_secs()
                    )
                } else {
                    "The agent goes on when as many regions as the policy asks for answer".into()
                },
            });
        }
        if let Some(further) = progress.furthest().filter(|at| *at > frontier) {
            self.sealed = Some(further);
            self.context.unended.ask_again();
            self.context.shared.window.leap(further);
            self.removed_since = None;
            return Err(AgentError::Trouble {
                what: format!(
                    "the server no longer has the WAL from {frontier} on, but a region holds it up to {further}"
                ),
                next: "The stream goes on from there".into(),
            });
        }
        Ok(())
    }

    /// What this process knows of a region is what it has read and stored itself. Where every node has an agent, another one
    /// may have archived since what this server never had: that is no gap.
    async fn is_nowhere(&mut self, frontier: Position) -> Result<()> {
        let shared = &self.context.shared;
        let Some((region, end)) = held_behind(shared, frontier).await else {
            return Ok(());
        };
        shared.progress.server_lost(Some(frontier));
        // Once for what is known now: a region that has been filled since may be continued by what was stored behind that.
        let known = shared.archive.regions.iter();
        let known: Vec<_> = known
            .map(|region| shared.progress.position(region.index))
            .collect();
        if self.read_again != known {
            self.read_again = known;
            shared.progress.read_again();
        }
        Err(AgentError::Trouble {
            what: format!(
                "the server does not have the WAL from {frontier} on, but region {region} holds it up to {end}: another agent has \
                 stored it"
            ),
            next: "The regions are read again, and the stream goes on where they end".into(),
        })
    }

    /// A standby lacks what came before its base backup, or before it had a slot, and says nothing of its primary by that:
    /// the slot there may keep it for the agent beside it, which would step over the record and never store that WAL.
    async fn is_the_primarys_word(&self, frontier: Position) -> Result<()> {
        if !self.standby {
            return Ok(());
        }
        let shared = &self.context.shared;
        if frontier == shared.origin && begins_behind(shared, frontier).await {
            return Err(AgentError::Restart {
                what: format!(
                    "another agent has begun the archive behind {frontier}, where this one would have"
                ),
                next: "The agent ends, and is to be started again: then it goes on where the archive does"
                    .into(),
            });
        }
        Err(AgentError::Trouble {
            what: format!("this standby no longer has the WAL from {frontier} on, but its primary may"),
            next: "No gap is recorded. The stream goes on when the agent beside the primary has stored it, or recorded that it is \
                   lost: see that one runs; or when this server is promoted"
                .into(),
        })
    }

    /// The smallest gap behind which the server really can be read.
    async fn proven(&self, frontier: Position, view: &ServerView) -> Result<Span> {
        let size = self.context.shared.segment_size;
        for span in gap::spans(frontier, view, size) {
            if span.ends == Ends::Switch || self.streams_from(&span, view).await? {
                return self.narrowed(Search::new(span, size), view).await;
            }
        }
        Err(AgentError::Trouble {
            what: format!("the server no longer has the WAL from {frontier} on, and none behind it can be streamed yet"),
            next: "Nothing is recorded or skipped before that is possible; look into the server's log and its pg_wal directory"
                .into(),
        })
    }

    /// The part of it that the server says it lacks.
    async fn narrowed(&self, mut search: Search, view: &ServerView) -> Result<Span> {
        while let Some(smaller) = search.next() {
            let can_be_read = self.streams_from(&smaller, view).await?;
            search.tried(smaller, can_be_read);
        }
        Ok(search.found())
    }

    /// Whether WAL arrives when asked for from the gap's end on. Asked without the slot, so that its position stays.
    pub(super) async fn streams_from(&self, span: &Span, view: &ServerView) -> Result<bool> {
        let connection: Connection = server::connect(&self.context.conninfo).await?;
        let started = connection
            .start_replication(None, span.range.end, span.timeline)
            .await;
        let (mut reader, _writer) = match started {
            Ok(Started::Streaming(reader, writer)) => (reader, writer),
            Ok(Started::AtEnd(..)) => return Ok(true),
            Err(error) if error.is_segment_removed() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        if view.timeline == span.timeline && view.end <= span.range.end {
            // Nothing has been written behind it yet: what comes will be sent.
            return Ok(true);
        }
        let first = async {
            loop {
                match reader.next().await {
                    Ok(StreamMessage::Keepalive { .. }) => {}
                    Ok(StreamMessage::Data { .. } | StreamMessage::Ended(_)) => return Ok(true),
                    Err(error) if error.is_segment_removed() => return Ok(false),
                    Err(error) => return Err(error.into()),
                }
            }
        };
        timeout(FIRST_WAL, first).await.unwrap_or_else(|_| {
            Err(AgentError::Trouble {
                what: format!(
                    "the server has sent nothing from {} on for {} s",
                    span.range.end,
                    FIRST_WAL.as_secs()
                ),
                next: "It is asked again".into(),
            })
        })
    }

    /// Why, for the operator who reads the record.
    fn reason(&self, view: &ServerView) -> String {
        let cause = match (&self.cause, view.slot) {
            (Some(cause), _) => cause.clone(),
            (None, Some(slot)) => format!("slot \"{}\" keeps WAL from {slot} on", self.context.slot),
            (None, None) => format!("slot \"{}\" keeps no WAL", self.context.slot),
        };
        format!("the server had already removed this WAL: {cause}")
    }

    /// Has the gap stored like WAL, in order, and waits until the policy is satisfied.
    async fn record(&mut self, gap: Gap) -> Result<()> {
        let (range, timeline) = (gap.range(), gap.timeline);
        tracing::error!(
            %timeline, %range, bytes = range.len(), reason = gap.reason,
            "WAL IS MISSING: the server no longer has it and the archive never got it. The gap is recorded, streaming goes \
             on behind it, and a new base backup is taken at once; moments inside the gap cannot be restored"
        );
        self.context.shared.state.update(|snapshot| {
            snapshot.connection = state::Connection::Reconnecting(format!(
                "recording that the WAL {range} of timeline {timeline} is lost; streaming goes on when the regions hold the record"
            ));
        });
        self.send(Work::Gap(gap.clone())).await?;
        let behind = Position {
            timeline,
            lsn: range.end,
        };
        self.until_durable(behind).await?;
        self.sealed = Some(behind);
        self.removed = false;
        self.removed_since = None;
        self.cause = None;
        self.context.unended.record(gap);
        Err(AgentError::Trouble {
            what: format!("the gap {range} of timeline {timeline} is recorded"),
            next: "The stream goes on behind it".into(),
        })
    }

    /// Waits until as many regions hold everything before `behind` as the policy asks for. Storage may be away for
    /// long, and the slot holds WAL meanwhile: the outage policy goes on.
    async fn until_durable(&mut self, behind: Position) -> Result<()> {
        let mut durable = self.context.shared.progress.subscribe();
        let give_up = self.context.give_up.clone();
        loop {
            let stored = async {
                let reached = durable.wait_for(|at| at.is_some_and(|at| at.position() >= behind));
                reached.await.map(drop)
            };
            tokio::select! {
                biased;
                stored = stored => return stored.map_err(|_| AgentError::Cancelled),
                () = give_up.when_asked() => {
                    if let Err(error) = self.give_up_if_asked().await {
                        tracing::warn!(%error, "the slot cannot be given up yet, trying again");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
    }
}

/// A region that holds what comes next, or has it on record as lost, and how far; those that do not answer are not waited for.
async fn held_behind(shared: &Shared, frontier: Position) -> Option<(String, Lsn)> {
    let (layout, size) = (&shared.archive.layout, shared.segment_size);
    let asked = shared.archive.regions.iter().map(|region| async move {
        let held = held(&*region.quick, layout, size, frontier.timeline, onward(frontier.lsn));
        match timeout(ASKED, held).await {
            Ok(Ok(held)) => Some((region.name.clone(), held.contiguous_end(frontier.lsn))),
            Ok(Err(error)) => {
                tracing::warn!(region = region.name, %error, "it cannot be asked what it holds behind the archive's end");
                None
            }
            Err(_) => None,
        }
    });
    let told = join_all(asked).await.into_iter().flatten();
    told.filter(|(_, end)| *end > frontier.lsn)
        .max_by_key(|(_, end)| *end)
}

/// Whether the archive, which was empty when this agent started, begins behind `frontier` now.
async fn begins_behind(shared: &Shared, frontier: Position) -> bool {
    let asked = shared.archive.regions.iter().map(|region| async move {
        match timeout(ASKED, first(shared, region)).await {
            Ok(Ok(first)) => first,
            Ok(Err(error)) => {
                tracing::warn!(region = region.name, %error, "it cannot be asked where it begins");
                None
            }
            Err(_) => None,
        }
    });
    let begins = join_all(asked).await.into_iter().flatten().min();
    begins.is_some_and(|begins| begins > frontier)
}

/// Where the WAL of a region begins.
async fn first(shared: &Shared, region: &Region) -> Result<Option<Position>> {
    let (store, layout, size) = (&*region.quick, &shared.archive.layout, shared.segment_size);
    let mut timelines = timelines(store, layout).await?;
    timelines.sort_unstable();
    for timeline in timelines {
        let (held, _) = held_next(store, layout, size, timeline, Lsn::ZERO, 1).await?;
        if let Some(run) = held.runs().first() {
            let lsn = run.start;
            return Ok(Some(Position { timeline, lsn }));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use highwater_config::Policy;
    use highwater_format::TimelineId;
    use highwater_format::coverage::PieceKind;

    use super::*;
    use crate::test_world::{MIB, piece, world};

    #[tokio::test]
    async fn what_another_agent_has_stored_behind_the_end_is_found_in_the_regions() {
        let world = world(Policy::Any);
        let frontier = Position {
            timeline: TimelineId::FIRST,
            lsn: Lsn(MIB + 500),
        };
        let found = async || held_behind(&world.shared, frontier).await;
        world.put_wal(0, piece(PieceKind::Tail, MIB, MIB + 500)).await;
        world
            .put_wal(1, piece(PieceKind::Tail, MIB + 600, MIB + 900))
            .await;
        assert_eq!(found().await, None, "behind a hole it does not count");
        world
            .put_wal(1, piece(PieceKind::Tail, MIB + 300, MIB + 600))
            .await;
        assert_eq!(found().await, Some(("b".to_owned(), Lsn(MIB + 900))));
        world.silence(1);
        assert_eq!(found().await, None);
    }

    #[tokio::test]
    async fn an_archive_that_another_agent_began_elsewhere_is_told_from_one_that_goes_on() {
        let world = world(Policy::All);
        let at = |lsn| Position {
            timeline: TimelineId::FIRST,
            lsn: Lsn(lsn),
        };
        assert!(!begins_behind(&world.shared, at(MIB)).await, "it is empty still");
        world
            .put_wal(1, piece(PieceKind::Tail, 2 * MIB, 2 * MIB + 500))
            .await;
        assert!(begins_behind(&world.shared, at(MIB)).await);
        assert!(!begins_behind(&world.shared, at(2 * MIB)).await);
        assert!(
            !begins_behind(&world.shared, at(2 * MIB + 500)).await,
            "there it ends"
        );
        world.put_wal(0, piece(PieceKind::Tail, MIB, MIB + 500)).await;
        assert!(
            !begins_behind(&world.shared, at(MIB)).await,
            "one region knows better"
        );
    }
}
