//! Ways to lose WAL, an archive that lacks it, and what must hold around a gap.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use highwater_format::Time;
use highwater_tests::clock::{self, eventually};
use highwater_tests::ledger::{Expect, LedgerLog, Pace};
use highwater_tests::postgres::PgBuilder;
use highwater_tests::program::{Program, Running};
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site};
use highwater_tests::{Ledger, PgCluster, PgVersion, archive, lsn};

/// Rows small and few enough that a megabyte of WAL is not full in a moment.
pub(crate) const SLOW: Pace = Pace {
    clients: 2,
    pause: std::time::Duration::from_millis(5),
    filling: 60,
};

/// An agent with a port for its metrics and its status.
pub(crate) struct Agent {
    pub(crate) port: u16,
}

impl Agent {
    pub(crate) fn new() -> Result<Self> {
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
            .local_addr()?
            .port();
        Ok(Self { port })
    }

    pub(crate) fn program(&self, site: &Site) -> Result<Program> {
        let listen = format!("127.0.0.1:{}", self.port);
        Ok(site.agent()?.env("HIGHWATER_ADMIN_LISTEN", listen))
    }

    /// What the metrics say under this name, if they do.
    pub(crate) async fn metric(&self, name: &str) -> Option<u64> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port))
            .await
            .ok()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let mut lines = answer.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Waits until the metrics count so many gaps, and so many of them that no base backup has ended.
    pub(crate) async fn counts_gaps(&self, recorded: u64, open: u64) -> Result<()> {
        let counted = || async {
            let all = self.metric("highwater_gaps").await?;
            let unended = self.metric("highwater_gaps_open").await?;
            ((all, unended) == (recorded, open)).then_some(())
        };
        let what = format!("{recorded} gaps in the metrics, {open} of them open");
        eventually(&what, PATIENCE, counted).await
    }
}

/// No region takes WAL any more; everything else works.
pub(crate) fn stop_taking(site: &Site) {
    for region in &site.regions {
        region.faults().only_keys("/wal/");
        region.faults().fail_always(Some(503));
    }
}

/// Every region answers every request with `status` only.
pub(crate) fn go_away(site: &Site, status: u16) {
    site.regions
        .iter()
        .for_each(|region| region.faults().fail_always(Some(status)));
}

pub(crate) fn take_again(site: &Site) {
    site.regions.iter().for_each(|region| region.faults().clear());
}

/// How WAL is lost while no agent streams.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Loss {
    /// `pg_drop_replication_slot`.
    Dropped,
    /// The same, and somebody has made a slot of that name again since, which keeps what is written from then on.
    Recreated,
    /// `max_slot_wal_keep_size` is passed.
    Outgrown,
    /// `idle_replication_slot_timeout` has passed.
    Idle,
}

impl Loss {
    pub(crate) fn cluster(self, version: PgVersion) -> PgBuilder {
        let builder = PgCluster::builder(version)
            .conf("min_wal_size", "2MB")
            .conf("max_wal_size", "8MB");
        match self {
            Self::Dropped | Self::Recreated => builder,
            Self::Outgrown => builder.conf("max_slot_wal_keep_size", "2MB"),
            // Without SQL only the stream's refusal tells of it.
            Self::Idle => builder
                .conf("idle_replication_slot_timeout", "1s")
                .hba("local postgres archiver reject"),
        }
    }

    pub(crate) async fn happens_at(self, site: &Site) -> Result<()> {
        let slot = "FROM pg_replication_slots WHERE slot_name = 'highwater'";
        let unused = || async {
            let active = site.primary.value(&format!("SELECT active {slot}")).await.ok()?;
            (active == "f").then_some(())
        };
        eventually("the slot to be free", PATIENCE, unused).await?;
        let is_dropped = matches!(self, Self::Dropped | Self::Recreated);
        if is_dropped {
            site.primary
                .sql("SELECT pg_drop_replication_slot('highwater')")
                .await?;
        }
        recycle(site).await?;
        if matches!(self, Self::Recreated) {
            let again = "SELECT pg_create_physical_replication_slot('highwater', true)";
            site.primary.sql(again).await?;
        }
        if is_dropped {
            return Ok(());
        }
        let lost = || async {
            site.primary.sql("CHECKPOINT").await.ok()?;
            let status = site
                .primary
                .value(&format!("SELECT wal_status {slot}"))
                .await
                .ok()?;
            (status == "lost").then_some(())
        };
        eventually("the slot to be lost", PATIENCE, lost).await
    }

