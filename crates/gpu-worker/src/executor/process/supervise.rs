//! The life of one place: start a child, watch it, settle its jobs when it ends, start the next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ringback_worker_protocol::{ChildEvent, ErrorKind, HandlerResult, SdkVersion, StopOutcome, Unfinished};
use tokio::sync::mpsc;

use super::breaker::Breaker;
use super::exit::Exit;
use super::lines::{Attribution, Line, LineReader, Stream, Tail, attribute};
use super::place::{Place, Stop};
use super::spawn::{ChildProcess, GUARD_PATIENCE, Started, start};
use crate::executor::{End, ExecEvent};

/// The first SDK with a stop channel.
const STOP_CHANNEL_SINCE: SdkVersion = SdkVersion { major: 1, minor: 10, patch: 0 };
/// A job that the child does not take within this time is taken back: it hangs, or it no longer asks.
const UNTAKEN: Duration = Duration::from_secs(10);
/// A child that spins while it is idle is stopped this long after its take arrived, when its answer to an earlier take
/// has surely been dealt with.
const PAUSE_AFTER_TAKE: Duration = Duration::from_millis(50);
/// The same after a job: the next one often follows at once, and threads of the handler may still tidy up.
const PAUSE_AFTER_JOB: Duration = Duration::from_secs(1);
/// After the end of the process, what it wrote is read for at most this long.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Keeps a child in this place until the pool ends.
pub(super) async fn run(place: Arc<Place>) {
    let mut breaker = Breaker::default();
    tokio::select! {
        () = place.needed() => {}
        () = place.ending.cancelled() => return,
    }
    while !place.ending.is_cancelled() {
        let began = Instant::now();
        let pause = match start(&place) {
            Ok(started) => Watch::new(&place, started).run(&mut breaker).await,
            Err(reason) => {
                tracing::error!(endpoint = %place.settings.endpoint, reason, "cannot start the handler");
                breaker.failed(began, false, reason)
            }
        };
        place.state().trouble = breaker.trouble();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = place.ending.cancelled() => {}
        }
    }
}

/// Why the worker ends a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The worker ends.
    Shutdown,
    /// The handler asked for a fresh process.
    Refresh,
    /// A job must stop and the child did not stop it by itself.
    StopJob,
    /// The SDK's own check failed.
    Unhealthy,
    /// It did not speak in time.
    StartTimeout,
}

struct EndingChild {
    why: Why,
    /// When SIGKILL follows SIGTERM, then when the group is killed without its guard.
    next: Instant,
    killed: bool,
}

/// The watch over one child.
struct Watch<'a> {
    place: &'a Place,
    process: ChildProcess,
    events: mpsc::UnboundedReceiver<ChildEvent>,
    lines: LineReader,
    tail: Tail,
    sdk: Option<SdkVersion>,
    contacted: bool,
    useful: bool,
    ending: Option<EndingChild>,
}

impl<'a> Watch<'a> {
    fn new(place: &'a Place, started: Started) -> Self {
        place.state().child = Some(started.handle);
        Self {
            place,
            process: started.process,
            events: started.events,
            lines: started.lines,
            tail: Tail::default(),
            sdk: None,
            contacted: false,
            useful: false,
            ending: None,
        }
    }

    /// Watches until the process has ended; returns the pause before the next start.
    async fn run(mut self, breaker: &mut Breaker) -> Duration {
        loop {
            let deadline = self.next_deadline();
            let ending_noticed = self.ending.is_some();
            tokio::select! {
                line = self.lines.next() => self.line(&line),
                Some(event) = self.events.recv() => {
                    self.event(event);
                    if self.useful {
                        breaker.succeeded();
                        self.place.state().trouble = None;
                    }
                }
                () = self.process.ended() => break,
                () = self.place.wake.notified() => {}
                () = self.place.ending.cancelled(), if !ending_noticed => self.end(Why::Shutdown),
                () = sleep_until(deadline) => {}
            }
            self.tick();
        }
        self.last_lines().await;
        let exit = self.process.exit(&self.tail);
        self.settle(&exit);
        self.pause(breaker, &exit)
    }

