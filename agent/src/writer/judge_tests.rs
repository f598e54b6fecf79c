//! Claims: single decisions, and many agents over regions that they cannot always reach.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const OWN: Duration = Duration::from_secs(5);

fn id(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn claim(epoch: u64, instance: &str, timeline: u32) -> Writer {
    Writer {
        epoch,
        instance: instance.to_owned(),
        host: "host".to_owned(),
        pid: 1,
        timeline: id(timeline),
        claimed_at: Time::UNIX_EPOCH,
        begins: None,
        machine: None,
        interval_ms: None,
    }
}

/// A timeline that begins at `0/<hundred times its number>`.
fn line(number: u32) -> Line {
    Line {
        timeline: id(number),
        begins: Lsn(0x100 * u64::from(number)),
    }
}

fn pulse(instance: &str, timeline: u32, micros: i64) -> Pulse {
    Pulse {
        timeline: id(timeline),
        server_time: Time::from_unix_micros(micros),
        wal_end: Lsn(1),
        durable_lsn: Lsn(1),
        stored_lsn: Lsn(1),
        last_commit: None,
        instance: instance.to_owned(),
        sequence: 1,
        quorum: None,
        interval_ms: None,
        waiting_ms: None,
        answered_at: None,
    }
}

fn asking(me: &str) -> Asking<'_> {
    Asking {
        me,
        standby: false,
        alone: false,
        gone: false,
    }
}

#[test]
fn who_is_in_the_way_is_asked_for() {
    let (one, two) = (claim(1, "a", 1), claim(2, "b", 2));
    let (a, x) = (asking("a"), asking("x"));
    let [standby, gone] = [Asking { standby: true, ..x }, Asking { gone: true, ..x }];
    let alone = |asking| Asking {
        alone: true,
        ..asking
    };
    for (asking, number, newest) in [
        (x, 1, None),
        (a, 1, Some(&one)),
        (standby, 1, Some(&one)),
        (gone, 1, Some(&one)),
        (alone(a), 2, Some(&one)),
    ] {
        assert_eq!(entry(asking, line(number), newest), Entry::Free, "{asking:?}");
    }
    for (asking, number, newest) in [
        // A primary has one agent: this may be beside a copy.
        (x, 1, &one),
        (a, 2, &one),
        (alone(x), 2, &one),
        (alone(x), 1, &two),
        (standby, 1, &two),
        // What was a process of this machine may have an heir elsewhere.
        (gone, 1, &two),
    ] {
        assert_eq!(
            entry(asking, line(number), Some(newest)),
            Entry::Ask(newest.clone()),
            "{asking:?}"
        );
    }
}

#[test]
fn a_newer_claim_fences_by_itself_only_from_a_later_timeline() {
    let own = claim(5, "me", 2);
    for harmless in [
        claim(4, "a", 3),
        claim(5, "me", 2),
        claim(5, "a", 1),
        // One of its own that it had given up.
        claim(6, "me", 3),
    ] {
        assert_eq!(standing(&own, &harmless), Standing::Holds, "{harmless:?}");
    }
    for beside in [claim(6, "a", 2), claim(9, "a", 1)] {
        assert_eq!(standing(&own, &beside), Standing::Beside(beside.clone()));
    }
    for newer in [claim(6, "a", 3), claim(5, "a", 3)] {
        assert_eq!(standing(&own, &newer), Standing::Fenced(newer.clone()));
    }
}

#[test]
fn two_promotions_of_the_same_number_are_different_timelines() {
    let there = |epoch, begins| Writer {
        begins: Some(Lsn(begins)),
        ..claim(epoch, "a", 2)
    };
    let standby = Asking {
        standby: true,
        ..asking("x")
    };
    assert_eq!(entry(standby, line(2), Some(&there(1, 0x200))), Entry::Free);
    let rival = there(1, 0x180);
    assert_eq!(entry(standby, line(2), Some(&rival)), Entry::Ask(rival.clone()));
    let theirs = |begins| Writer {
        instance: "b".to_owned(),
        ..there(2, begins)
    };
    assert_eq!(
        standing(&there(1, 0x200), &theirs(0x180)),
        Standing::Fenced(theirs(0x180))
    );
    for (own, newest) in [
        (there(1, 0x200), theirs(0x200)),
        (claim(1, "x", 2), theirs(0x200)),
        (there(1, 0x200), claim(2, "x", 2)),
    ] {
        assert_eq!(standing(&own, &newest), Standing::Beside(newest.clone()));
    }
    // Such a rival's pulses are on our own timeline.
    let mut watch = Watch::new("me", Some(id(2)), &claim(9, "rival", 1));
    let mut sign = |instance, micros| watch.observe(0, Some(&pulse(instance, 2, micros)), OWN);
    let signs = [1, 2, 3].map(|micros| (sign("rival", micros), sign("companion", micros)));
    let last = (Sign::Alive, Sign::None);
    assert_eq!(
        signs,
        [(Sign::None, Sign::None), (Sign::Changed, Sign::None), last]
    );
}

