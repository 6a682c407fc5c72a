//! `builtin = "sleep"`: waits `input.seconds`, then returns its input.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use serde::Deserialize;

use super::tasks::Run;
use super::{End, Work};

/// Longest sleep: a year, as the longest execution limit.
const MAX_SECONDS: f64 = 366.0 * 86_400.0;

/// The engine, such as it is.
#[derive(Debug)]
pub(crate) struct Sleep;

impl Run for Sleep {
    fn run(self: Arc<Self>, work: Work) -> BoxFuture<'static, End> {
        Box::pin(sleep(work))
    }
}

async fn sleep(work: Work) -> End {
    #[derive(Deserialize)]
    struct Input {
        seconds: f64,
    }
    let asked = serde_json::from_slice::<Input>(&work.input).map(|input| input.seconds);
    let Some(seconds) = asked.ok().filter(|seconds| (0.0..=MAX_SECONDS).contains(seconds)) else {
        return End::bad_input(format!("input.seconds must be a number from 0 to {MAX_SECONDS}"));
    };
    let wanted = Duration::from_secs_f64(seconds);
    tokio::time::sleep(wanted.min(work.timeout)).await;
    if wanted > work.timeout { End::Overrun } else { End::Success(Some(work.input)) }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use ringback_domain::{AttemptRef, JobId, Nonce};
    use tokio::sync::mpsc;

    use super::*;
    use crate::executor::tasks::TaskPool;
    use crate::executor::{ExecEvent, JobKey};

    fn work(input: &str, timeout: Duration) -> Work {
        let attempt = AttemptRef { run: 1, attempt: 1, nonce: Nonce(5) };
        Work {
            key: JobKey { job: JobId::from_parts(1, [1; 10]), attempt },
            public_id: "j".into(),
            input: Bytes::copy_from_slice(input.as_bytes()),
            extra_json: Bytes::new(),
            timeout,
        }
    }

    async fn end_of(input: &str, timeout: Duration) -> End {
        let (events, mut seen) = mpsc::unbounded_channel();
        let pool = TaskPool::new(1, events, Arc::new(Sleep));
        pool.assign(work(input, timeout));
        loop {
            match seen.recv().await.expect("event") {
                ExecEvent::Finished { end, .. } => return end,
                _ => continue,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn sleeps_fails_and_overruns() {
        let hour = Duration::from_secs(3600);
        let input = r#"{"seconds": 30, "x": 1}"#;
        assert_eq!(end_of(input, hour).await, End::Success(Some(Bytes::from_static(input.as_bytes()))));
        assert_eq!(end_of(input, Duration::from_secs(5)).await, End::Overrun);
        for bad in ["{}", "[]", r#"{"seconds": -1}"#, r#"{"seconds": 1e300}"#, r#"{"seconds": "1"}"#] {
            assert!(matches!(end_of(bad, hour).await, End::Failure { .. }), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_stopped_sleep_ends_once() {
        let (events, mut seen) = mpsc::unbounded_channel();
        let pool = TaskPool::new(1, events, Arc::new(Sleep));
        let job = work(r#"{"seconds": 3600}"#, Duration::from_secs(9000));
        let key = job.key;
        pool.assign(job);
        assert_eq!((pool.open_slots(), pool.busy()), (0, 1));
        pool.stop(key);
        pool.stop(key);
        pool.end();
        assert_eq!(pool.open_slots(), 1);
        drop(pool);
        let mut ends = Vec::new();
        while let Some(event) = seen.recv().await {
            if let ExecEvent::Finished { end, .. } = event {
                ends.push(end);
            }
        }
        assert_eq!(ends, [End::Stopped]);
    }
}
