//! The container: whatever is sealed is read back, and whatever is damaged is refused.

use bytes::{Bytes, BytesMut};
use highwater_format::container::{FOOTER_LEN, FRAME_SIZE, MAX_OBJECT_PLAIN};
use highwater_format::*;
use proptest::prelude::*;

use crate::keys::{any_time, any_timeline};
use crate::samples::{self, SYSTEM, Sample};

fn any_codec() -> impl Strategy<Value = Codec> {
    prop::sample::select(Codec::ALL.to_vec())
}

/// Bytes that compress, bytes that do not, and both in turn.
fn any_plain(max: usize) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..400),
        (any::<u8>(), 1..4000_usize).prop_map(|(byte, len)| vec![byte; len]),
        (1..4000_usize).prop_map(samples::wal_like),
    ];
    prop::collection::vec(piece, 1..6).prop_map(move |pieces| {
        let mut plain = pieces.concat();
        plain.truncate(max);
        plain
    })
}

fn any_sample() -> impl Strategy<Value = Sample> {
    let times = (proptest::option::of((any_time(), any_time())), any_time());
    let frames = prop::collection::vec(any_plain(20_000), 1..4);
    (
        any_codec(),
        any_timeline(),
        any::<u32>(),
        any::<u32>(),
        times,
        any::<bool>(),
        frames,
    )
        .prop_map(
            |(codec, tli, start, server_end, (commits, sealed_at), pack, frames)| {
                let len: u64 = frames.iter().map(|frame| frame.len() as u64).sum();
                let start = Lsn(u64::from(start));
                let mut header = if pack {
                    Header::pack(codec, SYSTEM, tli, 3)
                } else {
                    Header::wal(Kind::Tail, codec, SYSTEM, tli, LsnRange::new(start, start + len))
                };
                (header.first_commit, header.last_commit) = commits.unzip();
                header.sealed_at = sealed_at;
                header.server_end = Lsn(u64::from(server_end));
                Sample {
                    name: String::new(),
                    header,
                    frames,
                }
            },
        )
}

fn flip(bytes: &Bytes, bit: usize) -> Bytes {
    let mut damaged = BytesMut::from(&bytes[..]);
    damaged[bit / 8] ^= 1 << (bit % 8);
    damaged.freeze()
}

/// Makes the checksums right again after a change, as a broken writer or a forger would.
fn mend(bytes: &mut [u8]) {
    if bytes.len() < Header::LEN + FOOTER_LEN {
        return;
    }
    let crc = crc32fast::hash(&bytes[..124]);
    bytes[124..128].copy_from_slice(&crc.to_le_bytes());
    let end = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
}

