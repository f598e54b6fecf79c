//! From the command line to an exit code: what is checked first, what is printed where.
//!
//! Owns: the order in which a command is refused (command line and target before configuration, configuration before the
//! network) and the exit code. Does not own: any of the work.

use std::{
    io::{self, IsTerminal as _, Write as _},
    panic::{UnwindSafe, catch_unwind},
    process::ExitCode,
};

use clap::Parser as _;
use highwater_config::{Config, Exit, unknown_variables};
use highwater_format::SystemId;
use tracing_subscriber::EnvFilter;

use crate::{
    catalog::{Catalog, read},
    cli::{Cli, Command, Common, Output, RunArgs, TargetArgs, WalFetchArgs},
    clock::Clock,
    error::RestoreError,
    list, locate,
    regions::{self, Region},
    report::{self, Answer},
    run::{self, server::StartOptions},
    target::{Asked, Request, parse_as_of},
    verify, walfeed,
};

/// PostgreSQL takes 1 to 125 from its `restore_command` for "the archive has ended"; whatever goes wrong must be above.
const STOP_RECOVERY: u8 = 255;

/// Variables that this program reads itself, and one that the agent reads where both have one environment.
const OWN_VARIABLES: &[&str] = &["HIGHWATER_LOG", "HIGHWATER_LOG_FORMAT"];

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    keep_memory_private();
    // Before anything else, because not even a misspelt flag may look like the end of the archive to PostgreSQL.
    let is = |name: &str| std::env::args_os().skip(1).any(|arg| arg == name);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(match u8::try_from(error.exit_code()) {
                Ok(code) if !error.use_stderr() => code,
                _ if is("wal-fetch") => STOP_RECOVERY,
                _ if is(walfeed::prefetch::COMMAND) => Exit::Done.code(),
                code => code.unwrap_or(Exit::Usage.code()),
            });
        }
    };
    log_to_stderr();
    match &cli.command {
        Command::WalFetch(args) => for_recovery(|| fetch(args)),
        Command::WalPrefetch(args) => {
            // 0 whatever happened: see there.
            let _ = catch_unwind(|| walfeed::prefetch(&args.plan, &args.after));
            Exit::Done.into()
        }
        Command::RunAs(args) => {
            say(&format!(
                "cannot start the server: {}",
                run::account::become_program(args)
            ));
            Exit::Trouble.into()
        }
        _ => {
            warn_of_unknown_variables();
            answer(&cli).into()
        }
    }
}

/// Memory holds keys, and what is restored: the kernel writes none of it to a disk when the process dies, and shows it to
/// no other process of the same user. A limit on the size of core dumps would not do: the kernel passes it over where a
/// program takes them, and PostgreSQL would inherit it. What this process starts has its own way again.
fn keep_memory_private() {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// A panic ends a program with 101, which PostgreSQL would take for the end of the archive.
fn for_recovery(work: impl FnOnce() -> u8 + UnwindSafe) -> ExitCode {
    ExitCode::from(catch_unwind(work).unwrap_or(STOP_RECOVERY))
}

fn fetch(args: &WalFetchArgs) -> u8 {
    let reply = walfeed::fetch(&args.plan, &args.name, &args.path);
    if let Some(message) = reply.message {
        say(&message);
    }
    reply.code
}

fn warn_of_unknown_variables() {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    for line in unknown_variables(names, OWN_VARIABLES) {
        tracing::warn!("{line}");
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("HIGHWATER_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .try_init();
}

fn say(message: &str) {
    let _ = writeln!(io::stderr(), "highwater-restore: {message}");
}

fn answer(cli: &Cli) -> Exit {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("cannot start: {error}"));
            return Exit::Trouble;
        }
    };
    let outcome = runtime.block_on(perform(cli));
    runtime.shutdown_background();
    let output = cli.common.output;
    match outcome {
        Ok(answer) => print(&answer.render(output), answer.exit),
        Err(error) => {
            let error = error.beside_left_out(&cli.common.without_region);
            let exit = error.exit();
            match output {
                Output::Json => print(&report::error_json(name(&cli.command), &error), exit),
                Output::Text => {
                    say(&error.to_string());
                    exit
                }
            }
        }
    }
}

/// A reader that closed the pipe early has what it wanted; any other failure to print must not look like success.
fn print(text: &str, exit: Exit) -> Exit {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => exit,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => exit,
        Err(error) => {
            say(&format!("cannot print the answer: {error}"));
            Exit::Trouble
        }
    }
}

