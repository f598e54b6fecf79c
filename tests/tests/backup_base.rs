//! Base backups taken by the built agent: what lies in the regions is what PostgreSQL sent.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_format::{Backup, EntryKind, Manifest, Object, decode};
use highwater_tests::clock::eventually;
use highwater_tests::ledger::Expect;
use highwater_tests::process::{self, Process};
use highwater_tests::program::Running;
use highwater_tests::site::{PATIENCE, RestoreSite};
use highwater_tests::{Ledger, PgCluster, PgVersion, Program, S3Server, Stop, TestDir, lsn, skip};

const BUCKET: &str = "archive";
const START: Duration = Duration::from_secs(30);

/// Two regions, and the configuration that leads to them.
struct Regions {
    servers: [S3Server; 2],
}

impl Regions {
    async fn start() -> Result<Self> {
        let servers = [S3Server::start().await?, S3Server::start().await?];
        servers.iter().for_each(|server| server.create_bucket(BUCKET));
        Ok(Self { servers })
    }

    fn config(&self, connection: &str, more: &str) -> String {
        let region = |(name, server): (&str, &S3Server)| {
            format!(
                "[[region]]\nname = \"{name}\"\nurl = \"s3://{BUCKET}/prod\"\nendpoint = \"{}\"\npath_style = true\n\
                 access_key_id = \"{}\"\nsecret_access_key = \"{}\"\n",
                server.endpoint(),
                server.access_key(),
                server.secret_key()
            )
        };
        let regions: String = ["a", "b"].into_iter().zip(&self.servers).map(region).collect();
        format!(
            "[cluster]\nname = \"orders\"\nconnection = \"{connection}\"\n{regions}[admin]\nlisten = \"off\"\n{more}"
        )
    }

    fn agent(&self, cluster: &PgCluster, more: &str) -> Result<Program> {
        Program::agent()?.config(&self.config(&cluster.connection_string(), more))
    }

    /// The ids of the complete base backups in one region.
    fn backups(&self, region: usize) -> Vec<String> {
        let keys = self.servers[region].objects(BUCKET);
        keys.iter()
            .filter_map(|key| Some(key.strip_suffix("/backup.json")?.rsplit('/').next()?.to_owned()))
            .collect()
    }

    fn get(&self, region: usize, key: &str) -> Result<bytes::Bytes> {
        let stored = self.servers[region]
            .get(BUCKET, key)
            .with_context(|| format!("{key} is missing"))?;
        Ok(stored.bytes.clone())
    }

    /// Puts the files of a backup from one region alone into a directory.
    fn rebuild(&self, region: usize, id: &str, into: &Path) -> Result<(Backup, Manifest)> {
        let keys = self.servers[region].objects(BUCKET);
        let suffix = format!("/base/{id}/backup.json");
        let mark = keys
            .iter()
            .find(|key| key.ends_with(&suffix))
            .context("no commit mark")?;
        let dir = mark.strip_suffix("backup.json").context("key")?;
        let backup: Backup = decode(&self.get(region, mark)?)?;
        let bytes = self.get(region, &format!("{dir}manifest"))?;
        ensure!(
            format!("{:08x}", crc32fast::hash(&bytes)) == backup.manifest_crc32,
            "another manifest"
        );
        let manifest: Manifest = decode(&bytes)?;
        let mut packs = Vec::new();
        for pack in &manifest.packs {
            let object = Object::open(self.get(region, &format!("{dir}pack/{:010}", pack.number))?)?;
            packs.push(object.plain()?);
        }
        for entry in &manifest.entries {
            let path = into.join(&entry.path);
            match entry.kind {
                EntryKind::Directory => std::fs::create_dir_all(&path)?,
                EntryKind::Symlink => {}
                EntryKind::File => {
                    std::fs::create_dir_all(path.parent().context("parent")?)?;
                    let mut content = Vec::new();
                    for extent in &entry.extents {
                        let from = usize::try_from(extent.offset)?;
                        content.extend_from_slice(
                            &packs[extent.pack as usize][from..from + usize::try_from(extent.len)?],
                        );
                    }
                    ensure!(
                        content.len() as u64 == entry.size,
                        "{} has another size",
                        entry.path
                    );
                    std::fs::write(&path, content)?;
                }
            }
        }
        Ok((backup, manifest))
    }
}

async fn running(regions: &Regions, cluster: &PgCluster, more: &str) -> Result<Running> {
    let mut agent = regions.agent(cluster, more)?.arg("run").start()?;
    agent.says("streaming", START).await?;
    Ok(agent)
}

