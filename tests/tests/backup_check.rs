//! `check`, `status` and `decommission` of the built agent, against servers that lack one thing each.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use highwater_pgwire::{ConnInfo, Connection, Mode};
use highwater_tests::clock::eventually;
use highwater_tests::process::{self, Process};
use highwater_tests::program::Finished;
use highwater_tests::{PgCluster, PgVersion, Program, Stop, TestDir};
use nix::sys::signal::Signal;

const START: Duration = Duration::from_secs(30);

fn agent(connection: &str, regions: &TestDir) -> Result<Program> {
    let config = format!(
        "[cluster]\nname = \"orders\"\nconnection = \"{connection}\"\n\
         [[region]]\nname = \"a\"\nurl = \"file://{}\"\n[admin]\nlisten = \"off\"\n",
        regions.create_dir("a")?.display()
    );
    Program::agent()?.config(&config)
}

async fn check(connection: &str) -> Result<Finished> {
    let dir = TestDir::new()?;
    agent(connection, &dir)?.arg("check").output().await
}

fn says(finished: &Finished, verdict: &str, words: &[&str]) -> Result<()> {
    let found = finished.stdout.lines().any(|line| line.starts_with(verdict));
    ensure!(
        found && words.iter().all(|word| finished.stdout.contains(word)),
        "{verdict} {words:?} in:\n{}",
        finished.said()
    );
    Ok(())
}

#[tokio::test]
async fn a_prepared_server_is_ready() -> Result<()> {
    for version in PgVersion::installed()? {
        let cluster = PgCluster::builder(version).start().await?;
        cluster.sql("CREATE ROLE plain LOGIN REPLICATION").await?;
        let done = check(&cluster.connection_string_as("plain"))
            .await?
            .expect_code(0)?;
        ensure!(
            done.stdout.trim_end().ends_with("ready") && !done.stdout.contains("FAIL"),
            "{}",
            done.stdout
        );
    }
    Ok(())
}

#[tokio::test]
async fn fault_33_each_missing_thing_is_named_with_its_cure() -> Result<()> {
    let hba = "local all secret scram-sha-256\nlocal replication secret scram-sha-256\nlocal replication nohba reject";
    let cluster = PgCluster::builder(PgVersion::V15).hba(hba).start().await?;
    cluster
        .sql("CREATE ROLE secret LOGIN REPLICATION PASSWORD 'right'; CREATE ROLE norepl LOGIN; CREATE ROLE nohba LOGIN REPLICATION")
        .await?;
    let wrong = format!("{} password=wrong", cluster.connection_string_as("secret"));
    says(
        &check(&wrong).await?.expect_code(1)?,
        "FAIL  password",
        &[".pgpass"],
    )?;
    let done = check(&cluster.connection_string_as("norepl"))
        .await?
        .expect_code(1)?;
    says(&done, "FAIL  role", &["ALTER ROLE \"norepl\" REPLICATION;"])?;
    let done = check(&cluster.connection_string_as("nohba"))
        .await?
        .expect_code(1)?;
    says(&done, "FAIL  pg_hba.conf", &["local  replication  nohba"])?;
    let gone = "host=/nowhere port=1 user=x connect_timeout=2";
    says(
        &check(gone).await?.expect_code(1)?,
        "FAIL  connection",
        &["check that PostgreSQL runs"],
    )?;
    Ok(())
}

#[tokio::test]
async fn fault_33_settings_and_exhausted_limits_are_named() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15)
        .conf("max_replication_slots", "1")
        .start()
        .await?;
    cluster
        .sql("SELECT pg_create_physical_replication_slot('other')")
        .await?;
    let done = check(&cluster.connection_string()).await?.expect_code(1)?;
    says(&done, "FAIL  max_replication_slots", &["all 1 slots are in use"])
}

/// Does what `check` printed: every statement, and a restart.
async fn cured(cluster: &mut PgCluster, said: &Finished) -> Result<()> {
    let statements = said.stdout.lines().filter_map(|line| {
        let line = line.trim_start().strip_prefix("-> ")?;
        line.starts_with("ALTER SYSTEM").then_some(line)
    });
    for statement in statements.clone() {
        cluster.sql(statement).await?;
    }
    ensure!(statements.count() > 0, "no cure in:\n{}", said.said());
    ensure!(said.stdout.contains("restart PostgreSQL"), "{}", said.said());
    cluster.stop(Stop::Fast).await?;
    cluster
        .start_again()
        .await
        .with_context(|| format!("the cure stops the server:\n{}", said.stdout))
}

