//! `ringback listen`: a receiver on this machine gets the events of a server anywhere, without a tunnel.
//!
//! It makes a webhook that is only read from the feed and that ends by itself should this program die, and passes
//! each event on with the same bytes, ids and signatures. The address is the user's own order, so private ones and
//! http are open for exactly this address. With `--state` the webhook stays, and the next start goes on behind the last
//! event that was passed on.

mod forward;
mod state;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use forward::{Event, Forward};
use futures::FutureExt as _;
use serde::Deserialize;
use serde_json::{Value, json};
use state::{Kept, StateFile};

use super::Context;
use super::webhook::path;
use crate::client::connection::ServerArgs;
use crate::client::encode;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, out, when};

const EXAMPLES: &str = "\
Examples:
  ringback listen --forward-to http://localhost:3000/hook
  ringback listen --forward-to http://localhost:3000/hook --event 'job.*' --endpoint tts
  ringback listen --json | jq -r .type                           only look, forward nothing
  ringback listen --forward-to http://localhost:3000/hook --secret-file webhook.secret
  ringback listen --forward-to http://localhost:3000/hook --state listen.json

Needs no tunnel: the events are read from the server's feed and posted from here. Nothing is retried: a failure is
shown. The secret that signs is printed at the start; give it to your receiver, or bring its own with --secret-file.
Ctrl-C deletes the webhook; with --state it stays, and the next start with that file brings what came meanwhile.";

/// A webhook that nobody renews ends after this long.
const LIFE: Duration = Duration::from_secs(1800);
/// One whose place is kept waits so long for the next start.
const KEPT_LIFE: Duration = Duration::from_secs(7 * 86_400);
const RENEW: Duration = Duration::from_secs(600);
/// How long the server holds a question without an answer.
const HOLD_S: u64 = 20;
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Pass events on to a receiver on this machine
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct ListenArgs {
    /// Where each event is posted to [default: nowhere, only shown]
    #[arg(short, long, value_name = "URL")]
    forward_to: Option<String>,
    /// Event type, family such as 'job.*', or '*'; repeatable [default: '*']
    #[arg(short, long = "event", value_name = "TYPE")]
    events: Vec<String>,
    /// Only events of this endpoint; repeatable
    #[arg(long = "endpoint", value_name = "NAME")]
    endpoints: Vec<String>,
    /// Body: standard, runflow or runpod
    #[arg(long, value_name = "FORMAT", default_value = "standard")]
    format: String,
    /// File with the secret of your receiver, `-` for standard input [default: one is made and shown]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Longest wait for your receiver's answer
    #[arg(long, value_name = "SPAN", default_value = "30s", value_parser = when::parse_span_ms)]
    deadline: u64,
    /// Keep the place in FILE: events wait for the next start, up to 7 days
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// End after so many events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

#[derive(Deserialize)]
struct Made {
    id: String,
    secret: String,
}

#[derive(Deserialize)]
struct Page {
    events: Vec<Event>,
    cursor: String,
}

/// A webhook on the server, and how far it was read.
struct Listener<'a> {
    ctx: &'a Context,
    id: String,
    cursor: String,
    life: Duration,
    state: Option<StateFile>,
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &ListenArgs) -> Result<Exit, CliError> {
    let deadline = Duration::from_millis(args.deadline);
    let forward = args.forward_to.as_deref().map(|url| Forward::new(url, deadline)).transpose()?;
    let mut listener = Listener::begin(ctx, args).await?;
    let whither =
        args.forward_to.as_deref().map_or("shown here".to_owned(), |url| format!("→ {}", clean(url)));
    ctx.note(&format!("listening  {whither}  (Ctrl-C ends)"));
    let ended = listener.follow(args, forward.as_ref()).await;
    listener.end().await;
    ended
}

impl<'a> Listener<'a> {
    /// Goes on with the webhook of the state file, or makes one.
    async fn begin(ctx: &'a Context, args: &ListenArgs) -> Result<Self, CliError> {
        let mut state = args.state.as_deref().map(|path| StateFile::open(path, ctx.api.url())).transpose()?;
        let life = if state.is_some() { KEPT_LIFE } else { LIFE };
        let mut object = json!({
            "format": args.format,
            "events": if args.events.is_empty() { json!(["*"]) } else { json!(args.events) },
            "endpoints": args.endpoints,
            "expires_in_seconds": life.as_secs(),
        });
        if let Some(kept) = state.as_ref().and_then(StateFile::kept).cloned() {
            if args.secret_file.is_some() {
                return Err(CliError::usage(
                    "--secret-file: the webhook of --state has its secret already",
                    "change it with `ringback webhook rotate`, or remove the state file to begin anew",
                ));
            }
            match ctx.api.patch(&path(&kept.webhook), object.to_string()).await {
                Ok(_) => {
                    ctx.note(&format!(
                        "going on with {}; its secret is the one shown at its first start",
                        kept.webhook
                    ));
                    return Ok(Self { ctx, id: kept.webhook, cursor: kept.cursor, life, state });
                }
                Err(error) if super::is_not_found(&error) => {
                    ctx.note(&format!("the webhook {} is gone; beginning anew", kept.webhook));
                }
                Err(error) => return Err(error),
            }
        }
        object["url"] = Value::Null;
        object["label"] = "ringback listen".into();
        if let Some(secret) = super::webhook::secret(args.secret_file.as_ref())? {
            object["secret"] = secret.into();
        }
        let made: Made = ctx.api.post("/v1/webhooks", object.to_string(), &[]).await?.read()?;
        if args.secret_file.is_none() {
            ctx.note(&format!("signing secret  {}", clean(&made.secret)));
        }
        if let Some(state) = &mut state {
            let (url, webhook) = (ctx.api.url().to_owned(), made.id.clone());
            if let Err(error) = state.keep(Kept { url, webhook, cursor: String::new() }) {
                // Nobody would ever read it.
                let _ = ctx.api.delete(&path(&made.id)).await;
                return Err(error);
            }
        }
        Ok(Self { ctx, id: made.id, cursor: String::new(), life, state })
    }

