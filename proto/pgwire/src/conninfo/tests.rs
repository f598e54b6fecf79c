use proptest::prelude::*;
use secrecy::ExposeSecret;

use super::*;
use crate::error::PgErrorKind;

fn env() -> Environment {
    Environment::empty().with_user("osuser")
}

fn resolve(text: &str) -> ConnInfo {
    ConnInfo::resolve_in(Some(text), &env()).unwrap()
}

fn error(text: &str) -> String {
    let error = ConnInfo::resolve_in(Some(text), &env()).unwrap_err();
    assert_eq!(error.kind(), PgErrorKind::Config, "{error}");
    error.to_string()
}

fn password(info: &ConnInfo) -> Option<&str> {
    info.password.as_ref().map(ExposeSecret::expose_secret)
}

#[test]
fn defaults_come_from_the_surroundings() {
    let info = ConnInfo::resolve_in(None, &env()).unwrap();
    assert_eq!((info.user.as_str(), info.dbname.as_str()), ("osuser", "osuser"));
    assert!(matches!(info.hosts[0].host, Host::Unix(_)));
    assert_eq!(info.hosts[0].port, 5432);
    assert_eq!(info.tls.mode, SslMode::Prefer);
    assert_eq!(info.connect_timeout, Some(Duration::from_secs(30)));
}

#[test]
fn values_are_unquoted_as_libpq_does() {
    let info = resolve(r" host = db  password='it\'s \\ here' application_name=a\ b  options=''");
    assert_eq!(info.hosts[0].host, Host::Tcp("db".into()));
    assert_eq!(password(&info), Some(r"it's \ here"));
    assert_eq!(info.application_name, "a b");
    assert_eq!(info.options, None);
}

#[test]
fn the_last_of_equal_keywords_counts() {
    assert_eq!(resolve("user=a user=b").user, "b");
}

#[test]
fn unknown_keywords_name_the_nearest() {
    assert!(error("hots=db").contains("did you mean \"host\"?"));
    assert!(error("ssl_mode=require").contains("did you mean \"sslmode\"?"));
    assert!(error("postgresql://db/x?aplication_name=y").contains("did you mean \"application_name\"?"));
    assert!(!error("zzzzzzzzzzzz=1").contains("did you mean"));
}

#[test]
fn what_cannot_be_honoured_is_refused_not_ignored() {
    assert!(error("sslcrl=/x").contains("revocation"));
    assert!(error("load_balance_hosts=random").contains("in order"));
    assert!(error("sslcertmode=require").contains("sslcertmode"));
    assert!(error("gssencmode=require").contains("GSSAPI"));
    resolve("gssencmode=prefer client_encoding=auto replication=database");

    let required = env().with_variable("PGGSSENCMODE", "require");
    let error = ConnInfo::resolve_in(Some("host=db"), &required).unwrap_err();
    assert!(error.to_string().contains("PGGSSENCMODE"), "{error}");
    ConnInfo::resolve_in(Some("gssencmode=disable"), &required).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(".pg_service.conf");
    std::fs::write(file, "[s]\ngssencmode=require\n").unwrap();
    let error = ConnInfo::resolve_in(Some("service=s"), &env().with_home(dir.path())).unwrap_err();
    assert!(error.to_string().contains("service file"), "{error}");
}

#[test]
fn malformed_strings_never_repeat_what_may_be_a_password() {
    for text in [
        "host=db secret",
        "password='secret",
        "=secret",
        "postgresql://u:%zzsecret@h",
        "postgresql://u:sec%00ret@h",
        "postgresql://u:secret/more@h/db",
        "postgresql://u:x/secret?more@h/db",
        "postgresql://u:p@secret@h/db",
        "postgresql://u@h/db?secret",
    ] {
        assert!(!error(text).contains("secret"), "{text}");
    }
}

/// As libpq: user and password end at the first @ before the first slash.
#[test]
fn a_password_in_a_uri_may_contain_a_question_mark() {
    let info = resolve("postgresql://hw:ab?cd@db/x?application_name=y");
    assert_eq!(password(&info), Some("ab?cd"));
    assert_eq!((info.dbname.as_str(), info.application_name.as_str()), ("x", "y"));
}

