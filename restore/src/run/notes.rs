//! What the operator should know when a restore is done: each note says what is so and what to do about it.

use highwater_config::Config;

use super::{Input, Options, server};
use crate::clock;
use crate::datadir::DataDir;
use crate::fetch::Fetched;
use crate::recovery::{facts, settings};
use crate::target::Action;

/// Variables that decide how and where a region in a bucket is reached: keys, or the place of keys, and what stands in
/// for settings that the configuration does not have.
const ENVIRONMENT: [&str; 19] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "HTTPS_PROXY",
];

/// All notes.
pub(super) fn of(input: &Input<'_>, into: &DataDir, fetched: &Fetched, options: &Options) -> Vec<String> {
    let mut notes = input.plan.notes.clone();
    if into.starts_over() {
        notes.push("an interrupted restore was cleared and started over".to_owned());
    }
    if fetched.fell_back > 0 {
        notes.push(format!(
            "{} packs came from another region than the preferred one; run `highwater-restore verify`",
            fetched.fell_back
        ));
    }
    notes.extend(as_of(input.config));
    notes.extend(configuration(into, options));
    notes.push(
        "archive_mode is off, synchronous_standby_names empty and max_logical_replication_workers 0 in \
         postgresql.auto.conf, so that a copy keeps to itself; remove those lines when it takes over"
            .to_owned(),
    );
    if options.start.is_some() {
        notes.push(format!(
            "the server logs to {} until it is restarted",
            into.root().join(server::LOG).display()
        ));
    }
    // After a promotion that was waited for, recovery is over and its settings are gone.
    if options.start.is_none() || input.plan.target.action != Action::Promote {
        notes.push(left_for_recovery());
        let set: Vec<String> = std::env::vars_os()
            .filter(|(_, value)| !value.is_empty())
            .filter_map(|(name, _)| name.into_string().ok())
            .collect();
        notes.extend(environment(input.config, &set));
    }
    notes
}

/// What was read is not what an agent would find there.
fn as_of(config: &Config) -> Option<String> {
    let time = config.regions.iter().find_map(|region| region.as_of)?;
    Some(format!(
        "the archive was read as of {}, and restore_command goes on so; let no agent write before the buckets hold again what \
         was deleted, or give it a new prefix",
        clock::from_system(time)
    ))
}

fn configuration(into: &DataDir, options: &Options) -> Option<String> {
    let missing = into.missing_configuration();
    if missing.is_empty() {
        return None;
    }
    let names = missing.join(", ");
    let what = if options.start.is_some() {
        "minimal ones were written"
    } else {
        "provide them before you start the server"
    };
    Some(format!(
        "the backup has no {names} (kept outside the data directory); {what}"
    ))
}

/// The settings would be obeyed again if the server ever became a standby.
pub(super) fn left_for_recovery() -> String {
    format!(
        "when the server has been promoted, remove from its data directory {} and, in postgresql.auto.conf, the lines from \
         `{}` to `{}`; recovery needs both until then",
        facts::NAME,
        settings::RECOVERY_BEGIN,
        settings::RECOVERY_END
    )
}

/// What only this program's environment has.
fn environment(config: &Config, set: &[String]) -> Option<String> {
    if !config
        .regions
        .iter()
        .any(|region| region.url.starts_with("s3://"))
    {
        return None;
    }
    let ours = |name: &str| {
        name.starts_with("HIGHWATER_REGION_")
            && (name.ends_with("_ACCESS_KEY_ID")
                || name.ends_with("_SECRET_ACCESS_KEY")
                || name.ends_with("_PROFILE"))
    };
    let mut found: Vec<&str> = set
        .iter()
        .map(String::as_str)
        .filter(|name| ours(name) || ENVIRONMENT.contains(name))
        .collect();
    if found.is_empty() {
        return None;
    }
    found.sort_unstable();
    Some(format!(
        "{} came from the environment, and restore_command has only what the server's has: give the same to the service that \
         starts the server; or put keys into the AWS credentials file of the server's user (~/.aws/credentials) or into the \
         configuration file, and region, endpoint and ca_file into the configuration file before the restore",
        found.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> Config {
        let text = format!("[cluster]\nname = \"orders\"\n[[region]]\nname = \"a\"\nurl = \"{url}\"\n");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(Some(&path), |_| None, &highwater_config::Overrides::default()).unwrap()
    }

    #[test]
    fn keys_that_only_the_environment_has_are_named_and_never_shown() {
        let set = [
            "AWS_SECRET_ACCESS_KEY",
            "HIGHWATER_REGION_1_ACCESS_KEY_ID",
            "HOME",
        ]
        .map(str::to_owned);
        let note = environment(&config("s3://bucket/x"), &set).unwrap();
        let named = "AWS_SECRET_ACCESS_KEY, HIGHWATER_REGION_1_ACCESS_KEY_ID came";
        assert!(note.starts_with(named), "{note}");
        assert_eq!(environment(&config("s3://bucket/x"), &set[2..]), None);
        for place in ["AWS_REGION", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"] {
            let note = environment(&config("s3://bucket/x"), &[place.to_owned()]).unwrap();
            assert!(note.starts_with(place), "{note}");
        }
        assert_eq!(environment(&config("file:///srv/a"), &set), None);
    }
}
