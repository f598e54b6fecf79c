use super::*;

fn server(request: &str, code: &str, message: &str, detail: &str) -> PgError {
    let mut body = Vec::new();
    for (tag, value) in [
        (b'S', "FEHLER"),
        (b'V', "ERROR"),
        (b'C', code),
        (b'M', message),
        (b'D', detail),
    ] {
        if !value.is_empty() {
            body.push(tag);
            body.extend_from_slice(value.as_bytes());
            body.push(0);
        }
    }
    body.push(0);
    PgError::Server(Box::new(ServerError::parse(request, &body)))
}

const START: &str = "START_REPLICATION PHYSICAL 0/9000000 TIMELINE 1";

#[test]
fn ahead_of_server_is_read_from_the_numbers_in_any_language() {
    for message in [
        "requested starting point 0/9000000 is ahead of the WAL flush position of this server 0/3000148",
        "angeforderter Startpunkt 0/9000000 ist vor der WAL-Flush-Position dieses Servers 0/3000148",
    ] {
        let error = server(START, "XX000", message, "");
        assert_eq!(error.ahead_of_server(), Some(Lsn(0x300_0148)), "{message}");
        assert_eq!(error.fork_point(), None);
        assert_eq!(error.kind(), PgErrorKind::Refused);
    }
}

#[test]
fn fork_point_is_read_from_the_detail() {
    let error = server(
        START,
        "XX000",
        "requested starting point 0/9000000 on timeline 1 is not in this server's history",
        "This server's history forked from timeline 1 at 0/5000060.",
    );
    assert_eq!(
        error.fork_point(),
        Some(ForkPoint {
            timeline: TimelineId::new(1),
            lsn: Lsn(0x500_0060)
        })
    );
    assert_eq!(error.ahead_of_server(), None);
    assert!(error.is_not_in_history());
    assert!(
        error
            .to_string()
            .contains("next: this server followed another timeline")
    );
}

#[test]
fn unknown_timeline_is_not_in_history() {
    let error = server(
        START,
        "XX000",
        "requested timeline 7 is not in this server's history",
        "",
    );
    assert!(error.is_not_in_history());
    assert_eq!(error.fork_point(), None);
}

#[test]
fn position_errors_are_only_read_from_answers_to_start_replication() {
    let error = server("SHOW x", "XX000", "a 0/9000000 b 0/3000148", "");
    assert_eq!(error.ahead_of_server(), None);
}

#[test]
fn busy_slot_names_its_holder_and_not_a_number_in_the_slot_name() {
    let error = server(
        START,
        "55006",
        "replication slot \"a 99\" is active for PID 4711",
        "",
    );
    assert_eq!(error.slot_busy_pid(), Some(4711));
    assert_eq!(error.kind(), PgErrorKind::Retry);
    let silent = server(START, "55006", "replication slot \"n7\" is in use", "");
    assert_eq!(silent.slot_busy_pid(), None);
}

/// In the words of PostgreSQL 14 to 16, of 17 and 18, and of translations.
#[test]
fn the_limit_of_walsenders_is_read_in_any_language() {
    let refused = |message: &str| server("connecting to x", "53300", message, "");
    for (message, limit, advice) in [
        (
            "number of requested standby connections exceeds max_wal_senders (currently 0)",
            0,
            "wal_level = replica",
        ),
        (
            "number of requested standby connections exceeds \"max_wal_senders\" (currently 10)",
            10,
            "every walsender is taken",
        ),
        (
            "число запрошенных подключений резервных серверов превышает \"max_wal_senders\" (сейчас: 0)",
            0,
            "max_wal_senders = 10",
        ),
        (
            "所要求的备用服务器连接数超过了参数max_wal_senders的值(当前设置为0)",
            0,
            "switched off",
        ),
        (
            "대기 서버 연결 수가 max_wal_senders 설정값(현재 7)을 초과했습니다",
            7,
            "every walsender is taken",
        ),
    ] {
        let error = refused(message);
        assert_eq!(error.walsender_limit(), Some(limit), "{message}");
        assert!(error.to_string().contains(advice), "{error}");
    }
    for message in [
        "sorry, too many clients already",
        "too many connections for role \"max_wal_senders 0\"",
    ] {
        let error = refused(message);
        assert_eq!(error.walsender_limit(), None, "{message}");
        let text = error.to_string();
        assert!(
            text.contains("max_connections") && !text.contains("= 10"),
            "{text}"
        );
    }
    assert_eq!(
        server(START, "XX000", "max_wal_senders 0", "").walsender_limit(),
        None
    );
}

#[test]
fn missing_history_file_is_not_a_removed_segment() {
    let gone = "requested WAL segment 0001 has already been removed";
    for (state, message) in [("58P01", gone), ("58P01", "in another language"), ("XX000", gone)] {
        assert!(
            server(START, state, message, "").is_segment_removed(),
            "{state} {message}"
        );
    }
    assert!(!server(START, "XX000", "could not read from WAL segment 0001", "").is_segment_removed());
    assert!(!server("TIMELINE_HISTORY 1", "58P01", "could not open file", "").is_segment_removed());
}

#[test]
fn only_a_stream_from_a_slot_tells_that_the_slot_is_lost() {
    let streaming = "START_REPLICATION SLOT \"s\" PHYSICAL 0/9000000 TIMELINE 1";
    let lost = server(
        streaming,
        "55000",
        "can no longer get changes from replication slot",
        "",
    );
    assert!(lost.is_slot_invalidated());
    assert!(
        lost.to_string().contains("next: the slot cannot be used"),
        "{lost}"
    );
    for request in [
        START,
        "CREATE_REPLICATION_SLOT \"s\" PHYSICAL",
        "BASE_BACKUP",
        "SELECT pg_replication_slot_advance('s', '0/1')",
    ] {
        let other = server(request, "55000", "wal_level is not sufficient", "");
        assert!(!other.is_slot_invalidated(), "{request}");
        assert!(!other.to_string().contains("next:"), "{other}");
    }
}

#[test]
fn sqlstates_map_to_kinds() {
    for (code, kind) in [
        ("28P01", PgErrorKind::Operator),
        ("28000", PgErrorKind::Operator),
        ("42501", PgErrorKind::Operator),
        ("53300", PgErrorKind::Retry),
        ("57P01", PgErrorKind::Retry),
        ("57P03", PgErrorKind::Retry),
        ("42704", PgErrorKind::Refused),
        ("42710", PgErrorKind::Refused),
        ("58P01", PgErrorKind::Refused),
        ("3D000", PgErrorKind::Config),
        ("0A000", PgErrorKind::Unsupported),
        ("", PgErrorKind::Refused),
        ("é", PgErrorKind::Refused),
    ] {
        assert_eq!(server(START, code, "m", "").kind(), kind, "{code}");
    }
}

#[test]
fn fields_may_be_cut_or_missing() {
    let error = ServerError::parse("x", b"");
    assert_eq!(error.message, "the server gave no message");
    let cut = ServerError::parse("x", b"Mhalf a mess");
    assert_eq!(cut.message, "half a mess");
}

#[test]
fn of_several_hosts_the_hopeful_error_decides() {
    let refused = || server(START, "42704", "m", "");
    let lost = PgError::Closed { during: "x".into() };
    let all = PgError::AllHosts {
        count: 2,
        errors: vec![lost, refused()],
    };
    assert_eq!(all.kind(), PgErrorKind::Retry);
    assert_eq!(all.sqlstate(), Some("42704"));
}