    /// Remembers an event that was passed on, or a page without any.
    fn move_to(&mut self, cursor: &str) -> Result<(), CliError> {
        cursor.clone_into(&mut self.cursor);
        if let Some(state) = &mut self.state {
            let (url, webhook) = (self.ctx.api.url().to_owned(), self.id.clone());
            state.keep(Kept { url, webhook, cursor: cursor.to_owned() })?;
        }
        Ok(())
    }

    async fn end(self) {
        let Self { ctx, id, life, state, .. } = self;
        if state.is_some() {
            ctx.note(&format!("events wait for the next start; end it with `ringback webhook rm {id}`"));
            return;
        }
        // Should this fail, the webhook ends by itself.
        if let Err(error) = ctx.api.delete(&path(&id)).await {
            let left = when::duration_ms(u64::try_from(life.as_millis()).unwrap_or(u64::MAX));
            ctx.note(&format!("the webhook {id} ends by itself in {left}: {error}"));
        }
    }

    async fn follow(&mut self, args: &ListenArgs, forward: Option<&Forward>) -> Result<Exit, CliError> {
        let ctx = self.ctx;
        let stop = stopped().shared();
        let mut told = 0_u64;
        let mut renewed = Instant::now();
        let mut pause = Duration::from_secs(1);
        loop {
            if renewed.elapsed() > RENEW {
                let renewal = json!({"expires_in_seconds": self.life.as_secs()}).to_string();
                match ctx.api.patch(&path(&self.id), renewal).await {
                    Ok(_) => renewed = Instant::now(),
                    Err(error @ CliError::Refused(_)) => return Err(error),
                    // The server is away: it is asked again with the next page.
                    Err(_) => {}
                }
            }
            let asked = format!(
                "/v1/events?webhook={}&limit=50&wait_seconds={HOLD_S}&after={}",
                encode(&self.id),
                encode(&self.cursor)
            );
            let page = tokio::select! {
                page = ctx.api.get(&asked) => page.and_then(|body| body.read::<Page>()),
                () = stop.clone() => return Ok(Exit::Ok),
            };
            let page = match page {
                Ok(page) => page,
                Err(error) if error.exit() == Exit::Unreachable => {
                    ctx.note(&format!("{error}; trying again in {} s", pause.as_secs()));
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = stop.clone() => return Ok(Exit::Ok),
                    }
                    pause = (pause * 2).min(PAUSE_MAX);
                    continue;
                }
                Err(error) => return Err(error),
            };
            pause = Duration::from_secs(1);
            for event in &page.events {
                tokio::select! {
                    done = one(ctx, event, forward) => done?,
                    () = stop.clone() => return Ok(Exit::Ok),
                }
                self.move_to(&event.cursor)?;
                told += 1;
                if args.count.is_some_and(|count| told >= count) {
                    return Ok(Exit::Ok);
                }
            }
            self.move_to(&page.cursor)?;
        }
    }
}

/// Ctrl-C, or the wish of whoever started this.
async fn stopped() {
    let term = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = term => {}
    }
}

/// Passes one event on and says what came of it.
async fn one(ctx: &Context, event: &Event, forward: Option<&Forward>) -> Result<(), CliError> {
    let sent = match forward {
        Some(forward) => Some(forward.send(event).await?),
        None => None,
    };
    if ctx.json {
        let (status, error, ms) = match &sent {
            Some((Ok(status), took)) => (Some(*status), None, Some(took.as_millis())),
            Some((Err(error), took)) => (None, Some(error.as_str()), Some(took.as_millis())),
            None => (None, None, None),
        };
        let body: Value = serde_json::from_str(&event.body).unwrap_or_else(|_| event.body.clone().into());
        let line = json!({
            "id": event.id, "type": event.kind, "owner_id": event.owner_id, "status": status, "error": error,
            "duration_ms": ms.and_then(|ms| u64::try_from(ms).ok()), "body": body,
        });
        return Ok(out(&line.to_string())?);
    }
    let style = Style::stdout();
    let now = when::clock_ms(ringback_service_runtime::time::now_ms());
    let head = format!("{}  {:<22} {}", style.dim(&now), clean(&event.kind), clean(&event.owner_id));
    let tail = match &sent {
        None => String::new(),
        Some((answer, took)) => {
            let took = style.dim(&when::duration_ms(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)));
            let answer = match answer {
                Ok(status @ 200..=299) => style.green(&status.to_string()),
                Ok(status) => style.red(&status.to_string()),
                Err(error) => style.red(&clean(error)),
            };
            format!("  {answer}  {took}")
        }
    };
    Ok(out(&format!("{head}{tail}"))?)
}