#[test]
fn life_is_a_pulse_of_another_timeline_that_changes() {
    let mut watch = Watch::new("me", Some(id(2)), &claim(9, "a", 1));
    let mut sign = |region, instance, timeline, micros| {
        watch.observe(region, Some(&pulse(instance, timeline, micros)), OWN)
    };
    assert_eq!(sign(0, "a", 1, 5), Sign::None, "the first look says nothing");
    assert_eq!(sign(0, "a", 1, 5), Sign::None, "an agent without its server");
    assert_eq!(sign(1, "a", 1, 4), Sign::None, "each region has its own");
    for moment in 7..10 {
        assert_eq!(sign(0, "b", 2, moment), Sign::None, "a companion");
        let left = sign(0, "me", 1, moment);
        assert_eq!(left, Sign::None, "what we left there ourselves");
    }
    assert_eq!(sign(0, "a", 1, 6), Sign::Changed, "perhaps its last words");
    assert_eq!(sign(1, "a", 1, 6), Sign::Changed);
    assert_eq!(sign(0, "a", 1, 6), Sign::None);
    assert_eq!(sign(0, "a", 1, 8), Sign::Alive);
}

/// One agent of the model: the timeline of its server, its claim, whether it was told to stop.
#[derive(Clone, Debug)]
struct Agent {
    name: String,
    timeline: TimelineId,
    claim: Option<Writer>,
    tried: u64,
    fenced: bool,
}

type Region = BTreeMap<u64, Writer>;

fn newest(regions: &[Region], reach: usize) -> Option<&Writer> {
    let reached = regions
        .iter()
        .enumerate()
        .filter(|(index, _)| reach & (1 << index) != 0);
    reached
        .filter_map(|(_, region)| region.values().next_back())
        .max_by_key(|claim| rank(claim))
}

/// Claims the next epoch in the regions that are reached, one after the other; a lost race ends the attempt.
fn try_claim(agent: &mut Agent, regions: &mut [Region], reach: usize) {
    let epoch = newest(regions, reach)
        .map_or(0, |claim| claim.epoch)
        .max(agent.tried)
        + 1;
    agent.tried = epoch;
    let ours = claim(epoch, &agent.name, agent.timeline.get());
    for (index, region) in regions.iter_mut().enumerate() {
        if reach & (1 << index) == 0 {
            continue;
        }
        if region.contains_key(&epoch) {
            return;
        }
        region.insert(epoch, ours.clone());
    }
    agent.claim = Some(ours);
    agent.fenced = false;
}

/// One look at a region whose newest claim is `newest`; whoever holds a claim and was not fenced shows signs of life.
fn look(agents: &mut [Agent], who: usize, newest: &Writer) {
    let Some(own) = &agents[who].claim else { return };
    let newer = |claim: &Writer| rank(claim) > rank(own);
    let lives = |(index, agent): (usize, &Agent)| {
        index != who && !agent.fenced && agent.claim.as_ref().is_some_and(newer)
    };
    let alive = agents.iter().enumerate().any(lives);
    agents[who].fenced |= match standing(own, newest) {
        Standing::Holds => false,
        Standing::Beside(_) => alive,
        Standing::Fenced(_) => true,
    };
}

proptest! {
    /// Whatever was claimed in whatever order by agents that see only some regions: once every one has looked at
    /// every region, those that go on are on one timeline.
    #[test]
    fn all_that_go_on_write_the_same_timeline(
        steps in proptest::collection::vec((0usize..4, 0usize..3, 1usize..4, 1u32..4), 1..60),
    ) {
        let mut regions = vec![Region::new(), Region::new()];
        let mut agents: Vec<Agent> = (0..4)
            .map(|n| Agent { name: format!("agent{n}"), timeline: id(1), claim: None, tried: 0, fenced: false })
            .collect();
        for (who, what, reach, timeline) in steps {
            let agent = &mut agents[who];
            match what {
                0 => try_claim(agent, &mut regions, reach),
                // A promotion, seen by its own agent, which then has to claim anew.
                1 => (agent.timeline, agent.claim) = (id(timeline), None),
                _ => {
                    if let Some(newest) = newest(&regions, reach).cloned() {
                        look(&mut agents, who, &newest);
                    }
                }
            }
        }
        // Looks until nothing changes: each may find a stray claim of its own, once.
        for _ in 0..=agents.len() {
            for who in 0..agents.len() {
                let Some(last) = newest(&regions, 3).cloned() else { continue };
                let agent = &mut agents[who];
                let Some(own) = agent.claim.clone().filter(|_| !agent.fenced) else { continue };
                match above_a_stray(&own, &last) {
                    Some(epoch) => {
                        let epoch = epoch.max(agent.tried + 1);
                        let again = Writer { epoch, ..own };
                        regions.iter_mut().for_each(|region| drop(region.insert(epoch, again.clone())));
                        (agent.claim, agent.tried) = (Some(again), epoch);
                    }
                    None => look(&mut agents, who, &last),
                }
            }
        }
        let go_on = agents.iter().filter(|agent| !agent.fenced).filter_map(|agent| agent.claim.as_ref());
        let timelines: BTreeSet<_> = go_on.map(|claim| claim.timeline).collect();
        prop_assert!(timelines.len() <= 1, "{:?}", timelines);
    }
}

