//! The worker in a process of its own, and which endpoints a worker serves.

use std::time::Duration;

use ringback_bus::{Bus, Verb};
use ringback_contracts::{EndpointFacts, EndpointKey, Message as _, VERSION, endpoint_facts_of, v1};
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::config::EndpointConfig;
use ringback_service_runtime::{Check, Host, Readiness, RingbackConfig, ServeError, Shutdown};

use crate::{App, ServedEndpoint, WorkerParts};

/// Time between questions to a tracker that is not there yet, or that has not all endpoints yet.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// The same when the worker has asked in vain for a while.
const ASK_SELDOM: Duration = Duration::from_secs(1);
/// Questions before they become seldom.
const EAGER_QUESTIONS: u32 = 40;

/// Connects what the worker needs and runs jobs until the process wants to end and its drain is over.
///
/// It has no database: it takes jobs and talks to the state-tracker, nothing else.
///
/// # Errors
/// Something of the configuration cannot be used, or the worker cannot start.
pub async fn serve(host: Host) -> Result<(), ServeError> {
    let bus = Bus::connect(&host.config.nats, host.name).await?;
    let found = served_endpoints(&host.config, &bus, &host.readiness, &host.shutdown).await?;
    let Some(Served { endpoints, shards, check: _check }) = found else { return Ok(()) };
    let parts = WorkerParts {
        bus,
        blobs: BlobStore::open(&host.config.blobs, &host.config.data.dir)?,
        readiness: host.readiness,
        endpoints,
        shards,
        guard: None,
    };
    App::build(&host.config, parts)?.run(host.shutdown).await?;
    Ok(())
}

/// The endpoints that this worker serves cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum ServedError {
    /// `worker.endpoints` names something else.
    #[error("worker.endpoints: `{0}` is no endpoint of this configuration")]
    Unknown(String),
}

/// What a worker serves.
#[derive(Debug)]
pub struct Served {
    /// The endpoints with their keys.
    pub endpoints: Vec<ServedEndpoint>,
    /// Number of shards of the work queue. Neither it nor the keys ever change.
    pub shards: u32,
    /// Says what is waited for, and fails when it is dropped: keep it as long as the worker.
    pub check: Check,
}

/// The endpoints that `worker.endpoints` names (or all) with their keys, asked of the state-tracker until it is there
/// and the API has brought them all into SQL. None when the shutdown came first.
///
/// # Errors
/// See [`ServedError`].
pub async fn served_endpoints(
    config: &RingbackConfig,
    bus: &Bus,
    readiness: &Readiness,
    shutdown: &Shutdown,
) -> Result<Option<Served>, ServedError> {
    let wanted = wanted(config)?;
    let check = readiness.register("endpoints");
    let within = Duration::from_millis(config.nats.request_timeout_ms);
    let mut asked = 0_u32;
    loop {
        let why = tokio::select! {
            answer = ask(bus, &wanted, within) => match answer {
                Ok(facts) => match keyed(&wanted, &facts.endpoints) {
                    Ok(endpoints) => {
                        check.ok();
                        return Ok(Some(Served { endpoints, shards: facts.shards, check }));
                    }
                    Err(missing) => {
                        format!("the API has not brought the endpoint `{missing}` into the database yet")
                    }
                },
                Err(why) => why,
            },
            () = shutdown.triggered() => return Ok(None),
        };
        check.fail(why);
        asked = asked.saturating_add(1);
        let pause = if asked < EAGER_QUESTIONS { ASK_EVERY } else { ASK_SELDOM };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.triggered() => return Ok(None),
        }
    }
}

/// What the tracker knows of these endpoints; in words why it does not tell.
async fn ask(bus: &Bus, wanted: &[&EndpointConfig], within: Duration) -> Result<EndpointFacts, String> {
    let name = |e: &&EndpointConfig| v1::EndpointName { project: e.project.clone(), name: e.name.clone() };
    let request = v1::EndpointsRequest { version: VERSION, endpoints: wanted.iter().map(name).collect() };
    let answer = bus
        .request(Verb::Endpoints, request.encode_to_vec().into(), within)
        .await
        .map_err(|error| format!("the state-tracker cannot be asked: {error}"))?;
    let reply = v1::EndpointsReply::decode(answer).map_err(ringback_contracts::ContractError::from);
    reply
        .and_then(|reply| endpoint_facts_of(&reply))
        .map_err(|error| format!("the state-tracker's answer cannot be read: {error}"))
}

fn wanted(config: &RingbackConfig) -> Result<Vec<&EndpointConfig>, ServedError> {
    let names = &config.worker.endpoints;
    let is_named = |endpoint: &EndpointConfig, text: &str| match text.split_once('/') {
        Some((project, name)) => endpoint.project == project && endpoint.name == name,
        None => endpoint.name == text,
    };
    for name in names {
        if !config.endpoints.iter().any(|endpoint| is_named(endpoint, name)) {
            return Err(ServedError::Unknown(name.clone()));
        }
    }
    let is_wanted =
        |endpoint: &&EndpointConfig| names.is_empty() || names.iter().any(|name| is_named(endpoint, name));
    Ok(config.endpoints.iter().filter(is_wanted).collect())
}

/// Joins configuration and keys; the name of the first endpoint without a key otherwise.
fn keyed(wanted: &[&EndpointConfig], keys: &[EndpointKey]) -> Result<Vec<ServedEndpoint>, String> {
    wanted
        .iter()
        .map(|endpoint| {
            let key = keys
                .iter()
                .find(|key| key.name.as_str() == endpoint.name && key.project.as_str() == endpoint.project)
                .ok_or_else(|| endpoint.name.clone())?;
            if key.config_revision != EndpointConfig::revision(&endpoint.shared_json()) {
                tracing::warn!(
                    endpoint = endpoint.name,
                    "the API works with another configuration of this endpoint: give both the same file"
                );
            }
            Ok(ServedEndpoint { id: key.id, config: (*endpoint).clone() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringback_domain::{EndpointId, Name};

    fn config(text: &str) -> RingbackConfig {
        RingbackConfig::from_toml(&format!(
            "{text}\n[projects.other]\n[[endpoints]]\nname = \"a\"\nexecutor = {{ builtin = \"echo\" }}\n[[endpoints]]\nname = \"b\"\nproject = \"other\"\nexecutor = {{ builtin = \"echo\" }}\n"
        ))
        .unwrap()
    }

    fn names(text: &str) -> Result<Vec<String>, String> {
        wanted(&config(text))
            .map(|all| all.iter().map(|e| e.name.clone()).collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_worker_serves_what_it_is_told() {
        assert_eq!(names("").unwrap(), ["a", "b"]);
        assert_eq!(names("[worker]\nendpoints = [\"other/b\"]").unwrap(), ["b"]);
        assert_eq!(names("[worker]\nendpoints = [\"a\"]").unwrap(), ["a"]);
        assert!(names("[worker]\nendpoints = [\"default/b\"]").unwrap_err().contains("`default/b`"));
    }

    #[test]
    fn an_endpoint_without_a_key_is_waited_for() {
        let config = config("");
        let wanted = wanted(&config).unwrap();
        let row = |name: &str, project: &str| EndpointKey {
            id: EndpointId(7),
            project: Name::parse(project).unwrap(),
            name: Name::parse(name).unwrap(),
            config_revision: 0,
        };
        let both = [row("a", "default"), row("b", "other")];
        assert_eq!(keyed(&wanted, &both).unwrap().len(), 2);
        assert_eq!(keyed(&wanted, &[row("a", "default"), row("b", "default")]).unwrap_err(), "b");
    }
}
