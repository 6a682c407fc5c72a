//! `[server]`: listeners, limits of what a client may send, rates.

use super::problems::Problems;
use super::section::section;
use crate::listener::Limits;
use std::net::SocketAddr;
use std::time::Duration;
use url::Url;

section! {
    /// HTTP listeners and the limits on what a client may send.
    ServerConfig {
        /// Address of the public HTTP API.
        listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8080)),
        /// Base URL under which clients and receivers reach the API; links are built from it, never from a request. Unset: `http://<listen>`.
        public_url: Option<Url> = None,
        /// Address of the operations listener (health and metrics). Unset: the API serves them on its own listener; a service without an API opens none.
        ops_listen: Option<SocketAddr> = None,
        /// Connections open at the same time on the API's listener; further ones wait until one ends. The system's limit on open files may allow fewer.
        max_connections: u32 = 25_000,
        /// Time for the head of a request to arrive, from its first byte, in milliseconds.
        header_timeout_ms: u64 = 10_000,
        /// How long a connection may wait for its next request, in milliseconds; longer than a proxy in front keeps it.
        keep_alive_ms: u64 = 75_000,
        /// Time for a request's body to arrive, in milliseconds, beside one second for every 16 KiB that have come.
        body_timeout_ms: u64 = 30_000,
        /// Largest request body of `/run` and of every route without its own limit, in bytes.
        max_body_bytes: u64 = 10 * 1024 * 1024,
        /// Largest request body of `/runsync`, in bytes.
        max_runsync_body_bytes: u64 = 20 * 1024 * 1024,
        /// Largest request body of a batch submit, in bytes.
        max_batch_body_bytes: u64 = 64 * 1024 * 1024,
        /// Most items in one batch.
        max_batch_items: u32 = 10_000,
        /// Deepest nesting of JSON accepted, in levels.
        max_json_depth: u32 = 128,
        /// Smallest `policy.executionTimeout` a submit may ask for, in milliseconds (RunPod: 5 s).
        min_execution_timeout_ms: u64 = 5_000,
        /// Largest `policy.executionTimeout` a submit may ask for, in milliseconds (RunPod: 7 days).
        max_execution_timeout_ms: u64 = 604_800_000,
        /// Smallest `policy.ttl` a submit may ask for, in milliseconds (RunPod: 10 s).
        min_ttl_ms: u64 = 10_000,
        /// Largest `policy.ttl` a submit may ask for, in milliseconds (RunPod: 7 days).
        max_ttl_ms: u64 = 604_800_000,
        /// Submits one project may make in any 10 seconds (a batch item counts as one); 0 means no limit. `[projects.<name>] submits_per_10s` overrides it.
        submits_per_10s: u64 = 0,
        /// Most requests that may wait for a job at once (`/runsync`, `/status-sync`, `/stream`, `/openai`), all projects together.
        max_waiters: u32 = 20_000,
        /// Most waiting requests of one project; 0 means only `max_waiters` applies.
        max_waiters_per_project: u32 = 10_000,
        /// Longest time a submit may wait for its commit before it is answered 503, in milliseconds.
        submit_timeout_ms: u64 = 2_500,
        /// Longest time that a request of `/v2/{endpoint}/openai/*` waits for its job, in milliseconds; then, as when the client hangs up, the job is cancelled. OpenAI's clients wait 10 minutes.
        openai_timeout_ms: u64 = 600_000,
        /// Free disk space below which submits are answered 507 while outcomes still commit, in bytes; 0 turns the check off.
        disk_floor_bytes: u64 = 512 * 1024 * 1024,
    }
}

impl ServerConfig {
    /// The base of every link we make: `public_url`, else `http://` and the address actually bound. No trailing slash.
    #[must_use]
    pub fn base_url(&self, bound: SocketAddr) -> String {
        match &self.public_url {
            Some(url) => url.as_str().trim_end_matches('/').to_owned(),
            None => format!("http://{bound}"),
        }
    }

    /// What a client of the API's listener may cost.
    #[must_use]
    pub fn listener_limits(&self) -> Limits {
        Limits {
            max_connections: self.max_connections,
            header: Duration::from_millis(self.header_timeout_ms),
            keep_alive: Duration::from_millis(self.keep_alive_ms),
            body: Duration::from_millis(self.body_timeout_ms),
        }
    }

    pub(super) fn validate(&self, p: &mut Problems) {
        p.at_least("server.max_connections", u64::from(self.max_connections), 16);
        p.within("server.header_timeout_ms", self.header_timeout_ms, 100, 600_000);
        p.within("server.keep_alive_ms", self.keep_alive_ms, 100, 3_600_000);
        p.within("server.body_timeout_ms", self.body_timeout_ms, 100, 3_600_000);
        if let Some(url) = &self.public_url {
            if !matches!(url.scheme(), "http" | "https") {
                p.add("server.public_url", "must start with http:// or https://");
            }
            if url.query().is_some() || url.fragment().is_some() {
                p.add("server.public_url", "must not carry a query or a fragment");
            }
            if !url.username().is_empty() || url.password().is_some() {
                p.add(
                    "server.public_url",
                    "must not carry a user or a password: it is shown to every receiver",
                );
            }
        }
        if self.ops_listen.is_some_and(|ops| ops == self.listen && ops.port() != 0) {
            p.add(
                "server.ops_listen",
                "is the same address as server.listen; leave it out to share the listener",
            );
        }
        p.at_least("server.max_body_bytes", self.max_body_bytes, 1024);
        p.at_least("server.max_runsync_body_bytes", self.max_runsync_body_bytes, 1024);
        p.at_least("server.max_batch_body_bytes", self.max_batch_body_bytes, 1024);
        p.within("server.max_batch_items", u64::from(self.max_batch_items), 1, 100_000);
        // The deepest value serde_json parses without its recursion guard is 128 levels.
        p.within("server.max_json_depth", u64::from(self.max_json_depth), 1, 128);
        // A year keeps every sum of times inside 64 bits.
        const YEAR_MS: u64 = 366 * 86_400_000;
        p.within(
            "server.min_execution_timeout_ms",
            self.min_execution_timeout_ms,
            1,
            self.max_execution_timeout_ms,
        );
        p.within("server.max_execution_timeout_ms", self.max_execution_timeout_ms, 1, YEAR_MS);
        p.within("server.min_ttl_ms", self.min_ttl_ms, 1, self.max_ttl_ms);
        p.within("server.max_ttl_ms", self.max_ttl_ms, 1, YEAR_MS);
        p.at_least("server.max_waiters", u64::from(self.max_waiters), 1);
        p.within("server.submit_timeout_ms", self.submit_timeout_ms, 100, 60_000);
        p.within("server.openai_timeout_ms", self.openai_timeout_ms, 1_000, YEAR_MS);
    }
}
