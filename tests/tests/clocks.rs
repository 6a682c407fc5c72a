//! Clocks that are wrong: a receiver's, within and beyond the five minutes that Standard Webhooks allows, and those of
//! the hosts that Ringback runs on, which must not matter, because the database's clock is the one that counts.

use http::Method;
use ringback_test_support::books::assert_books_balance;
use ringback_test_support::client::Reply;
use ringback_test_support::files::Folder;
use ringback_test_support::receiver::{Hit, Mode};
use ringback_test_support::signature;
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::receivers::installed;
use ringback_tests::{LATER, SOON, submit};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

/// Seconds that a receiver's clock may be away from the sender's.
const TOLERANCE_S: i64 = 300;

/// The library that shifts or stops the wall clock of the process that it is preloaded into.
fn clock_library(folder: &Folder) -> Option<PathBuf> {
    let compiler = tools::need(tools::on_path("cc"), "cc", "install a C compiler")?;
    let library = folder.path().join("shift.so");
    let output = Command::new(compiler)
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(tools::root().join("tests/clock/shift.c"))
        .output()
        .expect("run the compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(library)
}

const PYTHON: &str = "
import json, sys
import standardwebhooks.webhooks, svix.webhooks
capture = json.load(open(sys.argv[1]))
for package in (standardwebhooks, svix):
    try:
        package.webhooks.Webhook(capture['secret']).verify(capture['body'].encode(), capture['headers'])
        print('accepted')
    except package.webhooks.WebhookVerificationError as error:
        print('refused', error)
";

const NODE: &str = "
const { Webhook, WebhookVerificationError } = require('standardwebhooks');
const capture = JSON.parse(require('node:fs').readFileSync(process.argv[1], 'utf8'));
try {
  new Webhook(capture.secret).verify(capture.body, capture.headers);
  console.log('accepted');
} catch (error) {
  if (!(error instanceof WebhookVerificationError)) throw error;
  console.log('refused', error.message);
}
";

fn verdicts(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text.lines().map(str::to_owned).collect()
}

/// A delivery in a file, and everything that is needed to judge it at any moment.
struct Capture {
    folder: Folder,
    library: PathBuf,
    sent_at_s: i64,
}

impl Capture {
    fn of(hit: &Hit, secret: &str) -> Option<Self> {
        let folder = Folder::new("capture");
        let library = clock_library(&folder)?;
        let names = ["webhook-id", "webhook-timestamp", "webhook-signature"];
        let headers: serde_json::Map<String, Value> =
            names.iter().map(|name| ((*name).to_owned(), hit.header(name).into())).collect();
        let body = String::from_utf8(hit.body.to_vec()).expect("text");
        let lines: String = names.iter().map(|name| format!("{name}: {}\n", hit.header(name))).collect();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("write");
        write("capture.json", &json!({"headers": headers, "body": body, "secret": secret}).to_string());
        write("body", &body);
        write("headers", &lines);
        write("secret", secret);
        let sent_at_s = hit.header("webhook-timestamp").parse().expect("seconds");
        Some(Self { folder, library, sent_at_s })
    }

    fn at(&self, program: &Path, away_s: i64) -> Command {
        let mut command = Command::new(program);
        command
            .env("LD_PRELOAD", &self.library)
            .env("STOP_CLOCK_AT_S", (self.sent_at_s + away_s).to_string())
            .current_dir(self.folder.path());
        command
    }

    /// What every verifier says when its clock is so many seconds ahead of the sender's; one word or more for each.
    fn judged(&self, python: &Path, node: &Path, modules: &Path, away_s: i64) -> Vec<String> {
        let run = |command: &mut Command| command.output().expect("run a verifier");
        let mut all = verdicts(&run(self.at(python, away_s).args(["-c", PYTHON, "capture.json"])));
        let mut npm = self.at(node, away_s);
        all.extend(verdicts(&run(npm.args(["-e", NODE, "capture.json"]).env("NODE_PATH", modules))));
        let own = run(self.at(&tools::ringback(), away_s).args([
            "verify",
            "--secret-file",
            "secret",
            "--body",
            "body",
            "--headers",
            "headers",
        ]));
        all.push(match own.status.code() {
            Some(0) => "accepted".to_owned(),
            Some(4) => "refused".to_owned(),
            other => panic!("{other:?}: {}", String::from_utf8_lossy(&own.stderr)),
        });
        all
    }
}

/// The proof matrix's row "clock skew": at five minutes every verifier still accepts, a second further none does.
#[tokio::test(flavor = "multi_thread")]
async fn verifiers_accept_until_five_minutes_and_no_longer() {
    let (Some(python), Some(express)) = (tools::python("venv-verify"), installed("receiver-express")) else {
        return;
    };
    let Some(node) = tools::need(tools::on_path("node"), "node", "install Node.js 18 or newer") else {
        return;
    };
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let body = json!({"input": {"text": "ü"}, "webhook": stack.receiver.url("/hook")});
    let id = stack.api.run("echo", &body).await;
    let hit = stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
    let Some(capture) = Capture::of(&hit, &stack.secret) else { return };
    let modules = express.join("node_modules");
    for away_s in [0, TOLERANCE_S, -TOLERANCE_S] {
        let all = capture.judged(&python, &node, &modules, away_s);
        assert_eq!(all, ["accepted"; 4], "a clock {away_s} s ahead of the sender's");
    }
    for away_s in [TOLERANCE_S + 1, -TOLERANCE_S - 1, 86_400] {
        let all = capture.judged(&python, &node, &modules, away_s);
        assert!(
            all.len() == 4 && all.iter().all(|verdict| verdict.starts_with("refused")),
            "a clock {away_s} s ahead of the sender's: {all:?}"
        );
    }
}

/// Every service runs on a host whose clock is wrong by a quarter of an hour, in both directions: no lease is lost, no
/// time to live is over, retries come at their times, whoever takes over sends what is due, and receivers with a right
/// clock accept every signature.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_clocks_of_ringbacks_hosts_change_nothing() {
    let folder = Folder::new("clock");
    let Some(library) = clock_library(&folder) else { return };
    let mut options = Options::new(Backend::Postgres);
    options.endpoint("brief", r#"{ builtin = "echo" }"#, "ttl_ms = 120000");
    let Some(mut stack) = Stack::prepare(options).await else { return };
    for (name, shift_s) in [
        ("api", 420),
        ("tracker", -900),
        ("worker", 900),
        ("dispatcher", -900),
        ("reconciler", 900),
        ("second", 900),
        ("third", -900),
    ] {
        stack.set_variable(name, "LD_PRELOAD", &library.display().to_string());
        stack.set_variable(name, "SHIFT_CLOCK_S", &shift_s.to_string());
    }
    stack.start_apart().await;

    // Several lease periods long, and one whose time to live a wrong clock would see as over.
    let long = submit(&stack, "sleep", "long", &json!({"seconds": 5})).await;
    let brief = submit(&stack, "brief", "brief", &json!({"n": 1})).await;
    let stays = stack.api.run("echo", &refused(&stack, "/stays")).await;
    let hits = retried(&stack, &stays).await;
    assert_ten_seconds(&hits);
    let jobs = assert_books_balance(&stack, &[long, brief], LATER).await;
    for job in &jobs {
        assert_eq!((&job["status"], &job["run"]), (&json!("COMPLETED"), &json!(1)), "{job}");
    }
    // Nobody took the long one for lost. The worker asks before it runs the brief one, and is told to go on.
    assert_eq!(jobs[0]["attempt"], 1, "{}", jobs[0]);
    let told = stack.api.status("sleep", jobs[0]["id"].as_str().expect("an id")).await.expect(200);
    let (delay_ms, execution_ms) = (told["delayTime"].as_u64(), told["executionTime"].as_u64());
    assert!(execution_ms.is_some_and(|ms| (5_000..60_000).contains(&ms)), "{told}");
    assert!(delay_ms.is_some_and(|ms| ms < 60_000), "{told}");

    // A retry that one host has planned and another one makes; then what nobody announced to whoever comes next.
    for next in ["second", "third"] {
        let path = if next == "second" { "/moves" } else { "/moves-again" };
        let last = if next == "second" { "dispatcher" } else { "second" };
        let moves = stack.api.run("echo", &refused(&stack, path)).await;
        until("the refusal to be recorded", SOON, || async {
            let all = stack.api.deliveries(&moves).await;
            all.iter().any(|delivery| delivery["attempts"] == 1).then_some(())
        })
        .await;
        stack.kill9(last);
        let unheard =
            stack.api.run("echo", &json!({"input": {}, "webhook": stack.receiver.url("/unheard")})).await;
        stack.api.wait_end("echo", &unheard, SOON).await;
        stack.start_as(Role::Dispatcher, next).await;
        stack.receiver.wait_for(&unheard, "COMPLETED", SOON).await;
        assert_ten_seconds(&retried(&stack, &moves).await);
    }
    for hit in stack.receiver.hits() {
        assert_eq!(hit.signature, Ok(()), "{} {}", hit.path, hit.webhook_id);
    }
    // What the feed signs carries the database's moment too, not the one of the host that answers.
    let feed: Reply = stack.api.call(Method::GET, "/v1/events?limit=1", None).await;
    assert_eq!(feed.status, 200, "{}", feed.text);
    let event = &feed.json["events"][0];
    let told = event["headers"].as_object().expect("headers").iter();
    let headers: http::HeaderMap = told
        .map(|(name, value)| {
            let name: http::HeaderName = name.parse().expect("a name");
            (name, value.as_str().expect("a text").parse().expect("a value"))
        })
        .collect();
    let body = event["body"].as_str().expect("a body");
    assert_eq!(signature::verify(&stack.secret, &headers, body.as_bytes()), Ok(()), "{event}");
}

/// A job whose webhook is refused once.
fn refused(stack: &Stack, path: &str) -> Value {
    stack.receiver.answer(path, Mode::FailFirst { times: 1, status: 503 });
    json!({"input": {}, "webhook": stack.receiver.url(path)})
}

async fn retried(stack: &Stack, job: &str) -> Vec<Hit> {
    stack.receiver.wait_for(job, "COMPLETED", LATER).await;
    stack.receiver.hits_of(job)
}

/// The first gap of the schedule is 10 s; the rest is slack of a busy machine, and far from any clock's fault.
fn assert_ten_seconds(hits: &[Hit]) {
    assert_eq!(hits.iter().map(|hit| hit.answered).collect::<Vec<_>>(), [503, 200]);
    let gap = hits[1].at.duration_since(hits[0].at);
    assert!((Duration::from_millis(9_900)..Duration::from_secs(60)).contains(&gap), "{gap:?}");
    assert_eq!((&hits[0].webhook_id, &hits[0].body), (&hits[1].webhook_id, &hits[1].body));
}
