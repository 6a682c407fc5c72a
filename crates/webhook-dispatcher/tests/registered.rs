//! Registered webhooks under the dispatcher: each test names its row of the proof matrix (reference/webhooks.md
//! sections 5 and 8).

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use std::time::Duration;

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::event::{EventType, event_key};
use ringback_domain::target::FORMAT_RUNFLOW;
use ringback_domain::webhook::{runflow, signature::SigningKey};
use ringback_domain::{JobId, JobStatus};
use ringback_service_runtime::time::now_ms;
use ringback_store::Urgency;
use ringback_store::deliveries::DeliveryState;
use ringback_store::events::insert_owned;
use ringback_store::progress::overtake;
use ringback_store::webhooks::crud::{self, Settings};
use ringback_store::webhooks::secrets::{rotate, seal_headers};
use ringback_test_support::receiver::{Hit, Mode};
use ringback_test_support::signature::{new_secret, verify};
use ringback_test_support::wait::{always, until, until_true};
use support::{Dispatcher, Hook, PROJECT, Rig, SOON, end, job, life, to, told};
use uuid::Uuid;

fn waits(retry: &'static str) -> impl FnOnce(&mut Settings) {
    move |settings| settings.retry = Some(retry.to_owned())
}

fn notices(settings: &mut Settings) {
    settings.filter = r#"{"events":["webhook.disabled"]}"#.to_owned();
}

fn hits_at(rig: &Rig, path: &str) -> Vec<Hit> {
    rig.receiver.hits().into_iter().filter(|hit| hit.path == path).collect()
}

/// P6 and the row "410": the webhook is disabled at once, nothing further is tried, what is pending ends, and the
/// notice is durable. P9: it arrives although its receiver is down at first and the dispatcher is killed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_410_disables_at_once_and_the_notice_survives_everything() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/gone", Mode::Status(410));
    rig.receiver.answer("/notices", Mode::Status(503));
    let gone = rig.hook(&rig.url("/gone"), |_| {}).await;
    rig.hook(&rig.url("/notices"), |s| {
        notices(s);
        s.retry = Some(r#"{"waits_ms":[500],"max_attempts":40}"#.to_owned());
    })
    .await;
    let first = Dispatcher::start(&rig, true);
    let one = job();
    rig.owe(&[to(gone.target(), end(one, ""))]).await;
    rig.ends(one, DeliveryState::Dead).await;
    until_true("it to be disabled", SOON, || async { rig.health(&gone).await.disabled.is_some() }).await;
    assert_eq!(rig.health(&gone).await.disabled.unwrap().1, "gone_410");
    until_true("a try of the notice", SOON, || async { !hits_at(&rig, "/notices").is_empty() }).await;
    first.kill();
    // What is owed while nobody works, as a transition of before the disabling would be.
    let rest: Vec<JobId> = (0..20).map(|_| job()).collect();
    let owed: Vec<v1::Delivery> = rest.iter().map(|id| to(gone.target(), end(*id, ""))).collect();
    rig.commit(&owed).await;
    let _second = Dispatcher::start(&rig, true);
    for id in &rest {
        let view = rig.ends(*id, DeliveryState::Dead).await;
        assert_eq!((view[0].attempts, view[0].last_error.as_deref()), (0, Some("webhook_disabled")));
    }
    assert_eq!(hits_at(&rig, "/gone").len(), 1, "no further try");
    rig.receiver.answer("/notices", Mode::Ok);
    let told = until("the notice", SOON, || async {
        hits_at(&rig, "/notices").into_iter().find(|hit| hit.answered == 200)
    })
    .await;
    assert_eq!((told.json["type"].as_str(), &told.signature), (Some("webhook.disabled"), &Ok(())));
    assert_eq!(told.json["data"]["webhook_id"], gone.public_id);
    assert_eq!(told.json["data"]["reason"], "gone_410");
    let ids: std::collections::BTreeSet<String> =
        hits_at(&rig, "/notices").into_iter().map(|hit| hit.webhook_id).collect();
    assert_eq!(ids.len(), 1, "one notice, whatever happened");

    // Enabled again, it works again, also for jobs of before.
    rig.receiver.answer("/gone", Mode::Ok);
    let public_id = gone.public_id.clone();
    rig.store
        .write(Urgency::Now, move |tx| {
            let public_id = public_id.clone();
            Box::pin(async move { crud::enable(tx, PROJECT, &public_id).await })
        })
        .await
        .unwrap();
    let later = job();
    rig.owe(&[to(gone.target(), end(later, ""))]).await;
    rig.ends(later, DeliveryState::Delivered).await;
}

