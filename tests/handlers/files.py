"""A handler that makes files, for the tests of artefacts. It knows nothing of Ringback.

`self` does by itself what handlers with a receiver of their own do: it serves nothing, tells the receiver where its
file is, and asks its own port until the download is confirmed.
"""

import base64
import hashlib
import json
import os
import time
import urllib.request

import runpod

OUTPUT = "output"


def write(name, data):
    os.makedirs(OUTPUT, exist_ok=True)
    path = os.path.join(OUTPUT, name)
    with open(path, "wb") as file:
        file.write(data)
    return path


def call(url, body=None, timeout=5):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read())


def tell_the_receiver_myself(job, given):
    """What a handler with its own handshake does: POST, then wait for the confirmation, at most the given time."""
    name = given["name"]
    write(name, given["text"].encode())
    port = os.environ.get("RINGBACK_CONFIRM_PORT", "8000")
    base = f"http://127.0.0.1:{port}"
    notice = {
        "job_id": job["id"],
        "download_url": f"{base}/output/{name}",
        "confirmation_url": f"{base}/confirm-download/{job['id']}",
        "filename": name,
    }
    began = time.time()
    try:
        told = call(os.environ["NEXTJS_WEBHOOK_URL"], notice)
    except OSError as error:
        # A time-out is no failure: the receiver may still be downloading.
        told = {"error": str(error)}
    limit = float(os.environ["DOWNLOAD_CONFIRMATION_TIMEOUT"])
    confirmed = False
    while not confirmed and time.time() - began < limit:
        confirmed = call(f"{base}/check-download/{job['id']}")["status"] == "confirmed"
        if not confirmed:
            time.sleep(0.1)
    return {"told": told, "confirmed": confirmed, "waited": time.time() - began}


def handler(job):
    given = job["input"]
    mode = given.get("mode", "file")
    if mode == "file":
        data = given["text"].encode()
        path = write(given["name"], data)
        if given.get("absolute"):
            path = os.path.abspath(path)
        return {"audio": path, "sha256": hashlib.sha256(data).hexdigest(), "n": 12345678901234567890123}
    if mode == "big":
        os.makedirs(OUTPUT, exist_ok=True)
        path = os.path.join(OUTPUT, given["name"])
        piece = bytes(range(256)) * 4096
        with open(path, "wb") as file:
            for _ in range(given["mib"]):
                file.write(piece)
        return {"audio": path}
    if mode == "base64":
        data = base64.b64encode(given["text"].encode()).decode()
        return {
            "audio_base64": data,
            "filename": "speech.wav",
            "nested": {"picture": f"data:image/png;base64,{data}"},
            "images": [{"filename": "a.png", "type": "base64", "data": data}],
        }
    if mode == "texts":
        write("mine.txt", b"mine")
        target = os.path.join(OUTPUT, "link.txt")
        if not os.path.islink(target):
            os.symlink(os.path.abspath("handler_secret.txt"), target)
        return {"texts": given["texts"]}
    if mode == "images":
        for url_name in given.get("expects", []):
            with open(os.path.join("input", url_name), "rb") as file:
                assert file.read(), url_name
        return {"images": [write(name, name.encode()) for name in given["names"]]}
    if mode == "self":
        return tell_the_receiver_myself(job, given)
    raise ValueError(mode)


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