/// PostgreSQL's own judgement. The distribution's server has the program; what `scripts/setup.sh` unpacks beside it has not.
async fn verified_by_postgresql(cluster: &PgCluster, dir: &Path) -> Result<()> {
    let program = cluster.bin().join("pg_verifybackup");
    if !program.exists() {
        let without = format!("pg_verifybackup of {}", cluster.version());
        return if cluster.bin().starts_with("/usr/lib/postgresql") {
            skip::not_installed(&without)
        } else {
            skip::not_allowed(&format!("{without}: the unpacked server comes without it"))
        };
    }
    let mut command = process::command(&program, "KILL");
    command.arg("-n").arg(dir);
    let status = Process::start(command)?.wait(Duration::from_secs(60)).await?;
    ensure!(status.success(), "pg_verifybackup says no to {}", dir.display());
    Ok(())
}

async fn whole_in_both_regions(version: PgVersion) -> Result<()> {
    let cluster = PgCluster::builder(version).checksums(true).start().await?;
    let place = cluster.dir().create_dir("space")?;
    cluster
        .sql(&format!("CREATE TABLESPACE space LOCATION '{}'", place.display()))
        .await?;
    // Larger than one pack, so that files span packs.
    cluster
        .sql("CREATE TABLE large AS SELECT i, repeat(md5(i::text), 12) t FROM generate_series(1, 100000) i")
        .await?;
    cluster
        .sql("CREATE TABLE apart TABLESPACE space AS SELECT i FROM generate_series(1, 50000) i")
        .await?;
    let regions = Regions::start().await?;
    let _agent = running(&regions, &cluster, "").await?;

    let done = regions
        .agent(&cluster, "")?
        .args(["--output", "json", "backup"])
        .output()
        .await?
        .expect_code(0)?;
    let report: serde_json::Value = serde_json::from_str(&done.stdout)?;
    ensure!(report["regions"] == serde_json::json!(["a", "b"]), "{report}");
    let id = report["backup"]["id"].as_str().context("id")?.to_owned();

    for region in 0..2 {
        ensure!(
            regions.backups(region) == [id.clone()],
            "region {region}: {:?}",
            regions.backups(region)
        );
        let dir = TestDir::new()?;
        let (backup, manifest) = regions.rebuild(region, &id, dir.path())?;
        ensure!(
            backup.packs > 1 && backup.tablespaces.len() == 1 && backup.pg_manifest,
            "{backup:?}"
        );
        ensure!(backup.server_version / 10_000 == version.major() && backup.stop_lsn > backup.start_lsn);
        ensure!(
            backup
                .label
                .contains(&format!("START WAL LOCATION: {}", backup.start_lsn)),
            "{}",
            backup.label
        );
        let files: Vec<&str> = manifest.entries.iter().map(|entry| entry.path.as_str()).collect();
        for needed in [
            "backup_label",
            "tablespace_map",
            "global/pg_control",
            "backup_manifest",
            "PG_VERSION",
        ] {
            ensure!(files.contains(&needed), "{needed} is missing");
        }
        ensure!(
            files
                .iter()
                .any(|path| path.starts_with("pg_tblspc/") && path.matches('/').count() > 3),
            "{files:?}"
        );
        // What cannot be in a tar archive of a running cluster must be there for the check.
        verified_by_postgresql(&cluster, dir.path()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_backup_is_whole_in_every_region_alone() -> Result<()> {
    for version in PgVersion::installed()? {
        whole_in_both_regions(version).await.context(version)?;
    }
    Ok(())
}

/// Waits until PostgreSQL has been told that all it has written is safe.
async fn all_is_reported(cluster: &PgCluster) -> Result<()> {
    let end = cluster.value("SELECT pg_current_wal_flush_lsn()").await?;
    let query = format!("SELECT bool_or(flush_lsn >= '{end}') FROM pg_stat_replication");
    let reported = || async { (cluster.value(&query).await.ok()? == "t").then_some(()) };
    eventually("all WAL to be reported as safe", PATIENCE, reported).await
}

async fn damaged_pages_void_the_backup_and_older_ones_stay(version: PgVersion) -> Result<()> {
    let mut cluster = PgCluster::builder(version).checksums(true).start().await?;
    cluster
        .sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 10000) i; CHECKPOINT")
        .await?;
    let file = cluster
        .data_dir()
        .join(cluster.value("SELECT pg_relation_filepath('t')").await?);
    let regions = Regions::start().await?;
    let mut agent = running(&regions, &cluster, "").await?;
    regions
        .agent(&cluster, "")?
        .arg("backup")
        .output()
        .await?
        .expect_code(0)?;
    agent.terminate();
    agent.wait_exit(START).await?;

    cluster.stop(Stop::Fast).await?;
    let mut content = std::fs::read(&file)?;
    content[8192 + 4000..8192 + 4008].fill(0xEE);
    std::fs::write(&file, content)?;
    cluster.start_again().await?;
    let _agent = running(&regions, &cluster, "").await?;
    let ledger = Ledger::start(&cluster, 2).await?;
    let failed = regions
        .agent(&cluster, "")?
        .arg("backup")
        .output()
        .await?
        .expect_code(3)?;
    ensure!(failed.stderr.contains("damaged pages"), "{}", failed.stderr);
    ensure!(
        failed.stderr.contains("checksum verification failed in file"),
        "no file and block: {}",
        failed.stderr
    );
    for region in 0..2 {
        ensure!(
            regions.backups(region).len() == 1,
            "{:?}",
            regions.backups(region)
        );
    }

    // The older one leads to moments after that, page included.
    ledger.grow(30).await?;
    let target = lsn::parse(&cluster.value("SELECT pg_current_wal_insert_lsn()").await?)?;
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    all_is_reported(&cluster).await?;
    let place = RestoreSite::new(version, &[("a", &regions.servers[0])])?;
    let restored = place.recovered("data", &["--to-lsn", &lsn::show(target)]).await?;
    let report = log.check(&restored, Expect::at_lsn(target)).await?;
    ensure!(
        report.expected > 20 && report.missing > 0,
        "{report:?}: the test proves little"
    );
    ensure!(restored.value("SELECT count(*) FROM t").await? == "10000");
    Ok(())
}

#[tokio::test]
async fn fault_27_damaged_pages_void_the_backup_and_older_ones_stay_on_15() -> Result<()> {
    damaged_pages_void_the_backup_and_older_ones_stay(PgVersion::V15).await
}

#[tokio::test]
async fn fault_27_damaged_pages_void_the_backup_and_older_ones_stay_on_17() -> Result<()> {
    damaged_pages_void_the_backup_and_older_ones_stay(PgVersion::V17).await
}

#[tokio::test]
async fn fault_27_damaged_pages_void_the_backup_and_older_ones_stay_on_18() -> Result<()> {
    damaged_pages_void_the_backup_and_older_ones_stay(PgVersion::V18).await
}

#[tokio::test]
async fn fault_26_without_a_stream_no_backup_begins() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let regions = Regions::start().await?;
    let refused = regions
        .agent(&cluster, "")?
        .arg("backup")
        .output()
        .await?
        .expect_code(1)?;
    ensure!(
        refused.stderr.contains("highwater-agent run"),
        "{}",
        refused.stderr
    );
    ensure!(
        regions
            .servers
            .iter()
            .all(|server| server.objects(BUCKET).is_empty()),
        "something was written"
    );
    Ok(())
}

#[tokio::test]
async fn fault_25_a_killed_server_and_a_killed_agent_leave_nothing_visible() -> Result<()> {
    let mut cluster = PgCluster::builder(PgVersion::V15).start().await?;
    cluster
        .sql("CREATE TABLE large AS SELECT i, repeat(md5(i::text), 12) t FROM generate_series(1, 200000) i")
        .await?;
    let regions = Regions::start().await?;
    let mut agent = running(&regions, &cluster, "").await?;
    // Slow enough to be caught in the middle.
    let slow = "[backup]\nmax_rate = \"8MiB\"\npack_size = \"1MiB\"\n";
    let packs = |regions: &Regions| {
        regions.servers[0]
            .objects(BUCKET)
            .iter()
            .filter(|key| key.contains("/pack/"))
            .count()
    };

    let mut backup = regions.agent(&cluster, slow)?.arg("backup").start()?;
    backup.says("base backup begins", START).await?;
    eventually("the first packs", START, || async {
        (packs(&regions) > 2).then_some(())
    })
    .await?;
    backup.kill9();

    let mut backup = regions.agent(&cluster, slow)?.arg("backup").start()?;
    backup.says("base backup begins", START).await?;
    cluster.kill9();
    let failed = backup.finish(START).await?.expect_code(3)?;
    ensure!(failed.stderr.contains("not visible"), "{}", failed.stderr);
    ensure!(regions.backups(0).is_empty() && regions.backups(1).is_empty());

    // The next one is not bothered by what was left.
    cluster.start_again().await?;
    let again = regions.agent(&cluster, "")?.arg("backup").output().await?;
    ensure!(agent.is_running(), "the agent ended");
    again.expect_code(0)?;
    ensure!(regions.backups(0).len() == 1 && regions.backups(1).len() == 1);
    agent.terminate();
    ensure!(agent.wait_exit(START).await? == 0);
    Ok(())
}

#[tokio::test]
async fn a_region_that_is_away_is_given_up_where_the_policy_allows_it() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let regions = Regions::start().await?;
    let any = "[durability]\npolicy = \"any\"\n";
    let _agent = running(&regions, &cluster, any).await?;
    regions
        .agent(&cluster, "")?
        .arg("backup")
        .output()
        .await?
        .expect_code(0)?;
    regions.servers[1].faults().refuse(true);
    cluster.sql("CREATE TABLE later (i int)").await?;

    let (any, all) = (
        regions.agent(&cluster, any)?.arg("backup"),
        regions.agent(&cluster, "")?.arg("backup"),
    );
    let (any, all) = tokio::join!(any.output(), all.output());
    let any = any?.expect_code(0)?;
    ensure!(
        any.stdout.contains("regions a") && any.stdout.contains("MISSING b"),
        "{}",
        any.said()
    );
    ensure!(
        all?.expect_code(3)?.stderr.contains("region b"),
        "the region is not named"
    );
    ensure!(regions.backups(0).len() == 2 && regions.backups(1).len() == 1);
    Ok(())
}

