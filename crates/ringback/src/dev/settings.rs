//! From arguments and file to the configuration that `ringback dev` runs with.

use super::args::DevArgs;
use super::endpoint::EndpointSpec;
use crate::client::connection::Connection;
use crate::error::CliError;
use crate::services::load_config;
use ringback_service_runtime::Redacted;
use ringback_service_runtime::config::{
    ApiKeyConfig, DEFAULT_PROJECT, LogFormat, RingbackConfig, Scope, WebhookSecretConfig,
};
use std::path::PathBuf;

/// What `ringback dev` runs with.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The configuration.
    pub(crate) config: RingbackConfig,
    /// A key for the verbs; none where the file knows only hashes of keys.
    pub(crate) api_key: Option<Redacted<String>>,
    /// Whether the API is reached from this machine only.
    pub(crate) is_private: bool,
}

impl Settings {
    /// Reads the file, lets the flags win, and refuses what is unsafe. `random_key` makes a new key.
    ///
    /// # Errors
    /// Usage or configuration errors.
    pub(crate) fn new(args: &DevArgs, random_key: impl FnOnce() -> String) -> Result<Self, CliError> {
        let mut config = match &args.config {
            Some(path) => load_config(path)?,
            None => RingbackConfig::default(),
        };
        if args.config.is_none() {
            config.telemetry.log_format = LogFormat::Auto;
            config.telemetry.log_level = "warn".to_owned();
        }
        match args.verbose {
            0 => {}
            1 => config.telemetry.log_level = "info".to_owned(),
            _ => config.telemetry.log_level = "info,ringback=debug".to_owned(),
        }
        if let Some(listen) = args.listen {
            config.server.listen = listen;
        }
        if let Some(url) = &args.public_url {
            config.server.public_url = Some(url.clone());
        }
        if let Some(dir) = &args.data {
            config.data.dir.clone_from(dir);
        }
        if let Some(url) = &args.database {
            config.database.url = Some(Redacted::new(url.clone()));
            (config.database.url_env, config.database.url_file) = (None, None);
        }
        let is_private = listen_rule(args, &mut config)?;
        endpoints(args, &mut config);
        let api_key = keys(args, &mut config, random_key);
        config.validate().map_err(|error| CliError::Config(error.to_string()))?;
        Ok(Self { config, api_key, is_private })
    }
}

/// Beyond loopback only when told so, and then without the allowance for receivers on loopback: a stranger's job
/// must not reach this machine's own services.
fn listen_rule(args: &DevArgs, config: &mut RingbackConfig) -> Result<bool, CliError> {
    let is_private = config.server.listen.ip().is_loopback();
    if is_private {
        config.webhooks.allow_loopback = true;
        config.webhooks.allow_http = true;
    } else if args.listen_public {
        config.webhooks.allow_loopback = false;
    } else {
        return Err(CliError::usage(
            format!("{} can be reached from other machines", config.server.listen),
            "add --listen-public if that is meant; webhooks to receivers on this machine are refused then",
        ));
    }
    Ok(is_private)
}

fn endpoints(args: &DevArgs, config: &mut RingbackConfig) {
    for EndpointSpec(endpoint) in &args.endpoints {
        config.endpoints.retain(|other| other.project != endpoint.project || other.name != endpoint.name);
        config.endpoints.push(endpoint.clone());
    }
    if config.endpoints.is_empty() {
        config.endpoints = EndpointSpec::defaults();
    }
}

