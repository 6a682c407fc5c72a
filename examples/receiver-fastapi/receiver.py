"""Receives webhooks of jobs: verify the raw bytes, write them down, answer, then work.

    WEBHOOK_SECRET   the secret that signs the webhooks; several, separated by spaces, are all live (rotation)
    DATA             folder of the database and of the audio files (data)
"""

import base64
import json
import os
import re
import sqlite3
import sys
import threading
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Literal, Optional

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, StrictInt, ValidationError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

RETRY_S = 5.0
DATA = Path(os.environ.get("DATA", "data"))


class Callback(BaseModel):
    """A job's end, as RunPod and Ringback tell it. Times are in milliseconds and always there."""

    id: str
    status: Literal["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
    delayTime: StrictInt
    executionTime: StrictInt
    output: Optional[Any] = None
    error: Optional[str] = None

    def reason(self):
        """Why it failed: `error`, then `output.error`."""
        return self.error or (self.output.get("error") if isinstance(self.output, dict) else None)


def tell(step, **more):
    print(json.dumps({"step": step, **more}), flush=True)


def verifiers():
    secrets = os.environ.get("WEBHOOK_SECRET", "").split()
    if not secrets:
        sys.exit("WEBHOOK_SECRET is not set")
    # `whsec_` + base64 is the standard's form; any other text is used as it is.
    return [Webhook(text if text.startswith("whsec_") else text.encode()) for text in secrets]


VERIFIERS = verifiers()


def verify(body, headers):
    """Raises unless one of the secrets fits. A list item without a comma is a plain ValueError of the package."""
    reason = "the request is not signed"
    for verifier in VERIFIERS:
        try:
            verifier.verify(body, headers, json_parse=False)
            return
        except (WebhookVerificationError, ValueError) as error:
            reason = str(error)
    tell("refused", reason=reason)
    raise HTTPException(401, reason)


class Inbox:
    """Events in SQLite, each webhook-id once, and a thread that works them off."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "inbox.db"
        self.work_there = threading.Event()
        self.ending = False
        with closing(self.connect()) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, body BLOB, done INT DEFAULT 0)")

    def connect(self):
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        db.execute("PRAGMA synchronous=FULL")
        return db

    def add(self, webhook_id, body):
        """Writes an event down; False if it was here before. A crash after this loses nothing."""
        with closing(self.connect()) as db:
            added = db.execute("INSERT OR IGNORE INTO events (id, body) VALUES (?, ?)", (webhook_id, body)).rowcount == 1
        if added:
            self.work_there.set()
        return added

    def run(self, work):
        """Works until the end; what fails is tried again, what is left is done at the next start."""
        with closing(self.connect()) as db:
            while not self.ending:
                self.work_there.clear()
                pause = None
                for webhook_id, body in db.execute("SELECT id, body FROM events WHERE done = 0").fetchall():
                    try:
                        work(body)
                        db.execute("UPDATE events SET done = 1 WHERE id = ?", (webhook_id,))
                    except OSError as error:
                        tell("failed", webhook_id=webhook_id, reason=str(error))
                        pause = RETRY_S
                self.work_there.wait(pause)

    def end(self):
        self.ending = True
        self.work_there.set()


def work(body):
    """The work, as long as it likes. It may be done twice if the process dies in its midst: files are written whole."""
    try:
        callback = Callback.model_validate_json(body)
    except ValidationError as error:
        tell("unreadable", reason=str(error))
        return
    audio = callback.output.get("audio_base64") if isinstance(callback.output, dict) else None
    # Names of files never come from outside unchecked.
    if callback.status == "COMPLETED" and audio and re.fullmatch(r"[\w-]{1,80}", callback.id):
        try:
            data = base64.b64decode(audio, validate=True)
        except ValueError as error:
            tell("unreadable", job=callback.id, reason=str(error))
            return
        part = DATA / f"{callback.id}.part"
        part.write_bytes(data)
        part.rename(DATA / f"{callback.id}.wav")
    tell("worked", job=callback.id, status=callback.status, reason=callback.reason(), took_ms=callback.executionTime)


@asynccontextmanager
async def lifespan(app):
    app.state.inbox = Inbox(DATA)
    thread = threading.Thread(target=app.state.inbox.run, args=(work,))
    thread.start()
    yield
    app.state.inbox.end()
    thread.join()


app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None)


@app.post("/api/tts/callback")
async def callback(request: Request):
    # The signature is over the bytes as they came, so no model parses them before.
    body = await request.body()
    verify(body, dict(request.headers))
    webhook_id = request.headers["webhook-id"]
    # On disk before the answer: once we say 200, Ringback does not send it again.
    added = await run_in_threadpool(request.app.state.inbox.add, webhook_id, body)
    tell("queued" if added else "duplicate", webhook_id=webhook_id)
    return {"acknowledged": True}
