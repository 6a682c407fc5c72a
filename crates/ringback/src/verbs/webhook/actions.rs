//! What the verb does with one webhook or with all of them.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Context, path};
use crate::client::Body;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, json_text, out, table, when};

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

pub(super) async fn create(ctx: &Context, object: Map<String, Value>) -> Result<Exit, CliError> {
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
pub(super) fn told_secret(ctx: &Context, body: &Body) -> Result<(), CliError> {
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

pub(super) async fn list(ctx: &Context) -> Result<Exit, CliError> {
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

pub(super) fn show(ctx: &Context, body: &Body) -> Result<Exit, CliError> {
    if ctx.json {
        out(body.text.trim())?;
    } else {
        out(&json_text::pretty(&body.text, Style::stdout()))?;
    }
    Ok(Exit::Ok)
}

pub(super) async fn change(ctx: &Context, id: &str, object: Value) -> Result<Exit, CliError> {
    let body = ctx.api.patch(&path(id), object.to_string()).await?;
    if ctx.json {
        out(body.text.trim())?;
        return Ok(Exit::Ok);
    }
    let now: Webhook = body.read()?;
    out(&format!("{}  {}", clean(&now.id), clean(&now.state)))?;
    Ok(Exit::Ok)
}

pub(super) async fn remove(ctx: &Context, ids: &[String]) -> Result<Exit, CliError> {
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