proptest! {
    #[test]
    fn what_is_sealed_is_read_back(sample in any_sample()) {
        let sealed = sample.seal();
        prop_assert_eq!(sealed.crc32, crc32fast::hash(&sealed.bytes));
        let object = Object::open(sealed.bytes.clone()).unwrap();
        prop_assert_eq!(object.bytes(), &sealed.bytes);
        prop_assert_eq!(object.header(), &sealed.header);
        prop_assert_eq!(Header::decode(&sealed.bytes).unwrap(), sealed.header);
        prop_assert_eq!(object.plain().unwrap(), sample.plain());
        let mut offset = 0;
        for (frame, plain) in object.frames().zip(&sample.frames) {
            prop_assert_eq!((frame.plain_offset, frame.plain_len as usize), (offset, plain.len()));
            let mut out = b"before".to_vec();
            frame.decode_into(&mut out).unwrap();
            prop_assert_eq!(&out[..6], b"before");
            prop_assert_eq!(&out[6..], &plain[..]);
            offset += plain.len() as u64;
        }
    }

    #[test]
    fn any_flipped_bit_is_seen(sample in any_sample(), at in any::<prop::sample::Index>()) {
        let bytes = sample.bytes();
        let bit = at.index(bytes.len() * 8);
        let error = Object::open(flip(&bytes, bit)).unwrap_err();
        prop_assert_eq!(error.kind(), FormatErrorKind::Corrupt, "bit {}: {}", bit, error);
    }

    #[test]
    fn any_truncation_is_seen(sample in any_sample(), at in any::<prop::sample::Index>(), more in 1..50_usize) {
        let bytes = sample.bytes();
        prop_assert!(Object::open(bytes.slice(..at.index(bytes.len()))).is_err());
        let longer = [&bytes[..], &vec![0; more]].concat();
        prop_assert!(Object::open(longer.into()).is_err());
    }

    #[test]
    fn a_forged_object_never_panics(
        sample in any_sample(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        near_the_end in any::<bool>(),
    ) {
        let mut bytes = sample.bytes().to_vec();
        let window = if near_the_end { bytes.len().min(60) } else { bytes.len() };
        for (at, with) in changes {
            let at = bytes.len() - window + at.index(window);
            bytes[at] = with;
        }
        mend(&mut bytes);
        let opened = Object::open(bytes.into());
        if let Ok(plain) = opened.as_ref().map_err(FormatError::clone).and_then(Object::plain) {
            prop_assert_eq!(plain.len() as u64, opened.unwrap().header().plain_len);
        }
    }

    #[test]
    fn rubbish_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Header::decode(&bytes).is_err());
        prop_assert!(Object::open(bytes.clone().into()).is_err());
        mend(&mut bytes);
        let _ = Object::open(bytes.into());
    }

    #[test]
    fn an_encoder_carries_nothing_from_one_frame_to_the_next(codec in any_codec(), frames in prop::collection::vec(any_plain(50_000), 1..5)) {
        let mut kept = FrameEncoder::new(codec);
        for plain in frames {
            prop_assert_eq!(kept.encode(&plain).unwrap(), FrameEncoder::new(codec).encode(&plain).unwrap());
        }
    }
}

#[test]
fn every_flipped_bit_of_a_small_object_is_seen() {
    for codec in Codec::ALL {
        let bytes = samples::example(codec).bytes();
        for bit in 0..bytes.len() * 8 {
            let error = Object::open(flip(&bytes, bit)).unwrap_err();
            assert_eq!(
                error.kind(),
                FormatErrorKind::Corrupt,
                "bit {bit} of {codec}: {error}"
            );
        }
    }
}

#[test]
fn a_frame_with_a_right_envelope_and_wrong_bytes_is_seen() {
    for codec in Codec::ALL {
        let mut bytes = samples::example(codec).bytes().to_vec();
        bytes[Header::LEN + 12] ^= 1;
        mend(&mut bytes);
        let object = Object::open(bytes.into()).unwrap();
        let mut out = b"before".to_vec();
        let error = object.frames().next().unwrap().decode_into(&mut out).unwrap_err();
        assert_eq!(error.kind(), FormatErrorKind::Corrupt);
        assert_eq!(out, b"before", "nothing unverified is left behind");
        assert!(object.plain().is_err());
    }
}

#[test]
fn full_frames_of_every_codec_work_and_never_grow() {
    for codec in Codec::ALL {
        let mut encoder = FrameEncoder::new(codec);
        for plain in [
            samples::noise(FRAME_SIZE as usize),
            samples::wal_like(FRAME_SIZE as usize),
            vec![0],
        ] {
            let frame = encoder.encode(&plain).unwrap();
            assert!(frame.bytes.len() <= plain.len() + 12);
            let header = Header::pack(codec, SYSTEM, samples::timeline(1), 0);
            let sealed = seal(header, &[frame]).unwrap();
            assert_eq!(Object::open(sealed.bytes).unwrap().plain().unwrap(), plain);
        }
        for plain in [vec![], vec![0; FRAME_SIZE as usize + 1]] {
            assert_eq!(
                encoder.encode(&plain).unwrap_err().kind(),
                FormatErrorKind::Invalid
            );
        }
    }
}

/// Changes one byte of a good object and mends the checksums: a writer meant it.
fn meant(at: usize, with: u8) -> FormatError {
    let mut bytes = samples::example(Codec::None).bytes().to_vec();
    bytes[at] = with;
    mend(&mut bytes);
    Object::open(bytes.into()).unwrap_err()
}

