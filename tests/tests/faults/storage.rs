//! Stores that answer wrongly, late, or not at all.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_tests::ledger::Expect;
use highwater_tests::process;
use highwater_tests::s3::Operation;
use highwater_tests::site::{BUCKET, PATIENCE, REGIONS, RestoreSite, Site, config};
use highwater_tests::witness::Rules;
use highwater_tests::{Ledger, PgCluster, Program, S3Server, SmallDisk, Witness, archive, lsn, skip};

use crate::support::{VERSION, answers, both_hold, from_both, from_region, leave, one_region_has_everything};

/// One store answers 200 with an error inside, the other one 409 to conditional writes: neither is success, and
/// neither is "exists already".
#[tokio::test]
async fn fault_34_fault_36_errors_in_disguise_are_neither_success_nor_rivals() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let witness = Witness::of(&site, Rules::all());
    for (region, status) in site.regions.iter().zip([200, 409]) {
        region.faults().only(&[Operation::Put]);
        region.faults().fail_every(4, status);
    }
    let agent = site.start_agent().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(40).await?;
    site.backup().await?;
    ledger.grow(60).await?;
    let log = ledger.stop().await;
    let end = site.all_durable().await.with_context(|| agent.last_words())?;
    site.regions.iter().for_each(|region| region.faults().clear());
    both_hold(&site, end).await?;
    witness.satisfied()?;
    leave(agent).await?;
    for index in 0..2 {
        let place = from_region(&site, index)?;
        let restored = place.recovered("data", &[]).await?;
        log.check(&restored, Expect::everything()).await?;
    }
    Ok(())
}

/// A region in a directory whose disk is really full: named with its reason and waited for, filled when there is room, and
/// then whole.
#[tokio::test]
async fn fault_02_a_directory_on_a_full_disk_is_named_and_filled_when_there_is_room() -> Result<()> {
    let Some(disk) = SmallDisk::new(128)? else {
        return skip::not_allowed("nobody may mount a file system on this machine");
    };
    let site = Site::start(PgCluster::builder(VERSION), 1).await?;
    let directory = format!(
        "[[region]]\nname = \"south\"\nurl = \"file://{}/archive\"\n",
        disk.path().display()
    );
    process::run(Path::new("mkdir"), &[disk.path().join("archive")], Path::new("/"))?;
    let connection = site.tap.connection_string_as(&site.user);
    let north = config(Some(&connection), &[(REGIONS[0], &site.regions[0])]);
    let toml = format!("{north}{directory}[admin]\nlisten = \"off\"\n{}", site.settings);
    let program = || Program::agent()?.config(&toml);
    let mut agent = program()?.arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    program()?.arg("backup").output().await?.expect_code(0)?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(20).await?;
    site.all_durable().await?;
    disk.take(u32::try_from(disk.free()? >> 20)?.saturating_sub(4))?;
    let flood = "CREATE TABLE flood AS SELECT decode(string_agg(md5(g::text || r::text), ''), 'hex') AS bytes
        FROM generate_series(1, 6000) r, generate_series(1, 100) g GROUP BY r";
    site.primary.sql(flood).await?;
    agent.says("enlarge, the file system", PATIENCE).await?;
    let waiting = site.position().await?;
    ensure!(
        site.tap.highest_flush() < waiting,
        "more was reported than south holds"
    );
    disk.make_room()?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    leave(agent).await?;
    let place = RestoreSite::with_config(VERSION, &(config(None, &[]) + &directory))?;
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await
        .map(drop)
}

/// There is no spool: with nowhere to put a temporary file, and a working directory and a home that cannot be written to, WAL and
/// a base backup are stored all the same.
#[tokio::test]
async fn fault_30_an_agent_without_a_place_to_write_to_stores_everything() -> Result<()> {
    let Some(disk) = SmallDisk::new(4)? else {
        return skip::not_allowed("nobody may mount a file system on this machine");
    };
    disk.take(u32::try_from(disk.free()? >> 20)?)?;
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let sealed = site.primary.dir().create_dir("sealed")?;
    std::fs::set_permissions(&sealed, std::fs::Permissions::from_mode(0o555))?;
    for place in [disk.path(), sealed.clone()] {
        let file = place.join("file").display().to_string();
        let written = process::run(Path::new("fallocate"), &["-l", "1MiB", &file], Path::new("/"));
        ensure!(
            written.is_err(),
            "{file} could be written: the test proves nothing"
        );
    }
    let there = sealed.display().to_string();
    let homeless = |command: &str| {
        let program = site.agent()?.arg(command).env("TMPDIR", disk.path());
        let into = ["-c", "cd \"$0\" && exec \"$@\"", &there];
        anyhow::Ok(program.env("HOME", &sealed).under("sh", into))
    };
    let mut agent = homeless("run")?.start()?;
    agent.says("streaming", PATIENCE).await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    ledger.grow(30).await?;
    homeless("backup")?.output().await?.expect_code(0)?;
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    leave(agent).await?;
    one_region_has_everything(&site, 1, &log).await
}