/// PostgreSQL that has `wal_level = minimal` starts with no walsenders only, so that neither setting can be had alone. A role
/// that only `replication` lines let in learns nothing from SQL: what it is told must do as well.
#[tokio::test]
async fn fault_33_walsenders_that_are_switched_off_come_back_by_the_printed_cure() -> Result<()> {
    for (version, role) in [
        (PgVersion::V15, "postgres"),
        (PgVersion::V15, "streams"),
        (PgVersion::V18, "postgres"),
    ] {
        let mut cluster = PgCluster::builder(version)
            .conf("wal_level", "minimal")
            .conf("max_wal_senders", "0")
            .hba("local all streams reject")
            .start()
            .await?;
        cluster.sql("CREATE ROLE streams LOGIN REPLICATION").await?;
        let connection = cluster.connection_string_as(role);
        let done = check(&connection).await?.expect_code(1)?;
        says(
            &done,
            "FAIL  max_wal_senders",
            &["switched off", "wal_level = 'replica'", "max_wal_senders = 10;"],
        )
        .context(version)?;
        if role == "postgres" {
            says(&done, "FAIL  wal_level", &["minimal"])?;
        }
        cured(&mut cluster, &done).await.context(version)?;
        check(&connection).await?.expect_code(0).context(version)?;
    }
    Ok(())
}

#[tokio::test]
async fn fault_33_walsenders_that_are_all_taken_are_told_from_those_that_are_switched_off() -> Result<()> {
    let mut cluster = PgCluster::builder(PgVersion::V15)
        .conf("max_wal_senders", "2")
        .start()
        .await?;
    let connection = cluster.connection_string();
    let server = ConnInfo::resolve(Some(&connection))?;
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(Connection::connect(&server, Mode::Replication).await?);
    }
    let done = check(&connection).await?.expect_code(1)?;
    says(
        &done,
        "FAIL  max_wal_senders",
        &[
            "(currently 2)",
            "every walsender is taken",
            "max_wal_senders = 10;",
        ],
    )?;
    ensure!(
        !done.stdout.contains("switched off") && !done.stdout.contains("ALTER SYSTEM SET wal_level"),
        "{}",
        done.stdout
    );
    says(&done, "ok    wal_level", &["replica"])?;
    drop(held);
    cured(&mut cluster, &done).await?;
    check(&connection).await?.expect_code(0).map(drop)
}

#[tokio::test]
async fn fault_48_a_region_of_another_cluster_is_refused_and_nothing_is_written() -> Result<()> {
    let (first, second) = (
        PgCluster::builder(PgVersion::V15),
        PgCluster::builder(PgVersion::V15),
    );
    let (first, second) = (first.start().await?, second.start().await?);
    let dir = TestDir::new()?;
    let mut running = agent(&first.connection_string(), &dir)?.arg("run").start()?;
    running.says("streaming", START).await?;
    running.terminate();
    running.wait_exit(START).await?;
    let ids = [
        first
            .value("SELECT system_identifier FROM pg_control_system()")
            .await?,
        second
            .value("SELECT system_identifier FROM pg_control_system()")
            .await?,
    ];
    let done = agent(&second.connection_string(), &dir)?
        .arg("check")
        .output()
        .await?
        .expect_code(1)?;
    says(&done, "FAIL  region a", &[&ids[0], &ids[1]])?;
    let done = agent(&second.connection_string(), &dir)?
        .arg("backup")
        .output()
        .await?
        .expect_code(4)?;
    ensure!(
        done.stderr.contains(&ids[0]) && done.stderr.contains(&ids[1]),
        "{}",
        done.stderr
    );
    ensure!(
        !dir.join("a/orders").join(&ids[1]).exists(),
        "something was written"
    );
    Ok(())
}

