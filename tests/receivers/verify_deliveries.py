"""Judges captured deliveries with the official Python packages `standardwebhooks` and `svix`.

The file named first has one JSON object per line: `headers`, `body` (base64), `secrets` (every one of them must fit).
Each delivery must pass as it is, with each secret alone, and fail with anything about it changed.
"""

import base64
import datetime
import json
import sys

import standardwebhooks.webhooks
import svix.webhooks


def keyed(package, secret):
    # Any text that is not whsec_ + base64 is a key by its bytes.
    return package.webhooks.Webhook(secret if secret.startswith("whsec_") else secret.encode())


def refused(package, secret, body, headers, what):
    try:
        keyed(package, secret).verify(body, headers)
    except package.webhooks.WebhookVerificationError:
        return
    raise AssertionError(f"{package.__name__} accepts {what}: {headers}")


count = rotated = 0
with open(sys.argv[1], encoding="utf-8") as file:
    for line in file:
        record = json.loads(line)
        headers, body = record["headers"], base64.b64decode(record["body"])
        signatures = headers["webhook-signature"].split(" ")
        assert len(signatures) == len(record["secrets"]), (signatures, len(record["secrets"]))
        rotated += len(signatures) > 1
        for package in (standardwebhooks, svix):
            for secret in record["secrets"]:
                keyed(package, secret).verify(body, headers)
                # Names of headers as some frameworks give them.
                keyed(package, secret).verify(body, {name.title(): value for name, value in headers.items()})
                refused(package, secret, body + b" ", headers, "an altered body")
                refused(package, secret, body, {**headers, "webhook-id": "msg_other"}, "another id")
                then = datetime.datetime.fromtimestamp(int(headers["webhook-timestamp"]) - 301, datetime.timezone.utc)
                stale = {**headers, "webhook-timestamp": str(int(then.timestamp()))}
                refused(package, secret, body, stale, "a timestamp that was not signed")
                stale["webhook-signature"] = keyed(package, secret).sign(headers["webhook-id"], then, body.decode())
                refused(package, secret, body, stale, "an old timestamp, however well signed")
            refused(package, "whsec_" + base64.b64encode(b"another key of 24 bytes!").decode(), body, headers, "another key")
        count += 1

print(f"{count} deliveries, {rotated} with more than one signature")
print("all cases passed")