#[test]
fn uris() {
    let info =
        resolve("postgresql://us%40er:p%3Aw@h1:5433,h2,[::1]:5434/d%2Fb?application_name=x%20y&ssl=true");
    assert_eq!(info.user, "us@er");
    assert_eq!(password(&info), Some("p:w"));
    assert_eq!(info.dbname, "d/b");
    assert_eq!(info.application_name, "x y");
    assert_eq!(info.tls.mode, SslMode::Require);
    assert_eq!(info.describe(), "host=h1,h2,::1 port=5433,5432,5434 user=us@er");
}

#[test]
fn socket_uris() {
    let encoded = resolve("postgres://%2Fvar%2Frun:5433/db");
    assert_eq!(encoded.hosts[0].host, Host::Unix("/var/run".into()));
    assert_eq!(encoded.hosts[0].port, 5433);
    let parameter = resolve("postgres:///db?host=/tmp&port=6000");
    assert_eq!(parameter.hosts[0].to_string(), "/tmp/.s.PGSQL.6000");
    assert!(error("postgres://[::1/db").contains("]"));
    assert!(error("postgres://h/db?x").contains("="));
}

#[test]
fn hosts_addresses_and_ports_pair_up() {
    let info = resolve("host=a,b hostaddr=10.0.0.1,::2 port=1,2");
    assert_eq!(info.hosts[1].hostaddr, Some("::2".parse().unwrap()));
    assert_eq!((info.hosts[0].port, info.hosts[1].port), (1, 2));
    assert_eq!(resolve("host=a,b port=7").hosts[1].port, 7);
    assert_eq!(
        resolve("hostaddr=10.0.0.1").hosts[0].host,
        Host::Tcp("10.0.0.1".into())
    );
    let both = resolve("host=/tmp,/tmp hostaddr=10.0.0.1, sslmode=require");
    assert_eq!(both.hosts[0].host, Host::Tcp("10.0.0.1".into()));
    assert_eq!(both.hosts[1].host, Host::Unix("/tmp".into()));
    assert!(error("host=a,b port=1,2,3").contains("port"));
    assert!(error("host=a hostaddr=10.0.0.1,10.0.0.2").contains("hostaddr"));
    assert!(error("hostaddr=db").contains("numeric"));
    assert!(error("port=0").contains("65535"));
    assert!(error("port=x").contains("65535"));
}

#[test]
fn the_connection_string_beats_the_service_beats_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join(".pg_service.conf"),
        "[s]\nuser=service\nhost=service\n",
    )
    .unwrap();
    let env = env()
        .with_home(dir.path())
        .with_variable("PGSERVICE", "s")
        .with_variable("PGUSER", "environment")
        .with_variable("PGHOST", "environment")
        .with_variable("PGPORT", "99");
    let info = ConnInfo::resolve_in(Some("user=string"), &env).unwrap();
    assert_eq!(info.describe(), "host=service port=99 user=string");
    let missing = ConnInfo::resolve_in(Some("service=t"), &env).unwrap_err();
    assert!(missing.to_string().contains(".pg_service.conf"), "{missing}");
}

#[test]
fn a_bad_environment_variable_is_named() {
    let error = ConnInfo::resolve_in(None, &env().with_variable("PGSSLMODE", "on")).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("PGSSLMODE") && text.contains("verify-full"),
        "{text}"
    );
}

#[test]
fn passwords_do_not_show() {
    let info = resolve("password=hunter2 host=db");
    assert!(!format!("{info:?} {info:#?} {info}").contains("hunter2"));
    let env = env().with_variable("PGPASSWORD", "hunter2");
    assert!(!format!("{env:?}").contains("hunter2"));
    assert_eq!(
        password(&ConnInfo::resolve_in(None, &env).unwrap()),
        Some("hunter2")
    );
}

#[test]
fn tls_options_are_checked_together() {
    assert!(error("sslmode=verify-full").contains("sslrootcert"));
    assert!(error("sslrootcert=system sslmode=require").contains("verify-full"));
    assert_eq!(resolve("sslrootcert=system").tls.mode, SslMode::VerifyFull);
    assert!(error("sslnegotiation=direct").contains("require"));
    assert!(error("sslcert=/c").contains("sslkey"));
    assert!(error("ssl_max_protocol_version=TLSv1.1").contains("TLS 1.2"));
    let tls = resolve("ssl_min_protocol_version=TLSv1.3").tls;
    assert!(!tls.tls12 && tls.tls13);
}

