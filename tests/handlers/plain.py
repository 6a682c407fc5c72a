"""A blocking handler with one behaviour per `mode`, for the tests of the worker protocol.

Nothing here knows Ringback: it is an ordinary handler for the Python package `runpod`.
"""

import os
import sys
import time

import runpod

STARTED_AT = time.time()


def handler(job):
    given = job["input"]
    if not isinstance(given, dict):
        return given
    mode = given.get("mode", "echo")
    if mode == "echo":
        return given
    if mode == "job":
        return {key: value for key, value in job.items() if key != "input"}
    if mode == "pid":
        return {"pid": os.getpid(), "started_at": STARTED_AT, "cwd": os.getcwd()}
    if mode == "environment":
        return {"names": sorted(os.environ)}
    if mode == "none":
        return None
    if mode == "empty":
        return {}
    if mode == "sleep":
        time.sleep(given["seconds"])
        return {"slept": given["seconds"]}
    if mode == "raise":
        raise ValueError(given.get("text", "the handler raised"))
    if mode == "error":
        return {"error": given.get("text", "no such voice")}
    if mode == "error_beside":
        return {"error": "half done", "kept": 1}
    if mode == "unserialisable":
        return {"value": object()}
    if mode == "nan":
        return {"value": float("nan")}
    if mode == "big":
        return {"data": "x" * int(given["mb"] * 1024 * 1024)}
    if mode == "progress":
        for step in range(given.get("steps", 3)):
            runpod.serverless.progress_update(job, {"step": step})
            time.sleep(given.get("pause", 0.3))
        return {"steps": given.get("steps", 3)}
    if mode == "refresh":
        return {"refresh_worker": True, "pid": os.getpid()}
    if mode == "crash":
        print("about to end this process", file=sys.stderr, flush=True)
        os._exit(given.get("code", 3))
    if mode == "log":
        print(given["text"], flush=True)
        print(given["text"] + " on stderr", file=sys.stderr, flush=True)
        return {"logged": True}
    return {"error": f"unknown mode {mode}"}


runpod.serverless.start({"handler": handler})
