//! `ringback replay`: send a window of deliveries again.

use std::time::Duration;

use clap::Subcommand;
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};

use super::Context;
use crate::cli::OutputArgs;
use crate::client::connection::ServerArgs;
use crate::client::encode;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::progress::Progress;
use crate::ui::{clean, out, table, when};

const EXAMPLES: &str = "\
Examples:
  ringback replay create --from 24h --webhook $HOOK --dry-run     how many would it be?
  ringback replay create --from 24h --webhook $HOOK --rate 100
  ringback replay create --state dead                             redrive everything that was given up
  ringback replay ls
  ringback replay cancel rp_01981c4e5b0e7c3a9d552f6f0a6c1e11

Each delivery is sent again under its webhook-id with its bytes, so that receivers drop what they have seen.
Ctrl-C stops watching, not the replay.";

/// Send many deliveries again, by window and filter
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct ReplayArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a replay and watch it
    Create {
        /// Owed since: a time ago such as 24h, or 2026-11-21T12:00:00Z
        #[arg(long, value_name = "TIME")]
        from: Option<String>,
        /// Owed before
        #[arg(long, value_name = "TIME")]
        to: Option<String>,
        /// Event type or family; repeatable
        #[arg(short, long = "type", value_name = "TYPE")]
        types: Vec<String>,
        /// Only about jobs of this endpoint
        #[arg(short, long, value_name = "NAME")]
        endpoint: Option<String>,
        /// Only to this registered webhook
        #[arg(short, long, value_name = "ID")]
        webhook: Option<String>,
        /// delivered, dead, superseded, cancelled; repeatable [default: delivered and dead]
        #[arg(short, long = "state", value_name = "STATE")]
        states: Vec<String>,
        /// Deliveries per second
        #[arg(long, value_name = "N")]
        rate: Option<u32>,
        /// Only count
        #[arg(long)]
        dry_run: bool,
        /// Do not wait for its end
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// List replays, newest first
    Ls {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Show one replay; with --watch until it has ended
    Get {
        /// Its id, rp_…
        id: String,
        /// Follow it
        #[arg(short, long)]
        watch: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Stop a replay; what was queued stays queued
    Cancel {
        /// Its id, rp_…
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

#[derive(Debug, Deserialize)]
struct Replay {
    id: String,
    state: String,
    matched: u64,
    queued: u64,
    created_at: String,
}

#[derive(Deserialize)]
struct Counted {
    matched: u64,
}

#[derive(Deserialize)]
struct Page {
    replays: Vec<Box<RawValue>>,
}

fn path(id: &str) -> String {
    format!("/v1/replays/{}", encode(id))
}

/// Runs the verb.
pub(crate) async fn run(output: &OutputArgs, args: &ReplayArgs) -> Result<Exit, CliError> {
    match &args.action {
        Action::Create { from, to, types, endpoint, webhook, states, rate, dry_run, no_wait, server } => {
            let ctx = Context::new(server, output)?;
            let mut object = Map::new();
            for (name, value) in [("from", from), ("to", to), ("endpoint", endpoint), ("webhook", webhook)] {
                if let Some(text) = value {
                    object.insert(name.to_owned(), text.clone().into());
                }
            }
            for (name, values) in [("types", types), ("states", states)] {
                if !values.is_empty() {
                    object.insert(name.to_owned(), json!(values));
                }
            }
            if let Some(rate) = rate {
                object.insert("rate_per_second".to_owned(), (*rate).into());
            }
            object.insert("dry_run".to_owned(), (*dry_run).into());
            let body = ctx.api.post("/v1/replays", Value::Object(object).to_string(), &[]).await?;
            if *dry_run {
                if ctx.json {
                    out(body.text.trim())?;
                } else {
                    out(&format!("{} deliveries match", body.read::<Counted>()?.matched))?;
                }
                return Ok(Exit::Ok);
            }
            if *no_wait || ctx.json {
                return told(&ctx, &body);
            }
            let made: Replay = body.read()?;
            watch(&ctx, &made.id).await
        }
        Action::Ls { server } => list(&Context::new(server, output)?).await,
        Action::Get { id, watch: follow, server } => {
            let ctx = Context::new(server, output)?;
            if *follow && !ctx.json {
                return watch(&ctx, id).await;
            }
            let body = ctx.api.get(&path(id)).await?;
            told(&ctx, &body)
        }
        Action::Cancel { id, server } => {
            let ctx = Context::new(server, output)?;
            let body = ctx.api.delete(&path(id)).await?;
            told(&ctx, &body)
        }
    }
}

fn told(ctx: &Context, body: &crate::client::Body) -> Result<Exit, CliError> {
    if ctx.json {
        out(body.text.trim())?;
        return Ok(Exit::Ok);
    }
    let replay: Replay = body.read()?;
    out(&line(&replay))?;
    Ok(Exit::Ok)
}

fn line(r: &Replay) -> String {
    format!("{}  {}  {} of {} queued", clean(&r.id), clean(&r.state), r.queued, r.matched)
}

async fn watch(ctx: &Context, id: &str) -> Result<Exit, CliError> {
    let bar = Progress::bar(0, ctx.quiet);
    loop {
        let now: Replay = ctx.api.get(&path(id)).await?.read()?;
        bar.length(now.matched);
        bar.at(now.queued);
        bar.text(now.state.clone());
        if now.state != "running" {
            bar.clear();
            out(&line(&now))?;
            return Ok(if now.state == "done" { Exit::Ok } else { Exit::JobCancelled });
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                bar.clear();
                ctx.note(&format!("it goes on; look again with `ringback replay get {id} --watch`, stop it with \
                                   `ringback replay cancel {id}`"));
                return Ok(Exit::Interrupted);
            }
        }
    }
}

async fn list(ctx: &Context) -> Result<Exit, CliError> {
    let body = ctx.api.get("/v1/replays?limit=100").await?;
    let page: Page = body.read()?;
    if ctx.json {
        page.replays.iter().try_for_each(|r| out(r.get()))?;
        return Ok(Exit::Ok);
    }
    if page.replays.is_empty() {
        ctx.note("no replays; make one with `ringback replay create --from 24h --dry-run`");
        return Ok(Exit::Ok);
    }
    let now = ringback_service_runtime::time::now_ms();
    let mut rows = Vec::with_capacity(page.replays.len());
    for raw in &page.replays {
        let r: Replay = serde_json::from_str(raw.get()).map_err(|error| CliError::NotOurs {
            url: "/v1/replays".to_owned(),
            reason: error.to_string(),
        })?;
        rows.push(vec![
            clean(&r.id),
            clean(&r.state),
            when::age(&r.created_at, now),
            r.matched.to_string(),
            r.queued.to_string(),
        ]);
    }
    table::print(&["ID", "STATE", "AGE", "MATCHED", "QUEUED"], &rows, |_, text| text.to_owned())?;
    Ok(Exit::Ok)
}
