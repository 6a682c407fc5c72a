// Who may tell us of files.
import { Webhook } from "standardwebhooks";

/**
 * The webhook-id of a request whose signature fits one of WEBHOOK_SECRET (several, separated by spaces, are all live),
 * or the reason why none does. ALLOW_UNSIGNED=1 takes requests without a signature: for trials on one machine only.
 */
export function judge(body, headers) {
  if (process.env.ALLOW_UNSIGNED === "1" && !headers.has("webhook-signature")) return { id: null };
  const secrets = (process.env.WEBHOOK_SECRET ?? "").split(/\s+/).filter(Boolean);
  let reason = "WEBHOOK_SECRET is not set";
  for (const text of secrets) {
    try {
      // `whsec_` + base64 is the standard's form; any other text is used as it is.
      const verifier = new Webhook(text, text.startsWith("whsec_") ? {} : { format: "raw" });
      verifier.verify(body, Object.fromEntries(headers));
      return { id: headers.get("webhook-id") };
    } catch (error) {
      reason = error.message;
    }
  }
  return { reason };
}
