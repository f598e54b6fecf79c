//! The configuration as its users meet it: files, variables and flags in, settings or a message out.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use highwater_format::codec::Codec;
use proptest::prelude::*;
use secrecy::ExposeSecret as _;

use crate::*;

const FULL: &str = r#"
[cluster]
name = "orders"
connection = "host=/var/run/postgresql user=highwater"
[[region]]
name = "eu-west-1"
url = "s3://orders-archive/prod"
[[region]]
name = "eu-central-1"
url = "s3://orders-archive-dr/prod"
endpoint = "https://minio.example:9000"
path_style = true
attempt_timeout = "5s"
[durability]
policy = "any"
[wal]
flush_interval = "250ms"
flush_size = "2MiB"
compression = "zstd"
[memory]
limit = "512MiB"
[backup]
schedule = "0 2 * * *"
max_rate = "100MB"
[outage]
policy = "give-up"
max_backlog = "50GB"
keep_free = "10GiB"
disk = "/var/lib/postgresql"
[admin]
listen = "off"
[restore]
region = "eu-central-1"
"#;

fn load_with(text: &str, env: &[(&str, &str)], overrides: &Overrides) -> Result<Config, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("highwater.toml");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let env: BTreeMap<&str, &str> = env.iter().copied().collect();
    Config::load(
        Some(&path),
        |name| env.get(name).map(|text| (*text).to_owned()),
        overrides,
    )
}

fn load(text: &str) -> Result<Config, ConfigError> {
    load_with(text, &[], &Overrides::default())
}

/// The message without the temporary directory.
fn message(text: &str) -> String {
    let error = load(text).unwrap_err().to_string();
    let start = error.find("highwater.toml").unwrap_or(0);
    error[start..].to_owned()
}

/// A file that is fine but for what `extra` adds.
fn with(extra: &str) -> String {
    format!("[[region]]\nurl = \"file:///var/a\"\n[cluster]\nname = \"c\"\n{extra}")
}

#[test]
fn a_full_file_is_read() {
    let config = load(FULL).unwrap();
    assert_eq!(config.cluster.name.to_string(), "orders");
    assert_eq!(config.cluster.slot, "highwater");
    assert_eq!(
        config.cluster.connection.unwrap().expose_secret(),
        "host=/var/run/postgresql user=highwater"
    );
    let names: Vec<_> = config.regions.iter().map(|region| region.name.as_str()).collect();
    assert_eq!(names, ["eu-west-1", "eu-central-1"]);
    assert_eq!(config.regions[1].path_style, Some(true));
    assert_eq!(config.regions[1].attempt_timeout, Duration::from_secs(5));
    assert_eq!(config.durability.policy, Policy::Any);
    assert_eq!(config.wal.flush_interval, Duration::from_millis(250));
    assert_eq!((config.wal.flush_size, config.wal.memory), (2 << 20, 512 << 20));
    assert_eq!(config.wal.compression, Codec::Zstd);
    assert_eq!(config.backup.max_rate, Some(100 << 20));
    assert_eq!(config.outage.policy, OutagePolicy::GiveUp);
    assert_eq!(
        (config.outage.max_backlog, config.outage.keep_free),
        (Some(50 << 30), Some(10 << 30))
    );
    assert_eq!(
        config.outage.disk.as_deref(),
        Some(Path::new("/var/lib/postgresql"))
    );
    assert_eq!(config.admin.listen, None);
    assert_eq!(config.restore.region.as_deref(), Some("eu-central-1"));
}

#[test]
fn the_defaults_are_the_documented_ones() {
    let config = load(&with("")).unwrap();
    assert_eq!(config.durability.policy, Policy::All);
    assert_eq!(config.wal.flush_interval, Duration::from_secs(1));
    assert_eq!(
        (config.wal.flush_size, config.wal.memory, config.wal.uploads),
        (1 << 20, 256 << 20, 4)
    );
    assert_eq!(
        (config.wal.compression, config.backup.compression),
        (Codec::Lz4, Codec::Zstd)
    );
    assert!(!config.wal.synchronous && config.backup.checkpoint_fast);
    assert_eq!(config.wal.acknowledge, Acknowledge::Stream);
    assert_eq!(
        (config.backup.pack_size, config.backup.max_rate),
        (32 << 20, None)
    );
    assert_eq!(config.outage.policy, OutagePolicy::Hold);
    assert_eq!((config.outage.max_backlog, config.outage.keep_free), (None, None));
    assert_eq!(config.outage.patience, Duration::from_secs(60));
    assert_eq!(config.pulse.interval, Duration::from_secs(5));
    assert_eq!(config.heal.interval, Duration::from_secs(900));
    assert_eq!(config.admin.listen.unwrap().to_string(), "127.0.0.1:9187");
    assert_eq!(config.regions[0].name, "a", "taken from the url");
}

