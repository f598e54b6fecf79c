//! The values behind the golden bytes and the examples of `FORMAT.md`. Changing one of them contradicts a
//! released format: add new ones instead.

use bytes::Bytes;
use highwater_format::*;

pub(crate) const SYSTEM: SystemId = SystemId(7_437_620_198_731_455_503);
pub(crate) const SEGMENT: &str = "1MB";

pub(crate) fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

pub(crate) fn time(text: &str) -> Time {
    text.parse().unwrap()
}

pub(crate) fn backup_id() -> BackupId {
    BackupId::new(timeline(1), Lsn(0x200_0028), time("2026-11-20T14:56:53.123456Z"))
}

/// Bytes that compress about as WAL does: runs of a counter between runs of zeros.
pub(crate) fn wal_like(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| {
            if (i / 48) % 3 == 0 {
                u8::try_from(i % 251).unwrap()
            } else {
                0
            }
        })
        .collect()
}

/// Bytes that no codec makes smaller (a linear congruential generator, Numerical Recipes).
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) header: Header,
    pub(crate) frames: Vec<Vec<u8>>,
}

impl Sample {
    pub(crate) fn plain(&self) -> Vec<u8> {
        self.frames.concat()
    }

    pub(crate) fn seal(&self) -> Sealed {
        let mut encoder = FrameEncoder::new(self.header.codec);
        let frames: Vec<Frame> = self
            .frames
            .iter()
            .map(|plain| encoder.encode(plain).unwrap())
            .collect();
        seal(self.header.clone(), &frames).unwrap()
    }

    pub(crate) fn bytes(&self) -> Bytes {
        self.seal().bytes
    }
}

/// One object of every kind and codec.
pub(crate) fn objects() -> Vec<Sample> {
    Codec::ALL
        .into_iter()
        .flat_map(|codec| [segment(codec), tail(codec), pack(codec)])
        .collect()
}

pub(crate) fn segment(codec: Codec) -> Sample {
    let size = SegmentSize::from_show(SEGMENT).unwrap();
    let name = SegmentName {
        timeline: timeline(1),
        number: 32,
    };
    let mut header = Header::wal(Kind::Segment, codec, SYSTEM, name.timeline, name.range(size));
    header.sealed_at = time("2026-11-20T14:56:54Z");
    header.server_end = Lsn(0x210_0000);
    Sample {
        name: format!("segment-{codec}"),
        header,
        frames: vec![wal_like(1 << 20)],
    }
}

pub(crate) fn tail(codec: Codec) -> Sample {
    let range = LsnRange::new(Lsn(0x1_0200_0000), Lsn(0x1_0200_0300));
    let mut header = Header::wal(Kind::Tail, codec, SYSTEM, timeline(2), range);
    header.first_commit = Some(time("2026-11-20T14:56:53.000001Z"));
    header.last_commit = Some(time("2026-11-20T14:56:53.999999Z"));
    header.sealed_at = time("2026-11-20T14:56:54.5Z");
    header.server_end = Lsn(0x1_0200_0400);
    Sample {
        name: format!("tail-{codec}"),
        header,
        frames: vec![wal_like(512), noise(256)],
    }
}

pub(crate) fn pack(codec: Codec) -> Sample {
    let mut header = Header::pack(codec, SYSTEM, timeline(1), 7);
    header.sealed_at = time("2026-11-20T14:57:01Z");
    header.server_end = Lsn(0x200_0100);
    Sample {
        name: format!("pack-{codec}"),
        header,
        frames: vec![wal_like(4096), wal_like(1000)],
    }
}

/// The object that `FORMAT.md` takes apart byte by byte.
pub(crate) fn example(codec: Codec) -> Sample {
    let range = LsnRange::new(Lsn(0x200_0028), Lsn(0x200_0048));
    let mut header = Header::wal(Kind::Tail, codec, SYSTEM, timeline(1), range);
    header.first_commit = Some(time("2026-11-20T14:56:53.123456Z"));
    header.last_commit = header.first_commit;
    header.sealed_at = time("2026-11-20T14:56:54Z");
    header.server_end = Lsn(0x200_0048);
    Sample {
        name: "example".to_owned(),
        header,
        frames: vec![b"highwater highwater highwater hi".to_vec()],
    }
}

pub(crate) fn identity() -> Identity {
    Identity {
        system_id: SYSTEM,
        server_version: 150_020,
        segment_size: SegmentSize::from_show("16MB").unwrap(),
        wal_block_size: 8192,
        block_size: 8192,
    }
}

pub(crate) fn gap() -> Gap {
    Gap {
        timeline: timeline(1),
        start: Lsn(0x300_0000),
        end: Lsn(0x700_0000),
        reason: "the server had already removed this WAL: slot \"highwater\" was dropped".to_owned(),
        recorded_at: time("2026-11-20T15:10:00Z"),
        unreplayable: false,
    }
}

