//! What registered webhooks hear of a live job between its transitions: its progress, and the text of a completion.
//!
//! Per job and target at most one event in half a second, with the last value, and at most one that is not taken yet.
//! Who has not taken it is behind: the timer offers what came since to those only. What waits gives way to the next
//! transition.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{
    JobId, JobStatus,
    event::{Completion, EndpointKind, EventType, event_id, event_key},
    job::Live,
    webhook::{
        body::Body,
        envelope::{self, CompletionFacts},
    },
};
use ringback_store::{
    JobRow, StoreError, WriteTx,
    chunks_write::{NewChunk, NewProgress},
    deliveries::body_to_wire,
    events::insert_owned,
    progress::{
        Notice, PROGRESS, STREAMING, Told, drop_notices, notices, overtake, pending, put_notices, values,
    },
    select_jobs,
    webhooks::{
        EventFacts, Registry, Webhook,
        registry::parse_metadata,
        tell::{self, End, Ids, Transition},
    },
};
use uuid::Uuid;

use super::{Changed, Context, Entry};

/// The shortest time between two events of a job for one target.
pub(crate) const EVERY_MS: i64 = 500;
/// `deliveries.seq` of every event.
const SEQ: u32 = 1;
/// What is told, by its bit; the place of each is that of its targets in [`Teller::tell`].
const KINDS: [(u32, EventType); 2] =
    [(STREAMING, EventType::CompletionStreaming), (PROGRESS, EventType::JobProgress)];

/// What happened in a fold that may be told.
pub(super) struct News<'a> {
    pub(super) changed: &'a [Changed],
    pub(super) progress: &'a BTreeMap<JobId, NewProgress>,
    pub(super) chunks: &'a [NewChunk],
    /// Jobs of which something waits.
    pub(super) due: &'a BTreeSet<JobId>,
}

/// Tells what may be told now and keeps the rest; what was told of an attempt that is over is overtaken. Answers the
/// deliveries, which are inserted, and the word to the dispatchers about those that are overtaken.
pub(super) async fn tell(
    tx: &WriteTx,
    news: &News<'_>,
    jobs: &HashMap<JobId, Entry>,
    registry: &Registry,
    context: &Context<'_>,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let over: Vec<JobId> = news
        .changed
        .iter()
        .map(|c| c.job)
        .filter(|id| jobs.get(id).is_some_and(|e| registry.listens(e.row.project)))
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let mut deliveries = overtaken(tx, &over).await?;
    let ids: BTreeSet<JobId> = news
        .progress
        .keys()
        .copied()
        .chain(news.chunks.iter().map(|c| c.job))
        .chain(news.due.iter().copied())
        .collect();
    let ids: Vec<JobId> = ids.into_iter().collect();
    if ids.is_empty() {
        return Ok(deliveries);
    }
    // Beats that only renewed a lease read no row.
    let unread: Vec<JobId> = ids.iter().filter(|id| !jobs.contains_key(id)).copied().collect();
    let read = if unread.is_empty() { HashMap::new() } else { select_jobs(tx.conn(), &unread).await? };
    let heard: Vec<(&JobRow, &Live)> = ids
        .iter()
        .filter_map(|id| jobs.get(id).map(|e| &e.row).or_else(|| read.get(id)))
        .filter(|row| registry.listens(row.project))
        .filter_map(|row| Some((row, row.job.state.live()?)))
        .collect();
    // What waits of an attempt that is over, told by nobody while no webhook listened, is void.
    let void: Vec<JobId> =
        news.due.iter().filter(|id| heard.iter().all(|(row, _)| row.job.id != **id)).copied().collect();
    deliveries.extend(overtaken(tx, &void).await?);
    if heard.is_empty() {
        return Ok(deliveries);
    }
    let heard_ids: Vec<JobId> = heard.iter().map(|(row, _)| row.job.id).collect();
    let mut kept = notices(tx, &heard_ids).await?;
    let events: Vec<Uuid> = kept.values().flat_map(|n| &n.last).map(|t| t.event).collect();
    let untaken = if events.is_empty() { HashSet::new() } else { pending(tx, &events).await? };
    let unsaid: Vec<JobId> = heard_ids.into_iter().filter(|id| !news.progress.contains_key(id)).collect();
    let stored = if unsaid.is_empty() { HashMap::new() } else { values(tx, &unsaid).await? };
    let mut written = Vec::new();
    for (row, live) in heard {
        let mut notice = kept
            .remove(&row.job.id)
            .filter(|n| (n.run, n.attempt) == (row.job.run, live.attempt))
            .unwrap_or_else(|| Notice::new(row.job.id, row.job.run, live.attempt));
        let kind = registry.endpoint(row.endpoint).map_or(EndpointKind::Job, |e| e.kind);
        take(&mut notice, news, kind);
        if notice.waits() && context.now.0.saturating_sub(notice.told_at_ms) >= EVERY_MS {
            let said = news.progress.get(&row.job.id).map(|p| &*p.value);
            let value = said.or_else(|| stored.get(&row.job.id).map(Vec::as_slice));
            let told = Teller { row, live, registry, context, value }.tell(&mut notice, &untaken);
            for (id, told) in told {
                insert_owned(tx, context.env.batch.partitions, id.as_bytes(), &row.public_id(), &told)
                    .await?;
                deliveries.extend(told);
            }
        }
        written.push(notice);
    }
    put_notices(tx, &written).await?;
    Ok(deliveries)
}

