//! Secrets, rights and certificates.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use highwater_tests::process::{self, RunAs};
use highwater_tests::program::Finished;
use highwater_tests::s3::{Rights, Strike};
use highwater_tests::site::{PATIENCE, REGIONS, Site, config, region_config};
use highwater_tests::{PgCluster, Program, S3Server, TestDir};

use crate::support::{VERSION, answers, from_region, leave};

const PASSWORD: &str = "planted-password-of-the-role";

/// Every request is refused with 403 and every program logs at its most talkative: no planted secret appears in
/// any output, in a command line, or in what PostgreSQL shows of its clients.
#[tokio::test]
async fn fault_93_no_secret_is_told_when_everything_is_refused() -> Result<()> {
    let site = Site::start(
        PgCluster::builder(VERSION)
            .hba("local all archiver scram-sha-256\nlocal replication archiver scram-sha-256"),
        16,
    )
    .await?;
    site.primary
        .sql(&format!(
            "CREATE ROLE archiver LOGIN REPLICATION PASSWORD '{PASSWORD}'"
        ))
        .await?;
    let denied = site.regions[0].key_pair(Rights::Nothing).clone();
    let wrong = "planted-secret-that-is-wrong";
    let regions = region_config(
        REGIONS[0],
        "archive",
        &site.regions[0].endpoint(),
        &denied.access_key,
        &denied.secret_key,
    ) + &region_config(
        REGIONS[1],
        "archive",
        &site.regions[1].endpoint(),
        site.regions[1].access_key(),
        wrong,
    );
    let connection = format!(
        "{} password={PASSWORD}",
        site.tap.connection_string_as("archiver")
    );
    let toml = format!(
        "[cluster]\nname = \"orders\"\nconnection = \"{connection}\"\n{regions}[admin]\nlisten = \"off\"\n"
    );
    let trace =
        |program: Program| Ok::<_, anyhow::Error>(program.config(&toml)?.env("HIGHWATER_LOG", "trace"));

    let mut agent = trace(Program::agent()?)?.arg("run").start()?;
    agent.says("SignatureDoesNotMatch", PATIENCE).await?;
    agent.says("AccessDenied", PATIENCE).await?;
    let mut said = process::command_line(nix::unistd::Pid::from_raw(agent.pid()));
    let shown = site
        .primary
        .sql("SELECT row_to_json(a)::text FROM pg_stat_activity a")
        .await?;
    said += &format!("{shown:?}");
    agent.kill9();
    said += &agent.stderr();
    for command in ["check", "backup", "status"] {
        said += &trace(Program::agent()?)?.arg(command).output().await?.said();
    }
    for command in ["list", "plan", "verify"] {
        said += &trace(Program::restore()?)?.arg(command).output().await?.said();
    }
    ensure!(said.contains("TRACE"), "nothing was logged at trace level");
    for secret in [PASSWORD, &denied.secret_key, wrong] {
        let told = said.lines().find(|line| line.contains(secret));
        ensure!(told.is_none(), "a secret was told: {}", told.unwrap_or_default());
    }
    Ok(())
}

/// An unknown authority and the wrong host under a known one are refused before anything is asked, each by its own
/// reason; the right host under a known authority is not.
#[tokio::test]
async fn fault_95_untrusted_endpoints_are_refused_by_default() -> Result<()> {
    let ours = S3Server::start_tls(&["localhost", "127.0.0.1"]).await?;
    let others = S3Server::start_tls(&["somebody.example"]).await?;
    let dir = TestDir::new()?;
    let trusting = |server: &S3Server, file: &str| {
        let pem = server.authority().context("no TLS")?;
        let path = dir.write(file, pem)?;
        Ok::<_, anyhow::Error>(format!("ca_file = \"{}\"\n", path.display()))
    };
    let (known, trusted) = (trusting(&others, "others.pem")?, trusting(&ours, "ours.pem")?);
    RunAs::own_tree(dir.path())?;
    for (server, ca_file, words) in [
        (&ours, "", &["certificate is not accepted", "unknownissuer"][..]),
        (
            &ours,
            known.as_str(),
            &["certificate is not accepted", "unknownissuer"],
        ),
        (
            &others,
            known.as_str(),
            &[
                "certificate is not accepted",
                "not valid for name",
                "somebody.example",
            ],
        ),
    ] {
        let said = listed(server, ca_file).await?;
        answers(&said, 3, words)?;
        ensure!(
            server.counters().total() == 0,
            "it was asked something all the same"
        );
    }
    let said = listed(&ours, &trusted).await?;
    ensure!(
        !said.said().contains("certificate") && ours.counters().total() > 0,
        "the right certificate is refused as well: the test proves nothing\n{}",
        said.said()
    );
    Ok(())
}

/// What `list` says of the archive at an endpoint.
async fn listed(server: &S3Server, ca_file: &str) -> Result<Finished> {
    server.create_bucket("archive");
    let toml = config(None, &[("north", server)]) + ca_file;
    Program::restore()?.config(&toml)?.arg("list").output().await
}

