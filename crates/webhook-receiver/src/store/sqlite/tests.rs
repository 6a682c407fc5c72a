use super::*;
use ringback_domain::JobStatus;

fn event(key: &str, body: &'static str) -> NewEvent {
    NewEvent {
        key: key.to_owned(),
        kind: "runpod.completed".to_owned(),
        subject: Some("job-1".to_owned()),
        ended_job: None,
        body: Bytes::from_static(body.as_bytes()),
        received_at_ms: 1_000,
        again: false,
        at_once: false,
        lane: String::new(),
    }
}

fn ending(key: &str, job: &str) -> NewEvent {
    ending_as(key, job, JobStatus::Completed)
}

fn ending_as(key: &str, job: &str, how: JobStatus) -> NewEvent {
    let ended_job = Some((job.to_owned(), how));
    NewEvent { ended_job, subject: Some(job.to_owned()), ..event(key, "{}") }
}

fn job(id: &str) -> TrackedJob {
    TrackedJob { job_id: id.to_owned(), context: "tts".to_owned(), submitted_at_ms: 5, polls: 0 }
}

async fn keys(journal: &SqliteJournal, now_ms: i64, limit: u32) -> Vec<String> {
    let due = journal.due(now_ms, limit, &Closed::default()).await.unwrap();
    due.into_iter().map(|(key, _)| key).collect()
}

async fn journal() -> (tempfile::TempDir, SqliteJournal) {
    let dir = tempfile::tempdir().unwrap();
    let journal = SqliteJournal::open(&dir.path().join("a b%20?x=1#.db")).await.unwrap();
    (dir, journal)
}

#[tokio::test]
async fn an_event_is_worked_off_once_and_its_key_is_remembered() {
    let (dir, journal) = journal().await;
    assert!(dir.path().join("a b%20?x=1#.db").exists());
    assert_eq!(journal.accept(event("a", "{\"n\":1}")).await.unwrap(), Accepted::New);
    assert_eq!(journal.accept(event("a", "{\"n\":1}")).await.unwrap(), Accepted::Waiting);
    assert!(keys(&journal, 999, 10).await.is_empty());
    assert_eq!(keys(&journal, 1_000, 10).await, ["a"]);
    let due = journal.load("a").await.unwrap().unwrap();
    assert_eq!((due.body.as_ref(), due.attempts), (b"{\"n\":1}".as_slice(), 0));
    journal.settle("a", Settled::Again { due_at_ms: 3_000, error: "later".into() }, 1_001).await.unwrap();
    assert_eq!(journal.next_due(2_999).await.unwrap(), Some(3_000));
    assert_eq!(journal.load("a").await.unwrap().unwrap().attempts, 1);
    journal.settle("a", Settled::Done, 3_001).await.unwrap();
    assert!(journal.load("a").await.unwrap().is_none());
    journal.accept(event("b", "{}")).await.unwrap();
    journal.settle("b", Settled::Again { due_at_ms: 9_000, error: "later".into() }, 1_001).await.unwrap();
    assert_eq!(journal.accept(event("b", "{}")).await.unwrap(), Accepted::Waiting);
    assert_eq!(journal.next_due(0).await.unwrap(), Some(9_000));
    let now = NewEvent { at_once: true, ..event("b", "{}") };
    assert_eq!(journal.accept(now).await.unwrap(), Accepted::Waiting);
    assert_eq!(keys(&journal, 1_000, 10).await, ["b"]);
    journal.settle("b", Settled::Done, 3_001).await.unwrap();
    assert_eq!(journal.accept(event("a", "{}")).await.unwrap(), Accepted::Done);
    assert_eq!(journal.next_due(0).await.unwrap(), None);
    assert_eq!(journal.counts().await.unwrap(), Counts { done: 2, ..Counts::default() });
}

#[tokio::test]
async fn what_was_given_up_or_asked_for_again_comes_back_without_its_files() {
    let (_dir, journal) = journal().await;
    journal.accept(event("a", "1")).await.unwrap();
    let file = SavedFile { name: "x.wav".into(), sha256: "00".into(), size_bytes: 3 };
    journal.saved("a", 0, file.clone()).await.unwrap();
    assert_eq!(journal.file("a", 0).await.unwrap(), Some(file.clone()));
    journal.settle("a", Settled::GivenUp { error: "no".into() }, 2_000).await.unwrap();
    let about = journal.about("job-1").await.unwrap();
    assert_eq!(
        (about[0].state, about[0].error.as_deref(), &about[0].files),
        ("failed", Some("no"), &vec![file])
    );
    assert_eq!(journal.accept(event("a", "2")).await.unwrap(), Accepted::Revived);
    assert_eq!(journal.file("a", 0).await.unwrap(), None);
    assert_eq!(journal.load("a").await.unwrap().unwrap().body.as_ref(), b"2");
    journal.settle("a", Settled::Done, 2_000).await.unwrap();
    let again = NewEvent { again: true, ..event("a", "3") };
    assert_eq!(journal.accept(again).await.unwrap(), Accepted::New);
}

