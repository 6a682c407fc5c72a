//! `ringback listen`: a receiver on this machine gets the events of a server anywhere, without a tunnel.
//!
//! It makes a webhook that is only read from the feed and that ends by itself should this program die, and passes
//! each event on with the same bytes, ids and signatures. The address is the user's own order, so private ones and
//! http are open for exactly this address.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt as _;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use ringback_domain::webhook::address::AddressPolicy;
use ringback_domain::webhook::url::UrlPolicy;
use ringback_egress::{CheckedUrl, Client, Limits, Post};
use serde::Deserialize;
use serde_json::{Value, json};

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

Needs no tunnel: the events are read from the server's feed and posted from here. Nothing is retried: a failure is
shown. The secret that signs is printed at the start; give it to your receiver, or bring its own with --secret-file.
Ctrl-C deletes the webhook.";

/// A webhook that nobody renews ends after this long.
const LIFE: Duration = Duration::from_secs(1800);
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

#[derive(Debug, Deserialize)]
struct Event {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    cursor: String,
    owner_id: String,
    headers: std::collections::BTreeMap<String, String>,
    body: String,
    body_encoding: String,
}

impl Event {
    fn bytes(&self) -> Result<Bytes, CliError> {
        use base64::Engine as _;
        if self.body_encoding != "base64" {
            return Ok(Bytes::copy_from_slice(self.body.as_bytes()));
        }
        base64::engine::general_purpose::STANDARD
            .decode(&self.body)
            .map(Bytes::from)
            .map_err(|error| CliError::NotOurs { url: "/v1/events".to_owned(), reason: error.to_string() })
    }

    /// The headers as the server signed them. One that cannot be a header is not ours.
    fn header_map(&self) -> HeaderMap {
        self.headers
            .iter()
            .filter_map(|(name, value)| {
                Some((HeaderName::try_from(name.as_str()).ok()?, HeaderValue::try_from(value.as_str()).ok()?))
            })
            .collect()
    }
}

/// The receiver on this machine.
struct Forward {
    client: Client,
    url: CheckedUrl,
}

impl Forward {
    fn new(text: &str, deadline: Duration) -> Result<Self, CliError> {
        let wrong = |reason: String| {
            CliError::usage(
                format!("--forward-to is refused: {reason}"),
                "write for example --forward-to http://localhost:3000/hook",
            )
        };
        let url = url::Url::parse(text).map_err(|e| wrong(e.to_string()))?;
        // Exactly the address that the user named is open: its scheme, its port, and its network where it is a
        // private one.
        let private = match url.host() {
            Some(url::Host::Ipv4(ip)) => Some(ipnet::IpNet::from(std::net::IpAddr::from(ip))),
            Some(url::Host::Ipv6(ip)) => Some(ipnet::IpNet::from(std::net::IpAddr::from(ip))),
            Some(url::Host::Domain(_)) | None => None,
        };
        let private = private.filter(|net| AddressPolicy::check_entry(net).is_ok());
        let port = url.port_or_known_default().unwrap_or(0);
        let policy = UrlPolicy {
            allow_http: true,
            ports: vec![port..=port],
            addresses: AddressPolicy { allow_loopback: true, allow_private: private.into_iter().collect() },
        };
        let limits = Limits { deadline, ..Limits::default() };
        ringback_service_runtime::crypto_provider::install();
        let client = Client::new(policy, limits).map_err(|e| CliError::Service(e.to_string()))?;
        let url = client.check(text).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { client, url })
    }

    /// What the receiver answered, and how long it took.
    async fn send(&self, event: &Event) -> Result<(Result<u16, String>, Duration), CliError> {
        let post =
            Post { url: self.url.clone(), headers: event.header_map(), body: event.bytes()?, deadline: None };
        let began = Instant::now();
        let posted = self.client.post(post).await;
        let answer = posted.result.map(|answer| answer.status).map_err(|error| error.to_string());
        Ok((answer, began.elapsed()))
    }
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &ListenArgs) -> Result<Exit, CliError> {
    let deadline = Duration::from_millis(args.deadline);
    let forward = args.forward_to.as_deref().map(|url| Forward::new(url, deadline)).transpose()?;
    let mut object = json!({
        "url": null,
        "label": "ringback listen",
        "format": args.format,
        "events": if args.events.is_empty() { json!(["*"]) } else { json!(args.events) },
        "endpoints": args.endpoints,
        "expires_in_seconds": LIFE.as_secs(),
    });
    if let Some(secret) = super::webhook::secret(args.secret_file.as_ref())? {
        object["secret"] = secret.into();
    }
    let made: Made = ctx.api.post("/v1/webhooks", object.to_string(), &[]).await?.read()?;
    if args.secret_file.is_none() {
        ctx.note(&format!("signing secret  {}", clean(&made.secret)));
    }
    let whither =
        args.forward_to.as_deref().map_or("shown here".to_owned(), |url| format!("→ {}", clean(url)));
    ctx.note(&format!("listening  {whither}  (Ctrl-C ends)"));
    let ended = follow(ctx, args, &made.id, forward.as_ref()).await;
    // Should this fail, the webhook ends by itself.
    if let Err(error) = ctx.api.delete(&path(&made.id)).await {
        ctx.note(&format!(
            "the webhook {} ends by itself in {}: {error}",
            made.id,
            when::duration_ms(1_800_000)
        ));
    }
    ended
}