/// P10c: only failures for the operator's time disable; a restart in the middle does not move that moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_does_not_move_the_moment_of_disabling() {
    let Some(rig) = Rig::start_with(|config| config.webhooks.disable_after_ms = 6_000).await else { return };
    rig.receiver.answer("/bad", Mode::Status(500));
    let often = r#"{"waits_ms":[300],"max_attempts":100,"jitter_percent":0}"#;
    let bad = rig.hook(&rig.url("/bad"), waits(often)).await;
    let first = Dispatcher::start(&rig, true);
    rig.owe(&[to(bad.target(), end(job(), ""))]).await;
    let since = until("the first failure", SOON, || async { rig.health(&bad).await.failing_since_ms }).await;
    first.kill();
    let _second = Dispatcher::start(&rig, true);
    until_true("a try after the restart", SOON, || async { hits_at(&rig, "/bad").len() > 2 }).await;
    let (at, reason) = until("it to be disabled", SOON, || async { rig.health(&bad).await.disabled }).await;
    assert_eq!(reason, "only_failures");
    // Counted from before the restart.
    assert!(at - since >= 6_000 && at - since < 12_000, "{} ms", at - since);
}

/// P8: a rate per webhook, seen at the receiver, with two dispatchers and a flood; nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_keeps_the_rate_of_its_webhook() {
    // A lease that outlives the pauses of a busy machine: a lost one means second copies.
    let calm = |config: &mut ringback_service_runtime::RingbackConfig| {
        config.webhooks.partition_lease_ms = 8_000;
    };
    let Some(rig) = Rig::start_with(calm).await else { return };
    let slow = rig.hook(&rig.url("/slow"), |s| s.rate_per_second = Some(20)).await;
    let _a = Dispatcher::start(&rig, false);
    let _b = Dispatcher::start(&rig, false);
    until_true("a fair share", SOON, || async {
        rig.owners().await.into_values().collect::<Vec<_>>() == [4, 4]
    })
    .await;
    let ids: Vec<JobId> = (0..80).map(|_| job()).collect();
    let owed: Vec<v1::Delivery> = ids.iter().map(|id| to(slow.target(), end(*id, ""))).collect();
    rig.owe(&owed).await;
    let neighbour = job();
    rig.owe(&[end(neighbour, &rig.url("/fast"))]).await;
    rig.receiver.wait_for(&neighbour.to_string(), "COMPLETED", SOON).await;
    assert!(hits_at(&rig, "/slow").len() < 80, "the neighbour does not wait for it");
    let arrived = || async {
        let ids: std::collections::BTreeSet<String> =
            hits_at(&rig, "/slow").into_iter().map(|hit| hit.webhook_id).collect();
        ids.len() == 80
    };
    until_true("all of them", 2 * SOON, arrived).await;
    let hits = hits_at(&rig, "/slow");
    // Each process may be early by a tenth of a second's tokens, at least one: twice that, and the clocks of two ends.
    for window in hits.windows(26) {
        let took = window[25].at - window[0].at;
        assert!(took >= Duration::from_millis(950), "26 within {took:?}");
    }
}

/// Paused: pending, no try, nothing lost; resumed: delivered. Deleted with retries pending: they end cleanly (svix 1511).
#[tokio::test(flavor = "multi_thread")]
async fn paused_ones_wait_and_deleted_ones_end() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/bad", Mode::Status(500));
    let paused = rig.hook(&rig.url("/paused"), |s| s.paused = true).await;
    let bad = rig.hook(&rig.url("/bad"), |_| {}).await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let ids: Vec<JobId> = (0..50).map(|_| job()).collect();
    let owed: Vec<v1::Delivery> = ids.iter().map(|id| to(paused.target(), end(*id, ""))).collect();
    rig.owe(&owed).await;
    let retried = job();
    rig.owe(&[to(bad.target(), end(retried, ""))]).await;
    until_true("a failed try", SOON, || async { rig.view(retried).await[0].attempts == 1 }).await;
    always("nothing is sent", Duration::from_millis(1_500), || async { hits_at(&rig, "/paused").is_empty() })
        .await;
    rig.change(&paused, |s| s.paused = false).await;
    for id in &ids {
        rig.ends(*id, DeliveryState::Delivered).await;
    }
    assert_eq!(hits_at(&rig, "/paused").len(), 50, "each once");
    let public_id = bad.public_id.clone();
    rig.store
        .write(Urgency::Now, move |tx| {
            let public_id = public_id.clone();
            Box::pin(async move { crud::delete(tx, PROJECT, &public_id).await })
        })
        .await
        .unwrap();
    let ended = rig.ends(retried, DeliveryState::Cancelled).await;
    assert_eq!((ended[0].attempts, ended[0].last_error.as_deref()), (1, Some("webhook_deleted")));
}

