//! Consumers of endpoints that do not exist, and streams of shards that do not exist: each costs the broker time.

use std::collections::HashSet;

use ringback_store::due::endpoint_ids;
use serde::Serialize;

use crate::context::{Context, PassError};

/// What the pass found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Consumers removed.
    pub consumers: u64,
    /// Empty streams removed.
    pub streams: u64,
    /// Streams of no shard that hold messages: left for a person.
    pub streams_left: u64,
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let mut report = Report::default();
    let shards = u32::from(context.store.facts().shards);
    for shard in context.bus.list_streams().await? {
        if shard < shards {
            // Consumers first: an endpoint that is made in between is in the second list.
            let consumers = context.bus.list_consumers(shard).await?;
            let known: HashSet<_> = endpoint_ids(context.store.read()).await?.into_iter().collect();
            for (endpoint, lane) in consumers.into_iter().filter(|(e, _)| !known.contains(e)) {
                report.consumers += u64::from(context.bus.delete_consumer(shard, endpoint, lane).await?);
            }
            continue;
        }
        match context.bus.stream_state(shard).await? {
            Some(state) if state.messages == 0 => {
                report.streams += u64::from(context.bus.delete_stream(shard).await?);
            }
            Some(state) => {
                report.streams_left += 1;
                tracing::warn!(
                    shard,
                    messages = state.messages,
                    "a stream of a shard that does not exist holds messages"
                );
            }
            None => {}
        }
    }
    Ok(report)
}
