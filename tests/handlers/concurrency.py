"""An async handler that takes several jobs at once (`--concurrency N`, default 4)."""

import asyncio
import os
import sys

import runpod

LIMIT = int(sys.argv[sys.argv.index("--concurrency") + 1]) if "--concurrency" in sys.argv else 4
running = 0
peak = 0


async def handler(job):
    global running, peak
    running += 1
    peak = max(peak, running)
    try:
        await asyncio.sleep(job["input"].get("seconds", 0.5))
    finally:
        running -= 1
    return {"pid": os.getpid(), "peak": peak}


runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda current: LIMIT})