#[test]
fn everything_works_without_a_file() {
    let env = |name: &str| match name {
        "HIGHWATER_CLUSTER_NAME" => Some("orders".to_owned()),
        "HIGHWATER_REGION_1_URL" => Some("s3://one/p".to_owned()),
        "HIGHWATER_REGION_1_ENDPOINT" => Some("http://127.0.0.1:9000".to_owned()),
        "HIGHWATER_REGION_2_URL" => Some("s3://two/p".to_owned()),
        "HIGHWATER_REGION_2_NAME" => Some("second".to_owned()),
        "HIGHWATER_REGION_2_SECRET_ACCESS_KEY" => Some("s".to_owned()),
        "HIGHWATER_REGION_2_ACCESS_KEY_ID" => Some("k".to_owned()),
        "HIGHWATER_WAL_SYNCHRONOUS" => Some("true".to_owned()),
        "HIGHWATER_DURABILITY_POLICY" => Some("1".to_owned()),
        "HIGHWATER_BACKUP_SCHEDULE" => Some(String::new()),
        _ => None,
    };
    let config = Config::load(None, env, &Overrides::default()).unwrap();
    assert_eq!(config.regions.len(), 2);
    assert_eq!(
        (config.regions[0].name.as_str(), config.regions[1].name.as_str()),
        ("one", "second")
    );
    assert_eq!(
        config.regions[0].endpoint.as_deref(),
        Some("http://127.0.0.1:9000")
    );
    assert_eq!(
        config.regions[1]
            .secret_access_key
            .as_ref()
            .unwrap()
            .expose_secret(),
        "s"
    );
    assert!(config.wal.synchronous);
    assert_eq!(config.durability.policy.needed(2), 1);
    assert_eq!(config.backup.schedule, None, "an empty variable is not a setting");
}

#[test]
fn every_setting_of_the_schema_can_come_from_the_environment() {
    for section in schema::SECTIONS {
        for key in section.keys {
            let variable = schema::variable(section.name, key);
            let lookup = |name: &str| (name == variable).then(|| "x".to_owned());
            let mut raw = raw::Raw::default();
            overlay::environment(&mut raw, &lookup);
            assert_eq!(raw.text(section.name, key).as_deref(), Some("x"), "{variable}");
        }
    }
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let env = [
        ("HIGHWATER_WAL_UPLOADS", "5"),
        ("HIGHWATER_CLUSTER_SLOT", "from_env"),
    ];
    let overrides = Overrides {
        slot: Some("from_flag".to_owned()),
        settings: vec![("wal.flush_size".to_owned(), "4MiB".to_owned())],
        ..Overrides::default()
    };
    let config = load_with(
        &with("slot = \"from_file\"\n[wal]\nuploads = 3\n"),
        &env,
        &overrides,
    )
    .unwrap();
    assert_eq!((config.wal.uploads, config.wal.flush_size), (5, 4 << 20));
    assert_eq!(config.cluster.slot, "from_flag");
}

#[test]
fn archive_flags_replace_the_regions_and_keep_what_is_known_of_the_same_url() {
    let overrides = Overrides {
        archives: vec![
            "s3://orders-archive-dr/prod".to_owned(),
            "spare=file:///mnt/copy".to_owned(),
        ],
        settings: vec![("restore.region".to_owned(), "spare".to_owned())],
        ..Overrides::default()
    };
    let config = load_with(FULL, &[], &overrides).unwrap();
    let names: Vec<_> = config.regions.iter().map(|region| region.name.as_str()).collect();
    assert_eq!(names, ["eu-central-1", "spare"]);
    assert_eq!(
        config.regions[0].endpoint.as_deref(),
        Some("https://minio.example:9000")
    );
}

