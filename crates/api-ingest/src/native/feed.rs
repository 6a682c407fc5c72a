//! `/v1/events`: every delivery of the project in the order of commits, signed, with the bytes that are sent: for
//! receivers that cannot be reached, and for those that were away.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{Path, Query, Request, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use base64::Engine as _;
use ringback_bus::Announcements;
use ringback_contracts::{Message as _, v1};
use ringback_domain::{
    JobId, ProjectId,
    event::event_id,
    target::registered_webhook,
    webhook::{message_id, runflow, signature},
};
use ringback_service_runtime::{Redacted, blobs::BlobKey};
use ringback_store::{
    auth::ScopeSet,
    deliveries::event_name,
    delivery_search::{DeliveryFilter, Place, one},
    feed::{FeedItem, after_sequence, horizon, page},
    secrets::live_secrets,
    views::visible_job,
    webhooks::{crud, secrets},
};
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    delivery_filter::{of_query, owner_of, target_of, webhook_name},
    limit_of, parameter,
    webhooks::object,
};
use crate::{
    auth::Principal,
    error::{ApiError, NativeError},
    render::{json_bytes, json_value, rfc3339},
    state::Api,
    submit::new_job_id,
    waiters::Wants,
};

/// Bodies of one page, together; a page has at least one event.
const PAGE_MAX_BYTES: usize = 8 * 1024 * 1024;
/// Longest held request: proxies cut idle ones after a minute.
const WAIT_MAX_S: u64 = 30;
/// Jobs of one question about what was missed, and events of its answer.
const MISSED_JOBS_MAX: usize = 100;
const MISSED_EVENTS_MAX: u32 = 500;
/// A held request looks again after this long even if nothing was announced.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// And so soon after something was: on PostgreSQL an older transaction may still hide it.
const LOOK_SOON: Duration = Duration::from_millis(20);

/// A place as clients keep it. It names the life of the database, so that one from before a restored backup is noticed.
pub(super) fn cursor_of(api: &Api, place: &Place) -> String {
    format!(
        "{}-{}-{}-{}-{}",
        api.store.facts().db_epoch,
        place.position,
        place.owner.simple(),
        place.seq,
        place.target
    )
}

/// Reads a cursor: the life of the database, and the place.
pub(super) fn parse_cursor(text: &str) -> Option<(String, Place)> {
    let mut parts = text.split('-');
    let epoch = parts.next().filter(|e| !e.is_empty())?.to_owned();
    let position: i64 = parts.next()?.parse().ok().filter(|n| *n >= 0)?;
    let owner = parts.next().filter(|o| o.len() == 32).and_then(|o| Uuid::try_parse(o).ok())?;
    let (seq, target) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some((epoch, Place { position, owner, seq, target }))
}

async fn start_of(api: &Api, after: Option<&str>) -> Result<Place, ApiError> {
    match after {
        None => Ok(Place::before(0)),
        Some("latest") => Ok(Place::before(horizon(api.store.read()).await?)),
        Some(text) => {
            let (epoch, place) = parse_cursor(text).ok_or_else(|| {
                ApiError::bad_request(
                    "the query parameter `after` must be the cursor of a former answer, `latest`, or be left out to \
                     begin with the oldest event kept",
                )
            })?;
            if epoch != api.store.facts().db_epoch {
                return Err(ApiError::new(
                    StatusCode::GONE,
                    "this cursor is from before the database was restored from a backup: places are numbered anew. \
                     Begin again without `after` and drop the webhook-ids that you have seen; they stay the same",
                ));
            }
            Ok(place)
        }
    }
}

/// The keys that sign for the targets of a page.
struct Keys<'a> {
    api: &'a Api,
    project: ProjectId,
    names: HashMap<i64, String>,
    now_ms: i64,
    known: HashMap<Option<u32>, Arc<[Redacted<String>]>>,
}

impl<'a> Keys<'a> {
    async fn new(api: &'a Api, project: ProjectId) -> Result<Self, ApiError> {
        let names = crud::names(api.store.read(), project).await?;
        Ok(Self { api, project, names, now_ms: api.store.now_ms().await?, known: HashMap::new() })
    }

