//! Claims beside claims: who lives, whose claim is dead, and who has to give way.

use super::*;

/// It was silent for a while, or another was told to take its place: once that one lives, only that one goes on.
#[tokio::test(start_paused = true)]
async fn a_living_successor_on_the_same_timeline_fences() {
    let rig = Rig::new();
    let (old, new) = (rig.agent("old", false), rig.agent("new", true));
    old.enter(line(1), false).await.unwrap();
    new.enter(line(1), false).await.unwrap();
    let region = &rig.archive.regions[0];
    for moment in 1..=2 {
        rig.pulse("new", 1, moment).await;
        assert!(old.look(region).await.unwrap(), "one change proves nothing");
        rig.pulse("old", 1, moment).await;
        assert!(new.look(region).await.unwrap());
    }
    rig.pulse("new", 1, 3).await;
    assert!(!old.look(region).await.unwrap() && !old.is_writer());
    assert!(new.look(region).await.unwrap() && new.is_writer());
    // Nor does a new connection give it back what it has lost.
    let beat = async {
        for moment in 4.. {
            tokio::time::sleep(INTERVAL).await;
            rig.pulse("new", 1, moment).await;
        }
    };
    let again = tokio::select! {
        () = beat => unreachable!(),
        again = old.enter(line(1), false) => again,
    };
    assert!(kind(again) == Kind::Refused && !old.is_writer());
    old.enter(line(1), false).await.unwrap();
    assert!(old.is_writer(), "it is silent now");
}

/// Somebody took production's place for a moment, and production has gone on: the next one does not see the newest claim only.
#[tokio::test(start_paused = true)]
async fn who_lives_behind_a_dead_claim_is_asked_too() {
    let rig = Rig::new();
    let production = rig.agent_on(Some("there"), "production", false);
    production.enter(line(1), false).await.unwrap();
    let gone = rig.agent_on(Some("here"), "gone", true);
    gone.enter(line(1), false).await.unwrap();
    rig.pulse("production", 1, 1).await;
    for machine in ["here", "elsewhere"] {
        let copy = rig.agent_on(Some(machine), "copy", false);
        let refused = rig.refused_on(line(1), &copy, false).await;
        assert!(refused.to_string().contains("host-of-production"), "{refused}");
    }
    assert!(production.look(&rig.archive.regions[0]).await.unwrap());
}

/// A region that was away during a promotion still has the old writer's claims, which are of higher epochs: he is dead, and fences
/// nobody. Whoever lives behind them does.
#[tokio::test(start_paused = true)]
async fn a_dead_claim_of_the_timeline_before_fences_only_for_somebody_who_lives() {
    let rig = Rig::new();
    let new = rig.agent("new", false);
    let [north, south] = &rig.archive.regions[..] else {
        unreachable!()
    };
    rig.stores[0].inject(Rule::times(100, Fault::FailBefore(ErrorKind::Retry)));
    new.enter(line(2), false).await.unwrap();
    rig.stores[0].heal();
    let old = claim(9, "old", 1);
    assert!(create(&*north.quick, &rig.archive.layout, &old).await.unwrap());
    rig.pulse("old", 1, 1).await;
    for _ in 0..4 {
        assert!(new.look(north).await.unwrap() && new.look(south).await.unwrap());
    }
    new.enter(line(2), false).await.unwrap();
    assert!(new.is_writer(), "nor does a new connection");
    let third = claim(7, "third", 2);
    assert!(create(&*north.quick, &rig.archive.layout, &third).await.unwrap());
    for moment in 2..=4 {
        assert!(new.look(north).await.unwrap(), "one change proves nothing");
        rig.pulse("third", 2, moment).await;
    }
    assert!(!new.look(north).await.unwrap() && !new.is_writer());
    let AgentError::Fenced { holder, .. } = new.fenced().await else {
        unreachable!()
    };
    assert!(holder.contains("host-of-third"), "{holder}");
}

