//! Claims over regions in memory, with a clock that the test moves by waiting.

use std::sync::atomic::Ordering;

use highwater_format::{
    History, Identity, Lsn, Pulse, SegmentSize, SystemId, Time, TimelineId, Writer, records,
};
use highwater_store::{
    ErrorKind, Fault, FaultyStore, MemoryStore, NoObserver, Object, Operation, PutMode, RetryPolicy,
    Retrying, Rule, Store,
};
use tokio::time::Instant;

use super::claim::{create, epochs, read_claim};
use super::judge::Line;
use super::silence::SILENT_FOR;
use super::*;
use crate::error::Kind;
use crate::lease;
use crate::region::{Written, write_once};

#[path = "beside_tests.rs"]
mod beside;

const INTERVAL: Duration = Duration::from_secs(5);

fn id(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn line(number: u32) -> Line {
    Line {
        timeline: id(number),
        begins: Lsn(0x100 * u64::from(number)),
    }
}

fn claim(epoch: u64, instance: &str, timeline: u32) -> Writer {
    Writer {
        epoch,
        instance: instance.to_owned(),
        host: format!("host-of-{instance}"),
        pid: 1,
        timeline: id(timeline),
        claimed_at: Time::UNIX_EPOCH,
        begins: Some(line(timeline).begins),
        machine: None,
        interval_ms: None,
    }
}

/// Two regions, which may be made to fail.
struct Rig {
    stores: [Arc<FaultyStore>; 2],
    archive: Archive,
}

impl Rig {
    /// How `agent` is refused timeline 2 while production's pulse on timeline 1 goes on.
    async fn refused_while_production_lives(&self, agent: &Claims, standby: bool) -> AgentError {
        self.refused_on(line(2), agent, standby).await
    }

    async fn refused_on(&self, line: Line, agent: &Claims, standby: bool) -> AgentError {
        let beat = async {
            for moment in 2.. {
                tokio::time::sleep(INTERVAL).await;
                self.pulse("production", 1, moment).await;
            }
        };
        tokio::select! {
            () = beat => unreachable!(),
            result = agent.enter(line, standby) => result.unwrap_err(),
        }
    }

    fn new() -> Self {
        let stores =
            ["north", "south"].map(|name| Arc::new(FaultyStore::new(Arc::new(MemoryStore::new(name)))));
        let identity = Identity {
            system_id: SystemId(7),
            server_version: 150_020,
            segment_size: SegmentSize::DEFAULT,
            wal_block_size: 8192,
            block_size: 8192,
        };
        let region = |(index, store): (usize, &Arc<FaultyStore>)| {
            Arc::new(Region::bare(store.region(), index, store.clone()))
        };
        let regions = stores.iter().enumerate().map(region).collect();
        let archive = Archive::new("orders".parse().unwrap(), identity, regions);
        Self { stores, archive }
    }

    fn agent(&self, instance: &str, take_over: bool) -> Claims {
        self.agent_on(None, instance, take_over)
    }

    /// On a machine that is known, the one that has the number has the heir's place.
    fn agent_on(&self, machine: Option<&str>, instance: &str, take_over: bool) -> Claims {
        self.agent_every(INTERVAL, machine, instance, take_over)
    }

    fn agent_every(
        &self,
        interval: Duration,
        machine: Option<&str>,
        instance: &str,
        take_over: bool,
    ) -> Claims {
        let me = Me {
            instance: instance.to_owned(),
            host: format!("host-of-{instance}"),
            pid: 17,
            machine: machine.map(str::to_owned),
        };
        let state = State::new(["north".to_owned(), "south".to_owned()]);
        let clock = Clock::held_at(Time::from_unix_micros(1));
        Claims::new(me, &self.archive, state, clock, interval, take_over)
    }

    async fn pulse(&self, instance: &str, timeline: u32, moment: i64) {
        self.pulse_every(instance, timeline, moment, None).await;
    }

    /// The same by a writer that says how often it does that.
    async fn pulse_every(&self, instance: &str, timeline: u32, moment: i64, interval: Option<Duration>) {
        let pulse = Pulse {
            timeline: id(timeline),
            server_time: Time::from_unix_micros(moment),
            wal_end: Lsn(9),
            durable_lsn: Lsn(9),
            stored_lsn: Lsn(9),
            last_commit: None,
            instance: instance.to_owned(),
            sequence: 1,
            quorum: None,
            interval_ms: interval.map(|interval| u64::try_from(interval.as_millis()).unwrap()),
            waiting_ms: None,
            answered_at: None,
        };
        let document = records::encode(&pulse).unwrap();
        for store in &self.stores {
            let object = Object::new(document.clone());
            store
                .put(&self.archive.layout.pulse(), object, PutMode::Overwrite)
                .await
                .unwrap();
        }
    }

    async fn newest(&self, region: usize) -> Option<(u64, String)> {
        let newest = newest_of(&*self.stores[region], &self.archive.layout).await;
        newest.unwrap().map(|claim| (claim.epoch, claim.instance))
    }
}

fn kind(result: Result<()>) -> Kind {
    result.unwrap_err().kind()
}

#[tokio::test(start_paused = true)]
async fn the_first_claims_at_once_and_a_successor_when_it_is_silent() {
    let rig = Rig::new();
    let began = Instant::now();
    let (a, b) = (rig.agent("a", false), rig.agent("b", false));
    a.enter(line(1), false).await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO);
    rig.pulse("a", 1, 1).await;
    b.enter(line(1), false).await.unwrap();
    assert!(began.elapsed() >= INTERVAL * SILENT_FOR, "a may live");
    for region in [0, 1] {
        assert_eq!(rig.newest(region).await, Some((2, "b".to_owned())));
    }
    for claims in [&a, &b] {
        assert!(claims.look(&rig.archive.regions[0]).await.unwrap() && claims.is_writer());
    }
    // A new connection to the same server claims nothing anew.
    a.enter(line(1), false).await.unwrap();
    assert_eq!(rig.newest(0).await, Some((2, "b".to_owned())));
}

