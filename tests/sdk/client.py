"""The official Python client, sync and async, against Ringback. Prints one line per case; ends with
`all cases passed`. Environment: RUNPOD_ENDPOINT_BASE_URL (read by the package itself), RINGBACK_TEST_KEY.

Endpoints expected: echo, sleep, narrow (sleep with one slot), plain, generator, aggregate (Python handlers).
"""

import asyncio
import os
import time
from functools import partial

import requests
import runpod
from runpod.endpoint.asyncio.asyncio_runner import Endpoint as AsyncEndpoint
from runpod.http_client import ClientSession

KEY = os.environ["RINGBACK_TEST_KEY"]
runpod.api_key = KEY
# In 1.7 purge_queue and health of the async class build a URL without a host: no request leaves the client.
ASYNC_HAS_URLS = tuple(int(part) for part in runpod.__version__.split(".")[:2]) >= (1, 10)
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}


def wait(look, what, seconds=240):
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def run_and_output():
    job = runpod.Endpoint("echo").run({"input": {"prompt": "a horse", "n": [1, 2.5, None, "ü"]}})
    assert job.status() in {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    assert job.output(timeout=240) == {"prompt": "a horse", "n": [1, 2.5, None, "ü"]}
    assert job.status() == "COMPLETED"


def run_wraps_a_bare_input():
    assert runpod.Endpoint("echo").run({"prompt": "bare"}).output(timeout=240) == {"prompt": "bare"}


def run_sync_gives_the_output():
    assert runpod.Endpoint("echo").run_sync({"input": {"prompt": "now"}}, timeout=240) == {"prompt": "now"}


def run_sync_waits_for_a_slow_job():
    begun = time.monotonic()
    assert runpod.Endpoint("sleep").run_sync({"input": {"seconds": 2}}, timeout=240) == {"seconds": 2}
    assert time.monotonic() - begun >= 2


def failed_job_has_no_output():
    job = runpod.Endpoint("plain").run({"input": {"mode": "raise", "text": "out of paint"}})
    wait(lambda: job.status() in FINAL, "the failure")
    assert job.status() == "FAILED"
    # The client hides the reason; it is in the raw status.
    raw = job.rp_client.get(f"plain/status/{job.job_id}")
    assert "out of paint" in raw["error"], raw


def stream_of_a_generator():
    for endpoint in ("generator", "aggregate"):
        job = runpod.Endpoint(endpoint).run({"input": {"count": 5, "pause": 0.2}})
        assert [chunk["n"] for chunk in job.stream()] == [0, 1, 2, 3, 4], endpoint
        assert job.status() == "COMPLETED"
    assert [chunk["n"] for chunk in job.output()] == [0, 1, 2, 3, 4]


def stream_comes_while_the_job_runs():
    job = runpod.Endpoint("generator").run({"input": {"count": 4, "pause": 1.5}})
    first = next(job.stream())
    assert first["n"] == 0
    raw = job.rp_client.get(f"generator/status/{job.job_id}")
    assert raw["status"] == "IN_PROGRESS", raw


def stream_of_many_chunks_loses_none():
    job = runpod.Endpoint("generator").run({"input": {"count": 300, "size": 2000}})
    assert [chunk["n"] for chunk in job.stream()] == list(range(300))


def cancel_a_running_job():
    job = runpod.Endpoint("sleep").run({"input": {"seconds": 300}})
    wait(lambda: job.status() == "IN_PROGRESS", "the start")
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    assert job.status() == "CANCELLED"
    assert job.cancel()["status"] == "CANCELLED"


def stream_of_a_cancelled_job_ends():
    job = runpod.Endpoint("sleep").run({"input": {"seconds": 300}})
    job.cancel()
    error = raises(requests.HTTPError, lambda: list(job.stream()))
    assert error.response.status_code == 410, error


def purge_removes_only_what_waits():
    endpoint = runpod.Endpoint("narrow")
    running = endpoint.run({"input": {"seconds": 300}})
    wait(lambda: running.status() == "IN_PROGRESS", "the start")
    waiting = [endpoint.run({"input": {"seconds": 300}}) for _ in range(4)]
    assert endpoint.purge_queue() == {"removed": 4, "status": "completed"}
    assert {job.status() for job in waiting} == {"CANCELLED"}
    assert running.status() == "IN_PROGRESS"
    assert running.cancel()["status"] == "CANCELLED"


def health_has_all_counts():
    health = runpod.Endpoint("echo").health()
    assert {"completed", "failed", "inProgress", "inQueue", "retried"} <= set(health["jobs"]), health
    assert {"idle", "initializing", "ready", "running", "throttled"} <= set(health["workers"]), health
    assert health["jobs"]["completed"] >= 3, health


def a_wrong_key_is_refused():
    # Endpoint(api_key=) came after 1.7; the package's own key is read by every version.
    runpod.api_key = "rb_wrong_0123456789"
    try:
        raises(RuntimeError, lambda: runpod.Endpoint("echo").run({"input": {"a": 1}}))
    finally:
        runpod.api_key = KEY


def an_unknown_endpoint_is_not_found():
    error = raises(requests.HTTPError, lambda: runpod.Endpoint("nothing").run({"input": {"a": 1}}))
    assert error.response.status_code == 404 and error.response.json()["error"]


def sync_purge():
    return runpod.Endpoint("narrow").purge_queue()


async def asynchronous():
    async with ClientSession() as session:
        echo = AsyncEndpoint("echo", session)
        job = await echo.run({"prompt": "async"})
        assert await job.output(timeout=240) == {"prompt": "async"}
        assert await job.status() == "COMPLETED"
        print("ok async run and output")

        job = await AsyncEndpoint("generator", session).run({"count": 3, "pause": 0.1})
        assert [chunk["n"] async for chunk in job.stream()] == [0, 1, 2]
        print("ok async stream")

        narrow = AsyncEndpoint("narrow", session)
        running = await narrow.run({"seconds": 300})
        while await running.status() != "IN_PROGRESS":
            await asyncio.sleep(0.05)
        waiting = await narrow.run({"seconds": 300})
        purge = narrow.purge_queue if ASYNC_HAS_URLS else partial(asyncio.to_thread, sync_purge)
        assert await purge() == {"removed": 1, "status": "completed"}
        assert await waiting.status() == "CANCELLED"
        assert (await running.cancel())["status"] == "CANCELLED"
        print("ok async cancel and purge")

        if ASYNC_HAS_URLS:
            assert (await echo.health())["jobs"]["completed"] >= 1
            print("ok async health")


if __name__ == "__main__":
    for case in [
        run_and_output, run_wraps_a_bare_input, run_sync_gives_the_output, run_sync_waits_for_a_slow_job,
        failed_job_has_no_output, stream_of_a_generator, stream_comes_while_the_job_runs,
        stream_of_many_chunks_loses_none, cancel_a_running_job, stream_of_a_cancelled_job_ends,
        purge_removes_only_what_waits, health_has_all_counts, a_wrong_key_is_refused,
        an_unknown_endpoint_is_not_found,
    ]:
        begun = time.monotonic()
        case()
        print(f"ok {case.__name__} ({time.monotonic() - begun:.1f} s)", flush=True)
    asyncio.run(asyncio.wait_for(asynchronous(), 480))
    print(f"runpod {runpod.__version__}: all cases passed")
