//! The dispatcher against receivers that behave in every way, with a real broker and a real database.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::webhook::body::{self, Json, Terminal};
use ringback_domain::{JobId, JobStatus};
use ringback_service_runtime::blobs::{BlobKey, BlobStore};
use ringback_service_runtime::config::BlobsConfig;
use ringback_service_runtime::time::now_ms;
use ringback_store::deliveries::{DeliveryState, body_to_wire};
use ringback_store::delivery_search::one;
use ringback_test_support::receiver::Mode;
use ringback_test_support::signature::new_secret;
use ringback_test_support::wait::{until, until_true};
use support::{Dispatcher, PROJECT, Rig, SOON, TRACE, end, job, life};
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_tells_its_states_in_order_signed_and_traced() {
    let Some(rig) = Rig::start().await else { return };
    let _dispatcher = Dispatcher::start(&rig, true);
    // What is announced before somebody listens comes from SQL, without its trace.
    let owned = || async { rig.owners().await.values().sum::<usize>() == 8 };
    until_true("all partitions to be owned", SOON, owned).await;
    let ids: Vec<JobId> = (0..40).map(|_| job()).collect();
    for (n, id) in ids.iter().enumerate() {
        let mut life = life(*id, &rig.url("/hook?token=1"));
        if n % 2 == 0 {
            rig.owe(&life).await;
        } else {
            // Two publishers: what the second says overtakes what the first has not said.
            let late = life.split_off(1);
            rig.commit(&life).await;
            rig.owe(&late).await;
        }
    }
    for id in &ids {
        let seen = rig.ends(*id, DeliveryState::Delivered).await;
        assert_eq!(seen.iter().map(|d| (d.attempts, d.last_status)).collect::<Vec<_>>(), [(1, Some(200)); 3]);
        let owner = Uuid::from_bytes(*id.as_bytes());
        let found = one(rig.store.read(), PROJECT, owner, 3, 0).await.unwrap().unwrap();
        assert_eq!(found.response.as_deref(), Some(b"{\"acknowledged\":true}".as_slice()));
        assert!(found.duration_ms.is_some() && found.address.is_some());
        let hits = rig.receiver.hits_of(&id.to_string());
        let order: Vec<&str> = hits.iter().map(|hit| hit.status()).collect();
        assert_eq!(order, ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]);
        for (hit, view) in hits.iter().zip(&seen) {
            assert_eq!(hit.signature, Ok(()));
            assert_eq!((hit.webhook_id.as_str(), hit.sequence), (view.id.as_str(), u64::from(view.seq)));
            // Rows read from SQL take the trace from their job, and this test has no jobs.
            let trace = hit.header("traceparent");
            assert!(trace.is_empty() || trace[..35] == TRACE[..35], "{trace}");
            assert_eq!(hit.header("content-type"), "application/json");
            assert!(hit.header("user-agent").starts_with("Ringback/"));
            assert_eq!(hit.path, "/hook?token=1");
        }
        let text = std::str::from_utf8(&hits[2].body).unwrap();
        assert!(text.contains("\"output\":{\"n\": 1.50}"), "verbatim: {text}");
    }
    assert_eq!(rig.receiver.count(), 120, "each once");
    let traced = rig.receiver.hits().iter().filter(|hit| !hit.header("traceparent").is_empty()).count();
    assert!(traced >= 40, "{traced}");
}

