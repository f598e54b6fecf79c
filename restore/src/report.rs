//! Answers as text for people and as JSON for programs. The JSON envelope is stable: `{"format":1,"command":…,…}`;
//! fields may be added within a version, never changed.

mod plan;

use std::fmt;

use highwater_config::Exit;
use serde::Serialize;
use serde_json::{Value, json};

pub use plan::{PlanReport, plan};

use crate::{cli::Output, error::RestoreError};

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

/// The JSON form of an error; refusals carry their reason's code and the next step on their own.
#[must_use]
pub fn error_json(command: &str, error: &RestoreError) -> String {
    let mut body = json!({ "message": error.to_string() });
    if let RestoreError::Refused(refusal) = error {
        body = json!({
            "message": refusal.message,
            "reason": refusal.reason.code(),
            "next": refusal.next,
        });
        if let crate::plan::Reason::Hole {
            timeline,
            range,
            recorded,
            damaged,
        } = &refusal.reason
        {
            body["missing"] = json!({
                "timeline": timeline, "start": range.start, "end": range.end, "recorded": recorded, "damaged": damaged,
            });
        }
    }
    let json = json!({ "format": FORMAT, "command": command, "exit": error.exit().code(), "error": body });
    format!("{json:#}\n")
}

/// A number of bytes for people.
#[must_use]
pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
