//! The work queue against SQL (P6): streams that are missing or of another database are made anew, and queued jobs
//! without a message get a new one.
//!
//! Of every endpoint with a queue, the messages of its oldest jobs are looked for one by one, and those of a further
//! stretch that moves on with each pass: a job whose message is lost becomes the oldest when the others are done. The
//! full comparison of an endpoint reads everything it has, so it runs only after its stream was made anew (or seen for
//! the first time), where none of the looked-for messages exists, and where messages are lacking in two passes.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use ringback_bus::{JobSubject, Lane, Subjects};
use ringback_contracts::v1;
use ringback_domain::{EndpointId, JobId};
use ringback_service_runtime::fault;
use ringback_store::due::{LiveCounts, QueuedJob, counted_live, live_counts, queued_jobs};
use serde::Serialize;

use crate::context::{Context, PassError};

/// Every so many passes the rows are counted instead of the counters, so that a drifted counter hides nothing.
const COUNT_ROWS_EVERY: u32 = 30;
/// Messages looked for one by one in a pass, all endpoints together, and bounds per endpoint.
const PROBES: usize = 2_000;
const PROBES_MIN: usize = 4;
const PROBES_MAX: usize = 32;
const PROBES_IN_FLIGHT: usize = 16;

/// What the pass found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Streams that were missing or of another database.
    pub remade: u64,
    /// Messages looked for one by one.
    pub probed: u64,
    /// Endpoints compared row by row.
    pub compared: u64,
    /// Queued jobs without a message.
    pub missing: u64,
    /// Of these, jobs that got a new message.
    pub republished: u64,
}

/// What the pass remembers between two runs. Nothing in it matters for correctness.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    incarnations: HashMap<u32, String>,
    /// Endpoints that are to be compared because of their stream.
    suspects: HashSet<EndpointId>,
    /// How far the moving stretch of an endpoint has come.
    stretches: HashMap<EndpointId, JobId>,
    /// Messages that were lacking in the last pass.
    lacking: HashMap<EndpointId, u64>,
    /// Messages that were lacking when an endpoint was last compared: the running jobs of a stream that was lost have
    /// none.
    explained: HashMap<EndpointId, u64>,
    runs: u32,
}

pub(crate) async fn run(context: &Context, memory: &mut Memory) -> Result<Report, PassError> {
    let mut report = Report::default();
    let shards = u32::from(context.store.facts().shards);
    let now_ms = context.store.now_ms().await?;
    let waiting_since_ms = now_ms.saturating_sub_unsigned(context.config.republish_after_ms);
    let count_rows = memory.runs.is_multiple_of(COUNT_ROWS_EVERY);
    memory.runs = memory.runs.wrapping_add(1);
    let live = if count_rows {
        live_counts(context.store.read(), waiting_since_ms).await?
    } else {
        counted_live(context.store.read()).await?
    };
    for shard in 0..shards {
        if check_stream(context, memory, shard, &mut report).await? {
            let of_shard = live.iter().map(|(e, _)| *e).filter(|e| Subjects::shard_of(*e, shards) == shard);
            memory.suspects.extend(of_shard);
        }
    }
    let queues = live.iter().filter(|(_, c)| c.queued > 0).count().max(1);
    let probes = (PROBES / queues).clamp(PROBES_MIN, PROBES_MAX);
    for (endpoint, counts) in live {
        let look = Look { shard: Subjects::shard_of(endpoint, shards), endpoint, counts, waiting_since_ms };
        check_endpoint(context, memory, look, probes, &mut report).await?;
    }
    Ok(report)
}

/// One endpoint in one pass.
#[derive(Clone, Copy)]
struct Look {
    shard: u32,
    endpoint: EndpointId,
    counts: LiveCounts,
    /// Jobs that were queued after this moment may still be on their way.
    waiting_since_ms: i64,
}

impl Look {
    fn subject(&self, job: &QueuedJob) -> JobSubject {
        JobSubject {
            shard: self.shard,
            endpoint: self.endpoint,
            lane: Lane::of(job.low_priority),
            job: job.id,
            run: job.run,
            publish: job.publish,
        }
    }
}

/// Answers whether the endpoints of the shard must be compared.
async fn check_stream(
    context: &Context,
    memory: &mut Memory,
    shard: u32,
    report: &mut Report,
) -> Result<bool, PassError> {
    let epoch = &context.store.facts().db_epoch;
    let mut state = context.bus.ensure_stream(shard, epoch).await?;
    if state.db_epoch != *epoch {
        tracing::warn!(
            shard,
            "the work queue belongs to another state of the database: it is made anew from SQL"
        );
        context.bus.delete_stream(shard).await?;
        state = context.bus.ensure_stream(shard, epoch).await?;
        report.remade += 1;
    } else if state.created {
        report.remade += 1;
    }
    let known = memory.incarnations.insert(shard, state.incarnation.clone());
    Ok(known.as_ref() != Some(&state.incarnation))
}

