"""A generator handler. `--aggregate` also returns the list of what was yielded; `--async` makes it an
async generator. `input.count` chunks, `input.fail_at` raises there, `input.error_at` yields an error.
"""

import asyncio
import sys
import time

import runpod


def chunk(given, number):
    if number == given.get("fail_at"):
        raise ValueError(f"failed at {number}")
    if number == given.get("error_at"):
        return {"error": f"error at {number}"}
    return {"n": number, "text": "x" * given.get("size", 1)}


def plain(job):
    given = job["input"]
    for number in range(given.get("count", 3)):
        time.sleep(given.get("pause", 0))
        yield chunk(given, number)


async def asynchronous(job):
    given = job["input"]
    for number in range(given.get("count", 3)):
        await asyncio.sleep(given.get("pause", 0))
        yield chunk(given, number)


runpod.serverless.start(
    {
        "handler": asynchronous if "--async" in sys.argv else plain,
        "return_aggregate_stream": "--aggregate" in sys.argv,
    }
)
