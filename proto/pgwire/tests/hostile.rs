//! No answer of a server makes the client panic or wait for ever: the fuzz target's function over random bytes and over
//! changed copies of what real servers send, in every test run and without a fuzzer.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

#[expect(dead_code, reason = "another test uses the rest")]
mod fake;
#[path = "../fuzz/hostile.rs"]
mod hostile;

use fake::{columns, complete, copy_both, copy_data, error, fields, keepalive, msg, ready, row, wal};
use proptest::prelude::*;
use proptest::sample::Index;

/// Answers that a real server could give, one for each question.
fn answers() -> Vec<Vec<u8>> {
    let start = 0x100_0000;
    let copy_out = msg(b'H', &[0, 0, 0]);
    let copy_done = msg(b'c', &[]);
    let system = [
        columns(&["systemid", "timeline", "xlogpos", "dbname"]),
        row(&[Some("7000000000000000001"), Some("1"), Some("0/1000000"), None]),
        complete("IDENTIFY_SYSTEM"),
        ready(),
    ]
    .concat();
    let show = [
        columns(&["wal_segment_size"]),
        row(&[Some("16MB")]),
        complete("SHOW"),
        ready(),
    ]
    .concat();
    let history = [
        columns(&["filename", "content"]),
        row(&[
            Some("00000002.history"),
            Some("1\t0/1000000\tno recovery target specified\n"),
        ]),
        complete("TIMELINE_HISTORY"),
        ready(),
    ]
    .concat();
    let slot = [
        columns(&["slot_type", "restart_lsn", "restart_tli"]),
        row(&[Some("physical"), Some("0/1000000"), Some("1")]),
        complete("READ_REPLICATION_SLOT"),
        ready(),
    ]
    .concat();
    let refused = [
        error(
            "58P01",
            "requested WAL segment 000000010000000000000001 has already been removed",
        ),
        ready(),
    ]
    .concat();
    let next = [
        columns(&["next_tli", "next_tli_startpos"]),
        row(&[Some("2"), Some("0/1000100")]),
        complete("SELECT"),
        complete("START_STREAMING"),
        ready(),
    ]
    .concat();
    let streamed = [
        copy_both(),
        keepalive(start, true),
        wal(start, &[7; 300]),
        copy_done.clone(),
        next,
        system.clone(),
    ]
    .concat();
    let point = |tag: &str| {
        [
            columns(&["recptr", "tli"]),
            row(&[Some("0/1000028"), Some("1")]),
            complete(tag),
        ]
        .concat()
    };
    let backup = [
        point("SELECT"),
        columns(&["spcoid", "spclocation", "size"]),
        row(&[None, None, Some("20000")]),
        complete("SELECT"),
        copy_out,
        copy_data(b"nbase.tar\0\0"),
        copy_data(&[b"d".as_slice(), &[0; 1024]].concat()),
        copy_data(b"m"),
        copy_data(b"d{}"),
        copy_done,
        fields(
            b'N',
            "WARNING",
            "XX001",
            "could not verify checksum in file \"base/5/1\", block 0",
        ),
        point("BASE_BACKUP"),
        ready(),
        system.clone(),
    ]
    .concat();
    vec![system, show, history, slot, refused, streamed, backup]
}

/// Bytes in place of others, or a cut.
#[derive(Debug, Clone)]
enum Change {
    Set(Index, Vec<u8>),
    Insert(Index, Vec<u8>),
    Cut(Index),
}

fn any_change() -> impl Strategy<Value = Change> {
    let few = || {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 1..9),
            Just(vec![0xFF; 4]),
            Just(vec![0; 4])
        ]
    };
    prop_oneof![
        4 => (any::<Index>(), few()).prop_map(|(at, bytes)| Change::Set(at, bytes)),
        2 => (any::<Index>(), few()).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => any::<Index>().prop_map(Change::Cut),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    let length = bytes.len();
    match change {
        Change::Set(at, new) => {
            let at = at.index(length);
            let count = new.len().min(length - at);
            bytes[at..at + count].copy_from_slice(&new[..count]);
        }
        Change::Insert(at, new) => {
            let at = at.index(length);
            bytes.splice(at..at, new.iter().copied());
        }
        Change::Cut(at) => bytes.truncate(at.index(length)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn fault_98_random_bytes_end_in_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = hostile::hostile(&bytes);
    }

    #[test]
    fn fault_98_changed_answers_end_in_an_answer_or_an_error(
        question in 0..hostile::QUESTIONS,
        answer in any::<Option<Index>>(),
        changes in prop::collection::vec(any_change(), 0..4),
    ) {
        let answers = answers();
        let chosen = answer.map_or(usize::from(question), |answer| answer.index(answers.len()));
        let mut said = answers[chosen].clone();
        for change in &changes {
            apply(&mut said, change);
        }
        let _ = hostile::hostile(&[&[question, 1], said.as_slice()].concat());
    }
}

#[test]
fn fault_98_the_login_itself_may_be_anything() {
    for cut in 0..hostile::WELCOME.len() {
        let _ = hostile::hostile(&[&[0, 0], &hostile::WELCOME[..cut]].concat());
    }
}

#[test]
fn unchanged_answers_are_understood() {
    for (question, said) in (0..hostile::QUESTIONS).zip(answers()) {
        let result = hostile::hostile(&[&[question, 1], said.as_slice()].concat()).unwrap();
        // The fifth answer is a refusal.
        assert_eq!(result.is_ok(), question != 4, "question {question}: {result:?}");
    }
}