/// Its slot is busy after the network broke, or its memory is full: the stream says nothing for a while.
#[test]
fn a_server_that_answers_beside_a_stream_that_stands_still_lives() {
    let mut watch = Watch::new("me", None, &claim(9, "a", 1));
    let mut sign = |answered: Option<i64>| {
        let answered_at = answered.map(Time::from_unix_micros);
        let pulse = Pulse {
            answered_at,
            ..pulse("a", 1, 5)
        };
        watch.observe(0, Some(&pulse), OWN)
    };
    let signs = [None, Some(1), Some(1), Some(2)].map(&mut sign);
    assert_eq!(signs, [Sign::None, Sign::Changed, Sign::None, Sign::Alive]);
}

#[test]
fn the_slowest_of_those_who_are_watched_sets_the_pace() {
    let mut watch = Watch::new("me", Some(id(1)), &claim(9, "rival", 1));
    let declared = |instance: &str, interval_ms| Pulse {
        interval_ms,
        ..pulse(instance, 2, 1)
    };
    assert_eq!(watch.interval(OWN), OWN, "nobody was seen");
    watch.observe(0, Some(&declared("a", Some(2_000))), OWN);
    assert_eq!(watch.interval(OWN), Duration::from_secs(2));
    watch.observe(1, Some(&declared("b", None)), OWN);
    assert_eq!(watch.interval(OWN), OWN, "b does not say");
    watch.observe(1, Some(&declared("c", Some(u64::MAX))), OWN);
    assert_eq!(
        watch.interval(OWN),
        Duration::from_secs(300),
        "more is not believed"
    );
    // Companions and our own are not watched.
    let mut watch = Watch::new("me", Some(id(1)), &claim(9, "rival", 1));
    for (instance, timeline) in [("me", 2), ("companion", 1)] {
        let other = Pulse {
            timeline: id(timeline),
            ..declared(instance, Some(60_000))
        };
        watch.observe(0, Some(&other), OWN);
    }
    assert_eq!(watch.interval(OWN), OWN);
}

/// Who has just taken a place writes its first pulse later than everybody looks for the first time.
#[test]
fn who_appears_later_has_changed_something() {
    for first in [None, Some(pulse("dead", 1, 1)), Some(pulse("me", 1, 1))] {
        let mut watch = Watch::new("me", None, &claim(9, "a", 1));
        assert_eq!(watch.observe(0, first.as_ref(), OWN), Sign::None);
        let mut sign = |micros| watch.observe(0, Some(&pulse("a", 1, micros)), OWN);
        assert_eq!([5, 5, 6].map(&mut sign), [Sign::Changed, Sign::None, Sign::Alive]);
    }
}

/// One that claims says how often it looks, long before its first pulse does.
#[test]
fn a_claim_says_how_long_its_writer_is_waited_for() {
    let rival = |interval_ms| Writer {
        interval_ms,
        ..claim(9, "a", 1)
    };
    let waited = |interval_ms| Watch::new("me", None, &rival(interval_ms)).interval(OWN);
    assert_eq!(waited(None), OWN);
    assert_eq!(waited(Some(300_000)), Duration::from_secs(300));
    assert_eq!(
        waited(Some(u64::MAX)),
        Duration::from_secs(300),
        "more is not believed"
    );
}

/// An agent whose PostgreSQL hangs is silent, and may store what it has for as long as its last look is good.
#[test]
fn an_agent_without_its_server_is_seen_to_go_on() {
    let mut watch = Watch::new("me", None, &claim(9, "a", 1));
    let said = |sequence| Pulse {
        sequence,
        ..pulse("a", 1, 5)
    };
    for (sequence, beats) in [(1, false), (1, false), (2, true)] {
        assert_eq!(watch.observe(0, Some(&said(sequence)), OWN), Sign::None);
        assert_eq!(watch.beats(), beats);
    }
}
