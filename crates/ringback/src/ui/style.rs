//! Colours where a person looks at a terminal that can show them.

use ringback_domain::JobStatus;
use std::sync::atomic::{AtomicBool, Ordering};

static NEVER: AtomicBool = AtomicBool::new(false);

/// Turns colours off for the whole program (`--no-color`).
pub(crate) fn never() {
    NEVER.store(true, Ordering::Relaxed);
}

/// Paints, or does not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    on: bool,
}

impl Style {
    /// For standard output.
    pub(crate) fn stdout() -> Self {
        Self { on: super::stdout_is_terminal() && allowed() }
    }

    /// For standard error.
    pub(crate) fn stderr() -> Self {
        Self { on: super::stderr_is_terminal() && allowed() }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Red.
    pub(crate) fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    /// Green.
    pub(crate) fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Yellow.
    pub(crate) fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// Cyan.
    pub(crate) fn cyan(self, text: &str) -> String {
        self.paint("36", text)
    }

    /// Bold.
    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// Dim.
    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// A status in its colour; `text` is the word, possibly padded.
    pub(crate) fn status(self, status: JobStatus, text: &str) -> String {
        match status {
            JobStatus::InQueue => self.dim(text),
            JobStatus::InProgress => self.cyan(text),
            JobStatus::Completed => self.green(text),
            JobStatus::Failed => self.red(text),
            JobStatus::Cancelled | JobStatus::TimedOut => self.yellow(text),
        }
    }

    /// A word of a job's or batch's status in its colour; unknown words stay plain.
    pub(crate) fn status_word(self, word: &str) -> String {
        JobStatus::parse(word.trim_end()).map_or_else(|| word.to_owned(), |status| self.status(status, word))
    }
}

/// NO_COLOR (any value but empty) and a dumb terminal turn colours off.
fn allowed() -> bool {
    let unset = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
    !NEVER.load(Ordering::Relaxed) && unset("NO_COLOR") && std::env::var("TERM").as_deref() != Ok("dumb")
}
