//! Scenes that are played by the book instead of by chance.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::region::Weather;
use crate::schedule::{Schedule, Theme, runtime};
use crate::wire::lsn;
use crate::world::{Power, World};

/// Lets time pass until the agent, which was told to end, has ended.
async fn until_ended(scene: &mut Schedule) {
    while scene.agent.ended().await.is_none() {
        sleep(Duration::from_millis(100)).await;
    }
}

/// The server is gone and uploads are on their way when the agent is told to stop: they are waited for.
#[test]
fn what_is_sealed_is_stored_when_the_agent_stops_without_a_server() {
    runtime().block_on(async {
        let mut scene = Schedule::new(Theme::Storage, 1);
        scene.sim.change(|world| world.write(50_000));
        scene.agent.start();
        sleep(Duration::from_secs(8)).await;
        let slow = Weather {
            delay: 3000,
            ..Weather::fair()
        };
        scene.regions.iter().for_each(|region| region.set(slow));
        scene.sim.change(|world| world.write(20_000));
        sleep(Duration::from_millis(10)).await;
        let sent = scene.sim.change(|world| {
            world.power = Power::Down;
            world.disconnect();
            world.sent[&world.node.line.version]
        });
        sleep(Duration::from_millis(300)).await;
        scene.agent.stop();
        until_ended(&mut scene).await;
        let mut world = scene.sim.lock();
        let line = world.node.line.clone();
        assert_eq!(world.broken, None);
        assert!(world.statuses > 0);
        let held: Vec<_> = world.reaches(&line).into_iter().map(lsn).collect();
        assert_eq!(held, vec![lsn(sent); scene.regions.len()]);
    });
}

/// A schedule with two regions of which both must hold what is reported.
fn two_regions() -> Schedule {
    let schedules = (1..).map(|seed| Schedule::new(Theme::Storage, seed));
    let both = |scene: &Schedule| scene.regions.len() == 2 && scene.sim.lock().needed == 2;
    let mut schedules = schedules.filter(both);
    schedules.next().unwrap()
}

/// The server loses WAL that one region holds and the other does not, while the agent could not read the one: no gap, and
/// nobody counts for what lies between the two before it is copied.
#[test]
fn what_the_server_has_lost_comes_from_the_region_that_joins_late() {
    runtime().block_on(async {
        let mut scene = two_regions();
        scene.sim.change(|world| world.write(100_000));
        scene.start_agent();
        sleep(Duration::from_secs(8)).await;
        scene.regions[1].freeze(true);
        for _ in 0..5 {
            scene.sim.change(|world| world.write(900_000));
            sleep(Duration::from_secs(3)).await;
        }
        scene.agent.kill();
        until_ended(&mut scene).await;
        let (line, before) = {
            let mut world = scene.sim.lock();
            let line = world.node.line.clone();
            let reaches = world.reaches(&line);
            (line, reaches)
        };
        let segment = scene.sim.lock().segment();
        assert!(before[0] > before[1] + 2 * segment, "{before:?}");

        scene.regions[0].freeze(true);
        scene.regions[1].freeze(false);
        scene.start_agent();
        scene.sim.change(|world| {
            let (end, segment) = (world.end(), world.segment());
            world.node.drop_slot();
            world.node.checkpoint(end, segment);
            world.gone_before = world.node.kept_from;
            assert!(world.gone_before > before[1] && world.gone_before <= before[0]);
        });
        sleep(Duration::from_secs(10)).await;
        scene.settle().await;
        let mut world = scene.sim.lock();
        assert_eq!(world.broken, None);
        let end = world.end();
        assert_eq!(world.reaches(&line), vec![end; 2]);
        assert!(world.is_without_gaps());
    });
}

/// One region is emptied, the other does not answer, and the slot is lost while the agent starts: the archive does not
/// begin anew beside the one that holds it.
#[test]
fn the_archive_does_not_begin_anew_beside_a_region_that_was_not_read() {
    runtime().block_on(async {
        let mut scene = two_regions();
        scene.sim.change(|world| world.write(700_000));
        scene.start_agent();
        sleep(Duration::from_secs(8)).await;
        scene.agent.stop();
        until_ended(&mut scene).await;
        scene.regions[1].empty().await;
        scene.regions[0].freeze(true);
        scene.start_agent();
        sleep(Duration::from_secs(1)).await;
        scene.sim.change(|world| {
            world.write(4_000_000);
            let (end, segment) = (world.end(), world.segment());
            world.node.drop_slot();
            world.node.checkpoint(end, segment);
            world.gone_before = world.node.kept_from;
        });
        sleep(Duration::from_secs(20)).await;
        scene.settle().await;
        let world = scene.sim.lock();
        assert_eq!(world.broken, None);
        assert!(!world.is_without_gaps());
    });
}

