//! The segmenter against a model that is just the bytes sent.

use highwater_format::Time;
use proptest::prelude::*;

use super::*;

const MIB: usize = 1 << 20;

fn rules(interval_ms: u64, size: u64) -> Rules {
    Rules {
        interval: Duration::from_millis(interval_ms),
        size,
    }
}

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

fn segment(mib: u64) -> SegmentSize {
    SegmentSize::new(mib << 20).unwrap()
}

fn feed(segmenter: &mut Segmenter, mut data: &[u8], now: Duration, out: &mut Vec<Cut>) {
    while !data.is_empty() {
        let (head, rest) = data.split_at(data.len().min(segmenter.room()));
        segmenter.push(head, CommitSpan::default(), now, out);
        data = rest;
    }
}

/// Puts the cuts together again: frames by number, every tail and object with its bytes.
struct Reader {
    start: Lsn,
    frames: Vec<Bytes>,
    pieces: Vec<(LsnRange, Vec<u8>, bool)>,
}

impl Reader {
    fn new(start: Lsn) -> Self {
        Self {
            start,
            frames: Vec::new(),
            pieces: Vec::new(),
        }
    }

    fn take(&mut self, cuts: Vec<Cut>) {
        for cut in cuts {
            match cut {
                Cut::Frame { plain } => self.frames.push(plain),
                Cut::Tail {
                    range, frames, rest, ..
                } => {
                    let mut bytes: Vec<u8> = self.frames[frames].concat();
                    bytes.extend_from_slice(&rest);
                    self.pieces.push((range, bytes, false));
                }
                Cut::Object { range, .. } => {
                    self.pieces.push((range, self.frames.concat(), true));
                    self.frames.clear();
                }
            }
        }
    }

    fn check(&self, model: &[u8]) {
        for (range, bytes, _) in &self.pieces {
            let from = usize::try_from(range.start.distance_from(self.start)).unwrap();
            assert_eq!(range.len(), bytes.len() as u64, "{range}");
            assert!(bytes == &model[from..from + bytes.len()], "{range} differs");
        }
    }
}

#[test]
fn a_quiet_database_is_cut_by_the_interval_only() {
    let mut segmenter = Segmenter::new(rules(1000, 1 << 20), segment(16), Lsn(0), Lsn(0), ms(0));
    let mut out = Vec::new();
    feed(&mut segmenter, &[1; 100], ms(10), &mut out);
    segmenter.tick(ms(1009), &mut out);
    assert_eq!(out, []);
    segmenter.tick(ms(1010), &mut out);
    assert!(
        matches!(&out[..], [Cut::Tail { range, .. }] if *range == LsnRange { start: Lsn(0), end: Lsn(100) })
    );
    assert_eq!(segmenter.deadline(), None);
}

#[test]
fn a_fast_stream_writes_no_tail_chunks() {
    let mut segmenter = Segmenter::new(rules(1000, 1 << 20), segment(16), Lsn(0), Lsn(0), ms(0));
    let mut out = Vec::new();
    for step in 0..64 {
        feed(&mut segmenter, &vec![7; MIB], ms(step * 20), &mut out);
        segmenter.tick(ms(step * 20), &mut out);
    }
    assert_eq!(
        out.iter().filter(|cut| matches!(cut, Cut::Object { .. })).count(),
        4
    );
    assert_eq!(
        out.iter().filter(|cut| matches!(cut, Cut::Tail { .. })).count(),
        0
    );
}

#[test]
fn a_stream_of_middling_rate_is_cut_by_size() {
    let mut segmenter = Segmenter::new(rules(1000, 1 << 20), segment(16), Lsn(0), Lsn(0), ms(0));
    let mut out = Vec::new();
    for step in 0..8 {
        feed(&mut segmenter, &vec![7; MIB], ms(200 + step * 200), &mut out);
    }
    assert!(out.iter().filter(|cut| matches!(cut, Cut::Tail { .. })).count() >= 6);
}

#[test]
fn a_slow_segment_needs_few_chunks_to_read() {
    let mut segmenter = Segmenter::new(rules(1000, 1 << 20), segment(1), Lsn(0), Lsn(0), ms(0));
    let mut coverage = highwater_format::coverage::Coverage::new();
    for step in 0..20_000u64 {
        let mut out = Vec::new();
        feed(&mut segmenter, &[3; 40], ms(step * 2000), &mut out);
        segmenter.tick(ms(step * 2000 + 1000), &mut out);
        for cut in out {
            let Cut::Tail { range, .. } = cut else {
                panic!("only chunks so far: {cut:?}")
            };
            coverage.insert(highwater_format::coverage::Piece {
                range,
                kind: highwater_format::coverage::PieceKind::Tail,
                size: 1,
            });
        }
    }
    let all = LsnRange {
        start: Lsn(0),
        end: Lsn(800_000),
    };
    let cover = coverage.cover(all).unwrap();
    assert!(cover.len() <= 3 * FANOUT, "{} chunks", cover.len());
}