    fn pause(&self, breaker: &mut Breaker, exit: &Exit) -> Duration {
        let endpoint = &self.place.settings.endpoint;
        match self.ending.as_ref().map(|ending| ending.why) {
            Some(Why::Shutdown | Why::Refresh | Why::StopJob) => {
                tracing::info!(endpoint, "the handler's process has ended as asked");
                Duration::ZERO
            }
            Some(Why::StartTimeout) => {
                let limit = self.place.settings.start_timeout;
                breaker.failed(
                    self.process.started,
                    false,
                    format!("it did not ask for jobs within {limit:?}"),
                )
            }
            Some(Why::Unhealthy) | None => {
                tracing::warn!(endpoint, reason = exit.short(), "the handler's process has ended");
                breaker.failed(self.process.started, self.useful, exit.short())
            }
        }
    }

    fn line(&mut self, line: &Line) {
        let endpoint = &self.place.settings.endpoint;
        tracing::debug!(endpoint, stream = ?line.stream, text = line.text, "handler");
        if line.stream == Stream::Err {
            self.tail.push(&line.text);
        }
        let mut state = self.place.state();
        match attribute(&line.text) {
            Attribution::Job { job, text } => {
                if let Some(running) = state.jobs.get_mut(&job) {
                    running.log.push(line.stream, &text);
                    // The SDK's word that a stopped handler is gone, earlier than its next take tells.
                    if running.stop != Stop::No && text == "INFO Job stopped." {
                        if let Some(child) = &state.child {
                            child.forget(&job);
                        }
                        self.place.release(&mut state, &job, End::Stopped);
                    }
                }
            }
            Attribution::Handler(text) => {
                // With several jobs at once nobody knows whose line it is, and it may be private.
                if state.jobs.len() == 1 {
                    for running in state.jobs.values_mut() {
                        running.log.push(line.stream, &text);
                    }
                }
            }
            Attribution::Sdk => {}
        }
    }

    fn ready_lines(&mut self) {
        for line in self.lines.take_ready() {
            self.line(&line);
        }
    }

    async fn last_lines(&mut self) {
        let end = Instant::now() + LAST_LINES;
        while !self.lines.ended() {
            let Ok(line) = tokio::time::timeout_at(end.into(), self.lines.next()).await else { break };
            self.line(&line);
        }
    }

    fn event(&mut self, event: ChildEvent) {
        match event {
            ChildEvent::FirstContact { sdk } => {
                self.contacted = true;
                self.sdk = sdk;
                let sdk = sdk.map(|sdk| sdk.to_string()).unwrap_or_default();
                tracing::info!(endpoint = %self.place.settings.endpoint, sdk, "the handler is up");
                self.place.tell(ExecEvent::Capacity);
            }
            ChildEvent::Ready { size, holds } => {
                self.place.asks(size + holds);
                self.place.tell(ExecEvent::Capacity);
            }
            // The loop looks at the child after each event.
            ChildEvent::TakeOver => {}
            ChildEvent::Taken { job } => self.taken(&job),
            ChildEvent::Result { job, result } => self.result(&job, result),
            ChildEvent::Progress { job, output } => {
                if let Some(key) = self.live(&job) {
                    self.place.tell(ExecEvent::Progress { key, output });
                }
            }
            ChildEvent::Chunk { job, output, permit } => {
                if let Some(key) = self.live(&job) {
                    self.place.tell(ExecEvent::Chunk { key, output, permit });
                }
            }
            // Pings come from another process and lag: they prove nothing either way.
            ChildEvent::Ping { .. } => {}
            ChildEvent::Unhealthy(unhealthy) => {
                let (check, reason) = (unhealthy.check, unhealthy.reason);
                tracing::error!(endpoint = %self.place.settings.endpoint, check, reason, "the SDK's check failed");
                self.tail.push(&format!("{check}: {reason}"));
                self.end(Why::Unhealthy);
            }
            ChildEvent::Lost { jobs } => self.lost(&jobs),
            ChildEvent::StopPodRequested { unstarted } => {
                self.hand_back(&unstarted);
                self.end(Why::Refresh);
            }
            ChildEvent::WrongKey => {
                let reason = "the handler sends another key than its own: remove ~/.runpod/config.toml from its \
                              home folder, or set HOME for this endpoint";
                tracing::error!(endpoint = %self.place.settings.endpoint, reason);
                self.place.state().trouble = Some(reason.to_owned());
            }
        }
    }

    fn taken(&mut self, job: &str) {
        if let Some(running) = self.place.state().jobs.get_mut(job) {
            running.started = Some(Instant::now());
            self.place.tell(ExecEvent::Started { key: running.key });
        }
    }

