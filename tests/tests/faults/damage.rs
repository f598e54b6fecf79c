//! A segment object that is damaged in every region: what else holds the same WAL is used, and what nothing holds is
//! named, stepped over only where that loses nothing more, and never taken for the end.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Context, Result, ensure};
use highwater_format::{Codec, FrameEncoder, Header, Kind, Lsn, LsnRange, Object, seal};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::{Expect, LedgerLog};
use highwater_tests::program::Running;
use highwater_tests::site::{self, BUCKET, PATIENCE, REGIONS, Site};
use highwater_tests::{Ledger, PgCluster, Program, S3Server, archive, lsn};

use crate::restore::with_segments;
use crate::support::{VERSION, answers, both_hold, from_both, from_region, leave};

/// A segment object as it was before it was damaged.
pub(crate) struct Victim {
    pub(crate) key: String,
    pub(crate) range: (u64, u64),
    intact: Vec<u8>,
}

impl Victim {
    /// The third segment from the end that `region` holds.
    pub(crate) fn of(region: &S3Server, segment_size: u64) -> Result<Self> {
        let keys = archive::keys_with(&region.snapshot(), BUCKET, "/segment/");
        let key = keys
            .get(keys.len().saturating_sub(3))
            .context("no segments")?
            .clone();
        let (_, start, end) = archive::range_of(&key, segment_size).context("not a segment")?;
        let intact = region.get(BUCKET, &key).context("it is gone")?.bytes.to_vec();
        Ok(Self {
            key,
            range: (start, end),
            intact,
        })
    }

    /// Damages the object in `region`, and removes every chunk that holds some of its WAL.
    fn strike(&self, region: &S3Server) -> Result<()> {
        ensure!(region.corrupt(BUCKET, &self.key), "{} is not there", self.key);
        self.without_chunks(region)
    }

    /// Removes every chunk in `region` that holds some of its WAL.
    pub(crate) fn without_chunks(&self, region: &S3Server) -> Result<()> {
        for key in archive::keys_with(&region.snapshot(), BUCKET, "/tail/") {
            let (_, start, end) = archive::range_of(&key, 1 << 20).context("not a chunk")?;
            if start < self.range.1 && self.range.0 < end {
                region.delete(BUCKET, &key);
            }
        }
        Ok(())
    }

    /// Stores the half of its WAL that is wanted as chunks.
    fn put_half(&self, region: &S3Server, second: bool) -> Result<()> {
        let whole = Object::open(self.intact.clone().into())?;
        let plain = whole.plain()?;
        let middle = plain.len() / 2 + 100;
        let (from, to) = if second {
            (middle, plain.len())
        } else {
            (0, middle)
        };
        let at = |offset: usize| Lsn(self.range.0 + offset as u64);
        let (directory, _) = self.key.split_once("/segment/").context("not a segment")?;
        for (start, end) in [(from, (from + to) / 2), ((from + to) / 2, to)] {
            let range = LsnRange::new(at(start), at(end));
            let given = whole.header();
            let header = Header {
                first_commit: given.first_commit,
                last_commit: given.last_commit,
                sealed_at: given.sealed_at,
                server_end: given.server_end,
                ..Header::wal(Kind::Tail, Codec::Lz4, given.system_id, given.timeline, range)
            };
            let frame = FrameEncoder::new(Codec::Lz4).encode(&plain[start..end])?;
            let key = format!("{directory}/tail/{}-{}", range.start.hex16(), range.end.hex16());
            region.put(BUCKET, &key, seal(header, &[frame])?.bytes.to_vec());
        }
        Ok(())
    }

    /// Its key as messages have it, without the region's prefix.
    pub(crate) fn name(&self) -> &str {
        self.key.strip_prefix("prod/").unwrap_or(&self.key)
    }

    fn shown(&self) -> String {
        format!("[{}, {})", lsn::show(self.range.0), lsn::show(self.range.1))
    }
}

