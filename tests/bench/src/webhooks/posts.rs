//! The floor: bare POSTs by the HTTP client that the dispatcher uses, in a process of their own.

use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::HeaderMap;
use ringback_domain::webhook::url::UrlPolicy;
use ringback_egress::{Client, Limits, Post};

use super::failed;
use crate::error::BenchError;

/// What to send.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where to
    #[arg(long)]
    pub(super) url: String,
    /// How many
    #[arg(long)]
    pub(super) count: u64,
    /// In flight at once
    #[arg(long, default_value_t = 64)]
    pub(super) in_flight: usize,
    /// Bytes of each body
    #[arg(long, default_value_t = 300)]
    pub(super) bytes: usize,
}

/// Sends them and prints the rate.
pub(super) async fn run(args: &Args) -> Result<bool, BenchError> {
    ringback_service_runtime::crypto_provider::install();
    let limits = Limits { max_idle_per_host: args.in_flight, ..Limits::default() };
    let client = Client::new(UrlPolicy::development(), limits).map_err(failed)?;
    let body = Bytes::from(format!("{{\"x\":\"{}\"}}", "x".repeat(args.bytes)));
    let url = client.check(&args.url).map_err(failed)?;
    let began = Instant::now();
    let (mut sent, mut flights) = (0, FuturesUnordered::new());
    loop {
        while sent < args.count && flights.len() < args.in_flight {
            let (client, url, body) = (client.clone(), url.clone(), body.clone());
            flights.push(tokio::spawn(async move {
                client.post(Post { url, headers: HeaderMap::new(), body, deadline: None }).await.result
            }));
            sent += 1;
        }
        let Some(answer) = flights.next().await else { break };
        answer.map_err(failed)?.map_err(failed)?;
    }
    println!("{:.1}", args.count as f64 / began.elapsed().as_secs_f64());
    Ok(true)
}
