use proptest::prelude::*;

use super::*;
use crate::message::tag;
use crate::stream::Transport;

const KNOWN: &[u8] = b"RKCdcGHWDIEvNASZT";

fn encode(messages: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (tag, body) in messages {
        out.push(*tag);
        out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend_from_slice(body);
    }
    out
}

fn messages() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let one = (
        proptest::sample::select(KNOWN),
        proptest::collection::vec(any::<u8>(), 0..200),
    );
    proptest::collection::vec(one, 1..20)
}

proptest! {
    #[test]
    fn frames_survive_any_cut(messages in messages(), cuts in proptest::collection::vec(1_usize..40, 1..50)) {
        let bytes = encode(&messages);
        let mut buffer = BytesMut::new();
        let mut found = Vec::new();
        let mut rest = bytes.as_slice();
        for cut in cuts.iter().cycle() {
            while let Some(frame) = split_frame(&mut buffer, LIMIT_COPY).unwrap() {
                found.push((frame.tag, frame.body.to_vec()));
            }
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            buffer.extend_from_slice(piece);
            rest = after;
        }
        prop_assert_eq!(found, messages);
        prop_assert!(buffer.is_empty());
    }

    #[test]
    fn any_bytes_give_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let mut buffer = BytesMut::from(bytes.as_slice());
        while let Ok(Some(frame)) = split_frame(&mut buffer, 1000) {
            prop_assert!(tag::is_known(frame.tag));
        }
    }
}

#[test]
fn lengths_are_checked_before_the_body_arrives() {
    let claim = |len: u32| {
        let mut buffer = BytesMut::from([&b"d"[..], &len.to_be_bytes()].concat().as_slice());
        split_frame(&mut buffer, 1000).map(|frame| frame.is_some())
    };
    assert!(claim(0).unwrap_err().contains("length"));
    assert!(claim(3).unwrap_err().contains("length"));
    assert_eq!(claim(4), Ok(true));
    assert_eq!(claim(1004), Ok(false));
    assert!(claim(1005).unwrap_err().contains("limit"));
    assert!(claim(0x7fff_ffff).unwrap_err().contains("limit"));
    assert!(claim(0x8000_0000).unwrap_err().contains("length"));
}

#[test]
fn another_protocol_is_found_out_by_its_first_bytes() {
    let mut buffer = BytesMut::from(&b"HTTP/1.1 400 Bad Request"[..]);
    assert!(split_frame(&mut buffer, LIMIT_STARTUP).is_err());
    let mut buffer = BytesMut::from(&b"\x16\x03\x01\x02\x00"[..]);
    assert!(
        split_frame(&mut buffer, LIMIT_STARTUP)
            .unwrap_err()
            .contains("unknown message type")
    );
}

fn pair() -> (FrameReader, tokio::io::DuplexStream) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (read, _) = Transport::Given(Box::new(ours)).split();
    (FrameReader::new(read), theirs)
}

#[tokio::test]
async fn a_dropped_read_loses_nothing() {
    let (mut reader, mut peer) = pair();
    let bytes = encode(&[(b'd', vec![7; 300]), (b'Z', vec![b'I'])]);
    for byte in bytes {
        let idle = tokio::time::timeout(Duration::ZERO, reader.next("test")).await;
        if let Ok(frame) = idle {
            assert_eq!(frame.unwrap().unwrap().body.len(), 300);
        }
        AsyncWriteExt::write_all(&mut peer, &[byte]).await.unwrap();
    }
    assert_eq!(reader.next("test").await.unwrap().unwrap().tag, b'Z');
}

#[tokio::test]
async fn the_end_between_and_inside_messages() {
    let (mut reader, peer) = pair();
    drop(peer);
    assert!(reader.next("test").await.unwrap().is_none());
    let (mut reader, mut peer) = pair();
    AsyncWriteExt::write_all(&mut peer, b"d\0\0\0\x09ab")
        .await
        .unwrap();
    drop(peer);
    assert!(
        reader
            .next("test")
            .await
            .unwrap_err()
            .to_string()
            .contains("inside a message")
    );
}

#[tokio::test]
async fn bodies_are_slices_of_the_read_buffer() {
    let (mut reader, mut peer) = pair();
    let bytes = encode(&[(b'd', vec![1; 100]), (b'd', vec![2; 100])]);
    AsyncWriteExt::write_all(&mut peer, &bytes).await.unwrap();
    let first = reader.next("test").await.unwrap().unwrap().body;
    let second = reader.next("test").await.unwrap().unwrap().body;
    assert_eq!(first.as_ptr() as usize + 105, second.as_ptr() as usize);
}

#[tokio::test]
async fn messages_stay_what_they_are_while_blocks_are_used_again() {
    const MESSAGE: usize = 50_000;
    let (mut reader, mut peer) = pair();
    let sender = tokio::spawn(async move {
        for number in 0..400_u32 {
            let body = [
                number.to_be_bytes().to_vec(),
                vec![number.to_le_bytes()[0]; MESSAGE],
            ]
            .concat();
            AsyncWriteExt::write_all(&mut peer, &encode(&[(b'd', body)]))
                .await
                .unwrap();
        }
    });
    // Hold messages for a varying while: none may change after later ones were read.
    let mut held: VecDeque<(u32, Bytes)> = VecDeque::new();
    for number in 0..400_u32 {
        let body = reader.next("test").await.unwrap().unwrap().body;
        held.push_back((number, body));
        while held.len() > usize::try_from(number % 37).unwrap() {
            let (number, body) = held.pop_front().unwrap();
            assert_eq!(body[..4], number.to_be_bytes());
            assert!(body[4..].iter().all(|byte| *byte == number.to_le_bytes()[0]));
        }
        assert!(reader.spares.len() <= SPARE_BLOCKS);
    }
    sender.await.unwrap();
    assert!(reader.spares.len() > 1);
}

#[tokio::test]
async fn gathering_waits_once_after_a_read_that_outran_the_stream() {
    let (mut reader, mut peer) = pair();
    reader.set_gathering(true);
    let mut sizes = Vec::new();
    for length in [8 * 1024, 100, 30 * 1024, 1] {
        let bytes = encode(&[(b'd', vec![7; length])]);
        AsyncWriteExt::write_all(&mut peer, &bytes).await.unwrap();
        sizes.push(reader.next("test").await.unwrap().unwrap().body.len());
        assert_eq!(reader.trickles, length > 4 * 1024, "{length}");
    }
    assert_eq!(sizes, [8 * 1024, 100, 30 * 1024, 1]);
    // Nothing arrives: the wait is not repeated by whoever asks again.
    AsyncWriteExt::write_all(&mut peer, &encode(&[(b'd', vec![7; 8 * 1024])]))
        .await
        .unwrap();
    reader.next("test").await.unwrap();
    for _ in 0..2 {
        let idle = tokio::time::timeout(Duration::ZERO, reader.next("test")).await;
        assert!(idle.is_err() && !reader.trickles);
    }
}
