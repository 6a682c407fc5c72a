// Receives Ringback's webhooks: verify the raw bytes, write them down, answer, then work.
//
//   WEBHOOK_SECRET   the secret that signs the webhooks; several, separated by spaces, are all live (rotation)
//   PORT             where to listen on 127.0.0.1 (3001)
//   DATA             folder of the inbox and of the results (data)
import { mkdir, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import express from "express";
import { Webhook } from "standardwebhooks";
import { Inbox } from "./inbox.mjs";

const secrets = (process.env.WEBHOOK_SECRET ?? "").split(/\s+/).filter(Boolean);
if (secrets.length === 0) {
  console.error("WEBHOOK_SECRET is not set");
  process.exit(2);
}
// `whsec_` + base64 is the standard's form; any other text is used as it is.
const verifiers = secrets.map((text) => new Webhook(text, text.startsWith("whsec_") ? {} : { format: "raw" }));
const data = process.env.DATA ?? "data";
const results = join(data, "results");
await mkdir(results, { recursive: true });
const inbox = new Inbox(join(data, "inbox"));

const tell = (step, more) => console.log(JSON.stringify({ step, ...more }));

/** The reason why no secret fits, or null. */
function refusal(body, headers) {
  let reason = null;
  for (const verifier of verifiers) {
    try {
      verifier.verify(body, headers);
      return null;
    } catch (error) {
      reason = error.message;
    }
  }
  return reason;
}

/** The work, as long as it likes. It may be done twice if the process dies in its midst, so it writes whole files. */
async function work(event) {
  const job = JSON.parse(event.body);
  // Names of files never come from outside unchecked.
  if (typeof job.id !== "string" || !/^[\w-]{1,80}$/.test(job.id)) throw new Error("the body has no usable id");
  const file = join(results, `${job.id}.json`);
  await writeFile(`${file}.part`, JSON.stringify({ status: job.status, output: job.output ?? null, error: job.error ?? null }));
  await rename(`${file}.part`, file);
  tell("worked", { job: job.id, status: job.status });
}

const app = express();
app.disable("x-powered-by");

// The signature is over the bytes as they came: no JSON parser may touch them before.
app.post("/webhooks/ringback", express.raw({ type: "application/json", limit: "32mb" }), async (request, response) => {
  const body = Buffer.isBuffer(request.body) ? request.body : Buffer.alloc(0);
  const reason = refusal(body, request.headers);
  if (reason !== null) {
    tell("refused", { reason });
    return response.status(401).json({ error: reason });
  }
  // On disk before the answer: once we say 200, Ringback does not send it again.
  const id = request.headers["webhook-id"];
  const added = await inbox.add(id, body);
  tell(added ? "queued" : "duplicate", { webhook_id: id });
  response.json({ received: true });
  if (added) inbox.wake();
});

const server = app.listen(Number(process.env.PORT ?? 3001), "127.0.0.1", (error) => {
  if (error) throw error;
  tell("listening", { port: server.address().port });
  // What an earlier process took and did not finish.
  inbox.start(work, (error) => tell("failed", { reason: error.message }));
});