#[test]
fn what_is_already_stored_is_not_cut_again() {
    let mut segmenter = Segmenter::new(rules(1000, 1 << 20), segment(16), Lsn(0), Lsn(1_500_000), ms(0));
    let mut out = Vec::new();
    feed(&mut segmenter, &vec![1; 1_500_000], ms(0), &mut out);
    assert!(matches!(&out[..], [Cut::Frame { .. }]));
    assert!(!segmenter.has_unsealed());
    out.clear();
    feed(&mut segmenter, &[1; 10], ms(5), &mut out);
    segmenter.seal(&mut out);
    assert!(
        matches!(&out[..], [Cut::Tail { range, .. }] if *range == LsnRange { start: Lsn(1_500_000), end: Lsn(1_500_010) })
    );
}

/// What was stored of the object before is not all there, as is known only in the middle of it.
#[test]
fn an_object_is_sealed_once_more_from_its_start() {
    for lost_at in [MIB / 2, MIB + MIB / 2] {
        let start = Lsn(64 * MIB as u64);
        let model: Vec<u8> = (0..2 * MIB).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let mut segmenter = Segmenter::new(
            rules(1000, u64::MAX),
            segment(16),
            start,
            start + lost_at as u64,
            ms(0),
        );
        let (mut reader, mut out) = (Reader::new(start), Vec::new());
        feed(&mut segmenter, &model[..lost_at], ms(1), &mut out);
        assert!(!segmenter.has_unsealed());
        segmenter.seal_again(ms(2));
        assert!(segmenter.has_unsealed());
        assert_eq!(segmenter.deadline(), Some(ms(1002)));
        feed(&mut segmenter, &model[lost_at..], ms(3), &mut out);
        segmenter.seal(&mut out);
        reader.take(out);
        let (range, bytes, _) = reader.pieces.first().unwrap();
        assert_eq!((range.start, range.end), (start, segmenter.received()));
        assert!(bytes == &model);
    }
}

#[test]
fn commit_times_belong_to_the_chunk_they_end_in() {
    let mut segmenter = Segmenter::new(rules(1000, 1 << 20), segment(16), Lsn(0), Lsn(0), ms(0));
    let mut out = Vec::new();
    for second in [5, 3] {
        let mut commits = CommitSpan::default();
        commits.add(Time::from_unix_micros(second));
        segmenter.push(&[0; 8], commits, ms(0), &mut out);
        segmenter.seal(&mut out);
    }
    let spans: Vec<_> = out
        .iter()
        .map(|cut| match cut {
            Cut::Tail { commits, .. } => commits.last,
            _ => None,
        })
        .collect();
    assert_eq!(
        spans,
        [Some(Time::from_unix_micros(5)), Some(Time::from_unix_micros(3))]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn cuts_are_the_bytes_sent_and_leave_no_hole(
        mib in prop_oneof![Just(1u64), Just(2), Just(4)],
        sealed in 0u64..1_200_000,
        size in prop_oneof![Just(1u64), Just(200_000), Just(1 << 20)],
        steps in proptest::collection::vec((1usize..400_000, 0u64..1500, any::<bool>()), 1..40),
    ) {
        let start = Lsn(mib << 20);
        let mut segmenter = Segmenter::new(rules(1000, size), segment(mib), start, start + sealed, ms(0));
        let (mut model, mut now, mut reader) = (Vec::new(), 0, Reader::new(start));
        let mut coverage = highwater_format::coverage::Coverage::new();
        for (length, wait, seal) in steps {
            let data: Vec<u8> = (0..=250).cycle().skip(model.len() % 251).take(length).collect();
            let mut out = Vec::new();
            feed(&mut segmenter, &data, ms(now), &mut out);
            now += wait;
            segmenter.tick(ms(now), &mut out);
            if seal { segmenter.seal(&mut out); }
            model.extend_from_slice(&data);
            reader.take(out);
        }
        let mut out = Vec::new();
        segmenter.seal(&mut out);
        reader.take(out);
        reader.check(&model);
        for (range, _, _) in &reader.pieces {
            coverage.insert(highwater_format::coverage::Piece {
                range: *range, kind: highwater_format::coverage::PieceKind::Tail, size: 1 });
        }
        let end = start + model.len() as u64;
        let from = (start + sealed).min(end);
        prop_assert_eq!(coverage.contiguous_end(from).max(from), end);
        prop_assert_eq!(segmenter.received(), end);
    }
}
