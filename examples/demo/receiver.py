"""A small webhook receiver as a user of Ringback would write it: Python's own HTTP server and the official
package `standardwebhooks`.

What it does with every POST, in this order:
1. verifies the signature over the raw body, before anything is parsed (401 if it does not hold);
2. looks the `webhook-id` up among those already handled: a repetition is answered 200 and changes nothing;
3. stores the audio of a finished job as a playable WAV file and appends a line to webhooks.jsonl;
4. answers 200.

The log is read back at the start, so that a restarted receiver still knows what it has handled.

    WEBHOOK_SECRET=whsec_... python receiver.py --port 9000 --out speech/

--refuse-first 5 answers 503 to the first try of every fifth finished job, to show the retries at work.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import threading
import time
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
MAX_BODY_BYTES = 64 * 1024 * 1024


class Inbox:
    """What has been handled, in memory and in webhooks.jsonl. Safe for several threads."""

    def __init__(self, out, refuse_every):
        self.out = out
        self.refuse_every = refuse_every
        self.handled = {}
        self.tries = {}
        self.terminal_seen = 0
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.log_path = out / "webhooks.jsonl"
        if self.log_path.exists():
            for line in self.log_path.read_text().splitlines():
                entry = json.loads(line)
                if entry["answered"] == 200 and entry.get("webhook_id"):
                    self.handled[entry["webhook_id"]] = entry["body_sha256"]
        self.log = self.log_path.open("a", buffering=1)

    def write(self, **entry):
        self.log.write(json.dumps({"received_at_ms": time.time_ns() // 1_000_000, **entry}) + "\n")

    def refuse_now(self, webhook_id, terminal):
        """True for the first try of every n-th finished job, if asked for."""
        tries = self.tries[webhook_id] = self.tries.get(webhook_id, 0) + 1
        if not terminal or tries > 1 or not self.refuse_every:
            return False
        self.terminal_seen += 1
        return self.terminal_seen % self.refuse_every == 0

    def take(self, headers, body, event):
        """Handles one verified webhook and returns the HTTP status to answer."""
        webhook_id = headers["webhook-id"]
        digest = hashlib.sha256(body).hexdigest()
        # A batch has its own event; it carries batch_id in place of id.
        job = event.get("id") or event.get("batch_id")
        line = {
            "webhook_id": webhook_id, "sequence": headers.get("webhook-sequence"), "job": job,
            "kind": "job" if "id" in event else "batch", "status": event.get("status"), "verified": True,
            "body_sha256": digest, "traceparent": headers.get("traceparent"), "file": None, "seconds": None,
        }
        with self.lock:
            refused = self.refuse_now(webhook_id, "id" in event and event.get("status") in TERMINAL)
            line["try"] = self.tries[webhook_id]
            if webhook_id in self.handled:
                same = self.handled[webhook_id] == digest
                self.write(**line, duplicate=True, same_bytes=same, answered=200)
                return 200
            if refused:
                self.write(**line, duplicate=False, answered=503)
                return 503
            output = event.get("output")
            if event.get("status") == "COMPLETED" and isinstance(output, dict) and "audio_base64" in output:
                line["file"], line["seconds"] = self.save(job, output)
            self.handled[webhook_id] = digest
            self.write(**line, duplicate=False, answered=200)
            return 200

    def save(self, job, output):
        audio = base64.b64decode(output["audio_base64"], validate=True)
        with wave.open(io.BytesIO(audio)) as opened:
            seconds = round(opened.getnframes() / opened.getframerate(), 3)
        # The id comes from outside: only letters, digits, `-` and `_` may reach the file system.
        name = "".join(c for c in job if c.isalnum() or c in "-_") + ".wav"
        part = self.out / (name + ".part")
        part.write_bytes(audio)
        part.rename(self.out / name)
        return name, seconds


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    inbox = None
    verifier = None

    def do_POST(self):
        length = int(self.headers.get("content-length") or 0)
        if not 0 < length <= MAX_BODY_BYTES:
            self.close_connection = True
            return self.answer(413)
        body = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            event = self.verifier.verify(body, headers)
        except (WebhookVerificationError, ValueError) as error:
            self.inbox.write(verified=False, webhook_id=headers.get("webhook-id"), reason=str(error), answered=401)
            return self.answer(401)
        try:
            return self.answer(self.inbox.take(headers, body, event))
        except Exception as error:  # An answer is owed whatever happens: the sender will try again.
            self.inbox.write(verified=True, webhook_id=headers.get("webhook-id"), reason=repr(error), answered=500)
            return self.answer(500)

    def answer(self, status):
        body = json.dumps({"acknowledged": status == 200}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """The log is webhooks.jsonl."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000, help="0 takes a free one; the port is printed")
    parser.add_argument("--out", type=Path, default=Path("speech"))
    parser.add_argument("--refuse-first", type=int, default=0, metavar="N")
    given = parser.parse_args()
    secret = os.environ.get("WEBHOOK_SECRET")
    if not secret:
        sys.exit("receiver: set WEBHOOK_SECRET to the secret that Ringback signs with")
    Handler.verifier = Webhook(secret)
    Handler.inbox = Inbox(given.out, given.refuse_first)
    server = ThreadingHTTPServer((given.host, given.port), Handler)
    server.daemon_threads = True
    print(json.dumps({"listening": f"http://{given.host}:{server.server_address[1]}"}), flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
