"""`make demo`: a real batch of sentences becomes speech through real services, start to finish.

Starts the receiver and `ringback dev` with handler.py (an unmodified RunPod handler) as its endpoint `tts`,
submits one batch over HTTP, waits until every owed webhook has arrived signed, checks the WAV files, prints
what happened and exits 0; otherwise it says what is missing, shows the end of the logs and exits 1.

Only Python's standard library is used here; handler.py and receiver.py run in the environment whose Python
runs this script (.tools/venv-demo, made by tools/setup).
"""

import argparse
import array
import base64
import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SENTENCES = [
    "Every job that is accepted is written to disk before the answer goes out.",
    "A worker may die at any moment, and the job is run again.",
    "The result of a job counts exactly once.",
    "The message broker is only an index, and it can be rebuilt.",
    "Each change of state is told to its receiver, in order.",
    "Every webhook carries a signature and an identifier that never changes.",
    "A receiver that is asleep gets its webhook later.",
    "This sentence was spoken by an unmodified RunPod handler.",
    "No graphics card was needed for this small voice.",
    "The five services share nothing but a queue and a database.",
    "Nothing is lost when the power goes out.",
    "If a receiver answers with an error, Ringback tries again in ten seconds.",
    "A bad neighbour does not slow down the others.",
    "That was the last sentence of this batch. Goodbye!",
]
EVENTS_PER_JOB = ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
SILENT_BELOW = 200.0


class Problem(Exception):
    """Why the demo failed, for a person."""


def say(text):
    clear_progress()
    print(f"demo: {text}", flush=True)


def clear_progress():
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


def show_progress(spoken, total, webhooks):
    """One line that moves on a terminal; elsewhere a line per finished sentence."""
    text = f"{spoken} of {total} sentences spoken, {webhooks} webhooks received and verified"
    if sys.stdout.isatty():
        filled = 24 * spoken // total
        print(f"\r\033[K[{'█' * filled}{'·' * (24 - filled)}] {text}", end="", flush=True)
    elif show_progress.last != spoken:
        show_progress.last = spoken
        print(f"demo: {text}", flush=True)


show_progress.last = None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Child:
    """A process with its output in a file, ended with the demo."""

    def __init__(self, name, command, folder, **options):
        self.name = name
        self.log = folder / f"{name}.log"
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=self.log.open("wb"), stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, **options)

    def check(self):
        code = self.process.poll()
        if code is not None:
            raise Problem(f"{self.name} ended with {code}")

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def tail(self, lines=25):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Api:
    def __init__(self, base, key):
        self.base = base
        self.key = key

    def call(self, method, path, body=None):
        request = urllib.request.Request(
            self.base + path, method=method, data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": f"Bearer {self.key}", "content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            raise Problem(f"{method} {path} answered {error.code}: {error.read().decode(errors='replace')[:500]}")

    def is_ready(self):
        try:
            with urllib.request.urlopen(self.base + "/healthz/ready", timeout=2) as reply:
                return reply.status == 200
        except OSError:
            return False


def wait_for(what, seconds, look, children, every=0.1):
    """Calls `look` until it gives something; a child that ended or the deadline is a Problem."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            raise Problem(f"waited {seconds} s for {what}")
        time.sleep(every)


def first_json_line(path):
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            return json.loads(line)
    return None


def read_log(path):
    """The receiver's lines; a line that is still being written is left for the next look."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def submit(api, receiver, count):
    sentences = [SENTENCES[n % len(SENTENCES)] for n in range(count)]
    batch = api.call("POST", "/v1/batches", {
        "endpoint": "tts",
        "items": [{"input": {"text": text}, "client_ref": f"sentence-{n + 1:02}"}
                  for n, text in enumerate(sentences)],
        "webhookv2": f"{receiver}/webhooks",
        "callback_url": f"{receiver}/webhooks",
        "on_failure": "continue",
    })
    return batch["batch_id"], sentences


def jobs_of(api, batch_id):
    """The batch's jobs in full, in the order of its items."""
    jobs, cursor = [], None
    while True:
        page = api.call("GET", f"/v1/jobs?batch={batch_id}&limit=100" + (f"&cursor={cursor}" if cursor else ""))
        jobs += page["jobs"]
        cursor = page.get("next_cursor")
        if not cursor:
            break
    full = [api.call("GET", f"/v1/jobs/{job['id']}") for job in jobs]
    return sorted(full, key=lambda job: job.get("client_ref") or "")


def settled(api, batch_id):
    """The batch's jobs once none of their deliveries is pending: an answer is recorded shortly after it came."""
    jobs = jobs_of(api, batch_id)
    return None if any(job["deliveries"]["pending"] for job in jobs) else jobs


def outcome(api, batch_id, log_path, total, seen):
    """The accepted webhooks once every owed one is there, else None; reports progress on the way."""
    accepted = {}
    for line in read_log(log_path):
        if not line["verified"]:
            raise Problem(f"a webhook came whose signature does not hold: {line['reason']}")
        if line.get("duplicate") and not line["same_bytes"]:
            raise Problem(f"webhook {line['webhook_id']} came twice with different bodies")
        if line["answered"] == 200 and not line.get("duplicate"):
            accepted[line["webhook_id"]] = line
    batch = api.call("GET", f"/v1/batches/{batch_id}")
    now = (batch["completed"], len(accepted))
    if now != seen.get("last"):
        seen["last"] = now
        show_progress(batch["completed"], total, len(accepted))
    if batch["failed"] or batch["cancelled"]:
        raise Problem(f"{batch['failed']} jobs failed and {batch['cancelled']} were cancelled")
    finished = sum(1 for line in accepted.values() if line["kind"] == "job" and line["status"] == "COMPLETED")
    told = any(line["kind"] == "batch" and line["job"] == batch_id for line in accepted.values())
    return accepted if finished == total and told else None


def loudness(path):
    """(seconds, root mean square) of a WAV file."""
    with wave.open(str(path)) as file:
        samples = array.array("h", file.readframes(file.getnframes()))
        seconds = file.getnframes() / file.getframerate()
    return seconds, math.sqrt(sum(sample * sample for sample in samples) / max(len(samples), 1))


def seconds_until(job):
    """Seconds from the submit to each recorded state, in order: `0.00`, `0.41`, `1.12`."""
    begun = time_ms(job["submitted_at"])
    return [f"{(time_ms(entry['at']) - begun) / 1000:.2f}" for entry in job["history"]]


def time_ms(text):
    return round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)


