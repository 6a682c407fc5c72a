// Files on disk and what is known of them. A record is one JSON file, replaced whole.
import { createHash, randomUUID } from "node:crypto";
import { createWriteStream } from "node:fs";
import { mkdir, open, readFile, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";

const DOWNLOAD_MS = 60_000;

export const outputs = () => join(process.env.DATA ?? "data", "audio-outputs");
const records = () => join(process.env.DATA ?? "data", "records");

/** One plain name out of whatever came in: it cannot leave the folder, hide or be an option of a program. */
export function safeName(given) {
  const last = String(given).split(/[/\\]/).pop();
  const name = last.replace(/[^\p{L}\p{N}._-]/gu, "_").replace(/^[.-]+/, "").slice(-100);
  return name === "" ? "file" : name;
}

/** Downloads into the folder, at most 60 s; the name has the whole file or nothing. Gives its SHA-256. */
export async function download(url, name) {
  await mkdir(outputs(), { recursive: true });
  const part = join(outputs(), `.${randomUUID()}.part`);
  try {
    const answer = await fetch(url, { signal: AbortSignal.timeout(DOWNLOAD_MS), cache: "no-store" });
    if (!answer.ok) throw new Error(`the download was answered with ${answer.status}`);
    const hash = createHash("sha256");
    const bytes = Readable.fromWeb(answer.body);
    bytes.on("data", (piece) => hash.update(piece));
    await pipeline(bytes, createWriteStream(part, { flags: "wx", flush: true }));
    await rename(part, join(outputs(), name));
    return hash.digest("hex");
  } finally {
    await rm(part, { force: true });
  }
}

const recordPath = (key) => join(records(), `${createHash("sha256").update(key).digest("hex")}.json`);

/** What is known under a key, or null. */
export async function record(key) {
  try {
    return JSON.parse(await readFile(recordPath(key), "utf8"));
  } catch (error) {
    if (error.code === "ENOENT") return null;
    throw error;
  }
}

/** Sets what is known. */
export async function setRecord(key, value) {
  await mkdir(records(), { recursive: true });
  const part = join(records(), `.${randomUUID()}.part`);
  const file = await open(part, "wx");
  try {
    await file.writeFile(JSON.stringify(value));
    await file.sync();
  } finally {
    await file.close();
  }
  await rename(part, recordPath(key));
}
