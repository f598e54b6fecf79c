//! When the slot is given up, and what is said about the time that is left.

use highwater_config::Standby;
use highwater_pgwire::ConnInfo;

use super::*;
use crate::clock::Clock;
use crate::state::State;

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
    let looks = looks.into_iter().map(|(held, room)| (held, None, room));
    watch_gains(judge, looks)
}

/// The same, with what would be gained.
fn watch_gains(
    judge: &mut Judge,
    looks: impl IntoIterator<Item = (u64, Option<u64>, Option<u64>)>,
) -> Vec<Option<String>> {
    let looks = looks.into_iter().zip((0..).step_by(2).map(Duration::from_secs));
    let look = |((held, gain, room), at)| Look { at, held, gain, room };
    looks.map(|seen| judge.take(look(seen))).collect()
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

/// The last checkpoint was long ago: the new slot holds more than the limit at once.
fn given_up() -> Judge {
    let mut judge = Judge::new(config(Some(10 * MIB), None));
    let growing = (0..12).map(|step| (step * MIB, None));
    assert!(watch(&mut judge, growing).pop().unwrap().is_some());
    judge.gave_up();
    judge
}

#[test]
fn it_is_given_up_again_when_there_has_been_a_checkpoint() {
    let mut judge = given_up();
    let nothing_to_gain = (30..50).map(|held| (held * MIB, Some(0), None));
    // What a checkpoint frees takes it a moment to remove.
    let after_it = (50..55).map(|held| (held * MIB, Some(20 * MIB), None));
    let mut answers = watch_gains(&mut judge, nothing_to_gain.chain(after_it));
    assert!(
        answers.pop().unwrap().is_some(),
        "less than twice what it began with"
    );
    assert!(answers.iter().all(Option::is_none), "{answers:?}");
}

#[test]
fn without_a_word_of_checkpoints_it_is_given_up_again_when_the_backlog_has_doubled() {
    let mut judge = given_up();
    let growing = (30..65).map(|held| (held * MIB, None));
    let mut answers = watch(&mut judge, growing);
    assert!(answers.pop().unwrap().is_some(), "twice what it began with");
    assert!(answers.iter().all(Option::is_none), "{answers:?}");
}

#[test]
fn a_backlog_that_was_worked_off_says_nothing_of_the_next_outage() {
    let mut judge = given_up();
    let held = [30, 0, 0, 0, 31, 31, 31, 31, 31];
    let mut answers = watch(&mut judge, held.map(|held| (held * MIB, None)));
    assert!(answers.pop().unwrap().is_some());
    assert!(answers.iter().all(Option::is_none), "{answers:?}");
}

#[test]
fn a_slot_that_holds_nothing_is_not_given_up() {
    let idle = |held| (0..10).map(move |_| (held, Some(MIB)));
    assert!(!gives_up(config(None, Some(10 * MIB)), idle(0)));
    assert!(!gives_up(config(None, Some(10 * MIB)), idle(MIB - 1)));
    assert!(gives_up(config(None, Some(10 * MIB)), idle(MIB)));
}

#[test]
fn while_the_server_is_away_nothing_can_be_worked_off() {
    let mut judge = Judge::new(config(Some(10 * MIB), None));
    let mut take = |seconds| {
        judge.take(Look {
            at: Duration::from_secs(seconds),
            held: 50 * MIB,
            ..Look::default()
        })
    };
    assert!(take(0).is_none() && take(8).is_some());
    assert!(take(80).is_some(), "a slow look or two");
    assert_eq!(take(600), None);
    assert!(take(604).is_none() && take(608).is_some());
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
    wish.ask(Some("full".into()));
    wish.when_asked().await;
    assert_eq!(wish.asked().as_deref(), Some("full"));
    wish.grant();
    assert_eq!((wish.asked(), wish.granted()), (None, 1));
}

/// A server at which nobody answers.
fn nowhere() -> ConnInfo {
    ConnInfo::resolve(Some("host=/nonexistent user=highwater")).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_start_goes_on_where_the_slot_cannot_be_given_up() {
    let (give_up, conninfo) = (GiveUp::default(), nowhere());
    let (state, clock) = (State::new([]), Clock::system());
    let letting_go = LettingGo {
        give_up: &give_up,
        conninfo: &conninfo,
        slot: "highwater",
        system_id: None,
        standby: Standby::Refuse,
        state: &state,
        clock: &clock,
    };
    give_up.ask(Some("full".into()));
    let start = tokio::time::sleep(Duration::from_secs(10));
    let ((), given_up) = letting_go.during(start).await;
    assert_eq!(given_up, None);
    assert_eq!(give_up.asked().as_deref(), Some("full"));
    assert_eq!(state.snapshot().given_up, None);
}