#[test]
fn what_a_newer_release_may_write_is_named() {
    assert_eq!(meant(8, 2).kind(), FormatErrorKind::NewerVersion);
    assert_eq!(meant(9, 1).kind(), FormatErrorKind::NewerVersion);
    assert_eq!(meant(10, 9), FormatError::UnknownKind(9));
    assert_eq!(meant(11, 7), FormatError::UnknownCodec(7));
    assert_eq!(meant(12, 5), FormatError::UnknownCipher(5));
    assert_eq!(meant(12, 1), FormatError::Encrypted(Cipher::Aes256Gcm));
    assert_eq!(FormatError::UnknownCodec(7).kind(), FormatErrorKind::Unsupported);
    assert!(FormatError::UnknownCodec(7).to_string().contains('7'));
}

#[test]
fn the_header_of_an_encrypted_object_can_be_read() {
    let mut bytes = samples::example(Codec::None).bytes().to_vec();
    bytes[12] = 1;
    bytes[88] = 0xAB;
    mend(&mut bytes);
    let header = Header::decode(&bytes).unwrap();
    assert_eq!((header.cipher, header.key_id[0]), (Cipher::Aes256Gcm, 0xAB));
    bytes[120] = 1;
    mend(&mut bytes);
    assert_eq!(
        Header::decode(&bytes).unwrap_err().kind(),
        FormatErrorKind::Corrupt,
        "reserved bytes"
    );
}

/// A pack with one frame, so that lengths can be forged without contradicting a range.
fn forged_pack(codec: Codec, change: impl FnOnce(&mut Vec<u8>)) -> Result<Vec<u8>, FormatError> {
    let frame = FrameEncoder::new(codec).encode(&[7; 64])?;
    let mut bytes = seal(Header::pack(codec, SYSTEM, samples::timeline(1), 0), &[frame])?
        .bytes
        .to_vec();
    change(&mut bytes);
    mend(&mut bytes);
    Object::open(bytes.into())?.plain()
}

#[test]
fn lengths_that_lie_are_damage() {
    let plain_len = |bytes: &mut Vec<u8>, len: u8| (bytes[48], bytes[Header::LEN + 4]) = (len, len);
    assert_eq!(forged_pack(Codec::Lz4, |_| ()).unwrap(), [7; 64]);
    let forged = [
        (
            "shorter, raw",
            forged_pack(Codec::None, |bytes| plain_len(bytes, 63)),
        ),
        ("no bytes", forged_pack(Codec::None, |bytes| plain_len(bytes, 0))),
        (
            "frame size",
            forged_pack(Codec::None, |bytes| {
                bytes[16..20].copy_from_slice(&63_u32.to_le_bytes())
            }),
        ),
        (
            "footer",
            forged_pack(Codec::None, |bytes| {
                let at = bytes.len() - FOOTER_LEN + 4;
                bytes[at] = 1;
            }),
        ),
    ];
    for (what, result) in forged {
        assert_eq!(result.unwrap_err().kind(), FormatErrorKind::Corrupt, "{what}");
    }
    // One byte more than the payload holds, with a checksum that counts the zero it would leave.
    for codec in [Codec::Lz4, Codec::Zstd] {
        let longer = crc32fast::hash(&[vec![7; 64], vec![0]].concat());
        let result = forged_pack(codec, |bytes| {
            plain_len(bytes, 65);
            bytes[Header::LEN + 8..Header::LEN + 12].copy_from_slice(&longer.to_le_bytes());
        });
        assert_eq!(result.unwrap_err().kind(), FormatErrorKind::Corrupt, "{codec}");
    }
}

#[test]
fn impossible_headers_are_damage() {
    // Version 0, reserved bytes, frame size, timeline 0, key id, nonce, one commit time without the other.
    for (at, with) in [
        (8, 0),
        (13, 1),
        (15, 1),
        (18, 0x11),
        (20, 0),
        (88, 1),
        (104, 1),
        (115, 1),
        (120, 1),
        (63, 0x80),
    ] {
        assert_eq!(meant(at, with).kind(), FormatErrorKind::Corrupt, "byte {at}");
    }
    for at in [Header::LEN - 90, 48] {
        assert_eq!(meant(at, 0x77).kind(), FormatErrorKind::Corrupt, "byte {at}");
    }
}

