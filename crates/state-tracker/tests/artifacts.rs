//! Artefacts over NATS, on SQLite and on PostgreSQL: fences, repeated requests, confirmations, ends.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

#[macro_use]
mod rig;

use bytes::Bytes;
use rig::*;
use ringback_bus::Verb;
use ringback_contracts::{VERSION, attempt_to_wire, v1};
use ringback_domain::{
    ArtifactId, AttemptRef, JobId, JobStatus, Nonce, artifact::ArtifactState, event::EventType,
};
use ringback_store::artifacts::artifact_by_id;
use ringback_store::delivery_search::{DeliveryFilter, search};
use v1::{artifact_refusal::Why, artifact_reply::Reply, artifact_request::Request};

const KEEP_MS: u64 = 3_600_000;
const RECEIVER: &str = "https://receiver.example/files";

scenarios! {
    only_an_attempt_that_may_end_the_job_may_add_files: 30_000,
    a_repeated_request_changes_and_tells_nothing_twice: 30_000,
    a_confirmation_needs_the_right_bytes: 30_000,
    waits_and_files_end_and_leave_nothing: 30_000,
    a_file_stays_while_a_delivery_needs_it: 30_000,
}

async fn ask(rig: &Rig, request: Request) -> Reply {
    let request = v1::ArtifactRequest { version: VERSION, request: Some(request) };
    let reply: v1::ArtifactReply = rig.ask(Verb::Artifacts, &request).await;
    reply.reply.unwrap()
}

fn why(reply: &Reply) -> Why {
    match reply {
        Reply::Refusal(refusal) => refusal.why(),
        other => panic!("not refused: {other:?}"),
    }
}

fn wire(id: ArtifactId) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

fn new_id(job: JobId) -> ArtifactId {
    ArtifactId::of_job(&job, now_ms(), random())
}

async fn reserve(rig: &Rig, job: JobId, attempt: AttemptRef, id: ArtifactId) -> Reply {
    let new = v1::NewArtifact {
        id: wire(id),
        name: "../a.wav".into(),
        content_type: "audio/wav".into(),
        blob_key: format!("art/x/{}", id.simple()),
    };
    ask(
        rig,
        Request::Reserve(v1::ReserveArtifacts {
            worker_id: "w1".into(),
            attempt: Some(attempt_to_wire(&job, &attempt)),
            started_at_ms: 1,
            artifacts: vec![new],
            keep_ms: KEEP_MS,
        }),
    )
    .await
}

async fn ready(
    rig: &Rig,
    job: JobId,
    attempt: AttemptRef,
    id: ArtifactId,
    keep_ms: u64,
    wait_ms: u64,
) -> Reply {
    let stored = v1::StoredArtifact { id: wire(id), size_bytes: 3, sha256: vec![7; 32].into() };
    ask(
        rig,
        Request::Ready(v1::ReadyArtifacts {
            worker_id: "w1".into(),
            attempt: Some(attempt_to_wire(&job, &attempt)),
            artifacts: vec![stored],
            keep_ms,
            confirm: Some(v1::ConfirmWish { receiver_url: RECEIVER.into(), wait_ms }),
        }),
    )
    .await
}

async fn confirm(rig: &Rig, id: ArtifactId, sha256: Vec<u8>) -> Reply {
    ask(rig, Request::Confirm(v1::ConfirmArtifact { id: wire(id), sha256: sha256.into() })).await
}

async fn state(rig: &Rig, id: ArtifactId) -> Option<ArtifactState> {
    artifact_by_id(rig.store.read(), id).await.unwrap().map(|row| row.state)
}

async fn only_an_attempt_that_may_end_the_job_may_add_files(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let attempt = first();
    // Nobody has told of the attempt yet: announcing its files starts it.
    assert!(matches!(reserve(rig, job, attempt, new_id(job)).await, Reply::States(_)));
    assert_eq!(rig.status(job).await, JobStatus::InProgress);
    let id = new_id(job);
    let thief = AttemptRef { nonce: Nonce(attempt.nonce.0 ^ 1), ..attempt };
    assert_eq!(why(&reserve(rig, job, thief, id).await), Why::Obsolete);
    let later = AttemptRef { run: 2, ..attempt };
    assert_eq!(why(&reserve(rig, job, later, id).await), Why::Obsolete);
    assert_eq!(state(rig, id).await, None);

    // An attempt that was lost may still end the run with its success, so it may still have files.
    assert!(matches!(reserve(rig, job, attempt, id).await, Reply::States(_)));
    assert_eq!(rig.outcome("w1", crash(job, attempt)).await, v1::Verdict::Requeued);
    assert!(matches!(ready(rig, job, attempt, id, KEEP_MS, 1).await, Reply::Links(_)));

    // Once the run has ended, whatever comes counts for nothing.
    rig.cancel(PROJECT, job).await;
    assert_eq!(why(&reserve(rig, job, attempt, new_id(job)).await), Why::Obsolete);
    assert_eq!(why(&ready(rig, job, attempt, id, KEEP_MS, 1).await), Why::Obsolete);
    rig.books_balance().await;
}

