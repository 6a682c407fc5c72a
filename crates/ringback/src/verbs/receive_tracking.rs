//! Polling of jobs whose webhook does not come, as flags of `ringback receive`.

use crate::error::CliError;
use crate::ui::when;
use ringback_service_runtime::Redacted;
use ringback_webhook_receiver::{StatusUrl, Tracking, Waits};
use std::path::PathBuf;
use std::time::Duration;

/// The variable that holds the key where no file is given.
const VARIABLE: &str = "RINGBACK_API_KEY";

/// What is polled, and when.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Jobs whose webhook does not come")]
pub(crate) struct TrackingArgs {
    /// Where a job's status is asked for, with {id} and perhaps {endpoint} in its path; opens POST /track
    #[arg(long, value_name = "URL")]
    poll_url: Option<String>,
    /// File with the API key for it; the same key names jobs at /track [default: the variable RINGBACK_API_KEY]
    #[arg(long, value_name = "FILE", requires = "poll_url")]
    api_key_file: Option<PathBuf>,
    /// How long a webhook is awaited before its job is polled
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = when::parse_span_ms)]
    max_wait: u64,
    /// Time between the first two polls of a job; it doubles, up to 10 minutes
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = when::parse_span_ms)]
    poll_every: u64,
    /// How long after its submit a job is given up
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = when::parse_span_ms)]
    give_up: u64,
}

impl TrackingArgs {
    /// Whether jobs are polled.
    pub(crate) const fn is_on(&self) -> bool {
        self.poll_url.is_some()
    }

    /// `None` when nothing is to be polled.
    pub(crate) fn read(&self, allow_private: &[ipnet::IpNet]) -> Result<Option<Tracking>, CliError> {
        let Some(text) = &self.poll_url else { return Ok(None) };
        let wrong = |error: String| {
            CliError::usage(
                format!("--poll-url: {error}"),
                "for example https://api.runpod.ai/v2/{endpoint}/status/{id}",
            )
        };
        let url = StatusUrl::parse(text).map_err(|error| wrong(error.to_string()))?;
        let mut urls = url.policy().map_err(|error| wrong(error.to_string()))?;
        // A name inside a private network needs the network opened.
        urls.addresses.allow_private.extend_from_slice(allow_private);
        let max_wait = Duration::from_millis(self.max_wait);
        let poll_every = Duration::from_millis(self.poll_every);
        let waits =
            Waits { max_wait, poll_every, give_up: Duration::from_millis(self.give_up), ..Waits::default() };
        if waits.give_up <= waits.max_wait {
            return Err(CliError::usage(
                "--give-up must be longer than --max-wait",
                "for example --give-up 24h",
            ));
        }
        Ok(Some(Tracking { url, urls, key: self.key()?, waits }))
    }

    fn key(&self) -> Result<Redacted<String>, CliError> {
        let text = match &self.api_key_file {
            Some(path) => std::fs::read_to_string(path).map_err(|source| CliError::File {
                action: "read",
                path: path.clone(),
                source,
            })?,
            None => std::env::var(VARIABLE).unwrap_or_default(),
        };
        let key = text.trim();
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(CliError::usage(
                "there is no API key to poll with",
                format!("give --api-key-file FILE with the key in one line, or {VARIABLE}"),
            ));
        }
        Ok(Redacted::new(key.to_owned()))
    }
}