/// Ends what was told of attempts that are over, and says so to dispatchers. Which of these events are still pending is
/// theirs to know.
async fn overtaken(tx: &WriteTx, jobs: &[JobId]) -> Result<Vec<v1::Delivery>, StoreError> {
    let last = drop_notices(tx, jobs).await?;
    let events: BTreeSet<Uuid> = last.iter().map(|(_, event)| *event).collect();
    overtake(tx, &events.into_iter().collect::<Vec<_>>()).await?;
    let word = |(target, event): (u32, Uuid)| v1::Delivery {
        owner_id: Bytes::copy_from_slice(event.as_bytes()),
        seq: SEQ,
        target,
        overtaken: true,
        ..v1::Delivery::default()
    };
    Ok(last.into_iter().map(word).collect())
}

/// Adds what a fold brought to what waits.
fn take(notice: &mut Notice, news: &News<'_>, kind: EndpointKind) {
    let mine = |run: u32, attempt: u32| (run, attempt) == (notice.run, notice.attempt);
    if news.progress.get(&notice.job).is_some_and(|p| mine(p.run, p.attempt)) {
        notice.waiting |= PROGRESS;
    }
    if kind != EndpointKind::Completion {
        return;
    }
    let (job, run, attempt) = (notice.job, notice.run, notice.attempt);
    for chunk in news.chunks.iter().filter(|c| (c.job, c.run, c.attempt) == (job, run, attempt)) {
        let text = Completion::read(&chunk.output).content.unwrap_or_default();
        notice.append(chunk.n, &text);
    }
}

/// Tells of one live job.
struct Teller<'a> {
    row: &'a JobRow,
    live: &'a Live,
    registry: &'a Registry,
    context: &'a Context<'a>,
    value: Option<&'a [u8]>,
}

