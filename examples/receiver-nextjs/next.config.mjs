import { fileURLToPath } from "node:url";

/** @type {import("next").NextConfig} */
export default {
  poweredByHeader: false,
  // This folder is the whole project, whatever lock files lie above it.
  outputFileTracingRoot: fileURLToPath(new URL(".", import.meta.url)),
};
