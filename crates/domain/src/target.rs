//! Where the webhooks of a job go.

use crate::status::JobStatus;

/// Which transitions a target hears of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EventScope {
    /// Only the end of a run, as RunPod's `webhook` does.
    Terminal,
    /// Every transition, as `webhookv2` does.
    All,
}

impl EventScope {
    /// Whether a target of this scope is owed a delivery for a job that enters `status`.
    #[must_use]
    pub const fn wants(self, status: JobStatus) -> bool {
        match self {
            Self::All => true,
            Self::Terminal => status.is_terminal(),
        }
    }
}

/// Shape of the body a target gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BodyFormat {
    /// RunPod's `webhook` body: `id, status, delayTime, executionTime, input, output, webhook`.
    RunpodWebhook,
    /// The body of each state: `id, status`, then `delayTime`, then `executionTime, output`.
    RunpodWebhookV2,
}

/// One place that is owed deliveries of a job. Its index in the job's list is part of the delivery's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Absolute URL as the client gave it.
    pub url: String,
    /// Which transitions.
    pub scope: EventScope,
    /// Which body.
    pub format: BodyFormat,
}

impl Target {
    /// The targets of a submit. The same URL in both fields is one target with the wider set; on an endpoint
    /// that tells every transition (`webhook_events = "all"`) `webhook` behaves like `webhookv2`.
    #[must_use]
    pub fn of_submit(webhook: Option<&str>, webhook_v2: Option<&str>, all_events: bool) -> Vec<Self> {
        let wide = |url: &str| Self {
            url: url.to_owned(),
            scope: EventScope::All,
            format: BodyFormat::RunpodWebhookV2,
        };
        match (webhook, webhook_v2) {
            (None, None) => Vec::new(),
            (Some(url), None) if all_events => vec![wide(url)],
            (Some(url), None) => vec![Self::terminal(url)],
            (None, Some(url)) => vec![wide(url)],
            (Some(a), Some(b)) if a == b => vec![wide(a)],
            (Some(a), Some(b)) if all_events => vec![wide(a), wide(b)],
            (Some(a), Some(b)) => vec![Self::terminal(a), wide(b)],
        }
    }

    fn terminal(url: &str) -> Self {
        Self { url: url.to_owned(), scope: EventScope::Terminal, format: BodyFormat::RunpodWebhook }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_url_in_both_fields_is_one_target() {
        let t = Target::of_submit(Some("http://a"), Some("http://a"), false);
        assert_eq!(t.len(), 1);
        assert_eq!(t[0].scope, EventScope::All);
        let t = Target::of_submit(Some("http://a"), Some("http://b"), false);
        assert_eq!((t[0].scope, t[1].scope), (EventScope::Terminal, EventScope::All));
        let t = Target::of_submit(Some("http://a"), None, true);
        assert_eq!((t[0].scope, t[0].format), (EventScope::All, BodyFormat::RunpodWebhookV2));
        assert!(Target::of_submit(None, None, true).is_empty());
    }
}
