//! The environment variables that turn a process into a child of a hub.

use std::fmt;

/// What a child must know to reach its hub.
#[derive(Clone)]
pub struct ChildIdentity {
    /// Where the hub listens, for example `http://127.0.0.1:40123`, without a trailing slash.
    pub base_url: String,
    /// Endpoint name as it stands in the URLs.
    pub endpoint: String,
    /// Worker id of this child, fresh for every process: two live processes must never share one.
    pub worker_id: String,
    /// Random token; the SDK sends it raw as `Authorization`.
    pub token: String,
    /// Name of the device, shown by the SDK as `gpu=`.
    pub device: String,
    /// Interval of the SDK's pings in milliseconds. The SDK divides by 1000 and loses the rest, so a
    /// value below 1000 would make it ping in a busy loop; it is raised to 1000.
    pub ping_interval_ms: u64,
}

impl fmt::Debug for ChildIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildIdentity")
            .field("endpoint", &self.endpoint)
            .field("worker_id", &self.worker_id)
            .field("token", &"[redacted]")
            .finish_non_exhaustive()
    }
}

/// The variables that the Python package `runpod` reads in a worker process.
///
/// `$ID` stays literal: the SDK replaces it with the worker id in the take URL and with the job id in
/// the result URLs. Every URL already carries a query, because the SDK appends `&key=value` blindly.
/// The start-up checks of SDK 1.9 and later need a big host with Internet access and a free GPU and end
/// the process when one fails, so they are skipped.
pub fn environment(identity: &ChildIdentity) -> Vec<(&'static str, String)> {
    let gpu: String = url::form_urlencoded::byte_serialize(identity.device.as_bytes()).collect();
    let url = |rest: &str| format!("{}/v2/{}/{rest}?gpu={gpu}", identity.base_url, identity.endpoint);
    vec![
        ("RUNPOD_WEBHOOK_GET_JOB", url("job-take/$ID")),
        ("RUNPOD_WEBHOOK_POST_OUTPUT", url("job-done/$RUNPOD_POD_ID/$ID")),
        ("RUNPOD_WEBHOOK_POST_STREAM", url("job-stream/$RUNPOD_POD_ID/$ID")),
        ("RUNPOD_WEBHOOK_PING", url("ping/$RUNPOD_POD_ID")),
        ("RUNPOD_AI_API_KEY", identity.token.clone()),
        ("RUNPOD_POD_ID", identity.worker_id.clone()),
        ("RUNPOD_POD_HOSTNAME", identity.worker_id.clone()),
        ("RUNPOD_ENDPOINT_ID", identity.endpoint.clone()),
        ("RUNPOD_PING_INTERVAL", identity.ping_interval_ms.max(1000).to_string()),
        ("RUNPOD_LOG_LEVEL", "INFO".to_owned()),
        ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true".to_owned()),
        ("RUNPOD_SKIP_GPU_CHECK", "true".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_hold_a_query_and_the_placeholders() {
        let identity = ChildIdentity {
            base_url: "http://127.0.0.1:1".into(),
            endpoint: "tts".into(),
            worker_id: "w1".into(),
            token: "secret-token".into(),
            device: "NVIDIA H200".into(),
            ping_interval_ms: 10,
        };
        let all = environment(&identity);
        let get = |name: &str| all.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str());
        assert_eq!(
            get("RUNPOD_WEBHOOK_GET_JOB"),
            Some("http://127.0.0.1:1/v2/tts/job-take/$ID?gpu=NVIDIA+H200")
        );
        assert_eq!(get("RUNPOD_PING_INTERVAL"), Some("1000"));
        for (name, value) in &all {
            assert!(!name.contains("WEBHOOK") || value.contains('?'), "{name}");
            assert!(!name.contains("WEBHOOK") || !value.contains("secret-token"), "{name}");
        }
        assert!(!format!("{identity:?}").contains("secret-token"));
    }
}
