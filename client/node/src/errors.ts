/** The errors that this package throws, and the reasons for which stored values do not open. */

/** An argument is outside its range or cannot be used; the message says how to mend it. */
export class ResumedError extends Error {
  override name = "ResumedError";
}

/** The reason of the miss for a value that is no session of this fleet. */
export type Unsealable = "malformed" | "unknown-key" | "expired" | "not-authentic";
