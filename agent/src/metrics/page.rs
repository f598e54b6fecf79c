//! Prometheus' text format, line by line.

use std::fmt::{Display, Write};

use highwater_format::Time;

use crate::state::RegionView;

/// Since 1970.
#[expect(
    clippy::cast_precision_loss,
    reason = "a float holds today's microseconds to better than one of them"
)]
pub(super) fn unix_seconds(time: Time) -> f64 {
    time.unix_micros() as f64 / 1e6
}

/// Seconds to the millisecond.
pub(super) struct Seconds(pub(super) f64);

impl Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

/// The text so far.
pub(super) struct Page {
    text: String,
}

impl Page {
    pub(super) fn new() -> Page {
        Page {
            text: String::with_capacity(8 * 1024),
        }
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }

    /// What precedes the lines of a series.
    pub(super) fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A gauge without labels.
    pub(super) fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.line(name, &[], value);
    }

    /// One line per region.
    pub(super) fn per_region<'a>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        regions: impl IntoIterator<Item = &'a RegionView>,
        value: impl Fn(&RegionView) -> String,
    ) {
        self.head(name, kind, help);
        for view in regions {
            self.line(name, &[("region", &view.name)], value(view));
        }
    }

    /// One value.
    pub(super) fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(name);
        for (place, (label, text)) in labels.iter().enumerate() {
            let text = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let open = if place == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{open}{label}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}
