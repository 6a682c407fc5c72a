//! What can go wrong on the command line: the message, what to do next, the exit code.

use crate::client::problem::Problem;
use crate::exit::Exit;
use crate::ui::style::Style;
use std::path::PathBuf;

/// A failure of a verb.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// Arguments or input that cannot work.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: String,
    },
    /// A file that cannot be used.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Standard input or output failed.
    #[error("{0}")]
    Stdio(#[from] std::io::Error),
    /// The server answered that it will not.
    #[error("{0}")]
    Refused(Problem),
    /// Nobody answered.
    #[error("no answer from {url}: {reason}")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// An answer that is none of ours.
    #[error("{url} gave an answer that is not Ringback's: {reason}")]
    NotOurs {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
    /// `--timeout` ran out.
    #[error("{id} is still {status} after {seconds} s")]
    StillRunning {
        /// Job or batch.
        id: String,
        /// Its status.
        status: String,
        /// Time waited.
        seconds: f64,
    },
    /// Ctrl-C while waiting.
    #[error("stopped watching; {id} goes on")]
    Interrupted {
        /// Job or batch.
        id: String,
    },
    /// The configuration file.
    #[error("{0}")]
    Config(String),
    /// A service could not start or ended.
    #[error("{0}")]
    Service(String),
    /// An engine is ruined for the whole process: only another process can go on.
    #[error("{0}")]
    Ruined(String),
}

impl CliError {
    /// A usage error.
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    /// How the program ends.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Usage { .. } | Self::Config(_) => Exit::Usage,
            Self::File { .. }
            | Self::Stdio(_)
            | Self::NotOurs { .. }
            | Self::Service(_)
            | Self::Ruined(_) => Exit::Error,
            Self::Refused(problem) => problem.exit(),
            Self::Unreachable { .. } => Exit::Unreachable,
            Self::StillRunning { .. } => Exit::WaitTimedOut,
            Self::Interrupted { .. } => Exit::Interrupted,
        }
    }

    /// What to do next; empty when the message says it.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Usage { hint, .. } | Self::Unreachable { hint, .. } => hint.clone(),
            Self::Refused(problem) => problem.hint(),
            Self::NotOurs { .. } => {
                "check --url: it is the base address, for example http://127.0.0.1:8080".to_owned()
            }
            Self::StillRunning { id, .. } => format!("it goes on; look again with `ringback watch {id}`"),
            Self::Interrupted { id } => {
                format!("look again with `ringback watch {id}`, end it with `ringback cancel {id}`")
            }
            Self::Ruined(_) => "start it again: its jobs were handed back, nothing is lost".to_owned(),
            Self::File { .. } | Self::Stdio(_) | Self::Config(_) | Self::Service(_) => String::new(),
        }
    }

    /// Prints it to standard error: for a person, or as one JSON object.
    pub(crate) fn report(&self, json: bool) {
        let hint = self.hint();
        if json {
            let mut object =
                serde_json::json!({ "error": self.to_string(), "exit_code": self.exit().code() });
            if !hint.is_empty() {
                object["hint"] = hint.into();
            }
            if let Self::Refused(problem) = self {
                object["problem"] = problem.as_json();
            }
            eprintln!("{object}");
            return;
        }
        let style = Style::stderr();
        eprintln!("{} {}", style.red("error:"), crate::ui::clean(&self.to_string()));
        if !hint.is_empty() {
            eprintln!("  {} {}", style.dim("→"), crate::ui::clean(&hint));
        }
    }
}