#[test]
fn archive_flags_win_over_the_regions_of_the_environment() {
    let env = [
        ("HIGHWATER_REGION_1_NAME", "first"),
        ("HIGHWATER_REGION_1_URL", "s3://one/prod"),
        ("HIGHWATER_REGION_1_ENDPOINT", "https://first.example"),
        ("HIGHWATER_REGION_1_PATH_STYLE", "true"),
        ("HIGHWATER_REGION_2_URL", "s3://two/prod"),
        ("HIGHWATER_REGION_2_ENDPOINT", "https://second.example"),
        ("HIGHWATER_REGION_3_URL", "s3://three/prod"),
    ];
    let flags = |archives: &[&str]| Overrides {
        archives: archives.iter().map(|archive| (*archive).to_owned()).collect(),
        ..Overrides::default()
    };
    let file = with("[[region]]\nurl = \"file:///var/b\"\nprofile = \"of-b\"\n");
    let told = |config: &Config| {
        let region =
            |region: &RegionConfig| (region.name.clone(), region.url.clone(), region.endpoint.clone());
        config.regions.iter().map(region).collect::<Vec<_>>()
    };
    let said = |name: &str, url: &str, endpoint: &str| {
        let endpoint = (!endpoint.is_empty()).then(|| endpoint.to_owned());
        (name.to_owned(), url.to_owned(), endpoint)
    };

    let swapped = load_with(&file, &env, &flags(&["s3://two/prod", "s3://one/prod"])).unwrap();
    let second = said("two", "s3://two/prod", "https://second.example");
    let first = said("first", "s3://one/prod", "https://first.example");
    assert_eq!(told(&swapped), [second, first], "each keeps what is its own");

    let other = load_with(&file, &env, &flags(&["s3://other/prod"])).unwrap();
    assert_eq!(
        told(&other),
        [said("other", "s3://other/prod", "https://first.example")]
    );
    assert_eq!(
        (other.regions[0].path_style, other.regions[0].profile.as_deref()),
        (Some(true), None)
    );

    // The environment puts another region in the place of the file's, which is asked for all the same.
    let first = [
        ("HIGHWATER_REGION_1_URL", "s3://one/prod"),
        ("HIGHWATER_REGION_2_URL", "s3://two/prod"),
    ];
    let again = load_with(&file, &first, &flags(&["file:///var/b"])).unwrap();
    assert_eq!(again.regions[0].profile.as_deref(), Some("of-b"));

    // What the file says of its own regions is of no other place, and a variable without a url is meant for the flag.
    let unplaced = [
        ("HIGHWATER_REGION_1_ENDPOINT", "https://any.example"),
        ("HIGHWATER_REGION_1_NAME", "named"),
        ("HIGHWATER_CLUSTER_NAME", "c"),
    ];
    let without_file = |name: &str| {
        let found = unplaced.iter().find(|(known, _)| *known == name);
        found.map(|(_, text)| (*text).to_owned())
    };
    let placed = Config::load(None, without_file, &flags(&["s3://x/y"])).unwrap();
    assert_eq!(told(&placed), [said("named", "s3://x/y", "https://any.example")]);
    let beside = load_with(&file, &[], &flags(&["s3://x/y", "s3://z"])).unwrap();
    assert_eq!(beside.regions[1].profile, None);
}

#[test]
fn unknown_names_are_refused_with_line_and_suggestion() {
    assert_eq!(
        message(&with("[wal]\nflush_intervall = \"1s\"\n")),
        "highwater.toml, line 6: there is no setting `flush_intervall` in [wal]; did you mean `flush_interval`?"
    );
    assert_eq!(
        message(&with("[walls]\n")),
        "highwater.toml, line 5: there is no section [walls]; did you mean [wal]?"
    );
    assert_eq!(
        message(&with("[backup]\nflush_size = \"1MiB\"\n")),
        "highwater.toml, line 6: there is no setting `flush_size` in [backup]; it belongs in [wal]"
    );
    assert_eq!(
        message("[[region]]\nurl = \"s3://b\"\nendpont = \"x\"\n"),
        "highwater.toml, line 3: there is no setting `endpont` in [[region]]; did you mean `endpoint`?"
    );
    assert_eq!(
        message("flush_size = \"1MiB\"\n"),
        "highwater.toml, line 1: there is no setting `flush_size` in the top level; it belongs in [wal]"
    );
    assert!(message("[region]\nurl = \"s3://b\"\n").contains("write [[region]] with two brackets"));
    assert!(message(&with("[[wal]]\n")).contains("write [wal] with one pair of brackets"));
}