/// The slot is made anew further on than the server has removed its WAL: what is left before the slot is archived.
#[test]
fn a_gap_ends_where_the_server_can_be_read_again() {
    runtime().block_on(async {
        let mut scene = two_regions();
        scene.sim.change(|world| world.write(100_000));
        scene.start_agent();
        sleep(Duration::from_secs(8)).await;
        scene.agent.stop();
        until_ended(&mut scene).await;
        scene.sim.change(|world| {
            let segment = world.segment();
            world.write(8 * segment);
            world.node.keep = 3;
            world.node.drop_slot();
            let end = world.end();
            world.node.checkpoint(end, segment);
            world.gone_before = world.node.kept_from;
        });
        scene.settle().await;
        let world = scene.sim.lock();
        assert_eq!(world.broken, None);
        assert!(!world.is_without_gaps());
    });
}

/// The server loses WAL while it is away, and the region that takes longest to store the record of that is awaited before
/// a stream begins behind the gap.
#[test]
fn a_stream_begins_behind_a_gap_when_the_slowest_region_of_the_policy_has_the_record() {
    runtime().block_on(async {
        let mut scene = two_regions();
        scene.sim.change(|world| world.write(100_000));
        scene.start_agent();
        sleep(Duration::from_secs(8)).await;
        scene.sim.change(|world| {
            world.power = Power::Down;
            world.disconnect();
        });
        sleep(Duration::from_secs(2)).await;
        let slow = Weather {
            delay: 14_000,
            ..Weather::fair()
        };
        scene.regions[1].set(slow);
        scene.sim.change(|world| {
            world.power = Power::Up;
            let segment = world.segment();
            world.write(8 * segment);
            world.node.drop_slot();
            let end = world.end();
            world.node.checkpoint(end, segment);
            world.gone_before = world.node.kept_from;
        });
        sleep(Duration::from_secs(60)).await;
        scene.settle().await;
        let world = scene.sim.lock();
        assert_eq!(world.broken, None);
        assert!(!world.is_without_gaps());
    });
}

/// The first chunks of the segment that is being written expire in every region, and the connection is lost: the server
/// has that WAL still and sends it again, so the stream goes on, and what it brings closes the hole at once. The whole
/// segment is stored in the end.
#[test]
fn the_stream_begins_again_where_the_front_of_the_open_segment_is_gone() {
    runtime().block_on(async {
        let mut scene = two_regions();
        scene.start_agent();
        for _ in 0..4 {
            scene.sim.change(|world| world.write(9_000));
            sleep(Duration::from_secs(8)).await;
        }
        let begins = |key: &str| key.split('-').next().unwrap().to_owned();
        let mut front = String::new();
        for region in &scene.regions {
            let (first, left) = (region.expire_first_chunk().await, region.keys("/tail/"));
            front = begins(&first);
            assert!(
                !left.is_empty() && !left.iter().any(|key| begins(key) == front),
                "{left:?}"
            );
        }
        scene.sim.change(|world| {
            world.disconnect();
            world.write(200);
        });
        scene.settle().await;
        for region in &scene.regions {
            let left = region.keys("/tail/");
            assert!(
                left.iter().any(|key| begins(key) == front),
                "the hole is closed: {left:?}"
            );
        }
        scene.sim.change(|world| world.write(2 * world.segment()));
        scene.settle().await;
        assert_eq!(scene.sim.lock().broken, None);
        for region in &scene.regions {
            assert!(region.keys("/segment/").len() >= 2);
        }
    });
}

/// An agent that streams, and whose server then changes in this way and makes it connect anew.
async fn connecting_anew(change: impl FnOnce(&mut World)) -> Schedule {
    let mut scene = Schedule::new(Theme::Storage, 1);
    scene.sim.change(|world| world.write(50_000));
    scene.start_agent();
    sleep(Duration::from_secs(8)).await;
    scene.sim.change(|world| {
        change(world);
        world.disconnect();
        world.write(20_000);
    });
    sleep(Duration::from_secs(8)).await;
    scene
}

/// How many lines of the log hold `text`.
fn noted(scene: &Schedule, text: &str) -> usize {
    let world = scene.sim.lock();
    world.log.iter().filter(|line| line.contains(text)).count()
}

