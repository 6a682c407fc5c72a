// A Runflow callback handler with Express (found through NODE_PATH): verify the raw body, know copies by run or batch,
// answer, copy outputs later.
//
// It knows nothing of Ringback. SECRETS holds the live callback secrets, separated by spaces. The port is the last
// argument.
const crypto = require("node:crypto");
const express = require("express");

const app = express();
const seen = new Set();
const secrets = process.env.SECRETS.split(" ");
const tell = (step, more) => console.log(JSON.stringify({ step, ...more }));

function signed(body, given) {
  // Runflow's key is the whole text of the secret, its prefix included.
  if (!/^[0-9a-f]{64}$/.test(given)) return false;
  return secrets.some((secret) =>
    crypto.timingSafeEqual(crypto.createHmac("sha256", secret).update(body).digest(), Buffer.from(given, "hex")),
  );
}

function links(value) {
  if (typeof value === "string") return /^https?:\/\//.test(value) ? [value] : [];
  return value !== null && typeof value === "object" ? Object.values(value).flatMap(links) : [];
}

async function copyOutputs(told, key) {
  const copied = [];
  // A batch's output counts its runs; their files come with their own callbacks.
  for (const link of links(told.event === "run.completed" ? told.output : null)) {
    const answer = await fetch(link, { signal: AbortSignal.timeout(30_000) });
    if (!answer.ok) throw new Error(`${link} is answered with ${answer.status}`);
    copied.push((await answer.arrayBuffer()).byteLength);
  }
  const { event, status, output, created_at, completed_at } = told;
  tell("copied", { job: key, event, status, output, copied, fields: Object.keys(told).sort(), times: [created_at, completed_at] });
}

app.post("/runflow/callback", express.raw({ type: "application/json" }), (request, response) => {
  const given = request.get("Runflow-Signature") ?? "";
  if (!signed(request.body, given)) {
    tell("refused", { signature: given });
    return response.status(401).json({ error: "invalid signature" });
  }
  const told = JSON.parse(request.body);
  const key = told.run_id ?? told.batch_id;
  const copy = seen.has(key);
  seen.add(key);
  tell(copy ? "duplicate" : "taken", { job: key });
  response.json({ ok: true });
  if (!copy) setImmediate(() => copyOutputs(told, key));
});

app.listen(Number(process.argv.at(-1)), "127.0.0.1");