    /// The secrets of a target, newest first: a registered webhook's own, or the project's.
    async fn of(&mut self, target: u32) -> Result<Arc<[Redacted<String>]>, ApiError> {
        let webhook = registered_webhook(target);
        if let Some(known) = self.known.get(&webhook) {
            return Ok(Arc::clone(known));
        }
        let conn = self.api.store.read();
        let mut all: Vec<Redacted<String>> = Vec::new();
        if let Some(id) = webhook.map(i64::from)
            && let Some(name) = self.names.get(&id)
        {
            let live = secrets::live(conn, &self.api.key, id, name, self.now_ms).await?;
            all.extend(live.into_iter().map(|s| s.secret));
        }
        if all.is_empty() {
            let live = live_secrets(conn, &self.api.key, self.project).await?;
            all.extend(live.into_iter().map(|s| s.secret));
        }
        let all: Arc<[Redacted<String>]> = all.into();
        self.known.insert(webhook, Arc::clone(&all));
        Ok(all)
    }
}

/// The bytes of a body, from SQL and the blob store.
pub(super) async fn whole(api: &Api, body: &v1::BodyParts) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    for part in &body.parts {
        match &part.part {
            Some(v1::body_part::Part::Inline(inline)) => bytes.extend_from_slice(inline),
            Some(v1::body_part::Part::BlobKey(key)) => {
                let read = match BlobKey::new(key.as_str()) {
                    Ok(key) => api.blobs.get(&key, part.size_bytes).await,
                    Err(error) => Err(error),
                };
                bytes.extend_from_slice(&read.map_err(|error| {
                    tracing::warn!(%error, "a body cannot be read from the blob store");
                    ApiError::unavailable("the blob store is not available now; try again")
                })?);
            }
            None => {}
        }
    }
    Ok(bytes)
}

/// An event as it would be sent now: its headers with a fresh time and signature, and its bytes.
async fn item_json(api: &Api, keys: &mut Keys<'_>, item: &FeedItem) -> Result<(Value, usize), ApiError> {
    let bytes = whole(api, &item.body).await?;
    let place = &item.place;
    let id = message_id(place.owner, u64::from(place.seq), place.target);
    let secrets = keys.of(place.target).await?;
    let signing: Vec<_> = secrets
        .iter()
        .filter_map(|s| signature::SigningKey::parse(s.expose()).ok())
        .map(|(key, _)| key)
        .collect();
    let stamp = keys.now_ms / 1000;
    let mut headers = BTreeMap::from([
        ("content-type", "application/json".to_owned()),
        (signature::ID_HEADER, id.clone()),
        (signature::TIMESTAMP_HEADER, stamp.to_string()),
        (signature::SIGNATURE_HEADER, signature::sign(&signing, &id, stamp, &bytes)),
        ("webhook-sequence", place.seq.to_string()),
    ]);
    if item.replays > 0 {
        headers.insert("webhook-replay", item.replays.to_string());
    }
    if item.runflow
        && let Some(key) = secrets.first().and_then(|s| runflow::key(s.expose()).ok())
    {
        headers.insert(runflow::SIGNATURE_HEADER, runflow::sign(&key, &bytes));
    }
    let size = bytes.len();
    let (body, encoding) = match String::from_utf8(bytes) {
        Ok(text) => (text, "utf-8"),
        Err(raw) => (base64::engine::general_purpose::STANDARD.encode(raw.as_bytes()), "base64"),
    };
    let shown = json!({
        "id": id,
        "event_id": event_id(place.owner, place.seq),
        "type": event_name(item.event),
        "cursor": cursor_of(api, place),
        "owner_id": place.owner.hyphenated().to_string(),
        "sequence": place.seq,
        "webhook": webhook_name(&keys.names, place.target),
        "state": item.state.as_str(),
        "created_at": rfc3339(item.created_at_ms),
        "headers": headers,
        "body": body,
        "body_encoding": encoding,
    });
    Ok((shown, size))
}

/// Events until the page is full of bytes. Answers whether all fitted.
async fn items_json(api: &Api, who: &Principal, items: &[FeedItem]) -> Result<(Vec<Value>, usize), ApiError> {
    let mut keys = Keys::new(api, who.project).await?;
    let mut shown = Vec::with_capacity(items.len());
    let mut bytes = 0;
    for item in items {
        let told: u64 = item.body.parts.iter().map(|p| p.size_bytes).sum();
        let size = usize::try_from(told).unwrap_or(usize::MAX);
        if !shown.is_empty() && bytes + size > PAGE_MAX_BYTES {
            break;
        }
        let (value, size) = item_json(api, &mut keys, item).await?;
        bytes += size;
        shown.push(value);
    }
    let n = shown.len();
    Ok((shown, n))
}

