//! `ringback webhook`: places that hear of many jobs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Subcommand;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Context;
use crate::cli::OutputArgs;
use crate::client::connection::ServerArgs;
use crate::client::{Body, encode};
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, json_text, out, table, when};

const EXAMPLES: &str = "\
Examples:
  ringback webhook create https://hooks.example.com/ringback --event 'job.*' --event batch.completed
  ringback webhook create https://hooks.example.com/tts --endpoint tts --rate 20 --retry 5s,1m,10m
  ringback webhook create --pull --event '*'                 nothing is sent; read it with `ringback listen`
  ringback webhook test wh_01981c4e5b0e7c3a9d552f6f0a6c1e11
  ringback webhook rotate $HOOK --overlap 48h                old and new secret sign for two days
  ringback webhook event-types                               what can be listened to, with examples

The secret is shown once, when it is made. Receivers check it with any Standard Webhooks library, or with
`ringback verify`.";

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

fn overlap(text: &str) -> Result<u64, String> {
    if text.trim() == "0" { Ok(0) } else { when::parse_span_ms(text) }
}

/// What a webhook listens to and how it is sent to.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Settings {
    /// Event type, family such as 'job.*', or '*'; repeatable [default on create: '*']
    #[arg(short, long = "event", value_name = "TYPE")]
    events: Vec<String>,
    /// Only events of this endpoint; repeatable
    #[arg(long = "endpoint", value_name = "NAME")]
    endpoints: Vec<String>,
    /// Only events about jobs with this metadata; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// A name for people
    #[arg(long)]
    label: Option<String>,
    /// Body: standard, runflow or runpod
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// A further header, 'Name: value'; repeatable
    #[arg(long = "header", value_name = "HEADER", value_parser = header)]
    headers: Vec<(String, String)>,
    /// default, runpod-strict, or own waits such as 5s,1m,10m
    #[arg(long, value_name = "RETRY", value_parser = retry)]
    retry: Option<Value>,
    /// Most POSTs per second
    #[arg(long, value_name = "N")]
    rate: Option<u64>,
    /// Longest POST, for example 10s
    #[arg(long, value_name = "SPAN", value_parser = when::parse_span_ms)]
    deadline: Option<u64>,
    /// An event waits until the earlier ones of its job have ended
    #[arg(long)]
    strict_order: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("write 'Name: value'")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn retry(text: &str) -> Result<Value, String> {
    if matches!(text, "default" | "runpod-strict") {
        return Ok(json!({"profile": text}));
    }
    let waits = text.split(',').map(when::parse_span_ms).collect::<Result<Vec<_>, _>>();
    waits
        .map(|waits| json!({"waits_ms": waits}))
        .map_err(|e| format!("{e}; or write default or runpod-strict"))
}

