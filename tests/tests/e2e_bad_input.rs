//! Bad input gets an answer that names the cause, the right exit code, and changes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_tests::program::Finished;
use highwater_tests::s3::Rights;
use highwater_tests::site::{BUCKET, REGIONS, RestoreSite, Site, config, region_config};
use highwater_tests::{PgCluster, PgVersion, Program, S3Server, SmallDisk, skip};

const DONE: i32 = 0;
const NO: i32 = 1;
const USAGE: i32 = 2;
const TROUBLE: i32 = 3;
const DAMAGE: i32 = 4;

/// The answer has this exit code and names all of `words` (in any case).
fn answers(case: &str, said: &Finished, code: i32, words: &[&str]) -> Result<()> {
    ensure!(
        said.code == code,
        "{case}: exit code {} instead of {code}:\n{}",
        said.code,
        said.said()
    );
    let text = said.said().to_lowercase();
    for word in words {
        ensure!(
            text.contains(&word.to_lowercase()),
            "{case}: the answer does not name {word:?}:\n{}",
            said.said()
        );
    }
    Ok(())
}

async fn region() -> Result<S3Server> {
    let region = S3Server::start().await?;
    region.create_bucket(BUCKET);
    Ok(region)
}

/// `check` with a connection string, and with the regions it may use.
async fn check(connection: &str, region: &S3Server) -> Result<Finished> {
    let toml = config(Some(connection), &[("north", region)]) + "[admin]\nlisten = \"off\"\n";
    Program::agent()?.config(&toml)?.arg("check").output().await
}

#[tokio::test]
async fn fault_33_what_is_wrong_with_postgresql_is_named() -> Result<()> {
    let region = region().await?;
    let cluster = PgCluster::builder(PgVersion::V15)
        .hba("local replication nohba reject\nlocal all wrong scram-sha-256\nlocal replication wrong scram-sha-256")
        .start()
        .await?;
    cluster
        .sql(
            "CREATE ROLE wrong LOGIN REPLICATION PASSWORD 'right';
             CREATE ROLE noright LOGIN;
             CREATE ROLE nohba LOGIN REPLICATION",
        )
        .await?;
    let wrong = cluster.connection_string_as("wrong") + " password=wrong";
    answers(
        "wrong password",
        &check(&wrong, &region).await?,
        NO,
        &["password"],
    )?;
    let noright = cluster.connection_string_as("noright");
    answers(
        "no right",
        &check(&noright, &region).await?,
        NO,
        &["ALTER ROLE", "REPLICATION"],
    )?;
    let nohba = cluster.connection_string_as("nohba");
    answers(
        "no line in pg_hba.conf",
        &check(&nohba, &region).await?,
        NO,
        &["pg_hba.conf"],
    )?;
    answers(
        "nobody there",
        &check("host=/nonexistent user=u", &region).await?,
        NO,
        &["/nonexistent"],
    )?;
    answers(
        "all well",
        &check(&cluster.connection_string(), &region).await?,
        DONE,
        &[],
    )?;
    ensure!(
        region.objects(BUCKET).iter().all(|key| !key.contains("/wal/")),
        "WAL was stored: {:?}",
        region.objects(BUCKET)
    );
    Ok(())
}

#[tokio::test]
async fn fault_33_settings_of_postgresql_that_cannot_work_are_named() -> Result<()> {
    let region = region().await?;
    let minimal = PgCluster::builder(PgVersion::V15)
        .conf("wal_level", "minimal")
        .conf("max_wal_senders", "0")
        .start()
        .await?;
    answers(
        "minimal",
        &check(&minimal.connection_string(), &region).await?,
        NO,
        &[
            "wal_level = 'replica'",
            "max_wal_senders = 10",
            "switched off",
            "restart",
        ],
    )?;
    // Who has not asked `check` first reads it in the answer of the command.
    let toml = config(Some(&minimal.connection_string()), &[("north", &region)]);
    let backup = Program::agent()?.config(&(toml + "[admin]\nlisten = \"off\"\n"))?;
    answers(
        "backup",
        &backup.arg("backup").output().await?,
        TROUBLE,
        &["wal_level = replica", "max_wal_senders = 10"],
    )?;
    drop(minimal);
    let no_slots = PgCluster::builder(PgVersion::V15)
        .conf("max_replication_slots", "0")
        .start()
        .await?;
    answers(
        "no slots",
        &check(&no_slots.connection_string(), &region).await?,
        NO,
        &["max_replication_slots"],
    )?;
    drop(no_slots);

    let full = PgCluster::builder(PgVersion::V15)
        .conf("max_replication_slots", "1")
        .conf("max_wal_senders", "1")
        .start()
        .await?;
    full.sql("SELECT pg_create_physical_replication_slot('taken')")
        .await?;
    answers(
        "slots taken",
        &check(&full.connection_string(), &region).await?,
        NO,
        &["max_replication_slots"],
    )
}

