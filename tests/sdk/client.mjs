// The official JavaScript client against Ringback. Prints one line per case; ends with `all cases passed`.
// Environment: RUNPOD_ENDPOINT_BASE_URL, RINGBACK_TEST_KEY, RUNPOD_SDK_DIR (folder with node_modules).
// Endpoints expected: echo, sleep, narrow (sleep with one slot), plain, generator (Python handlers).

import assert from "node:assert/strict";
import { setTimeout as pause } from "node:timers/promises";

const { default: runpodSdk } = await import(
  `${process.env.RUNPOD_SDK_DIR}/node_modules/runpod-sdk/dist/src/index.js`
);
const key = process.env.RINGBACK_TEST_KEY;
const baseUrl = process.env.RUNPOD_ENDPOINT_BASE_URL;
const runpod = runpodSdk(key, { baseUrl });

async function until(look, what, seconds = 240) {
  const deadline = Date.now() + seconds * 1000;
  for (;;) {
    const found = await look();
    if (found) return found;
    assert(Date.now() < deadline, `waited in vain for ${what}`);
    await pause(50);
  }
}

const cases = {
  async "run and status"() {
    const endpoint = runpod.endpoint("echo");
    const accepted = await endpoint.run({ input: { prompt: "a horse", n: [1, null, "ü"] } });
    assert(accepted.id, JSON.stringify(accepted));
    assert.equal(accepted.status, "IN_QUEUE");
    const done = await until(async () => {
      const now = await endpoint.status(accepted.id);
      return now.completed ? now : null;
    }, "the end");
    assert.equal(done.status, "COMPLETED");
    assert.equal(done.succeeded, true);
    assert.deepEqual(done.output, { prompt: "a horse", n: [1, null, "ü"] });
    assert(Number.isInteger(done.delayTime) && Number.isInteger(done.executionTime));
  },

  async "runSync of a quick job"() {
    const done = await runpod.endpoint("echo").runSync({ input: { prompt: "now" } });
    assert.equal(done.status, "COMPLETED");
    assert(done.id.startsWith("sync-"), done.id);
    assert.deepEqual(done.output, { prompt: "now" });
  },

  async "runSync goes on with status-sync after its wait"() {
    const begun = Date.now();
    // The wait of 1 s ends before the job: the client then asks /status-sync until the end.
    const endpoint = runpod.endpoint("sleep");
    const first = await endpoint.runSync({ input: { seconds: 4 } }, 1000);
    assert.equal(first.completed, false);
    const done = await endpoint.statusSync(first.id, 30000);
    assert.equal(done.status, "COMPLETED");
    const took = Date.now() - begun;
    assert(took >= 4000, `${took}`);
  },

  async "stream"() {
    const endpoint = runpod.endpoint("generator");
    const { id } = await endpoint.run({ input: { count: 5, pause: 0.3 } });
    const seen = [];
    for await (const chunk of endpoint.stream(id)) seen.push(chunk.output.n);
    assert.deepEqual(seen, [0, 1, 2, 3, 4]);
  },

  async "stream does not spin"() {
    // The client polls without a pause: the server has to hold a poll that has nothing new.
    const endpoint = runpod.endpoint("generator");
    const { id } = await endpoint.run({ input: { count: 2, pause: 2 } });
    const real = globalThis.fetch;
    let polls = 0;
    globalThis.fetch = (...args) => { polls += 1; return real(...args); };
    for await (const _ of endpoint.stream(id));
    globalThis.fetch = real;
    assert(polls > 0 && polls < 20, `${polls} polls`);
  },

  async "cancel"() {
    const endpoint = runpod.endpoint("sleep");
    const { id } = await endpoint.run({ input: { seconds: 300 } });
    await until(async () => (await endpoint.status(id)).status === "IN_PROGRESS", "the start");
    assert.equal((await endpoint.cancel(id)).status, "CANCELLED");
    const now = await endpoint.status(id);
    assert.equal(now.status, "CANCELLED");
    assert.equal(now.completed, true);
    // A stream of a cancelled job ends at once.
    for await (const _ of endpoint.stream(id)) assert.fail("a cancelled job yielded");
  },

  async "purgeQueue"() {
    const endpoint = runpod.endpoint("narrow");
    const { id } = await endpoint.run({ input: { seconds: 300 } });
    await until(async () => (await endpoint.status(id)).status === "IN_PROGRESS", "the start");
    for (let n = 0; n < 3; n++) await endpoint.run({ input: { seconds: 300 } });
    assert.deepEqual(await endpoint.purgeQueue(), { removed: 3, status: "completed" });
    assert.equal((await endpoint.cancel(id)).status, "CANCELLED");
  },

  async "health"() {
    const health = await runpod.endpoint("echo").health();
    for (const name of ["completed", "failed", "inProgress", "inQueue", "retried"])
      assert(Number.isInteger(health.jobs[name]), name);
    for (const name of ["idle", "initializing", "ready", "running", "throttled"])
      assert(Number.isInteger(health.workers[name]), name);
  },

  async "a failure carries its reason"() {
    const done = await runpod.endpoint("plain").runSync({ input: { mode: "raise", text: "out of paint" } });
    assert.equal(done.status, "FAILED");
    assert.equal(done.succeeded, false);
    assert.match(done.error, /out of paint/);
  },

  async "a wrong key is refused"() {
    const endpoint = runpodSdk("rb_wrong_0123456789", { baseUrl }).endpoint("echo");
    await assert.rejects(endpoint.run({ input: {} }), (error) => error.response?.status === 401);
  },
};

for (const [name, run] of Object.entries(cases)) {
  const begun = Date.now();
  await run();
  console.log(`ok ${name} (${((Date.now() - begun) / 1000).toFixed(1)} s)`);
}
console.log("runpod-sdk: all cases passed");
