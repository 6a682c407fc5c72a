"""Verifies recorded webhooks with the official package `standardwebhooks`.

Reads JSON lines {"headers": {...}, "body_base64": "..."} from the file named first; the secret is in
WEBHOOK_SECRET. Exits 1 at the first one that does not hold, and also if a changed body does hold.
"""

import base64
import json
import os
import sys

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

verifier = Webhook(os.environ["WEBHOOK_SECRET"])
count = 0
with open(sys.argv[1], encoding="utf-8") as lines:
    for line in lines:
        hook = json.loads(line)
        body = base64.b64decode(hook["body_base64"])
        verifier.verify(body, hook["headers"])
        try:
            verifier.verify(body + b" ", hook["headers"])
        except WebhookVerificationError:
            count += 1
        else:
            sys.exit(f"a changed body of {hook['headers']['webhook-id']} was accepted")
print(f"{count} webhooks verified: all cases passed")