/// Half of the chunks are in the one region and half in the other.
#[tokio::test]
async fn fault_40_a_segment_damaged_in_every_region_is_restored_from_chunks() -> Result<()> {
    let (site, log) = with_segments().await?;
    let victim = Victim::of(&site.regions[0], site.segment_size())?;
    for (region, second) in site.regions.iter().zip([false, true]) {
        victim.strike(region)?;
        victim.put_half(region, second)?;
    }
    let place = from_both(&site)?;
    let verify = place.program()?.arg("verify").output().await?;
    answers(
        &verify,
        1,
        &[victim.name(), "no region alone has it, all together do"],
    )?;
    ensure!(!verify.said().contains("LOST"), "{}", verify.said());
    // A search reads all of it, and says what it had to do.
    let plan = place
        .program()?
        .args(["plan", "--to-xid", "3999999999"])
        .output()
        .await?;
    answers(&plan, 1, &["is not in the WAL"])?;
    let restored = place.recovered("data", &[]).await?;
    log.check(&restored, Expect::everything()).await?;
    Ok(())
}

/// Planning does not read the whole archive, so the damage is met in the middle of replay: PostgreSQL does not open, and
/// the message names the range and a restore that works.
#[tokio::test]
async fn fault_53_damage_met_in_the_middle_of_replay_opens_nothing_and_is_named() -> Result<()> {
    let (site, log) = with_segments().await?;
    let victim = Victim::of(&site.regions[0], site.segment_size())?;
    site.regions.iter().try_for_each(|region| victim.strike(region))?;
    let place = from_both(&site)?;
    let verify = place.program()?.arg("verify").output().await?;
    answers(&verify, 1, &["LOST", &victim.shown(), "take one now"])?;

    let edge = lsn::show(victim.range.0);
    let advice = format!("--to-lsn {edge}");
    let run = place
        .program()?
        .args(["run", "--start", "--into"])
        .arg(place.data("data"));
    let run = run.arg("--bin").arg(VERSION.bin()?).output().await?;
    answers(&run, 4, &[&victim.shown(), &advice, victim.name()])?;
    let data = place.data("data");
    ensure!(data.join("recovery.signal").exists(), "recovery was given up");
    ensure!(
        !data.join("pg_wal/00000002.history").exists(),
        "it was opened on a new timeline"
    );

    // What planning has to read it knows beforehand.
    let end = lsn::show(victim.range.0 + 5000);
    let plan = place.program()?.args(["plan", "--to-lsn", &end]).output().await?;
    answers(&plan, 4, &[&victim.shown(), &advice, victim.name()])?;
    let before = place.recovered("before", &["--to-lsn", &edge]).await?;
    log.check(&before, Expect::at_lsn(victim.range.0)).await?;
    Ok(())
}

/// A site whose second region was away while whole segments were stored in the first one, and whose agent has ended.
struct Lagging {
    site: Site,
    admin: SocketAddr,
    log: LedgerLog,
    victim: Victim,
    end: u64,
}

impl Lagging {
    async fn make(policy: &str) -> Result<Self> {
        let mut site = Site::start(PgCluster::builder(VERSION), 1).await?;
        site.settings += &format!("[durability]\npolicy = \"{policy}\"\n[heal]\ninterval = \"1s\"\n");
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut agent = site.start_agent().await?;
        let ledger = Ledger::start(&site.primary, 2).await?;
        ledger.grow(20).await?;
        site.backup().await?;
        let held = site.all_durable().await?;
        both_hold(&site, held).await?;
        site.regions[1].faults().refuse(true);
        for _ in 0..5 {
            ledger.grow(20).await?;
            site.primary.sql("SELECT pg_switch_wal()").await?;
        }
        let log = ledger.stop().await;
        let end = lsn::parse(&site.primary.value("SELECT pg_current_wal_flush_lsn()").await?)?;
        let stored = || async { (site.stored_ends()[0] >= end).then_some(()) };
        eventually("all of it in one region", PATIENCE, stored).await?;
        agent.kill9();
        let victim = Victim::of(&site.regions[0], site.segment_size())?;
        ensure!(site.stored_ends()[1] <= victim.range.0, "the other region has it");
        victim.strike(&site.regions[0])?;
        site.regions[1].faults().refuse(false);
        Ok(Self {
            site,
            admin,
            log,
            victim,
            end,
        })
    }