#[tokio::test]
async fn fault_24_what_is_wrong_with_a_region_is_named() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let region = region().await?;
    let denied = region.key_pair(Rights::Nothing).clone();
    let endpoint = region.endpoint();
    let (access, secret) = (region.access_key(), region.secret_key());
    let cases = [
        (
            "no such bucket",
            region_config("north", "missing", &endpoint, access, secret),
            "NoSuchBucket",
        ),
        (
            "denied",
            region_config("north", BUCKET, &endpoint, &denied.access_key, &denied.secret_key),
            "denied",
        ),
        (
            "wrong secret",
            region_config("north", BUCKET, &endpoint, access, "wrong"),
            "signature",
        ),
        (
            "unreachable",
            region_config("north", BUCKET, "http://127.0.0.1:9", access, secret),
            "connect",
        ),
    ];
    for (case, regions, word) in cases {
        let toml = config(Some(&cluster.connection_string()), &[]) + &regions + "[admin]\nlisten = \"off\"\n";
        let said = Program::agent()?.config(&toml)?.arg("check").output().await?;
        answers(case, &said, NO, &[word, "north"])?;
        let slots = cluster.value("SELECT count(*) FROM pg_replication_slots").await?;
        ensure!(slots == "0", "{case}: a slot was left behind");
    }
    Ok(())
}

#[tokio::test]
async fn fault_80_a_configuration_that_makes_no_sense_is_refused() -> Result<()> {
    let region = region().await?;
    let good = config(Some("host=/nonexistent"), &[("north", &region)]);
    let cases = [
        (
            "unknown key",
            good.clone() + "[wal]\nflush_intervall = \"1s\"\n",
            "flush_interval",
        ),
        (
            "no unit",
            good.clone() + "[wal]\nflush_interval = 1\n",
            "flush_interval",
        ),
        (
            "unknown codec",
            good.clone() + "[wal]\ncompression = \"brotli\"\n",
            "brotli",
        ),
        ("policy", good.clone() + "[durability]\npolicy = 3\n", "policy"),
        ("name", good.replace("\"orders\"", "\"Or/ders\""), "name"),
        ("not TOML", "[cluster\n".to_owned(), "line 1"),
    ];
    for (case, toml, word) in cases {
        for program in [
            Program::agent()?.config(&toml)?.arg("check"),
            Program::restore()?.config(&toml)?.arg("list"),
        ] {
            answers(case, &program.output().await?, USAGE, &[word])?;
        }
    }
    let said = Program::restore()?
        .args(["--config", "/nonexistent.toml", "list"])
        .output()
        .await?;
    answers("no file", &said, USAGE, &["/nonexistent.toml"])
}

/// Every key of both regions with its bytes.
fn contents(site: &Site) -> [BTreeMap<String, Vec<u8>>; 2] {
    site.snapshots().map(|snapshot| {
        let stored = |key: String| {
            let object = snapshot.get(BUCKET, &key)?;
            Some((key, object.bytes.to_vec()))
        };
        snapshot.keys(BUCKET).into_iter().filter_map(stored).collect()
    })
}

#[tokio::test]
async fn fault_48_a_region_of_another_cluster_is_refused() -> Result<()> {
    let site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let mut agent = site.start_agent().await?;
    site.all_durable().await?;
    agent.terminate();
    ensure!(
        agent.wait_exit(Duration::from_secs(60)).await? == DONE,
        "{}",
        agent.last_words()
    );
    let before = contents(&site);

    let other = PgCluster::builder(PgVersion::V15).start().await?;
    let regions: Vec<_> = REGIONS
        .iter()
        .zip(&site.regions)
        .map(|(name, region)| (*name, region.as_ref()))
        .collect();
    let toml = config(Some(&other.connection_string()), &regions) + "[admin]\nlisten = \"off\"\n";
    let theirs = site
        .primary
        .value("SELECT system_identifier FROM pg_control_system()")
        .await?;
    for (command, wanted) in [("check", NO), ("run", DAMAGE), ("backup", DAMAGE)] {
        let mut agent = Program::agent()?.config(&toml)?.arg(command).start()?;
        let code = agent
            .wait_exit(Duration::from_secs(60))
            .await
            .with_context(|| command.to_owned())?;
        let said = format!("{}{}", agent.stdout(), agent.last_words());
        ensure!(
            code == wanted,
            "{command}: exit code {code} instead of {wanted}:\n{said}"
        );
        ensure!(
            said.contains(&theirs),
            "{command} does not name the other cluster {theirs}:\n{said}"
        );
    }
    ensure!(before == contents(&site), "something was written");
    Ok(())
}

