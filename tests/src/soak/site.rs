//! The site of one schedule, and what is done to its parts.
//!
//! Owns: server, standby, agent and ledger across all their deaths, and the evidence of a failure.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::dice::Dice;
use crate::ledger::{Ledger, LedgerLog, Pace};
use crate::lsn;
use crate::postgres::{PgCluster, PgVersion, Stop};
use crate::program::Running;
use crate::site::{BUCKET, REGIONS, Site};
use crate::witness::{Rules, Seen, Witness};

use super::troubles::Troubles;

/// How long a server may take to answer something in the middle of faults.
const ANSWER: Duration = Duration::from_secs(20);

/// What a server had acknowledged before another one took over that lacked the end of it.
#[derive(Debug)]
pub(super) struct Branch {
    pub(super) timeline: u32,
    /// Where it was left.
    pub(super) switch: u64,
    pub(super) log: LedgerLog,
    /// What was promised of it.
    pub(super) flush: u64,
}

#[derive(Debug)]
pub(super) struct Soaked {
    pub(super) site: Site,
    pub(super) setting: String,
    /// In how many regions what is reported must be.
    pub(super) needed: usize,
    pub(super) agent: Running,
    pub(super) troubles: Troubles,
    standby: Option<PgCluster>,
    pub(super) branch: Option<Branch>,
    witness: Witness,
    ledger: Option<Ledger>,
    log: LedgerLog,
    pace: Pace,
    backups: Vec<Running>,
    said: Vec<String>,
}

impl Soaked {
    pub(super) async fn start(dice: &mut Dice) -> Result<Self> {
        // One that is missing fails the schedule: what was not run is not proven.
        let version = dice.one(&[PgVersion::V15, PgVersion::V17, PgVersion::V18]);
        let segment_mb = dice.one(&[1, 1, 16]);
        let (policy, needed) = dice.one(&[("all", 2), ("all", 2), ("any", 1)]);
        let flush = dice.one(&["50ms", "200ms", "1s"]);
        let builder = PgCluster::builder(version)
            .conf("wal_sender_timeout", "6s")
            .conf("max_connections", "50")
            // Nobody keeps WAL for the agent on a standby without an agent of its own: what it is promoted with must
            // reach back to what is archived, or the gap is a true one.
            .conf("wal_keep_size", "2GB");
        let mut site = Site::start(builder, segment_mb).await?;
        site.settings = format!(
            "[wal]\nflush_interval = \"{flush}\"\n[durability]\npolicy = \"{policy}\"\n[pulse]\ninterval = \"1s\"\n"
        );
        let rules = Rules {
            regions: needed,
            across: false,
        };
        let witness = Witness::of(&site, rules);
        let agent = site.start_agent().await?;
        site.backup().await?;
        let standby = match dice.once_in(2) {
            true => Some(PgCluster::builder(version).standby_of(&site.primary).await?),
            false => None,
        };
        site.all_durable().await?;
        let pace = Pace {
            clients: 3,
            pause: dice.millis(1, 30),
            filling: dice.one(&[20, 200, 4000]),
        };
        let ledger = Ledger::start_paced(&site.primary, pace).await?;
        Ok(Self {
            setting: format!(
                "{version}, segments of {segment_mb} MB, policy {policy}, flush interval {flush}{}",
                if standby.is_some() { ", a standby" } else { "" }
            ),
            site,
            needed,
            agent,
            troubles: Troubles::default(),
            standby,
            branch: None,
            witness,
            ledger: Some(ledger),
            log: LedgerLog::default(),
            pace,
            backups: Vec::new(),
            said: Vec::new(),
        })
    }

    pub(super) fn agent_dies(&mut self) {
        self.agent.kill9();
        self.said.push(self.agent.stderr());
    }

    pub(super) fn agent_starts(&mut self) -> Result<()> {
        self.agent = self.site.agent()?.arg("run").start()?;
        Ok(())
    }

    /// Nothing that happens here is a reason for the agent to end.
    pub(super) fn agent_lives(&mut self) -> Result<()> {
        let lives = self.agent.is_running();
        ensure!(
            lives,
            "the agent has ended by itself:\n{}",
            self.agent.last_words()
        );
        Ok(())
    }

    /// The troubles are over: everything gets into both regions and is reported, without help and under load.
    pub(super) async fn settles(&mut self) -> Result<()> {
        self.recovers_from_all();
        let settled = async {
            let end = self.site.all_durable().await?;
            let name = "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)";
            let timeline = u32::from_str_radix(&self.site.primary.value(name).await?, 16)?;
            self.site.archived(timeline, end).await
        };
        let settled = settled.await;
        settled.with_context(|| format!("after the troubles; the agent:\n{}", self.agent.last_words()))?;
        self.agent_lives()
    }

    /// A base backup that goes on beside whatever comes next. It may fail; what is visible must restore.
    pub(super) fn backup_begins(&mut self) -> Result<()> {
        self.backups.push(self.site.agent()?.arg("backup").start()?);
        Ok(())
    }

    /// Asks the server for something that may not work at the moment.
    pub(super) async fn asks(&self, sql: &str) {
        drop(tokio::time::timeout(ANSWER, self.site.primary.sql(sql)).await);
    }

    async fn ledger_stops(&mut self) {
        if let Some(ledger) = self.ledger.take() {
            self.log = ledger.stop().await;
        }
    }

    async fn ledger_goes_on(&mut self) -> Result<()> {
        let log = std::mem::take(&mut self.log);
        self.ledger = Some(Ledger::resume(&self.site.primary, self.pace, log).await?);
        Ok(())
    }

    pub(super) async fn primary_crashes(&mut self) -> Result<()> {
        self.site.primary.kill9();
        self.ledger_stops().await;
        self.site.primary.start_again().await?;
        self.ledger_goes_on().await
    }

