//! Claims beside claims: who lives, whose claim is dead, and who has to give way.

use highwater_format::LsnRange;

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
    let silent = old.enter(line(1), false).await;
    assert!(
        matches!(silent, Err(AgentError::Restart { .. })),
        "what the other one has stored meanwhile is to be compared: {silent:?}"
    );
    assert!(
        !old.is_writer() && !stores(region).await,
        "what waits for its right would lie upon that"
    );
    let begun_anew = rig.agent("old again", false);
    begun_anew.enter(line(1), false).await.unwrap();
    assert!(begun_anew.is_writer(), "it is silent now");
}

/// What this agent has counted in the first region, and what somebody else has stored there.
async fn counted_and_stored(rig: &Rig, agent: &Claims, counted: u64, stored: u64) {
    agent.state.update_region(0, |view| {
        (view.timeline, view.stored) = (Some(id(1)), Lsn(counted));
    });
    let range = LsnRange::new(Lsn(0x100), Lsn(stored));
    let key = rig.archive.layout.tail(id(1), range);
    let put = rig.stores[0].put(&key, Object::new("wal"), PutMode::Overwrite);
    put.await.unwrap();
}

/// It was away, and another one had its place for a while: by its silence, or because the system says that it has ended. What is in
/// memory follows what it had stored itself, and would lie beside what that one has stored.
#[tokio::test(start_paused = true)]
async fn i8_a_place_is_not_taken_back_beside_what_another_writer_stored() {
    for (machine, stored, begins_anew) in [
        ("here", 0x200, false),
        ("here", 0x300, true),
        ("elsewhere", 0x200, false),
        ("elsewhere", 0x300, true),
    ] {
        let rig = Rig::new();
        let writer = rig.agent_on(Some("here"), "writer", false);
        writer.enter(line(1), false).await.unwrap();
        let north = &rig.archive.regions[0];
        assert!(writer.look(north).await.unwrap());
        let rival = Writer {
            machine: Some(machine.to_owned()),
            pid: 17,
            ..claim(9, "rival", 1)
        };
        assert!(create(&*north.quick, &rig.archive.layout, &rival).await.unwrap());
        counted_and_stored(&rig, &writer, 0x200, stored).await;
        tokio::time::advance(INTERVAL * SILENT_FOR).await;
        let mut looked = Ok(true);
        for moment in 0..20 {
            looked = writer.look(north).await;
            if looked.is_err() || stores(north).await {
                break;
            }
            server_speaks(&writer, moment);
            tokio::time::advance(INTERVAL).await;
        }
        let said = format!("{machine} {stored:x}: {looked:?}");
        assert_eq!(
            matches!(looked, Err(AgentError::Restart { .. })),
            begins_anew,
            "{said}"
        );
        assert_eq!(stores(north).await, !begins_anew, "{said}");
    }
}

/// Two that could not see each other's regions: who was left behind has the higher epoch, and may not have that of the other one end.
#[tokio::test(start_paused = true)]
async fn a_writer_that_was_left_behind_does_not_fence_its_successor() {
    let rig = Rig::new();
    let [north, south] = &rig.archive.regions[..] else {
        unreachable!()
    };
    rig.stores[0].inject(Rule::times(1000, Fault::FailBefore(ErrorKind::Retry)));
    let successor = rig.agent("successor", false);
    successor.enter(line(2), false).await.unwrap();
    rig.stores[0].heal();
    // What the one that was left behind stored there meanwhile is none of its successor's concern.
    counted_and_stored(&rig, &successor, 0x200, 0x300).await;
    let left_behind = claim(9, "left-behind", 1);
    assert!(
        create(&*north.quick, &rig.archive.layout, &left_behind)
            .await
            .unwrap()
    );
    for begun in [true, false] {
        let region = if begun { Some(id(2)) } else { None };
        successor.state.update_region(1, |view| view.timeline = region);
        for moment in 1..=6 {
            rig.pulse("left-behind", 1, moment).await;
            if !successor.look(north).await.unwrap() {
                break;
            }
            successor.look(south).await.unwrap();
            tokio::time::advance(INTERVAL).await;
        }
        assert_eq!(
            successor.is_writer(),
            begun,
            "nothing it stored is behind an earlier timeline"
        );
        if begun {
            let epochs = epochs_in(&rig, 0).await;
            assert!(epochs.last() > Some(&9), "{epochs:?}");
            let last = read_claim(&*north.quick, &rig.archive.layout, *epochs.last().unwrap()).await;
            let last = last.unwrap().unwrap();
            assert_eq!((last.timeline, last.instance.as_str()), (id(2), "successor"));
            let again = claim(last.epoch + 9, "left-behind", 1);
            assert!(create(&*north.quick, &rig.archive.layout, &again).await.unwrap());
        }
    }
}