/// A copy of the primary's disk is on the same timeline, and goes on differently: a primary has one agent.
#[tokio::test(start_paused = true)]
async fn a_copy_on_the_same_timeline_is_refused_while_the_holder_lives() {
    let rig = Rig::new();
    let production = rig.agent("production", false);
    production.enter(line(1), false).await.unwrap();
    rig.pulse("production", 1, 1).await;
    let refused = rig
        .refused_on(line(1), &rig.agent("copy", false), false)
        .await
        .to_string();
    assert!(
        refused.contains("host-of-production") && refused.contains("copy"),
        "{refused}"
    );
    assert_eq!(rig.newest(0).await, Some((1, "production".to_owned())));
    assert!(production.look(&rig.archive.regions[0]).await.unwrap());
}

/// An agent that is started again where it ran need not wait for the silence of the process that it replaces.
#[tokio::test(start_paused = true)]
async fn a_process_that_is_gone_is_followed_at_once() {
    let rig = Rig::new();
    let first = rig.agent_on(Some("here"), "first", false);
    first.enter(line(1), false).await.unwrap();
    rig.pulse("first", 1, 1).await;
    let began = Instant::now();
    let second = rig.agent_on(Some("here"), "second", false);
    second.enter(line(1), false).await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO);
    let elsewhere = rig.agent_on(Some("there"), "third", false);
    elsewhere.enter(line(1), false).await.unwrap();
    assert!(began.elapsed() >= INTERVAL * SILENT_FOR);
}

/// What it was told is for the place that it was told to take.
#[tokio::test(start_paused = true)]
async fn a_takeover_is_not_kept_for_a_promotion() {
    let rig = Rig::new();
    let production = rig.agent("production", false);
    production.enter(line(1), false).await.unwrap();
    rig.pulse("production", 1, 1).await;
    let standby = rig.agent("standby", true);
    standby.enter(line(1), true).await.unwrap();
    let refused = rig.refused_while_production_lives(&standby, false).await;
    assert_eq!(refused.kind(), Kind::Damage);
}

/// A writer that beats more slowly than we do is not taken for silent between two beats, and one that beats faster is not
/// waited for longer than it needs.
#[tokio::test(start_paused = true)]
async fn silence_is_judged_by_the_holders_own_interval() {
    for seconds in [1, 5, 60] {
        let interval = Duration::from_secs(seconds);
        let rig = Rig::new();
        let production = rig.agent_every(interval, None, "production", false);
        production.enter(line(1), false).await.unwrap();
        // It may not have written a pulse yet.
        if seconds != 60 {
            rig.pulse_every("production", 1, 1, Some(interval)).await;
        }
        let (began, heir) = (Instant::now(), rig.agent("heir", false));
        heir.enter(line(2), false).await.unwrap();
        let waited = began.elapsed();
        let expected = interval * SILENT_FOR;
        assert!(
            waited >= expected && waited <= expected + INTERVAL,
            "{seconds} s: {waited:?}"
        );
    }
}