async fn a_repeated_request_changes_and_tells_nothing_twice(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let (attempt, id) = (first(), new_id(job));
    // What was not announced is not known.
    rig.beat("w1", &[(job, attempt)]).await;
    assert_eq!(why(&ready(rig, job, attempt, id, KEEP_MS, 60_000).await), Why::NotFound);
    let mut links = Vec::new();
    for _ in 0..3 {
        assert!(matches!(reserve(rig, job, attempt, id).await, Reply::States(_)));
        let Reply::Links(told) = ready(rig, job, attempt, id, KEEP_MS, 60_000).await else {
            panic!("no links")
        };
        links.push(told);
    }
    assert!(links.iter().all(|l| *l == links[0]));
    let link = &links[0].links[0];
    assert!(link.download_url.starts_with(&format!("https://ringback.example/artifacts/{id}/")), "{link:?}");
    assert!(link.download_url.ends_with("/a.wav") && link.confirmation_url.ends_with("/confirm"), "{link:?}");
    // One classic POST, owned by the artefact, in the partition of its job.
    let owed =
        format!("SELECT COUNT(*) FROM deliveries WHERE url = '{RECEIVER}' AND format = 8 AND state = 0");
    assert_eq!(rig.number(&owed).await, 1);
    assert_eq!(rig.number("SELECT owed FROM events").await, 1);
    for (endpoint, found) in [(ENDPOINT.0, 1), (ENDPOINT.0 + 1, 0)] {
        let filter = DeliveryFilter { endpoint: Some(endpoint), ..DeliveryFilter::default() };
        let ready = DeliveryFilter { events: vec![EventType::ArtifactReady.code()], ..filter };
        assert_eq!(search(rig.store.read(), PROJECT, &ready, None, 9).await.unwrap().len(), found);
    }
    assert_eq!(id.partition(4), job.partition(4));
    // Another job's attempt cannot speak for it.
    let other = rig.job().await;
    let stranger = first();
    rig.beat("w1", &[(other, stranger)]).await;
    assert_eq!(why(&ready(rig, other, stranger, id, KEEP_MS, 60_000).await), Why::NotFound);
    rig.books_balance().await;
}

async fn a_confirmation_needs_the_right_bytes(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let (attempt, id) = (first(), new_id(job));
    let mut woken = rig.bus.subscribe_stop("w1").await.unwrap();
    rig.bus.flush().await.unwrap();
    assert_eq!(why(&confirm(rig, id, Vec::new()).await), Why::NotFound);
    reserve(rig, job, attempt, id).await;
    assert_eq!(why(&confirm(rig, id, Vec::new()).await), Why::NotFound);
    ready(rig, job, attempt, id, KEEP_MS, 60_000).await;
    let Reply::Refusal(refusal) = confirm(rig, id, vec![8; 32]).await else { panic!("taken") };
    assert_eq!(refusal.why(), Why::OtherBytes);
    assert!(refusal.detail.contains(&"07".repeat(32)) && refusal.detail.contains(&"08".repeat(32)));
    assert_eq!(state(rig, id).await, Some(ArtifactState::Ready));
    for sha256 in [vec![7; 32], Vec::new()] {
        assert!(matches!(confirm(rig, id, sha256).await, Reply::States(_)));
    }
    let row = artifact_by_id(rig.store.read(), id).await.unwrap().unwrap();
    assert_eq!((row.state, row.confirmed_sha256, row.given_up_at_ms), (ArtifactState::Confirmed, true, None));
    let order = woken.next().await.unwrap();
    let order: v1::StopOrders = prost::Message::decode(order.payload).unwrap();
    assert_eq!((order.stop.len(), order.artifacts), (0, vec![wire(id)]));
    // The end of the wait comes too late to change it.
    let Reply::States(states) = ask(rig, Request::Close(v1::CloseArtifacts { ids: vec![wire(id)] })).await
    else {
        panic!("refused")
    };
    assert_eq!(states.states[0].state, u32::from(ArtifactState::Confirmed.code()));
}

async fn due(rig: &Rig) -> v1::ArtifactStates {
    match ask(rig, Request::Due(v1::DueArtifacts { limit: 50 })).await {
        Reply::States(states) => states,
        other => panic!("refused: {other:?}"),
    }
}

const DELIVERED: &str =
    "UPDATE deliveries SET state = 1, attempts = 1, ended_at_ms = created_at_ms, next_attempt_at_ms = NULL";
