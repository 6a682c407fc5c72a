//! The loop of one endpoint: fetch exactly what fits, run it, hand over what becomes of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ringback_bus::{JobDelivery, JobPuller};
use ringback_contracts::{
    ContractError, Message as _, attempt_to_wire, job_id_of, payload_of, read_version, v1,
};
use ringback_domain::artifact::ConfirmWish;
use ringback_service_runtime::json::fit_text;
use ringback_service_runtime::time::now_ms;
use ringback_service_runtime::{Check, Shutdown, fault, trace_context};
use tokio::sync::mpsc;

use crate::artifacts::{Keeper, Kept, Work as FinishedWork};
use crate::attempts::Held;
use crate::chunks::{Item, MAX_CHUNK_BYTES, OutChunk};
use crate::executor::process::ProcessPool;
use crate::executor::tasks::TaskPool;
use crate::executor::{End, ExecEvent, JobKey, Work};
use crate::message::Message;
use crate::outcome::Finished;
use crate::prepare::{Incoming, Prepared, Refused, prepare};
use crate::shared::Shared;

/// A job that was fetched for a slot which then closed waits this long for another one.
const WAIT_FOR_SLOT: Duration = Duration::from_secs(3);
/// A job that this worker still holds goes back for this long.
const STILL_HELD: Duration = Duration::from_secs(1);
/// A message that only a newer release can read goes back for this long.
const TOO_NEW: Duration = Duration::from_secs(5);
/// A job waits for its receiver at most this long past its execution limit: the tracker ends it a little later.
const WAIT_PAST_LIMIT: Duration = Duration::from_secs(5);
/// After the drain, files that are being stored get this long.
const LAST_FILES: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(500);
/// Progress is reported at most this late.
const PROGRESS_DELAY: Duration = Duration::from_millis(100);
const MAX_PROGRESS_BYTES: usize = 64 * 1024;
const MAX_ERROR_BYTES: usize = 64 * 1024;
/// Deliveries handled before the loop looks at anything else.
const BURST: usize = 256;

/// How this endpoint's jobs run.
#[derive(Debug)]
pub(crate) enum Executor {
    Echo {
        slots: usize,
    },
    /// `sleep` and `encoder`.
    Tasks(TaskPool),
    Process(ProcessPool),
}

pub(crate) struct EndpointLoop {
    pub(crate) index: usize,
    pub(crate) name: String,
    pub(crate) shared: Arc<Shared>,
    pub(crate) executor: Executor,
    pub(crate) puller: JobPuller,
    pub(crate) events: mpsc::UnboundedReceiver<ExecEvent>,
    pub(crate) stops: mpsc::UnboundedReceiver<JobKey>,
    pub(crate) ready: Check,
    /// Credits given and not yet used.
    pub(crate) credits: usize,
    pub(crate) preparing: usize,
    pub(crate) waiting: VecDeque<(Instant, Box<Prepared>)>,
    /// Turns files of jobs into artefacts, where the endpoint asks for it.
    pub(crate) keeper: Option<Arc<Keeper>>,
    pub(crate) kept: mpsc::UnboundedReceiver<Kept>,
}

