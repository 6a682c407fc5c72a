//! `ringback webhook`: places that hear of many jobs.

mod actions;
mod settings;
mod trial;

use std::path::PathBuf;
use std::time::Duration;

use actions::{change, create, list, remove, show, told_secret};
use clap::Subcommand;
use serde_json::{Map, Value, json};
use settings::{Settings, overlap};
use trial::{event_types, test};

use super::Context;
use crate::cli::OutputArgs;
use crate::client::connection::ServerArgs;
use crate::client::encode;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::when;

const EXAMPLES: &str = "\
Examples:
  ringback webhook create https://hooks.example.com/ringback --event 'job.*' --event batch.completed
  ringback webhook create https://hooks.example.com/tts --endpoint tts --rate 20 --retry 5s,1m,10m
  ringback webhook create --pull --event '*'      nothing is sent; read it: GET /v1/events?webhook=ID
  ringback webhook test wh_01981c4e5b0e7c3a9d552f6f0a6c1e11
  ringback webhook rotate $HOOK --overlap 48h     old and new secret sign for two days
  ringback webhook event-types                    what can be listened to, with examples

The secret is shown once, when it is made. Receivers check it with any Standard Webhooks library, or
with `ringback verify`.";

/// Register, test, pause, rotate webhooks
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct WebhookArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Register a webhook; prints its id and its secret
    Create {
        /// Where the events go
        #[arg(value_name = "URL", required_unless_present = "pull")]
        target: Option<String>,
        /// Send nothing: the events are only read from the feed
        #[arg(long, conflicts_with = "target")]
        pull: bool,
        /// File with the secret, `-` for standard input [default: one is made]
        #[arg(long, value_name = "FILE")]
        secret_file: Option<PathBuf>,
        /// It ends by itself after this long, for example 2h
        #[arg(long, value_name = "SPAN", value_parser = when::parse_span_ms)]
        expires_in: Option<u64>,
        #[command(flatten)]
        settings: Settings,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// List the webhooks with their health
    Ls {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Show one webhook
    Get {
        /// Its id
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Change a webhook: only what is named changes
    Update {
        /// Its id
        id: String,
        /// Where the events go
        #[arg(long = "to", value_name = "URL")]
        target: Option<String>,
        #[command(flatten)]
        settings: Settings,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Delete webhooks; what they are still owed is cancelled
    Rm {
        /// Their ids
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Send webhook.test to one webhook and wait for the receiver's answer
    Test {
        /// Its id
        id: String,
        /// How long to wait for the answer
        #[arg(long, value_name = "SPAN", default_value = "20s", value_parser = when::parse_span_ms)]
        timeout: u64,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Add a new secret; the old ones sign on for a while
    Rotate {
        /// Its id
        id: String,
        /// How long the old secrets still sign; 0 = they stop at once
        #[arg(long, value_name = "SPAN", default_value = "24h", value_parser = overlap)]
        overlap: u64,
        /// File with the new secret, `-` for standard input [default: one is made]
        #[arg(long, value_name = "FILE")]
        secret_file: Option<PathBuf>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Hold its deliveries
    Pause {
        /// Its id
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Send what was held, and go on; also after it was disabled by its failures
    Resume {
        /// Its id
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// What can be listened to
    EventTypes {
        /// Show the example body of this type
        #[arg(value_name = "TYPE")]
        only: Option<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// Path of a webhook.
pub(crate) fn path(id: &str) -> String {
    format!("/v1/webhooks/{}", encode(id))
}

/// A secret from a file: secrets stand in no argument list.
pub(crate) fn secret(file: Option<&PathBuf>) -> Result<Option<String>, CliError> {
    let Some(path) = file else { return Ok(None) };
    let text = if path.as_os_str() == "-" {
        std::io::read_to_string(std::io::stdin())?
    } else {
        std::fs::read_to_string(path).map_err(|source| CliError::File {
            action: "read",
            path: path.clone(),
            source,
        })?
    };
    Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
}

/// Runs the verb.
pub(crate) async fn run(output: &OutputArgs, args: &WebhookArgs) -> Result<Exit, CliError> {
    let ctx = |server: &ServerArgs| Context::new(server, output);
    match &args.action {
        Action::Create { target, pull, secret_file, expires_in, settings, server } => {
            let mut object = settings.object();
            object.insert("url".to_owned(), if *pull { Value::Null } else { target.clone().into() });
            if settings.events.is_empty() {
                object.insert("events".to_owned(), json!(["*"]));
            }
            if let Some(text) = secret(secret_file.as_ref())? {
                object.insert("secret".to_owned(), text.into());
            }
            if let Some(ms) = expires_in {
                object.insert("expires_in_seconds".to_owned(), ms.div_ceil(1000).into());
            }
            create(&ctx(server)?, object).await
        }
        Action::Ls { server } => list(&ctx(server)?).await,
        Action::Get { id, server } => show(&ctx(server)?, &ctx(server)?.api.get(&path(id)).await?),
        Action::Update { id, target, settings, server } => {
            let mut object = settings.object();
            if let Some(url) = target {
                object.insert("url".to_owned(), url.clone().into());
            }
            if object.is_empty() {
                return Err(CliError::usage("nothing to change", "name what changes, for example --rate 20"));
            }
            change(&ctx(server)?, id, object.into()).await
        }
        Action::Rm { ids, server } => remove(&ctx(server)?, ids).await,
        Action::Test { id, timeout, server } => {
            test(&ctx(server)?, id, Duration::from_millis(*timeout)).await
        }
        Action::Rotate { id, overlap, secret_file, server } => {
            let ctx = ctx(server)?;
            let mut object = Map::new();
            object.insert("expire_old_after_hours".to_owned(), (*overlap as f64 / 3_600_000.0).into());
            if let Some(text) = secret(secret_file.as_ref())? {
                object.insert("secret".to_owned(), text.into());
            }
            let body = ctx
                .api
                .post(&format!("{}/secrets", path(id)), Value::Object(object).to_string(), &[])
                .await?;
            told_secret(&ctx, &body)?;
            ctx.note(
                "the old secrets sign on for the time of the overlap; give receivers the new one meanwhile",
            );
            Ok(Exit::Ok)
        }
        Action::Pause { id, server } => change(&ctx(server)?, id, json!({"paused": true})).await,
        Action::Resume { id, server } => {
            let ctx = ctx(server)?;
            ctx.api.post(&format!("{}/enable", path(id)), String::new(), &[]).await?;
            change(&ctx, id, json!({"paused": false})).await
        }
        Action::EventTypes { only, server } => event_types(&ctx(server)?, only.as_deref()).await,
    }
}
