// Judges captured deliveries with the official npm package `standardwebhooks` (found through NODE_PATH).
//
// The file named first has one JSON object per line: `headers`, `body` (base64), `secrets` (every one of them must
// fit). Each delivery must pass as it is, with each secret alone, and fail with anything about it changed.
const assert = require("node:assert");
const fs = require("node:fs");
const { Webhook, WebhookVerificationError } = require("standardwebhooks");

// Any text that is not whsec_ + base64 is a key by its bytes.
const keyed = (secret) => new Webhook(secret, secret.startsWith("whsec_") ? {} : { format: "raw" });
const refused = (secret, body, headers, what) =>
  assert.throws(() => keyed(secret).verify(body, headers), WebhookVerificationError, what);

let count = 0;
let rotated = 0;
for (const line of fs.readFileSync(process.argv[2], "utf8").split("\n").filter(Boolean)) {
  const { headers, body: encoded, secrets } = JSON.parse(line);
  const body = Buffer.from(encoded, "base64");
  rotated += headers["webhook-signature"].split(" ").length > 1 ? 1 : 0;
  for (const secret of secrets) {
    keyed(secret).verify(body, headers);
    keyed(secret).verify(body.toString("utf8"), headers);
    refused(secret, Buffer.concat([body, Buffer.from(" ")]), headers, "an altered body");
    refused(secret, body, { ...headers, "webhook-id": "msg_other" }, "another id");
    const then = new Date((Number(headers["webhook-timestamp"]) - 301) * 1000);
    const stale = { ...headers, "webhook-timestamp": String(Math.floor(then.getTime() / 1000)) };
    refused(secret, body, stale, "a timestamp that was not signed");
    stale["webhook-signature"] = keyed(secret).sign(headers["webhook-id"], then, body.toString("utf8"));
    refused(secret, body, stale, "an old timestamp, however well signed");
  }
  refused(`whsec_${Buffer.from("another key of 24 bytes!").toString("base64")}`, body, headers, "another key");
  count += 1;
}
console.log(`${count} deliveries, ${rotated} with more than one signature`);
console.log("all cases passed");