/// A site with one backup and some WAL after it, whose agent has left in good order.
async fn archived() -> Result<Site> {
    let site = Site::start(PgCluster::builder(PgVersion::V15), 16).await?;
    let mut agent = site.start_agent().await?;
    site.primary
        .sql("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS id")
        .await?;
    site.backup().await?;
    site.primary
        .sql("INSERT INTO kept SELECT generate_series(1, 1000)")
        .await?;
    site.all_durable().await?;
    agent.terminate();
    ensure!(
        agent.wait_exit(Duration::from_secs(60)).await? == DONE,
        "{}",
        agent.stderr()
    );
    Ok(site)
}

fn north(site: &Site) -> Result<RestoreSite> {
    RestoreSite::new(PgVersion::V15, &[(REGIONS[0], site.regions[0].as_ref())])
}

#[tokio::test]
async fn fault_84_targets_that_make_no_sense_or_cannot_be_reached_are_refused() -> Result<()> {
    let site = archived().await?;
    let place = north(&site)?;
    let cases: [Case; 9] = [
        ("unparsable LSN", &["--to-lsn", "nonsense"], USAGE, "nonsense"),
        (
            "two targets",
            &["--to-lsn", "0/1", "--to-time", "2026-11-20T14:00:00Z"],
            USAGE,
            "--to-",
        ),
        ("unknown action", &["--action", "explode"], USAGE, "explode"),
        ("past the end", &["--to-lsn", "FF/0"], NO, "FF/0"),
        ("before the backup", &["--to-lsn", "0/1"], NO, "0/1"),
        (
            "in the past",
            &["--to-time", "2001-01-01T00:00:00Z"],
            NO,
            "2001-01-01",
        ),
        ("unknown timeline", &["--timeline", "7"], NO, "7"),
        (
            "unknown name",
            &["--to-name", "no-such-point"],
            NO,
            "no-such-point",
        ),
        (
            "unknown transaction",
            &["--to-xid", "4000000000"],
            NO,
            "4000000000",
        ),
    ];
    are_refused(&place, &cases).await
}

#[tokio::test]
async fn fault_58_times_without_zone_or_sense_are_refused() -> Result<()> {
    let site = archived().await?;
    let place = north(&site)?;
    let cases: [Case; 6] = [
        ("unparsable", &["--to-time", "yesterday"], USAGE, "yesterday"),
        ("no zone", &["--to-time", "2026-11-20T14:00:00"], USAGE, "zone"),
        (
            "an hour that is none",
            &["--to-time", "2026-11-20 13am Z"],
            USAGE,
            "13am",
        ),
        (
            "a day that is none",
            &["--to-time", "2026-02-30T14:00:00Z"],
            USAGE,
            "02-30",
        ),
        (
            "a zone by its name",
            &["--to-time", "2026-10-25 02:30:00 Europe/Berlin"],
            USAGE,
            "Europe/Berlin",
        ),
        (
            "another zone, told in UTC",
            &["--to-time", "2001-01-01T01:30:00+02:00"],
            NO,
            "2000-12-31T23:30:00",
        ),
    ];
    are_refused(&place, &cases).await
}

/// What it is about, the target, the exit code, and a word that the answer says.
type Case<'a> = (&'a str, &'a [&'a str], i32, &'a str);