    /// The attempt of a job that may still say something.
    fn live(&self, job: &str) -> Option<crate::executor::JobKey> {
        let state = self.place.state();
        state.jobs.get(job).filter(|running| !running.reported).map(|running| running.key)
    }

    fn result(&mut self, job: &str, result: HandlerResult) {
        // What the handler wrote before it returned is in the pipe by now.
        self.ready_lines();
        self.useful = true;
        let end = end_of(result);
        self.place.release(&mut self.place.state(), job, end);
    }

    /// The child holds nothing, and these results will never come.
    fn lost(&mut self, jobs: &[String]) {
        self.ready_lines();
        let mut state = self.place.state();
        for job in jobs {
            let Some(running) = state.jobs.get(job) else { continue };
            let end = if running.stop == Stop::No {
                End::Failure {
                    error: "the handler finished this job without posting a result; most often its output cannot be \
                            serialised to JSON. The job's log has the SDK's message"
                        .to_owned(),
                    error_type: "ResultNotPosted".to_owned(),
                    output: None,
                }
            } else {
                End::Stopped
            };
            self.place.release(&mut state, job, end);
        }
    }

    fn hand_back(&self, jobs: &[String]) {
        let mut state = self.place.state();
        for job in jobs {
            self.place.release(&mut state, job, End::HandBack { reason: "the handler's process is ending" });
        }
    }

    /// Ends the child: no more jobs, SIGTERM now, SIGKILL after the grace.
    fn end(&mut self, why: Why) {
        if self.ending.is_some() {
            return;
        }
        let next = Instant::now() + self.place.settings.kill_grace;
        self.ending = Some(EndingChild { why, next, killed: false });
        // SIGTERM before the polls end: the SDK looks for it right after a poll.
        self.process.terminate();
        let unstarted = self.place.state().child.as_ref().map(|child| child.drain()).unwrap_or_default();
        self.hand_back(&unstarted);
    }

    /// Everything that depends on time.
    fn tick(&mut self) {
        let now = Instant::now();
        self.enforce_limits(now);
        self.take_back(now);
        if self.stop_jobs(now) {
            self.end(Why::StopJob);
        }
        if !self.contacted
            && self.ending.is_none()
            && now >= self.process.started + self.place.settings.start_timeout
        {
            self.end(Why::StartTimeout);
        }
        let paused = self.pause_at().is_some_and(|at| now >= at);
        self.process.pause(paused);
        if let Some(ending) = &mut self.ending
            && now >= ending.next
        {
            if ending.killed {
                self.process.kill_group();
            } else {
                self.process.kill();
            }
            ending.killed = true;
            ending.next = now + GUARD_PATIENCE;
        }
    }

    /// When this child is to be stopped until a job comes; `None` while it has something to do. An SDK that spins
    /// takes the CPU from whatever the host shall do, and from the platform first.
    fn pause_at(&self) -> Option<Instant> {
        if !self.place.settings.pause_idle || self.ending.is_some() {
            return None;
        }
        let state = self.place.state();
        let child = state.child.as_ref()?;
        // The first contact may have been a ping, which does not tell the version.
        if !child.sdk().or(self.sdk).is_some_and(SdkVersion::spins_while_idle) {
            return None;
        }
        let idle = child.idle()?;
        let after_take = idle.waiting_since + PAUSE_AFTER_TAKE;
        Some(idle.last_job_ended.map_or(after_take, |at| after_take.max(at + PAUSE_AFTER_JOB)))
    }

    /// Jobs over their limit are reported at once and stopped.
    fn enforce_limits(&self, now: Instant) {
        let mut state = self.place.state();
        for running in state.jobs.values_mut() {
            if running.started.is_some_and(|at| now >= at + running.timeout) && !running.reported {
                self.place.report(running, End::Overrun);
                running.stop = if running.stop == Stop::No { Stop::Wanted } else { running.stop };
            }
        }
    }

    /// Jobs that the child does not fetch run elsewhere.
    fn take_back(&self, now: Instant) {
        let mut state = self.place.state();
        let state = &mut *state;
        let Some(child) = &state.child else { return };
        let untaken: Vec<String> = state
            .jobs
            .iter()
            .filter(|(_, running)| running.started.is_none() && now >= running.assigned + UNTAKEN)
            .filter(|(id, _)| child.stop(id) == StopOutcome::NeverStarted)
            .map(|(id, _)| id.clone())
            .collect();
        for id in untaken {
            self.place.release(state, &id, End::HandBack { reason: "the handler did not ask for it" });
        }
    }

