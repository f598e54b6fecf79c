//! Every section and setting there is, by name: the one list that the file reader, the environment
//! and the flags check against. What a value means and its bounds live in `settings`.

/// One section of the file and its settings.
pub(crate) struct Section {
    pub(crate) name: &'static str,
    pub(crate) keys: &'static [&'static str],
}

/// The sections with one value per setting.
pub(crate) const SECTIONS: &[Section] = &[
    Section {
        name: "cluster",
        keys: &["name", "connection", "slot", "standby"],
    },
    Section {
        name: "durability",
        keys: &["policy"],
    },
    Section {
        name: "wal",
        keys: &[
            "flush_interval",
            "flush_size",
            "compression",
            "synchronous",
            "acknowledge",
            "uploads",
        ],
    },
    Section {
        name: "outage",
        keys: &["policy", "max_backlog", "keep_free", "disk", "patience"],
    },
    Section {
        name: "backup",
        keys: &[
            "schedule",
            "compression",
            "pack_size",
            "max_rate",
            "checkpoint_fast",
            "threads",
        ],
    },
    Section {
        name: "pulse",
        keys: &["interval"],
    },
    Section {
        name: "heal",
        keys: &["interval"],
    },
    Section {
        name: "memory",
        keys: &["limit"],
    },
    Section {
        name: "admin",
        keys: &["listen"],
    },
    Section {
        name: "restore",
        keys: &["region", "parallel", "prefetch"],
    },
];

/// The name of the repeated section: `[[region]]` in the file, `HIGHWATER_REGION_1_…` outside.
pub(crate) const REGION: &str = "region";

/// The settings of one region, as the store names them.
pub(crate) const REGION_KEYS: &[&str] = &[
    "name",
    "url",
    "endpoint",
    "allow_http",
    "region",
    "path_style",
    "ca_file",
    "profile",
    "access_key_id",
    "secret_access_key",
    "storage_class",
    "connect_timeout",
    "attempt_timeout",
    "operation_timeout",
];

/// The most regions that are looked for in the environment.
pub(crate) const MAX_REGIONS: usize = 16;

/// Settings whose values are never shown.
pub(crate) fn is_secret(section: &str, key: &str) -> bool {
    matches!(
        (section, key),
        ("cluster", "connection") | (REGION, "secret_access_key")
    )
}

/// The section of that name, if it is one with one value per setting.
pub(crate) fn section(name: &str) -> Option<&'static Section> {
    SECTIONS.iter().find(|section| section.name == name)
}

/// The section that does know `key`, for settings that stand in the wrong place.
pub(crate) fn home_of(key: &str) -> Option<&'static str> {
    let mut homes = SECTIONS
        .iter()
        .filter(|section| section.keys.contains(&key))
        .map(|section| section.name);
    match (homes.next(), homes.next()) {
        (Some(only), None) => Some(only),
        (None, _) if REGION_KEYS.contains(&key) => Some("[region]"),
        _ => None,
    }
}

/// The environment variable for a setting.
pub(crate) fn variable(section: &str, key: &str) -> String {
    format!(
        "HIGHWATER_{}_{}",
        section.to_ascii_uppercase(),
        key.to_ascii_uppercase()
    )
}

/// The environment variable for a setting of the region with that number, counted from 1.
pub(crate) fn region_variable(number: usize, key: &str) -> String {
    format!("HIGHWATER_REGION_{number}_{}", key.to_ascii_uppercase())
}