#[tokio::test]
async fn what_is_accepted_survives_the_process() {
    let (dir, journal) = journal().await;
    let path = dir.path().join("a b%20?x=1#.db");
    for n in 0..20 {
        journal.accept(event(&format!("k{n}"), "{}")).await.unwrap();
    }
    // A second connection sees what is committed, whatever the first one does next.
    let other = SqliteJournal::open(&path).await.unwrap();
    assert_eq!(keys(&other, i64::MAX, 100).await.len(), 20);
}

#[tokio::test]
async fn many_at_once_share_commits_and_one_copy_wins() {
    let (_dir, journal) = journal().await;
    let all = (0..300).map(|n| journal.accept(event(&format!("k{}", n % 100), "{}")));
    let accepted = futures::future::join_all(all).await;
    let new = accepted.iter().filter(|a| matches!(a, Ok(Accepted::New))).count();
    assert_eq!((accepted.len(), new), (300, 100));
}

#[tokio::test]
async fn settled_events_are_forgotten_and_waiting_ones_never() {
    let (_dir, journal) = journal().await;
    for n in 0..450 {
        let key = format!("k{n}");
        journal.accept(event(&key, "{}")).await.unwrap();
        if n > 0 {
            journal.settle(&key, Settled::Done, 2_000).await.unwrap();
        }
    }
    assert_eq!(journal.forget(2_000).await.unwrap(), 0);
    assert_eq!(journal.forget(2_001).await.unwrap(), 449);
    assert_eq!(journal.counts().await.unwrap(), Counts { pending: 1, ..Counts::default() });
}

#[tokio::test]
async fn a_webhook_ends_the_wait_and_a_poll_makes_its_webhook_late() {
    let (_dir, journal) = journal().await;
    journal.track(job("by-hook"), 100).await.unwrap();
    journal.track(job("by-poll"), 200).await.unwrap();
    journal.track(job("by-poll"), 1).await.unwrap();
    assert_eq!(journal.tracked_next_due().await.unwrap(), Some(100));
    assert_eq!(journal.accept(ending("m1", "by-hook")).await.unwrap(), Accepted::New);
    assert_eq!(journal.tracked_state("by-hook").await.unwrap(), Some(TrackedState::Webhook));
    // The poll was under way when the webhook came.
    assert_eq!(journal.tracked_found("by-hook", ending("p1", "by-hook")).await.unwrap(), Accepted::Done);
    assert_eq!(journal.tracked_due(300, 10).await.unwrap(), [job("by-poll")]);
    journal.tracked_again("by-poll", 400).await.unwrap();
    assert_eq!(journal.tracked_due(400, 10).await.unwrap()[0].polls, 1);
    assert_eq!(journal.tracked_found("by-poll", ending("p2", "by-poll")).await.unwrap(), Accepted::New);
    assert_eq!(journal.accept(ending("m2", "by-poll")).await.unwrap(), Accepted::Done, "late");
    assert_eq!(journal.tracked_state("by-poll").await.unwrap(), Some(TrackedState::Poll));
    let keys = keys(&journal, i64::MAX, 10).await;
    assert_eq!(keys, ["m1", "p2"], "each end is worked off once");
    journal.accept(ending("m0", "quick")).await.unwrap();
    journal.track(job("quick"), 1).await.unwrap();
    assert_eq!(
        journal.tracked_state("quick").await.unwrap(),
        Some(TrackedState::Webhook),
        "quicker than its submitter"
    );
    journal.track(job("lost"), 1).await.unwrap();
    journal.tracked_give_up("lost", 2).await.unwrap();
    assert_eq!(journal.tracked_state("lost").await.unwrap(), Some(TrackedState::GivenUp));
    assert_eq!(journal.accept(ending("m3", "lost")).await.unwrap(), Accepted::New, "better late than never");
}

#[tokio::test]
async fn the_end_of_another_run_is_no_late_webhook() {
    let (_dir, journal) = journal().await;
    journal.track(job("j"), 1).await.unwrap();
    let found = ending_as("p", "j", JobStatus::Failed);
    assert_eq!(journal.tracked_found("j", found).await.unwrap(), Accepted::New);
    let late = ending_as("m1", "j", JobStatus::TimedOut);
    assert_eq!(journal.accept(late).await.unwrap(), Accepted::Done, "a failure by another name");
    assert_eq!(journal.accept(ending("m2", "j")).await.unwrap(), Accepted::New, "it was run again");
    assert_eq!(journal.tracked_state("j").await.unwrap(), Some(TrackedState::Webhook));
}

#[tokio::test]
async fn closed_lanes_are_passed_over() {
    let (_dir, journal) = journal().await;
    for (key, lane) in [("a", "slow:443"), ("b", ""), ("c", "quick:443")] {
        journal.accept(NewEvent { lane: lane.to_owned(), ..event(key, "{}") }).await.unwrap();
    }
    let due = |closed: Closed| {
        let journal = journal.clone();
        async move {
            let due = journal.due(i64::MAX, 10, &closed).await.unwrap();
            due.into_iter().map(|(key, _)| key).collect::<String>()
        }
    };
    assert_eq!(due(Closed::default()).await, "abc");
    assert_eq!(due(Closed { hosts: vec!["slow:443".to_owned()], ..Closed::default() }).await, "bc");
    assert_eq!(due(Closed { all_hosts: true, ..Closed::default() }).await, "b");
    assert_eq!(due(Closed { no_host: true, ..Closed::default() }).await, "ac");
}