/// A key for the verbs: the one given, one of the file, the one of the last start, or a new one.
fn keys(
    args: &DevArgs,
    config: &mut RingbackConfig,
    random_key: impl FnOnce() -> String,
) -> Option<Redacted<String>> {
    let data_dir: PathBuf = config.data.dir.clone();
    let project = config.projects.entry(DEFAULT_PROJECT.to_owned()).or_default();
    if let Some(secret) = &args.webhook_secret {
        project.webhook_secrets = vec![WebhookSecretConfig {
            secret: Some(Redacted::new(secret.clone())),
            ..WebhookSecretConfig::default()
        }];
    }
    let given = args.api_key.clone().filter(|key| !key.is_empty());
    if given.is_none() && !project.api_keys.is_empty() {
        let with_all_rights =
            project.api_keys.iter().find(|key| key.scopes.contains(&Scope::Admin) && key.key.is_some());
        return with_all_rights.and_then(|key| key.key.clone());
    }
    let key = given
        .or_else(|| Connection::read(&data_dir).and_then(|last| last.api_key))
        .unwrap_or_else(random_key);
    let key = Redacted::new(key);
    project.api_keys.retain(|other| other.name != "dev");
    project.api_keys.push(ApiKeyConfig {
        name: "dev".to_owned(),
        key: Some(key.clone()),
        scopes: vec![Scope::Admin],
        ..ApiKeyConfig::default()
    });
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(args: &DevArgs) -> Result<Settings, CliError> {
        Settings::new(args, || "rb_dev_0123456789abcdef".to_owned())
    }

    fn at(data: &std::path::Path) -> DevArgs {
        DevArgs { data: Some(data.to_owned()), ..DevArgs::default() }
    }

    #[test]
    fn without_anything_there_is_a_key_and_two_endpoints() {
        let dir = tempfile::tempdir().unwrap();
        let made = settings(&at(dir.path())).unwrap();
        let names: Vec<&str> = made.config.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
        assert_eq!(names, ["echo", "sleep"]);
        assert_eq!(made.api_key.unwrap().into_inner(), "rb_dev_0123456789abcdef");
        assert!(made.is_private && made.config.webhooks.allow_loopback && made.config.webhooks.allow_http);
    }

    #[test]
    fn the_key_of_the_last_start_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let last = Connection {
            url: "http://127.0.0.1:1".into(),
            api_key: Some("rb_dev_of_the_last_start".into()),
            pid: 1,
        };
        last.write(dir.path()).unwrap();
        assert_eq!(
            settings(&at(dir.path())).unwrap().api_key.unwrap().into_inner(),
            "rb_dev_of_the_last_start"
        );
        let args = DevArgs { api_key: Some("rb_dev_given_just_now".into()), ..at(dir.path()) };
        assert_eq!(settings(&args).unwrap().api_key.unwrap().into_inner(), "rb_dev_given_just_now");
    }

    #[test]
    fn reaching_beyond_this_machine_needs_a_word_and_ends_the_loopback_allowance() {
        let dir = tempfile::tempdir().unwrap();
        let mut args = DevArgs { listen: Some(([0, 0, 0, 0], 8080).into()), ..at(dir.path()) };
        assert!(settings(&args).unwrap_err().to_string().contains("other machines"));
        args.listen_public = true;
        let made = settings(&args).unwrap();
        assert!(!made.is_private && !made.config.webhooks.allow_loopback);
    }

    #[test]
    fn flags_win_over_the_file_and_its_keys_suffice() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ringback.toml");
        std::fs::write(
            &file,
            "[server]\nlisten = \"127.0.0.1:1\"\n[projects.default]\napi_keys = [{ name = \"app\", key = \"rb_app_0123456789\", scopes = [\"admin\"] }]\n[[endpoints]]\nname = \"echo\"\nexecutor = { builtin = \"echo\" }\n",
        )
        .unwrap();
        let args = DevArgs {
            config: Some(file),
            listen: Some(([127, 0, 0, 1], 2).into()),
            endpoints: vec![EndpointSpec::parse("echo=builtin:sleep,slots=5").unwrap()],
            ..at(dir.path())
        };
        let made = settings(&args).unwrap();
        assert_eq!(made.config.server.listen.port(), 2);
        assert_eq!((made.config.endpoints.len(), made.config.endpoints[0].slots()), (1, 5));
        assert_eq!(made.config.projects["default"].api_keys.len(), 1);
        assert_eq!(made.api_key.unwrap().into_inner(), "rb_app_0123456789");
    }
}