/// One region has kept a dead claim that is newer than everybody's. It hides neither who has to give way, nor who has taken whose place.
#[tokio::test(start_paused = true)]
async fn a_dead_claim_changes_nothing_between_two_that_live() {
    let rig = Rig::new();
    let [north, south] = &rig.archive.regions[..] else {
        unreachable!()
    };
    let (first, heir) = (rig.agent("first", false), rig.agent("heir", false));
    first.enter(line(1), false).await.unwrap();
    heir.enter(line(1), false).await.unwrap();
    let dead = claim(9, "dead", 1);
    assert!(create(&*south.quick, &rig.archive.layout, &dead).await.unwrap());
    for moment in 1..=4 {
        rig.pulse("first", 1, moment).await;
        assert!(
            heir.look(south).await.unwrap(),
            "an older claim's pulses say nothing to it"
        );
    }
    for moment in 1..=3 {
        assert!(first.is_writer());
        rig.pulse("heir", 1, moment).await;
        first.look(north).await.unwrap();
    }
    assert!(!first.is_writer() && heir.is_writer());

    let (old, new) = (rig.agent("old", true), rig.agent("new", true));
    old.enter(line(1), false).await.unwrap();
    new.enter(line(2), false).await.unwrap();
    let dead = claim(99, "dead", 1);
    assert!(create(&*south.quick, &rig.archive.layout, &dead).await.unwrap());
    assert!(!old.look(north).await.unwrap());
    assert_eq!(kind(old.enter(line(1), false).await), Kind::Damage);
    assert!(
        !old.is_writer(),
        "the region that does not know of its fence gives nothing back"
    );
}

/// Whether something can be stored there now.
async fn stores(region: &Region) -> bool {
    let put = region.store.put("something", Object::new("x"), PutMode::Create);
    timeout(Duration::from_millis(1), put).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn i8_a_writer_that_slept_stores_nothing_beside_who_may_have_taken_its_place() {
    let rig = Rig::new();
    let sleeper = rig.agent("sleeper", false);
    sleeper.enter(line(1), false).await.unwrap();
    let [north, south] = &rig.archive.regions[..] else {
        unreachable!()
    };
    assert!(stores(north).await && stores(south).await);
    let rival = claim(2, "rival", 1);
    assert!(create(&*north.quick, &rig.archive.layout, &rival).await.unwrap());
    tokio::time::advance(INTERVAL * SILENT_FOR).await;
    assert!(!stores(north).await && !stores(south).await, "it may have slept");
    for moment in 1..=2 {
        rig.pulse("rival", 1, moment).await;
        assert!(sleeper.look(north).await.unwrap(), "one change proves nothing");
        assert!(!stores(north).await);
    }
    assert!(sleeper.look(south).await.unwrap() && stores(south).await);
    rig.pulse("rival", 1, 3).await;
    assert!(!sleeper.look(north).await.unwrap());
    assert!(!stores(north).await && !stores(south).await);
}

#[tokio::test(start_paused = true)]
async fn beside_a_dead_claim_it_is_stored_once_that_is_known() {
    let rig = Rig::new();
    let writer = rig.agent_on(Some("here"), "writer", false);
    writer.enter(line(1), false).await.unwrap();
    let [north, south] = &rig.archive.regions[..] else {
        unreachable!()
    };
    // By its silence, or by what the system says.
    for (region, machine, waited) in [(north, "elsewhere", SILENT_FOR), (south, "here", 0)] {
        let dead = Writer {
            machine: Some(machine.to_owned()),
            pid: 17,
            ..claim(9, "dead", 1)
        };
        assert!(create(&*region.quick, &rig.archive.layout, &dead).await.unwrap());
        tokio::time::advance(INTERVAL * SILENT_FOR).await;
        let mut looks = 0;
        while writer.look(region).await.unwrap() && !stores(region).await {
            rig.pulse("writer", 1, looks.into()).await;
            tokio::time::advance(INTERVAL).await;
            looks += 1;
        }
        assert_eq!(looks, waited);
    }
}