    /// A switchover: the standby has everything when it is promoted. Whether there was one.
    pub(super) async fn promote(&mut self) -> Result<bool> {
        let Some(mut standby) = self.standby.take() else {
            return Ok(false);
        };
        self.ledger_stops().await;
        let end = lsn::parse(
            &self
                .site
                .primary
                .value("SELECT pg_current_wal_flush_lsn()")
                .await?,
        )?;
        let caught_up = || async {
            let replayed = standby.value("SELECT pg_last_wal_replay_lsn()").await.ok()?;
            (lsn::parse(&replayed).ok()? >= end).then_some(())
        };
        crate::clock::eventually("the standby to catch up", Duration::from_secs(60), caught_up).await?;
        // The agent may hold the shutdown up for ten seconds while a region is away.
        self.site.primary.stop(Stop::Fast).await?;
        standby.promote().await?;
        self.site.tap.redirect(&standby);
        std::mem::swap(&mut self.site.primary, &mut standby);
        self.ledger_goes_on().await?;
        Ok(true)
    }

    /// A failover: the primary dies, and the standby that is promoted lacks the last it had acknowledged. Whether there was one.
    pub(super) async fn fails_over(&mut self, lag: Duration) -> Result<bool> {
        let Some(mut standby) = self.standby.take() else {
            return Ok(false);
        };
        standby.stop(Stop::Immediate).await?;
        self.lives_on(lag).await;
        self.site.primary.kill9();
        self.ledger_stops().await;
        standby.start_again().await?;
        standby.promote().await?;
        let (timeline, switch) = left_at(&standby).await?;
        self.branch = Some(Branch {
            timeline,
            switch,
            log: self.log.clone(),
            flush: self.witness.seen().flush,
        });
        self.witness.moves_on(timeline + 1, switch);
        self.log.falls_back_to(&standby, switch).await?;
        self.site.tap.redirect(&standby);
        std::mem::swap(&mut self.site.primary, &mut standby);
        self.ledger_goes_on().await?;
        Ok(true)
    }

    /// After a failover the regions at the last promise must tell of it, or what they hold is another story.
    async fn tells_of_the_failover(&mut self) -> Result<()> {
        let switch = self.branch.as_ref().map(|branch| branch.switch);
        match switch.is_some_and(|switch| self.witness.seen().flush <= switch) {
            true => self.settles().await,
            false => Ok(()),
        }
    }

    /// Server, agent and disk are gone in the middle of it all. What was acknowledged, and what was promised.
    pub(super) async fn lose_the_machine(&mut self, dice: &mut Dice) -> Result<(LedgerLog, Seen)> {
        self.tells_of_the_failover().await?;
        tokio::time::sleep(dice.millis(100, 1500)).await;
        self.site.primary.kill9();
        tokio::time::sleep(dice.millis(0, 60)).await;
        self.agent_dies();
        for backup in &mut self.backups {
            backup.kill9();
            self.said.push(backup.stderr());
        }
        self.ledger_stops().await;
        self.site.primary.lose_disk()?;
        let bugs = self
            .said
            .iter()
            .find(|said| said.contains("please report this") || said.contains("panicked at"));
        if let Some(said) = bugs {
            anyhow::bail!("a program failed by itself:\n{said}");
        }
        let seen = self.witness.satisfied()?;
        ensure!(seen.flush > 0, "nothing was ever reported");
        Ok((self.log.clone(), seen))
    }

    /// Writes the copies of the regions, the notes and what the programs said to a directory; its name.
    pub(super) fn keep(&mut self, below: &Path, seed: u64) -> String {
        self.said.push(self.agent.stderr());
        let dir = below.join(format!("soak-{seed}"));
        match self.write_evidence(&dir) {
            Ok(()) => dir.display().to_string(),
            Err(error) => format!("{} (incomplete: {error:#})", dir.display()),
        }
    }

    fn write_evidence(&self, dir: &Path) -> Result<()> {
        let seen = self.witness.seen();
        for (name, copy) in REGIONS.iter().zip(&seen.regions) {
            for key in copy.keys(BUCKET) {
                let stored = copy.get(BUCKET, &key).context("gone")?;
                let path = dir.join(name).join(&key);
                std::fs::create_dir_all(path.parent().context("no parent")?)?;
                std::fs::write(path, &stored.bytes)?;
            }
        }
        std::fs::create_dir_all(dir)?;
        let mut notes = format!(
            "highest reported position {}\n{:?}\n",
            lsn::show(seen.flush),
            seen.violation
        );
        for entry in &self.log.entries {
            writeln!(notes, "{entry:?}")?;
        }
        std::fs::write(dir.join("ledger"), notes)?;
        let mut feedback = String::new();
        for message in self.site.tap.feedback() {
            writeln!(feedback, "{message:?}")?;
        }
        std::fs::write(dir.join("feedback"), feedback)?;
        std::fs::write(dir.join("programs"), self.said.join("\n----\n"))?;
        std::fs::write(dir.join("postgresql.log"), self.site.primary.log())?;
        Ok(())
    }
}

/// The timeline that a promoted server has left, and where.
async fn left_at(promoted: &PgCluster) -> Result<(u32, u64)> {
    let newest = "SELECT pg_read_file('pg_wal/' || max(name)) FROM pg_ls_dir('pg_wal') name WHERE name LIKE '%.history'";
    let history = promoted.value(newest).await?;
    let last = history.lines().rfind(|line| !line.trim().is_empty());
    let mut words = last.context("an empty history")?.split_whitespace();
    let timeline = words.next().context("no timeline")?.parse()?;
    Ok((timeline, lsn::parse(words.next().context("no switch point")?)?))
}