    fn agent(&self) -> Result<Program> {
        let [north, south] = &self.site.regions;
        let regions = [(REGIONS[0], north.as_ref()), (REGIONS[1], south.as_ref())];
        let connection = self.site.tap.connection_string_as(&self.site.user);
        let text = site::config(Some(&connection), &regions);
        Program::agent()?.config(&format!(
            "{text}[admin]\nlisten = \"{}\"\n{}",
            self.admin, self.site.settings
        ))
    }

    /// Waits until `status` says all of `parts`.
    async fn status_says(&self, agent: &Running, parts: &[&str]) -> Result<()> {
        let said = || async {
            let status = self.agent().ok()?.arg("status").output().await.ok()?.said();
            parts.iter().all(|part| status.contains(part)).then_some(())
        };
        let waited = eventually("status to say so", PATIENCE, said).await;
        waited.with_context(|| format!("{parts:?}\n{}", agent.last_words()))
    }

    /// Whether the second region holds a byte at `position`.
    fn south_holds(&self, position: u64) -> bool {
        let wal = archive::wal(&self.site.regions[1].snapshot(), BUCKET, self.site.segment_size());
        wal.get(&1)
            .is_some_and(|held| held.contiguous_end(position) > position)
    }

    async fn restores_from_south(&self) -> Result<()> {
        both_hold(&self.site, self.end).await?;
        let place = from_region(&self.site, 1)?;
        let restored = place.recovered("data", &[]).await?;
        self.log.check(&restored, Expect::everything()).await?;
        Ok(())
    }
}

/// What lies in the damage was acknowledged before: newer WAL goes on to the region, which lacks the rest until there
/// is something to fill it from.
#[tokio::test]
async fn fault_40_a_lagging_region_goes_on_behind_acknowledged_damage_and_is_filled_when_it_can_be()
-> Result<()> {
    let lagging = Lagging::make("any").await?;
    let agent = lagging.agent()?.arg("run").start()?;
    let behind = || async { lagging.south_holds(lagging.end - 1).then_some(()) };
    eventually("newer WAL in the region", PATIENCE, behind)
        .await
        .with_context(|| agent.last_words())?;
    ensure!(
        !lagging.south_holds(lagging.victim.range.0),
        "damage was copied or made up"
    );
    let shown = lagging.victim.shown();
    lagging
        .status_says(&agent, &[&shown, "damaged in every region", "take a base backup"])
        .await?;
    // Nor does it claim more than it can restore.
    let refused = from_region(&lagging.site, 1)?.run("never", &[]).await?;
    answers(&refused, 1, &[&shown])?;

    lagging.victim.put_half(&lagging.site.regions[0], false)?;
    lagging.victim.put_half(&lagging.site.regions[0], true)?;
    let filled = || async { lagging.south_holds(lagging.victim.range.1 - 1).then_some(()) };
    eventually("the chunks in the region", PATIENCE, filled)
        .await
        .with_context(|| agent.last_words())?;
    leave(agent).await?;
    lagging.restores_from_south().await
}

/// PostgreSQL still keeps the WAL that is damaged: the region's position and the report stay before it, and status says
/// why and what to do.
#[tokio::test]
async fn fault_40_damage_that_was_not_acknowledged_holds_the_position_and_status_says_why() -> Result<()> {
    let lagging = Lagging::make("all").await?;
    let agent = lagging.agent()?.arg("run").start()?;
    let shown = lagging.victim.shown();
    lagging
        .status_says(&agent, &[&shown, lagging.victim.name(), "durability.policy"])
        .await?;
    ensure!(
        lagging.site.tap.highest_flush() <= lagging.victim.range.0,
        "more was reported than both regions hold"
    );
    for second in [false, true] {
        lagging.victim.put_half(&lagging.site.regions[0], second)?;
    }
    lagging
        .site
        .all_durable()
        .await
        .with_context(|| agent.last_words())?;
    leave(agent).await?;
    lagging.restores_from_south().await
}