/// One delivery changes its owner: only that one is pending or dead.
macro_rules! owned_by {
    ($owner:literal) => {
        concat!(
            "UPDATE deliveries SET state = 0, ended_at_ms = NULL, seq = 90, owner_id = (",
            $owner,
            ") \
                 WHERE format = 8"
        )
    };
}

async fn a_file_stays_while_a_delivery_needs_it(rig: &mut Rig) {
    rig.tracker().await;
    webhook(rig, 0, serde_json::json!({"events": ["artifact.ready"]})).await;
    let (_, jobs) = rig.batch(1, false).await;
    let (job, attempt) = (jobs[0], first());
    let id = new_id(job);
    reserve(rig, job, attempt, id).await;
    ready(rig, job, attempt, id, 0, 0).await;
    let owners = [
        owned_by!("SELECT id FROM artifacts"),
        owned_by!("SELECT job_id FROM artifacts"),
        owned_by!("SELECT batch_id FROM jobs WHERE id = (SELECT job_id FROM artifacts)"),
        owned_by!("SELECT id FROM events WHERE type = 200 AND id <> (SELECT id FROM artifacts)"),
        "UPDATE deliveries SET state = 2, ended_at_ms = created_at_ms WHERE format = 8",
    ];
    let over = "UPDATE artifacts SET check_at_ms = 0, wait_until_ms = NULL, expires_at_ms = 1";
    for owned in owners {
        rig.execute(DELIVERED).await;
        rig.execute(owned).await;
        rig.execute(over).await;
        assert_eq!(due(rig).await, v1::ArtifactStates::default(), "{owned}");
        let row = artifact_by_id(rig.store.read(), id).await.unwrap().unwrap();
        assert_eq!(row.state, ArtifactState::Ready, "{owned}");
        assert!(row.expires_at_ms.cast_unsigned() > now_ms(), "{owned}");
    }
    rig.execute(over).await;
    rig.execute("UPDATE deliveries SET ended_at_ms = 1 WHERE state = 2").await;
    assert_eq!(due(rig).await.blobs.len(), 1, "it died too long ago");
    assert_eq!(state(rig, id).await, Some(ArtifactState::Expired));
}

async fn waits_and_files_end_and_leave_nothing(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let attempt = first();
    let (waiting, brief, unstored) = (new_id(job), new_id(job), new_id(job));
    for id in [waiting, brief, unstored] {
        reserve(rig, job, attempt, id).await;
    }
    // A worker that died while it waited, and a file that is kept for no time.
    ready(rig, job, attempt, waiting, KEEP_MS, 0).await;
    ready(rig, job, attempt, brief, 0, 60_000).await;
    rig.execute(DELIVERED).await;
    let states = due(rig).await;
    assert_eq!((states.changed, states.blobs.len(), states.more), (2, 1, false));
    assert_eq!(state(rig, waiting).await, Some(ArtifactState::Unconfirmed));
    assert_eq!(state(rig, brief).await, Some(ArtifactState::Expired));
    assert_eq!(state(rig, unstored).await, Some(ArtifactState::Uploading));
    assert_eq!(why(&confirm(rig, brief, Vec::new()).await), Why::Expired);
    // Late, but better than never.
    assert!(matches!(confirm(rig, waiting, Vec::new()).await, Reply::States(_)));

    // The blob is named until somebody says that it is gone.
    let states = due(rig).await;
    assert_eq!((states.changed, states.blobs.len()), (0, 1));
    let gone = v1::ArtifactBlobsGone { ids: vec![wire(brief)] };
    ask(rig, Request::BlobsGone(gone)).await;
    assert_eq!(due(rig).await, v1::ArtifactStates::default());
    // A blob is never forgotten, not even one that the worker died with.
    rig.execute("UPDATE artifacts SET check_at_ms = 0").await;
    let states = due(rig).await;
    assert_eq!(state(rig, brief).await, None, "its time as a memory is over");
    assert_eq!(states.blobs.len(), 2, "{states:?}");
    assert!(states.blobs.iter().any(|b| b.id == wire(unstored)));

    // Removal asks for the owner.
    let other = new_id(job);
    reserve(rig, job, attempt, other).await;
    ready(rig, job, attempt, other, KEEP_MS, 60_000).await;
    let remove = |project_id| Request::Remove(v1::RemoveArtifact { project_id, id: wire(other) });
    assert_eq!(why(&ask(rig, remove(PROJECT.0 + 1)).await), Why::NotFound);
    for _ in 0..2 {
        assert!(matches!(ask(rig, remove(PROJECT.0)).await, Reply::States(_)));
    }
    assert_eq!(state(rig, other).await, Some(ArtifactState::Expired));
    rig.books_balance().await;
}