async fn are_refused(place: &RestoreSite, cases: &[Case<'_>]) -> Result<()> {
    for (case, target, code, word) in cases {
        let plan = place.program()?.arg("plan").args(*target).output().await?;
        answers(&format!("plan, {case}"), &plan, *code, &[word])?;
        let run = place.run("never", target).await?;
        answers(&format!("run, {case}"), &run, *code, &[word])?;
        ensure!(!place.data("never").exists(), "{case}: the directory was made");
    }
    Ok(())
}

#[tokio::test]
async fn fault_59_a_directory_in_use_is_refused() -> Result<()> {
    let site = archived().await?;
    let place = north(&site)?;
    let busy = place.data("busy");
    std::fs::create_dir(&busy)?;
    std::fs::write(busy.join("precious"), "content")?;
    answers(
        "not empty",
        &place.run("busy", &[]).await?,
        USAGE,
        &["busy is not empty", "precious", "nothing was written"],
    )?;
    ensure!(std::fs::read_to_string(busy.join("precious"))? == "content");
    ensure!(std::fs::read_dir(&busy)?.count() == 1, "something was written");
    let data = site.primary.data_dir();
    let program = place.program()?.args(["run", "--into"]).arg(data);
    let pid = site.primary.pid().context("the primary is down")?;
    answers(
        "a running server",
        &program.output().await?,
        USAGE,
        &[
            &format!("a server with process id {pid} runs on {}", data.display()),
            "nothing was written",
        ],
    )?;
    ensure!(site.primary.value("SELECT count(*) FROM kept").await? == "2000");
    Ok(())
}

#[tokio::test]
async fn fault_40_damage_in_the_only_region_is_never_restored() -> Result<()> {
    let site = archived().await?;
    let region = &site.regions[0];
    let place = north(&site)?;
    let healthy = region.snapshot();
    let of = |part: &str| -> Result<String> {
        let keys = region.objects(BUCKET);
        keys.into_iter()
            .rfind(|key| key.contains(part))
            .with_context(|| format!("no object {part}"))
    };
    for part in ["/pack/", "/manifest", "/wal/"] {
        let key = of(part)?;
        for (case, change) in [
            (
                "flipped",
                (|bytes: &mut Vec<u8>| {
                    let at = bytes.len() / 2;
                    bytes[at] ^= 1;
                }) as fn(&mut Vec<u8>),
            ),
            ("cut", |bytes| bytes.truncate(bytes.len() - 1)),
            ("empty", Vec::clear),
        ] {
            region.alter(BUCKET, &key, change);
            let name = format!("{case}{}", part.replace('/', "-"));
            let said = place.run(&name, &[]).await?;
            // WAL is read by PostgreSQL itself, later: then it must not get to the end.
            if said.code == DONE {
                ensure!(part == "/wal/", "{case} {key}: restored\n{}", said.said());
                let mut cluster = PgCluster::adopt(PgVersion::V15, &place.data(&name))?;
                ensure!(
                    cluster.start_again().await.is_err(),
                    "{case} {key}: the server came up"
                );
            } else {
                answers(&format!("{case} {key}"), &said, DAMAGE, &[&key[key.len() - 12..]])?;
            }
            let verify = place.program()?.arg("verify").output().await?;
            ensure!(
                verify.code == NO || verify.code == DAMAGE,
                "verify found nothing: {case} {key}"
            );
            region.put(
                BUCKET,
                &key,
                healthy.get(BUCKET, &key).context("gone")?.bytes.clone(),
            );
        }
    }
    answers(
        "healthy again",
        &place.program()?.arg("verify").output().await?,
        DONE,
        &[],
    )
}

#[tokio::test]
async fn fault_83_a_newer_format_is_named() -> Result<()> {
    let site = archived().await?;
    let region = &site.regions[0];
    let key = region
        .objects(BUCKET)
        .into_iter()
        .find(|key| key.contains("/pack/"))
        .context("no pack")?;
    // Version, then the checksum of the header over it (FORMAT.md: u16 at 8, CRC-32 at 124).
    region.alter(BUCKET, &key, |bytes| {
        bytes[8] = 9;
        let crc = crc32fast::hash(&bytes[..124]).to_le_bytes();
        bytes[124..128].copy_from_slice(&crc);
        let end = bytes.len();
        let crc = crc32fast::hash(&bytes[..end - 4]).to_le_bytes();
        bytes[end - 4..].copy_from_slice(&crc);
    });
    let said = north(&site)?.run("data", &[]).await?;
    answers("newer format", &said, DAMAGE, &["version 9"])
}

#[tokio::test]
async fn fault_71_a_disk_that_is_too_small_is_named() -> Result<()> {
    let Some(disk) = SmallDisk::new(10)? else {
        return skip::not_allowed("nobody may mount a file system on this machine");
    };
    let site = archived().await?;
    let place = north(&site)?;
    let into = disk.inner_path().join("data");
    let Some(restore) = disk.inside(place.program()?.args(["run", "--into"]).arg(into)) else {
        return skip::not_allowed("users may have no namespaces on this machine");
    };
    answers(
        "small disk",
        &restore.output().await?,
        NO,
        &["bytes free", "nothing was written", "make room"],
    )?;
    ensure!(!disk.path().join("data").exists(), "the directory was made");
    Ok(())
}