/// Emptied and written on, as a bucket that somebody replaces.
#[tokio::test]
async fn a_region_that_lost_packs_meanwhile_gets_no_commit_mark() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let regions = Regions::start().await?;
    let _agent = running(&regions, &cluster, "").await?;
    let region = &regions.servers[1];
    region.faults().only_keys("/manifest");
    region.faults().fail_always(Some(503));
    let program = regions.agent(&cluster, "")?.arg("backup");
    let backup = program.output();
    let empty = async {
        let packs = || async {
            let packs = region
                .objects(BUCKET)
                .into_iter()
                .filter(|key| key.contains("/pack/"));
            let (published, packs) = (!regions.backups(0).is_empty(), packs.collect::<Vec<_>>());
            published.then_some(packs)
        };
        let packs = eventually("the base backup in the other region", START, packs).await?;
        ensure!(!packs.is_empty() && packs.iter().all(|key| region.delete(BUCKET, key)));
        region.faults().clear();
        Ok(())
    };
    let (failed, emptied) = tokio::join!(backup, empty);
    emptied?;
    let failed = failed?.expect_code(3)?;
    ensure!(
        failed.stderr.contains("region b") && failed.stderr.contains("is gone"),
        "{}",
        failed.said()
    );
    ensure!(regions.backups(0).len() == 1 && regions.backups(1).is_empty());
    regions
        .agent(&cluster, "")?
        .arg("backup")
        .output()
        .await?
        .expect_code(0)?;
    ensure!(regions.backups(0).len() == 2 && regions.backups(1).len() == 1);
    Ok(())
}

