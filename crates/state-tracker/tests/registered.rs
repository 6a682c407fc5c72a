//! Registered webhooks hear of every transition that is committed after them, and of nothing else.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

#[macro_use]
mod rig;

use rig::{Rig, crash, failure, first, hand_back, new_job, success, webhook};
use ringback_bus::Verb;
use ringback_contracts::{
    VERSION,
    catalogue::{catalogue, describe},
    completion_to_wire, v1,
};
use ringback_domain::{
    AttemptRef, JobId, JobStatus,
    event::{Completion, EventType},
};
use ringback_store::{
    Urgency,
    delivery_search::{DeliveryFilter, search},
    events::insert_owned,
    replays::{ReplayFilter, count},
    replays_api::upto_now,
    sql,
    submit::{Admission, Submit},
    webhooks::{
        bump_registry,
        health::{Death, died},
    },
};
use ringback_test_support::schema::faults;
use serde_json::{Value, json};
use uuid::Uuid;

scenarios! {
    every_transition_is_heard_under_one_name: 30_000,
    a_webhook_hears_of_what_comes_after_it: 30_000,
    filters_narrow_by_type_endpoint_and_metadata: 30_000,
    formats_say_what_they_can: 30_000,
    runflows_names_of_batches_bring_their_bodies: 30_000,
    a_batch_is_told_from_its_opening_to_its_end: 30_000,
    completions_tell_tokens_and_text: 30_000,
    retries_of_all_runs_are_heard: 30_000,
    progress_is_told_now_and_then_and_its_last_value_for_certain: 30_000,
    a_stuck_receiver_costs_the_others_nothing: 30_000,
    a_stuck_receiver_of_text_holds_up_no_progress: 30_000,
    the_endpoint_of_a_jobs_events_is_the_jobs: 30_000,
    text_of_a_completion_is_told_from_its_beginning: 30_000,
    a_lost_worker_is_told_once: 30_000,
    tokens_are_counted_and_told: 30_000,
}

/// What a webhook is owed, in order: event codes as names, with their bodies.
async fn owed(rig: &Rig, webhook: i64) -> Vec<(String, Value)> {
    use prost::Message as _;
    let rows = sql::query(
        rig.store.read(),
        "SELECT d.event, CASE WHEN d.body_target IS NULL THEN d.body ELSE (SELECT s.body FROM deliveries s \
         WHERE s.owner_id = d.owner_id AND s.seq = d.seq AND s.target = d.body_target) END, d.seq, d.owner_id \
         FROM deliveries d WHERE d.target = $1 ORDER BY d.owner_id, d.seq",
        [(65_536 + webhook).into()],
    )
    .await
    .unwrap();
    rows.iter()
        .map(|row| {
            let code = u32::try_from(row.try_get_by_index::<i64>(0).unwrap()).unwrap();
            let parts =
                ringback_contracts::v1::BodyParts::decode(&*row.try_get_by_index::<Vec<u8>>(1).unwrap())
                    .unwrap();
            let bytes: Vec<u8> = parts
                .parts
                .into_iter()
                .flat_map(|p| match p.part.unwrap() {
                    ringback_contracts::v1::body_part::Part::Inline(bytes) => bytes,
                    other => panic!("{other:?}"),
                })
                .collect();
            let event = EventType::from_code(code).unwrap();
            let body: Value = serde_json::from_slice(&bytes).unwrap();
            if body.get("api_version").is_some() {
                fits(event, &body);
            }
            (event.name().to_owned(), body)
        })
        .collect()
}

/// Checks an event against the schema of its type.
fn fits(event: EventType, body: &Value) {
    let entry: Value = serde_json::from_str(describe(event)).unwrap();
    assert_eq!(faults(&entry["schema"], body), [""; 0], "{event}: {body:#}");
}

#[test]
fn every_type_has_a_schema_and_an_example_that_fits_it() {
    for (event, text) in catalogue() {
        let entry: Value = serde_json::from_str(text).unwrap();
        assert_eq!((&entry["type"], &entry["example"]["type"]), (&json!(event.name()), &json!(event.name())));
        assert!(entry["description"].as_str().is_some_and(|text| !text.is_empty()), "{event}");
        fits(event, &entry["example"]);
        // A schema that takes anything would prove nothing.
        let mut broken = entry["example"].clone();
        broken["data"] = json!({"unknown": 1});
        assert!(faults(&entry["schema"], &broken).len() > 1, "{event}");
    }
    assert_eq!(catalogue().count(), EventType::ALL.len());
}

