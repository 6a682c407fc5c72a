//! The worker's part: which endpoints it serves, under which keys.

use super::platform::{Platform, Sql, service};
use crate::error::CliError;
use ringback_gpu_worker::{App, ServedEndpoint, WorkerParts};
use ringback_service_runtime::config::EndpointConfig;
use ringback_service_runtime::{Check, RingbackConfig, Shutdown};
use ringback_store::endpoints::{self, EndpointRow};
use std::time::Duration;

/// Time between looks for endpoints that the API has not brought into SQL yet.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Builds the worker. The keys of its endpoints are read from SQL once; they never change.
///
/// The check says what is waited for and fails when it is dropped: keep it as long as the worker. `None` when the
/// shutdown came first.
pub(crate) async fn build(
    platform: &Platform,
    sql: &Sql,
    shutdown: &Shutdown,
) -> Result<Option<(App, Check)>, CliError> {
    let wanted: Vec<&EndpointConfig> = wanted(&platform.config)?;
    let check = platform.readiness.register("endpoints");
    let served = loop {
        let rows = endpoints::list(sql.store.read()).await.map_err(|error| service("the database", &error))?;
        match keyed(&wanted, &rows) {
            Ok(served) => break served,
            Err(missing) => check.fail(format!("the API has not brought `{missing}` into the database yet")),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = shutdown.triggered() => return Ok(None),
        }
    };
    check.ok();
    let parts = WorkerParts {
        bus: platform.bus.clone(),
        blobs: platform.blobs.clone(),
        readiness: platform.readiness.clone(),
        endpoints: served,
        shards: u32::from(sql.store.facts().shards),
        guard: None,
    };
    let app = App::build(&platform.config, parts).map_err(|error| service("worker", &error))?;
    Ok(Some((app, check)))
}

/// The endpoints that `worker.endpoints` names, or all.
fn wanted(config: &RingbackConfig) -> Result<Vec<&EndpointConfig>, CliError> {
    let names = &config.worker.endpoints;
    let is_named = |endpoint: &EndpointConfig, text: &str| match text.split_once('/') {
        Some((project, name)) => endpoint.project == project && endpoint.name == name,
        None => endpoint.name == text,
    };
    for name in names {
        if !config.endpoints.iter().any(|endpoint| is_named(endpoint, name)) {
            return Err(CliError::Config(format!("worker.endpoints: `{name}` is no endpoint of this configuration")));
        }
    }
    let is_wanted = |endpoint: &&EndpointConfig| names.is_empty() || names.iter().any(|name| is_named(endpoint, name));
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
        wanted(&config(text)).map(|all| all.iter().map(|e| e.name.clone()).collect()).map_err(|e| e.to_string())
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
