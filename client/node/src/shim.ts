/**
 * The session policy: decisions for each session event of a server, without TLS.
 *
 * A handshake never waits for the server beyond the deadline, and not at all while the circuit breaker is open. Nothing rejects: a
 * call that fails means no resumption, and nothing else. Ids come from peers and values from the store: neither is trusted.
 */
import { X509Certificate } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

import { Breaker, FAILURES } from "./breaker.js";
import type { Context, Unknown } from "./contexts.js";
import { unwrap, wrap } from "./envelope.js";
import type { Logger, Reload } from "./files.js";
import { haveOneHash } from "./foreseen.js";
import type { Keyring } from "./keyring.js";
import { Prober } from "./prober.js";
import { FORMAT, ID_BYTES, storeKey } from "./sealing.js";
import { Sender, within, type Outgoing } from "./sender.js";
import { Session } from "./session.js";
import { Recorder, type Stats } from "./stats.js";
import { CallError, type Store } from "./store.js";

/** Seconds after its issue in which a miss for an id is worth further calls: its Put may be on its way. */
export const FRESH_SECONDS = 10;
/** Milliseconds before each further call for a fresh id; the deadline shortens them. */
export const RETRY_PAUSES_MS = [1, 4, 16, 64];
/** Milliseconds that a call must have left to be worth making: a timeout after less says nothing about the server. */
export const MIN_CALL_MS = 10;
/** The share of a handshake's deadline that its calls get: the rest absorbs late timers. */
export const DEADLINE_SHARE = 0.9;
/** The server's limit. */
export const MAX_VALUE_BYTES = 65_536;

export interface Policy {
  lifetimeSeconds: number;
  deadlineMs: number;
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
  readonly #prober: Prober;
  readonly #flights = new Map<string, Promise<Found>>();
  #lookups = 0;

  constructor(store: Store, keyring: Keyring, policy: Policy, logger: Logger, clock: () => number) {
    this.policy = policy;
    this.#store = store;
    this.#keyring = keyring;
    this.#logger = logger;
    this.#clock = clock;
    const limited = this.#limited.bind(this);
    this.#sender = new Sender({ store, limited, recorder: this.#recorder, clock });
    this.#prober = new Prober(store, policy.deadlineMs, this.#breaker, this.#recovered.bind(this));
  }

  /** The present, in Unix seconds. */
  now(): number {
    return this.#clock();
  }

  get stats(): Stats {
    return this.#recorder.snapshot();
  }

  get breakerOpen(): boolean {
    return this.#breaker.open;
  }

  get keyringReload(): Reload | undefined {
    return this.#keyring.lastReload;
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
    if (!outgoing || !this.#breaker.serves(outgoing.key)) {
      this.#recorder.count("puts", outgoing ? "dropped" : "unresumable");
      return;
    }
    const wait = this.policy.puts === "wait";
    const sent = this.#sender.submit(outgoing, wait);
    // After a call that failed, which may have been this handshake's look-up, a handshake does not wait once more.
    if (wait && this.#breaker.answered && this.#sender.answered) await within(sent, this.policy.deadlineMs, undefined);
  }

  #sealed(session: Session, context: Context, began: number): Outgoing | undefined {
    const { fingerprint, idContext } = context;
    const now = Math.floor(this.#clock());
    // A session that a resumed connection issues was issued with the one that it resumed, and ends with it. The timeout begins with the
    // ticket, and so behind a handshake that a client can draw out.
    const lineage = session.lineage ?? { fingerprint, issued: began, end: 0 };
    if (session.hasForeignData || !lineage.fingerprint.equals(fingerprint) || !isOf(session, context)) return undefined;
    const peerEnd = session.peer ? Date.parse(new X509Certificate(session.peer).validTo) / 1000 : Infinity;
    const remaining = Math.min(lineage.end ? lineage.end - now : session.timeout, this.policy.lifetimeSeconds, peerEnd - now);
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

  /** Counts a handshake that resumed the session of a look-up. */
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
    this.#prober.close();
    await this.#sender.close(timeout);
    this.#store.close();
  }

  /** Records a call that failed. */
  #failed(error: unknown, began: number): void {
    const { reason = "rejected", stalled = false } = error instanceof CallError ? error : {};
    if (reason === "limited") this.#limited(began);
    else if (!stalled && this.#breaker.fail(began, reason === "timeout")) {
      this.#logger.warn(`resumed: server unavailable (${FAILURES} failures in a row), resumption disabled: ${String(error)}`);
      this.#prober.start();
    }
  }

  /** Records a call that the server refused because of a limit: the server is well. */
  #limited(began: number): void {
    if (this.#breaker.limit(began)) this.#recovered();
  }

  #recovered(): void {
    this.#logger.info("resumed: server available again");
  }

  #key(id: Buffer): Buffer {
    return storeKey(FORMAT, this.#store.namespace, id);
  }

  /** Resolves to a session, or to the reason of the miss. */
  async #find(id: Buffer, serverName: string, context: Context, cipher: number | undefined): Promise<Offer | string> {
    const now = this.#clock();
    const end = performance.now() + this.policy.deadlineMs;
    if (id.length < 1 || id.length > ID_BYTES) return "foreign-id";
    const issued = this.#keyring.openId(this.#store.namespace, id);
    if (issued !== undefined && now - issued > this.policy.lifetimeSeconds) return "expired-id";
    const key = this.#key(id);
    if (this.#sender.isRemoved(key)) return "unknown";
    if (this.#breaker.open) return "breaker-open";
    if (this.#breaker.limited || !this.#breaker.serves(key)) return "limited";
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
    if (this.#sender.isRemoved(key)) return "unknown"; // since the lookup began
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
    if (end - began < Math.min(MIN_CALL_MS, this.policy.deadlineMs)) return { outcome: "timeout" };
    if (this.#lookups >= this.policy.maxLookups) return { outcome: "too-many-lookups" };
    this.#lookups++;
    const left = (): number => began + (end - began) * DEADLINE_SHARE - performance.now();
    const call = (): Promise<Buffer | undefined> => this.#store[method](key, left());
    try {
      let value = await call();
      let outcome = "store";
      for (const pause of fresh ? RETRY_PAUSES_MS : []) {
        const patience = left() - MIN_CALL_MS;
        if (value || patience <= 0) break;
        await sleep(Math.min(pause, patience));
        answered = true;
        value = await call();
        outcome = "retried";
      }
      if (this.#breaker.succeed()) this.#recovered();
      return value ? { value, outcome } : { outcome: "unknown" };
    } catch (error) {
      const reason = error instanceof CallError ? error.reason : "rejected";
      if (reason !== "timeout" || !answered) this.#failed(error, began);
      return { outcome: reason };
    } finally {
      this.#lookups--;
      this.#recorder.observe(performance.now() - began);
    }
  }
}

/** Whether a session is verified, and has a client certificate exactly if sessions of this context have one. */
function isOf(session: Session, { certificates }: Context): boolean {
  return session.verified && (session.peer !== undefined) === certificates;
}
