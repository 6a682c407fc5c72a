"""A handler whose process needs a while (or never) before it speaks: `--seconds N`, `--crash CODE`."""

import sys
import time

if "--seconds" in sys.argv:
    time.sleep(float(sys.argv[sys.argv.index("--seconds") + 1]))
if "--crash" in sys.argv:
    print("cannot load the model: file not found", file=sys.stderr, flush=True)
    sys.exit(int(sys.argv[sys.argv.index("--crash") + 1]))

import runpod

runpod.serverless.start({"handler": lambda job: job["input"]})
