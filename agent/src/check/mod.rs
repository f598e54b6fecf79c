//! `check`: everything that must be in place before the agent can keep its promise.
//!
//! Owns: the list of findings and its two forms, text and JSON. The parts: `server` asks PostgreSQL,
//! `judge` decides (pure), with `login` where it does not let the agent in; `regions` tries the regions. Every finding that fails says which line mends it.
//! What a role may not see is reported as unknown, never as fine.
//! Changes nothing but two small probe objects per region. Does not own: mending.

mod judge;
mod login;
mod regions;
mod server;

use std::fmt;

use highwater_config::{Config, Exit};
use serde::Serialize;

use crate::schedule::Schedule;

/// Version of the JSON document.
const REPORT_VERSION: u32 = 1;

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it must be.
    Ok,
    /// Works, but somebody should know.
    Note,
    /// Could not be found out.
    Unknown,
    /// Must be mended first.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in a word or two.
    pub what: String,
    /// How it stands.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: String,
    /// The line that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    pub(crate) fn ok(what: impl Into<String>, seen: impl Into<String>) -> Finding {
        Finding {
            what: what.into(),
            verdict: Verdict::Ok,
            seen: seen.into(),
            mend: None,
        }
    }

    pub(crate) fn note(what: impl Into<String>, seen: impl Into<String>) -> Finding {
        Finding {
            verdict: Verdict::Note,
            ..Finding::ok(what, seen)
        }
    }

    pub(crate) fn unknown(what: impl Into<String>, seen: impl Into<String>) -> Finding {
        Finding {
            verdict: Verdict::Unknown,
            ..Finding::ok(what, seen)
        }
    }

    pub(crate) fn fail(what: impl Into<String>, seen: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding {
            what: what.into(),
            verdict: Verdict::Fail,
            seen: seen.into(),
            mend: Some(mend.into()),
        }
    }
}

/// Everything that was looked at.
#[derive(Debug, Serialize)]
pub struct Report {
    version: u32,
    /// Whether nothing must be mended first.
    pub ready: bool,
    /// In the order in which they were looked at.
    pub findings: Vec<Finding>,
}

impl Report {
    fn new(findings: Vec<Finding>) -> Report {
        let ready = findings.iter().all(|finding| finding.verdict != Verdict::Fail);
        Report {
            version: REPORT_VERSION,
            ready,
            findings,
        }
    }

    /// The command's exit code.
    pub fn exit(&self) -> Exit {
        if self.ready { Exit::Done } else { Exit::No }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .findings
            .iter()
            .map(|finding| finding.what.chars().count())
            .max()
            .unwrap_or(0);
        for Finding {
            what,
            verdict,
            seen,
            mend,
        } in &self.findings
        {
            let verdict = match verdict {
                Verdict::Ok => "ok  ",
                Verdict::Note => "note",
                Verdict::Unknown => "?   ",
                Verdict::Fail => "FAIL",
            };
            writeln!(f, "{verdict}  {what:width$}  {seen}")?;
            for line in mend.iter().flat_map(|mend| mend.lines()) {
                writeln!(f, "      {:width$}  -> {line}", "")?;
            }
        }
        let failed = self
            .findings
            .iter()
            .filter(|finding| finding.verdict == Verdict::Fail)
            .count();
        match failed {
            0 => write!(f, "ready"),
            1 => write!(f, "not ready: 1 thing must be mended"),
            more => write!(f, "not ready: {more} things must be mended"),
        }
    }
}

/// Looks at everything. Trouble with one thing is a finding and does not stop the rest. `new_lineage` accepts
/// regions in which the cluster name belongs to another system identifier.
pub async fn run(config: &Config, new_lineage: bool) -> Report {
    let mut findings = vec![Finding::ok("configuration", configured(config))];
    findings.extend(schedule(config));
    let facts = server::look(config).await;
    let system_id = facts.system_id();
    findings.extend(judge::server(&facts, &config.cluster.slot));
    findings.extend(judge::outage(&config.outage, &facts));
    findings.extend(regions::look(config, system_id.filter(|_| !new_lineage)).await);
    Report::new(findings)
}

fn configured(config: &Config) -> String {
    let names: Vec<&str> = config.regions.iter().map(|region| region.name.as_str()).collect();
    format!(
        "cluster {}, slot {}, regions {}",
        config.cluster.name,
        config.cluster.slot,
        names.join(", ")
    )
}

fn schedule(config: &Config) -> Option<Finding> {
    let what = "backup schedule";
    match &config.backup.schedule {
        None => Some(Finding::note(
            what,
            "none: base backups are only taken with `highwater-agent backup`",
        )),
        Some(text) => match text.parse::<Schedule>() {
            Ok(_) => Some(Finding::ok(what, format!("{text} (UTC)"))),
            Err(error) => Some(Finding::fail(
                what,
                error.to_string(),
                "[backup]\nschedule = \"0 2 * * *\"",
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_aligns_and_shows_the_line_that_mends() {
        let report = Report::new(vec![
            Finding::ok("wal_level", "replica"),
            Finding::fail("role", "no REPLICATION", "ALTER ROLE \"hw\" REPLICATION;"),
            Finding::unknown("walsenders", "not visible"),
        ]);
        assert_eq!(report.exit(), Exit::No);
        let text = report.to_string();
        assert_eq!(
            text,
            "ok    wal_level   replica\n\
             FAIL  role        no REPLICATION\n\
             \x20                 -> ALTER ROLE \"hw\" REPLICATION;\n\
             ?     walsenders  not visible\n\
             not ready: 1 thing must be mended"
        );
    }

    #[test]
    fn what_is_unknown_or_worth_knowing_does_not_stop_the_agent() {
        let report = Report::new(vec![Finding::note("a", "b"), Finding::unknown("c", "d")]);
        assert_eq!((report.ready, report.exit()), (true, Exit::Done));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["version"], 1);
        assert_eq!(json["findings"][0]["verdict"], "note");
    }
}
