mod smoke {
    use crate::*;
    use bytes::Bytes;
    #[test]
    fn x() {
        let mut e = FrameEncoder::new(Codec::Lz4);
        let f = e.encode(&[7; 5000]).unwrap();
        let t = TimelineId::FIRST;
        let s = seal(
            Header::wal(
                Kind::Tail,
                Codec::Lz4,
                SystemId(5),
                t,
                LsnRange::new(Lsn(1), Lsn(5001)),
            ),
            &[f],
        )
        .unwrap();
        assert_eq!(
            Object::open(Bytes::clone(&s.bytes)).unwrap().plain().unwrap(),
            vec![7; 5000]
        );
        assert_eq!(crc32fast::hash(&s.bytes), s.crc32);
        let id = BackupId::new(t, Lsn(0x2000028), "2026-11-20T14:56:53.5Z".parse().unwrap());
        assert_eq!(id.to_string(), "00000001-0000000002000028-20261120T145653Z");
        assert_eq!(BackupId::parse(id.as_str()).unwrap(), id);
        fn send<T: Send>() {}
        send::<FrameEncoder>();
    }
}