/// P3: a crash between the commit and its announcement loses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_announced_is_found_and_secrets_rotate() {
    let Some(rig) = Rig::start().await else { return };
    let before = job();
    rig.commit(&[end(before, &rig.url("/before"))]).await;
    let _dispatcher = Dispatcher::start(&rig, false);
    rig.ends(before, DeliveryState::Delivered).await;
    let silent = job();
    rig.commit(&[end(silent, &rig.url("/silent"))]).await;
    rig.ends(silent, DeliveryState::Delivered).await;

    // A second secret: both sign, so that receivers with either go on.
    rig.add_secret(&new_secret()).await;
    until("both secrets to sign", SOON, || async {
        let id = job();
        rig.owe(&[end(id, &rig.url("/rotated"))]).await;
        rig.ends(id, DeliveryState::Delivered).await;
        let hit = rig.receiver.hits_of(&id.to_string()).remove(0);
        assert_eq!(hit.signature, Ok(()), "the old secret still verifies");
        (hit.header("webhook-signature").split(' ').count() == 2).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_neighbours_cost_the_others_nothing() {
    let Some(rig) = Rig::start().await else { return };
    for (path, mode) in [
        ("/fails-once", Mode::FailFirst { times: 1, status: 500 }),
        ("/gone", Mode::Status(410)),
        ("/busy", Mode::RetryAfter(429, 12)),
        ("/moved", Mode::Redirect("http://169.254.169.254/latest/meta-data".to_owned())),
        ("/drips", Mode::Drip(Duration::from_millis(50))),
        ("/hangs", Mode::Hang),
        ("/picky", Mode::AcceptOnly("COMPLETED")),
    ] {
        rig.receiver.answer(path, mode);
    }
    let _dispatcher = Dispatcher::start(&rig, true);
    // More tries that never end than one target has places.
    let hanging: Vec<JobId> = (0..300).map(|_| job()).collect();
    let owed: Vec<v1::Delivery> = hanging.iter().map(|id| end(*id, &rig.url("/hangs"))).collect();
    rig.owe(&owed).await;
    let (once, gone, busy, moved, drips, inside, picky) = (job(), job(), job(), job(), job(), job(), job());
    rig.owe(&[
        end(once, &rig.url("/fails-once")),
        end(busy, &rig.url("/busy")),
        end(moved, &rig.url("/moved")),
        end(drips, &rig.url("/drips")),
        end(inside, "http://10.0.0.1:8080/hook"),
    ])
    .await;
    rig.owe(&life(gone, &rig.url("/gone"))).await;
    rig.owe(&life(picky, &rig.url("/picky"))).await;

    let good: Vec<JobId> = (0..200).map(|_| job()).collect();
    let begun = Instant::now();
    for ids in good.chunks(20) {
        let owed: Vec<v1::Delivery> = ids.iter().map(|id| end(*id, &rig.url("/good"))).collect();
        rig.owe(&owed).await;
    }
    for id in &good {
        rig.receiver.wait_for(&id.to_string(), "COMPLETED", SOON).await;
    }
    // Far below the deadline of the hanging ones times their number; no figure, only "not behind them".
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(10), "the good ones waited {took:?}");

    let dead = rig.ends(gone, DeliveryState::Dead).await;
    assert_eq!(dead[0].last_error.as_deref(), Some("gone_410"));
    assert_eq!(rig.receiver.hits_of(&gone.to_string()).len(), 1, "410 ends the target");
    rig.ends(drips, DeliveryState::Delivered).await;
    // A failing notice does not hold back the result.
    rig.receiver.wait_for(&picky.to_string(), "COMPLETED", SOON).await;
    let states = until("the picky receiver's notices to end", SOON, || async {
        let view = rig.view(picky).await;
        view.iter().all(|d| d.state != DeliveryState::Pending).then_some(view)
    })
    .await;
    assert_eq!(
        states.iter().map(|d| d.state).collect::<Vec<_>>(),
        [DeliveryState::Superseded, DeliveryState::Superseded, DeliveryState::Delivered]
    );
    for (id, error, status) in [
        (moved, "redirect_302_not_followed", Some(302)),
        (inside, "blocked_address", None),
        (hanging[0], "timeout", None),
    ] {
        let seen = until(&format!("a try with {error}"), SOON, || async {
            rig.view(id).await.pop().filter(|d| d.attempts > 0)
        })
        .await;
        assert_eq!((seen.state, seen.last_status), (DeliveryState::Pending, status), "{seen:?}");
        assert!(seen.last_error.as_ref().is_some_and(|e| e.starts_with(error)), "{seen:?}");
        let wait = seen.next_attempt_at_ms.unwrap() - now_ms();
        assert!(wait <= 10_000, "{wait}");
        assert_eq!(rig.tries(id).await[0].status, status);
    }
    rig.ends(once, DeliveryState::Delivered).await;
    let hits = rig.receiver.hits_of(&once.to_string());
    assert_eq!(hits.len(), 2);
    assert!(hits[1].at - hits[0].at >= Duration::from_millis(9_900), "RunPod's 10 s");
    assert_eq!((&hits[0].webhook_id, &hits[0].body), (&hits[1].webhook_id, &hits[1].body));
    assert_eq!((&hits[0].signature, &hits[1].signature), (&Ok(()), &Ok(())));
    assert_ne!(hits[0].header("webhook-timestamp"), hits[1].header("webhook-timestamp"));
    rig.ends(busy, DeliveryState::Delivered).await;
    let hits = rig.receiver.hits_of(&busy.to_string());
    assert!(hits[1].at - hits[0].at >= Duration::from_millis(11_900), "Retry-After is kept");
    let tries = rig.tries(busy).await;
    assert_eq!((tries.len(), tries[0].n, tries[0].status), (1, 1, Some(429)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_output_is_sent_from_its_blob() {
    let Some(rig) = Rig::start().await else { return };
    let blobs = BlobStore::open(&BlobsConfig::default(), rig.folder.path()).unwrap();
    let output = format!("\"{}\"", "x".repeat(3 << 20));
    let id = job();
    let key = format!("out/{}/1-1-7", id.simple());
    blobs.put(&BlobKey::new(key.as_str()).unwrap(), Bytes::from(output.clone())).await.unwrap();
    let _dispatcher = Dispatcher::start(&rig, true);
    let text = id.to_string();
    let body = body::terminal(&Terminal {
        id: &text,
        status: JobStatus::Completed,
        delay_time_ms: 0,
        execution_time_ms: 0,
        output: Some(Json::Blob { key: &key, size_bytes: output.len() as u64 }),
        error: None,
        echo: None,
    });
    rig.owe(&[v1::Delivery { body: Some(body_to_wire(body)), ..end(id, &rig.url("/big")) }]).await;
    let hit = rig.receiver.wait_for(&text, "COMPLETED", SOON).await;
    assert_eq!(hit.signature, Ok(()));
    assert_eq!(hit.json["output"].as_str().map(str::len), Some(3 << 20));
}
