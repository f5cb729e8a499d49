/**
 * What to do at each session event of a server: the policy, without TLS.
 *
 * A handshake never waits for the store beyond the deadline, and not at all while the store keeps failing. Nothing rejects: a
 * call that fails means no resumption, and nothing else. Ids come from peers and values from the store: neither is trusted.
 */
import { X509Certificate } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

import { Breaker } from "./breaker.js";
import type { Context, Unknown } from "./contexts.js";
import { unwrap, wrap } from "./envelope.js";
import type { Keyring, Logger } from "./keyring.js";
import { FORMAT, ID_BYTES, storeKey } from "./sealing.js";
import { Sender, within, type Outgoing } from "./sender.js";
import { Session } from "./session.js";
import { Recorder, type Stats } from "./stats.js";
import { CallError, type Store } from "./store.js";

/** How long after its issue, in seconds, an id that the store does not know is asked for again: its Put may be on its way. */
const FRESH_SECONDS = 10;
/** Milliseconds to wait before each further ask, or what the deadline leaves. */
const FRESH_PAUSES = [1, 4, 16, 64];
/** What a further ask must have left of the deadline, so that it is not a failure of the store if it is late. */
const LEAST_ASK_MILLISECONDS = 10;
/** How much of its deadline a look-up gives its calls: a busy process tells a little late that the time is up. */
const DEADLINE_SHARE = 0.9;
/** The store's limit. */
const MAX_VALUE_BYTES = 65_536;

export interface Policy {
  lifetime: number;
  deadline: number;
  singleUse: boolean;
  puts: "wait" | "background";
  maxLookups: number;
}

interface Found {
  value?: Buffer;
  /** The reason of the hit or of the miss. */
  outcome: string;
}

export class Shim {
  readonly policy: Policy;
  readonly #store: Store;
  readonly #keyring: Keyring;
  readonly #clock: () => number;
  readonly #logger: Logger;
  readonly #recorder = new Recorder();
  readonly #breaker = new Breaker();
  readonly #sender: Sender;
  readonly #flights = new Map<string, Promise<Found>>();
  #lookups = 0;