/// A store that replaces objects although asked not to is refused before any WAL is stored in it.
#[tokio::test]
async fn fault_37_a_store_that_ignores_conditions_is_refused_by_name() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    site.regions[1].faults().ignore_conditions(true);
    let check = site.agent()?.arg("check").output().await?;
    answers(&check, 1, &[REGIONS[1], "If-None-Match"])?;
    let run = site.agent()?.arg("run").output().await?;
    answers(&run, 1, &[REGIONS[1], "If-None-Match"])?;
    ensure!(
        site.regions[1]
            .objects(BUCKET)
            .iter()
            .all(|key| !key.contains("/wal/"))
    );
    Ok(())
}

/// Lets LIST hide the last WAL that a region holds, and all that was written since. Returns where that WAL begins.
fn hide_last_wal(site: &Site, region: &S3Server) -> Result<u64> {
    let snapshot = region.snapshot();
    let keys = snapshot.keys(BUCKET);
    let written = |key: &String| snapshot.get(BUCKET, key).map_or(0, |object| object.sequence);
    let range = |key: &String| archive::range_of(key, site.segment_size());
    let last = keys
        .iter()
        .max_by_key(|key| range(key).map(|(_, start, end)| (end, start)));
    let (_, start, _) = last.and_then(range).context("no WAL")?;
    let newest = keys.iter().map(written).max().unwrap_or(0);
    region.faults().hide_newest(newest - last.map_or(0, written) + 1);
    Ok(start)
}

/// LIST lags behind by the newest writes, when the agent starts again and when a restore looks for the end. Neither
/// takes the listing's end for the archive's.
#[tokio::test]
async fn fault_38_a_lagging_list_hides_no_acknowledged_wal() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let witness = Witness::of(&site, Rules::all());
    let agent = site.start_agent().await?;
    site.backup().await?;
    let ledger = Ledger::start(&site.primary, 2).await?;
    for _ in 0..4 {
        ledger.grow(20).await?;
        site.all_durable().await?;
    }
    leave(agent).await?;
    let before = site.tap.highest_flush();
    site.regions
        .iter()
        .for_each(|region| region.faults().hide_newest(6));
    let agent = site.start_agent().await?;
    ledger.grow(30).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| agent.last_words())?;
    witness.satisfied()?;
    leave(agent).await?;

    // Restored while LIST shows nothing of the last WAL in either region: all that is left to be seen would start and look
    // whole. It is refused, because the pulses, which are read by name, know of more.
    let promised = site.tap.highest_flush();
    for region in &site.regions {
        let hidden = hide_last_wal(&site, region)?;
        ensure!(
            before <= hidden && hidden < promised,
            "what is hidden was never promised: the test proves nothing"
        );
    }
    let place = from_both(&site)?;
    let run = place.run("lagging", &[]).await?;
    let words = ["is missing", "listings lag", "try again", "--to-lsn"];
    answers(&run, 1, &words)?;
    ensure!(!place.data("lagging").exists(), "the directory was made");
    // What lies before it is no guess.
    let restored = place
        .recovered("before", &["--to-lsn", &lsn::show(before)])
        .await?;
    log.check(&restored, Expect::at_lsn(before)).await?;
    drop(restored);
    site.regions.iter().for_each(|region| region.faults().clear());
    log.check(&place.recovered("data", &[]).await?, Expect::everything())
        .await?;
    Ok(())
}