impl Settings {
    fn object(&self) -> Map<String, Value> {
        let mut object = Map::new();
        let mut put = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
        if !self.events.is_empty() {
            put("events", self.events.clone().into());
        }
        if !self.endpoints.is_empty() {
            put("endpoints", self.endpoints.clone().into());
        }
        if !self.metadata.is_empty() {
            let all: Map<String, Value> =
                self.metadata.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
            put("metadata", all.into());
        }
        if !self.headers.is_empty() {
            let all: Map<String, Value> =
                self.headers.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
            put("headers", all.into());
        }
        for (name, value) in [("label", &self.label), ("format", &self.format)] {
            if let Some(text) = value {
                put(name, text.clone().into());
            }
        }
        if let Some(retry) = &self.retry {
            put("retry", retry.clone());
        }
        for (name, value) in [("rate_per_second", self.rate), ("deadline_ms", self.deadline)] {
            if let Some(n) = value {
                put(name, n.into());
            }
        }
        if self.strict_order {
            put("strict_order", true.into());
        }
        object
    }
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

/// A webhook as the server shows it.
#[derive(Debug, Deserialize)]
struct Webhook {
    id: String,
    #[serde(default)]
    label: String,
    url: Option<String>,
    state: String,
    events: Vec<String>,
    #[serde(default)]
    health: Health,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Health {
    state: String,
    failing_since: Option<String>,
    last_success_at: Option<String>,
    disabled_reason: Option<String>,
}

#[derive(Deserialize)]
struct Webhooks {
    webhooks: Vec<Webhook>,
}

#[derive(Deserialize)]
struct WithSecret {
    id: String,
    #[serde(default)]
    secret: String,
    #[serde(default)]
    secret_note: Option<String>,
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

async fn create(ctx: &Context, object: Map<String, Value>) -> Result<Exit, CliError> {
    let body = ctx.api.post("/v1/webhooks", Value::Object(object).to_string(), &[]).await?;
    told_secret(ctx, &body)?;
    let made: WithSecret = body.read()?;
    ctx.note(&format!(
        "keep the secret: it is not shown again; try it with `ringback webhook test {}`",
        made.id
    ));
    Ok(Exit::Ok)
}

/// The id and the secret, which the server shows once.
fn told_secret(ctx: &Context, body: &Body) -> Result<(), CliError> {
    if ctx.json {
        out(body.text.trim())?;
        return Ok(());
    }
    let made: WithSecret = body.read()?;
    out(&format!("id      {}", clean(&made.id)))?;
    out(&format!("secret  {}", clean(&made.secret)))?;
    if let Some(note) = &made.secret_note {
        ctx.note(&clean(note));
    }
    Ok(())
}

async fn list(ctx: &Context) -> Result<Exit, CliError> {
    let body = ctx.api.get("/v1/webhooks").await?;
    if ctx.json {
        out(body.text.trim())?;
        return Ok(Exit::Ok);
    }
    let all: Webhooks = body.read()?;
    if all.webhooks.is_empty() {
        ctx.note("no webhooks; register one with `ringback webhook create https://… --event 'job.*'`");
        return Ok(Exit::Ok);
    }
    let now = ringback_service_runtime::time::now_ms();
    let rows: Vec<Vec<String>> = all
        .webhooks
        .into_iter()
        .map(|w| {
            let since = w.health.failing_since.as_deref().map(|at| format!("failing {}", when::age(at, now)));
            let last = w.health.last_success_at.as_deref().map(|at| format!("{} ago", when::age(at, now)));
            let health = w.health.disabled_reason.clone().or(since).or(last).unwrap_or(w.health.state);
            vec![
                clean(&w.id),
                clean(&w.state),
                clean(&w.events.join(" ")),
                clean(&w.label),
                clean(&health),
                clean(w.url.as_deref().unwrap_or("(read from the feed)")),
            ]
        })
        .collect();
    let style = Style::stdout();
    table::print(&["ID", "STATE", "EVENTS", "LABEL", "HEALTH", "URL"], &rows, |column, text| {
        match (column, text.trim_end()) {
            (1, "active") => style.green(text),
            (1, "paused") => style.yellow(text),
            (1, _) => style.red(text),
            _ => text.to_owned(),
        }
    })?;
    Ok(Exit::Ok)
}

fn show(ctx: &Context, body: &Body) -> Result<Exit, CliError> {
    if ctx.json {
        out(body.text.trim())?;
    } else {
        out(&json_text::pretty(&body.text, Style::stdout()))?;
    }
    Ok(Exit::Ok)
}

async fn change(ctx: &Context, id: &str, object: Value) -> Result<Exit, CliError> {
    let body = ctx.api.patch(&path(id), object.to_string()).await?;
    if ctx.json {
        out(body.text.trim())?;
        return Ok(Exit::Ok);
    }
    let now: Webhook = body.read()?;
    out(&format!("{}  {}", clean(&now.id), clean(&now.state)))?;
    Ok(Exit::Ok)
}

async fn remove(ctx: &Context, ids: &[String]) -> Result<Exit, CliError> {
    let mut exit = Exit::Ok;
    for id in ids {
        match ctx.api.delete(&path(id)).await {
            Ok(_) if ctx.json => out(&json!({"id": id, "deleted": true}).to_string())?,
            Ok(_) => out(&format!("{id}  deleted"))?,
            Err(error) => {
                error.report(ctx.json);
                if exit == Exit::Ok {
                    exit = error.exit();
                }
            }
        }
    }
    Ok(exit)
}

#[derive(Deserialize)]
struct Sent {
    delivery_id: String,
}

#[derive(Deserialize)]
struct Looked {
    state: String,
    attempts: u32,
    last_status: Option<u16>,
    last_error: Option<String>,
}

async fn test(ctx: &Context, id: &str, timeout: Duration) -> Result<Exit, CliError> {
    let sent: Sent = ctx.api.post(&format!("{}/test", path(id)), String::new(), &[]).await?.read()?;
    let began = Instant::now();
    loop {
        let body = ctx.api.get(&format!("/v1/deliveries/{}", encode(&sent.delivery_id))).await?;
        let now: Looked = body.read()?;
        let waiting = now.state == "pending" && now.attempts == 0;
        if !waiting || began.elapsed() > timeout {
            if ctx.json {
                out(body.text.trim())?;
            } else {
                let answer = match (now.last_status, &now.last_error) {
                    (Some(status), _) => format!("the receiver answered {status}"),
                    (None, Some(error)) => clean(error),
                    (None, None) => "no answer yet".to_owned(),
                };
                out(&format!("{}  {}  {answer}", sent.delivery_id, now.state))?;
            }
            return Ok(match (now.state.as_str(), waiting) {
                ("delivered", _) => Exit::Ok,
                (_, true) => Exit::WaitTimedOut,
                _ => Exit::Error,
            });
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[derive(Deserialize)]
struct Types {
    event_types: Vec<Value>,
}

async fn event_types(ctx: &Context, only: Option<&str>) -> Result<Exit, CliError> {
    let body = ctx.api.get("/v1/webhooks/event-types").await?;
    if ctx.json && only.is_none() {
        out(body.text.trim())?;
        return Ok(Exit::Ok);
    }
    let all: Types = body.read()?;
    let name_of = |t: &Value| t["type"].as_str().unwrap_or_default().to_owned();
    if let Some(name) = only {
        let found = all.event_types.iter().find(|t| name_of(t) == name).ok_or_else(|| {
            CliError::usage(format!("no event is called {name}"), "`ringback webhook event-types` lists all")
        })?;
        if ctx.json {
            out(&found.to_string())?;
        } else {
            out(&json_text::pretty(&found["example"].to_string(), Style::stdout()))?;
        }
        return Ok(Exit::Ok);
    }
    let rows: Vec<Vec<String>> = all
        .event_types
        .iter()
        .map(|t| vec![clean(&name_of(t)), clean(t["description"].as_str().unwrap_or_default())])
        .collect();
    table::print(&["TYPE", "WHEN"], &rows, |_, text| text.to_owned())?;
    ctx.note("an example: `ringback webhook event-types job.completed`");
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_is_sent() {
        assert!(Settings::default().object().is_empty());
        let settings = Settings {
            retry: Some(retry("5s,1m").unwrap()),
            metadata: vec![pair("team=a=b").unwrap()],
            headers: vec![header("X-A: b:c").unwrap()],
            rate: Some(3),
            ..Settings::default()
        };
        assert_eq!(
            Value::Object(settings.object()),
            json!({"retry": {"waits_ms": [5000, 60000]}, "metadata": {"team": "a=b"}, "headers": {"X-A": "b:c"},
                   "rate_per_second": 3})
        );
        assert!(retry("soon").unwrap_err().contains("runpod-strict"));
        assert_eq!(overlap("0"), Ok(0));
    }
}
