"""Signs one body with the official packages `standardwebhooks` and `svix`.

The body is in the file named first, the secret in WEBHOOK_SECRET. Prints one JSON object of headers per package, the
one of svix under both sets of names that its library reads.
"""

import datetime
import json
import os
import sys

import standardwebhooks.webhooks
import svix.webhooks

with open(sys.argv[1], encoding="utf-8") as file:
    body = file.read()
now = datetime.datetime.now(datetime.timezone.utc)
for package, prefix in [(standardwebhooks, "webhook"), (svix, "webhook"), (svix, "svix")]:
    message = f"msg_{package.__name__}_{prefix}"
    signature = package.webhooks.Webhook(os.environ["WEBHOOK_SECRET"]).sign(message, now, body)
    headers = {"id": message, "timestamp": str(int(now.timestamp())), "signature": signature}
    print(json.dumps({f"{prefix}-{name}": value for name, value in headers.items()}))
