//! What all handlers share.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use ringback_bus::{Bus, BusError, Verb};
use ringback_contracts::{Message as _, VERSION, v1};
use ringback_domain::{ProjectId, webhook::response::Profile};
use ringback_service_runtime::{Shutdown, blobs::BlobStore, config::ServerConfig};
use ringback_store::{Store, secrets::SecretKey};

use crate::{
    auth::Auth,
    batches::Templates,
    catalog::Catalog,
    disk::DiskFloor,
    error::ApiError,
    runpod::hand_over::StreamTurns,
    submit::{outbound::Outbound, parse::Rules, pipeline::Submits},
    waiters::Waiters,
};

/// The API's parts.
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) bus: Bus,
    pub(crate) blobs: BlobStore,
    pub(crate) key: SecretKey,
    pub(crate) limits: ServerConfig,
    pub(crate) rules: Rules,
    pub(crate) catalog: Catalog,
    pub(crate) auth: Auth,
    pub(crate) submits: Arc<Submits>,
    pub(crate) outbound: Arc<Outbound>,
    pub(crate) waiters: Arc<Waiters>,
    pub(crate) stream_turns: StreamTurns,
    pub(crate) disk: Arc<DiskFloor>,
    pub(crate) templates: Templates,
    /// Projects whose webhook secrets the configuration names.
    pub(crate) configured_secrets: HashSet<ProjectId>,
    /// The operator's rules of acknowledgement and retry.
    pub(crate) webhook_profile: Profile,
    /// Base of links, without a slash at the end.
    pub(crate) base_url: String,
    /// A worker not heard of for so long does not count.
    pub(crate) worker_silence_ms: u64,
    pub(crate) shutdown: Shutdown,
}

/// Longest wait for the tracker: the JavaScript SDK gives up after 3 s.
const COMMAND_WITHIN: Duration = Duration::from_millis(2_200);
const COMMAND_PAUSE: Duration = Duration::from_millis(100);

impl Api {
    /// Asks the state-tracker and answers after its commit; 503 inside 2.5 s. Commands may be repeated, so a lost
    /// answer is asked for again.
    pub(crate) async fn command(
        &self,
        command: v1::command::Command,
    ) -> Result<v1::command_reply::Reply, ApiError> {
        let payload: Bytes = v1::Command { version: VERSION, command: Some(command) }.encode_to_vec().into();
        let began = tokio::time::Instant::now();
        loop {
            let left = COMMAND_WITHIN.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(no_tracker());
            }
            match self.bus.request(Verb::Command, payload.clone(), left).await {
                Ok(answer) => match v1::CommandReply::decode(answer).ok().and_then(|r| r.reply) {
                    Some(v1::command_reply::Reply::Refusal(refusal))
                        if refusal.why() == v1::refusal::Why::Unavailable => {}
                    Some(reply) => return Ok(reply),
                    None => return Err(ApiError::unavailable("the state tracker's answer cannot be read")),
                },
                Err(BusError::Permanent(error)) => {
                    tracing::error!(error, "a command cannot be sent");
                    return Err(no_tracker());
                }
                Err(_) => {}
            }
            tokio::time::sleep(COMMAND_PAUSE.min(left)).await;
        }
    }
}

fn no_tracker() -> ApiError {
    ApiError::unavailable("the state tracker does not answer now; nothing may have changed: try again")
}