#[tokio::test]
async fn status_and_decommission_follow_the_agent() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let dir = TestDir::new()?;
    let program = |command: &[&str]| anyhow::Ok(agent(&cluster.connection_string(), &dir)?.args(command));
    let nothing = program(&["status"])?.output().await?.expect_code(1)?;
    ensure!(nothing.stdout.contains("BREACHED"), "{}", nothing.stdout);

    let mut running = program(&["run"])?.start()?;
    running.says("streaming", START).await?;
    cluster
        .sql("CREATE TABLE t (i int); INSERT INTO t VALUES (1)")
        .await?;
    // All WAL is stored, and nothing could be restored.
    let lacking = || async {
        let done = program(&["status"]).ok()?.output().await.ok()?;
        let only = done.stdout.contains("BREACHED: there is no base backup");
        (only && done.code == 1).then_some(())
    };
    eventually("the want of a base backup", START, lacking).await?;
    program(&["backup"])?.output().await?.expect_code(0)?;
    let kept = || async {
        let done = program(&["status", "--output", "json"])
            .ok()?
            .output()
            .await
            .ok()?;
        (done.code == 0).then_some(done)
    };
    let done = eventually("the recovery point", START, kept).await?;
    let document: serde_json::Value = serde_json::from_str(&done.stdout)?;
    ensure!(
        document["version"] == 1
            && document["slot"]["active_pid"].is_number()
            && document["regions"][0]["newest_backup"] == document["last_backup"]["id"],
        "{document}"
    );

    let busy = program(&["decommission"])?.output().await?.expect_code(1)?;
    ensure!(busy.stderr.contains("--force"), "{}", busy.stderr);
    running.terminate();
    ensure!(running.wait_exit(START).await? == 0);
    let done = program(&["decommission"])?.output().await?.expect_code(0)?;
    ensure!(
        done.stdout.contains("is dropped") && done.stdout.contains("everything under"),
        "{}",
        done.stdout
    );
    ensure!(cluster.value("SELECT count(*) FROM pg_replication_slots").await? == "0");
    program(&["decommission"])?.output().await?.expect_code(0)?;
    Ok(())
}

/// Two clusters of one machine whose agents have the same port: the one whose agent does not run is not told by the
/// other's that all is well.
#[tokio::test]
async fn another_clusters_agent_at_the_port_says_nothing_of_this_one() -> Result<()> {
    let (first, second) = (
        PgCluster::builder(PgVersion::V15).start().await?,
        PgCluster::builder(PgVersion::V15).start().await?,
    );
    let (dir, other) = (TestDir::new()?, TestDir::new()?);
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let listen = format!("admin.listen=127.0.0.1:{port}");
    let at = |cluster: &PgCluster, regions| {
        anyhow::Ok(agent(&cluster.connection_string(), regions)?.args(["--set", &listen]))
    };
    let running = at(&first, &dir)?.arg("run").start()?;
    let heard = || async {
        let status = at(&first, &dir).ok()?.args(["--output", "json", "status"]);
        let document: serde_json::Value = serde_json::from_str(&status.output().await.ok()?.stdout).ok()?;
        (document["agent"]["ready"] == true).then_some(())
    };
    eventually("the agent to be ready", START, heard).await?;
    for (name, words) in [
        ("billing", "the agent of cluster orders"),
        ("orders", "not that of system identifier"),
    ] {
        let status = at(&second, &other)?.args(["--cluster", name, "status"]);
        let status = status.output().await?.expect_code(1)?;
        ensure!(
            status.stdout.contains(words)
                && status
                    .stdout
                    .contains("BREACHED: no agent of this cluster answers"),
            "{}",
            status.said()
        );
    }
    drop(running);
    Ok(())
}

const SLOTS: &str = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'highwater'";