async fn follow(
    ctx: &Context,
    args: &ListenArgs,
    id: &str,
    forward: Option<&Forward>,
) -> Result<Exit, CliError> {
    let stop = stopped().shared();
    let (mut cursor, mut told) = (String::new(), 0_u64);
    let mut renewed = Instant::now();
    let mut pause = Duration::from_secs(1);
    loop {
        if renewed.elapsed() > RENEW {
            let renewal = json!({"expires_in_seconds": LIFE.as_secs()}).to_string();
            match ctx.api.patch(&path(id), renewal).await {
                Ok(_) => renewed = Instant::now(),
                Err(error @ CliError::Refused(_)) => return Err(error),
                // The server is away: it is asked again with the next page.
                Err(_) => {}
            }
        }
        let asked = format!(
            "/v1/events?webhook={}&limit=50&wait_seconds={HOLD_S}&after={}",
            encode(id),
            encode(&cursor)
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
            cursor.clone_from(&event.cursor);
            told += 1;
            if args.count.is_some_and(|count| told >= count) {
                return Ok(Exit::Ok);
            }
        }
        cursor = page.cursor;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_address_is_open() {
        let wait = Duration::from_secs(1);
        for url in [
            "http://localhost:3000/hook",
            "http://127.0.0.1:9/",
            "http://10.1.2.3:8080/x",
            "https://example.com/",
        ] {
            assert!(Forward::new(url, wait).is_ok(), "{url}");
        }
        for url in ["localhost:3000", "ftp://localhost/", "/hook", ""] {
            assert!(Forward::new(url, wait).is_err(), "{url}");
        }
        let forward = Forward::new("http://10.1.2.3:8080/x", wait).unwrap();
        assert!(forward.client.check("http://10.1.2.4:8080/x").is_err());
        assert!(forward.client.check("http://10.1.2.3:8081/x").is_err());
    }

    #[test]
    fn bytes_and_headers_stay_as_they_came() {
        let event: Event = serde_json::from_value(json!({
            "id": "msg_1", "type": "t", "cursor": "c", "owner_id": "o", "body": "/wAB", "body_encoding": "base64",
            "headers": {"webhook-id": "msg_1", "bad header": "x"},
        }))
        .unwrap();
        assert_eq!(event.bytes().unwrap().as_ref(), [255, 0, 1]);
        assert_eq!(event.header_map().len(), 1);
    }
}