fn name(command: &Command) -> &'static str {
    match command {
        Command::List => "list",
        Command::Plan(_) => "plan",
        Command::Run(_) => "run",
        Command::Verify => "verify",
        Command::WalFetch(_) => "wal-fetch",
        Command::WalPrefetch(_) => "wal-prefetch",
        Command::RunAs(_) => "run-as",
    }
}

async fn perform(cli: &Cli) -> Result<Answer, RestoreError> {
    let clock = Clock::default();
    match &cli.command {
        Command::List => {
            let mut archive = Archive::open(&cli.common, &clock).await?;
            Ok(Answer::new(
                "list",
                Exit::Done,
                list::list(&mut archive.catalog, &archive.regions).await?,
            ))
        }
        Command::Plan(target) => {
            let request = request(target, &clock)?;
            let mut archive = Archive::open(&cli.common, &clock).await?;
            let plan = locate::resolve(&mut archive.catalog, &archive.regions, &request).await?;
            run::inspect::inspect(&archive.catalog, &archive.regions, &plan).await?;
            Ok(Answer::new(
                "plan",
                Exit::Done,
                report::plan(&archive.catalog, &plan),
            ))
        }
        Command::Run(args) => restore(&cli.common, args, clock).await,
        Command::Verify => {
            let archive = Archive::open(&cli.common, &clock).await?;
            let found = verify::verify(
                &archive.catalog,
                &archive.regions,
                archive.config.restore.parallel,
            )
            .await;
            Ok(Answer::new("verify", found.exit(), found))
        }
        Command::WalFetch(_) | Command::WalPrefetch(_) | Command::RunAs(_) => Err(RestoreError::failed(
            Exit::Usage,
            "this command answers PostgreSQL, or becomes it, and is handled before",
        )),
    }
}

fn request(args: &TargetArgs, clock: &Clock) -> Result<Request, RestoreError> {
    Ok(Asked::from(args).request(clock)?)
}

async fn restore(common: &Common, args: &RunArgs, clock: Clock) -> Result<Answer, RestoreError> {
    let request = request(&args.target, &clock)?;
    let mut archive = Archive::open(common, &clock).await?;
    let plan = locate::resolve(&mut archive.catalog, &archive.regions, &request).await?;
    if common.output == Output::Text {
        let _ = write!(io::stderr(), "{}", report::plan(&archive.catalog, &plan));
    }
    let start = args.start.then(|| StartOptions {
        bin: args.bin.clone(),
        port: args.port,
        socket_directory: args.socket_directory.clone(),
        settings: args.postgres_setting.clone(),
    });
    let options = run::Options {
        into: args.into.clone(),
        tablespaces: args.tablespace.clone(),
        owner: args.owner.clone(),
        start,
        clock,
    };
    let input = run::Input {
        config: &archive.config,
        config_file: common.config.as_deref(),
        regions: &archive.regions,
        catalog: &archive.catalog,
        plan: &plan,
    };
    Ok(Answer::new("run", Exit::Done, run::run(input, &options).await?))
}

/// An archive, opened and read.
struct Archive {
    config: Config,
    regions: Vec<Region>,
    catalog: Catalog,
}

impl Archive {
    async fn open(common: &Common, clock: &Clock) -> Result<Self, RestoreError> {
        let as_of = common.as_of.as_deref().map(|text| parse_as_of(text, clock));
        let as_of = as_of.transpose()?;
        let env = |name: &str| std::env::var(name).ok();
        let mut config = Config::load(common.config.as_deref(), env, &common.overrides())?;
        let system_id = common.system_id.as_deref().map(parse_system_id).transpose()?;
        if let Some(time) = as_of {
            regions::read_as_of(&mut config, time, &common.without_region)?;
        }
        let regions = regions::open(&config, common.region.as_deref(), &common.without_region).await?;
        let catalog = read::read(&regions, &config.cluster.name, system_id).await?;
        Ok(Self {
            config,
            regions,
            catalog,
        })
    }
}

fn parse_system_id(text: &str) -> Result<SystemId, RestoreError> {
    text.trim().parse().map_err(|_| {
        let message = format!(
            "`{text}` is not a system identifier; pg_controldata and `list` print it as a decimal number"
        );
        RestoreError::failed(Exit::Usage, message)
    })
}