impl EndpointLoop {
    /// Runs until the drain is over.
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        let (prepared_tx, mut prepared) = mpsc::unbounded_channel();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut drain_until: Option<Instant> = None;
        let mut pulling = true;
        loop {
            if drain_until.is_none() {
                self.replenish();
            }
            let room = self.shared.outcomes.has_room();
            tokio::select! {
                delivery = self.puller.next(), if pulling => match delivery {
                    Some(delivery) => {
                        self.delivered(delivery, drain_until.is_some(), &prepared_tx).await;
                        for _ in 0..BURST {
                            let Some(delivery) = self.puller.try_next() else { break };
                            self.delivered(delivery, drain_until.is_some(), &prepared_tx).await;
                        }
                    }
                    None => pulling = false,
                },
                Some(event) = self.events.recv() => self.event(event).await,
                Some(key) = self.stops.recv() => self.stop(key),
                Some(kept) = self.kept.recv() => self.kept(kept, drain_until.is_some()).await,
                Some(ready) = prepared.recv() => {
                    self.preparing = self.preparing.saturating_sub(1);
                    if let Some(ready) = ready {
                        self.begin(ready, drain_until.is_some()).await;
                    }
                }
                () = self.shared.outcomes.changed(), if !room => {}
                _ = tick.tick() => self.tick().await,
                () = shutdown.triggered(), if drain_until.is_none() => {
                    self.puller.stop();
                    drain_until = Some(Instant::now() + self.shared.settings.drain_grace);
                    self.hand_back_waiting(Duration::ZERO).await;
                }
            }
            if let Some(until) = drain_until {
                let idle = self.busy() == 0 && self.keeping() == 0 && self.preparing == 0 && !pulling;
                if idle || Instant::now() >= until {
                    break;
                }
            }
        }
        self.end(&mut prepared, &prepared_tx).await;
    }

    /// Ends the executor and settles everything that it still held.
    async fn end(
        &mut self,
        prepared: &mut mpsc::UnboundedReceiver<Option<Prepared>>,
        prepared_tx: &mpsc::UnboundedSender<Option<Prepared>>,
    ) {
        match &mut self.executor {
            Executor::Echo { .. } => {}
            Executor::Tasks(pool) => pool.end(),
            Executor::Process(pool) => pool.end().await,
        }
        while let Ok(event) = self.events.try_recv() {
            self.event(event).await;
        }
        self.end_keeper().await;
        self.hand_back_waiting(Duration::ZERO).await;
        while let Some(delivery) = self.puller.try_next() {
            self.delivered(delivery, true, prepared_tx).await;
        }
        while self.preparing > 0 {
            let Some(ready) = prepared.recv().await else { break };
            self.preparing -= 1;
            if let Some(ready) = ready {
                self.begin(ready, true).await;
            }
        }
    }

    /// Attempts whose files are being dealt with.
    fn keeping(&self) -> usize {
        self.keeper.as_ref().map_or(0, |keeper| keeper.busy())
    }

    /// Jobs end without their receivers' word; files that are not stored by then are another worker's to make.
    async fn end_keeper(&mut self) {
        let Some(keeper) = self.keeper.clone() else { return };
        keeper.cut_short();
        let end = Instant::now() + LAST_FILES;
        while keeper.busy() > 0 {
            match tokio::time::timeout_at(end.into(), self.kept.recv()).await {
                Ok(Some(kept)) => self.kept(kept, true).await,
                Ok(None) => return,
                Err(_) => break,
            }
        }
        for key in keeper.stop_all() {
            let end = End::HandBack { reason: "the worker is shutting down" };
            self.finish(key, end, 0, Bytes::new()).await;
        }
        while let Ok(kept) = self.kept.try_recv() {
            self.kept(kept, true).await;
        }
    }

    /// An attempt comes back from the keeper.
    async fn kept(&mut self, kept: Kept, draining: bool) {
        match kept {
            Kept::Ended { key, end, execution_ms, logs } => {
                self.finish(key, end, execution_ms, logs).await;
                let released = self.shared.attempts.with(&key, |held| {
                    held.keeping = false;
                    held.released
                });
                if released == Some(true) {
                    self.shared.attempts.remove(&key);
                }
            }
            Kept::Fetched(mut ready) => {
                let Some(held) = self.shared.attempts.remove(&ready.work.key) else { return };
                // A heartbeat may have told of it meanwhile: then its end must be told too.
                ready.granted |= held.known_to_tracker;
                self.begin(*ready, draining).await;
            }
        }
    }

    fn open_slots(&self) -> usize {
        match &self.executor {
            Executor::Echo { slots } => *slots,
            Executor::Tasks(pool) => pool.open_slots(),
            Executor::Process(pool) => pool.open_slots(),
        }
    }

    fn busy(&self) -> usize {
        match &self.executor {
            Executor::Echo { .. } => 0,
            Executor::Tasks(pool) => pool.busy(),
            Executor::Process(pool) => pool.busy(),
        }
    }

    /// Asks for as many messages as there are free slots that nothing is on its way for.
    fn replenish(&mut self) {
        if !self.shared.outcomes.has_room() || self.keeper.as_ref().is_some_and(|keeper| !keeper.has_room()) {
            return;
        }
        let fetching = self.keeper.as_ref().map_or(0, |keeper| keeper.fetching());
        let want = self.open_slots().saturating_sub(self.preparing + self.waiting.len() + fetching);
        if want > self.credits {
            let more = want - self.credits;
            self.puller.add_credits(u32::try_from(more).unwrap_or(u32::MAX));
            self.credits = want;
        }
    }

    async fn delivered(
        &mut self,
        delivery: JobDelivery,
        draining: bool,
        prepared: &mpsc::UnboundedSender<Option<Prepared>>,
    ) {
        fault::point("worker.fetch.after");
        self.credits = self.credits.saturating_sub(1);
        let message = self.shared.streams.message(delivery.acker.clone());
        if draining {
            return message.nak(None).await;
        }
        let incoming = match read(&delivery, message.clone()) {
            Ok(incoming) => incoming,
            Err(ContractError::Version { got }) => {
                tracing::error!(got, "a job message of a newer release; this worker must be updated");
                return message.nak(Some(TOO_NEW)).await;
            }
            Err(error) => {
                tracing::error!(%error, job_id = %delivery.subject.job, "a job message cannot be read; removed");
                return message.term().await;
            }
        };
        if self.shared.attempts.holds(&incoming.job_id) {
            // An earlier attempt of this job still runs here, or its handler is not surely gone.
            return message.nak(Some(STILL_HELD)).await;
        }
        match incoming.direct() {
            Ok(ready) => self.begin(ready, false).await,
            Err(incoming) => {
                self.preparing += 1;
                let (shared, prepared) = (Arc::clone(&self.shared), prepared.clone());
                tokio::spawn(async move {
                    let ready = prepare(shared, incoming).await;
                    // The loop waits for everything that it had prepared.
                    let _ = prepared.send(ready);
                });
            }
        }
    }

    /// Starts a job, or lets it wait for a slot.
    async fn begin(&mut self, ready: Prepared, draining: bool) {
        match ready.refused {
            Some(Refused::Fail(ref error)) => {
                let end =
                    End::Failure { error: error.clone(), error_type: "InputUnreadable".into(), output: None };
                return self.close_unstarted(ready, end).await;
            }
            Some(Refused::HandBack(reason)) => {
                return self.close_unstarted(ready, End::HandBack { reason }).await;
            }
            None if draining => {
                let end = End::HandBack { reason: "the worker is shutting down" };
                return self.close_unstarted(ready, end).await;
            }
            None => {}
        }
        match &self.executor {
            Executor::Echo { .. } => self.echo(ready),
            Executor::Tasks(_) | Executor::Process(_) => self.assign(ready),
        }
    }

    /// The whole life of an echo job, without a task and without a stop in between.
    fn echo(&self, ready: Prepared) {
        let (_span, traceparent) = attempt_span(&ready.work, ready.traceparent);
        let end = End::Success(Some(ready.work.input));
        fault::point("worker.run.after");
        self.count(&ready.work.key, &end);
        if let Some(outcome) = outcome(&ready.work.key, end, now_ms(), 0, Bytes::new(), 0, traceparent) {
            self.shared.outcomes.send(Finished { outcome, message: Some(ready.message), spool_id: None });
        }
    }

    fn assign(&mut self, ready: Prepared) {
        let fetcher = self.keeper.clone().filter(|keeper| keeper.fetches_inputs() && !ready.inputs_fetched);
        let Prepared { work, message, granted, traceparent, refused: _, inputs_fetched } = ready;
        let key = work.key;
        let (span, own_traceparent) = attempt_span(&work, traceparent.clone());
        // Fetching is part of the execution: a granted attempt needs its lease renewed meanwhile.
        let started_at_ms = fetcher.is_some().then(now_ms);
        // Known before it starts: its first event may come at once.
        self.shared.attempts.insert(Held {
            key,
            endpoint: self.index,
            message: Some(message.clone()),
            started_at_ms,
            known_to_tracker: granted,
            chunks: 0,
            progress: None,
            stop_reason: None,
            finished: false,
            keeping: false,
            released: false,
            input: self.input_for_files(&work),
            confirm: self.keeper.is_some().then(|| ConfirmWish::of_members(&work.extra_json)).flatten(),
            span,
            traceparent: own_traceparent,
            timeout: work.timeout,
            last_extended: Instant::now(),
        });
        if let Some(keeper) = fetcher {
            let refused = None;
            return keeper.fetch(Prepared { work, message, granted, traceparent, refused, inputs_fetched });
        }
        let work = match &self.executor {
            Executor::Echo { .. } => return,
            Executor::Tasks(pool) => return pool.assign(work),
            Executor::Process(pool) => match pool.assign(work) {
                Ok(()) => return,
                Err(work) => *work,
            },
        };
        self.shared.attempts.remove(&key);
        let back = Prepared { work, message, granted, traceparent, refused: None, inputs_fetched };
        self.waiting.push_back((Instant::now(), Box::new(back)));
    }

    /// Gives waiting jobs to slots that opened.
    fn place_waiting(&mut self) {
        for _ in 0..self.waiting.len() {
            let Some((since, ready)) = self.waiting.pop_front() else { break };
            let before = self.waiting.len();
            self.assign(*ready);
            if self.waiting.len() > before {
                // Still no slot: it keeps its place and its patience.
                if let Some((_, ready)) = self.waiting.pop_back() {
                    self.waiting.push_front((since, ready));
                }
                break;
            }
        }
    }

    async fn hand_back_waiting(&mut self, patience: Duration) {
        let now = Instant::now();
        while let Some((since, _)) = self.waiting.front() {
            if now.duration_since(*since) < patience {
                break;
            }
            if let Some((_, ready)) = self.waiting.pop_front() {
                self.close_unstarted(*ready, End::HandBack { reason: "no slot is free on this worker" })
                    .await;
            }
        }
    }

    /// Ends an attempt that no executor ever had.
    async fn close_unstarted(&self, ready: Prepared, end: End) {
        if matches!(end, End::HandBack { .. }) && !ready.granted {
            // The tracker never heard of it: the message alone goes back.
            return ready.message.nak(Some(STILL_HELD)).await;
        }
        self.count(&ready.work.key, &end);
        if let Some(outcome) = outcome(&ready.work.key, end, now_ms(), 0, Bytes::new(), 0, ready.traceparent)
        {
            self.shared.outcomes.send(Finished { outcome, message: Some(ready.message), spool_id: None });
        }
    }

    async fn event(&mut self, event: ExecEvent) {
        match event {
            ExecEvent::Started { key } => {
                let at = now_ms();
                self.shared.attempts.with(&key, |held| held.started_at_ms = Some(at));
                self.shared.report_after(key, self.shared.settings.started_report);
            }
            ExecEvent::Progress { key, output } => self.progress(key, output),
            ExecEvent::Chunk { key, output, permit } => {
                if output.len() > MAX_CHUNK_BYTES {
                    return self.oversized_chunk(key, output.len()).await;
                }
                let sent = self.shared.attempts.with(&key, |held| {
                    let n = held.chunks;
                    held.chunks += 1;
                    held.known_to_tracker = true;
                    (n, held.started_at_ms.unwrap_or_else(now_ms))
                });
                if let Some((n, started_at_ms)) = sent {
                    let chunk = OutChunk { key, n, output, started_at_ms, _permit: permit };
                    // The forwarder lives as long as any loop.
                    let _ = self.shared.chunks.send(Item::Chunk(chunk));
                }
            }
            ExecEvent::Finished { key, end, execution_ms, logs } => {
                self.finished(key, end, execution_ms, logs).await;
            }
            ExecEvent::Released { key } => {
                let keeping = self.shared.attempts.with(&key, |held| {
                    held.released = true;
                    held.keeping
                });
                if keeping != Some(true) {
                    self.shared.attempts.remove(&key);
                }
            }
            ExecEvent::Capacity => self.place_waiting(),
        }
    }

    fn progress(&self, key: JobKey, output: Bytes) {
        if output.len() > MAX_PROGRESS_BYTES {
            tracing::warn!(job_id = %key.job, bytes = output.len(), "progress over {MAX_PROGRESS_BYTES} bytes is not passed on");
            return;
        }
        let first = self.shared.attempts.with(&key, |held| held.progress.replace(output).is_none());
        if first == Some(true) {
            self.shared.report_after(key, PROGRESS_DELAY);
        }
    }

    /// A stream with a hole must not look complete.
    async fn oversized_chunk(&mut self, key: JobKey, bytes: usize) {
        let error =
            format!("the handler yielded a chunk of {bytes} bytes; the limit is {MAX_CHUNK_BYTES} bytes");
        let end = End::Failure { error, error_type: "ChunkTooLarge".to_owned(), output: None };
        self.finished(key, end, 0, Bytes::new()).await;
        self.stop(key);
    }

    /// The input of a job, where its files are dealt with by it.
    fn input_for_files(&self, work: &Work) -> Bytes {
        match &self.keeper {
            Some(keeper) if keeper.fetches_inputs() => work.input.clone(),
            Some(_) | None => Bytes::new(),
        }
    }

    /// The executor is done with an attempt: its files come first where there are any, then its end.
    async fn finished(&mut self, key: JobKey, end: End, execution_ms: u64, logs: Bytes) {
        fault::point("worker.run.after");
        match (self.keeper.clone(), end) {
            (Some(keeper), End::Success(Some(output))) => {
                let begun = self.shared.attempts.with(&key, |held| {
                    let first = !held.finished && !std::mem::replace(&mut held.keeping, true);
                    first.then(|| {
                        let began = *held.started_at_ms.get_or_insert_with(now_ms);
                        (began, held.input.clone(), held.confirm, held.timeout)
                    })
                });
                let Some((started_at_ms, input, confirm, timeout)) = begun.flatten() else { return };
                let ran = Duration::from_millis(execution_ms);
                let limit = Instant::now() + timeout.saturating_sub(ran) + WAIT_PAST_LIMIT;
                keeper.keep(FinishedWork {
                    key,
                    output,
                    input,
                    confirm,
                    execution_ms,
                    logs,
                    started_at_ms,
                    limit,
                });
            }
            (_, end) => self.finish(key, end, execution_ms, logs).await,
        }
    }

    async fn finish(&mut self, key: JobKey, end: End, execution_ms: u64, logs: Bytes) {
        let taken = self.shared.attempts.with(&key, |held| {
            if std::mem::replace(&mut held.finished, true) {
                return None;
            }
            held.span = tracing::Span::none();
            let message = held.message.take();
            let traceparent = std::mem::take(&mut held.traceparent);
            Some((
                message,
                held.started_at_ms,
                held.known_to_tracker,
                held.chunks,
                held.stop_reason.take(),
                traceparent,
            ))
        });
        let Some((message, started_at_ms, known, chunks, stop_reason, traceparent)) = taken.flatten() else {
            return;
        };
        self.count(&key, &end);
        match end {
            End::Stopped => return let_go(message, stop_reason.as_deref()).await,
            End::HandBack { .. } if !known => {
                if let Some(message) = message {
                    message.nak(Some(STILL_HELD)).await;
                }
                return;
            }
            End::Success(_)
            | End::Failure { .. }
            | End::Crash { .. }
            | End::Overrun
            | End::HandBack { .. } => {}
        }
        let started_at_ms = started_at_ms.unwrap_or_else(now_ms);
        let Some(outcome) = outcome(&key, end, started_at_ms, execution_ms, logs, chunks, traceparent) else {
            return;
        };
        let finished = Finished { outcome, message, spool_id: None };
        if chunks > 0 {
            // Behind its chunks. The forwarder lives as long as any loop.
            let _ = self.shared.chunks.send(Item::Finished(Box::new(finished)));
        } else {
            self.shared.outcomes.send(finished);
        }
    }

    fn stop(&self, key: JobKey) {
        if self.keeper.as_ref().is_some_and(|keeper| keeper.stop(&key)) {
            return;
        }
        match &self.executor {
            Executor::Echo { .. } => {}
            Executor::Tasks(pool) => pool.stop(key),
            Executor::Process(pool) => pool.stop(key),
        }
    }

    async fn tick(&mut self) {
        self.hand_back_waiting(WAIT_FOR_SLOT).await;
        self.place_waiting();
        let trouble = match &self.executor {
            Executor::Echo { .. } => None,
            Executor::Tasks(pool) => pool.trouble(),
            Executor::Process(pool) => pool.trouble(),
        };
        match &trouble {
            Some(reason) => self.ready.fail(format!("endpoint {}: {reason}", self.name)),
            None => self.ready.ok(),
        }
        let Some(link) = self.shared.endpoints.get(self.index) else { return };
        let busy = self.busy();
        link.busy.store(busy, Ordering::Relaxed);
        *link.trouble.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = trouble.unwrap_or_default();
        metrics::gauge!("ringback_worker_slots_busy", "endpoint" => self.name.clone()).set(busy as f64);
        metrics::gauge!("ringback_worker_slots_open", "endpoint" => self.name.clone())
            .set(self.open_slots() as f64);
    }

    fn count(&self, key: &JobKey, end: &End) {
        let word = word_of(end);
        tracing::debug!(
            job_id = %key.job, run = key.attempt.run, attempt = key.attempt.attempt, end = word, "attempt ended"
        );
        metrics::counter!("ringback_worker_attempts_total", "endpoint" => self.name.clone(), "end" => word)
            .increment(1);
    }
}