/// A host that loses its power in the middle of a conversation says no good-bye: it is left after a minute, and asked for anew.
#[test]
fn a_server_that_answers_no_more_is_left_and_asked_again() {
    runtime().block_on(async {
        let mut scene = connecting_anew(|world| world.unanswered = Some("IDENTIFY_SYSTEM")).await;
        assert_eq!(noted(&scene, "no answer to"), 1);
        sleep(Duration::from_secs(60)).await;
        assert_eq!(noted(&scene, "no answer to"), 2);
        scene.sim.lock().unanswered = None;
        scene.settle().await;
        assert_eq!(scene.sim.lock().broken, None);
    });
}

async fn stops_within(scene: &mut Schedule, patience: Duration) {
    scene.agent.stop();
    let stopped = timeout(patience, until_ended(scene)).await;
    assert!(stopped.is_ok(), "it still runs");
    assert_eq!(scene.sim.lock().broken, None);
}

/// What a stream waits for before it begins is not waited for when the agent is told to stop.
#[test]
fn an_agent_that_waits_for_an_answer_stops_at_once() {
    runtime().block_on(async {
        let mut scene = connecting_anew(|world| world.unanswered = Some("START_REPLICATION")).await;
        assert_eq!(noted(&scene, "no answer to"), 1);
        stops_within(&mut scene, Duration::from_secs(10)).await;
    });
}

/// A server that is stopped (SIGSTOP) reads nothing, so that the last status message may never be sent.
#[test]
fn an_agent_stops_though_its_server_does_not_listen() {
    runtime().block_on(async {
        let mut scene = connecting_anew(|world| world.deaf = true).await;
        stops_within(&mut scene, Duration::from_secs(60)).await;
    });
}

/// A server that is put back, goes on differently and is promoted; to the end of a segment, if so asked. It is refused, and
/// leaves no history that a restore would follow.
fn rolled_back_and_promoted(at_the_end_of_a_segment: bool) {
    runtime().block_on(async {
        let mut scene = two_regions();
        scene.sim.change(|world| world.write(100_000));
        scene.start_agent();
        sleep(Duration::from_secs(8)).await;
        scene.remember();
        scene.sim.change(|world| world.write(2 * world.segment()));
        sleep(Duration::from_secs(8)).await;
        scene.agent.stop();
        until_ended(&mut scene).await;
        scene.roll_back();
        scene.sim.change(|world| {
            let version = world.node.line.version;
            if at_the_end_of_a_segment {
                world.versions[version].switch();
            }
        });
        scene.promote(false);
        scene.start_agent();
        let refused = timeout(Duration::from_secs(120), until_ended(&mut scene)).await;
        let mut world = scene.sim.lock();
        assert_eq!(world.broken, None);
        assert!(refused.is_ok() && world.diverged(), "{refused:?}");
        let histories = world.log.iter().filter(|line| line.contains("/history"));
        assert_eq!(histories.count(), 0, "what is refused leaves nothing");
    });
}

#[test]
fn a_server_that_was_rolled_back_and_promoted_is_found_out() {
    rolled_back_and_promoted(false);
}

/// Its new timeline begins with an object, in which there is nothing of the other course.
#[test]
fn a_server_that_was_rolled_back_and_promoted_at_the_end_of_a_segment_is_found_out() {
    rolled_back_and_promoted(true);
}

/// The front of the open segment is gone, and the server was put back to a place inside it: that shows behind the front. What
/// it sends in the front's place must not be stored, or the server that is the right one would be refused ever after.
#[test]
fn the_lost_front_of_a_segment_is_not_taken_from_a_server_that_is_refused() {
    runtime().block_on(async {
        let mut scene = two_regions();
        scene.sim.change(|world| world.write(50_000));
        scene.remember();
        scene.sim.change(|world| world.write(100_000));
        scene.start_agent();
        sleep(Duration::from_secs(8)).await;
        scene.sim.change(|world| world.write(9_000));
        sleep(Duration::from_secs(8)).await;
        let begins = |key: &str| key.split('-').next().unwrap().to_owned();
        let mut front = String::new();
        for region in &scene.regions {
            front = begins(&region.expire_first_chunk().await);
        }
        scene.roll_back();
        // What comes first would be due long before the difference comes.
        scene.sim.change(|world| {
            world.sends_up_to = world.end() - world.end() % world.segment() + 100_000;
            world.write(400_000);
        });
        sleep(Duration::from_secs(180)).await;
        scene.sim.change(|world| world.sends_up_to = u64::MAX);
        let refused = timeout(Duration::from_secs(300), until_ended(&mut scene)).await;
        for region in &scene.regions {
            let left = region.keys("/tail/");
            assert!(!left.iter().any(|key| begins(key) == front), "{left:?}");
        }
        let mut world = scene.sim.lock();
        assert_eq!(world.broken, None);
        assert!(refused.is_ok() && world.diverged(), "{refused:?}");
    });
}
