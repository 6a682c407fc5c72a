"""An async handler: waits `input.seconds`, then returns; it notes when it was cancelled."""

import asyncio

import runpod


async def handler(job):
    given = job["input"]
    try:
        await asyncio.sleep(given.get("seconds", 0))
    except asyncio.CancelledError:
        if given.get("cancel_file"):
            with open(given["cancel_file"], "w", encoding="utf-8") as file:
                file.write("cancelled")
        raise
    if given.get("raise"):
        raise RuntimeError("async handler raised")
    return {"waited": given.get("seconds", 0)}


runpod.serverless.start({"handler": handler})