#[test]
fn bad_values_name_place_and_cure() {
    for (extra, wanted) in [
        (
            "[wal]\nflush_interval = 1\n",
            "line 6: wal.flush_interval: `1` has no unit",
        ),
        ("[wal]\nflush_interval = \"1h\"\n", "1h is outside 10ms to 1min"),
        ("[wal]\nflush_interval = [\"1s\"]\n", "this is of type array"),
        ("[wal]\ncompression = \"gzip\"\n", "line 6: wal.compression"),
        (
            "[durability]\npolicy = 2\n",
            "2 regions are asked for and only 1 configured",
        ),
        ("[durability]\npolicy = 0\n", "`0` is not a policy"),
        ("[outage]\npolicy = \"drop\"\n", "`drop` is not an outage policy"),
        ("[outage]\npolicy = \"give-up\"\n", "needs to know when"),
        ("[outage]\nmax_backlog = \"5\"\n", "has no unit"),
        ("[outage]\nkeep_free = \"1kB\"\n", "1KiB is outside 1MiB to"),
        ("[memory]\nlimit = \"1MiB\"\n", "1MiB is outside 64MiB to"),
        (
            "[admin]\nlisten = \"9187\"\n",
            "write it as in \"127.0.0.1:9187\"",
        ),
        (
            "[restore]\nregion = \"mars\"\n",
            "there is no region `mars`; configured are a",
        ),
        ("slot = \"High-Water\"\n", "`High-Water` is not a slot name"),
        (
            "[[region]]\nurl = \"file:///var/a/\"\n",
            "each region needs a place of its own",
        ),
        (
            "[[region]]\nurl = \"/var/b\"\n",
            "url of region 2: a url is needed",
        ),
        (
            "[[region]]\nurl = \"gs://b\"\n",
            "only s3:// and file:// are known here",
        ),
        ("[[region]]\nname = \"x\"\n", "url of region 2 is not set"),
        (
            "[[region]]\nurl = \"s3://b\"\nendpoint = \"minio:9000\"\n",
            "write it with its scheme",
        ),
        (
            "[[region]]\nurl = \"s3://b\"\naccess_key_id = \"k\"\n",
            "go together",
        ),
    ] {
        let found = message(&with(extra));
        assert!(found.contains(wanted), "{extra:?} gave {found:?}");
    }
}

#[test]
fn a_synchronous_standby_acknowledges_on_the_stream() {
    let config = load(&with("[wal]\nacknowledge = \"slot\"")).unwrap();
    assert_eq!(config.wal.acknowledge, Acknowledge::Slot);
    let both = message(&with("[wal]\nacknowledge = \"slot\"\nsynchronous = true"));
    assert!(
        both.contains("exclude each other") && both.contains(":"),
        "{both}"
    );
    assert!(message(&with("[wal]\nacknowledge = \"never\"")).contains("\"stream\""));
}

#[test]
fn who_lets_commits_wait_gives_no_wal_up() {
    let limits = "max_backlog = \"1GiB\"";
    let outage = |policy: &str| format!("[outage]\npolicy = \"{policy}\"\n{limits}\n");
    let synchronous = "[wal]\nsynchronous = true\n";
    load(&with(&format!("{synchronous}{}", outage("hold")))).unwrap();
    load(&with(&outage("give-up"))).unwrap();
    let both = message(&with(&format!("{synchronous}{}", outage("give-up"))));
    assert!(
        both.contains("outage.policy") && both.contains("exclude each other"),
        "{both}"
    );
}

#[test]
fn syntax_errors_carry_the_line_but_not_its_text() {
    let found = message("[cluster]\nconnection = \"password=hunter2\n");
    assert!(
        found.starts_with("highwater.toml, line 2: this is not valid TOML"),
        "{found}"
    );
    assert!(!found.contains("hunter2"));
}

#[test]
fn what_is_missing_is_named_with_all_ways_to_give_it() {
    let error = Config::load(None, |_| None, &Overrides::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("HIGHWATER_CLUSTER_NAME") && error.contains("--cluster"),
        "{error}"
    );
    let cluster = Overrides {
        cluster_name: Some("c".to_owned()),
        ..Overrides::default()
    };
    let error = Config::load(None, |_| None, &cluster).unwrap_err().to_string();
    assert!(error.contains("--archive URL"), "{error}");
    let error = Config::load(Some(Path::new("/nonexistent.toml")), |_| None, &cluster).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot read configuration file /nonexistent.toml")
    );
}

#[test]
fn secrets_are_neither_debugged_nor_named_in_errors() {
    let text = "[[region]]\nurl = \"s3://b\"\naccess_key_id = \"k\"\nsecret_access_key = \"canary-one\"\n\
                [cluster]\nname = \"c\"\nconnection = \"password=canary-two\"\n";
    let config = load(text).unwrap();
    assert!(!format!("{config:?}").contains("canary"));
    let url = message("[[region]]\nurl = \"s3://key:canary@b\"\n[cluster]\nname = \"c\"\n");
    assert!(
        url.contains("put no credentials into the url") && !url.contains("canary"),
        "{url}"
    );
}