pub(crate) fn writer() -> Writer {
    Writer {
        epoch: 3,
        instance: "5f0c9a7e21d84b63".to_owned(),
        host: "orders-0".to_owned(),
        pid: 17,
        timeline: timeline(1),
        claimed_at: time("2026-11-20T14:00:00Z"),
        begins: None,
        machine: None,
        interval_ms: None,
    }
}

pub(crate) fn pulse() -> Pulse {
    Pulse {
        timeline: timeline(1),
        server_time: time("2026-11-20T14:56:55.25Z"),
        wal_end: Lsn(0x200_0148),
        durable_lsn: Lsn(0x200_0148),
        stored_lsn: Lsn(0x200_0148),
        last_commit: Some(time("2026-11-20T14:56:53.123456Z")),
        instance: "5f0c9a7e21d84b63".to_owned(),
        sequence: 691,
        quorum: None,
        interval_ms: None,
        waiting_ms: None,
        answered_at: None,
    }
}

pub(crate) fn backup() -> Backup {
    Backup {
        id: backup_id(),
        system_id: SYSTEM,
        server_version: 150_020,
        timeline: timeline(1),
        start_lsn: Lsn(0x200_0028),
        stop_lsn: Lsn(0x200_0138),
        stop_timeline: timeline(1),
        started_at: time("2026-11-20T14:56:53.123456Z"),
        finished_at: time("2026-11-20T14:57:02Z"),
        label: "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nSTART TIMELINE: 1\n"
            .to_owned(),
        tablespaces: vec![Tablespace {
            oid: 16385,
            location: "/mnt/fast/ts".to_owned(),
        }],
        from_standby: false,
        files: 3,
        plain_bytes: 16_390,
        stored_bytes: 5_000,
        packs: 2,
        manifest_crc32: crc32_hex(crc32fast::hash(&encode(&manifest()).unwrap())),
        pg_manifest: false,
        codec: Codec::Zstd,
    }
}

pub(crate) fn manifest() -> Manifest {
    let pack = |number, plain_len, stored_len| PackInfo {
        number,
        plain_len,
        stored_len,
        crc32: "0a1b2c3d".into(),
    };
    let entry = |path: &str, kind, mode, size, extents| Entry {
        path: path.to_owned(),
        kind,
        mode,
        mtime: 1_795_186_613,
        size,
        link: (kind == EntryKind::Symlink).then(|| "/mnt/fast/ts".to_owned()),
        extents,
    };
    Manifest {
        backup: backup_id(),
        packs: vec![pack(0, 8200, 2600), pack(1, 8190, 2400)],
        entries: vec![
            entry("base", EntryKind::Directory, 0o700, 0, vec![]),
            entry(
                "PG_VERSION",
                EntryKind::File,
                0o600,
                3,
                vec![Extent {
                    pack: 0,
                    offset: 0,
                    len: 3,
                }],
            ),
            entry("base/empty", EntryKind::File, 0o600, 0, vec![]),
            entry("pg_tblspc/16385", EntryKind::Symlink, 0o777, 0, vec![]),
            entry(
                "pg_tblspc/16385/PG_15_202209061/5/16386",
                EntryKind::File,
                0o600,
                16_387,
                vec![
                    Extent {
                        pack: 0,
                        offset: 3,
                        len: 8197,
                    },
                    Extent {
                        pack: 1,
                        offset: 0,
                        len: 8190,
                    },
                ],
            ),
        ],
    }
}

/// Every document under the name of its golden file.
pub(crate) fn documents() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("identity.json", encode(&identity()).unwrap()),
        ("gap.json", encode(&gap()).unwrap()),
        ("writer.json", encode(&writer()).unwrap()),
        ("pulse.json", encode(&pulse()).unwrap()),
        ("backup.json", encode(&backup()).unwrap()),
        ("manifest.json", encode(&manifest()).unwrap()),
    ]
}

pub(crate) const HISTORY: &[u8] =
    b"1\t0/A000178\tno recovery target specified\n\n2\t1/2000000\tbefore 2026-11-20 14:56:53.123456+00\n";

/// Every form of key, in the order of `FORMAT.md`.
pub(crate) fn keys() -> Vec<(&'static str, String)> {
    let layout = Layout::new("orders".parse().unwrap(), SYSTEM);
    let range = LsnRange::new(Lsn(0x1_0200_0000), Lsn(0x1_0200_0300));
    let size = SegmentSize::DEFAULT;
    vec![
        ("identity", layout.identity()),
        ("history", layout.history(timeline(2))),
        (
            "segment",
            layout.segment(
                SegmentName {
                    timeline: timeline(1),
                    number: 2,
                },
                size,
            ),
        ),
        ("tail", layout.tail(timeline(2), range)),
        ("gap", layout.gap(timeline(1), gap().range())),
        ("pack", layout.pack(&backup_id(), 7)),
        ("manifest", layout.manifest(&backup_id())),
        ("backup", layout.backup(&backup_id())),
        ("writer", layout.writer(3)),
        ("pulse", layout.pulse()),
    ]
}