async fn turn_key(rig: &Rig, hook: &Hook, secret: &str) {
    let (sealed, public_id) = (rig.seal(&hook.public_id, secret), hook.public_id.clone());
    rig.store
        .write(Urgency::Now, move |tx| {
            let (sealed, public_id) = (sealed.clone(), public_id.clone());
            Box::pin(async move { rotate(tx, PROJECT, &public_id, &sealed, 3_600_000).await })
        })
        .await
        .unwrap();
}

/// The rows "secret rotation in mid-retry" and "clock": old and new key both verify the second try, Runflow's header is
/// the newest key's; id and bytes stay, time and signature are of the try.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_turns_between_two_tries_verifies_old_and_new() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/once", Mode::FailFirst { times: 1, status: 500 });
    let hook = rig.hook(&rig.url("/once"), waits(r#"{"waits_ms":[3000],"jitter_percent":0}"#)).await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let id = job();
    let owed = v1::Delivery { format: FORMAT_RUNFLOW, ..to(hook.target(), end(id, "")) };
    rig.owe(&[owed]).await;
    until_true("the first try", SOON, || async { rig.receiver.count() == 1 }).await;
    let newest = new_secret();
    turn_key(&rig, &hook, &newest).await;
    rig.ends(id, DeliveryState::Delivered).await;
    let hits = rig.receiver.hits_of(&id.to_string());
    assert_eq!(hits.len(), 2);
    assert_eq!((&hits[0].webhook_id, &hits[0].body), (&hits[1].webhook_id, &hits[1].body));
    assert_ne!(hits[0].header("webhook-timestamp"), hits[1].header("webhook-timestamp"));
    let (first, second) = (&hits[0], &hits[1]);
    assert_eq!(first.signature, Ok(()));
    assert!(verify(&newest, &first.headers, &first.body).is_err(), "it was not there yet");
    for secret in [&rig.secret, &newest] {
        assert_eq!(verify(secret, &second.headers, &second.body), Ok(()));
    }
    assert_eq!(second.header("webhook-signature").split(' ').count(), 2);
    let keys = |secret: &str| [runflow::key(secret).unwrap()];
    assert_eq!(runflow::verify(&keys(&rig.secret), first.header("runflow-signature"), &first.body), Ok(()));
    for (hit, n) in [(first, 1), (second, 2)] {
        assert_eq!(hit.header("runflow-request-id"), format!("{}.{n}", hit.webhook_id));
    }
    assert_eq!(runflow::verify(&keys(&newest), second.header("runflow-signature"), &second.body), Ok(()));
    assert!(SigningKey::parse(&newest).is_ok());
}

/// Own headers, an own deadline and no further headers: what the owner of a webhook set is what is sent.
#[tokio::test(flavor = "multi_thread")]
async fn own_headers_and_deadline_are_kept() {
    let Some(rig) = Rig::start_with(|config| config.webhooks.deadline_ms = 20_000).await else { return };
    rig.receiver.answer("/hangs", Mode::Hang);
    let hook = rig.hook(&rig.url("/hangs"), |s| s.deadline_ms = Some(300)).await;
    let headers = [("authorization", "Bearer abc"), ("host", "evil"), ("webhook-id", "mine")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let sealed = seal_headers(&rig.key, &hook.public_id, &headers.into()).unwrap();
    rig.change(&hook, move |s| s.headers_encrypted = Some(sealed.clone())).await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let id = job();
    rig.owe(&[to(hook.target(), end(id, ""))]).await;
    let tried = until("the try to end", SOON, || async { rig.tries(id).await.pop() }).await;
    assert!((290..5_000).contains(&tried.duration_ms), "{} ms", tried.duration_ms);
    let hit = rig.receiver.hits_of(&id.to_string()).remove(0);
    assert_eq!(hit.header("authorization"), "Bearer abc");
    assert!(hit.header("host").starts_with("127.0.0.1"));
    assert_eq!(hit.webhook_id, format!("msg_{}_3_{}", id.simple(), hook.target()));
    assert_eq!((hit.header("runflow-signature"), hit.header("runflow-request-id")), ("", ""));
}

/// Strict order: nothing is superseded; what comes later waits until the one before is acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn strict_order_tells_everything_in_order() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/strict", Mode::FailFirst { times: 2, status: 500 });
    let hook = rig
        .hook(&rig.url("/strict"), |s| {
            s.strict_order = true;
            s.retry = Some(r#"{"waits_ms":[300],"max_attempts":9,"jitter_percent":0}"#.to_owned());
        })
        .await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let id = job();
    let owed: Vec<v1::Delivery> = life(id, "").into_iter().map(|d| to(hook.target(), d)).collect();
    rig.owe(&owed).await;
    rig.ends(id, DeliveryState::Delivered).await;
    let order: Vec<u64> = rig.receiver.hits_of(&id.to_string()).iter().map(|hit| hit.sequence).collect();
    assert_eq!(order, [1, 1, 1, 2, 2, 2, 3, 3, 3]);
}

/// P4: the broker restarts with an empty store while retries wait: they happen on time, and the log stays quiet.
#[tokio::test(flavor = "multi_thread")]
async fn retries_outlive_the_broker() {
    let Some(mut rig) = Rig::start().await else { return };
    rig.receiver.answer("/once", Mode::FailFirst { times: 1, status: 500 });
    let hook = rig.hook(&rig.url("/once"), waits(r#"{"waits_ms":[4000],"jitter_percent":0}"#)).await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let ids: Vec<JobId> = (0..10).map(|_| job()).collect();
    let owed: Vec<v1::Delivery> = ids.iter().map(|id| to(hook.target(), end(*id, ""))).collect();
    rig.owe(&owed).await;
    until_true("the first tries", SOON, || async { rig.receiver.count() == 10 }).await;
    rig.nats.kill9();
    rig.nats.delete_store();
    rig.nats.start_again().await;
    for id in &ids {
        rig.ends(*id, DeliveryState::Delivered).await;
        let hits = rig.receiver.hits_of(&id.to_string());
        assert_eq!(hits.len(), 2);
        let wait = hits[1].at - hits[0].at;
        assert!(wait >= Duration::from_millis(3_900) && wait < Duration::from_secs(9), "{wait:?}");
    }
}

/// Progress of a job, as the tracker tells it; answers the event's id too.
async fn owe_progress(rig: &Rig, hook: &Hook, of: JobId) -> (JobId, v1::Delivery) {
    let key = event_key(now_ms().unsigned_abs(), rand::random(), Some(of.as_bytes()));
    let delivery = v1::Delivery {
        owner_id: Bytes::copy_from_slice(key.as_bytes()),
        seq: 1,
        event: EventType::JobProgress.code(),
        ..to(hook.target(), told(of, 1, JobStatus::InProgress, ""))
    };
    let (partitions, owed) = (rig.store.facts().partitions, delivery.clone());
    rig.store
        .write(Urgency::Now, move |tx| {
            let owed = owed.clone();
            Box::pin(async move { insert_owned(tx, partitions, key.as_bytes(), "job", &[owed]).await })
        })
        .await
        .unwrap();
    (JobId::from_uuid(key), delivery)
}

/// The tracker's note that the attempt is over.
async fn overtaken(rig: &Rig, event: JobId) {
    let event = Uuid::from_bytes(*event.as_bytes());
    rig.store
        .write(Urgency::Now, move |tx| Box::pin(async move { overtake(tx, &[event]).await }))
        .await
        .unwrap();
}

/// The end of a job supersedes what waits of its progress: at the word, without the word, and under a new owner.
#[tokio::test(flavor = "multi_thread")]
async fn progress_gives_way_to_the_end_of_its_job() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/busy", Mode::Status(503));
    // The first retry comes soon, the second never within this test.
    let hook = rig.hook(&rig.url("/busy"), waits(r#"{"waits_ms":[1500,900000],"jitter_percent":0}"#)).await;
    let dispatcher = Dispatcher::start(&rig, true);
    let (told, delivery) = owe_progress(&rig, &hook, job()).await;
    rig.announce(std::slice::from_ref(&delivery)).await;
    let (missed, delivery) = owe_progress(&rig, &hook, job()).await;
    rig.announce(&[delivery]).await;
    let tried = |event: JobId| {
        let rig = &rig;
        move || async move { rig.view(event).await[0].attempts == 1 }
    };
    until_true("a try of the first", SOON, tried(told)).await;
    until_true("a try of the second", SOON, tried(missed)).await;
    overtaken(&rig, missed).await;
    overtaken(&rig, told).await;
    let word = v1::Delivery {
        owner_id: Bytes::copy_from_slice(told.as_bytes()),
        seq: 1,
        target: hook.target(),
        overtaken: true,
        ..v1::Delivery::default()
    };
    rig.announce(&[word]).await;
    for event in [told, missed] {
        let view = rig.ends(event, DeliveryState::Superseded).await;
        assert_eq!(view[0].attempts, 1, "no further try");
    }
    dispatcher.kill();
    let (left, _) = owe_progress(&rig, &hook, job()).await;
    overtaken(&rig, left).await;
    let _next = Dispatcher::start(&rig, true);
    assert_eq!(rig.ends(left, DeliveryState::Superseded).await[0].attempts, 0);
    assert_eq!(rig.receiver.count(), 2);
}