def check_job(job, text, lines, out):
    """Everything that must hold for one job; the row of the table."""
    if job["status"] != "COMPLETED":
        raise Problem(f"job {job['id']} is {job['status']}: {job.get('error')}")
    mine = [line for line in lines.values() if line["job"] == job["id"]]
    got = [line["status"] for line in sorted(mine, key=lambda line: int(line["sequence"]))]
    if got[-1:] != ["COMPLETED"] or [status for status in EVENTS_PER_JOB if status in got] != got:
        raise Problem(f"job {job['id']} sent the webhooks {got}, expected {EVENTS_PER_JOB}")
    if [entry["status"] for entry in job["history"]] != EVENTS_PER_JOB:
        raise Problem(f"job {job['id']} went through {[entry['status'] for entry in job['history']]}")
    last = next(line for line in mine if line["status"] == "COMPLETED")
    if not last["file"]:
        raise Problem(f"job {job['id']} came without audio")
    seconds, level = loudness(out / last["file"])
    if seconds < 0.3 or level < SILENT_BELOW:
        raise Problem(f"{last['file']} is silent: {seconds:.2f} s at level {level:.0f}")
    # A name in the order of the text beside the receiver's own, which is the job's id.
    name = f"{job['client_ref']}.wav"
    (out / name).symlink_to(last["file"])
    return [shortened(text), job["id"][-12:], *seconds_until(job), f"{len(mine)}", f"{last['try']}",
            name, f"{seconds:.2f}"]


def shortened(text, limit=32):
    return text if len(text) <= limit else text[:limit - 1].rstrip() + "…"


