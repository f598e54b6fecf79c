use bytes::BufMut;
use proptest::prelude::*;

use super::read::{Progress, Step};
use super::*;
use crate::frame::Frame;
use crate::message::tag;

fn row(values: &[Option<&str>]) -> Frame {
    let mut body = Vec::new();
    body.put_u16(u16::try_from(values.len()).unwrap());
    for value in values {
        match value {
            Some(text) => {
                body.put_u32(u32::try_from(text.len()).unwrap());
                body.extend_from_slice(text.as_bytes());
            }
            None => body.put_i32(-1),
        }
    }
    frame(tag::DATA_ROW, &body)
}

fn frame(tag: u8, body: &[u8]) -> Frame {
    Frame {
        tag,
        body: Bytes::copy_from_slice(body),
    }
}

/// Start position, a tablespace and the data directory: the same in both framings.
fn opening() -> Vec<Frame> {
    vec![
        frame(tag::ROW_DESCRIPTION, b"\0\0"),
        row(&[Some("0/2000028"), Some("1")]),
        frame(tag::COMMAND_COMPLETE, b"SELECT\0"),
        frame(tag::ROW_DESCRIPTION, b"\0\0"),
        row(&[Some("16385"), Some("/space"), Some("7")]),
        row(&[None, None, Some("22000")]),
        frame(tag::COMMAND_COMPLETE, b"SELECT\0"),
    ]
}

fn closing() -> Vec<Frame> {
    vec![
        frame(tag::ROW_DESCRIPTION, b"\0\0"),
        row(&[Some("0/2000138"), Some("1")]),
        frame(tag::COMMAND_COMPLETE, b"SELECT\0"),
        frame(tag::COMMAND_COMPLETE, b"BASE_BACKUP\0"),
        frame(tag::READY, b"I"),
    ]
}

fn copy_out() -> Frame {
    frame(tag::COPY_OUT, b"\0\0\0")
}

fn data(body: &[u8]) -> Frame {
    frame(tag::COPY_DATA, body)
}

fn copy_done() -> Frame {
    frame(tag::COPY_DONE, b"")
}

fn typed_middle() -> Vec<Frame> {
    vec![
        copy_out(),
        data(b"n16385.tar\0/space\0"),
        data(b"done"),
        data(b"nbase.tar\0\0"),
        data(b"dtwo"),
        data(b"m"),
        data(b"d{}"),
        copy_done(),
    ]
}

fn untyped_middle() -> Vec<Frame> {
    vec![
        copy_out(),
        data(b"one"),
        copy_done(),
        copy_out(),
        data(b"two"),
        copy_done(),
        copy_out(),
        data(b"{}"),
        copy_done(),
    ]
}

fn run(typed: bool, frames: Vec<Frame>) -> Result<(Vec<BackupMessage>, bool), PgError> {
    let mut progress = Progress::new(typed, true);
    let (mut messages, mut finished) = (Vec::new(), false);
    for frame in frames {
        match progress.take(frame, "test")? {
            Step::Message(message) => messages.push(message),
            Step::Nothing => {}
            Step::Finished => finished = true,
        }
    }
    Ok((messages, finished))
}

fn expected() -> Vec<BackupMessage> {
    let timeline = TimelineId::FIRST;
    let space = Tablespace {
        oid: Some(16385),
        location: Some("/space".into()),
        size_kb: Some(7),
    };
    let base = Tablespace {
        oid: None,
        location: None,
        size_kb: Some(22000),
    };
    vec![
        BackupMessage::Start {
            lsn: Lsn(0x200_0028),
            timeline,
        },
        BackupMessage::Tablespaces(vec![space, base]),
        BackupMessage::Archive {
            name: "16385.tar".into(),
            oid: Some(16385),
            location: Some("/space".into()),
        },
        BackupMessage::Data(Bytes::from_static(b"one")),
        BackupMessage::Archive {
            name: "base.tar".into(),
            oid: None,
            location: None,
        },
        BackupMessage::Data(Bytes::from_static(b"two")),
        BackupMessage::ManifestBegin,
        BackupMessage::ManifestData(Bytes::from_static(b"{}")),
        BackupMessage::Stop {
            lsn: Lsn(0x200_0138),
            timeline,
        },
    ]
}

