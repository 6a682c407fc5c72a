//! Receivers on bare sockets that do everything wrong, met through the public surface: webhooks of jobs and registered
//! ones. Tries end at their deadline, slots and memory stay bounded, and good receivers notice nothing.

use ringback_test_support::books::{Accepted, assert_books_balance};
use ringback_test_support::hostile::{Habit, Hostile};
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON, submit};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const DEADLINE_MS: u64 = 3_000;
/// Jobs for each of them: all together more than there are places.
const EACH: usize = 40;
/// Memory that hostile answers may cost.
const GROWTH_KIB: u64 = 100 * 1024;

/// What it does, how it is spoken to, and the word for it in the record; `None` where the head of the answer says 200.
const HABITS: [(Habit, &str, Option<&str>); 5] = [
    (Habit::Drips, "http", None),
    (Habit::NeverEnds, "http", None),
    (Habit::DripsItsHead, "http", Some("timeout")),
    // A TLS handshake that stalls.
    (Habit::Silent, "https", Some("timeout")),
    (Habit::HalfOpen, "http", Some("timeout")),
];

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("its memory");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

/// Deliveries of these jobs that have been tried, once there are a few: a breaker leaves a dead receiver alone soon.
async fn some_tried(stack: &Stack, jobs: &[String]) -> Vec<Value> {
    until("some tries to be recorded", LATER, || async {
        let mut tried = Vec::new();
        for job in jobs {
            // Its own webhook; the others are those of the registered ones.
            let all = stack.api.deliveries(job).await;
            let delivery = all.into_iter().find(|one| one["target"] == 0).expect("a delivery");
            if delivery["attempts"].as_u64() > Some(0) {
                tried.push(delivery);
            }
        }
        (tried.len() >= 5).then_some(tried)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn stalls_drips_and_half_open_connections_cost_the_others_nothing() {
    let options = Options::new(Backend::Sqlite)
        .with("webhooks", "deadline_ms", &DEADLINE_MS.to_string())
        .with("webhooks", "max_in_flight", "160")
        .with("webhooks", "per_target_in_flight", "32");
    let Some(mut stack) = Stack::dev(options).await else { return };
    let pid = stack.process("dev").pid();
    let before_kib = resident_kib(pid);
    let mut hostile = Vec::new();
    for (habit, scheme, word) in HABITS {
        let receiver = Hostile::start(habit).await;
        let url = receiver.url(scheme);
        let hook = json!({"url": url, "events": ["job.*"], "endpoints": ["sleep"]});
        stack.api.post("/v1/webhooks", &hook).await.expect(201);
        hostile.push((receiver, url, word));
    }
    let mut bad: Vec<Vec<String>> = vec![Vec::new(); hostile.len()];
    for _ in 0..EACH {
        for (n, (_, url, _)) in hostile.iter().enumerate() {
            bad[n].push(stack.api.run("sleep", &json!({"input": {"seconds": 0}, "webhook": url})).await);
        }
    }
    let mut good: Vec<Accepted> = Vec::new();
    for n in 0..20 {
        good.push(submit(&stack, "echo", &format!("good-{n}"), &json!({"n": n})).await);
    }
    let begun = Instant::now();
    for job in &good {
        stack.receiver.wait_for(&job.id, "COMPLETED", SOON).await;
    }
    println!("20 good jobs were told within {:?}", begun.elapsed());
    let mut most_kib = resident_kib(pid);
    for ((_, _, word), jobs) in hostile.iter().zip(&bad) {
        let tried = some_tried(&stack, jobs).await;
        most_kib = most_kib.max(resident_kib(pid));
        for delivery in &tried {
            let Some(word) = word else {
                // The head decides; the body is cut off.
                assert_eq!(
                    (&delivery["state"], &delivery["attempts"]),
                    (&json!("delivered"), &json!(1)),
                    "{delivery}"
                );
                continue;
            };
            assert!(delivery["last_error"].as_str().is_some_and(|error| error.contains(word)), "{delivery}");
            let id = delivery["id"].as_str().expect("an id");
            let tries = stack.api.get(&format!("/v1/deliveries/{id}/attempts")).await.expect(200);
            let took_ms = tries["attempts"][0]["duration_ms"].as_u64().unwrap_or_else(|| panic!("{tries}"));
            assert!((DEADLINE_MS - 50..DEADLINE_MS + 10_000).contains(&took_ms), "{tries}");
        }
    }
    assert_books_balance(&stack, &good, LATER).await;
    for job in &good {
        let mut ids: Vec<String> =
            stack.receiver.hits_of(&job.id).into_iter().map(|hit| hit.webhook_id).collect();
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), all, "{}: a good receiver got a copy", job.id);
    }
    assert!(most_kib < before_kib + GROWTH_KIB, "{before_kib} KiB before, {most_kib} KiB at most");
    // Nothing is held open beyond the deadline but what is tried again meanwhile, and that has its cap.
    for (receiver, url, _) in &hostile {
        until(&format!("connections to {url} to be given up"), Duration::from_secs(60), || async {
            (receiver.open() <= 32).then_some(())
        })
        .await;
    }
}
