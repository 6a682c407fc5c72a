"""A Runflow callback handler with FastAPI: verify the raw body, know copies by run or batch, answer, copy outputs later.

It knows nothing of Ringback. SECRETS holds the live callback secrets, separated by spaces. The port is the last
argument.
"""

import hashlib
import hmac
import json
import os
import re
import sys
import urllib.request

import uvicorn
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request

app = FastAPI()
seen = set()
secrets = os.environ["SECRETS"].split(" ")


def tell(step, **more):
    print(json.dumps({"step": step, **more}), flush=True)


def signed(body, given):
    # Runflow's key is the whole text of the secret, its prefix included.
    if not re.fullmatch(r"[0-9a-f]{64}", given):
        return False
    return any(hmac.compare_digest(hmac.new(secret.encode(), body, hashlib.sha256).hexdigest(), given) for secret in secrets)


def links(value):
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from links(part)
    elif isinstance(value, list):
        for part in value:
            yield from links(part)


def copy_outputs(told, key):
    copied = []
    # A batch's output counts its runs; their files come with their own callbacks.
    for link in links(told["output"] if told["event"] == "run.completed" else None):
        with urllib.request.urlopen(link, timeout=30) as answer:
            copied.append(len(answer.read()))
    tell("copied", job=key, event=told["event"], status=told["status"], output=told.get("output"), copied=copied,
         fields=sorted(told), times=[told.get("created_at"), told.get("completed_at")])


@app.post("/runflow/callback")
async def callback(request: Request, later: BackgroundTasks):
    body = await request.body()
    if not signed(body, request.headers.get("runflow-signature", "")):
        tell("refused", signature=request.headers.get("runflow-signature"))
        raise HTTPException(401, "invalid signature")
    told = json.loads(body)
    key = told.get("run_id") or told["batch_id"]
    if key in seen:
        tell("duplicate", job=key)
        return {"ok": True}
    seen.add(key)
    tell("taken", job=key)
    later.add_task(copy_outputs, told, key)
    return {"ok": True}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[-1]), access_log=False)
