//! Waiting for a condition with a deadline: tests never sleep and hope.

use std::future::Future;
use std::time::{Duration, Instant};

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Asks `look` until it gives a value, and panics with `what` when `within` has passed.
pub async fn until<T, F, Fut>(what: &str, within: Duration, mut look: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < within, "waited {within:?} in vain for {what}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// [`until`] for a plain condition.
pub async fn until_true<F, Fut>(what: &str, within: Duration, mut look: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let mut asked = || {
        let answer = look();
        async move { answer.await.then_some(()) }
    };
    until(what, within, &mut asked).await;
}

/// Looks for the whole of `during` and panics as soon as `holds` does not: for "must not happen".
pub async fn always<F, Fut>(what: &str, during: Duration, mut holds: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let begun = Instant::now();
    while begun.elapsed() < during {
        assert!(holds().await, "no longer true after {:?}: {what}", begun.elapsed());
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