def print_table(rows):
    head = ["sentence", "job (…end)", *(f"{status} +s" for status in EVENTS_PER_JOB), "webhooks", "tries of last",
            "file", "audio s"]
    numbers = {2, 3, 4, 5, 6, 8}
    widths = [max(len(str(row[n])) for row in [head, *rows]) for n in range(len(head))]
    for row in [head, ["─" * width for width in widths], *rows]:
        cells = [str(cell).rjust(width) if n in numbers else str(cell).ljust(width)
                 for n, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def find_ringback(given):
    if given:
        return Path(given)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    for profile in ("release", "debug"):
        if (target / profile / "ringback").exists():
            return target / profile / "ringback"
    raise Problem("the program `ringback` is not built; run `make build`")


def start(given, folder, children):
    """Starts receiver and Ringback; returns the API and the receiver's URL."""
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
    key = "rb_demo_" + secrets.token_hex(16)
    receiver = Child("receiver", [
        sys.executable, "-u", HERE / "receiver.py", "--port", "0", "--out", folder / "speech",
        "--refuse-first", str(given.refuse_first)], folder, env={**os.environ, "WEBHOOK_SECRET": secret})
    children.append(receiver)
    hook = wait_for("the receiver", 15, lambda: first_json_line(receiver.log), [receiver])["listening"]
    listen = f"127.0.0.1:{free_port()}"
    env = dict(os.environ)
    env["PATH"] = f"{ROOT / '.tools' / 'bin'}{os.pathsep}{env.get('PATH', '')}"
    begun = time.monotonic()
    ringback = Child("ringback", [
        find_ringback(given.ringback), "dev", "--listen", listen, "--data", folder / "data", "--api-key", key,
        "--webhook-secret", secret, "--endpoint",
        f"tts=process:{sys.executable} -u {HERE / 'handler.py'},slots=2,timeout=60"], folder, env=env)
    children.append(ringback)
    api = Api(f"http://{listen}", key)
    wait_for("`ringback dev` to be ready", 30, api.is_ready, children)
    say(f"Ringback is ready at {api.base} after {time.monotonic() - begun:.1f} s, receiver at {hook}")
    return api, hook


def run(given, folder, children):
    api, hook = start(given, folder, children)
    begun = time.monotonic()
    batch_id, sentences = submit(api, hook, given.sentences)
    say(f"batch {batch_id} of {len(sentences)} sentences is accepted")
    log, out, seen = folder / "speech" / "webhooks.jsonl", folder / "speech", {}
    lines = wait_for("all webhooks", given.timeout, lambda: outcome(api, batch_id, log, len(sentences), seen),
                     children, every=0.5)
    took = time.monotonic() - begun
    jobs = wait_for("the books of deliveries to close", 30, lambda: settled(api, batch_id), children, every=0.2)
    if len(jobs) != len(sentences):
        raise Problem(f"the batch has {len(jobs)} jobs instead of {len(sentences)}")
    rows = [check_job(job, text, lines, out) for job, text in zip(jobs, sentences)]
    # Books of both sides: what Ringback says it delivered is what the receiver says it took.
    delivered = sum(job["deliveries"]["delivered"] for job in jobs)
    taken = sum(1 for line in lines.values() if line["kind"] == "job")
    dead = [job["id"] for job in jobs if job["deliveries"]["dead"]]
    if dead or delivered != taken:
        raise Problem(f"delivered according to Ringback {delivered}, received {taken}, given up {dead}")
    # On a terminal the first one ends the line of progress.
    print("\n" if sys.stdout.isatty() else "")
    print_table(rows)
    print()
    refused = sum(1 for line in read_log(log) if line["answered"] == 503)
    seconds = sum(float(row[-1]) for row in rows)
    say(f"{len(rows)} sentences, {seconds:.1f} s of speech, {taken} signed webhooks "
        f"({refused} refused once on purpose and sent again) and one for the batch, in {took:.1f} s")
    say(f"listen: {shown(out)}/sentence-*.wav")
    say(f"every webhook as it came: {shown(log)}")


def shown(path):
    """Relative to where the user stands, if it lies below."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ringback", help="the program; default: the newest build in target/")
    parser.add_argument("--data", type=Path, default=ROOT / ".ringback" / "demo", help="emptied at the start")
    parser.add_argument("--sentences", type=int, default=len(SENTENCES))
    parser.add_argument("--refuse-first", type=int, default=7, metavar="N",
                        help="the receiver refuses the first try of every N-th result; 0: none")
    parser.add_argument("--timeout", type=int, default=180, help="seconds until the demo gives up")
    given = parser.parse_args()
    folder = given.data.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    children = []
    try:
        run(given, folder, children)
        return 0
    except Problem as problem:
        clear_progress()
        print(f"\ndemo: FAILED: {problem}", file=sys.stderr)
        for child in children:
            print(f"\n--- end of {child.log} ---\n{child.tail()}", file=sys.stderr)
        return 1
    finally:
        for child in reversed(children):
            child.stop()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