    /// Tells the child what to stop; true when a job did not stop in time.
    fn stop_jobs(&self, now: Instant) -> bool {
        let mut state = self.place.state();
        let state = &mut *state;
        let Some(child) = &state.child else { return false };
        let sdk = child.sdk().or(self.sdk);
        let mut overdue = false;
        let mut never_started = Vec::new();
        for (id, running) in &mut state.jobs {
            match running.stop {
                Stop::No => {}
                Stop::Wanted => {
                    let grace = match child.stop(id) {
                        StopOutcome::NeverStarted => {
                            never_started.push(id.clone());
                            continue;
                        }
                        // A handler that fails a chunk or was forgotten: only its process can be stopped.
                        StopOutcome::Unknown => Duration::ZERO,
                        StopOutcome::Signalled { listening } => {
                            let hears = listening || sdk.is_some_and(|sdk| sdk >= STOP_CHANNEL_SINCE);
                            if hears { self.place.settings.stop_grace } else { Duration::ZERO }
                        }
                    };
                    running.stop = Stop::Told(now + grace);
                    overdue |= grace.is_zero();
                }
                Stop::Told(until) => overdue |= now >= until,
            }
        }
        for id in never_started {
            self.place.release(state, &id, End::Stopped);
        }
        overdue
    }

    fn next_deadline(&self) -> Option<Instant> {
        let pause = self.pause_at().filter(|_| !self.process.is_paused());
        let state = self.place.state();
        let jobs = state.jobs.values().filter_map(|running| match running.stop {
            Stop::Told(until) if self.ending.is_none() => Some(until),
            _ if running.reported => None,
            _ => Some(running.started.map_or(running.assigned + UNTAKEN, |at| at + running.timeout)),
        });
        let ending = self.ending.as_ref().map(|ending| ending.next);
        let start = (!self.contacted && self.ending.is_none())
            .then(|| self.process.started + self.place.settings.start_timeout);
        jobs.chain(ending).chain(start).chain(pause).min()
    }

    /// The process is gone: every job that it held ends.
    fn settle(&mut self, exit: &Exit) {
        // Results that were posted before the end count.
        while let Ok(event) = self.events.try_recv() {
            self.event(event);
        }
        let mut state = self.place.state();
        let unfinished = state.child.take().map(|child| child.close()).unwrap_or_default();
        for Unfinished { job, taken } in unfinished {
            let Some(running) = state.jobs.get(&job) else { continue };
            let end = match (running.stop, taken, self.ending.as_ref().map(|ending| ending.why)) {
                (Stop::Wanted | Stop::Told(_), ..) => End::Stopped,
                (Stop::No, false, _) => {
                    End::HandBack { reason: "the handler's process ended before it took the job" }
                }
                (Stop::No, true, Some(Why::Shutdown)) => {
                    End::HandBack { reason: "the worker is shutting down" }
                }
                (Stop::No, true, Some(Why::StopJob)) => {
                    End::HandBack { reason: "another job of the same process had to be stopped" }
                }
                (Stop::No, true, Some(Why::Refresh)) => {
                    End::HandBack { reason: "the handler asked for a fresh process" }
                }
                (Stop::No, true, Some(Why::Unhealthy | Why::StartTimeout) | None) => {
                    End::Crash { error: exit.job_error() }
                }
            };
            self.place.release(&mut state, &job, end);
        }
        // What the hub no longer knew: reported attempts that only waited for their process to end.
        let rest: Vec<String> = state.jobs.keys().cloned().collect();
        for job in rest {
            self.place.release(&mut state, &job, End::Stopped);
        }
        drop(state);
        self.place.tell(ExecEvent::Capacity);
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn end_of(result: HandlerResult) -> End {
    let Some(error) = result.error else {
        // The SDK leaves out an output that is `{}`, and nothing else.
        return End::Success(Some(result.output.unwrap_or_else(|| Bytes::from_static(b"{}"))));
    };
    let error_type = match error.kind {
        ErrorKind::Returned => String::new(),
        ErrorKind::Exception { error_type, .. } => error_type,
        ErrorKind::Unreadable => "ResultNotJson".to_owned(),
        ErrorKind::TooLarge => "ResultTooLarge".to_owned(),
    };
    End::Failure { error: error.text, error_type, output: result.output }
}
