//! Where the webhooks of a job go.

use crate::status::JobStatus;
use crate::webhook::response::Profile;

/// First number of targets that are registered webhooks: their `deliveries.target` is this plus the webhook's key.
/// Lower numbers are places in a job's own list.
pub const REGISTERED_TARGET_BASE: u32 = 65_536;

/// Bit of `deliveries.format`: a Runflow body, which carries Runflow's signature too.
pub const FORMAT_RUNFLOW: u32 = 1;
/// Bit of `deliveries.format`: RunPod's own rules, whatever the operator's are: 200 acknowledges, three tries.
pub const FORMAT_RUNPOD_STRICT: u32 = 2;
/// Bit of `deliveries.format`: the usual rules, whatever the operator's are.
pub const FORMAT_STANDARD_PROFILE: u32 = 4;

/// The key of the registered webhook that a target number means; `None` for a job's own target.
#[must_use]
pub const fn registered_webhook(target: u32) -> Option<u32> {
    target.checked_sub(REGISTERED_TARGET_BASE)
}

/// Which bodies a registered webhook gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WebhookFormat {
    /// The typed envelope, for every event.
    #[default]
    Standard,
    /// Runflow's body: ends of runs and batches.
    Runflow,
    /// RunPod's body of each state: transitions of jobs.
    Runpod,
}

impl WebhookFormat {
    /// Every format, in the order of [`Self::code`].
    pub const ALL: [Self; 3] = [Self::Standard, Self::Runflow, Self::Runpod];

    /// The word in requests and views.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Runflow => "runflow",
            Self::Runpod => "runpod",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.as_str() == word)
    }

    /// Number used in SQL.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Standard => 0,
            Self::Runflow => 1,
            Self::Runpod => 2,
        }
    }

    /// Reads [`Self::code`] back.
    #[must_use]
    pub fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }
}

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
    /// Runflow's body of a run's end ([`crate::webhook::runflow_body`]), with Runflow's signature.
    Runflow,
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
    /// Rules of acknowledgement and retry that the endpoint sets; `None` = the operator's.
    pub profile: Option<Profile>,
}

impl Target {
    /// What `deliveries.format` says of its deliveries.
    #[must_use]
    pub fn delivery_format(&self) -> u32 {
        let body = if self.format == BodyFormat::Runflow { FORMAT_RUNFLOW } else { 0 };
        let profile = match self.profile {
            None => 0,
            Some(Profile::Standard) => FORMAT_STANDARD_PROFILE,
            Some(Profile::RunpodStrict) => FORMAT_RUNPOD_STRICT,
        };
        body | profile
    }

    /// The same target under an endpoint's own rules.
    #[must_use]
    pub fn with_profile(self, profile: Option<Profile>) -> Self {
        Self { profile, ..self }
    }

    /// The targets of a submit. The same URL in both fields is one target with the wider set; on an endpoint
    /// that tells every transition (`webhook_events = "all"`) `webhook` behaves like `webhookv2`.
    #[must_use]
    pub fn of_submit(webhook: Option<&str>, webhook_v2: Option<&str>, all_events: bool) -> Vec<Self> {
        let wide = |url: &str| Self {
            url: url.to_owned(),
            scope: EventScope::All,
            format: BodyFormat::RunpodWebhookV2,
            profile: None,
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

    /// The target of a submit's `callback_url`.
    #[must_use]
    pub fn of_callback(url: &str) -> Self {
        Self { url: url.to_owned(), scope: EventScope::Terminal, format: BodyFormat::Runflow, profile: None }
    }

    fn terminal(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            scope: EventScope::Terminal,
            format: BodyFormat::RunpodWebhook,
            profile: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_read_back_and_registered_targets_begin_at_the_base() {
        for format in WebhookFormat::ALL {
            assert_eq!(WebhookFormat::parse(format.as_str()), Some(format));
            assert_eq!(WebhookFormat::from_code(i64::from(format.code())), Some(format));
        }
        assert_eq!(WebhookFormat::from_code(3), None);
        assert_eq!(registered_webhook(65_535), None);
        assert_eq!(registered_webhook(REGISTERED_TARGET_BASE + 7), Some(7));
    }

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
        assert_eq!(t[0].delivery_format(), 0);
        let strict = Target::of_callback("http://a").with_profile(Some(Profile::RunpodStrict));
        assert_eq!(strict.delivery_format(), FORMAT_RUNFLOW | FORMAT_RUNPOD_STRICT);
    }
}
