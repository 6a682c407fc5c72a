//! `ringback deliveries`: what is owed to receivers, and every try.

use clap::Subcommand;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::Context;
use crate::cli::OutputArgs;
use crate::client::connection::ServerArgs;
use crate::client::encode;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, out, table, when};

const PAGE: usize = 100;

const EXAMPLES: &str = "\
Examples:
  ringback deliveries ls --state pending
  ringback deliveries ls --type 'job.*' --from 24h --webhook $HOOK
  ringback deliveries dead                                   what was given up
  ringback deliveries get msg_01981c4e5b0e7c3a9d552f6f0a6c1e11_3_0
  ringback deliveries dead --json | jq -r .id | xargs -n1 ringback deliveries redeliver

A delivery is sent again under the same webhook-id with the same bytes. Many at once: `ringback replay create`.";

/// Look at deliveries and their tries; send one again
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct DeliveriesArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List deliveries, newest first
    Ls {
        /// pending, delivered, dead, superseded, cancelled; several joined by commas
        #[arg(short, long, value_name = "STATE")]
        state: Option<String>,
        #[command(flatten)]
        filter: Filter,
    },
    /// List what was given up
    Dead {
        #[command(flatten)]
        filter: Filter,
    },
    /// Show one delivery with every try
    Get {
        /// Its webhook-id, msg_…
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Send deliveries again
    Redeliver {
        /// Their webhook-ids, msg_…
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
}

#[derive(Debug, clap::Args)]
struct Filter {
    /// Event types or families, joined by commas
    #[arg(short, long = "type", value_name = "TYPE")]
    types: Option<String>,
    /// Only about jobs of this endpoint
    #[arg(short, long, value_name = "NAME")]
    endpoint: Option<String>,
    /// Only to this registered webhook
    #[arg(short, long, value_name = "ID")]
    webhook: Option<String>,
    /// Only about this job or batch
    #[arg(short, long, value_name = "ID")]
    job: Option<String>,
    /// Owed since: a time ago such as 24h, or 2026-11-21T12:00:00Z
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Owed before
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// Most deliveries shown
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, conflicts_with = "all")]
    limit: usize,
    /// Show all of them, however many
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Deserialize)]
struct Page {
    deliveries: Vec<Box<RawValue>>,
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delivery {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    state: String,
    attempts: u32,
    #[serde(default)]
    replays: u32,
    created_at: String,
    next_attempt_at: Option<String>,
    url: Option<String>,
    webhook: Option<String>,
    job_id: Option<String>,
    last_status: Option<u16>,
    last_error: Option<String>,
    #[serde(default)]
    attempt_log: Vec<Try>,
}

#[derive(Debug, Deserialize)]
struct Try {
    n: u32,
    outcome: String,
    at: Option<String>,
    duration_ms: Option<u64>,
    dns_ms: Option<u64>,
    connect_ms: Option<u64>,
    first_byte_ms: Option<u64>,
    status: Option<u16>,
    error: Option<String>,
    address: Option<String>,
    response: Option<String>,
}

impl Try {
    /// `dns 2ms, connect 5ms, first byte 40ms`: the parts that were measured.
    fn parts(&self) -> String {
        let parts = [("dns", self.dns_ms), ("connect", self.connect_ms), ("first byte", self.first_byte_ms)];
        let measured = parts.into_iter().filter_map(|(name, ms)| Some((name, ms?)));
        measured.map(|(name, ms)| format!("{name} {}", when::duration_ms(ms))).collect::<Vec<_>>().join(", ")
    }
}

fn path(id: &str) -> String {
    format!("/v1/deliveries/{}", encode(id))
}

fn painted(style: Style, state: &str, text: &str) -> String {
    match state {
        "delivered" => style.green(text),
        "dead" => style.red(text),
        "pending" => style.cyan(text),
        _ => style.dim(text),
    }
}

/// Runs the verb.
pub(crate) async fn run(output: &OutputArgs, args: &DeliveriesArgs) -> Result<Exit, CliError> {
    match &args.action {
        Action::Ls { state, filter } => {
            list(&Context::new(&filter.server, output)?, state.as_deref(), filter).await
        }
        Action::Dead { filter } => list(&Context::new(&filter.server, output)?, Some("dead"), filter).await,
        Action::Get { id, server } => get(&Context::new(server, output)?, id).await,
        Action::Redeliver { ids, server } => redeliver(&Context::new(server, output)?, ids).await,
    }
}

fn query(state: Option<&str>, filter: &Filter, limit: usize, cursor: Option<&str>) -> String {
    let mut path = format!("/v1/deliveries?limit={limit}");
    for (name, value) in [
        ("state", state),
        ("types", filter.types.as_deref()),
        ("endpoint", filter.endpoint.as_deref()),
        ("webhook", filter.webhook.as_deref()),
        ("job", filter.job.as_deref()),
        ("from", filter.from.as_deref()),
        ("to", filter.to.as_deref()),
        ("cursor", cursor),
    ] {
        if let Some(value) = value {
            path.push_str(&format!("&{name}={}", encode(value)));
        }
    }
    path
}

async fn list(ctx: &Context, state: Option<&str>, filter: &Filter) -> Result<Exit, CliError> {
    let limit = if filter.all { usize::MAX } else { filter.limit };
    let (mut rows, mut shown, mut cursor) = (Vec::new(), 0_usize, None::<String>);
    let mut more = false;
    while shown < limit {
        let asked = query(state, filter, (limit - shown).min(PAGE), cursor.as_deref());
        let page: Page = ctx.api.get(&asked).await?.read()?;
        shown += page.deliveries.len();
        if ctx.json {
            page.deliveries.iter().try_for_each(|d| out(d.get()))?;
        } else {
            for raw in &page.deliveries {
                rows.push(row(raw)?);
            }
        }
        more = page.next_cursor.is_some();
        cursor = page.next_cursor;
        if cursor.is_none() || page.deliveries.is_empty() {
            break;
        }
    }
    if ctx.json {
        return Ok(Exit::Ok);
    }
    if rows.is_empty() {
        ctx.note("no deliveries match");
        return Ok(Exit::Ok);
    }
    let style = Style::stdout();
    table::print(&["ID", "TYPE", "STATE", "AGE", "TRIES", "NEXT", "TO", "LAST"], &rows, |column, text| {
        if column == 2 { painted(style, text.trim_end(), text) } else { text.to_owned() }
    })?;
    if more {
        ctx.note(&Style::stderr().dim(&format!("the newest {shown}; more with --limit N or --all")));
    }
    Ok(Exit::Ok)
}

fn row(raw: &RawValue) -> Result<Vec<String>, CliError> {
    let d: Delivery = serde_json::from_str(raw.get())
        .map_err(|error| CliError::NotOurs { url: "/v1/deliveries".to_owned(), reason: error.to_string() })?;
    let now = ringback_service_runtime::time::now_ms();
    let to = d.url.or(d.webhook).unwrap_or_default();
    let last = match (d.last_status, d.last_error) {
        (Some(status), _) => status.to_string(),
        (None, error) => error.unwrap_or_default(),
    };
    Ok(vec![
        clean(&d.id),
        clean(&d.kind),
        clean(&d.state),
        when::age(&d.created_at, now),
        d.attempts.to_string(),
        d.next_attempt_at.as_deref().map(when::clock).unwrap_or_default(),
        clean(&to),
        clean(&last).replace('\n', " "),
    ])
}

async fn get(ctx: &Context, id: &str) -> Result<Exit, CliError> {
    let body = ctx.api.get(&path(id)).await?;
    if ctx.json {
        out(body.text.trim())?;
        return Ok(Exit::Ok);
    }
    let d: Delivery = body.read()?;
    let style = Style::stdout();
    out(&format!("{}  {}  {}", clean(&d.id), clean(&d.kind), painted(style, &d.state, &d.state)))?;
    for (name, value) in
        [("job", d.job_id), ("to", d.url), ("webhook", d.webhook), ("next try", d.next_attempt_at)]
    {
        if let Some(value) = value {
            out(&format!("  {:<9} {}", style.dim(name), clean(&value)))?;
        }
    }
    if d.replays > 0 {
        out(&format!("  {:<9} {}", style.dim("replays"), d.replays))?;
    }
    for t in &d.attempt_log {
        let mut line = format!("  {:>3}  {}", t.n, t.at.as_deref().map(when::clock).unwrap_or_default());
        if let Some(ms) = t.duration_ms {
            line.push_str(&format!("  {}", when::duration_ms(ms)));
        }
        let parts = t.parts();
        if !parts.is_empty() {
            line.push_str(&format!(" ({parts})"));
        }
        match (t.status, &t.error) {
            (Some(status), _) => line.push_str(&format!("  {status}")),
            (None, Some(error)) => line.push_str(&format!("  {}", clean(error))),
            (None, None) => {}
        }
        if let Some(address) = &t.address {
            line.push_str(&format!("  {}", clean(address)));
        }
        let state = if t.outcome == "delivered" { "delivered" } else { "dead" };
        out(&painted(style, state, &line))?;
        if let Some(text) = t.response.as_deref().filter(|text| !text.is_empty()) {
            out(&style.dim(&format!("       {}", table::cut(&clean(text).replace('\n', " "), 200))))?;
        }
    }
    Ok(Exit::Ok)
}

async fn redeliver(ctx: &Context, ids: &[String]) -> Result<Exit, CliError> {
    let mut exit = Exit::Ok;
    for id in ids {
        match ctx.api.post(&format!("{}/redeliver", path(id)), String::new(), &[]).await {
            Ok(body) if ctx.json => out(body.text.trim())?,
            Ok(_) => out(&format!("{id}  queued again"))?,
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