/// `GET /v1/events?after=&limit=&webhook=&types=&job=&wait_seconds=`, and `?job=&after_sequence=`.
pub(crate) async fn events(
    State(api): State<Arc<Api>>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let limit = limit_of(&query)?;
    let filter = of_query(&api, &who, &query).await?;
    let expected = format!("a number of seconds from 0 to {WAIT_MAX_S}");
    let wait = parameter(&query, "wait_seconds", &expected, |text| {
        text.parse::<u64>().ok().filter(|n| *n <= WAIT_MAX_S)
    })?;
    let after = query.get("after").map(String::as_str).filter(|text| !text.is_empty());
    if let Some(last) = parameter(&query, "after_sequence", "the last sequence that you have", |text| {
        text.parse::<u32>().ok()
    })? {
        return Ok(of_one(&api, &who, filter, after, last, limit).await?);
    }
    let start = start_of(&api, after).await?;
    let until = Instant::now() + Duration::from_secs(wait.unwrap_or(0));
    // A place in the crowd of those who wait, given back at the end.
    let _place = match wait {
        Some(1..) => Some(api.waiters.join(who.project, new_job_id(), Wants::End)?),
        _ => None,
    };
    let mut waiting = Waiting::new(&api, wait.unwrap_or(0) > 0).await;
    let mut at = start;
    let found = loop {
        let found = page(api.store.read(), who.project, &filter, at, limit).await?;
        if !found.items.is_empty() || Instant::now() >= until || api.shutdown.is_triggered() {
            break found;
        }
        at = found.next;
        if !found.more {
            waiting.wait(&api, who.project, until).await;
        }
    };
    let (shown, n) = items_json(&api, &who, &found.items).await?;
    let (next, more) = match found.items.get(n.wrapping_sub(1)) {
        Some(last) if n < found.items.len() => (last.place, true),
        _ => (found.next, found.more),
    };
    Ok(json_bytes(
        StatusCode::OK,
        json!({"events": shown, "cursor": cursor_of(&api, &next), "more": more}).to_string(),
    ))
}

/// `?job=ID&after_sequence=N`: the events of one job that its receiver has not seen.
async fn of_one(
    api: &Api,
    who: &Principal,
    filter: DeliveryFilter,
    after: Option<&str>,
    last: u32,
    limit: u32,
) -> Result<Response, ApiError> {
    if filter.owner.is_none() || after.is_some() {
        return Err(ApiError::bad_request(
            "`after_sequence` goes with `job` and not with `after`: sequences count the events of one job",
        ));
    }
    let items = after_sequence(api.store.read(), who.project, &filter, last, limit).await?;
    let (shown, n) = items_json(api, who, &items).await?;
    let more = n < items.len() || items.len() == limit as usize;
    let sequence = items.get(n.wrapping_sub(1)).map_or(last, |item| item.place.seq);
    Ok(json_value(StatusCode::OK, &json!({"events": shown, "last_sequence": sequence, "more": more})))
}

/// What wakes a held request.
struct Waiting {
    announcements: Option<Announcements>,
    soon: Option<Duration>,
}

impl Waiting {
    /// Subscribed before the first look, so that nothing falls between.
    async fn new(api: &Api, wanted: bool) -> Self {
        let announcements = if wanted { api.bus.subscribe_all_deliveries().await.ok() } else { None };
        Self { announcements, soon: None }
    }