/// Keys that live 14 seconds, handed out by a program as a token service would: a slow backup, the stream and a
/// restore all go on with the next ones.
#[tokio::test]
async fn fault_43_credentials_that_expire_are_renewed_in_time() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let secret = site.regions[0].secret_key();
    let script = site.primary.dir().write(
        "keys.sh",
        format!(
            "end=$(($(date +%s) + 14))\n\
             printf '{{\"Version\":1,\"AccessKeyId\":\"UNTIL%s\",\"SecretAccessKey\":\"{secret}\",\"Expiration\":\"%s\"}}' \
             \"$end\" \"$(date -u -d @$end +%Y-%m-%dT%H:%M:%SZ)\"\n"
        ),
    )?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    let profile = format!("[default]\ncredential_process = /bin/sh {}\n", script.display());
    let profile = site.primary.dir().write("aws.conf", &profile)?;
    std::fs::set_permissions(&profile, std::fs::Permissions::from_mode(0o644))?;
    let static_keys =
        |line: &&str| !line.starts_with("access_key_id") && !line.starts_with("secret_access_key");
    let without = |toml: String| toml.lines().filter(static_keys).collect::<Vec<_>>().join("\n");
    let with_profile = |program: Program| program.env("AWS_CONFIG_FILE", &profile);

    let toml = without(site.config()) + "\n[backup]\nmax_rate = \"2MiB\"\npack_size = \"1MiB\"\n";
    let agent = with_profile(Program::agent()?.config(&toml)?);
    let began = Instant::now();
    let mut running = agent.clone().arg("run").start()?;
    running.says("streaming", PATIENCE).await?;
    let ledger = Ledger::start(&site.primary, 1).await?;
    agent.arg("backup").output().await?.expect_code(0)?;
    tokio::time::sleep(Duration::from_secs(15).saturating_sub(began.elapsed())).await;
    ledger.grow(20).await?;
    let log = ledger.stop().await;
    site.all_durable().await.with_context(|| running.last_words())?;
    leave(running).await?;

    let toml = without(config(None, &[(REGIONS[0], site.regions[0].as_ref())]));
    let place = RestoreSite::with_config(VERSION, &toml)?;
    let run = with_profile(place.program()?)
        .args(["run", "--into"])
        .arg(place.data("data"));
    // Slow enough to need more keys than the first.
    site.regions[0].faults().delay(Some(Duration::from_secs(2)));
    let began = Instant::now();
    run.output().await?.expect_code(0)?;
    ensure!(began.elapsed() > Duration::from_secs(15), "{:?}", began.elapsed());
    site.regions[0].faults().delay(None);
    // The service that starts the server would have the variable.
    let settings = place.data("data").join("postgresql.auto.conf");
    let (as_written, variable) = (
        "restore_command = '",
        format!("restore_command = 'AWS_CONFIG_FILE={} ", profile.display()),
    );
    let written = std::fs::read_to_string(&settings)?;
    ensure!(written.contains(as_written), "{written}");
    std::fs::write(&settings, written.replace(as_written, &variable))?;
    let mut restored = PgCluster::adopt(VERSION, &place.data("data"))?;
    restored.start_again().await?;
    place.until_writable(&restored).await?;
    let report = log.check(&restored, Expect::everything()).await?;
    ensure!(report.expected > 20, "{report:?}: the test proves little");
    Ok(())
}

/// Endpoints that accept connections and never answer: every question to the archive ends in bounded time, with the
/// region's name, and one that answers is enough where the answer allows it.
#[tokio::test]
async fn fault_45_silent_endpoints_are_given_up_in_bounded_time() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let agent = site.start_agent().await?;
    site.backup().await?;
    site.all_durable().await?;
    leave(agent).await?;
    let regions = [0, 1].map(|index| (REGIONS[index], site.regions[index].as_ref()));
    let toml = config(None, &regions);
    let impatient = toml.replace("[[region]]", "[[region]]\nattempt_timeout = \"1s\"");
    let place = RestoreSite::with_config(VERSION, &impatient)?;
    site.regions[1].faults().freeze();
    let began = Instant::now();
    // The end is not guessed while a region is silent; without that region it is known.
    let refused = place.program()?.arg("plan").output().await?;
    ensure!(refused.code == 3 || refused.code == 1, "{}", refused.said());
    ensure!(refused.said().contains(REGIONS[1]), "{}", refused.said());
    let without = place
        .program()?
        .args(["plan", "--without-region", REGIONS[1]])
        .output()
        .await?;
    ensure!(without.code == 0, "{}", without.said());
    site.regions[0].faults().freeze();
    let said = place.program()?.arg("list").output().await?;
    ensure!(said.code == 3, "{}\n{}", said.code, said.said());
    let took = began.elapsed();
    ensure!(took < Duration::from_secs(90), "three questions took {took:?}");
    Ok(())
}
