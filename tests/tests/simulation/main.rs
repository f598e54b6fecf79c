//! The agent's core under thousands of random schedules, in virtual time.
//!
//! What runs is the agent itself (`run_in`: receiver, segmenter, sealer, window, uploaders, frontier, catch-up, pulse, resume)
//! on one thread. What is simulated is what surrounds it: a server that speaks the replication protocol over
//! streams in memory and moves its slot by what it is told (`walsender`, `node`, `wal`), and regions whose calls fail in every
//! way (`region`). The model is just the bytes that servers sent; `checker` works out what each region holds of
//! them, and `world` compares that with every position that the server is told.
//!
//! One seed of a theme is one schedule, and the same log at every run. To see one again:
//! `HIGHWATER_SEED=<seed> HIGHWATER_SCHEDULES=1 HIGHWATER_SHOW=1 cargo test --workspace --test simulation <theme> -- --nocapture`.
//! With `HIGHWATER_LOG=debug` the agent's own log comes with it.
//! To look for new trouble: `HIGHWATER_SEED=random HIGHWATER_SCHEDULES=100000`; with `HIGHWATER_SURVEY=1` broken schedules
//! are listed and the others go on. `scripts/mutate.sh` takes single rules out of the agent and expects a failure here.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    missing_docs,
    reason = "tests"
)]

mod agent;
mod checker;
mod company;
mod node;
mod region;
mod rng;
mod scenes;
mod schedule;
mod wal;
mod walsender;
mod wire;
mod world;

use std::sync::atomic::{AtomicBool, Ordering};

use schedule::{Theme, run};

/// Schedules per theme; there are seven.
const SCHEDULES: u64 = 1450;

/// The lines of a log that are printed when a schedule fails.
const SHOWN: usize = 400;

/// One broken schedule is enough: the other themes of this process need not go on.
static FAILED: AtomicBool = AtomicBool::new(false);

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn first_seed() -> u64 {
    match variable("HIGHWATER_SEED").as_deref() {
        None => 1,
        Some("random") => std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64,
        Some(seed) => seed.parse().expect("HIGHWATER_SEED is a number, or random"),
    }
}

/// With `HIGHWATER_LOG=<level>` the agent's own log goes to standard error, among what happens in the world.
fn show_log() {
    if let Some(level) = variable("HIGHWATER_LOG") {
        let log = tracing_subscriber::fmt().with_env_filter(level).without_time();
        drop(log.with_writer(std::io::stderr).try_init());
    }
}

fn simulate(theme: Theme) {
    show_log();
    let first = first_seed();
    let count = variable("HIGHWATER_SCHEDULES").map_or(SCHEDULES, |count| count.parse().unwrap());
    eprintln!("{theme:?}: seeds {first} to {}", first + count - 1);
    let mut statuses = 0;
    for seed in first..first + count {
        if FAILED.load(Ordering::SeqCst) {
            break;
        }
        let outcome = run(theme, seed);
        statuses += outcome.statuses;
        if variable("HIGHWATER_SHOW").is_some() {
            eprintln!("{}", outcome.log.join("\n"));
        }
        if let (Some(broken), Some(_)) = (&outcome.broken, variable("HIGHWATER_SURVEY")) {
            eprintln!("SURVEY {theme:?} {seed}: {broken}");
            continue;
        }
        if let Some(broken) = outcome.broken {
            let skipped = outcome.log.len().saturating_sub(SHOWN);
            eprintln!("{}", outcome.log[skipped..].join("\n"));
            FAILED.store(true, Ordering::SeqCst);
            panic!("HIGHWATER_SEED={seed} HIGHWATER_SCHEDULES=1 ({theme:?}): {broken}");
        }
    }
    eprintln!("{theme:?}: {count} schedules, {statuses} status messages checked");
}

#[test]
fn storage() {
    simulate(Theme::Storage);
}

#[test]
fn crashes() {
    simulate(Theme::Crashes);
}

#[test]
fn server() {
    simulate(Theme::Server);
}

#[test]
fn lineage() {
    simulate(Theme::Lineage);
}

#[test]
fn rollback() {
    simulate(Theme::Rollback);
}

#[test]
fn losses() {
    simulate(Theme::Losses);
}

#[test]
fn company() {
    simulate(Theme::Company);
}

#[test]
fn one_seed_is_one_log() {
    for theme in [
        Theme::Storage,
        Theme::Crashes,
        Theme::Server,
        Theme::Lineage,
        Theme::Rollback,
        Theme::Losses,
        Theme::Company,
    ] {
        for seed in first_seed()..first_seed() + 10 {
            let (one, two) = (run(theme, seed), run(theme, seed));
            assert!(!one.log.is_empty());
            let differs = one.log.iter().zip(&two.log).find(|(a, b)| a != b);
            assert_eq!(differs, None, "seed {seed} of {theme:?}");
            assert_eq!(one.log.len(), two.log.len());
        }
    }
}
