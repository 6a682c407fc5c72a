//! The worker in a process of its own, and which endpoints a worker serves.

use std::time::Duration;

use ringback_bus::Bus;
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::config::EndpointConfig;
use ringback_service_runtime::{Check, Host, Readiness, RingbackConfig, ServeError, Shutdown};
use ringback_store::endpoints::{self, EndpointRow};
use ringback_store::{Open, Store, StoreError};

use crate::{App, ServedEndpoint, WorkerParts};

/// Time between looks for endpoints that the API has not brought into SQL yet.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Connects what the worker needs and runs jobs until the process wants to end and its drain is over.
///
/// SQL is read once, for the keys of the endpoints and the number of shards; neither ever changes.
///
/// # Errors
/// Something of the configuration cannot be used, or the worker cannot start.
pub async fn serve(host: Host) -> Result<(), ServeError> {
    let open = Open::from_config(&host.config)?;
    let Some(store) = host.starting(Store::open_patiently(&open)).await else { return Ok(()) };
    let store = store?;
    let shards = u32::from(store.facts().shards);
    let found = served_endpoints(&host.config, &store, &host.readiness, &host.shutdown).await?;
    let Some((endpoints, _check)) = found else { return Ok(()) };
    drop(store);
    let parts = WorkerParts {
        bus: Bus::connect(&host.config.nats, host.name).await?,
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
    /// SQL.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The endpoints that `worker.endpoints` names (or all) with their keys, once the API has brought them into SQL. The
/// check says what is waited for and fails when it is dropped: keep it as long as the worker. None when the shutdown
/// came first.
///
/// # Errors
/// See [`ServedError`].
pub async fn served_endpoints(
    config: &RingbackConfig,
    store: &Store,
    readiness: &Readiness,
    shutdown: &Shutdown,
) -> Result<Option<(Vec<ServedEndpoint>, Check)>, ServedError> {
    let wanted = wanted(config)?;
    let check = readiness.register("endpoints");
    loop {
        let why = match endpoints::list(store.read()).await {
            Ok(rows) => match keyed(&wanted, &rows) {
                Ok(served) => {
                    check.ok();
                    return Ok(Some((served, check)));
                }
                Err(missing) => {
                    format!("the API has not brought the endpoint `{missing}` into the database yet")
                }
            },
            Err(error) if error.is_transient() => format!("the database: {error}"),
            Err(error) => return Err(error.into()),
        };
        check.fail(why);
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = shutdown.triggered() => return Ok(None),
        }
    }
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
fn keyed(wanted: &[&EndpointConfig], rows: &[EndpointRow]) -> Result<Vec<ServedEndpoint>, String> {
    wanted
        .iter()
        .map(|endpoint| {
            rows.iter()
                .find(|row| row.name == endpoint.name && row.project_name == endpoint.project)
                .map(|row| ServedEndpoint { id: row.id, config: (*endpoint).clone() })
                .ok_or_else(|| endpoint.name.clone())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringback_domain::{EndpointId, ProjectId};

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
        let row = |name: &str, project: &str| EndpointRow {
            id: EndpointId(7),
            project: ProjectId(1),
            project_name: project.into(),
            name: name.into(),
            config: String::new(),
        };
        let both = [row("a", "default"), row("b", "other")];
        assert_eq!(keyed(&wanted, &both).unwrap().len(), 2);
        assert_eq!(keyed(&wanted, &[row("a", "default"), row("b", "default")]).unwrap_err(), "b");
    }
}
