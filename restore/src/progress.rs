//! Shows how far long work has come: a bar with rate and time left on a terminal, nothing elsewhere (log lines tell
//! there). Goes to the error stream, so that the output stays for programs.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Work of fewer bytes than this is over before a bar could be read.
const WORTH_SHOWING: u64 = 32 << 20;

/// A bar that removes itself when it is dropped.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// A bar over `total` bytes.
    #[must_use]
    pub fn bytes(what: &'static str, total: u64) -> Self {
        let template = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
        Self::new(what, total, template, total >= WORTH_SHOWING)
    }

    /// A bar over `total` objects.
    #[must_use]
    pub fn objects(what: &'static str, total: u64) -> Self {
        Self::new(
            what,
            total,
            "{msg} {bar:30} {pos}/{len} objects {per_sec}, {eta} left",
            true,
        )
    }

    fn new(what: &'static str, total: u64, template: &str, worth: bool) -> Self {
        if !worth || !std::io::stderr().is_terminal() {
            return Self {
                bar: ProgressBar::hidden(),
            };
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_message(what);
        Self { bar }
    }

    /// Notes progress.
    pub fn add(&self, amount: u64) {
        self.bar.inc(amount);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