    async fn wait(&mut self, api: &Api, project: ProjectId, until: Instant) {
        let patience = match self.soon {
            Some(soon) => {
                let next = soon * 2;
                self.soon = (next < LOOK_AGAIN).then_some(next);
                soon
            }
            None => LOOK_AGAIN,
        };
        let wake = (Instant::now() + patience).min(until);
        let heard = async {
            match &mut self.announcements {
                Some(announcements) => loop {
                    match announcements.next().await {
                        Some(a) if concerns(&a.payload, project) => return true,
                        Some(_) => {}
                        None => return false,
                    }
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            again = heard => {
                if again {
                    self.soon = Some(LOOK_SOON);
                } else {
                    self.announcements = None;
                }
            }
            () = tokio::time::sleep_until(wake) => {}
            () = api.shutdown.triggered() => {}
        }
    }
}

fn concerns(payload: &[u8], project: ProjectId) -> bool {
    v1::DeliveryEvents::decode(payload)
        .is_ok_and(|events| events.deliveries.iter().any(|d| d.project_id == project.0))
}

/// `POST /v1/events/missed {jobs: [{id, last_sequence}], webhook?}`
pub(crate) async fn missed(State(api): State<Arc<Api>>, request: Request) -> Result<Response, NativeError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::READ).await?;
    let object = object(&api, &head.headers, body).await?;
    let target = match object.get("webhook") {
        None | Some(Value::Null) => None,
        Some(Value::String(id)) => {
            Some(target_of(&api, &who, id).await.map_err(|e| ApiError::field("/webhook", e.detail))?)
        }
        Some(_) => return Err(ApiError::field("/webhook", "must be the id of a webhook").into()),
    };
    let list = object
        .get("jobs")
        .and_then(Value::as_array)
        .ok_or_else(|| ApiError::field("/jobs", "must be a list of {\"id\", \"last_sequence\"}"))?;
    if list.len() > MISSED_JOBS_MAX {
        return Err(ApiError::field(
            "/jobs",
            format!("has {} entries, at most {MISSED_JOBS_MAX} are allowed; ask several times", list.len()),
        )
        .into());
    }
    let mut asked = Vec::with_capacity(list.len());
    for (n, entry) in list.iter().enumerate() {
        let id = entry.get("id").and_then(Value::as_str).unwrap_or_default();
        let owner = owner_of(id)
            .ok_or_else(|| ApiError::field(format!("/jobs/{n}/id"), "must be the id of a job or batch"))?;
        let last = match entry.get("last_sequence") {
            None | Some(Value::Null) => 0,
            Some(value) => value.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| {
                ApiError::field(
                    format!("/jobs/{n}/last_sequence"),
                    "must be a whole number; 0 = none was seen",
                )
            })?,
        };
        asked.push((id.to_owned(), owner, last));
    }
    let mut left = MISSED_EVENTS_MAX;
    let mut answers = Vec::with_capacity(asked.len());
    let mut bytes_left = true;
    for (id, owner, last) in asked {
        let sequence =
            visible_job(api.store.read(), who.project, JobId::from_uuid(owner)).await?.map(|r| r.job.seq);
        let filter = DeliveryFilter { owner: Some(owner), target, ..DeliveryFilter::default() };
        let wanted = if bytes_left { left.saturating_add(1) } else { 1 };
        let items = after_sequence(api.store.read(), who.project, &filter, last, wanted).await?;
        let fit = items.len().min(left as usize);
        let room = if bytes_left { items.get(..fit).unwrap_or_default() } else { &[] };
        let (shown, n) = items_json(&api, &who, room).await?;
        bytes_left &= n == room.len();
        left = left.saturating_sub(u32::try_from(n).unwrap_or(u32::MAX));
        answers.push(json!({
            "id": id,
            "last_sequence": last,
            "sequence": sequence,
            "known": sequence.is_some() || !items.is_empty(),
            "missed": shown,
            "complete": n == items.len(),
        }));
    }
    Ok(json_value(StatusCode::OK, &json!({"jobs": answers})))
}

/// `GET /v1/events/{webhook-id}`: one event with its headers and bytes, as the feed has it.
pub(crate) async fn one_event(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let absent = || ApiError::not_found("event not found: this project has no delivery with this webhook-id");
    let (owner, seq, target) = super::delivery_filter::parse_message_id(&id).ok_or_else(absent)?;
    one(api.store.read(), who.project, owner, seq, target).await?.ok_or_else(absent)?;
    let filter = DeliveryFilter::one(owner, seq, target);
    let items = after_sequence(api.store.read(), who.project, &filter, seq.saturating_sub(1), 1).await?;
    let item = items.first().ok_or_else(absent)?;
    let mut keys = Keys::new(&api, who.project).await?;
    let (shown, _) = item_json(&api, &mut keys, item).await?;
    Ok(json_value(StatusCode::OK, &shown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_cursors_are_refused() {
        let good = format!("0011223344556677-12-{}-3-65537", Uuid::from_u128(9).simple());
        let (epoch, place) = parse_cursor(&good).unwrap();
        assert_eq!(epoch, "0011223344556677");
        assert_eq!(place, Place { position: 12, owner: Uuid::from_u128(9), seq: 3, target: 65_537 });
        for bad in
            ["", "-", "a-b-c-d-e", "e--1-0-0-0", &format!("{good}-1"), &good[..good.len() - 8], "e-1-x-1-1"]
        {
            assert_eq!(parse_cursor(bad), None, "{bad}");
        }
    }
}
