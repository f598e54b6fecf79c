//! `highwater-agent`: see the library.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use highwater_agent::cli::{Cli, Command, LogFormat, Output};
use highwater_agent::clock::Clock;
use highwater_agent::error::{AgentError, Result};
use highwater_agent::run::{self, Options};
use highwater_agent::{backup, check, decommission, status};
use highwater_config::{Config, Exit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    keep_memory_private();
    let cli = Cli::parse();
    log_to_stderr(cli.global.log_format);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&AgentError::Bug(format!("the runtime cannot start: {error}"))),
    };
    let result = runtime.block_on(on_a_worker(execute(cli)));
    // Uploads that hang must not keep a process that has said its last word.
    runtime.shutdown_background();
    match result {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(error) => fail(&error),
    }
}

/// Memory holds keys, passwords and WAL: the kernel writes none of it to a disk when the process dies, and shows it to no
/// other process of the same user. A limit on the size of core dumps would not do: the kernel passes it over where a
/// program takes them. What this process starts has its own way again.
fn keep_memory_private() {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// Runs the command where the sockets' events arrive. On the thread that only waits for the runtime every message of
/// the server would cost two more switches between threads.
async fn on_a_worker(command: impl Future<Output = Result<Exit>> + Send + 'static) -> Result<Exit> {
    tokio::spawn(command)
        .await
        .map_err(|error| AgentError::Bug(format!("the command ended abnormally: {error}")))?
}

#[expect(clippy::print_stderr, reason = "the answer to the person at the terminal")]
fn fail(error: &AgentError) -> ExitCode {
    eprintln!("highwater-agent: {error}");
    ExitCode::from(error.exit().code())
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_env("HIGHWATER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .init(),
        LogFormat::Json => builder.json().init(),
    }
}

async fn execute(cli: Cli) -> Result<Exit> {
    let config = cli.global.load()?;
    let unknown = highwater_config::unknown_variables(
        std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()),
        &["HIGHWATER_LOG", "HIGHWATER_LOG_FORMAT"],
    );
    for warning in unknown {
        tracing::warn!("{warning}");
    }
    let cancel = CancellationToken::new();
    stop_on_signal(&cli.command, cancel.clone());
    command(cli.command, config, cli.global.output, cancel).await
}

async fn command(
    command: Command,
    config: Config,
    output: Output,
    cancel: CancellationToken,
) -> Result<Exit> {
    match command {
        Command::Run {
            new_lineage,
            take_over,
        } => {
            let options = Options {
                new_lineage,
                take_over,
            };
            Box::pin(run::run(config, options, cancel)).await?;
            tracing::info!("stopped");
            Ok(Exit::Done)
        }
        Command::Check { new_lineage } => {
            let report = unless_stopped(&cancel, check::run(&config, new_lineage)).await?;
            print(output, &report)?;
            Ok(report.exit())
        }
        Command::Backup { spread_checkpoint } => {
            print(
                output,
                &backup::command::backup(&config, spread_checkpoint, cancel).await?,
            )?;
            Ok(Exit::Done)
        }
        Command::Status => {
            let clock = Clock::system();
            let status = unless_stopped(&cancel, status::run(&config, &clock)).await??;
            print(output, &status)?;
            Ok(status.exit())
        }
        Command::Decommission { force } => {
            let done = unless_stopped(&cancel, decommission::run(&config, force)).await??;
            print(output, &done)?;
            Ok(done.exit())
        }
    }
}

/// A question that nobody waits for any more has no answer; nothing has to be brought to an end.
async fn unless_stopped<T>(cancel: &CancellationToken, answer: impl Future<Output = T>) -> Result<T> {
    let answer = cancel.run_until_cancelled(answer).await;
    answer.ok_or(AgentError::Cancelled)
}

/// The answer to a command: text for people, or one JSON document.
fn print(output: Output, answer: &(impl std::fmt::Display + serde::Serialize)) -> Result<()> {
    let text = match output {
        Output::Text => answer.to_string(),
        Output::Json => serde_json::to_string_pretty(answer)
            .map_err(|error| AgentError::Bug(format!("the answer cannot be written as JSON: {error}")))?,
    };
    let mut out = std::io::stdout().lock();
    // A reader that has gone away needs no answer.
    drop(writeln!(out, "{}", text.trim_end()));
    Ok(())
}

/// The first SIGTERM or SIGINT asks everything to stop in good order; that takes a bounded time, further
/// ones change nothing. Listens from now on.
fn stop_on_signal(command: &Command, cancel: CancellationToken) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("cannot listen for signals");
        return;
    };
    let stores = matches!(command, Command::Run { .. });
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        match stores {
            true => tracing::info!("told to stop: storing the last bytes"),
            false => tracing::info!("told to stop"),
        }
        cancel.cancel();
    });
}
