"""A receiver of files as an application writes one: standard library only, nothing of Ringback.

POST /hook {job_id, download_url, confirmation_url, filename}: downloads at once, saves, confirms, answers
{success, job_id, audioUrl}. Query of /hook: `slow` seconds before the download, `confirm=no`, `wrong=1` tells a wrong
hash first, `late` seconds between download and confirmation.
PUT /store/<name>: keeps the bytes. GET /store/<name>: gives them.
One JSON line on standard output per step, with its duration.
"""

import hashlib
import http.server
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

FOLDER = sys.argv[2]


def tell(step, began, **more):
    print(json.dumps({"step": step, "ms": round((time.time() - began) * 1000), **more}), flush=True)


class Receiver(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        began = time.time()
        url = urllib.parse.urlparse(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        missing = {"job_id", "download_url", "confirmation_url", "filename"} - set(told)
        if url.path != "/hook" or missing:
            return self.answer(400, {"success": False, "missing": sorted(missing)})
        tell("told", began, told=told, signed="webhook-signature" in self.headers)
        time.sleep(float(query.get("slow", 0)))
        name = os.path.basename(told["filename"])
        with urllib.request.urlopen(told["download_url"], timeout=60) as file:
            data = file.read()
        with open(os.path.join(FOLDER, name), "wb") as out:
            out.write(data)
        sha256 = hashlib.sha256(data).hexdigest()
        tell("downloaded", began, bytes=len(data), sha256=sha256)
        time.sleep(float(query.get("late", 0)))
        if query.get("wrong"):
            tell("refused", began, status=self.confirm(told, "0" * 64))
        if query.get("confirm") != "no":
            tell("confirmed", began, status=self.confirm(told, sha256 if query.get("hash") else None))
        return self.answer(200, {"success": True, "job_id": told["job_id"], "audioUrl": f"/audio-outputs/{name}"})

    def confirm(self, told, sha256):
        body = {"job_id": told["job_id"], "status": "downloaded", "timestamp": round(time.time() * 1000)}
        if sha256:
            body["sha256"] = sha256
        request = urllib.request.Request(
            told["confirmation_url"], data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def do_PUT(self):
        began = time.time()
        name = os.path.basename(urllib.parse.urlparse(self.path).path)
        if "Content-Length" not in self.headers:
            return self.answer(411, {"error": "no length"})
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with open(os.path.join(FOLDER, name), "wb") as out:
            out.write(data)
        tell("put", began, name=name, bytes=len(data))
        return self.answer(200, {})

    def do_GET(self):
        name = os.path.basename(urllib.parse.urlparse(self.path).path)
        with open(os.path.join(FOLDER, name), "rb") as file:
            self.answer(200, file.read())


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