async fn names(rig: &Rig, webhook: i64) -> Vec<String> {
    owed(rig, webhook).await.into_iter().map(|(name, _)| name).collect()
}

async fn every_transition_is_heard_under_one_name(rig: &mut Rig) {
    rig.tracker().await;
    let all = webhook(rig, 0, json!({"events": ["*", "job.*", "job.completed"]})).await;
    let ends = webhook(rig, 0, json!({"events": ["job.completed", "job.failed"]})).await;
    let metadata = br#"{"tenant": "a", "n": 1.50}"#.to_vec();
    let job = rig
        .submit(vec![Submit { metadata: Some(metadata), client_ref: Some("c".into()), ..new_job() }])
        .await[0];
    rig.outcome("w", success(job, first(), r#"{"b": 1.50, "a": [1,  2]}"#)).await;
    let heard = owed(rig, all).await;
    let told: Vec<&str> = heard.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(told, ["job.queued", "job.started", "job.completed"]);
    assert_eq!(names(rig, ends).await, ["job.completed"]);
    let id = job.simple();
    for (seq, (name, body)) in (1..).zip(&heard) {
        assert_eq!(body["id"], format!("evt_{id}_{seq}"));
        assert_eq!(body["type"], name.as_str());
        assert_eq!(body["data"]["sequence"], seq);
        assert_eq!(body["data"]["job_id"], job.to_string());
        assert_eq!(body["data"]["endpoint"], "speech");
        assert_eq!(body["data"]["metadata"]["tenant"], "a");
    }
    let bodies = rig
        .number("SELECT COUNT(*) FROM deliveries WHERE event = 2 AND target >= 65536 AND body_target IS NULL")
        .await;
    assert_eq!(bodies, 1, "two webhooks share one body");
    let row = sql::query_one(
        rig.store.read(),
        "SELECT body FROM deliveries WHERE event = 2 AND target >= 65536 AND body_target IS NULL",
        [],
    )
    .await
    .unwrap()
    .unwrap();
    let raw = String::from_utf8_lossy(&row.try_get_by_index::<Vec<u8>>(0).unwrap()).into_owned();
    assert!(
        raw.contains(r#""output":{"b": 1.50, "a": [1,  2]}"#) && raw.contains(r#""n": 1.50"#),
        "verbatim: {raw}"
    );
    rig.books_balance().await;
    // The job's own two targets, and four of webhooks.
    assert_eq!(rig.row(job).await.job.owed, 4 + 4);
}

async fn a_webhook_hears_of_what_comes_after_it(rig: &mut Rig) {
    rig.tracker().await;
    rig.tracker().await;
    let job = rig.job().await;
    let attempt = first();
    rig.beat("w", &[(job, attempt)]).await;
    let late = webhook(rig, 0, json!({"events": ["job.*"]})).await;
    rig.outcome("w", success(job, attempt, "1")).await;
    assert_eq!(names(rig, late).await, ["job.completed"]);
    // Paused ones are owed and wait; deleted ones are owed nothing more.
    rig.execute("UPDATE webhooks SET paused = 1").await;
    rig.store.write(Urgency::Now, |tx| Box::pin(bump_registry(tx))).await.unwrap();
    rig.job().await;
    assert_eq!(names(rig, late).await.len(), 2);
    rig.execute("UPDATE webhooks SET deleted_at_ms = 1").await;
    rig.store.write(Urgency::Now, |tx| Box::pin(bump_registry(tx))).await.unwrap();
    let gone = rig.job().await;
    rig.outcome("w", success(gone, first(), "1")).await;
    assert_eq!(names(rig, late).await.len(), 2);
    rig.books_balance().await;
}

async fn filters_narrow_by_type_endpoint_and_metadata(rig: &mut Rig) {
    rig.tracker().await;
    rig.execute("UPDATE endpoints SET config = '{\"alias\":\"me/voice\"}'").await;
    let named = webhook(rig, 0, json!({"events": ["job.queued"], "endpoints": ["me/voice"]})).await;
    let other = webhook(rig, 0, json!({"events": ["job.queued"], "endpoints": ["music"]})).await;
    let tenant = webhook(rig, 0, json!({"events": ["job.*"], "metadata": {"tenant": "a"}})).await;
    for metadata in [None, Some(r#"{"tenant":"a"}"#), Some(r#"{"tenant":"b"}"#), Some(r#"{}"#)] {
        let metadata = metadata.map(|text| text.as_bytes().to_vec());
        let job = rig.submit(vec![Submit { metadata, ..new_job() }]).await[0];
        rig.outcome("w", success(job, first(), "1")).await;
    }
    assert_eq!(names(rig, named).await.len(), 4);
    assert_eq!(names(rig, other).await, [""; 0]);
    assert_eq!(names(rig, tenant).await, ["job.queued", "job.started", "job.completed"]);
    rig.books_balance().await;
}

async fn formats_say_what_they_can(rig: &mut Rig) {
    rig.tracker().await;
    let runpod = webhook(rig, 2, json!({"events": ["*"]})).await;
    let runflow = webhook(rig, 1, json!({"events": ["*"]})).await;
    let job = rig.submit(vec![Submit { metadata: Some(b"{\"k\":1}".to_vec()), ..new_job() }]).await[0];
    rig.outcome("w", success(job, first(), "{\"a\":1}")).await;
    let bodies = owed(rig, runpod).await;
    assert_eq!(
        bodies.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(),
        ["job.queued", "job.started", "job.completed"]
    );
    assert_eq!(bodies[0].1, json!({"id": job.to_string(), "status": "IN_QUEUE"}));
    let end = &bodies[2].1;
    assert_eq!((&end["input"], &end["output"]), (&json!({"text": "hi"}), &json!({"a": 1})));
    assert_eq!(end["webhook"], "https://hooks.example/x");
    let run = owed(rig, runflow).await;
    assert_eq!(run.len(), 1);
    assert_eq!((&run[0].1["event"], &run[0].1["run_id"]), (&json!("run.completed"), &json!(job.to_string())));
    assert_eq!(run[0].1["metadata"], json!({"k": 1}));
    assert_eq!(
        rig.number(
            "SELECT format FROM deliveries WHERE target = (SELECT 65536 + id FROM webhooks WHERE format = 1)"
        )
        .await,
        1
    );
    let (_, jobs) = rig.batch(2, false).await;
    for job in jobs {
        rig.outcome("w", success(job, first(), "1")).await;
    }
    let last = owed(rig, runflow).await.into_iter().find(|(name, _)| name.starts_with("batch.")).unwrap();
    assert_eq!((last.0.as_str(), &last.1["event"]), ("batch.completed", &json!("batch.succeeded")));
    assert!(names(rig, runpod).await.iter().all(|n| n.starts_with("job.")));
    rig.books_balance().await;
}

async fn runflows_names_of_batches_bring_their_bodies(rig: &mut Rig) {
    rig.tracker().await;
    let mut hooks = Vec::new();
    for name in ["batch.succeeded", "batch.partial_succeeded", "batch.failed", "batch.cancelled", "batch.*"] {
        hooks.push((name, webhook(rig, 1, json!({"events": [name]})).await));
    }
    for good in [2, 1, 0] {
        let (_, jobs) = rig.batch(2, false).await;
        for (n, job) in jobs.into_iter().enumerate() {
            let end = if n < good { success(job, first(), "1") } else { failure(job, first(), "no voice") };
            rig.outcome("w", end).await;
        }
    }
    let ends = ["batch.succeeded", "batch.partial_succeeded", "batch.failed"];
    for (name, hook) in hooks {
        let told = owed(rig, hook).await;
        let told: Vec<&str> = told.iter().map(|(_, body)| body["event"].as_str().unwrap()).collect();
        let wanted = ends.iter().filter(|end| name == "batch.*" || **end == name);
        assert_eq!(told, wanted.copied().collect::<Vec<_>>(), "{name}");
    }
    rig.books_balance().await;
}

async fn a_batch_is_told_from_its_opening_to_its_end(rig: &mut Rig) {
    rig.tracker().await;
    let all = webhook(rig, 0, json!({"events": ["batch.*"]})).await;
    let (batch, jobs) = rig.batch(3, false).await;
    assert_eq!(names(rig, all).await, ["batch.created"]);
    rig.outcome("w", success(jobs[0], first(), "1")).await;
    rig.outcome("w", failure(jobs[1], first(), "no voice")).await;
    assert_eq!(names(rig, all).await, ["batch.created", "batch.processing"]);
    rig.cancel(rig::PROJECT, jobs[2]).await;
    let heard = owed(rig, all).await;
    let told: Vec<&str> = heard.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(told, ["batch.created", "batch.processing", "batch.completed"]);
    let (id, hex) = (batch.to_string(), batch.simple());
    let end = &heard[2].1["data"];
    assert_eq!(heard[2].1["id"], format!("evt_{hex}_3"));
    assert_eq!((&end["batch_id"], &end["status"]), (&json!(id), &json!("COMPLETED")));
    assert_eq!(
        [&end["total_requests"], &end["completed"], &end["failed"], &end["cancelled"]],
        [&json!(3), &json!(1), &json!(1), &json!(1)]
    );
    assert_eq!(end["output_file_id"], format!("file_{hex}_output"));
    assert_eq!(end["error_file_id"], format!("file_{hex}_errors"));
    let links = ["output_file_url", "error_file_url"].map(|name| end[name].as_str().unwrap_or_default());
    assert!(links[0].starts_with("https://ringback.example/batches/"), "{end}");
    assert!(links[0].ends_with("/output.jsonl") && links[1].ends_with("/errors.jsonl"), "{end}");
    assert!(end["processing_time_seconds"].as_f64().unwrap() >= 0.0);
    assert!(heard[0].1["data"]["output_file_id"].is_null());
    // One that ends without a start says nothing of processing.
    let (_, jobs) = rig.batch(1, false).await;
    rig.cancel(rig::PROJECT, jobs[0]).await;
    assert_eq!(names(rig, all).await[3..], ["batch.created", "batch.completed"]);
    rig.books_balance().await;
}

async fn completions_tell_tokens_and_text(rig: &mut Rig) {
    rig.tracker().await;
    rig.execute("UPDATE endpoints SET config = '{\"kind\":\"completion\",\"model\":\"m-1\"}'").await;
    let both = webhook(rig, 0, json!({"events": ["*"]})).await;
    let jobs = webhook(rig, 0, json!({"events": ["job.*"]})).await;
    let ask = || Submit { request_id: Some("req-7".into()), ..new_job() };
    let [good, bad, gone] = [
        rig.submit(vec![ask()]).await[0],
        rig.submit(vec![ask()]).await[0],
        rig.submit(vec![ask()]).await[0],
    ];
    let output = r#"{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":2,"completion_tokens":3}}"#;
    rig.outcome("w", success(good, first(), output)).await;
    rig.outcome("w", failure(bad, first(), "out of memory")).await;
    rig.cancel(rig::PROJECT, gone).await;
    let heard = owed(rig, both).await;
    let of = |job: JobId| -> Vec<(&str, &Value)> {
        heard
            .iter()
            .filter(|(_, body)| body["data"]["job_id"] == job.to_string())
            .map(|(name, body)| (name.as_str(), &body["data"]))
            .collect()
    };
    let good = of(good);
    assert_eq!(
        good.iter().map(|(n, _)| *n).collect::<Vec<_>>(),
        ["job.queued", "completion.started", "completion.finished"]
    );
    assert_eq!((&good[1].1["model"], &good[1].1["request_id"]), (&json!("m-1"), &json!("req-7")));
    let end = good[2].1;
    assert_eq!((&end["content"], &end["finish_reason"]), (&json!("Hi"), &json!("stop")));
    assert_eq!(
        [&end["prompt_tokens"], &end["completion_tokens"], &end["total_tokens"]],
        [&json!(2), &json!(3), &json!(5)]
    );
    let bad = of(bad);
    assert_eq!(
        (bad[2].0, &bad[2].1["error"], &bad[2].1["finish_reason"]),
        ("completion.failed", &json!("out of memory"), &json!("error"))
    );
    let gone = of(gone);
    assert_eq!((gone[1].0, &gone[1].1["finish_reason"]), ("completion.failed", &json!("cancelled")));
    // Whoever asks for jobs hears of them under that name.
    assert!(names(rig, jobs).await.iter().all(|n| n.starts_with("job.")));
    assert_eq!(names(rig, jobs).await.len(), heard.len());
    // An output in a blob: its worker told what it says, and the tracker reads no blob.
    let large = rig.submit(vec![ask()]).await[0];
    let said = Completion {
        content: Some("Once".into()),
        content_cut: true,
        finish_reason: Some("length".into()),
        prompt_tokens: Some(7),
        completion_tokens: Some(900),
        total_tokens: Some(907),
        model: Some("m-2".into()),
    };
    let at = Some(v1::payload::At::BlobKey("out/x/1-1-00".into()));
    let output = Some(v1::Payload { at, size_bytes: 300_000 });
    let result = Some(v1::outcome::Result::Success(v1::Success { output }));
    let told =
        v1::Outcome { result, completion: Some(completion_to_wire(said)), ..success(large, first(), "1") };
    rig.outcome("w", told).await;
    let all = owed(rig, both).await;
    let (name, body) = all.iter().rfind(|(_, b)| b["data"]["job_id"] == large.to_string()).unwrap();
    let data = &body["data"];
    assert_eq!((name.as_str(), &data["content"]), ("completion.finished", &json!("Once")));
    assert_eq!((&data["content_truncated"], &data["total_tokens"]), (&json!(true), &json!(907)));
    assert_eq!((&data["model"], &data["finish_reason"]), (&json!("m-2"), &json!("length")));
    rig.books_balance().await;
}

async fn retries_of_all_runs_are_heard(rig: &mut Rig) {
    rig.tracker().await;
    let all = webhook(rig, 0, json!({"events": ["job.*"]})).await;
    let queued = webhook(rig, 0, json!({"events": ["job.queued"]})).await;
    let job = rig.job().await;
    rig.outcome("w", crash(job, first())).await;
    assert_eq!(rig.status(job).await, JobStatus::InQueue);
    rig.grant("w", job, 1, 0).await;
    let live = rig.row(job).await.job.state.live().cloned().unwrap();
    let attempt = ringback_domain::AttemptRef { run: 1, attempt: live.attempt, nonce: live.nonce };
    rig.outcome("w", hand_back(job, attempt)).await;
    rig.cancel(rig::PROJECT, job).await;
    rig.retry(job, true).await;
    rig.outcome("w", success(job, ringback_domain::AttemptRef { run: 2, ..first() }, "1")).await;
    assert_eq!(
        names(rig, all).await,
        [
            "job.queued",
            "job.started",
            "job.retried",
            "job.started",
            "job.retried",
            "job.cancelled",
            "job.retried",
            "job.started",
            "job.completed"
        ]
    );
    assert_eq!(names(rig, queued).await, ["job.queued"; 4]);
    let runs: Vec<Value> = owed(rig, all).await.into_iter().map(|(_, b)| b["data"]["run"].clone()).collect();
    assert_eq!(runs, [1, 1, 1, 1, 1, 1, 2, 2, 2].map(Value::from));
    rig.books_balance().await;
}

fn progress(job: JobId, attempt: AttemptRef, value: &str) -> v1::Heartbeat {
    let mut beat = rig::beat_of("w", &[(job, attempt)]);
    beat.full = false;
    beat.attempts[0].progress = value.to_owned().into();
    beat
}

/// The dispatcher's word that all is taken.
async fn taken(rig: &Rig) {
    rig.execute("UPDATE deliveries SET state = 1 WHERE state = 0").await;
}

async fn progress_is_told_now_and_then_and_its_last_value_for_certain(rig: &mut Rig) {
    rig.tracker().await;
    let quick = webhook(rig, 0, json!({"events": ["*"]})).await;
    let slow = webhook(rig, 0, json!({"events": ["job.progress"]})).await;
    let values = async |rig: &Rig, of| -> Vec<i64> {
        let told = owed(rig, of).await.into_iter().filter(|(name, _)| name == "job.progress");
        let mut all: Vec<(String, i64)> = told
            .map(|(_, b)| (b["created_at"].to_string(), b["data"]["progress"]["n"].as_i64().unwrap()))
            .collect();
        all.sort_unstable();
        all.into_iter().map(|(_, n)| n).collect()
    };
    let job = rig.submit(vec![Submit { metadata: Some(b"{\"k\":1}".to_vec()), ..new_job() }]).await[0];
    let attempt = first();
    for n in 0..20 {
        rig.heartbeat(progress(job, attempt, &format!("{{\"n\":{n}}}"))).await;
    }
    assert_eq!(values(rig, quick).await.len(), 1, "at most one per half second");
    // One receiver takes what it gets, the other one does not: it gets the last value when it did.
    rig.execute("UPDATE deliveries SET state = 1 WHERE target = (SELECT 65536 + MIN(id) FROM webhooks)")
        .await;
    let soon = std::time::Duration::from_secs(20);
    ringback_test_support::wait::until("the last value", soon, || async {
        (values(rig, quick).await.last() == Some(&19)).then_some(())
    })
    .await;
    let so_far = values(rig, slow).await;
    assert_eq!(so_far.len(), 1, "one pending per job and target: {so_far:?}");
    taken(rig).await;
    ringback_test_support::wait::until("the last value for the other", soon, || async {
        (values(rig, slow).await.last() == Some(&19)).then_some(())
    })
    .await;
    rig.heartbeat(progress(job, attempt, "{\"n\":20}")).await;
    assert_eq!(rig.number("SELECT COUNT(*) FROM events WHERE overtaken = 1").await, 0);
    rig.outcome("w", success(job, attempt, "1")).await;
    // What was told and not taken is overtaken, and what waited gives way to the end.
    let pending = "SELECT COUNT(*) FROM events e JOIN deliveries d ON d.owner_id = e.id AND d.state = 0";
    assert!(rig.number(&format!("{pending} WHERE e.overtaken = 1")).await > 0);
    assert_eq!(rig.number(&format!("{pending} WHERE e.overtaken = 0")).await, 0);
    assert_eq!(rig.number("SELECT COUNT(*) FROM progress_notices").await, 0);
    // Events of a job lie in its partition, and end as its id does.
    let other = rig
        .number("SELECT COUNT(*) FROM deliveries WHERE partition <> (SELECT MAX(partition) FROM deliveries WHERE event = 2)")
        .await;
    assert_eq!(other, 0);
    rig.books_balance().await;
}

/// The word that one webhook took what it got.
async fn taken_by(rig: &Rig, webhook: i64) {
    let text = "UPDATE deliveries SET state = 1 WHERE state = 0 AND target = $1";
    rig.store
        .write(Urgency::Now, move |tx| {
            Box::pin(
                async move { sql::execute(tx.conn(), text, [(65_536 + webhook).into()]).await.map(drop) },
            )
        })
        .await
        .unwrap();
}

/// The progress values that a webhook was told, in order.
async fn values_told(rig: &Rig, webhook: i64) -> Vec<i64> {
    let told = owed(rig, webhook).await.into_iter().filter(|(name, _)| name == "job.progress");
    let mut all: Vec<i64> = told.map(|(_, b)| b["data"]["progress"]["n"].as_i64().unwrap()).collect();
    all.sort_unstable();
    all
}

async fn a_stuck_receiver_costs_the_others_nothing(rig: &mut Rig) {
    use ringback_test_support::wait::until;
    rig.tracker().await;
    let soon = std::time::Duration::from_secs(20);
    let quick = webhook(rig, 0, json!({"events": ["job.progress"]})).await;
    let stuck = webhook(rig, 0, json!({"events": ["job.progress"]})).await;
    let (job, attempt) = (rig.job().await, first());
    rig.heartbeat(progress(job, attempt, "{\"n\":0}")).await;
    taken_by(rig, quick).await;
    for n in 1..=2_i64 {
        rig.heartbeat(progress(job, attempt, &format!("{{\"n\":{n}}}"))).await;
        until("the quick one's news", soon, || async {
            (values_told(rig, quick).await.last() == Some(&n)).then_some(())
        })
        .await;
        taken_by(rig, quick).await;
        // The timer looks several times after the stuck one, and each time the quick one could take a copy.
        let told_at = "SELECT told_at_ms FROM progress_notices";
        let since = rig.number(told_at).await;
        until("four looks of the timer", soon, || async {
            taken_by(rig, quick).await;
            (rig.number(told_at).await >= since + 2_000).then_some(())
        })
        .await;
        assert_eq!(values_told(rig, quick).await, (0..=n).collect::<Vec<_>>(), "each news once");
        assert_eq!(values_told(rig, stuck).await, [0]);
    }
    taken_by(rig, stuck).await;
    until("the newest for the one that was stuck", soon, || async {
        (values_told(rig, stuck).await == [0, 2]).then_some(())
    })
    .await;
    assert_eq!(values_told(rig, quick).await, [0, 1, 2]);
    assert_eq!(rig.number("SELECT COUNT(*) FROM progress_notices WHERE waiting > 0").await, 0);
    rig.outcome("w", success(job, attempt, "1")).await;
    rig.books_balance().await;
}

async fn a_stuck_receiver_of_text_holds_up_no_progress(rig: &mut Rig) {
    use ringback_test_support::wait::until;
    rig.tracker().await;
    let soon = std::time::Duration::from_secs(20);
    rig.execute("UPDATE endpoints SET config = '{\"kind\":\"completion\",\"model\":\"m-1\"}'").await;
    let both = webhook(rig, 0, json!({"events": ["completion.streaming", "job.progress"]})).await;
    let stuck = webhook(rig, 0, json!({"events": ["completion.streaming", "job.progress"]})).await;
    let (job, attempt) = (rig.job().await, first());
    let count = async |rig: &Rig, of: i64, event: &str| -> usize {
        names(rig, of).await.iter().filter(|name| *name == event).count()
    };
    for n in 0..3_u32 {
        let chunk = v1::Chunk {
            attempt: Some(ringback_contracts::attempt_to_wire(&job, &attempt)),
            n,
            output: json!({"choices": [{"delta": {"content": "a"}}]}).to_string().into(),
            started_at_ms: ringback_service_runtime::time::now_ms(),
        };
        let batch = v1::ChunkBatch { version: VERSION, worker_id: "w".into(), chunks: vec![chunk] };
        rig.ask::<v1::ChunkReply>(Verb::Chunks, &batch).await;
        rig.heartbeat(progress(job, attempt, &format!("{{\"n\":{n}}}"))).await;
        until("the text and the progress", soon, || async {
            taken_by(rig, both).await;
            let text = count(rig, both, "completion.streaming").await;
            (text > n as usize && values_told(rig, both).await.last() == Some(&i64::from(n))).then_some(())
        })
        .await;
    }
    assert_eq!(owed(rig, both).await.len(), 6, "each news once: {:?}", names(rig, both).await);
    assert_eq!(names(rig, stuck).await, ["completion.streaming"]);
    // It gets the newest of both kinds, one after the other as it takes them.
    until("both kinds for the one that was stuck", soon, || async {
        taken_by(rig, stuck).await;
        (owed(rig, stuck).await.len() == 3).then_some(())
    })
    .await;
    assert_eq!(values_told(rig, stuck).await, [2]);
    rig.outcome("w", success(job, attempt, r#"{"text":"aaa"}"#)).await;
    rig.books_balance().await;
}

async fn the_endpoint_of_a_jobs_events_is_the_jobs(rig: &mut Rig) {
    rig.tracker().await;
    let hook = webhook(rig, 0, json!({"events": ["job.progress", "delivery.dead"]})).await;
    let mut jobs = rig.submit(vec![new_job(), Submit { sync_id: true, ..new_job() }]).await;
    jobs.sort_unstable();
    for job in &jobs {
        rig.heartbeat(progress(*job, first(), "{\"n\":0}")).await;
    }
    let key = |n: u128| Uuid::from_u128((1 << 100) + n);
    let dead = Death {
        owner: Uuid::from_bytes(*jobs[0].as_bytes()),
        seq: 1,
        target: 0,
        project: rig::PROJECT.0,
        event: EventType::JobCompleted.code(),
        attempts: 1,
        created_at_ms: 0,
        last_status: None,
        last_error: None,
        id: key(1),
    };
    // Something that belongs to no endpoint, under a subject that is no job's.
    let test = v1::Delivery {
        owner_id: key(2).as_bytes().to_vec().into(),
        seq: 1,
        target: u32::try_from(65_536 + hook).unwrap(),
        project_id: rig::PROJECT.0,
        event: EventType::WebhookTest.code(),
        body: Some(v1::BodyParts::default()),
        ..v1::Delivery::default()
    };
    rig.store
        .write(Urgency::Now, move |tx| {
            let (dead, test) = (dead.clone(), test.clone());
            Box::pin(async move {
                died(tx, 4, &[&dead]).await?;
                insert_owned(tx, 4, key(2).as_bytes(), "wh_none", &[test]).await
            })
        })
        .await
        .unwrap();
    for (endpoint, wanted) in [(rig::ENDPOINT.0, 3_usize), (rig::ENDPOINT.0 + 1, 0)] {
        let events = vec![
            EventType::JobProgress.code(),
            EventType::DeliveryDead.code(),
            EventType::WebhookTest.code(),
        ];
        let filter =
            DeliveryFilter { endpoint: Some(endpoint), events: events.clone(), ..DeliveryFilter::default() };
        let found = search(rig.store.read(), rig::PROJECT, &filter, None, 20).await.unwrap();
        assert_eq!(found.len(), wanted, "{found:?}");
        taken(rig).await;
        let upto = upto_now(rig.store.read()).await.unwrap().max(i64::from(u32::MAX));
        let filter = ReplayFilter { endpoint_id: Some(endpoint), events, ..ReplayFilter::default() };
        let again = count(rig.store.read(), rig::PROJECT, &filter, upto).await.unwrap();
        assert_eq!(again, wanted as u64);
    }
    assert_eq!(
        rig.number("SELECT COUNT(*) FROM deliveries WHERE owner_id IN (SELECT id FROM events)").await,
        4
    );
}

async fn text_of_a_completion_is_told_from_its_beginning(rig: &mut Rig) {
    rig.tracker().await;
    rig.execute("UPDATE endpoints SET config = '{\"kind\":\"completion\",\"model\":\"m-1\"}'").await;
    let hook = webhook(rig, 0, json!({"events": ["completion.*"]})).await;
    let job = rig.job().await;
    let attempt = first();
    let chunk = |n: u32, text: &str| v1::Chunk {
        attempt: Some(ringback_contracts::attempt_to_wire(&job, &attempt)),
        n,
        output: json!({"choices": [{"delta": {"content": text}}]}).to_string().into(),
        started_at_ms: ringback_service_runtime::time::now_ms(),
    };
    let send = async |rig: &Rig, chunks: Vec<v1::Chunk>| {
        let batch = v1::ChunkBatch { version: VERSION, worker_id: "w".into(), chunks };
        rig.ask::<v1::ChunkReply>(Verb::Chunks, &batch).await;
    };
    send(rig, vec![chunk(0, "Once ")]).await;
    taken(rig).await;
    send(rig, vec![chunk(1, "upon "), chunk(2, "a time")]).await;
    // Said again: it is there once.
    send(rig, vec![chunk(2, "a time")]).await;
    let texts = async |rig: &Rig| -> Vec<String> {
        let told = owed(rig, hook).await.into_iter().filter(|(name, _)| name == "completion.streaming");
        let mut all: Vec<String> =
            told.map(|(_, b)| b["data"]["content"].as_str().unwrap().to_owned()).collect();
        all.sort_by_key(String::len);
        all
    };
    ringback_test_support::wait::until("all of the text", std::time::Duration::from_secs(20), || async {
        (texts(rig).await.last().map(String::as_str) == Some("Once upon a time")).then_some(())
    })
    .await;
    assert_eq!(texts(rig).await.first().map(String::as_str), Some("Once "));
    rig.outcome("w", success(job, attempt, r#"{"text":"Once upon a time"}"#)).await;
    assert!(names(rig, hook).await.contains(&"completion.finished".to_owned()));
    rig.books_balance().await;
}

async fn a_lost_worker_is_told_once(rig: &mut Rig) {
    rig.tracker().await;
    let hook = webhook(rig, 0, json!({"events": ["worker.*", "job.retried"]})).await;
    let jobs = [rig.job().await, rig.job().await];
    let attempts = [first(), first()];
    rig.heartbeat(rig::beat_of("w-old", &[(jobs[0], attempts[0]), (jobs[1], attempts[1])])).await;
    // Another worker took its place: its attempts are lost at once.
    let mut beat = rig::beat_of("w-new", &[]);
    beat.replaces = vec!["w-old".to_owned()];
    rig.heartbeat(beat.clone()).await;
    rig.heartbeat(beat).await;
    let heard = owed(rig, hook).await;
    let lost: Vec<&Value> =
        heard.iter().filter(|(n, _)| n == "worker.lost").map(|(_, b)| &b["data"]).collect();
    assert_eq!(lost.len(), 1, "{heard:?}");
    assert_eq!((&lost[0]["worker_id"], &lost[0]["endpoint"]), (&json!("w-old"), &json!("speech")));
    assert_eq!(lost[0]["jobs"].as_array().unwrap().len(), 2);
    assert!(lost[0]["last_heartbeat_at"].is_string());
    assert_eq!(heard.iter().filter(|(n, _)| n == "job.retried").count(), 2);
    rig.books_balance().await;
}

async fn tokens_are_counted_and_told(rig: &mut Rig) {
    rig.tracker().await;
    rig.execute("UPDATE endpoints SET config = '{\"kind\":\"completion\"}'").await;
    rig.execute(
        "INSERT INTO project_quotas (project_id, period, jobs, tokens) VALUES (1, 'month', NULL, 100)",
    )
    .await;
    let hook = webhook(rig, 0, json!({"events": ["usage.*"]})).await;
    let output = r#"{"text":"Hi","usage":{"prompt_tokens":10,"completion_tokens":30}}"#;
    for expected in [vec![], vec![80], vec![80, 100]] {
        let job = rig.job().await;
        rig.outcome("w", success(job, first(), output)).await;
        let mut told: Vec<i64> =
            owed(rig, hook).await.iter().map(|(_, b)| b["data"]["threshold"].as_i64().unwrap()).collect();
        told.sort_unstable();
        // 120 of 100 passes 95 and the limit at once.
        let wanted = if expected.len() == 2 { vec![80, 95, 100] } else { expected };
        assert_eq!(told, wanted);
    }
    assert_eq!(rig.number("SELECT used FROM usage_counters WHERE metric = 'tokens'").await, 120);
    // Now nothing more is taken.
    let refused = rig.try_submit(new_job()).await;
    assert!(matches!(refused, Admission::Refused(r) if r.over.used == 120 && r.over.limit == 100));
    assert_eq!(owed(rig, hook).await.len(), 3, "the limit is told once");
    rig.books_balance().await;
}
