"""The callback endpoint of a batch API in front of RunPod: a pydantic schema, always acknowledged, duplicates harmless.

It knows nothing of Ringback and checks no signature. The schema is strict: a missing or fractional time, or an unknown
status, is a violation, which is printed and still acknowledged. The port is the last argument.
"""

import base64
import json
import sys
from enum import Enum
from typing import Any, Optional

import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, ValidationError

app = FastAPI()
jobs = {}


class Status(str, Enum):
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


class RunPodCallback(BaseModel):
    model_config = ConfigDict(extra="ignore")
    id: StrictStr
    status: Status
    delayTime: StrictInt
    executionTime: StrictInt
    output: Optional[dict[str, Any]] = None
    error: Optional[StrictStr] = None


def tell(step, **more):
    print(json.dumps({"step": step, **more}), flush=True)


@app.post("/api/tts/callback")
async def callback(request: Request):
    body = await request.body()
    try:
        told = RunPodCallback.model_validate_json(body)
    except ValidationError as error:
        tell("violation", reason=str(error), body=body.decode(errors="replace"))
        return {"acknowledged": True}
    if told.id in jobs:
        tell("duplicate", job=told.id)
        return {"acknowledged": True}
    output = told.output or {}
    audio = None
    reason = None
    if told.status is Status.COMPLETED:
        audio = len(base64.b64decode(output["audio_base64"], validate=True))
    else:
        reason = told.error or output.get("error")
    jobs[told.id] = told.status
    tell("stored", job=told.id, status=told.status.value, audio_bytes=audio, reason=reason,
         output_error=output.get("error"), delay_ms=told.delayTime, execution_ms=told.executionTime)
    return {"acknowledged": True}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[-1]), access_log=False)