/// Plain http to another machine is refused by both programs, wherever the endpoint was named, before anything is sent;
/// whoever means it says so.
#[tokio::test]
async fn fault_95_plain_http_to_another_machine_must_be_allowed() -> Result<()> {
    const PLAIN: &str = "http://archive.invalid:9000";
    let named = config(None, &[]) + &region_config("north", "archive", PLAIN, "KEY", "secret");
    let nameless = "[cluster]\nname = \"orders\"\n[[region]]\nurl = \"s3://archive/prod\"\n";
    let agent = || {
        Ok::<_, anyhow::Error>((
            Program::agent()?,
            ["--connection", "host=/nonexistent user=x", "status"],
        ))
    };
    let restore = || Ok::<_, anyhow::Error>((Program::restore()?, ["--output", "text", "list"]));
    for (program, arguments) in [agent()?, restore()?] {
        let refused = program.clone().config(&named)?.args(arguments).output().await?;
        answers(&refused, 2, &["allow_http", "unencrypted", "archive.invalid"])?;
        for variable in ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"] {
            let surroundings = program
                .clone()
                .config(nameless)?
                .keys("KEY", "secret")
                .env(variable, PLAIN);
            let refused = surroundings.args(arguments).output().await?;
            answers(&refused, 2, &["allow_http", "unencrypted"])?;
        }
        let allowed = program
            .config(&named)?
            .env("HIGHWATER_REGION_1_ALLOW_HTTP", "true")
            .args(arguments)
            .output()
            .await?;
        ensure!(
            allowed.code != 2 && allowed.said().contains("which allow_http allows"),
            "{}: {}",
            allowed.code,
            allowed.said()
        );
    }
    Ok(())
}

/// Nothing can be changed through the admin endpoint.
#[tokio::test]
async fn fault_100_the_admin_endpoint_changes_nothing() -> Result<()> {
    let region = S3Server::start().await?;
    region.create_bucket("archive");
    let cluster = PgCluster::builder(VERSION).start().await?;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let toml = config(Some(&cluster.connection_string()), &[("north", &region)]);
    let with_port = format!("{toml}[admin]\nlisten = \"127.0.0.1:{port}\"\n");
    let mut agent = Program::agent()?.config(&with_port)?.arg("run").start()?;
    agent.says("streaming", PATIENCE).await?;
    let before = region.objects("archive").len();
    for method in ["POST", "PUT", "DELETE"] {
        for path in ["/status", "/metrics", "/readyz", "/shutdown", "/backup"] {
            let answer = ask(port, method, path).await?;
            ensure!(answer.starts_with("HTTP/1.1 4"), "{method} {path}: {answer}");
        }
    }
    ensure!(ask(port, "GET", "/status").await?.starts_with("HTTP/1.1 200") && agent.is_running());
    ensure!(region.objects("archive").len() >= before);
    agent.kill9();
    Ok(())
}

pub(crate) async fn ask(port: u16, method: &str, path: &str) -> Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Whether the kernel would write a core dump of a process. What lies in the directory of one of which it would not belongs to
/// root, and else to the user of the process.
fn leaves_a_core_dump(pid: i32) -> Result<bool> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let user = directory.metadata()?.uid();
    ensure!(user != 0, "everything of a process of root belongs to root");
    Ok(directory.join("environ").metadata()?.uid() == user)
}

/// Memory holds secrets, WAL and what is restored: neither program leaves it on a disk when it dies. The server that a
/// restore starts has its own way.
#[tokio::test]
async fn fault_96_neither_program_leaves_a_core_dump() -> Result<()> {
    let site = Site::start(PgCluster::builder(VERSION), 16).await?;
    let agent = site.start_agent().await?;
    ensure!(!leaves_a_core_dump(agent.pid())?, "the agent would leave one");
    ensure!(
        leaves_a_core_dump(site.primary.pid().context("no server")?)?,
        "a server that nobody told would leave none: the test proves nothing"
    );
    site.backup().await?;
    site.all_durable().await?;
    leave(agent).await?;

    let place = from_region(&site, 0)?;
    let region = site.regions[0].faults();
    region.strike(1, Strike::HoldBefore);
    let mut asking = place.program()?.arg("list").start()?;
    let struck = tokio::time::timeout(PATIENCE, region.until_struck()).await;
    struck.with_context(|| asking.last_words())?;
    ensure!(!leaves_a_core_dump(asking.pid())?, "a restore would leave one");
    asking.kill9();
    region.clear();

    let run = place
        .program()?
        .args(["run", "--start", "--port", "5432", "--into"])
        .arg(place.data("data"))
        .arg("--socket-directory")
        .arg(place.dir())
        .arg("--bin")
        .arg(VERSION.bin()?);
    let said = run.output().await?;
    let started = PgCluster::attach(VERSION, &place.data("data"), place.dir(), 5432)?;
    said.expect_code(0)?;
    let pid = std::fs::read_to_string(started.data_dir().join("postmaster.pid"))?;
    let pid = pid.lines().next().context("no process id")?.parse()?;
    ensure!(
        leaves_a_core_dump(pid)?,
        "the restored server cannot leave one either, whatever its operator wants"
    );
    Ok(())
}