#[test]
fn a_root_certificate_in_the_home_directory_is_used() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join(".postgresql")).unwrap();
    let root = home.path().join(".postgresql/root.crt");
    std::fs::write(&root, "x").unwrap();
    let info = ConnInfo::resolve_in(Some("sslmode=verify-ca"), &env().with_home(home.path())).unwrap();
    assert_eq!(info.tls.roots, TrustRoots::File(root));
}

#[test]
fn timeouts_and_keepalives() {
    assert_eq!(resolve("connect_timeout=0").connect_timeout, None);
    assert_eq!(
        resolve("connect_timeout=1").connect_timeout,
        Some(Duration::from_secs(2))
    );
    assert!(error("connect_timeout=-1").contains("not negative"));
    let info = resolve("keepalives=0 keepalives_idle=5 keepalives_count=0 tcp_user_timeout=1500");
    assert!(!info.keepalives.enabled);
    assert_eq!(info.keepalives.idle, Some(Duration::from_secs(5)));
    assert_eq!(info.keepalives.count, None);
    assert_eq!(info.tcp_user_timeout, Some(Duration::from_millis(1500)));
}

#[test]
fn require_auth_lists() {
    let methods = resolve("require_auth=scram-sha-256,gss").require_auth.unwrap();
    assert!(methods.accepts(AuthMethod::ScramSha256) && !methods.accepts(AuthMethod::Md5));
    let methods = resolve("require_auth=!password,!none").require_auth.unwrap();
    assert!(methods.accepts(AuthMethod::Md5) && !methods.accepts(AuthMethod::Password));
    assert!(error("require_auth=md5,!none").contains("either"));
    assert!(error("require_auth=scram").contains("scram-sha-256"));
}

#[tokio::test]
async fn the_password_file_counts_only_without_a_password() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(".pgpass");
    std::fs::write(&file, "localhost:5432:replication:u:stream\n*:*:*:u:other\n").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let env = env().with_home(dir.path());
    let info = ConnInfo::resolve_in(Some("user=u host=/tmp"), &env).unwrap();
    let found = info
        .password_for(&info.hosts[0], Mode::Replication)
        .await
        .unwrap();
    assert_eq!(found.expose_secret(), "stream");
    let found = info.password_for(&info.hosts[0], Mode::Sql).await.unwrap();
    assert_eq!(found.expose_secret(), "other");
    let explicit = ConnInfo::resolve_in(Some("user=u host=/tmp password=p"), &env).unwrap();
    let found = explicit
        .password_for(&explicit.hosts[0], Mode::Sql)
        .await
        .unwrap();
    assert_eq!(found.expose_secret(), "p");
}

fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn percent(value: &str) -> String {
    value.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

proptest! {
    #[test]
    fn both_forms_give_back_what_was_put_in(
        user in "[^\\x00]{1,20}", secret in "[^\\x00]{1,20}", name in "[^\\x00]{1,20}",
    ) {
        let pairs = format!("user={} password = {} application_name={}", quote(&user), quote(&secret), quote(&name));
        let uri = format!("postgresql://{}:{}@h/?application_name={}", percent(&user), percent(&secret), percent(&name));
        for text in [pairs, uri] {
            let info = ConnInfo::resolve_in(Some(&text), &env()).unwrap();
            prop_assert_eq!(&info.user, &user);
            prop_assert_eq!(password(&info), Some(secret.as_str()));
            prop_assert_eq!(&info.application_name, &name);
        }
    }

    #[test]
    fn any_text_gives_an_answer(text in "\\PC{0,60}") {
        let _ = ConnInfo::resolve_in(Some(&text), &env());
        let _ = ConnInfo::resolve_in(Some(&format!("postgres://{text}")), &env());
        let _ = ConnInfo::resolve_in(Some(&format!("host='{text}' port={text}")), &env());
    }
}