fn whole(typed: bool) -> Vec<Frame> {
    let middle = if typed { typed_middle() } else { untyped_middle() };
    [opening(), middle, closing()].concat()
}

#[test]
fn both_framings_give_the_same_messages() {
    for typed in [true, false] {
        let (messages, finished) = run(typed, whole(typed)).unwrap();
        assert_eq!(messages, expected(), "typed {typed}");
        assert!(finished);
    }
}

#[test]
fn progress_may_come_inside_an_archive() {
    let mut frames = whole(true);
    let at = frames
        .iter()
        .position(|frame| &frame.body[..] == b"dtwo")
        .unwrap();
    frames.insert(at, data(b"p\0\0\0\0\0\0\x01\0"));
    let (messages, _) = run(true, frames).unwrap();
    assert!(messages.contains(&BackupMessage::Progress(256)));
}

#[test]
fn a_missing_archive_or_manifest_is_not_a_finished_backup() {
    let without = |skip: &[u8]| {
        let frames = whole(true)
            .into_iter()
            .filter(|frame| !frame.body.starts_with(skip))
            .collect();
        run(true, frames).unwrap_err().to_string()
    };
    assert!(without(b"n16385").contains("has no place here"));
    assert!(without(b"m").contains("without the manifest"));
    let untyped = [opening(), untyped_middle()[3..].to_vec(), closing()].concat();
    assert!(
        run(false, untyped)
            .unwrap_err()
            .to_string()
            .contains("without the manifest")
    );
    let untyped = [opening(), untyped_middle()[6..].to_vec(), closing()].concat();
    assert!(
        run(false, untyped)
            .unwrap_err()
            .to_string()
            .contains("archives missing")
    );
}

#[test]
fn archives_that_were_not_listed_or_come_twice_are_refused() {
    for name in [
        &b"n16386.tar\0/x\0"[..],
        b"n../x.tar\0\0",
        b"n16385.tar\0/space\0",
        b"nbase.tar",
    ] {
        let mut frames = whole(true);
        frames.insert(9, data(name));
        assert!(run(true, frames).is_err(), "{}", String::from_utf8_lossy(name));
    }
}

#[test]
fn without_a_stop_position_there_is_no_success() {
    let frames = [opening(), typed_middle(), vec![frame(tag::READY, b"I")]].concat();
    assert!(
        run(true, frames)
            .unwrap_err()
            .to_string()
            .contains("without a stop position")
    );
}

proptest! {
    /// Leaving out, repeating or swapping messages never leads to success with less than everything.
    #[test]
    fn no_disorder_looks_like_success(typed: bool, from in 0_usize..24, to in 0_usize..24, what in 0..3) {
        let mut frames = whole(typed);
        let (from, to) = (from % frames.len(), to % frames.len());
        match what {
            0 => drop(frames.remove(from)),
            1 => frames.insert(to, frames[from].clone()),
            _ => frames.swap(from, to),
        }
        if let Ok((messages, true)) = run(typed, frames) {
            let count = |wanted: fn(&BackupMessage) -> bool| messages.iter().filter(|m| wanted(m)).count();
            prop_assert_eq!(count(|m| matches!(m, BackupMessage::Start { .. })), 1);
            prop_assert_eq!(count(|m| matches!(m, BackupMessage::Stop { .. })), 1);
            prop_assert_eq!(count(|m| matches!(m, BackupMessage::ManifestBegin)), 1);
            let Some(BackupMessage::Tablespaces(listed)) = messages.get(1) else {
                return Err(TestCaseError::fail("no tablespaces"));
            };
            prop_assert_eq!(count(|m| matches!(m, BackupMessage::Archive { .. })), listed.len());
        }
    }
}
