//! Before anything is stored: the right to write a timeline.
//!
//! Owns: comparing histories, the decision whether to claim, and placing the claim. Does not own the rules
//! ([`super::judge`]) nor waiting for another writer's silence ([`super::silence`]).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use highwater_format::{History, TimelineId, Writer};

use super::claim::{create, descent, name};
use super::judge::{Asking, Entry, Line, Standing, entry, standing};
use super::{Claims, Held, Told, newest};
use crate::error::{AgentError, Kind, Result};
use crate::lease::{Moment, asked_awake};
use crate::region::{Region, get_optional};

/// Lost races for an epoch in a row before the attempt is given up; another connection tries again.
const ROUNDS: u32 = 16;

/// Whose silence was made sure of.
struct Silent {
    holder: Writer,
    /// Some agent goes on, whose looks at its claim are good for a while yet.
    lives: bool,
}

/// Whether a timeline may be claimed.
#[derive(Debug, PartialEq)]
enum Way {
    /// Nobody is in the way.
    Free,
    /// Somebody was, and is silent: meanwhile another may have claimed, so that the claims have to be read again.
    Again,
    /// Somebody may be, and his place is taken all the same.
    Over(Writer),
}

impl Claims {
    /// Asks to write what a server on `line` sends: before the first byte of every connection and timeline.
    pub async fn enter(&self, line: Line, standby: bool) -> Result<()> {
        if standby {
            self.hold(None);
            self.listens_no_more();
            if self.take_over.swap(false, Ordering::Relaxed) {
                tracing::warn!("--take-over counts for nothing beside a standby, nor when it is promoted");
            }
            self.follow(line).await?;
            self.begins_anew_if_displaced()?;
            self.regions.iter().for_each(|region| region.lease.free());
        } else {
            self.drop_a_claim_beside_the_living();
            let own = self.held.borrow().claim.clone();
            match own.filter(|own| line.is_of(own)) {
                None => self.claim(line).await?,
                Some(own) => self.still_holds(own).await?,
            }
        }
        self.state.update(|snapshot| snapshot.standby = standby);
        Ok(())
    }

    /// Somebody who lives has fenced this agent, and his claim alone does not: he is asked for like anybody's, or we would go on with
    /// our own.
    fn drop_a_claim_beside_the_living(&self) {
        let held = self.held.borrow().clone();
        if let (Some(own), Some(holder)) = (held.claim, held.fenced)
            && !matches!(standing(&own, &holder), Standing::Fenced(_))
        {
            self.hold(None);
        }
    }

    /// Makes sure that the archive does not know the server's timeline with another history. Positions mean nothing
    /// before that: the same number stands for two different timelines then.
    pub async fn compare(&self, history: &History) -> Result<()> {
        let timeline = history.timeline;
        let claimed = |held: &Held| {
            held.claim
                .as_ref()
                .is_some_and(|own| Line::of(history).is_of(own))
        };
        if timeline == TimelineId::FIRST || claimed(&self.held.borrow()) {
            return Ok(());
        }
        let key = self.layout.history(timeline);
        let read = self.ask_all(|region| {
            let key = key.clone();
            async move { get_optional(&*region.quick, &key).await }
        });
        for (region, content) in read.await? {
            let Some(theirs) = content.and_then(|content| History::parse(timeline, &content).ok()) else {
                continue;
            };
            if theirs.entries != history.entries {
                return Err(AgentError::Conflict {
                    region: region.name.clone(),
                    key,
                    ours: descent(history),
                    theirs: descent(&theirs),
                });
            }
        }
        Ok(())
    }

    /// Claims nothing: what a standby sends is its primary's. That one may be a copy, or have been promoted beside one that
    /// lives, and its standbys are no better than it is.
    async fn follow(&self, line: Line) -> Result<()> {
        let mut silent = None;
        for _ in 0..ROUNDS {
            let told = self.read().await?;
            if self.way(line, true, &told, &mut silent).await? != Way::Again {
                return Ok(());
            }
        }
        Err(overtaken(line))
    }

