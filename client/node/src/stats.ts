/** Counts by reason. */

/** Upper bounds of the buckets of {@link Stats.lookups}, in milliseconds; one more holds what took longer. */
export const LOOKUP_BUCKETS: readonly number[] = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100];

/** The counts since attach(), by reason. The reasons are those of the clients in other languages. */
export interface Stats {
  /**
   * Handshakes that resumed: `store`; `retried` (a session just negotiated, found by a further call); `coalesced` (found by the
   * look-up of another handshake).
   */
  hits: Record<string, number>;
  /**
   * Those of `hits` whose sessions another process stored, by the same reasons: a cache in this process would not have
   * them. A ticket of TLS 1.3 that was issued when a session resumed is its issuer's.
   */
  foreignHits: Record<string, number>;
  /**
   * `unknown`; `foreign-id` (no id of a session) and `expired-id`, both without a call; `timeout`, `unavailable` and `rejected`: the call
   * failed; `limited` (the server refused a call because of a limit; for a moment after that, and for a share of the sessions, no call);
   * `breaker-open` (no call); `too-many-lookups` (under way: no call); `malformed`, `unknown-key`, `expired`, `not-authentic`, `undecodable`: the
   * value was no session of this fleet; `server-name-mismatch`: it was negotiated for another server name (RFC 6066 section 3);
   * `context-mismatch`: it was negotiated in another context; `context-unknown` and `context-unstable`, both without a call: the
   * server chooses contexts by name, and which one this name has is not known yet, or is not always the same; `other-cipher`: it has
   * another hash than the cipher that was chosen (TLS 1.3); `not-resumed`: OpenSSL did not resume it for another reason, such as a
   * key exchange that is tried again (no call, where the server's `ecdhCurve` shows it beforehand); `internal-error`: a defect.
   */
  misses: Record<string, number>;
  /** `stored`, `refused`, `dropped` (the queue was full, or a limit is used up), `expired` (not sent in time), `unresumable` (nothing to store). */
  puts: Record<string, number>;
  /** `fatal-error`, `application`, `dropped`, `refused`. */
  removals: Record<string, number>;
  /**
   * Connections that were ended when their handshake was done: `context-mismatch` (the session that they resumed was not negotiated
   * in the context that they showed then).
   */
  terminations: Record<string, number>;
  /** Tickets that resumed, with sessions "tickets": `current`. Node does not show which tickets it issued or refused. */
  ticketsResumed: Record<string, number>;
  /** Look-ups that made a call, by duration: one count for each of LOOKUP_BUCKETS and one for longer ones. With singleUse Get and Take count apart. */
  lookups: number[];
  /** The total duration of these look-ups, in milliseconds. */
  lookupMilliseconds: number;
}

const FOUND = ["store", "retried", "coalesced"];
/** All reasons that may be counted. */
export const REASONS = {
  hits: FOUND,
  foreignHits: FOUND,
  misses: [
    "unknown",
    "foreign-id",
    "expired-id",
    "timeout",
    "unavailable",
    "rejected",
    "limited",
    "breaker-open",
    "too-many-lookups",
  ]
    .concat(["malformed", "unknown-key", "expired", "not-authentic", "undecodable", "server-name-mismatch", "internal-error"])
    .concat(["context-mismatch", "context-unknown", "context-unstable", "other-cipher", "not-resumed"]),
  puts: ["stored", "refused", "dropped", "expired", "unresumable"],
  removals: ["fatal-error", "application", "dropped", "refused"],
  terminations: ["context-mismatch"],
  ticketsResumed: ["current"],
} as const;

export type Kind = keyof typeof REASONS;

export class Recorder {
  readonly #stats: Stats = {
    hits: {},
    foreignHits: {},
    misses: {},
    puts: {},
    removals: {},
    terminations: {},
    ticketsResumed: {},
    lookups: new Array<number>(LOOKUP_BUCKETS.length + 1).fill(0),
    lookupMilliseconds: 0,
  };

  count(kind: Kind, reason: string): void {
    this.#stats[kind][reason] = (this.#stats[kind][reason] ?? 0) + 1;
  }

  observe(milliseconds: number): void {
    let bucket = LOOKUP_BUCKETS.findIndex((bound) => milliseconds <= bound);
    if (bucket < 0) bucket = LOOKUP_BUCKETS.length;
    this.#stats.lookups[bucket] = (this.#stats.lookups[bucket] ?? 0) + 1;
    this.#stats.lookupMilliseconds += milliseconds;
  }

  snapshot(): Stats {
    return structuredClone(this.#stats);
  }
}