/// A restored copy with production's configuration while production lives: refused, and nothing is written.
#[tokio::test(start_paused = true)]
async fn another_timeline_is_refused_while_the_holder_lives() {
    let rig = Rig::new();
    rig.agent("production", false)
        .enter(line(1), false)
        .await
        .unwrap();
    rig.pulse("production", 1, 1).await;
    let copy = rig.agent("copy", false);
    let refused = rig.refused_while_production_lives(&copy, false).await;
    let text = refused.to_string();
    assert_eq!(refused.kind(), Kind::Damage);
    for part in [
        "host-of-production",
        "pid 17",
        "timeline 1",
        "timeline 2",
        "--take-over",
    ] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    assert_eq!(rig.newest(0).await, Some((1, "production".to_owned())));
    let (began, copy) = (Instant::now(), rig.agent("copy", true));
    copy.enter(line(2), false).await.unwrap();
    assert_eq!(
        began.elapsed(),
        lease::term(INTERVAL),
        "production may still write"
    );
    assert!(
        !copy.take_over.load(Ordering::Relaxed),
        "it would take over for ever"
    );
    assert_eq!(rig.newest(1).await, Some((2, "copy".to_owned())));
}

/// In a failover the dead primary's last pulses may still be on their way, and nobody starts an agent again that ends for them.
#[tokio::test(start_paused = true)]
async fn two_late_pulses_do_not_end_the_agent_of_a_promoted_server() {
    let rig = Rig::new();
    let production = rig.agent("production", false);
    production.enter(line(1), false).await.unwrap();
    rig.pulse("production", 1, 1).await;
    let promoted = rig.agent("promoted", false);
    let last_words = async {
        for moment in 2..=3 {
            tokio::time::sleep(INTERVAL).await;
            rig.pulse("production", 1, moment).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = last_words => unreachable!(),
        entered = promoted.enter(line(2), false) => entered.unwrap(),
    }
    assert!(promoted.is_writer());
}

/// A standby of a restored copy never claims, and would store the copy's timeline all the same.
#[tokio::test(start_paused = true)]
async fn a_standby_on_another_timeline_is_refused_while_the_holder_lives() {
    let rig = Rig::new();
    // Before anybody has claimed there is nobody to ask, and companions need not ask.
    let standby = rig.agent("standby", false);
    let began = Instant::now();
    standby.enter(line(1), true).await.unwrap();
    let production = rig.agent("production", false);
    production.enter(line(1), false).await.unwrap();
    rig.pulse("production", 1, 1).await;
    standby.enter(line(1), true).await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO);

    let copy = rig.agent("standby-of-a-copy", false);
    let refused = rig.refused_while_production_lives(&copy, true).await;
    assert_eq!(refused.kind(), Kind::Damage);
    assert!(refused.to_string().contains("host-of-production"), "{refused}");

    // After a failover the old side is silent, even if the new primary's agent has not claimed yet.
    standby.enter(line(2), true).await.unwrap();
    assert!(!standby.is_writer() && !standby.look(&rig.archive.regions[0]).await.unwrap());
    assert_eq!(rig.newest(0).await, Some((1, "production".to_owned())));
}

/// Two standbys are promoted at once, each to timeline 2: one of them writes.
#[tokio::test(start_paused = true)]
async fn of_two_promotions_of_the_same_number_one_writes() {
    let rig = Rig::new();
    rig.agent("first", false).enter(line(2), false).await.unwrap();
    let beat = async {
        for moment in 1.. {
            rig.pulse("first", 2, moment).await;
            tokio::time::sleep(INTERVAL).await;
        }
    };
    let second = rig.agent("second", false);
    let elsewhere = Line {
        begins: Lsn(0x1ff),
        ..line(2)
    };
    let refused = tokio::select! {
        () = beat => unreachable!(),
        result = second.enter(elsewhere, false) => result.unwrap_err(),
    };
    assert_eq!(refused.kind(), Kind::Damage);
    assert!(refused.to_string().contains("begun elsewhere"), "{refused}");
}