/// A slot of the agent's name that is not the agent's: a logical one, one that another program streams from, and one on
/// another server than the archive's.
#[tokio::test]
async fn fault_81_decommission_leaves_the_slots_of_others_alone() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15)
        .conf("wal_level", "logical")
        .start()
        .await?;
    let dir = TestDir::new()?;
    let refused = async |arguments: &[&str], code: i32, words: &str| -> Result<()> {
        let done = agent(&cluster.connection_string(), &dir)?.args(arguments);
        let done = done.output().await?.expect_code(code)?;
        ensure!(done.stderr.contains(words), "not {words}: {}", done.said());
        ensure!(
            cluster.value(SLOTS).await? == "1",
            "it is dropped: {}",
            done.said()
        );
        Ok(())
    };
    cluster
        .sql("SELECT pg_create_logical_replication_slot('highwater', 'test_decoding')")
        .await?;
    refused(&["decommission"], 1, "logical").await?;
    refused(&["decommission", "--force"], 1, "logical").await?;
    cluster
        .sql("SELECT pg_drop_replication_slot('highwater')")
        .await?;

    cluster
        .sql("SELECT pg_create_physical_replication_slot('highwater', true)")
        .await?;
    let mut command = process::command(&cluster.bin().join("pg_receivewal"), "KILL");
    command
        .arg("--dbname")
        .arg(cluster.connection_string())
        .arg("-D")
        .arg(dir.create_dir("received")?)
        .args(["--slot", "highwater", "--no-loop"])
        .current_dir(dir.path())
        .stderr(std::process::Stdio::null());
    let mut receiver = Process::start(command)?;
    let held = || async {
        let active = "SELECT active FROM pg_replication_slots WHERE slot_name = 'highwater'";
        (cluster.value(active).await.ok()? == "t").then_some(())
    };
    eventually("the slot to be used", START, held).await?;
    refused(&["decommission", "--force"], 1, "pg_receivewal").await?;
    ensure!(receiver.exited().is_none(), "its connection was ended");
    receiver.kill9();
    drop(receiver);

    // The archive of this name is another server's.
    dir.create_dir("a/orders/1")?;
    dir.write("a/orders/1/identity.json", "{}")?;
    refused(&["decommission", "--force"], 4, "system identifier 1").await
}

/// A running agent makes the slot anew, so that nothing is done by dropping it: it is heard at its endpoint, and without one it
/// shows by the new slot.
#[tokio::test]
async fn fault_81_decommission_beside_a_running_agent_is_refused_or_seen_to_fail() -> Result<()> {
    let cluster = PgCluster::builder(PgVersion::V15).start().await?;
    let dir = TestDir::new()?;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let pid = || cluster.value("SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'highwater'");
    for (listen, outcomes) in [
        (
            format!("127.0.0.1:{port}"),
            ["the agent of this cluster answers"; 2],
        ),
        ("off".to_owned(), ["is there again", "is in use again"]),
    ] {
        let listen = format!("admin.listen={listen}");
        let program = || anyhow::Ok(agent(&cluster.connection_string(), &dir)?.args(["--set", &listen]));
        let mut running = program()?.arg("run").start()?;
        running.says("streaming timeline", START).await?;
        let before = pid().await?;
        let done = program()?.args(["decommission", "--force"]);
        let done = done.output().await?.expect_code(1)?;
        ensure!(
            outcomes.iter().any(|outcome| done.stderr.contains(outcome)) && done.stdout.is_empty(),
            "{}",
            done.said()
        );
        ensure!(
            listen.ends_with("off") || pid().await? == before,
            "the stream of an agent that answers was ended"
        );
        running.terminate();
        ensure!(running.wait_exit(START).await? == 0, "{}", running.last_words());
        program()?.arg("decommission").output().await?.expect_code(0)?;
        ensure!(cluster.value(SLOTS).await? == "0");
    }
    Ok(())
}

/// A server that takes the connection and says nothing: whoever waits for the answer may leave.
#[tokio::test]
async fn questions_end_when_they_are_told_to_stop() -> Result<()> {
    for (command, signal) in [
        ("check", Signal::SIGTERM),
        ("status", Signal::SIGINT),
        ("decommission", Signal::SIGTERM),
    ] {
        let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let connection = format!(
            "host=127.0.0.1 port={} user=nobody sslmode=disable connect_timeout=60",
            silent.local_addr()?.port()
        );
        let dir = TestDir::new()?;
        let mut asking = agent(&connection, &dir)?.arg(command).start()?;
        let (asked, _) = tokio::time::timeout(START, silent.accept()).await??;
        asking.signal(signal);
        let code = asking.wait_exit(Duration::from_secs(10)).await?;
        ensure!(
            code == 3
                && asking.stderr().contains("highwater-agent: stopped")
                && !asking.stderr().contains("last bytes"),
            "{command}: {code} {}",
            asking.last_words()
        );
        drop(asked);
    }
    Ok(())
}