    /// Whether anybody is in the way; who was, and is silent now, becomes `silent`.
    async fn way(&self, line: Line, standby: bool, told: &Told, silent: &mut Option<Silent>) -> Result<Way> {
        let newest = newest(told);
        let asking = Asking {
            me: &self.me.instance,
            standby,
            alone: self.is_alone(told, newest).await?,
            gone: self.is_gone(told, newest).await?,
        };
        let holder = match entry(asking, line, newest) {
            Entry::Ask(holder) if silent.as_ref().is_none_or(|silent| silent.holder != holder) => holder,
            Entry::Ask(_) | Entry::Free => return Ok(Way::Free),
        };
        if self.take_over.load(Ordering::Relaxed) {
            return Ok(Way::Over(holder));
        }
        let lives = self.must_be_silent(told, line, standby, &holder).await?;
        *silent = Some(Silent { holder, lives });
        Ok(Way::Again)
    }

    async fn claim(&self, line: Line) -> Result<()> {
        if self.held.borrow().claim.is_some() {
            // Of another timeline. Its looks must neither climb over the new claim nor allow anything.
            self.hold(None);
            self.regions.iter().for_each(|region| region.lease.revoke());
        }
        let mut silent = None;
        for _ in 0..ROUNDS {
            let asked = async {
                let told = self.read().await?;
                let way = self.way(line, false, &told, &mut silent).await?;
                Ok::<_, AgentError>((told, way))
            };
            let (asked, awake) = asked_awake(self.interval, asked).await;
            let (told, way) = asked?;
            // Whoever was silent may have been heard since, while this process did not run.
            if awake.is_none() {
                silent = None;
                continue;
            }
            if way == Way::Again {
                continue;
            }
            // Not once the claim is placed: what waits for that would be stored.
            self.begins_anew_if_displaced()?;
            let newest = newest(&told);
            let claim = Writer {
                epoch: self.next_epoch(newest.map_or(1, |newest| newest.epoch + 1)),
                instance: self.me.instance.clone(),
                host: self.me.host.clone(),
                pid: self.me.pid,
                timeline: line.timeline,
                claimed_at: self.clock.now(),
                begins: Some(line.begins),
                machine: self.me.machine.clone(),
                interval_ms: self.interval_ms(),
            };
            if let Some(placed) = self.place(&claim, &told).await? {
                log_claim(&claim, newest);
                let rival = match way {
                    Way::Over(holder) => Some(holder),
                    _ => silent.filter(|silent| silent.lives).map(|silent| silent.holder),
                };
                match rival {
                    // The first look comes after that.
                    Some(holder) => self.outlast(&told, &holder).await,
                    None => placed
                        .iter()
                        .for_each(|(region, began)| region.lease.looked(*began)),
                }
                self.take_over.store(false, Ordering::Relaxed);
                self.hold(Some(claim));
                return Ok(());
            }
        }
        Err(overtaken(line))
    }

    /// At least `epoch`, and higher than any that was tried before.
    pub(super) fn next_epoch(&self, epoch: u64) -> u64 {
        let epoch = epoch.max(self.tried.load(Ordering::Relaxed) + 1);
        self.tried.store(epoch, Ordering::Relaxed);
        epoch
    }

    /// Creates the claim in every region that answered, and says where and when that was begun. None: another process has that
    /// epoch somewhere.
    async fn place(&self, claim: &Writer, told: &Told) -> Result<Option<Placed>> {
        let (mut placed, mut failure) = (Placed::new(), None);
        for (region, _) in told {
            let began = Moment::now();
            match create(&*region.quick, &self.layout, claim).await {
                Ok(true) => {
                    region.lease.claim(self.interval);
                    placed.push((region.clone(), began));
                }
                Ok(false) => return Ok(None),
                Err(error) if is_of_the_region(&error) => {
                    tracing::warn!(region = region.name, %error, "the claim is placed there later");
                    failure = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        match failure {
            Some(error) if placed.is_empty() => Err(error),
            _ => Ok((!placed.is_empty()).then_some(placed)),
        }
    }
}

/// The regions in which a claim was placed.
type Placed = Vec<(Arc<Region>, Moment)>;

fn overtaken(line: Line) -> AgentError {
    AgentError::Trouble {
        what: format!(
            "{ROUNDS} attempts to claim timeline {} were overtaken by other agents",
            line.timeline
        ),
        next: "Trying again; if it goes on, see which agents are configured for this archive".into(),
    }
}

fn log_claim(claim: &Writer, before: Option<&Writer>) {
    let before = before.map_or_else(|| "none".to_owned(), name);
    tracing::info!(epoch = claim.epoch, timeline = %claim.timeline, instance = claim.instance, before, "claimed the archive");
}

fn is_of_the_region(error: &AgentError) -> bool {
    matches!(error.kind(), Kind::Retry | Kind::Operator)
}