#[test]
fn a_file_with_secrets_that_others_may_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("highwater.toml");
    let check = |text: &str, mode: u32| {
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        Config::load(Some(&path), |_| None, &Overrides::default())
    };
    let lines = with("connection = \"\"\"host=db\npassword=pw\"\"\"\n");
    assert!(check(&lines, 0o644).is_err(), "a password on a line of its own");
    let secret = with("connection = \"postgresql://u:pw@host/db\"\n");
    let error = check(&secret, 0o644).unwrap_err();
    assert!(
        matches!(error, ConfigError::Exposed { mode: 0o644, .. }),
        "{error}"
    );
    assert!(check(&secret, 0o400).is_ok());
    assert!(check(&with("connection = \"host=/run/postgresql\"\n"), 0o644).is_ok());
}

#[test]
fn unknown_settings_of_flags_and_variables_get_a_suggestion() {
    let overrides = |name: &str| Overrides {
        settings: vec![(name.to_owned(), "1".to_owned())],
        ..Overrides::default()
    };
    let error = load_with(&with(""), &[], &overrides("wal.flush_sise"))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("flag --set wal.flush_sise") && error.contains("`flush_size`"),
        "{error}"
    );
    let error = load_with(&with(""), &[], &overrides("flush_size"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("did you mean `wal.flush_size`?"), "{error}");
    let names = [
        "HIGHWATER_WAL_FLUSH_SIZ",
        "HIGHWATER_LOG",
        "PATH",
        "HIGHWATER_REGION_2_URL",
    ]
    .map(str::to_owned);
    let found = unknown_variables(names.into_iter(), &["HIGHWATER_LOG"]);
    assert_eq!(
        found,
        [
            "environment variable HIGHWATER_WAL_FLUSH_SIZ means nothing here; did you mean HIGHWATER_WAL_FLUSH_SIZE?"
        ]
    );
}

/// The example of `deploy` is a manual, too.
#[test]
fn the_example_names_every_setting_and_loads() {
    let example = include_str!("../../../deploy/highwater.toml");
    load(example).unwrap();
    let mut named = std::collections::BTreeSet::new();
    let mut section = "";
    for line in example.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_start_matches('[').split(']').next().unwrap();
        }
        let setting = line.trim_start_matches("# ").split_once(" = ");
        named.extend(setting.map(|(key, _)| (section, key)));
    }
    let sections = schema::SECTIONS
        .iter()
        .map(|section| (section.name, section.keys));
    for (section, keys) in sections.chain([(schema::REGION, schema::REGION_KEYS)]) {
        for key in keys {
            assert!(named.contains(&(section, *key)), "[{section}] {key}");
        }
    }
}

/// Values of any setting: numbers out of all bounds, units and signs in odd places, other types, text of any kind.
fn odd_value() -> impl Strategy<Value = String> {
    prop_oneof![
        "\\PC{0,20}",
        "\"[-+.0-9eEkKmMgGtTiIbBsdh%]{0,25}\"",
        "\"\\PC{0,30}\"",
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| number.to_string()),
        Just("[[]]".to_owned()),
        Just("{ a = {} }".to_owned()),
    ]
}

proptest! {
    #[test]
    fn rubbish_is_an_error_and_never_a_panic(text in "[\\PC\n\\[\\]=\"]{0,400}") {
        prop_assert!(load(&text).is_err());
    }

    /// A file that is right but for one line.
    #[test]
    fn a_value_that_makes_no_sense_is_an_error_or_taken_but_never_a_panic(
        line in 0..FULL.lines().count(),
        value in odd_value(),
    ) {
        let changed = FULL.lines().enumerate().map(|(number, text)| match text.split_once(" = ") {
            Some((name, _)) if number == line => format!("{name} = {value}"),
            _ => text.to_owned(),
        });
        let changed: Vec<String> = changed.collect();
        if let Err(error) = load(&changed.join("\n")) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn flags_and_variables_that_make_no_sense_are_no_panic(
        archive in "\\PC{0,40}",
        name in "[a-z_.]{0,20}",
        value in "\\PC{0,20}",
    ) {
        let overrides = Overrides {
            archives: vec![archive.clone()],
            settings: vec![(name, value.clone())],
            ..Overrides::default()
        };
        let environment = [("HIGHWATER_WAL_FLUSH_SIZE", value.as_str()), ("HIGHWATER_ARCHIVE", archive.as_str())];
        drop(load_with(FULL, &environment, &overrides));
    }
}