async fn check_endpoint(
    context: &Context,
    memory: &mut Memory,
    look: Look,
    probes: usize,
    report: &mut Report,
) -> Result<(), PassError> {
    let endpoint = look.endpoint;
    let live = look.counts.queued + look.counts.running;
    let mut suspect = memory.suspects.contains(&endpoint);
    if live == 0 && !suspect {
        memory.lacking.remove(&endpoint);
        memory.explained.remove(&endpoint);
        memory.stretches.remove(&endpoint);
        return Ok(());
    }
    if !suspect {
        let page = stretch(context, memory, look, probes).await?;
        let missing = missing_of(context, look, &page).await?;
        report.probed += page.len() as u64;
        report.missing += missing.len() as u64;
        report.republished += republish(context, &missing).await?;
        suspect = page.len() >= PROBES_MIN && missing.len() == page.len();
    }
    let lacking = live.saturating_sub(depth(context, look).await?);
    let explained = memory.explained.get(&endpoint).copied().unwrap_or(0);
    // Counts and depth are not of one moment: a busy endpoint always lacks a few.
    let noise = explained + 100 + live / 20;
    let before = memory.lacking.insert(endpoint, lacking).unwrap_or(0);
    if lacking < explained {
        memory.explained.insert(endpoint, lacking);
    }
    if !suspect && (lacking <= noise || before <= noise) {
        return Ok(());
    }
    report.compared += 1;
    let missing = compare(context, look).await?;
    report.missing += missing.len() as u64;
    for part in missing.chunks(context.chunk() as usize) {
        report.republished += republish(context, part).await?;
    }
    memory.suspects.remove(&endpoint);
    memory.explained.insert(endpoint, lacking.saturating_sub(missing.len() as u64));
    Ok(())
}

/// The oldest queued jobs of an endpoint, and the next ones of the stretch that moves on with each pass.
async fn stretch(
    context: &Context,
    memory: &mut Memory,
    look: Look,
    probes: usize,
) -> Result<Vec<QueuedJob>, PassError> {
    let read = |after| {
        let limit = u32::try_from(probes).unwrap_or(u32::MAX);
        queued_jobs(context.store.read(), look.endpoint, look.waiting_since_ms, after, limit)
    };
    let mut page = read(None).await?;
    if page.len() < probes {
        memory.stretches.remove(&look.endpoint);
        return Ok(page);
    }
    let oldest = page.last().map(|job| job.id);
    let from = memory.stretches.get(&look.endpoint).copied().max(oldest);
    let further = read(from).await?;
    match further.last() {
        Some(last) => memory.stretches.insert(look.endpoint, last.id),
        // The end is reached: begin again.
        None => memory.stretches.remove(&look.endpoint),
    };
    page.extend(further);
    Ok(page)
}

/// Those of `jobs` whose message is not stored.
async fn missing_of(context: &Context, look: Look, jobs: &[QueuedJob]) -> Result<Vec<QueuedJob>, PassError> {
    futures::stream::iter(jobs.iter().copied())
        .map(|job| async move { Ok((job, context.bus.has_job(&look.subject(&job)).await?)) })
        .buffered(PROBES_IN_FLIGHT)
        .try_filter_map(|(job, there)| async move { Ok((!there).then_some(job)) })
        .try_collect()
        .await
}

/// Messages of an endpoint, waiting or held by a worker.
async fn depth(context: &Context, look: Look) -> Result<u64, PassError> {
    let (shard, endpoint) = (look.shard, look.endpoint);
    let mut total = 0;
    for lane in Lane::ALL {
        total += match context.bus.consumer_depth(shard, endpoint, lane).await? {
            Some(depth) => depth.total(),
            // Nobody has taken from this lane yet.
            None => count_lane(context, shard, endpoint, lane).await?,
        };
    }
    Ok(total)
}

async fn count_lane(
    context: &Context,
    shard: u32,
    endpoint: EndpointId,
    lane: Lane,
) -> Result<u64, PassError> {
    let (mut total, mut offset) = (0, 0);
    loop {
        let page = context.bus.list_lane_jobs(shard, endpoint, lane, offset).await?;
        total += page.jobs.len() as u64;
        match page.next_offset {
            Some(next) => offset = next,
            None => return Ok(total),
        }
    }
}

/// Queued jobs whose message is not stored. Each is confirmed by itself: pages shift while messages come and go.
async fn compare(context: &Context, look: Look) -> Result<Vec<QueuedJob>, PassError> {
    let Look { shard, endpoint, waiting_since_ms, .. } = look;
    let mut stored: HashSet<(JobId, u32, u32)> = HashSet::new();
    let mut offset = 0;
    loop {
        let page = context.bus.list_jobs(shard, endpoint, offset).await?;
        stored.extend(page.jobs.iter().map(|j| (j.job, j.run, j.publish)));
        match page.next_offset {
            Some(next) => offset = next,
            None => break,
        }
    }
    let mut missing = Vec::new();
    let mut after = None;
    loop {
        let page =
            queued_jobs(context.store.read(), endpoint, waiting_since_ms, after, context.chunk()).await?;
        let doubtful: Vec<QueuedJob> =
            page.iter().filter(|j| !stored.contains(&(j.id, j.run, j.publish))).copied().collect();
        missing.extend(missing_of(context, look, &doubtful).await?);
        after = page.last().map(|job| job.id);
        if page.len() < context.chunk() as usize {
            return Ok(missing);
        }
    }
}

/// Has the tracker send new messages; it looks at each row again first.
async fn republish(context: &Context, jobs: &[QueuedJob]) -> Result<u64, PassError> {
    if jobs.is_empty() {
        return Ok(0);
    }
    fault::point("reconciler.republish.before");
    let jobs = jobs
        .iter()
        .map(|job| v1::RepublishJob {
            job_id: Bytes::copy_from_slice(job.id.as_bytes()),
            run: job.run,
            publish: job.publish,
        })
        .collect();
    let count = context.command(v1::command::Command::Republish(v1::Republish { jobs })).await?;
    fault::point("reconciler.republish.after");
    Ok(u64::from(count.changed))
}
