// The public address of a saved file.
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { Readable } from "node:stream";
import { outputs, safeName } from "../../../lib/files";

export const dynamic = "force-dynamic";
export const runtime = "nodejs";

export async function GET(_request, { params }) {
  const { name } = await params;
  const found = name === safeName(name) && (await stat(join(outputs(), name)).catch(() => null));
  if (!found || !found.isFile()) return Response.json({ error: "no such file" }, { status: 404 });
  return new Response(Readable.toWeb(createReadStream(join(outputs(), name))), {
    headers: {
      "content-type": "application/octet-stream",
      "content-length": String(found.size),
      "content-disposition": `attachment; filename*=UTF-8''${encodeURIComponent(name)}`,
      "x-content-type-options": "nosniff",
    },
  });
}