/// The end's word in metrics and logs.
fn word_of(end: &End) -> &'static str {
    match end {
        End::Success(_) => "success",
        End::Failure { .. } => "failure",
        End::Crash { .. } => "crash",
        End::Overrun => "overrun",
        End::HandBack { .. } => "handed_back",
        End::Stopped => "stopped",
    }
}

fn read(delivery: &JobDelivery, message: Message) -> Result<Incoming, ContractError> {
    let job = v1::JobMessage::decode(delivery.payload.clone())?;
    read_version(job.version)?;
    let job_id = job_id_of(&job.job_id)?;
    if job.run == 0 {
        return Err(ContractError::Field { field: "run" });
    }
    let expired = job.ttl_at_ms > 0 && job.ttl_at_ms <= now_ms();
    // An expired job is the tracker's to judge.
    let must_ask = job.must_ask || delivery.num_delivered > 1 || expired;
    let traceparent = delivery.traceparent.clone().unwrap_or_else(|| job.traceparent.clone());
    Ok(Incoming { job_id, job, message, traceparent, must_ask })
}

/// What to do with the message of an attempt that was ordered to stop.
async fn let_go(message: Option<Message>, reason: Option<&str>) {
    let Some(message) = message else { return };
    match reason {
        // The run has ended: nothing will ever be done with this message.
        Some(
            "cancel_requested" | "queue_purged" | "batch_cancelled" | "ttl_expired" | "execution_timeout"
            | "succeeded",
        ) => message.ack().await,
        // It may be the job's only message, or another attempt's as well: whoever gets it next asks.
        Some(_) | None => message.nak(Some(STILL_HELD)).await,
    }
}

