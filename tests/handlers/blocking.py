"""A handler that never returns and never yields to the event loop: only ending the process stops it.

It writes its process id into `input.pid_file`, so that a test can see whether it still runs.
"""

import os
import time

import runpod


def handler(job):
    given = job["input"]
    if given.get("pid_file"):
        with open(given["pid_file"], "w", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    deadline = time.time() + given.get("seconds", 3600)
    while time.time() < deadline:
        time.sleep(0.05)
    return {"done": True}


runpod.serverless.start({"handler": handler})
