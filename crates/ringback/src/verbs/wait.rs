//! Waiting for a job or a batch: live by the event stream, checked by reads, patient with a server that restarts.

use super::{Context, batch_path, job_path};
use crate::client::model::{Batch, HistoryEntry, Job, Transition};
use crate::client::sse::Events;
use crate::client::{Api, Body, encode};
use crate::error::CliError;
use crate::ui::progress::Progress;
use crate::ui::style::Style;
use crate::ui::{clean, when};
use std::cell::RefCell;
use std::future::Future;
use std::time::{Duration, Instant};

/// Time between reads while events come.
const READ_EVERY: Duration = Duration::from_secs(5);
/// Time between reads without an event stream.
const READ_BLIND: Duration = Duration::from_secs(1);
/// Least time between two reads of a batch.
const BATCH_PAUSE: Duration = Duration::from_millis(200);
/// How long a server may be away while it is waited for.
const AWAY_LIMIT: Duration = Duration::from_secs(60);

/// Flags of verbs that can wait.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct TimeoutArgs {
    /// Stop waiting after this time, for example 30s or 5m; the job goes on (exit code 7)
    #[arg(long, value_name = "TIME", value_parser = when::parse_span_ms)]
    pub(crate) timeout: Option<u64>,
}

/// What to print while waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// Lines and progress on standard error.
    People,
    /// Every transition as a JSON line on standard output.
    JsonLines,
    /// Nothing.
    Silent,
}

impl Report {
    /// For verbs that print one object at the end.
    pub(crate) fn of_progress(ctx: &Context) -> Self {
        if ctx.quiet { Self::Silent } else { Self::People }
    }
}

/// Waits until a job has ended; gives its last state.
pub(crate) async fn job(
    ctx: &Context,
    id: &str,
    timeout: TimeoutArgs,
    report: Report,
) -> Result<(Job, Body), CliError> {
    let progress = Progress::spinner(report != Report::People);
    let status = RefCell::new("unknown".to_owned());
    let outcome = bounded(id, timeout, &status, follow_job(&ctx.api, id, &progress, &status, report)).await;
    progress.clear();
    outcome
}

/// Waits until a batch has ended; gives its last state.
pub(crate) async fn batch(
    ctx: &Context,
    id: &str,
    timeout: TimeoutArgs,
    report: Report,
) -> Result<(Batch, Body), CliError> {
    let progress = Progress::bar(0, report != Report::People);
    let status = RefCell::new("unknown".to_owned());
    let outcome = bounded(id, timeout, &status, follow_batch(&ctx.api, id, &progress, &status, report)).await;
    progress.clear();
    outcome
}

async fn bounded<T>(
    id: &str,
    timeout: TimeoutArgs,
    status: &RefCell<String>,
    work: impl Future<Output = Result<T, CliError>>,
) -> Result<T, CliError> {
    let limit = async {
        match timeout.timeout {
            Some(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
            None => std::future::pending().await,
        }
        timeout.timeout.unwrap_or_default()
    };
    tokio::select! {
        done = work => done,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            Err(CliError::Interrupted { id: id.to_owned() })
        }
        ms = limit => Err(CliError::StillRunning {
            id: id.to_owned(),
            status: status.borrow().clone(),
            seconds: Duration::from_millis(ms).as_secs_f64(),
        }),
    }
}

async fn follow_job(
    api: &Api,
    id: &str,
    progress: &Progress,
    status: &RefCell<String>,
    report: Report,
) -> Result<(Job, Body), CliError> {
    let mut feed = Feed::open(api, format!("/v1/stream?job={}", encode(id))).await;
    let mut reader = Reader::new(api, job_path(id));
    let mut shown = 0;
    loop {
        if let Some(body) = reader.read(progress).await? {
            let job: Job = body.read()?;
            for entry in job.history.iter().skip(shown) {
                show_entry(id, entry, progress, report)?;
            }
            shown = shown.max(job.history.len());
            status.replace(job.status.clone());
            progress.text(format!("{} {}", short(id), job.status));
            if job.has_ended() {
                return Ok((job, body));
            }
        }
        while let Some(transition) = feed.next(READ_EVERY).await {
            if transition.job_id == id {
                break;
            }
        }
    }
}

fn show_entry(id: &str, entry: &HistoryEntry, progress: &Progress, report: Report) -> Result<(), CliError> {
    match report {
        Report::Silent => {}
        Report::People => {
            let style = Style::stderr();
            let mut line = format!(
                "{}  {}",
                style.dim(&when::clock(&entry.at)),
                style.status_word(&format!("{:<11}", entry.status))
            );
            if entry.run > 1 {
                line.push_str(&format!("  run {}", entry.run));
            }
            if let Some(attempt) =
                entry.attempt.filter(|&attempt| attempt > 0 && entry.status == "IN_PROGRESS")
            {
                line.push_str(&format!("  attempt {attempt}"));
            }
            if let Some(reason) = &entry.reason {
                line.push_str(&format!("  {}", style.dim(&clean(reason))));
            }
            progress.line(line.trim_end());
        }
        Report::JsonLines => {
            let line = serde_json::json!({
                "job_id": id, "status": entry.status, "run": entry.run, "attempt": entry.attempt, "at": entry.at,
                "reason": entry.reason,
            });
            crate::ui::out(&line.to_string())?;
        }
    }
    Ok(())
}