  constructor(store: Store, keyring: Keyring, policy: Policy, logger: Logger, clock: () => number) {
    this.policy = policy;
    this.#store = store;
    this.#keyring = keyring;
    this.#logger = logger;
    this.#clock = clock;
    const [breaker, recorder] = [this.#breaker, this.#recorder];
    this.#sender = new Sender({ store, deadline: policy.deadline, breaker, recorder, logger, clock });
  }

  /** The present, in Unix seconds. */
  now(): number {
    return this.#clock();
  }

  get stats(): Stats {
    return this.#recorder.snapshot();
  }

  get breakerOpen(): boolean {
    return !this.#breaker.closed;
  }

  /**
   * Stores a session that a handshake has just negotiated; resolves when the handshake may go on.
   *
   * @param session `undefined` counts one that cannot be resumed.
   * @param context That of its connection.
   * @param began When the handshake was, in Unix seconds.
   */
  async negotiated(session: Session | undefined, context: Context | Unknown, began: number): Promise<void> {
    const outgoing = session && typeof context === "object" && this.#sealed(session, context, began);
    if (!outgoing) {
      this.#recorder.count("puts", "unresumable");
      return;
    }
    const wait = this.policy.puts === "wait";
    const sent = this.#sender.submit(outgoing, wait);
    // After a call that failed, which may have been this handshake's look-up, a handshake does not wait once more.
    if (wait && this.#breaker.answered) await within(sent, this.policy.deadline, undefined);
  }

  #sealed(session: Session, context: Context, began: number): Outgoing | undefined {
    const { fingerprint, idContext } = context;
    const now = Math.floor(this.#clock());
    // A session that a resumed connection issues was issued with the one that it resumed, and ends with it. The timeout begins with the
    // ticket, and so behind a handshake that a client can draw out.
    const lineage = session.lineage ?? { fingerprint, issued: began, end: 0 };
    if (session.hasForeignData || !lineage.fingerprint.equals(fingerprint) || !isOf(session, context)) return undefined;
    const peerEnd = session.peer ? Date.parse(new X509Certificate(session.peer).validTo) / 1000 : Infinity;
    const remaining = Math.min(lineage.end ? lineage.end - now : session.timeout, this.policy.lifetime, peerEnd - now);
    if (!(remaining > 0) || session.id.length === 0) return undefined;
    session.lineage = undefined; // it is in the envelope
    session.idContext = idContext;
    const [key, notAfter, { issued }] = [this.#key(session.id), now + remaining, lineage];
    const value = this.#keyring.seal(key, wrap({ fingerprint, issued, session: session.serialize() }), notAfter);
    return value.length > MAX_VALUE_BYTES ? undefined : { key, value, notAfter, issued };
  }

  /** Resolves to the session of an id that a client offered, any bytes at all, or undefined for a full handshake. */
  async lookUp(id: Buffer, serverName: string, context: Context | Unknown): Promise<Session | undefined> {
    let outcome = "internal-error";
    let session: Session | undefined;
    try {
      [session, outcome] = typeof context === "object" ? await this.#find(id, serverName, context) : [undefined, context];
    } catch (error) {
      this.internalError(error);
    }
    this.#recorder.count(session ? "hits" : "misses", outcome);
    return session;
  }

  /** Removes a session from the whole fleet, in the background. */
  remove(id: Buffer, reason: "application" | "fatal-error"): void {
    void this.#sender.submit({ key: this.#key(id), reason }, false);
  }

  /** Notes a defect. */
  internalError(error: unknown): void {
    this.#logger.error(`resumed: a defect, the handshake goes on without resumption: ${(error as Error).stack ?? ""}`);
  }

  /** Counts a connection that was ended. */
  terminated(reason: "context-mismatch"): void {
    this.#recorder.count("terminations", reason);
  }

  flush(timeout: number): Promise<boolean> {
    return this.#sender.flush(timeout);
  }

  async close(timeout: number): Promise<void> {
    await this.#sender.close(timeout);
    this.#store.close();
  }

  #key(id: Buffer): Buffer {
    return storeKey(FORMAT, this.#store.namespace, id);
  }

  async #find(id: Buffer, serverName: string, context: Context): Promise<[Session | undefined, string]> {
    const now = this.#clock();
    if (id.length < 1 || id.length > ID_BYTES) return [undefined, "foreign-id"];
    const issued = this.#keyring.openId(this.#store.namespace, id);
    if (issued !== undefined && now - issued > this.policy.lifetime) return [undefined, "old-id"];
    if (!this.#breaker.closed) return [undefined, "breaker-open"];
    if (this.#breaker.resting) return [undefined, "limited"];
    const key = this.#key(id);
    const { value, outcome } = await this.#fly(key, issued !== undefined && now - issued <= FRESH_SECONDS);
    if (!value) return [undefined, outcome];
    const opened = this.#keyring.open(key, value, now);
    if (typeof opened === "string") return [undefined, opened];
    const envelope = unwrap(opened.plaintext);
    if (!envelope) return [undefined, "malformed"];
    const { fingerprint, issued: negotiated } = envelope;
    const session = Session.parse(envelope.session);
    if (!session?.id.equals(id) || session.lineage || session.hasForeignData) return [undefined, "undecodable"];
    if (session.hostName !== serverName) return [undefined, "other-name"]; // RFC 6066 section 3
    const agrees = fingerprint.equals(context.fingerprint) && session.idContext.equals(context.idContext);
    if (!agrees || !isOf(session, context)) return [undefined, "context-mismatch"];
    if (this.policy.singleUse) {
      // Only now: a connection that must not resume a session does not use it up.
      const taken = await this.#ask("take", key, false);
      if (!taken.value) return [undefined, taken.outcome];
    }
    session.time = Math.floor(now);
    session.timeout = Math.floor(opened.notAfter - now);
    session.lineage = { fingerprint, issued: negotiated, end: opened.notAfter };
    return [session, outcome];
  }

  /** Looks `key` up, or waits for the answer to somebody else who does. */
  async #fly(key: Buffer, fresh: boolean): Promise<Found> {
    const name = key.toString("latin1");
    const flight = this.#flights.get(name);
    if (flight) {
      const found = await within(flight, this.policy.deadline, { outcome: "late" });
      return found.value ? { ...found, outcome: "shared" } : found;
    }
    const mine = this.#ask("get", key, fresh);
    this.#flights.set(name, mine);
    try {
      return await mine;
    } finally {
      this.#flights.delete(name);
    }
  }

  async #ask(method: "get" | "take", key: Buffer, fresh: boolean): Promise<Found> {
    if (this.#lookups >= this.policy.maxLookups) return { outcome: "busy" };
    this.#lookups++;
    const started = performance.now();
    const left = (): number => started + this.policy.deadline * DEADLINE_SHARE - performance.now();
    const call = (): Promise<Buffer | undefined> => this.#store[method](key, left());
    try {
      let value = await call();
      let outcome = "store";
      for (const pause of fresh ? FRESH_PAUSES : []) {
        const patience = left() - LEAST_ASK_MILLISECONDS;
        if (value || patience <= 0) break;
        await sleep(Math.min(pause, patience));
        value = await call();
        outcome = "fresh";
      }
      this.#sender.succeeded();
      return value ? { value, outcome } : { outcome: "unknown" };
    } catch (error) {
      this.#sender.failed(error);
      return { outcome: error instanceof CallError ? error.reason : "refused" };
    } finally {
      this.#lookups--;
      this.#recorder.observe(performance.now() - started);
    }
  }
}

/** Whether a session has what one of this context has: a verified certificate of its client, or none. */
function isOf(session: Session, { certificates }: Context): boolean {
  return session.verified && (session.peer !== undefined) === certificates;
}
