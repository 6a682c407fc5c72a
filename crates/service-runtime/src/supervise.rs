//! Keeps a service of the all-in-one alive: a panic restarts that service only.

use crate::shutdown::Shutdown;
use std::fmt::Display;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// A service that ran this long has recovered: the next restart is quick again.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Runs `factory()` again after each panic or error, with backoff from 100 ms to 10 s, until it returns `Ok` or the
/// shutdown is triggered. State that must survive belongs outside of the future.
pub async fn supervise<F, Fut, E>(name: &'static str, shutdown: Shutdown, mut factory: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), E>> + Send + 'static,
    E: Display + Send + 'static,
{
    let mut backoff = FIRST_BACKOFF;
    loop {
        let started = Instant::now();
        // The task notices the shutdown itself and drains; it is aborted only with the runtime.
        match tokio::spawn(factory()).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::error!(service = name, %error, "service failed"),
            Err(join) if join.is_panic() => {
                tracing::error!(service = name, panic = %panic_text(join), "service panicked");
            }
            Err(_) => return,
        }
        ::metrics::counter!("ringback_service_restarts_total", "service" => name).increment(1);
        if shutdown.is_triggered() {
            return;
        }
        if started.elapsed() >= STABLE_AFTER {
            backoff = FIRST_BACKOFF;
        }
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            () = shutdown.triggered() => return,
        }
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
    }
}

fn panic_text(join: tokio::task::JoinError) -> String {
    let payload = join.into_panic();
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn a_panic_and_an_error_restart_the_service() {
        let runs = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&runs);
        supervise("test", Shutdown::new(), move || {
            let run = counted.fetch_add(1, Ordering::SeqCst);
            async move {
                match run {
                    0 => panic!("first"),
                    1 => Err("second"),
                    _ => Ok(()),
                }
            }
        })
        .await;
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_shutdown_ends_the_restarts() {
        let shutdown = Shutdown::new();
        let trigger = shutdown.clone();
        supervise("test", shutdown, move || {
            trigger.trigger();
            async { Err::<(), _>("always") }
        })
        .await;
    }
}
