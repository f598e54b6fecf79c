//! When the slot is given up, and what is said about the time that is left.

use super::*;

const MIB: u64 = 1 << 20;

fn config(max_backlog: Option<u64>, keep_free: Option<u64>) -> OutageConfig {
    OutageConfig {
        policy: OutagePolicy::GiveUp,
        max_backlog,
        keep_free,
        disk: None,
        patience: Duration::from_secs(8),
    }
}

/// One look every two seconds; the answers.
fn watch(judge: &mut Judge, looks: impl IntoIterator<Item = (u64, Option<u64>)>) -> Vec<Option<String>> {
    let looks = looks.into_iter().zip((0..).step_by(2).map(Duration::from_secs));
    looks
        .map(|((held, room), at)| judge.take(Look { at, held, room }))
        .collect()
}

fn gives_up(config: OutageConfig, looks: impl IntoIterator<Item = (u64, Option<u64>)>) -> bool {
    watch(&mut Judge::new(config), looks).iter().any(Option::is_some)
}

#[test]
fn at_the_limit_the_slot_is_given_up_when_nothing_is_worked_off() {
    let growing = |up_to: u64| (0..=up_to).map(|step| (step * MIB, None));
    assert!(!gives_up(config(Some(10 * MIB), None), growing(10)));
    let mut judge = Judge::new(config(Some(10 * MIB), None));
    let why = watch(&mut judge, growing(11)).pop().unwrap().unwrap();
    assert_eq!(why, "it held 11MiB of WAL, more than outage.max_backlog = 10MiB");
}

#[test]
fn a_backlog_that_shrinks_is_no_outage() {
    let after_a_weekend = (0..40).map(|step| ((100 - step) * MIB, None));
    assert!(!gives_up(config(Some(10 * MIB), None), after_a_weekend));
    let saw_tooth = (0..40).map(|step| ((20 + step % 4) * MIB, None));
    assert!(!gives_up(config(Some(10 * MIB), None), saw_tooth));
}

#[test]
fn a_pause_that_is_shorter_than_patience_is_no_outage() {
    let looks = |len: u64| (0..len).map(|_| (50 * MIB, None));
    assert!(!gives_up(config(Some(10 * MIB), None), looks(4)));
    assert!(gives_up(config(Some(10 * MIB), None), looks(5)));
    let moved_once = [50, 50, 50, 50, 49, 49, 49, 49].map(|held| (held * MIB, None));
    assert!(!gives_up(config(Some(10 * MIB), None), moved_once));
}

#[test]
fn little_room_counts_where_room_is_known() {
    let stalled = |room| (0..10).map(move |_| (5 * MIB, room));
    assert!(gives_up(config(None, Some(10 * MIB)), stalled(Some(9 * MIB))));
    assert!(!gives_up(config(None, Some(10 * MIB)), stalled(Some(10 * MIB))));
    assert!(!gives_up(config(None, Some(10 * MIB)), stalled(None)));
}

#[test]
fn whoever_holds_never_gives_up() {
    let hold = OutageConfig {
        policy: OutagePolicy::Hold,
        ..config(Some(MIB), Some(100 * MIB))
    };
    assert!(!gives_up(hold, (0..40).map(|step| (step * 50 * MIB, Some(0)))));
}

#[test]
fn it_is_given_up_again_only_when_the_new_slot_holds_much_more() {
    let mut judge = Judge::new(config(Some(10 * MIB), None));
    let growing = |from: u64, to: u64| (from..to).map(|step| (step * MIB, None));
    assert!(watch(&mut judge, growing(0, 12)).pop().unwrap().is_some());
    judge.gave_up();
    // The last checkpoint was long ago: the new slot holds more than the limit at once.
    let mut answers = watch(&mut judge, growing(30, 61));
    assert!(
        answers.pop().unwrap().is_some(),
        "60 MiB is twice what it began with"
    );
    assert!(answers.iter().all(Option::is_none), "{answers:?}");
}

#[test]
fn the_time_left_is_room_over_growth() {
    let mut judge = Judge::new(config(None, None));
    assert_eq!(judge.outlook(), Outlook::default());
    watch(
        &mut judge,
        (0..5).map(|step| (step * 2 * MIB, Some((120 - step * 2) * MIB))),
    );
    let outlook = judge.outlook();
    assert_eq!(outlook.bytes_per_second, MIB);
    assert_eq!(outlook.full_in, Some(Duration::from_secs(112)));
    watch(&mut judge, (0..LOOKS).map(|_| (3 * MIB, Some(100 * MIB))));
    assert_eq!(judge.outlook(), Outlook::default());
    watch(&mut judge, (0..5).map(|step| (step * 2 * MIB, None)));
    assert_eq!(judge.outlook().full_in, None);
}

#[tokio::test]
async fn a_wish_stands_until_it_is_granted() {
    let wish = GiveUp::default();
    assert_eq!(wish.asked(), None);
    wish.when_done().await;
    wish.ask("full".into());
    wish.when_asked().await;
    assert_eq!(wish.asked().as_deref(), Some("full"));
    wish.done();
    wish.when_done().await;
    assert_eq!(wish.asked(), None);
}