#[tokio::test]
async fn a_timeline_with_another_history_is_a_conflict() {
    let rig = Rig::new();
    let history = |text: &str| History::parse(id(2), text.as_bytes()).unwrap();
    let ours = history("1\t0/500\tx\n");
    let claims = rig.agent("a", false);
    claims.compare(&ours).await.unwrap();
    let key = rig.archive.layout.history(id(2));
    for (file, same) in [("# restored\n1\t0/500\tx\n", true), ("1\t0/400\tx\n", false)] {
        let object = Object::new(file.as_bytes().to_vec());
        rig.stores[1].put(&key, object, PutMode::Overwrite).await.unwrap();
        let compared = claims.compare(&ours).await;
        assert_eq!(compared.is_ok(), same, "{compared:?}");
        let Err(error) = compared else { continue };
        let text = error.to_string();
        assert!(text.contains("at 0/500") && text.contains("at 0/400"), "{text}");
    }
}

/// A failover: the old primary's agent may go on beating, but its server has nothing new to say.
#[tokio::test(start_paused = true)]
async fn a_silent_holder_is_followed() {
    let rig = Rig::new();
    let old = rig.agent("old", false);
    old.enter(line(1), false).await.unwrap();
    rig.pulse("old", 1, 5).await;
    let new = rig.agent("new", false);
    let began = Instant::now();
    let last_words = async {
        tokio::time::sleep(INTERVAL / 2).await;
        rig.pulse("old", 1, 6).await;
    };
    let (entered, ()) = tokio::join!(new.enter(line(2), false), last_words);
    entered.unwrap();
    let least = INTERVAL * SILENT_FOR + INTERVAL / 2;
    assert!(began.elapsed() >= least, "{:?}", began.elapsed());

    // The old one finds out with its next pulse, or when its server is back.
    assert!(old.is_writer());
    assert!(!old.look(&rig.archive.regions[1]).await.unwrap() && !old.is_writer());
    let fenced = old.fenced().await;
    assert!(
        matches!(&fenced, AgentError::Fenced { holder, .. } if holder.contains("host-of-new")),
        "{fenced}"
    );
    assert_eq!(kind(old.enter(line(1), false).await), Kind::Damage);
    // Rejoined as a standby it has no say, and no pulse; with the new timeline it is a companion.
    old.enter(line(2), true).await.unwrap();
    assert!(!old.look(&rig.archive.regions[1]).await.unwrap());
    old.enter(line(2), false).await.unwrap();
    assert!(old.is_writer() && new.look(&rig.archive.regions[0]).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_was_alone_follows_its_server_at_once() {
    let rig = Rig::new();
    let only = rig.agent("only", false);
    only.enter(line(1), false).await.unwrap();
    rig.pulse("only", 1, 1).await;
    let began = Instant::now();
    only.enter(line(2), false).await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO);
    // Beside another one it asks first, even if its own claim is the newest.
    rig.pulse("other", 2, 2).await;
    only.enter(line(3), false).await.unwrap();
    assert!(began.elapsed() >= INTERVAL * SILENT_FOR);
}

#[tokio::test(start_paused = true)]
async fn a_region_that_was_away_gets_the_claim_later() {
    let rig = Rig::new();
    let failing = Rule::times(100, Fault::FailBefore(ErrorKind::Retry));
    rig.stores[1].inject(failing);
    let claims = rig.agent("a", false);
    claims.enter(line(1), false).await.unwrap();
    rig.stores[1].heal();
    assert_eq!(rig.newest(1).await, None);
    assert!(claims.look(&rig.archive.regions[1]).await.unwrap());
    assert_eq!(rig.newest(1).await, Some((1, "a".to_owned())));
}

/// A creation that was given up took effect after all: the claim that is held is placed above it, everywhere.
#[tokio::test(start_paused = true)]
async fn a_stray_claim_of_its_own_is_claimed_over() {
    let rig = Rig::new();
    let claims = rig.agent("a", false);
    claims.enter(line(2), false).await.unwrap();
    let held = claims.held.borrow().claim.clone().unwrap();
    let stray = Writer {
        epoch: 2,
        timeline: id(1),
        ..held
    };
    assert!(
        create(&*rig.stores[0], &rig.archive.layout, &stray)
            .await
            .unwrap()
    );
    for region in [0, 1] {
        assert!(claims.look(&rig.archive.regions[region]).await.unwrap());
        assert_eq!(rig.newest(region).await, Some((3, "a".to_owned())));
    }
    assert!(claims.is_writer());
    let newest = newest_of(&*rig.stores[1], &rig.archive.layout).await.unwrap();
    assert_eq!(newest.unwrap().timeline, id(2));
}

#[tokio::test(start_paused = true)]
async fn without_any_region_nothing_is_claimed() {
    let rig = Rig::new();
    for store in &rig.stores {
        store.inject(Rule::times(9, Fault::FailBefore(ErrorKind::Retry)));
    }
    let claims = rig.agent("a", false);
    assert_eq!(kind(claims.enter(line(1), false).await), Kind::Retry);
    assert!(!claims.is_writer());
    rig.stores.iter().for_each(|store| store.heal());
    claims.enter(line(1), false).await.unwrap();
    // A claim that is held survives an outage: the server may connect again before the regions do.
    rig.stores.iter().for_each(|store| store.freeze());
    claims.enter(line(1), false).await.unwrap();
    assert!(claims.is_writer());
}

/// The answer to the creation is lost: the claim that is found is our own.
#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_no_rival() {
    let rig = Rig::new();
    let lost = Rule::once(Fault::FailAfter(ErrorKind::Retry)).on(Operation::Put);
    rig.stores[0].inject(lost);
    let quick = Region {
        quick: Arc::new(Retrying::new(
            rig.stores[0].clone(),
            RetryPolicy::interactive(),
            Arc::new(NoObserver),
        )),
        ..Region::bare("north", 0, rig.stores[0].clone())
    };
    let mut archive = rig.archive.clone();
    archive.regions[0] = Arc::new(quick);
    let shaky = Rig {
        stores: rig.stores.clone(),
        archive,
    };
    let claims = shaky.agent("a", false);
    claims.enter(line(1), false).await.unwrap();
    assert_eq!(rig.newest(0).await, Some((1, "a".to_owned())));
}

