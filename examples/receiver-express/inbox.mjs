// Events on disk, each once: `<hash of webhook-id>.json`, and an empty `.done` beside it once it is worked off.
import { createHash, randomUUID } from "node:crypto";
import { mkdirSync } from "node:fs";
import { link, open, readFile, readdir, unlink, writeFile } from "node:fs/promises";
import { join } from "node:path";

const RETRY_MS = 5_000;

export class Inbox {
  #folder;
  #work = null;
  #failed = null;
  #busy = false;
  #again = false;

  constructor(folder) {
    this.#folder = folder;
    mkdirSync(folder, { recursive: true });
  }

  /** Writes an event down; false if its webhook-id was here before. A crash after this loses nothing. */
  async add(webhookId, body) {
    const name = createHash("sha256").update(webhookId).digest("hex");
    const part = join(this.#folder, `${randomUUID()}.part`);
    await this.#write(part, JSON.stringify({ webhookId, body: body.toString("utf8") }));
    try {
      // `link` fails if the name is taken, whoever took it, so two copies at once are one event.
      await link(part, join(this.#folder, `${name}.json`));
      await this.#sync(this.#folder);
      return true;
    } catch (error) {
      if (error.code !== "EEXIST") throw error;
      return false;
    } finally {
      await unlink(part);
    }
  }

  /** Works off what is here, oldest names first, and whatever comes later. */
  start(work, failed) {
    this.#work = work;
    this.#failed = failed;
    this.wake();
  }

  /** Looks for work, one event at a time. */
  async wake() {
    if (this.#busy || this.#work === null) {
      this.#again = true;
      return;
    }
    this.#busy = true;
    let broken = false;
    do {
      this.#again = false;
      const names = await readdir(this.#folder);
      const done = new Set(names.filter((name) => name.endsWith(".done")));
      for (const name of names.filter((name) => name.endsWith(".json") && !done.has(`${name}.done`))) {
        try {
          await this.#work(JSON.parse(await readFile(join(this.#folder, name), "utf8")));
          await writeFile(join(this.#folder, `${name}.done`), "");
        } catch (error) {
          broken = true;
          this.#failed(error);
        }
      }
    } while (this.#again);
    this.#busy = false;
    if (broken) setTimeout(() => this.wake(), RETRY_MS).unref();
  }

  async #write(path, text) {
    const file = await open(path, "wx");
    try {
      await file.writeFile(text);
      await file.sync();
    } finally {
      await file.close();
    }
  }

  async #sync(folder) {
    const handle = await open(folder, "r");
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
  }
}
