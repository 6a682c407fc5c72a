"""A blocking handler in a process group that ignores SIGTERM: it has a helper process as well."""

import os
import signal
import subprocess
import sys
import time

import runpod


def handler(job):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(job["input"]["pid_file"], "w", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {helper.pid}")
    while True:
        time.sleep(0.05)


runpod.serverless.start({"handler": handler})
