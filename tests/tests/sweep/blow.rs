//! What is struck: the blows, whose turn it is, and the runs of an operation one after the other.
//!
//! Owns: where the requests of an operation come to an end. Does not own: what an operation is, nor what must hold after it.

use anyhow::{Context, Result};
use futures::StreamExt;
use highwater_tests::s3::Strike;

/// Runs side by side: each is mostly waiting.
const PARALLEL: usize = 4;
/// No operation here makes as many requests; one that does not come to an end would be a fault by itself.
const MOST: u64 = 150;
/// Behind so many requests an operation repeats itself, and only some are struck.
const EACH: u64 = 20;
/// Then it is every fifth one: an even number would strike the same region always.
const STEP: u64 = 5;

/// Where a strike lands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Blow {
    /// A passing error at this region, a lost reply at the other: the store layer makes the calls again.
    Errors(usize),
    /// An answer at this region that is not waited out ([`refusal`]): the operation itself has to bear it.
    Refused(usize),
    /// The process dies at a request of this region.
    Crash(usize, Strike),
}

/// What can happen at one request.
pub(crate) const EVERY_BLOW: [Blow; 8] = [
    Blow::Errors(0),
    Blow::Errors(1),
    Blow::Refused(0),
    Blow::Refused(1),
    Blow::Crash(0, Strike::HoldBefore),
    Blow::Crash(0, Strike::HoldAfter),
    Blow::Crash(1, Strike::HoldBefore),
    Blow::Crash(1, Strike::HoldAfter),
];

/// Whether every blow falls at every request.
pub(crate) fn everything() -> bool {
    is_asked_for("all")
}

/// Whether some error and some death fall at every request.
pub(crate) fn every_request() -> bool {
    everything() || is_asked_for("every")
}

fn is_asked_for(what: &str) -> bool {
    std::env::var("HIGHWATER_SWEEP").is_ok_and(|sweep| sweep == what)
}

/// Whose turn it is.
pub(crate) fn turn(nth: u64) -> usize {
    usize::from(!nth.is_multiple_of(2))
}

/// The error whose turn it is.
pub(crate) fn error(nth: u64) -> Blow {
    match nth / 2 % 2 {
        0 => Blow::Errors(turn(nth)),
        _ => Blow::Refused(turn(nth)),
    }
}

/// How a request is refused: as a missing right is (403), which only work that must be done sooner or later tries again, or,
/// every other four requests, as a malformed request is (400), which nothing does.
pub(crate) fn refusal(nth: u64) -> Strike {
    match nth / 4 % 2 {
        0 => Strike::Fail(403),
        _ => Strike::Fail(400),
    }
}

/// A name for what is made for one run, which PostgreSQL allows for a slot.
pub(crate) fn name_of(nth: u64, blow: Blow) -> String {
    let blow = match blow {
        Blow::Errors(0) => "errors_0",
        Blow::Errors(_) => "errors_1",
        Blow::Refused(0) => "refused_0",
        Blow::Refused(_) => "refused_1",
        Blow::Crash(0, Strike::HoldBefore) => "before_0",
        Blow::Crash(_, Strike::HoldBefore) => "before_1",
        Blow::Crash(0, _) => "after_0",
        Blow::Crash(..) => "after_1",
    };
    format!("{nth}_{blow}")
}

/// Strikes at request 1, 2, ... until runs are not hit any more; several runs at a time. Returns where that was.
pub(crate) async fn sweep<F>(operation: impl Fn(u64, Blow) -> F) -> Result<u64>
where
    F: Future<Output = Result<bool>>,
{
    let step = if every_request() { 1 } else { STEP };
    strike_until_missed(everything(), step, operation).await
}

/// The same with every blow at every request, for an operation with few of them.
pub(crate) async fn sweep_with_every_blow<F>(operation: impl Fn(u64, Blow) -> F) -> Result<u64>
where
    F: Future<Output = Result<bool>>,
{
    strike_until_missed(true, 1, operation).await
}

async fn strike_until_missed<F>(
    everything: bool,
    step: u64,
    operation: impl Fn(u64, Blow) -> F,
) -> Result<u64>
where
    F: Future<Output = Result<bool>>,
{
    let blows = |nth: u64| match everything {
        true => EVERY_BLOW.to_vec(),
        false => {
            let strike = match nth / 2 % 2 {
                0 => Strike::HoldBefore,
                _ => Strike::HoldAfter,
            };
            vec![error(nth), Blow::Crash(turn(nth), strike)]
        }
    };
    let struck = (1..=MOST).filter(|nth| everything || *nth <= EACH || nth % step == 0);
    let all = struck.flat_map(|nth| blows(nth).into_iter().map(move |blow| (nth, blow)));
    let runs = strike_each(all, operation);
    let mut runs = std::pin::pin!(runs);
    let mut missed = 0;
    while let Some(run) = runs.next().await {
        let (nth, struck) = run?;
        missed = if struck { 0 } else { missed + 1 };
        // Every blow came too late; of those that take turns an error and a crash, for both regions.
        if missed == if everything { EVERY_BLOW.len() } else { 4 } {
            return Ok(nth);
        }
    }
    anyhow::bail!("more than {MOST} requests: the operation does not come to an end")
}

/// One run for each blow, several at a time: the request, and whether it came.
pub(crate) fn strike_each<F>(
    blows: impl Iterator<Item = (u64, Blow)>,
    operation: impl Fn(u64, Blow) -> F,
) -> impl futures::Stream<Item = Result<(u64, bool)>>
where
    F: Future<Output = Result<bool>>,
{
    let runs = futures::stream::iter(blows).map(move |(nth, blow)| {
        let run = operation(nth, blow);
        async move {
            let struck = run.await.with_context(|| format!("{blow:?} at request {nth}"));
            struck.map(|struck| (nth, struck))
        }
    });
    runs.buffered(PARALLEL)
}
