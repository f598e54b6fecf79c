//! Answers as text for people and as JSON for programs. The JSON envelope is stable: `{"format":1,"command":…,…}`;
//! fields may be added within a version, never changed.

mod plan;

use std::fmt;

use highwater_config::Exit;
use highwater_format::{LsnRange, TimelineId};
use serde::Serialize;
use serde_json::{Value, json};

pub use plan::{PlanReport, plan};

use crate::{
    cli::Output,
    error::RestoreError,
    plan::{Missing, Reason},
};

/// The version of every JSON answer.
pub const FORMAT: u32 = 1;

/// What a command came to.
#[derive(Debug)]
pub struct Answer {
    /// How the program ends.
    pub exit: Exit,
    text: String,
    json: Value,
}

impl Answer {
    /// An answer that prints as text and as JSON.
    #[must_use]
    pub fn new(command: &str, exit: Exit, report: impl Serialize + fmt::Display) -> Self {
        let text = report.to_string();
        let json = json!({ "format": FORMAT, "command": command, "exit": exit.code(), "answer": report });
        Self { exit, text, json }
    }

    /// The text to print.
    #[must_use]
    pub fn render(&self, output: Output) -> String {
        match output {
            Output::Text => self.text.clone(),
            Output::Json => format!("{:#}\n", self.json),
        }
    }
}

/// The JSON form of an error; refusals carry their reason's code and the next step on their own, and `missing`: the WAL in
/// the way. What was not found may lie in more places than one: `missing` is the first, `all_missing` has them all.
#[must_use]
pub fn error_json(command: &str, error: &RestoreError) -> String {
    let mut body = json!({ "message": error.to_string() });
    if let RestoreError::Refused(refusal) = error {
        body = json!({
            "message": refusal.message,
            "reason": refusal.reason.code(),
            "next": refusal.next,
        });
        match &refusal.reason {
            Reason::Hole {
                timeline,
                range,
                recorded,
                damaged,
            } => {
                body["missing"] = missing_json(*timeline, *range, recorded.as_deref(), damaged.as_deref());
            }
            Reason::NotFound { missing } if !missing.is_empty() => {
                let all: Vec<Value> = missing.iter().map(one_missing).collect();
                body["missing"] = all.first().cloned().unwrap_or_default();
                body["all_missing"] = Value::Array(all);
            }
            _ => {}
        }
    }
    let json = json!({ "format": FORMAT, "command": command, "exit": error.exit().code(), "error": body });
    format!("{json:#}\n")
}

fn one_missing(missing: &Missing) -> Value {
    let (recorded, damaged) = (missing.recorded.as_deref(), missing.damaged.as_deref());
    missing_json(missing.timeline, missing.range, recorded, damaged)
}

fn missing_json(
    timeline: TimelineId,
    range: LsnRange,
    recorded: Option<&str>,
    damaged: Option<&str>,
) -> Value {
    json!({
        "timeline": timeline, "start": range.start, "end": range.end, "recorded": recorded, "damaged": damaged,
    })
}

/// A number of bytes for people.
#[must_use]
pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use highwater_format::Lsn;

    use super::*;
    use crate::plan::Refusal;

    fn missing(start: u64) -> Missing {
        Missing {
            timeline: TimelineId::FIRST,
            range: LsnRange::new(Lsn(start), Lsn(start + 0x10)),
            recorded: Some("the slot was lost".to_owned()),
            damaged: None,
        }
    }

    fn error(reason: Reason) -> Value {
        let error = RestoreError::from(Refusal::no(reason, "no", "ask for another"));
        let json: Value = serde_json::from_str(&error_json("plan", &error)).unwrap();
        json["error"].clone()
    }

    #[test]
    fn what_is_missing_has_one_form_whether_it_is_in_the_way_or_may_hold_the_target() {
        let hole = error(missing(0x100).into());
        assert_eq!(hole["reason"], "hole");
        let found = error(Reason::NotFound {
            missing: vec![missing(0x100), missing(0x200)],
        });
        assert_eq!(found["reason"], "not_found");
        assert_eq!(found["missing"], hole["missing"]);
        assert_eq!(found["missing"]["recorded"], "the slot was lost");
        assert_eq!(found["all_missing"].as_array().map(Vec::len), Some(2));
        let nothing = error(Reason::NotFound { missing: vec![] });
        assert_eq!(nothing.get("missing"), None);
        assert_eq!(nothing.get("all_missing"), None);
    }
}
