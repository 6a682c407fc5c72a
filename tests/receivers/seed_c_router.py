"""The receiver of a webhook tutorial: typed events, a router, three styles of endpoints, metrics.

It knows nothing of Ringback. One endpoint routes by `type`, one takes a family, one is versioned by type; POST and JSON
only. SECRETS holds one secret per style (`null` for none), as they were registered. The port is the last argument.
"""

import json
import os
import sys
import time
from typing import Any, Callable, Optional

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from pydantic import AwareDatetime, BaseModel, StrictInt, StrictStr, ValidationError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

app = FastAPI()


def tell(step, **more):
    print(json.dumps({"step": step, **more}), flush=True)


class BaseEvent(BaseModel):
    id: StrictStr
    type: StrictStr
    created_at: AwareDatetime
    data: dict[str, Any]
    api_version: StrictStr = "2025-01-01"
    source: Optional[StrictStr] = None


class CompletionFinished(BaseModel):
    completion_id: StrictStr
    model: StrictStr
    prompt_tokens: StrictInt
    completion_tokens: StrictInt
    total_tokens: StrictInt
    finish_reason: StrictStr
    content: StrictStr
    request_id: StrictStr


class CompletionStarted(BaseModel):
    completion_id: StrictStr
    model: StrictStr
    request_id: Optional[StrictStr] = None


class Batch(BaseModel):
    batch_id: StrictStr
    status: StrictStr
    total_requests: StrictInt
    completed: StrictInt
    failed: StrictInt
    output_file_id: Optional[StrictStr] = None
    error_file_id: Optional[StrictStr] = None
    processing_time_seconds: Optional[float] = None


class Usage(BaseModel):
    metric: StrictStr
    current_usage: float
    limit: float
    percentage: float
    reset_at: AwareDatetime


class Router:
    def __init__(self):
        self.handlers: dict[str, tuple[Callable, Optional[type[BaseModel]]]] = {}
        self.counts = dict.fromkeys(("events_received", "events_processed", "events_failed", "unhandled_events"), 0)
        self.processing_ms = 0.0

    def register(self, kind, handler, parser=None):
        self.handlers[kind] = (handler, parser)

    def route(self, event: BaseEvent):
        self.counts["events_received"] += 1
        if event.type not in self.handlers:
            self.counts["unhandled_events"] += 1
            tell("unhandled", type=event.type, payload_keys=sorted(event.data))
            return
        begun = time.monotonic()
        handler, parser = self.handlers[event.type]
        try:
            handler(event, parser.model_validate(event.data) if parser else event.data)
            self.counts["events_processed"] += 1
        except ValidationError as error:
            self.counts["events_failed"] += 1
            tell("violation", type=event.type, reason=str(error), data=event.data)
        self.processing_ms += (time.monotonic() - begun) * 1000

    def metrics(self):
        done = self.counts["events_processed"]
        return {**self.counts, "avg_processing_time_ms": self.processing_ms / done if done else 0.0,
                "registered_handlers": len(self.handlers)}


def handle(event, data):
    told = data.model_dump(mode="json") if isinstance(data, BaseModel) else data
    tell("handled", id=event.id, type=event.type, source=event.source, api_version=event.api_version, data=told)


router = Router()
for kind, parser in {
    "completion.started": CompletionStarted,
    "completion.finished": CompletionFinished,
    "completion.failed": CompletionStarted,
    "batch.created": Batch,
    "batch.processing": Batch,
    "batch.completed": Batch,
    "batch.failed": Batch,
    "batch.cancelled": Batch,
    "usage.limit_warning": Usage,
    "usage.limit_exceeded": Usage,
}.items():
    router.register(kind, handle, parser)

secrets = json.loads(os.environ["SECRETS"])


async def take(request: Request, style, fits):
    body = await request.body()
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise HTTPException(415, "JSON only")
    if secrets[style] is not None:
        text = secrets[style]
        try:
            Webhook(text if text.startswith("whsec_") else text.encode()).verify(body, dict(request.headers))
        except WebhookVerificationError as error:
            tell("refused", style=style, reason=str(error))
            raise HTTPException(401, str(error)) from error
    try:
        event = BaseEvent.model_validate_json(body)
    except ValidationError as error:
        tell("violation", reason=str(error), body=body.decode(errors="replace"))
        raise HTTPException(400, "no event") from error
    if not fits(event.type):
        raise HTTPException(400, f"{event.type} does not belong here")
    tell("received", style=style, type=event.type)
    router.route(event)
    return {"received": True}


@app.post("/webhooks")
async def one_for_all(request: Request):
    return await take(request, "all", lambda kind: True)


@app.get("/webhooks/metrics")
async def metrics():
    return router.metrics()


@app.post("/webhooks/{family}")
async def one_per_family(family: str, request: Request):
    return await take(request, "family", lambda kind: kind.startswith(f"{family}."))


@app.post("/v1/webhooks/{event_type}")
async def versioned(event_type: str, request: Request):
    return await take(request, "versioned", lambda kind: kind == event_type)


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[-1]), access_log=False)
