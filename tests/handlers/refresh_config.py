"""A handler that asks for a fresh process after every job, through the SDK's configuration."""

import os

import runpod


def handler(job):
    return {"pid": os.getpid()}


runpod.serverless.start({"handler": handler, "refresh_worker": True})