/// Many agents at once: every epoch has one owner in all regions.
#[tokio::test]
async fn i8_an_epoch_is_claimed_once() {
    let rig = Rig::new();
    let agent = |n| rig.agent_on(Some("here"), &format!("a{n}"), false);
    let agents: Vec<_> = (0..12).map(agent).collect();
    let claims = agents.iter().map(|agent| agent.enter(line(1), false));
    for result in futures::future::join_all(claims).await {
        result.unwrap();
    }
    let mut owners = std::collections::HashMap::new();
    for store in &rig.stores {
        for epoch in epochs(&**store, &rig.archive.layout, 0).await.unwrap() {
            let claim = read_claim(&**store, &rig.archive.layout, epoch)
                .await
                .unwrap()
                .unwrap();
            owners.entry(epoch).or_insert_with(Vec::new).push(claim.instance);
        }
    }
    let mut held: Vec<_> = agents
        .iter()
        .map(|agent| agent.held.borrow().claim.clone().unwrap())
        .collect();
    held.sort_by_key(|claim| claim.epoch);
    held.dedup_by_key(|claim| claim.epoch);
    assert_eq!(held.len(), agents.len(), "two agents hold the same epoch");
    for claim in held {
        assert_eq!(
            owners[&claim.epoch],
            [claim.instance.clone(), claim.instance.clone()]
        );
    }
}

/// Two writers race for a thousand keys, half of them with the same content: nothing is ever replaced, and the
/// loser of a key with other content is told.
#[tokio::test]
async fn i4_two_writers_race_for_a_thousand_keys() {
    let store = Arc::new(MemoryStore::new("north"));
    let writer = |who: &'static str| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut results = Vec::new();
            for number in 0..1000 {
                let content = if number % 2 == 0 { "same" } else { who };
                let key = format!("key/{number:04}");
                results.push(write_once(&*store, &key, Object::new(content)).await);
                if number % 7 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            results
        })
    };
    let (a, b) = tokio::join!(writer("a"), writer("b"));
    for (number, results) in a.unwrap().into_iter().zip(b.unwrap()).enumerate() {
        let held = store.get(&format!("key/{number:04}")).await.unwrap();
        let created = |result: &Result<Written>| matches!(result, Ok(Written::Created));
        let (a, b) = (&results.0, &results.1);
        assert!(
            created(a) != created(b),
            "one and only one creates it: {a:?} {b:?}"
        );
        if number % 2 == 0 {
            assert!(a.is_ok() && b.is_ok() && held == "same");
            continue;
        }
        assert_eq!(held, if created(a) { "a" } else { "b" });
        let loser = if created(a) { b } else { a };
        assert!(matches!(loser, Err(AgentError::Conflict { .. })), "{loser:?}");
    }
}