#[tokio::test]
async fn a_standby_can_be_backed_up() -> Result<()> {
    let primary = PgCluster::builder(PgVersion::V15).start().await?;
    primary
        .sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 10000) i")
        .await?;
    let standby = PgCluster::builder(PgVersion::V15).standby_of(&primary).await?;
    let regions = Regions::start().await?;
    let beside = regions
        .agent(&standby, "")?
        .env("HIGHWATER_CLUSTER_STANDBY", "stream");
    let mut agent = beside.arg("run").start()?;
    agent.says("streaming", START).await?;
    // The standby's last restart point must lie in WAL that the agent has seen.
    primary.sql("INSERT INTO t VALUES (1); CHECKPOINT").await?;
    let caught_up = || async {
        let done = regions
            .agent(&standby, "")
            .ok()?
            .args(["--output", "json", "backup"])
            .output()
            .await
            .ok()?;
        (done.code == 0).then_some(done)
    };
    let done = eventually("a base backup of the standby", START * 3, caught_up).await?;
    let report: serde_json::Value = serde_json::from_str(&done.stdout)?;
    ensure!(report["backup"]["from_standby"] == true, "{report}");
    let dir = TestDir::new()?;
    let (backup, _) = regions.rebuild(1, report["backup"]["id"].as_str().context("id")?, dir.path())?;
    ensure!(
        backup.from_standby && backup.label.contains("BACKUP FROM: standby"),
        "{}",
        backup.label
    );
    verified_by_postgresql(&standby, dir.path()).await
}

#[tokio::test]
async fn the_schedule_takes_the_first_backup_at_once() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let regions = Regions::start().await?;
    let mut agent = running(&regions, &cluster, "[backup]\nschedule = \"0 2 1 1 *\"\n").await?;
    agent.says("base backup is complete and visible", START).await?;
    let both = || async { (regions.backups(0).len() == 1 && regions.backups(1).len() == 1).then_some(()) };
    eventually("the backup in both regions", START, both).await?;
    Ok(())
}
