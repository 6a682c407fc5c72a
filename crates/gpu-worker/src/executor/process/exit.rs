//! How a child ended, in words for the client of the job that it took along.

use crate::guard::GuardStatus;

/// Why a child's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Exit {
    pub(super) status: Option<GuardStatus>,
    pub(super) tail: String,
}

impl Exit {
    /// One line: exit code or signal.
    pub(super) fn reason(&self) -> String {
        match &self.status {
            Some(GuardStatus::Code(code)) => format!("exit code {code}"),
            Some(GuardStatus::Signal(9)) => "killed by signal 9 (SIGKILL), perhaps out of memory".to_owned(),
            Some(GuardStatus::Signal(number)) => format!("killed by signal {number}{}", name(*number)),
            Some(GuardStatus::NotStarted(reason)) => reason.clone(),
            None => "its guard was killed".to_owned(),
        }
    }

    /// The error of a job that the child took along.
    pub(super) fn job_error(&self) -> String {
        let head = format!("the handler's process ended while it ran this job: {}", self.reason());
        if self.tail.is_empty() { head } else { format!("{head}\nlast lines of its stderr:\n{}", self.tail) }
    }

    /// For readiness and the log.
    pub(super) fn short(&self) -> String {
        match self.tail.lines().last() {
            Some(line) => format!("{}; last line of stderr: {line}", self.reason()),
            None => self.reason(),
        }
    }
}

fn name(signal: i32) -> &'static str {
    match signal {
        2 => " (SIGINT)",
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}