impl Teller<'_> {
    /// An event of each kind to the targets that took their last one; the others are behind. Whoever wants both kinds
    /// gets the one that it did not get last, and is behind with the other.
    fn tell(&self, notice: &mut Notice, untaken: &HashSet<(u32, Uuid)>) -> Vec<(Uuid, Vec<v1::Delivery>)> {
        let metadata = parse_metadata(self.row.metadata.as_deref());
        let mut wanted: BTreeMap<u32, (u32, &Webhook)> = BTreeMap::new();
        for (bit, event) in KINDS {
            let facts = EventFacts {
                names: event.into(),
                runflow: None,
                endpoint: Some(self.row.endpoint),
                metadata: metadata.as_ref(),
                now_ms: self.context.now.0,
            };
            for (target, webhook, _) in self.registry.matching(self.row.project, facts) {
                let behind = notice.of(target).map_or(0, |told| told.behind);
                if (notice.waiting | behind) & bit != 0 {
                    wanted.entry(target).or_insert((0, webhook)).0 |= bit;
                }
            }
        }
        notice.told_at_ms = self.context.now.0;
        notice.waiting = 0;
        for told in &mut notice.last {
            told.behind = 0;
        }
        let mut go: [Vec<(u32, &Webhook, u32)>; 2] = [Vec::new(), Vec::new()];
        for (target, (bits, webhook)) in wanted {
            let told = notice.last.iter_mut().find(|told| told.target == target);
            let before = told.as_ref().map_or(0, |told| told.kind);
            if let Some(told) = told.filter(|told| untaken.contains(&(target, told.event))) {
                told.behind = bits;
                continue;
            }
            let kind = match bits {
                PROGRESS | STREAMING => bits,
                _ if before == STREAMING => PROGRESS,
                _ => STREAMING,
            };
            go[usize::from(kind == PROGRESS)].push((target, webhook, bits & !kind));
        }
        let kinds = KINDS.into_iter().zip(go).filter(|(_, targets)| !targets.is_empty());
        kinds.filter_map(|(kind, targets)| self.event(notice, kind, &targets)).collect()
    }

    /// One event to all `targets`, each with the bits of what it has yet to get.
    fn event(
        &self,
        notice: &mut Notice,
        (kind, event): (u32, EventType),
        targets: &[(u32, &Webhook, u32)],
    ) -> Option<(Uuid, Vec<v1::Delivery>)> {
        let (row, now) = (self.row, self.context.now);
        let now_ms = u64::try_from(now.0).unwrap_or(0);
        let id = event_key(now_ms, rand::random(), Some(row.job.id.as_bytes()));
        let data = self.data(event, &notice.content)?;
        let body = body_to_wire(envelope::standard(&event_id(id, SEQ), event, now, data));
        let delivery = |target: u32, webhook: &Webhook| v1::Delivery {
            owner_id: Bytes::copy_from_slice(id.as_bytes()),
            seq: SEQ,
            target,
            project_id: row.project.0,
            url: webhook.url.clone().unwrap_or_default(),
            terminal: event.is_terminal(),
            event: event.code(),
            body: Some(body.clone()),
            created_at_ms: now.0,
            traceparent: row.traceparent.clone().unwrap_or_default(),
            run: row.job.run,
            ..v1::Delivery::default()
        };
        for (target, _, behind) in targets {
            notice.told(Told { target: *target, event: id, kind, behind: *behind });
        }
        Some((id, targets.iter().map(|(target, webhook, _)| delivery(*target, webhook)).collect()))
    }

    fn data(&self, event: EventType, content: &str) -> Option<Body> {
        let of = Transition {
            row: self.row,
            seq: 0,
            run: self.row.job.run,
            attempt: self.live.attempt,
            status: JobStatus::InProgress,
            again: false,
            delay_ms: self.live.delay_ms,
            execution_ms: 0,
            at: self.context.now,
            traceparent: None,
        };
        let ids = Ids::of(self.row);
        let facts = tell::facts(self.registry, &of, &ids, &End::default());
        if event == EventType::JobProgress {
            return Some(envelope::progress(&facts, self.value?));
        }
        let told = CompletionFacts {
            model: self.registry.endpoint(self.row.endpoint).and_then(|e| e.model.as_deref()),
            request_id: self.row.request_id.as_deref(),
            content: Some(content),
            ..CompletionFacts::default()
        };
        Some(envelope::completion(&facts, &told))
    }
}
