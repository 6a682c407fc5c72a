//! Progress on standard error: a bar or a spinner on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// Progress of one thing that is waited for.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    /// A spinner with a text; `quiet` shows nothing at all.
    pub(crate) fn spinner(quiet: bool) -> Self {
        let bar = bar(ProgressBar::new_spinner(), quiet, "{spinner:.cyan} {msg} {elapsed:.dim}");
        if !quiet && super::stderr_is_terminal() {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar, lines: !quiet }
    }

    /// A bar over `total` jobs.
    pub(crate) fn bar(total: u64, quiet: bool) -> Self {
        let template = "{bar:32.green/dim} {pos}/{len} {percent}%  {msg}  {elapsed:.dim} eta {eta}";
        Self { bar: bar(ProgressBar::new(total), quiet, template), lines: !quiet }
    }

    /// The text beside it.
    pub(crate) fn text(&self, text: String) {
        self.bar.set_message(text);
    }

    /// Length of a bar.
    pub(crate) fn length(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// Position of a bar.
    pub(crate) fn at(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// A line above it, on a terminal and elsewhere.
    pub(crate) fn line(&self, line: &str) {
        if !self.lines {
            return;
        }
        if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
    }

    /// A line only where no bar can be drawn.
    pub(crate) fn plain_line(&self, line: &str) {
        if self.lines && self.bar.is_hidden() {
            eprintln!("{line}");
        }
    }

    /// Takes it away.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn bar(bar: ProgressBar, quiet: bool, template: &str) -> ProgressBar {
    if quiet || !super::stderr_is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    // The templates are constants of this file; a mistyped one falls back to indicatif's own look.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar
}
