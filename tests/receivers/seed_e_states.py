"""The test receiver of an orchestrator: prints each state that it is told, answers 200. Standard library only.

It knows nothing of Ringback. The port is the last argument.
"""

import http.server
import json
import sys


class Receiver(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print(json.dumps({"step": "told", "job": told["id"], "path": self.path, "body": told}), flush=True)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"OK")


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Receiver).serve_forever()