    /// What the record says about it.
    pub(crate) fn cause(self) -> &'static str {
        match self {
            Self::Dropped => "did not exist",
            Self::Recreated => "keeps WAL from",
            Self::Outgrown => "kept no WAL any more",
            Self::Idle => "idle_timeout",
        }
    }
}

/// Fills a few segments and lets the server remove what nobody holds.
pub(crate) async fn recycle(site: &Site) -> Result<()> {
    write_segments(site, 8).await?;
    site.primary.sql("CHECKPOINT").await?;
    site.primary.sql("CHECKPOINT").await?;
    Ok(())
}

/// Goes on to a later segment.
pub(crate) async fn write_segments(site: &Site, count: u32) -> Result<()> {
    for _ in 0..count {
        site.primary
            .sql("CREATE TABLE IF NOT EXISTS filler (t text); INSERT INTO filler VALUES ('x'); SELECT pg_switch_wal()")
            .await?;
    }
    Ok(())
}

/// A moment: where the server was and when.
pub(crate) struct Moment {
    pub(crate) lsn: u64,
    at: SystemTime,
}

pub(crate) async fn now(site: &Site) -> Result<Moment> {
    Ok(Moment {
        lsn: site.position().await?,
        at: clock::now(),
    })
}

impl Moment {
    pub(crate) fn at(&self) -> Time {
        Time::from_unix_micros(clock::unix_micros(self.at))
    }

    pub(crate) fn time(&self) -> String {
        self.at().to_string()
    }
}

/// An archive with a base backup and WAL, a ledger that went on after the agent had left, and the moments between.
pub(crate) struct Story {
    pub(crate) site: Site,
    pub(crate) ledger: Ledger,
    pub(crate) before: Moment,
    pub(crate) inside: Moment,
}

/// A base backup and WAL on both sides of the moment; then the agent leaves, and the ledger goes on.
pub(crate) async fn archived_for_a_while(site: &Site) -> Result<(Ledger, Moment)> {
    let mut agent = site.start_agent().await?;
    let ledger = Ledger::start_paced(&site.primary, SLOW).await?;
    ledger.grow(20).await?;
    site.backup().await?;
    ledger.grow(20).await?;
    let before = now(site).await?;
    ledger.grow(20).await?;
    stop(&mut agent).await?;
    Ok((ledger, before))
}

pub(crate) async fn until_wal_is_lost(version: PgVersion, loss: Loss) -> Result<Story> {
    let mut site = Site::start(loss.cluster(version), 1).await?;
    if matches!(loss, Loss::Idle) {
        site.primary.sql("CREATE ROLE archiver LOGIN REPLICATION").await?;
        site.user = "archiver".into();
    }
    let (ledger, before) = archived_for_a_while(&site).await?;
    // Its own last bytes are archived; from the next segment on nothing is.
    site.primary.sql("SELECT pg_switch_wal()").await?;
    ledger.grow(20).await?;
    let inside = now(&site).await?;
    ledger.grow(20).await?;
    loss.happens_at(&site).await?;
    Ok(Story {
        site,
        ledger,
        before,
        inside,
    })
}

pub(crate) async fn stop(agent: &mut Running) -> Result<()> {
    agent.terminate();
    let code = agent.wait_exit(PATIENCE).await?;
    ensure!(code == 0, "the agent left with {code}:\n{}", agent.last_words());
    Ok(())
}

