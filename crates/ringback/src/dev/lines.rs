//! One line per transition: for people with a limit on lines per second, as JSON lines without one.

use crate::ui::style::Style;
use crate::ui::when;
use ringback_contracts::v1::{TransitionEvent, TransitionEvents};
use ringback_domain::{BatchId, JobId, JobStatus};
use std::collections::HashMap;
use std::io::Write;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Nobody reads faster; what is beyond is summed up.
const LINES_PER_SECOND: u32 = 40;
const SECOND: Duration = Duration::from_secs(1);
/// Commits that may wait for a slow terminal. Beyond that they are counted, not shown.
const WAITING: usize = 512;

/// Where transitions go. A terminal that is held never holds a service.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    queue: SyncSender<TransitionEvents>,
}

/// How the lines look.
#[derive(Debug)]
pub(crate) struct Look {
    /// JSON lines instead of text.
    pub(crate) json: bool,
    /// Names of endpoints by their key.
    pub(crate) endpoints: HashMap<i64, String>,
}

impl Lines {
    /// Starts the writer on its own thread; it ends with the last sender or when standard output is closed.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub(crate) fn start(look: Look) -> std::io::Result<Self> {
        let (queue, waiting) = sync_channel(WAITING);
        std::thread::Builder::new().name("lines".to_owned()).spawn(move || {
            // Standard output is gone: nobody wants lines any more.
            let _ = Writer::new(look, std::io::stdout()).run(&waiting);
        })?;
        Ok(Self { queue })
    }

    /// Takes the transitions of one commit. False when nobody reads any more.
    pub(crate) fn push(&self, events: TransitionEvents) -> bool {
        match self.queue.try_send(events) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                metrics::counter!("ringback_dev_lines_dropped_total").increment(1);
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        }
    }
}

struct Writer<W> {
    look: Look,
    style: Style,
    width: usize,
    out: W,
    second: Instant,
    shown: u32,
    hidden: [u64; JobStatus::ALL.len()],
}

impl<W: Write> Writer<W> {
    fn new(look: Look, out: W) -> Self {
        let width = look.endpoints.values().map(|name| name.chars().count()).max().unwrap_or(0).min(24);
        Self { look, style: Style::stdout(), width, out, second: Instant::now(), shown: 0, hidden: [0; 6] }
    }

    fn run(mut self, waiting: &Receiver<TransitionEvents>) -> std::io::Result<()> {
        loop {
            match waiting.recv_timeout(SECOND) {
                Ok(commit) => {
                    for event in &commit.events {
                        self.take(event)?;
                    }
                    self.out.flush()?;
                }
                Err(RecvTimeoutError::Timeout) => self.sum_up()?,
                Err(RecvTimeoutError::Disconnected) => return self.sum_up(),
            }
        }
    }

    fn take(&mut self, event: &TransitionEvent) -> std::io::Result<()> {
        let Some(status) = JobStatus::from_code(i64::from(event.status)) else { return Ok(()) };
        if self.look.json {
            return writeln!(self.out, "{}", self.json_line(event, status));
        }
        if self.second.elapsed() >= SECOND {
            self.sum_up()?;
        }
        if self.shown >= LINES_PER_SECOND {
            self.hidden[usize::from(status.code())] += 1;
            return Ok(());
        }
        self.shown += 1;
        let line = self.line(event, status);
        writeln!(self.out, "{line}")
    }

    fn sum_up(&mut self) -> std::io::Result<()> {
        (self.second, self.shown) = (Instant::now(), 0);
        let hidden = std::mem::take(&mut self.hidden);
        let total: u64 = hidden.iter().sum();
        if total == 0 {
            return Ok(());
        }
        let parts: Vec<String> = JobStatus::ALL
            .into_iter()
            .zip(hidden)
            .filter(|(_, count)| *count > 0)
            .map(|(status, count)| format!("{count} {status}"))
            .collect();
        let line = format!("              … {total} more: {}", parts.join(", "));
        writeln!(self.out, "{}", self.style.dim(&line))?;
        self.out.flush()
    }

    fn endpoint(&self, event: &TransitionEvent) -> &str {
        self.look.endpoints.get(&event.endpoint_id).map_or("?", String::as_str)
    }

    fn line(&self, event: &TransitionEvent, status: JobStatus) -> String {
        let mut line = format!(
            "{}  {}  {:<width$}  {}",
            self.style.dim(&when::clock_ms(event.at_ms)),
            self.style.status(status, &format!("{:<11}", status.as_str())),
            self.endpoint(event),
            job_id(event),
            width = self.width,
        );
        if event.run > 1 {
            line.push_str(&format!("  run {}", event.run));
        }
        if status == JobStatus::InProgress && event.attempt > 1 {
            line.push_str(&format!("  attempt {}", event.attempt));
        }
        if status.is_terminal() {
            let times = format!(
                "waited {}, ran {}",
                when::duration_ms(event.delay_ms),
                when::duration_ms(event.execution_ms)
            );
            line.push_str(&format!("  {}", self.style.dim(&times)));
        }
        line
    }

    fn json_line(&self, event: &TransitionEvent, status: JobStatus) -> serde_json::Value {
        serde_json::json!({
            "event": "transition",
            "job_id": job_id(event),
            "endpoint": self.endpoint(event),
            "status": status.as_str(),
            "seq": event.seq,
            "run": event.run,
            "attempt": event.attempt,
            "at_ms": event.at_ms,
            "delay_time_ms": event.delay_ms,
            "execution_time_ms": event.execution_ms,
            "batch_id": BatchId::from_slice(&event.batch_id).ok().map(|id| id.to_string()),
        })
    }
}

fn job_id(event: &TransitionEvent) -> String {
    JobId::from_slice(&event.job_id).map_or_else(|_| "?".to_owned(), |id| id.public(event.sync_id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(status: JobStatus) -> TransitionEvent {
        TransitionEvent {
            job_id: JobId::from_parts(1, [7; 10]).as_bytes().to_vec().into(),
            endpoint_id: 4,
            status: u32::from(status.code()),
            at_ms: 951_825_600_250,
            run: 1,
            attempt: 1,
            delay_ms: 3,
            execution_ms: 1_240,
            ..TransitionEvent::default()
        }
    }

    fn written(json: bool, events: &[TransitionEvent]) -> Vec<String> {
        let mut out = Vec::new();
        let endpoints = HashMap::from([(4, "echo".to_owned()), (5, "longer".to_owned())]);
        let mut writer = Writer::new(Look { json, endpoints }, &mut out);
        for event in events {
            writer.take(event).unwrap();
        }
        writer.sum_up().unwrap();
        String::from_utf8(out).unwrap().lines().map(ToOwned::to_owned).collect()
    }

    #[test]
    fn a_line_tells_when_what_where_and_how_long() {
        let lines = written(false, &[event(JobStatus::InQueue), event(JobStatus::Completed)]);
        assert!(lines[0].starts_with("12:00:00.250  IN_QUEUE     echo    00000000-0001-7"), "{}", lines[0]);
        assert!(lines[1].ends_with("waited 3 ms, ran 1.24 s"), "{}", lines[1]);
    }

    #[test]
    fn a_flood_is_summed_up_for_people_and_whole_for_programs() {
        let flood = vec![event(JobStatus::Completed); 100];
        let lines = written(false, &flood);
        assert_eq!(lines.len(), 41);
        assert_eq!(lines[40].trim(), "… 60 more: 60 COMPLETED");
        assert_eq!(written(true, &flood).len(), 100);
    }
}
