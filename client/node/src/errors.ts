/** The errors that this package throws, and why values of the store do not open. */

/** What the caller gave cannot be used; the message says what to do. */
export class ResumedError extends Error {
  override name = "ResumedError";
}

/** Why a value is no session of this fleet: the reason under which the miss is counted. */
export type Unsealable = "malformed" | "unknown-key" | "expired" | "not-authentic";
