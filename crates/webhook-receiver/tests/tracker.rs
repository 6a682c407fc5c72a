//! Hybrid tracking (row C1) over the real store.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use ringback_service_runtime::Shutdown;
use ringback_test_support::wait::{always, until};
use ringback_webhook_receiver::store::{Accepted, Closed, Journal, SqliteJournal, TrackedJob, TrackedState};
use ringback_webhook_receiver::{Event, Intake, Observer, Poll, Polled, Proof, Router, Tracker, Waits};

const SOON: Duration = Duration::from_secs(60);

/// Answers from a list per job, and counts.
#[derive(Default)]
struct Provider {
    answers: Mutex<BTreeMap<String, Vec<Result<Polled, String>>>>,
    polls: Mutex<BTreeMap<String, usize>>,
}

#[async_trait]
impl Poll for Provider {
    async fn poll(&self, job: &TrackedJob) -> Result<Polled, String> {
        *self.polls.lock().unwrap().entry(job.job_id.clone()).or_default() += 1;
        assert_eq!(job.context, "tts");
        let mut answers = self.answers.lock().unwrap();
        let list = answers.entry(job.job_id.clone()).or_default();
        if list.is_empty() { Ok(Polled::Running) } else { list.remove(0) }
    }
}

impl Provider {
    fn will_say(&self, job: &str, answers: Vec<Result<Polled, String>>) {
        self.answers.lock().unwrap().insert(job.to_owned(), answers);
    }

    fn polls(&self, job: &str) -> usize {
        self.polls.lock().unwrap().get(job).copied().unwrap_or_default()
    }
}

fn body(job: &str) -> Bytes {
    Bytes::from(format!(r#"{{"id":"{job}","status":"COMPLETED","output":1}}"#))
}

struct Rig {
    _dir: tempfile::TempDir,
    journal: Arc<dyn Journal>,
    intake: Intake,
    provider: Arc<Provider>,
    tracker: Tracker,
    shutdown: Shutdown,
    task: tokio::task::JoinHandle<()>,
}

async fn rig(waits: Waits) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let journal: Arc<dyn Journal> = Arc::new(SqliteJournal::open(&dir.path().join("r.db")).await.unwrap());
    let intake = Intake::new(Arc::clone(&journal), Router::new().metrics(), Observer::default());
    let provider = Arc::new(Provider::default());
    let tracker = Tracker::new(intake.clone(), provider.clone(), waits);
    let shutdown = Shutdown::new();
    let task = tokio::spawn(tracker.clone().run(shutdown.clone()));
    Rig { _dir: dir, journal, intake, provider, tracker, shutdown, task }
}

impl Rig {
    async fn due(&self) -> Vec<String> {
        let due = self.journal.due(i64::MAX, 100, &Closed::default()).await.unwrap();
        due.into_iter().map(|(key, _)| key).collect()
    }
}

fn quick() -> Waits {
    Waits {
        max_wait: Duration::from_millis(200),
        poll_every: Duration::from_millis(20),
        poll_at_least_every: Duration::from_millis(100),
        give_up: Duration::from_secs(3600),
    }
}

async fn webhook(rig: &Rig, job: &str) -> Accepted {
    let proof = Proof::Standard { id: format!("msg_{job}"), timestamp_s: 0 };
    let event = Event::parse(&body(job)).unwrap();
    rig.intake.take(&proof, &event, body(job)).await.unwrap().accepted
}

async fn end_of(rig: &Rig, job: &str, wanted: TrackedState) {
    until(&format!("the end of {job}"), SOON, || async {
        (rig.journal.tracked_state(job).await.unwrap() == Some(wanted)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_webhook_is_made_up_for_by_a_poll_and_comes_late_as_a_duplicate() {
    let rig = rig(quick()).await;
    let ended = Ok(Polled::Ended(body("j")));
    rig.provider.will_say("j", vec![Ok(Polled::Running), Err("away".to_owned()), ended]);
    rig.tracker.submitted("j", "tts").await.unwrap();
    end_of(&rig, "j", TrackedState::Poll).await;
    assert_eq!(rig.provider.polls("j"), 3);
    assert_eq!(rig.due().await, ["poll:job:j:COMPLETED"]);
    assert_eq!(webhook(&rig, "j").await, Accepted::Done);
    assert_eq!(rig.due().await.len(), 1, "worked off once");
    rig.shutdown.trigger();
    rig.task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_in_time_means_no_poll_at_all() {
    let rig = rig(Waits { max_wait: Duration::from_millis(500), ..quick() }).await;
    for n in 0..50 {
        rig.tracker.submitted(&format!("j{n}"), "tts").await.unwrap();
    }
    for n in 0..50 {
        assert_eq!(webhook(&rig, &format!("j{n}")).await, Accepted::New);
    }
    always("no poll", Duration::from_millis(800), || async { rig.provider.polls.lock().unwrap().is_empty() })
        .await;
    assert_eq!(rig.due().await.len(), 50, "50 jobs cost 50 callbacks");
    rig.shutdown.trigger();
    rig.task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_job_and_one_without_end_are_given_up() {
    let rig = rig(Waits { give_up: Duration::from_millis(400), ..quick() }).await;
    rig.provider.will_say("gone", vec![Ok(Polled::Unknown)]);
    rig.tracker.submitted("gone", "tts").await.unwrap();
    rig.tracker.submitted("endless", "tts").await.unwrap();
    end_of(&rig, "gone", TrackedState::GivenUp).await;
    end_of(&rig, "endless", TrackedState::GivenUp).await;
    assert!(rig.provider.polls("gone") == 1 && rig.provider.polls("endless") > 1);
    rig.shutdown.trigger();
    rig.task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_submitted_before_a_restart_is_still_awaited() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.db");
    let provider = Arc::new(Provider::default());
    provider.will_say("j", vec![Ok(Polled::Ended(body("j")))]);
    for start in 0..2 {
        let journal: Arc<dyn Journal> = Arc::new(SqliteJournal::open(&path).await.unwrap());
        let intake = Intake::new(Arc::clone(&journal), Router::new().metrics(), Observer::default());
        let tracker = Tracker::new(intake, provider.clone(), quick());
        if start == 0 {
            // Submitted, and gone before anything was polled.
            tracker.submitted("j", "tts").await.unwrap();
            continue;
        }
        let shutdown = Shutdown::new();
        let task = tokio::spawn(tracker.run(shutdown.clone()));
        until("the poll", SOON, || async { journal.tracked_state("j").await.unwrap() }).await;
        shutdown.trigger();
        task.await.unwrap();
    }
}
