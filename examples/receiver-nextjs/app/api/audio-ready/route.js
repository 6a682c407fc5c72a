// A file of a job is ready: download it before its worker goes away, save it, say so.
import { download, record, safeName, setRecord } from "../../../lib/files";
import { judge } from "../../../lib/sender";

export const dynamic = "force-dynamic";
export const runtime = "nodejs";

// Files under way by their key: a copy of a notice that comes meanwhile waits for the same download.
const underWay = new Map();

const tell = (step, began, more) => console.log(JSON.stringify({ step, ms: Date.now() - began, ...more }));

async function take(key, notice, began) {
  const name = safeName(notice.filename);
  const sha256 = await download(notice.download_url, name);
  tell("downloaded", began, { job: notice.job_id, name, sha256 });
  const audioUrl = `/audio-outputs/${encodeURIComponent(name)}`;
  await setRecord(key, { job_id: notice.job_id, status: "completed", audioUrl, confirmed: false });
  return { audioUrl, sha256 };
}

/** Tells the sender that the file is safe, which lets its worker go. */
async function confirm(notice, sha256, began) {
  const answer = await fetch(notice.confirmation_url, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ job_id: notice.job_id, status: "downloaded", timestamp: Date.now(), sha256 }),
    signal: AbortSignal.timeout(10_000),
  });
  tell("confirmed", began, { job: notice.job_id, status: answer.status });
  if (!answer.ok) throw new Error(`the confirmation was answered with ${answer.status}`);
}

async function handle(key, notice, began) {
  const known = await record(key);
  if (known?.confirmed) {
    tell("duplicate", began, { job: notice.job_id });
    return known.audioUrl;
  }
  const { audioUrl, sha256 } = await take(key, notice, began);
  await confirm(notice, sha256, began);
  await setRecord(key, { job_id: notice.job_id, status: "completed", audioUrl, confirmed: true });
  return audioUrl;
}

export async function POST(request) {
  const began = Date.now();
  // The signature is over the bytes as they came.
  const body = Buffer.from(await request.arrayBuffer());
  const { id, reason } = judge(body, request.headers);
  if (reason) {
    tell("refused", began, { reason });
    return Response.json({ success: false, error: reason }, { status: 401 });
  }
  let notice;
  try {
    notice = JSON.parse(body.toString("utf8"));
  } catch {
    notice = null;
  }
  const missing = ["job_id", "download_url", "confirmation_url", "filename"].filter(
    (field) => typeof notice?.[field] !== "string",
  );
  if (missing.length > 0) {
    return Response.json({ success: false, error: `missing: ${missing.join(", ")}` }, { status: 400 });
  }
  tell("received", began, { job: notice.job_id, signed: id !== null });
  const key = id ?? `unsigned:${notice.job_id}:${notice.download_url}`;
  let work = underWay.get(key);
  if (!work) {
    work = handle(key, notice, began).finally(() => underWay.delete(key));
    underWay.set(key, work);
  }
  try {
    return Response.json({ success: true, job_id: notice.job_id, audioUrl: await work });
  } catch (error) {
    // The sender tries again.
    tell("failed", began, { job: notice.job_id, reason: error.message });
    return Response.json({ success: false, job_id: notice.job_id, error: error.message }, { status: 502 });
  }
}
