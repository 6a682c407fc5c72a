//! The client verbs.

pub(crate) mod batch;
pub(crate) mod bench;
pub(crate) mod cancel;
pub(crate) mod deliveries;
pub(crate) mod get;
pub(crate) mod input;
pub(crate) mod listen;
pub(crate) mod logs;
pub(crate) mod ls;
pub(crate) mod purge;
pub(crate) mod receive;
pub(crate) mod receive_secrets;
pub(crate) mod receive_tracking;
pub(crate) mod replay;
pub(crate) mod retry;
mod save;
pub(crate) mod show;
pub(crate) mod submit;
pub(crate) mod verify;
pub(crate) mod wait;
pub(crate) mod watch;
pub(crate) mod webhook;

use crate::cli::OutputArgs;
use crate::client::Api;
use crate::client::connection::{ServerArgs, Target};
use crate::client::model::{Batch, Job};
use crate::client::{Body, encode};
use crate::error::CliError;

/// What every client verb has at hand.
#[derive(Debug)]
pub(crate) struct Context {
    /// The server.
    pub(crate) api: Api,
    /// Machine output on standard output.
    pub(crate) json: bool,
    /// No progress.
    pub(crate) quiet: bool,
}

impl Context {
    /// From the flags.
    pub(crate) fn new(server: &ServerArgs, output: &OutputArgs) -> Result<Self, CliError> {
        let api = Api::new(Target::resolve(server)?)?;
        Ok(Self { api, json: output.json, quiet: output.quiet })
    }

    /// A note for a person, on standard error.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet && !self.json {
            eprintln!("{text}");
        }
    }
}

/// What an id names.
pub(crate) enum Subject {
    /// A job and its JSON.
    Job(Box<Job>, Body),
    /// A batch and its JSON.
    Batch(Batch, Body),
}

/// Path of a job.
pub(crate) fn job_path(id: &str) -> String {
    format!("/v1/jobs/{}", encode(id))
}

/// Path of a batch.
pub(crate) fn batch_path(id: &str) -> String {
    format!("/v1/batches/{}", encode(id))
}

/// Reads a job, or else a batch, by its id.
pub(crate) async fn look_up(api: &Api, id: &str) -> Result<Subject, CliError> {
    match api.get(&job_path(id)).await {
        Ok(body) => Ok(Subject::Job(Box::new(body.read()?), body)),
        Err(error) if is_not_found(&error) => match api.get(&batch_path(id)).await {
            Ok(body) => Ok(Subject::Batch(body.read()?, body)),
            // The first answer speaks of a job, which is what most ids are.
            Err(second) => Err(if is_not_found(&second) { error } else { second }),
        },
        Err(error) => Err(error),
    }
}

/// Whether the server says that there is no such thing.
pub(crate) fn is_not_found(error: &CliError) -> bool {
    matches!(error, CliError::Refused(problem) if problem.status() == 404)
}