async fn follow_batch(
    api: &Api,
    id: &str,
    progress: &Progress,
    status: &RefCell<String>,
    report: Report,
) -> Result<(Batch, Body), CliError> {
    let mut feed = Feed::open(api, format!("/v1/stream?batch={}", encode(id))).await;
    let mut reader = Reader::new(api, batch_path(id));
    let mut ended = None;
    loop {
        if let Some(body) = reader.read(progress).await? {
            let batch: Batch = body.read()?;
            if ended != Some(batch.ended()) {
                ended = Some(batch.ended());
                progress.length(batch.total);
                progress.at(batch.ended());
                progress.text(counts(&batch, Style::stderr()));
                progress.plain_line(&format!(
                    "{}/{}  {}",
                    batch.ended(),
                    batch.total,
                    counts(&batch, Style::stderr())
                ));
                if report == Report::JsonLines {
                    crate::ui::out(&body.text)?;
                }
            }
            status.replace(format!("{} ({} of {} ended)", batch.status, batch.ended(), batch.total));
            if batch.has_ended() {
                return Ok((batch, body));
            }
        }
        let began = Instant::now();
        let _ = feed.next(READ_EVERY).await;
        // Hundreds of events may come at once; one read tells them all.
        tokio::time::sleep(BATCH_PAUSE.saturating_sub(began.elapsed())).await;
        feed.drain().await;
    }
}

/// Counts of a batch for people.
pub(crate) fn counts(batch: &Batch, style: Style) -> String {
    let mut out = style.green(&format!("{} completed", batch.completed));
    if batch.failed > 0 {
        out.push_str(&format!(", {}", style.red(&format!("{} failed", batch.failed))));
    }
    if batch.cancelled > 0 {
        out.push_str(&format!(", {}", style.yellow(&format!("{} cancelled", batch.cancelled))));
    }
    out
}

/// The end of an id: its beginning is the time and much alike.
pub(crate) fn short(id: &str) -> &str {
    id.get(id.len().saturating_sub(12)..).unwrap_or(id)
}

/// Reads one resource; forgives a server that is away for a while, once it was there.
struct Reader<'a> {
    api: &'a Api,
    path: String,
    seen: bool,
    away_since: Option<Instant>,
}

impl<'a> Reader<'a> {
    fn new(api: &'a Api, path: String) -> Self {
        Self { api, path, seen: false, away_since: None }
    }

    async fn read(&mut self, progress: &Progress) -> Result<Option<Body>, CliError> {
        match self.api.get(&self.path).await {
            Ok(body) => {
                (self.seen, self.away_since) = (true, None);
                Ok(Some(body))
            }
            Err(error) if self.seen && error.exit() == crate::exit::Exit::Unreachable => {
                let since = *self.away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > AWAY_LIMIT {
                    return Err(error);
                }
                progress.text(format!("no answer for {:.0} s, trying again", since.elapsed().as_secs_f64()));
                tokio::time::sleep(READ_BLIND).await;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// The event stream, opened again when it breaks. Only a hint when to read.
struct Feed<'a> {
    api: &'a Api,
    path: String,
    events: Option<Events>,
}

impl<'a> Feed<'a> {
    async fn open(api: &'a Api, path: String) -> Self {
        let events = Events::open(api, &path).await.ok();
        Self { api, path, events }
    }

    /// The next transition; `None` after `wait`, or when it is time to read because the stream was away.
    async fn next(&mut self, wait: Duration) -> Option<Transition> {
        let Some(events) = &mut self.events else {
            tokio::time::sleep(READ_BLIND).await;
            // What happened while it was away is in the read that follows.
            self.events = Events::open(self.api, &self.path).await.ok();
            return None;
        };
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            match tokio::time::timeout_at(deadline, events.next()).await {
                Err(_) => return None,
                Ok(Some(text)) => {
                    // Events of other kinds may share the stream.
                    if let Ok(transition) = serde_json::from_str(&text) {
                        return Some(transition);
                    }
                }
                Ok(None) => {
                    self.events = None;
                    return None;
                }
            }
        }
    }

    /// Takes what has already come.
    async fn drain(&mut self) {
        while let Some(events) = &mut self.events {
            match tokio::time::timeout(Duration::ZERO, events.next()).await {
                Ok(Some(_)) => {}
                Ok(None) => self.events = None,
                Err(_) => return,
            }
        }
    }
}