/// The attempt's span, a child of the job's trace, and what goes on with the outcome. Where the trace is not
/// recorded there is nothing to add to it.
fn attempt_span(work: &Work, traceparent: String) -> (tracing::Span, String) {
    if !trace_context::is_sampled(&traceparent) {
        return (tracing::Span::none(), traceparent);
    }
    let span = tracing::info_span!(
        "attempt",
        job_id = %work.public_id,
        run = work.key.attempt.run,
        attempt = work.key.attempt.attempt
    );
    trace_context::set_parent(&span, Some(&traceparent));
    let own = trace_context::traceparent_of(&span).unwrap_or(traceparent);
    (span, own)
}

/// The message for the tracker; none for a stopped attempt.
fn outcome(
    key: &JobKey,
    end: End,
    started_at_ms: i64,
    execution_ms: u64,
    logs: Bytes,
    chunks: u32,
    traceparent: String,
) -> Option<v1::Outcome> {
    let result = match end {
        End::Success(output) => v1::outcome::Result::Success(v1::Success { output: output.map(payload_of) }),
        End::Failure { error, error_type, output } => v1::outcome::Result::Failure(v1::Failure {
            error: fit_text(&error, MAX_ERROR_BYTES),
            error_type: fit_text(&error_type, 1024),
            output: output.map(payload_of),
        }),
        End::Crash { error } => {
            v1::outcome::Result::Crash(v1::Crash { error: fit_text(&error, MAX_ERROR_BYTES) })
        }
        End::Overrun => v1::outcome::Result::Overrun(v1::Overrun {}),
        End::HandBack { reason } => v1::outcome::Result::HandBack(v1::HandBack { reason: reason.to_owned() }),
        End::Stopped => return None,
    };
    Some(v1::Outcome {
        attempt: Some(attempt_to_wire(&key.job, &key.attempt)),
        result: Some(result),
        started_at_ms,
        execution_ms,
        logs: (!logs.is_empty()).then(|| payload_of(logs)),
        chunks,
        traceparent,
        completion: None,
    })
}