/// A rule of the bucket has moved it to an archive tier: claims do not change, and need not be read twice.
#[tokio::test(start_paused = true)]
async fn its_own_claim_need_not_be_readable() {
    let rig = Rig::new();
    let writer = rig.agent("writer", false);
    writer.enter(line(1), false).await.unwrap();
    let north = &rig.archive.regions[0];
    assert!(writer.look(north).await.unwrap());
    let cold = Rule::times(1000, Fault::FailBefore(ErrorKind::Operator));
    rig.stores[0].inject(cold.on(Operation::Get).key("/writer/"));
    for _ in 0..9 {
        tokio::time::advance(INTERVAL).await;
        assert!(writer.look(north).await.unwrap() && stores(north).await);
    }
    // What cannot be looked up is said.
    let newer = claim(2, "newer", 1);
    assert!(
        create(&*rig.archive.regions[1].quick, &rig.archive.layout, &newer)
            .await
            .unwrap()
    );
    rig.stores[0]
        .put(
            &rig.archive.layout.writer(2),
            Object::new("cold"),
            PutMode::Create,
        )
        .await
        .unwrap();
    tokio::time::advance(INTERVAL * SILENT_FOR).await;
    assert!(writer.look(north).await.is_err() && !stores(north).await);
    let why = writer.state.snapshot().regions[0].last_error.clone().unwrap();
    assert!(why.starts_with("nothing is stored before it is known"), "{why}");
    rig.stores[0].heal();
    assert!(writer.look(north).await.unwrap() && stores(north).await);
    assert_eq!(writer.state.snapshot().regions[0].last_error, None);
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
    for moment in 2..=3 {
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

async fn epochs_in(rig: &Rig, index: usize) -> Vec<u64> {
    let region = &rig.archive.regions[index];
    epochs(&*region.quick, &rig.archive.layout, 0).await.unwrap()
}

/// The agent's own server is heard of.
fn server_speaks(agent: &Claims, moment: i64) {
    agent
        .state
        .update(|snapshot| snapshot.server_time = Some(Time::from_unix_micros(moment)));
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
    sleeper.look(south).await.unwrap();
    assert!(
        !stores(south).await,
        "the region that does not know of its fence gives nothing back"
    );
}

/// It was told to take the place of one that lives: it waits, begins to stream, and is heard of only then.
#[tokio::test(start_paused = true)]
async fn i8_nothing_is_stored_beside_a_rival_that_has_not_been_heard_yet() {
    for interval in [INTERVAL, INTERVAL * 12] {
        let rig = Rig::new();
        let holder = rig.agent("holder", false);
        holder.enter(line(1), false).await.unwrap();
        let [north, south] = &rig.archive.regions[..] else {
            unreachable!()
        };
        let rival = Writer {
            interval_ms: u64::try_from(interval.as_millis()).ok(),
            ..claim(2, "rival", 1)
        };
        for region in [north, south] {
            assert!(create(&*region.quick, &rig.archive.layout, &rival).await.unwrap());
        }
        let mut pulses = 0;
        let claimed = Instant::now();
        while holder.is_writer() {
            if claimed.elapsed() > lease::term(INTERVAL) + interval * (1 + pulses) {
                pulses += 1;
                rig.pulse_every("rival", 1, pulses.into(), Some(interval)).await;
            }
            for region in [north, south] {
                holder.look(region).await.unwrap();
                assert!(!stores(region).await, "after {:?}", claimed.elapsed());
            }
            tokio::time::advance(INTERVAL).await;
        }
        assert_eq!(pulses, 2, "it is fenced as soon as that one is known to live");
    }
}

/// The rival has not been heard for long, and lives all the same: it finds its place taken back, and which of the two goes on is found
/// out without both writing.
#[tokio::test(start_paused = true)]
async fn i8_a_place_is_taken_back_by_a_newer_claim() {
    let rig = Rig::new();
    let holder = rig.agent("holder", false);
    holder.enter(line(1), false).await.unwrap();
    let rival = rig.agent("rival", true);
    rival.enter(line(1), false).await.unwrap();
    let regions = &rig.archive.regions;
    let mut since = None;
    for moment in 0..40 {
        server_speaks(&holder, moment);
        for region in regions {
            holder.look(region).await.unwrap();
        }
        // Both have the same regions here, and so one lease: the rival does not look.
        if stores(&regions[0]).await {
            break;
        }
        if epochs_in(&rig, 0).await.last() == Some(&3) {
            since.get_or_insert_with(Instant::now);
        }
        tokio::time::advance(INTERVAL).await;
    }
    let waited = since.unwrap().elapsed();
    assert!(waited >= lease::term(INTERVAL) && waited <= lease::term(INTERVAL) + INTERVAL);
    assert_eq!(
        (epochs_in(&rig, 0).await, epochs_in(&rig, 1).await),
        (vec![1, 2, 3], vec![1, 2, 3])
    );
    rival.look(&regions[0]).await.unwrap();
    assert!(
        !stores(&regions[0]).await,
        "a newer claim stands beside its own now"
    );
}

/// An agent whose own server is gone, or that was fenced, goes on looking, and takes nobody's place.
#[tokio::test(start_paused = true)]
async fn who_cannot_write_takes_nothing_back() {
    for fenced in [false, true] {
        let rig = Rig::new();
        let agent = rig.agent("agent", false);
        agent.enter(line(1), false).await.unwrap();
        let north = &rig.archive.regions[0];
        assert!(
            create(&*north.quick, &rig.archive.layout, &claim(2, "rival", 1))
                .await
                .unwrap()
        );
        for moment in 0..40 {
            if fenced {
                server_speaks(&agent, moment);
                if moment < 5 {
                    rig.pulse("rival", 1, moment).await;
                }
            }
            agent.look(north).await.unwrap();
            tokio::time::advance(INTERVAL).await;
        }
        assert_eq!(
            (agent.is_writer(), epochs_in(&rig, 0).await),
            (!fenced, vec![1, 2])
        );
    }
}

/// Two that could not see each other's region: who claims in the other's later leaves it the time to notice.
#[tokio::test(start_paused = true)]
async fn i8_a_claim_that_comes_late_to_a_region_is_waited_for() {
    let rig = Rig::new();
    let [north, south] = &rig.archive.regions[..] else {
        unreachable!()
    };
    for epoch in 1..3 {
        let earlier = claim(epoch, "earlier", 1);
        assert!(
            create(&*north.quick, &rig.archive.layout, &earlier)
                .await
                .unwrap()
        );
    }
    assert!(
        create(&*south.quick, &rig.archive.layout, &claim(1, "other", 1))
            .await
            .unwrap()
    );
    rig.stores[1].inject(Rule::times(1000, Fault::FailBefore(ErrorKind::Retry)));
    let writer = rig.agent("writer", false);
    writer.enter(line(1), false).await.unwrap();
    rig.stores[1].heal();
    let began = Instant::now();
    let mut looks = 0;
    loop {
        assert!(writer.look(south).await.unwrap());
        if looks == 20 || stores(south).await {
            break;
        }
        looks += 1;
        tokio::time::advance(INTERVAL / 2).await;
    }
    assert_eq!(epochs_in(&rig, 1).await, [1, 3]);
    let waited = began.elapsed();
    assert!(
        waited >= lease::term(INTERVAL) && waited <= lease::term(INTERVAL) + INTERVAL,
        "{waited:?}"
    );
}

/// Its own claim is damaged in a region, or somebody's that has its number: it claims anew there.
#[tokio::test(start_paused = true)]
async fn a_damaged_claim_of_its_own_number_is_climbed_over() {
    let rig = Rig::new();
    let south = &rig.archive.regions[1];
    let rubbish = rig.archive.layout.writer(1);
    let put = rig.stores[1].put(&rubbish, Object::new("rubbish"), PutMode::Create);
    put.await.unwrap();
    rig.stores[1].inject(Rule::times(1000, Fault::FailBefore(ErrorKind::Retry)));
    let writer = rig.agent("writer", false);
    writer.enter(line(1), false).await.unwrap();
    rig.stores[1].heal();
    for _ in 0..3 {
        writer.look(south).await.unwrap();
    }
    assert!(stores(south).await && writer.is_writer());
}

/// What a region answers without having been asked for its claims says nothing of them.
#[tokio::test(start_paused = true)]
async fn i8_a_look_that_fails_for_whatever_reason_is_none() {
    for kind in [
        ErrorKind::Operator,
        ErrorKind::Retry,
        ErrorKind::Corrupt,
        ErrorKind::Config,
    ] {
        let rig = Rig::new();
        let writer = rig.agent("writer", false);
        writer.enter(line(1), false).await.unwrap();
        let north = &rig.archive.regions[0];
        tokio::time::advance(INTERVAL * SILENT_FOR).await;
        rig.stores[0].inject(Rule::times(100, Fault::FailBefore(kind)));
        assert!(writer.look(north).await.is_err(), "{kind:?}");
        rig.stores[0].heal();
        assert!(!stores(north).await, "{kind:?}");
        assert!(writer.look(north).await.unwrap() && stores(north).await);
    }
}

/// A damaged claim above all others neither fences nor hides who does.
#[tokio::test(start_paused = true)]
async fn a_damaged_claim_is_passed_over() {
    let rig = Rig::new();
    let writer = rig.agent("writer", false);
    writer.enter(line(1), false).await.unwrap();
    let north = &rig.archive.regions[0];
    let rubbish = rig.archive.layout.writer(40);
    let put = rig.stores[0].put(&rubbish, Object::new("rubbish"), PutMode::Create);
    put.await.unwrap();
    assert!(writer.look(north).await.unwrap() && stores(north).await);
    let newer = claim(7, "newer", 2);
    assert!(create(&*north.quick, &rig.archive.layout, &newer).await.unwrap());
    assert!(!writer.look(north).await.unwrap() && !stores(north).await);
}

#[tokio::test(start_paused = true)]
async fn beside_a_dead_claim_it_is_stored_once_that_is_known() {
    // By its silence, after which the archive is claimed anew and that is waited for, or by what the system says.
    let looks_of_silence = SILENT_FOR + 2 + 2 + 2;
    for (machine, waited) in [("here", 0), ("elsewhere", looks_of_silence)] {
        let rig = Rig::new();
        let writer = rig.agent_on(Some("here"), "writer", false);
        writer.enter(line(1), false).await.unwrap();
        let region = &rig.archive.regions[0];
        let dead = Writer {
            machine: Some(machine.to_owned()),
            pid: 17,
            ..claim(9, "dead", 1)
        };
        assert!(create(&*region.quick, &rig.archive.layout, &dead).await.unwrap());
        tokio::time::advance(INTERVAL * SILENT_FOR).await;
        let mut looks = 0;
        while looks < 20 && writer.look(region).await.unwrap() && !stores(region).await {
            server_speaks(&writer, looks.into());
            rig.pulse("writer", 1, looks.into()).await;
            tokio::time::advance(INTERVAL).await;
            looks += 1;
        }
        assert_eq!((looks, epochs_in(&rig, 0).await.len()), (waited, 3));
    }
}

/// Somebody empties a region: it is filled again from the others. If there is none, an agent that begins anew knows that.
#[tokio::test(start_paused = true)]
async fn a_region_that_is_emptied_is_noticed_with_the_next_look() {
    let rig = Rig::new();
    let writer = rig.agent("writer", false);
    writer.enter(line(1), false).await.unwrap();
    let regions = &rig.archive.regions;
    for region in regions {
        assert!(writer.look(region).await.unwrap());
    }
    let emptied = |index: usize| writer.state.snapshot().regions[index].emptied;
    let claim = rig.archive.layout.writer(1);
    rig.stores[0].delete(&claim).await.unwrap();
    assert!(writer.look(&regions[0]).await.unwrap() && stores(&regions[0]).await);
    assert_eq!((emptied(0), emptied(1)), (1, 0));
    let lacks = writer.state.snapshot().regions[0].lacks.clone();
    assert!(lacks.lost && lacks.detail.is_some_and(|detail| detail.contains("has lost")));
    assert_eq!(epochs_in(&rig, 0).await, [1], "it is claimed again");
    rig.stores[1].delete(&claim).await.unwrap();
    let both = writer.look(&regions[1]).await;
    assert!(matches!(both, Err(AgentError::Restart { .. })), "{both:?}");
}

/// After a failover a writer streams the rest of the timeline before, and its pulses speak of that. A second agent beside the same
/// server is no copy for that, and is to be started again.
#[tokio::test(start_paused = true)]
async fn a_spare_agent_is_none_of_a_copy_while_its_writer_catches_up() {
    let rig = Rig::new();
    let production = rig.agent("production", false);
    production.enter(line(2), false).await.unwrap();
    rig.pulse("production", 1, 1).await;
    let spare = rig.agent("spare", false);
    assert_eq!(rig.refused_on(line(2), &spare, false).await.kind(), Kind::Refused);
}

/// What kept it from looking is over, or of no interest to an agent beside a standby.
#[tokio::test(start_paused = true)]
async fn beside_a_standby_nothing_is_said_of_looks() {
    let rig = Rig::new();
    let agent = rig.agent("agent", false);
    agent.enter(line(1), false).await.unwrap();
    let north = &rig.archive.regions[0];
    tokio::time::advance(INTERVAL * SILENT_FOR).await;
    rig.stores[0].inject(Rule::times(100, Fault::FailBefore(ErrorKind::Retry)));
    assert!(agent.look(north).await.is_err());
    assert!(agent.state.snapshot().regions[0].last_error.is_some());
    rig.stores[0].heal();
    agent.enter(line(1), true).await.unwrap();
    assert_eq!(agent.state.snapshot().regions[0].last_error, None);
}