/// The gap records of each region: keys and content.
pub(crate) fn records(site: &Site) -> Result<Vec<Vec<(String, String)>>> {
    site.snapshots()
        .iter()
        .map(|region| {
            let content = |key: String| {
                let object = region.get(BUCKET, &key).context("gone")?;
                Ok((key, String::from_utf8(object.bytes.to_vec())?))
            };
            archive::keys_with(region, BUCKET, "/gap/")
                .into_iter()
                .map(content)
                .collect()
        })
        .collect()
}

/// Waits until both regions have `backups` complete base backups.
pub(crate) async fn backed_up(site: &Site, backups: usize, agent: &Running) -> Result<()> {
    let there = || async {
        let count = |region| archive::keys_with(region, BUCKET, "backup.json").len();
        site.snapshots()
            .iter()
            .all(|region| count(region) >= backups)
            .then_some(())
    };
    let waited = eventually("the base backup that ends the gap", PATIENCE, there).await;
    waited.with_context(|| agent.last_words())
}

/// The range that a gap's key names.
pub(crate) fn range_of(key: &str) -> Result<(u64, u64)> {
    let name = key.rsplit('/').next().unwrap_or_default();
    let (start, end) = name.split_once('-').context("no range")?;
    Ok((u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?))
}

/// The archive on both sides of its only gap: the record is the same everywhere, and the WAL leaves out just that.
pub(crate) fn one_gap(site: &Site, cause: &str) -> Result<(u64, u64)> {
    let records = records(site)?;
    ensure!(records[0] == records[1], "the regions differ: {records:?}");
    let [(key, record)] = &records[0][..] else {
        anyhow::bail!("not one gap: {records:?}")
    };
    ensure!(record.contains(cause), "{cause:?} is not in {record}");
    let (start, end) = range_of(key)?;
    for snapshot in site.snapshots() {
        let wal = archive::wal(&snapshot, BUCKET, site.segment_size());
        let runs = wal.get(&1).context("no WAL")?.runs();
        ensure!(
            runs.len() == 2 && runs[0].1 == start && runs[1].0 == end,
            "gap {} to {}, WAL {runs:x?}",
            lsn::show(start),
            lsn::show(end)
        );
    }
    Ok((start, end))
}

/// Before and behind the gap everything can be restored, inside nothing.
pub(crate) async fn restores_around(
    site: &Site,
    log: &LedgerLog,
    (before, inside): (&Moment, &Moment),
    gap: (u64, u64),
    cause: &str,
) -> Result<()> {
    let version = site.primary.version();
    ensure!(before.lsn < gap.0 && gap.0 <= inside.lsn && inside.lsn < gap.1);
    let place = RestoreSite::new(version, &[(REGIONS[1], site.regions[1].as_ref())])?;
    let target = lsn::show(inside.lsn);
    let behind = lsn::show(gap.1 - 1);
    for target in [
        ["--to-lsn", &target],
        ["--to-lsn", &behind],
        ["--to-time", &inside.time()],
    ] {
        let said = place.run("never", &target).await?.expect_code(1)?;
        ensure!(
            said.said().contains(cause) && said.said().contains(&lsn::show(gap.0)),
            "{target:?}: {}",
            said.said()
        );
        ensure!(
            !place.data("never").exists(),
            "{target:?}: the directory was made"
        );
    }
    let list = place.program()?.arg("list").output().await?.expect_code(0)?;
    ensure!(
        list.stdout.contains("gaps") && list.stdout.contains(cause) && list.stdout.contains("ended by"),
        "{}",
        list.stdout
    );
    place.program()?.arg("verify").output().await?.expect_code(0)?;

    let restored = place
        .recovered("before", &["--to-lsn", &lsn::show(before.lsn)])
        .await?;
    let report = log.check(&restored, Expect::at_lsn(before.lsn)).await?;
    ensure!(report.missing > 0, "nothing lies past the position");
    drop(restored);
    log.check(&place.recovered("latest", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}
