//! Trying a webhook out: a test event, and what events look like.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::{Context, path};
use crate::client::encode;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, json_text, out, table};

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

pub(super) async fn test(ctx: &Context, id: &str, timeout: Duration) -> Result<Exit, CliError> {
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

pub(super) async fn event_types(ctx: &Context, only: Option<&str>) -> Result<Exit, CliError> {
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
