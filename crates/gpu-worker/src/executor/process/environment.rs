//! Which variables a child gets: an allow list, what the protocol needs, and what the operator wrote. Never
//! the worker's whole environment, which may hold credentials of NATS or of storage.

use std::collections::BTreeMap;
use std::ffi::OsString;

use ringback_worker_protocol::{ChildIdentity, environment};

use super::ProcessSettings;

/// Passed on from the worker. `LC_*` comes beside these.
const ALLOWED: &[&str] = &[
    "PATH",
    "HOME",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "TMP",
    "TEMP",
    "USER",
    "LOGNAME",
    "SHELL",
    "TERM",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// The operator cannot change these: the child would not reach its hub, or would not pull at all.
const FIXED: &[&str] = &[
    "RUNPOD_WEBHOOK_GET_JOB",
    "RUNPOD_WEBHOOK_POST_OUTPUT",
    "RUNPOD_WEBHOOK_POST_STREAM",
    "RUNPOD_WEBHOOK_PING",
    "RUNPOD_AI_API_KEY",
    "RUNPOD_POD_ID",
    "RUNPOD_ENDPOINT_ID",
    "RUNPOD_REALTIME_PORT",
    "RUNPOD_REALTIME_CONCURRENCY",
];

/// True for names that any child may inherit.
fn allow_listed(name: &str) -> bool {
    ALLOWED.contains(&name) || name.starts_with("LC_")
}

/// The whole environment of a child. `own` are the worker's variables.
pub(super) fn of_child(
    settings: &ProcessSettings,
    identity: &ChildIdentity,
    own: impl IntoIterator<Item = (OsString, OsString)>,
) -> BTreeMap<OsString, OsString> {
    let mut env: BTreeMap<OsString, OsString> = own
        .into_iter()
        .filter(|(name, _)| {
            name.to_str().is_some_and(|name| {
                allow_listed(name) || settings.pass_env.iter().any(|passed| passed == name)
            })
        })
        .collect();
    // Without it a crash loses the lines that would explain it.
    env.insert("PYTHONUNBUFFERED".into(), "1".into());
    if let Some(visible) = &settings.visible_devices {
        env.insert("CUDA_VISIBLE_DEVICES".into(), visible.into());
    }
    let protocol = environment(identity);
    for (name, value) in &protocol {
        env.insert((*name).into(), value.into());
    }
    for (name, value) in &settings.env {
        if FIXED.contains(&name.as_str()) {
            tracing::warn!(endpoint = %settings.endpoint, name, "this variable belongs to the worker protocol; ignored");
        } else {
            env.insert(name.into(), value.into());
        }
    }
    for name in FIXED {
        if !protocol.iter().any(|(set, _)| set == name) {
            env.remove(std::ffi::OsStr::new(name));
        }
    }
    env
}
