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
import type { Logger } from "./files.js";
import { haveOneHash } from "./foreseen.js";
import type { Keyring } from "./keyring.js";
import { FORMAT, ID_BYTES, storeKey } from "./sealing.js";
import { Sender, within, type Outgoing } from "./sender.js";
import { Session } from "./session.js";
import { Recorder, type Stats } from "./stats.js";
import { CallError, type Store } from "./store.js";

/** How long after its issue, in seconds, an id that the store does not know is asked for again: its Put may be on its way. */
const FRESH_SECONDS = 10;
/** Milliseconds to wait before each further ask, or what the deadline leaves. */
const FRESH_PAUSES = [1, 4, 16, 64];
/** What a call must have left of the deadline to be worth it: an answer that is late then says nothing about the store. */
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

/** A session that a look-up has found. OpenSSL may still not resume it: see {@link Shim.resumed}. */
export interface Offer {
  session: Session;
  /** The reason of the hit. */
  outcome: string;
  /** Whether another process stored it. */
  foreign: boolean;
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

  /**
   * Resolves to the session of an id that a client offered, any bytes at all, or undefined for a full handshake.
   *
   * @param cipher The one of TLS 1.3 that will be chosen, as far as it is known.
   */
  async lookUp(id: Buffer, serverName: string, context: Context | Unknown, cipher?: number): Promise<Offer | undefined> {
    try {
      const found = typeof context === "object" ? await this.#find(id, serverName, context, cipher) : context;
      if (typeof found === "object") return found;
      this.missed(found);
    } catch (error) {
      this.missed("internal-error");
      this.internalError(error);
    }
    return undefined;
  }

  /** Counts an id that a client offered and that is not looked up, or not resumed. */
  missed(reason: string): void {
    this.#recorder.count("misses", reason);
  }

  /** Counts a handshake that resumed what was found. */
  resumed({ outcome, foreign }: Offer): void {
    this.#recorder.count("hits", outcome);
    if (foreign) this.#recorder.count("foreignHits", outcome);
  }

  /** Removes a session from the whole fleet, in the background. */
  remove(id: Buffer, reason: "application" | "fatal-error"): void {
    const key = this.#key(id);
    this.#flights.delete(key.toString("latin1")); // no handshake joins a look-up from before
    void this.#sender.submit({ key, reason }, false);
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

  /** Resolves to what was found, or the reason of the miss. */
  async #find(id: Buffer, serverName: string, context: Context, cipher: number | undefined): Promise<Offer | string> {
    const now = this.#clock();
    const end = performance.now() + this.policy.deadline;
    if (id.length < 1 || id.length > ID_BYTES) return "foreign-id";
    const issued = this.#keyring.openId(this.#store.namespace, id);
    if (issued !== undefined && now - issued > this.policy.lifetime) return "expired-id";
    const key = this.#key(id);
    if (this.#sender.isRemoving(key)) return "unknown";
    if (!this.#breaker.closed) return "breaker-open";
    if (this.#breaker.resting) return "limited";
    // With a clock that is behind, ids of other frontends are from the future, and stay so.
    const fresh = issued !== undefined && Math.abs(now - issued) <= FRESH_SECONDS;
    const { value, outcome } = await this.#fly(key, fresh, end);
    if (!value) return outcome;
    const opened = this.#keyring.open(key, value, now);
    if (typeof opened === "string") return opened;
    const envelope = unwrap(opened.plaintext);
    if (!envelope) return "malformed";
    const { fingerprint, issued: negotiated } = envelope;
    const session = Session.parse(envelope.session);
    if (!session?.id.equals(id) || session.lineage || session.hasForeignData) return "undecodable";
    if (session.hostName !== serverName) return "server-name-mismatch"; // RFC 6066 section 3
    const agrees = fingerprint.equals(context.fingerprint) && session.idContext.equals(context.idContext);
    if (!agrees || !isOf(session, context)) return "context-mismatch";
    // OpenSSL would refuse it, too, but issue no ticket then.
    if (cipher !== undefined && !haveOneHash(session.cipher, cipher)) return "other-cipher";
    if (this.policy.singleUse) {
      // Only now: a connection that must not resume a session does not use it up.
      const taken = await this.#ask("take", key, end, { fresh: false, answered: true });
      if (!taken.value) return taken.outcome;
    }
    session.time = Math.floor(now);
    session.timeout = Math.floor(opened.notAfter - now);
    session.lineage = { fingerprint, issued: negotiated, end: opened.notAfter };
    return { session, outcome, foreign: opened.foreign };
  }

  /** Looks `key` up, or waits for the answer to another handshake that does, until `end` (performance.now()). */
  async #fly(key: Buffer, fresh: boolean, end: number): Promise<Found> {
    const name = key.toString("latin1");
    const flight = this.#flights.get(name);
    if (flight) {
      const found = await within(flight, end - performance.now(), { outcome: "timeout" });
      return found.value ? { ...found, outcome: "coalesced" } : found;
    }
    const mine = this.#ask("get", key, end, { fresh, answered: false });
    this.#flights.set(name, mine);
    try {
      return await mine;
    } finally {
      if (this.#flights.get(name) === mine) this.#flights.delete(name);
    }
  }

  /**
   * Makes a call, and further ones if the session is fresh.
   *
   * @param answered Whether the store has answered this handshake already: if it is late now, it had little time.
   */
  async #ask(
    method: "get" | "take",
    key: Buffer,
    end: number,
    { fresh, answered }: { fresh: boolean; answered: boolean },
  ): Promise<Found> {
    const began = performance.now();
    // To take a session and not to learn of it would use it up for nothing.
    if (end - began < Math.min(LEAST_ASK_MILLISECONDS, this.policy.deadline)) return { outcome: "timeout" };
    if (this.#lookups >= this.policy.maxLookups) return { outcome: "too-many-lookups" };
    this.#lookups++;
    const left = (): number => began + (end - began) * DEADLINE_SHARE - performance.now();
    const call = (): Promise<Buffer | undefined> => this.#store[method](key, left());
    try {
      let value = await call();
      let outcome = "store";
      for (const pause of fresh ? FRESH_PAUSES : []) {
        const patience = left() - LEAST_ASK_MILLISECONDS;
        if (value || patience <= 0) break;
        await sleep(Math.min(pause, patience));
        answered = true;
        value = await call();
        outcome = "retried";
      }
      this.#sender.succeeded();
      return value ? { value, outcome } : { outcome: "unknown" };
    } catch (error) {
      const reason = error instanceof CallError ? error.reason : "rejected";
      if (reason !== "timeout" || !answered) this.#sender.failed(error, began);
      return { outcome: reason };
    } finally {
      this.#lookups--;
      this.#recorder.observe(performance.now() - began);
    }
  }
}

/** Whether a session has what one of this context has: a verified certificate of its client, or none. */
function isOf(session: Session, { certificates }: Context): boolean {
  return session.verified && (session.peer !== undefined) === certificates;
}
