//! Running services: one role per process, or all in one.

pub(crate) mod migrate;
pub(crate) mod platform;
pub(crate) mod roles;
pub(crate) mod serve;

use crate::error::CliError;
use ringback_service_runtime::RingbackConfig;
use ringback_service_runtime::config::ConfigError;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

/// One runtime for all services of a process.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("ringback").build()?)
}

/// The runtime of everything in one process, with one thread fewer than there are cores: SQLite and its writer have
/// threads of their own, and beside the broker on a small machine a further one only takes turns with them.
/// `TOKIO_WORKER_THREADS` says otherwise.
pub(crate) fn shared_runtime() -> Result<tokio::runtime::Runtime, CliError> {
    if std::env::var_os("TOKIO_WORKER_THREADS").is_some() {
        return runtime();
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.saturating_sub(1).max(1))
        .enable_all()
        .thread_name("ringback")
        .build()?)
}

/// Reads and checks a configuration file.
pub(crate) fn load_config(path: &Path) -> Result<RingbackConfig, CliError> {
    RingbackConfig::load(path).map_err(|error| match error {
        // It names the file itself.
        ConfigError::Read { .. } => CliError::Config(error.to_string()),
        other => CliError::Config(format!("{}: {other}", path.display())),
    })
}

/// Makes a folder that only its owner can enter.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), CliError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| CliError::File {
        action: "make the folder",
        path: dir.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_annotated_example_is_a_configuration() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ringback.toml");
        let config = super::load_config(&path).unwrap();
        let names: Vec<&str> = config.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
        assert_eq!(names, ["echo", "tts", "slow"]);
        // What is commented out is right, too.
        let text = std::fs::read_to_string(&path).unwrap();
        let uncommented: Vec<&str> = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest)
                    if rest.starts_with('[')
                        || rest.split_once(" = ").is_some_and(|(key, _)| is_key(key)) =>
                {
                    rest
                }
                _ => line,
            })
            .collect();
        ringback_service_runtime::RingbackConfig::from_toml(&uncommented.join("\n")).unwrap();
    }

    fn is_key(text: &str) -> bool {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    }
}