#[test]
fn seal_refuses_what_no_reader_would_accept() {
    let mut encoder = FrameEncoder::new(Codec::None);
    let frame = encoder.encode(&[1; 64]).unwrap();
    let good = samples::tail(Codec::None).header;
    let range = |start, end| Header {
        start,
        end,
        ..good.clone()
    };
    let bad = [
        ("length", range(0, 63), vec![frame.clone()]),
        (
            "plain length",
            Header {
                plain_len: 63,
                ..range(0, 64)
            },
            vec![frame.clone()],
        ),
        ("empty", range(0, 0), vec![]),
        (
            "frame size",
            Header {
                frame_size: 63,
                ..range(0, 64)
            },
            vec![frame.clone()],
        ),
        (
            "segment",
            Header {
                kind: Kind::Segment,
                ..range(0, 64)
            },
            vec![frame.clone()],
        ),
        (
            "pack",
            Header {
                kind: Kind::Pack,
                ..range(0, 2)
            },
            vec![frame.clone()],
        ),
        (
            "commits",
            Header {
                last_commit: None,
                ..range(0, 64)
            },
            vec![frame.clone()],
        ),
    ];
    for (what, header, frames) in bad {
        assert_eq!(
            seal(header, &frames).unwrap_err().kind(),
            FormatErrorKind::Invalid,
            "{what}"
        );
    }
    let whole = encoder.encode(&vec![0; FRAME_SIZE as usize]).unwrap();
    let mut shifted = samples::segment(Codec::None).header;
    (shifted.start, shifted.end) = (shifted.start + 8192, shifted.end + 8192);
    let error = seal(shifted, std::slice::from_ref(&whole)).unwrap_err();
    assert_eq!(
        error.kind(),
        FormatErrorKind::Invalid,
        "a segment begins at a multiple of its size"
    );
    let too_much = vec![whole; usize::try_from(MAX_OBJECT_PLAIN >> 20).unwrap() + 1];
    let error = seal(range(0, MAX_OBJECT_PLAIN + u64::from(FRAME_SIZE)), &too_much).unwrap_err();
    assert_eq!(error.kind(), FormatErrorKind::Invalid);
    let encrypted = Header {
        cipher: Cipher::Aes256Gcm,
        ..range(0, 64)
    };
    assert_eq!(
        seal(encrypted, std::slice::from_ref(&frame)).unwrap_err(),
        FormatError::Encrypted(Cipher::Aes256Gcm)
    );
    seal(range(0, 64), &[frame]).unwrap();
}

#[test]
fn an_object_under_another_key_is_a_mismatch() {
    let sample = samples::segment(Codec::Lz4);
    let object = Object::open(sample.bytes()).unwrap();
    let size = SegmentSize::from_show(samples::SEGMENT).unwrap();
    let name = SegmentName {
        timeline: samples::timeline(1),
        number: 32,
    };
    let good = Expect::segment(SYSTEM, name, size);
    object.expect(&good).unwrap();
    let bad = [
        ("kind", Expect::tail(SYSTEM, name.timeline, name.range(size))),
        ("system identifier", Expect::segment(SystemId(1), name, size)),
        (
            "timeline",
            Expect::segment(
                SYSTEM,
                SegmentName {
                    timeline: samples::timeline(2),
                    ..name
                },
                size,
            ),
        ),
        ("range", Expect::segment(SYSTEM, name.next(), size)),
        (
            "range",
            Expect {
                end: good.end - 1,
                ..good.clone()
            },
        ),
    ];
    for (field, expect) in bad {
        let error = object.expect(&expect).unwrap_err();
        assert_eq!(error.kind(), FormatErrorKind::Mismatch);
        assert!(error.to_string().contains(field), "{error}");
    }
    let pack = Object::open(samples::pack(Codec::Zstd).bytes()).unwrap();
    pack.expect(&Expect::pack(SYSTEM, &samples::backup_id(), 7))
        .unwrap();
    assert!(
        pack.expect(&Expect::pack(SYSTEM, &samples::backup_id(), 8))
            .is_err()
    );
}

#[test]
fn encoders_can_be_moved_to_worker_threads() {
    fn is_send<T: Send + 'static>() {}
    is_send::<FrameEncoder>();
    is_send::<Object>();
}
