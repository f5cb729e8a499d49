/**
 * Agreement on ticket secrets: the frontends of a fleet make one for each epoch, through the store. Keys of the store are write-once,
 * so of several proposals one wins, and every frontend has that one. A frontend holds the secrets of the present epoch and of
 * the next one. Those of earlier epochs it only holds over while the store does not answer: Node has one ticket key at a time.
 */
import { randomBytes } from "node:crypto";

import type { Logger, Reload } from "./files.js";
import type { Keyring } from "./keyring.js";
import type { FleetKey } from "./sealing.js";
import { duration, type Store } from "./store.js";
import { addressOf, epochAt, MAX_GENERATION, notAfterOf, SECRET_BYTES, TicketSecret, type Epoch } from "./ticket-secret.js";
import type { BatchOperation, BatchResult } from "./v1/resumed/v1/session_store.js";

export const DEFAULT_ROTATION_SECONDS = 3600;
/** Generations of a secret that are tried in a row. */
export const MAX_GENERATIONS = 8;
/** The present secret is compared with the store's after this time, or after a rotation if that is shorter. */
export const MAX_RECHECK_SECONDS = 3600;
export const AGREEMENT_DEADLINE_MS = 1000;
/** The next epoch's secret is agreed on in the first of so many parts of an epoch, so that clocks may differ by the others. */
export const NEXT_SECRET_PARTS = 6;
/** Pauses after calls that failed: doubled each time in a row. */
export const AGREEMENT_RETRY_MS = { first: 50, max: 5000 };

/** The longest time between two steps: the keyring may have lost a key. */
const LOOK_MS = 1000;
const ALREADY_EXISTS = 6; // google.rpc.Code

/** What determines the address of a secret in the store. */
interface Address {
  fleetKey: FleetKey;
  epoch: Epoch;
}

/** The secrets of a frontend. step() is never called twice at once. */
export class TicketSecrets {
  readonly #store: Store;
  readonly #keyring: Keyring;
  readonly #rotation: number;
  readonly #lifetime: number;
  readonly #logger: Logger;
  readonly #clock: () => number;
  readonly #random: () => number;
  /** By the start of the epoch. */
  readonly #agreed = new Map<number, TicketSecret>();
  /** To be tried next, by the start of the epoch. */
  readonly #generations = new Map<number, number>();
  #begun = false;
  /** When to agree on the epoch with this start. */
  #nextDue = { start: -1, at: 0 };
  #recheckAt = 0;
  #retryMs = 0;

  /**
   * @param rotation The length of an epoch in seconds.
   * @param lifetime The longest life of a ticket in seconds.
   * @param clock Unix seconds.
   * @param random Returns a number from 0 to 1, which spreads the calls of a fleet.
   */
  constructor(
    store: Store,
    keyring: Keyring,
    rotation: number,
    lifetime: number,
    logger: Logger,
    clock: () => number,
    random: () => number = Math.random,
  ) {
    this.#store = store;
    this.#keyring = keyring;
    this.#rotation = rotation;
    this.#lifetime = lifetime;
    this.#logger = logger;
    this.#clock = clock;
    this.#random = random;
  }

  get keyringReload(): Reload | undefined {
    return this.#keyring.lastReload;
  }

  /** Returns the secret to encrypt with, and whether it is of an ended epoch; undefined if there is none. */
  current(now: number): { secret: TicketSecret; heldOver: boolean } | undefined {
    const { start } = epochAt(now, this.#rotation);
    const begun = [...this.#agreed.values()].filter(({ epoch, notAfter }) => epoch.start <= start && now < notAfter);
    const [secret] = begun.sort((one, other) => other.epoch.start - one.epoch.start);
    return secret && { secret, heldOver: secret.epoch.start < start };
  }

  /** Ends the secrets that were created before a time in Unix seconds, or all: their sessions were purged. The next step agrees on others. */
  forget(before = Infinity): void {
    for (const secret of this.#agreed.values()) if (secret.created < before) this.#drop(secret);
  }

  /** Makes the calls that are due, and resolves to the milliseconds until the next step. Never rejects. */
  async step(): Promise<number> {
    const now = this.#clock();
    this.#erase(now);
    try {
      await this.#doDue(now);
    } catch (error) {
      if (!this.#retryMs) {
        this.#logger.warn(`resumed: namespace ${this.#store.namespace}: no agreement on ticket keys: ${String(error)}`);
      }
      const { first, max } = AGREEMENT_RETRY_MS;
      this.#retryMs = Math.min(Math.max(2 * this.#retryMs, first), max);
      return this.#retryMs * (0.5 + this.#random() / 2);
    }
    if (this.#retryMs) this.#logger.info(`resumed: namespace ${this.#store.namespace}: the ticket keys are agreed on again`);
    this.#retryMs = 0;
    return Math.max(0, Math.min((this.#nextTime() - this.#clock()) * 1000, LOOK_MS));
  }

  async #doDue(now: number): Promise<void> {
    const present = epochAt(now, this.#rotation);
    const following = { ...present, start: present.start + this.#rotation };
    if (this.#nextDue.start !== following.start) {
      this.#nextDue = { start: following.start, at: present.start + (this.#random() * this.#rotation) / NEXT_SECRET_PARTS };
    }
    const wanted = this.#agreed.has(present.start) ? [] : [present];
    if (!this.#agreed.has(following.start) && (!this.#begun || now >= this.#nextDue.at)) wanted.push(following);
    const own = this.#agreed.get(present.start);
    if (wanted.length > 0) await this.#agree(wanted);
    else if (own && now >= this.#recheckAt) await this.#recheck(own);
    else return;
    this.#begun = true;
    if (own && wanted.length > 0) return; // the next secret is agreed on, and the present one was not compared
    this.#recheckAt = now + Math.min(this.#rotation, MAX_RECHECK_SECONDS) * (0.5 + this.#random() / 2);
  }

  #nextTime(): number {
    const present = epochAt(this.#clock(), this.#rotation);
    const due = [present.start + this.#rotation, this.#recheckAt];
    if (!this.#agreed.has(present.start + this.#rotation)) due.push(this.#nextDue.at);
    return Math.min(...due);
  }

  /** Agrees on the secrets of epochs: at most three calls, as a rule. */
  async #agree(epochs: Epoch[]): Promise<void> {
    const [fleetKey] = this.#keyring.fleetKeys;
    if (!fleetKey) throw new Error("a keyring has at least one key");
    let open = epochs;
    for (let tries = 0; tries < MAX_GENERATIONS; tries++) {
      const wanted = open.map((epoch) => ({
        fleetKey,
        epoch: { ...epoch, generation: this.#generations.get(epoch.start) ?? 0 },
      }));
      const found = await this.#fetch(wanted);
      await this.#propose(missing(wanted, found), found);
      for (const secret of found.values()) this.#adopt(secret);
      open = missing(wanted, found).map(({ epoch }) => epoch);
      if (open.length === 0) return;
      for (const epoch of open) this.#skipGeneration(epoch);
    }
    throw new Error(`${MAX_GENERATIONS} values in a row cannot be opened, or were removed`);
  }

  /** Proposes secrets; where another frontend was first, gets its secret. */
  async #propose(addresses: Address[], found: Map<number, TicketSecret>): Promise<void> {
    const now = this.#clock();
    const { namespace } = this.#store;
    const proposals = addresses.map(
      ({ fleetKey, epoch }) =>
        new TicketSecret(namespace, fleetKey, epoch, randomBytes(SECRET_BYTES), now, notAfterOf(epoch, this.#lifetime)),
    );
    const accepted = await this.#put(proposals);
    for (const secret of accepted) found.set(secret.epoch.start, secret);
    for (const [start, secret] of await this.#fetch(missing(addresses, found))) found.set(start, secret);
  }

  /** Goes on with the next generation: a value cannot be opened, or was removed. */
  #skipGeneration({ start, generation }: Epoch): void {
    if (generation === MAX_GENERATION) throw new Error("no generation of the ticket secret is left in this epoch");
    this.#generations.set(start, generation + 1);
    const { namespace } = this.#store;
    this.#logger.warn(
      `resumed: namespace ${namespace}: generation ${generation} of a ticket secret cannot be opened or was removed, the next one replaces it`,
    );
  }

  /** Compares a secret with the store's: a failover may have lost it, and an operator may have removed it. */
  async #recheck(own: TicketSecret): Promise<void> {
    const secret = (await this.#fetch([own])).get(own.epoch.start);
    if (secret) this.#adopt(secret);
    else if ((await this.#put([own])).length === 0) {
      this.#drop(own);
      await this.#agree([{ ...own.epoch, generation: 0 }]);
    }
  }

  /** Puts secrets, and returns those that the store accepted. */
  async #put(secrets: TicketSecret[]): Promise<TicketSecret[]> {
    const { namespace } = this.#store;
    const now = this.#clock();
    const operations = secrets.map((secret): BatchOperation => {
      const key = secret.address;
      const value = secret.fleetKey.seal(key, secret.encode(), secret.notAfter, randomBytes(12));
      const [ttl, issueTime] = [duration(secret.notAfter - now), duration(secret.created)];
      return { operation: { $case: "put", put: { namespace, key, value, ttl, issueTime, pinned: true } } };
    });
    const results = await this.#call(operations);
    return secrets.filter((_, index) => {
      const result = results[index]?.result;
      if (result?.$case === "put") return true;
      if (result?.$case === "error" && result.error.code === ALREADY_EXISTS) return false;
      throw failureOf(result);
    });
  }

  /** Gets the secrets at addresses, and returns those that can be opened, by the start of their epoch. */
  async #fetch(addresses: Address[]): Promise<Map<number, TicketSecret>> {
    const { namespace } = this.#store;
    const keys = addresses.map(({ fleetKey, epoch }) => addressOf(namespace, fleetKey, epoch));
    const results = await this.#call(keys.map((key) => ({ operation: { $case: "get", get: { namespace, key } } })));
    const found = new Map<number, TicketSecret>();
    for (const [index, { fleetKey, epoch }] of addresses.entries()) {
      const result = results[index]?.result;
      const key = keys[index];
      if (result?.$case !== "get" || !key) throw failureOf(result);
      const { session } = result.get;
      const secret = session && this.#open(fleetKey, epoch, key, session.value);
      if (secret) found.set(epoch.start, secret);
    }
    return found;
  }

  #open(fleetKey: FleetKey, epoch: Epoch, key: Buffer, value: Buffer): TicketSecret | undefined {
    const { namespace } = this.#store;
    const opened = this.#keyring.open(key, value, this.#clock());
    const secret =
      typeof opened === "object" && TicketSecret.decode(namespace, fleetKey, epoch, opened.plaintext, opened.notAfter);
    if (secret) return secret;
    const reason = typeof opened === "string" ? opened : "malformed";
    this.#logger.warn(`resumed: namespace ${namespace}: a ticket secret in the store is ${reason}`);
    return undefined;
  }

  async #call(operations: BatchOperation[]): Promise<BatchResult[]> {
    return operations.length > 0 ? this.#store.batch(operations, AGREEMENT_DEADLINE_MS) : [];
  }

  #adopt(secret: TicketSecret): void {
    const before = this.#agreed.get(secret.epoch.start);
    if (before?.name.equals(secret.name)) return;
    before?.erase();
    this.#agreed.set(secret.epoch.start, secret);
  }

  #erase(now: number): void {
    const keys = this.#keyring.fleetKeys;
    for (const secret of this.#agreed.values()) {
      // A key that the keyring has no more may be stolen.
      const known = keys.some(({ id }) => id.equals(secret.fleetKey.id));
      if (now >= secret.notAfter || !known) this.#drop(secret);
    }
    // One of an earlier epoch is only of use while no later one is there.
    const current = this.current(now)?.secret;
    for (const secret of this.#agreed.values()) {
      if (current && secret.epoch.start < current.epoch.start) this.#drop(secret);
    }
    const { start } = epochAt(now, this.#rotation);
    for (const each of this.#generations.keys()) if (each < start) this.#generations.delete(each);
  }

  #drop(secret: TicketSecret): void {
    this.#agreed.delete(secret.epoch.start);
    secret.erase();
  }
}

function missing(addresses: Address[], found: Map<number, TicketSecret>): Address[] {
  return addresses.filter(({ epoch }) => !found.has(epoch.start));
}

function failureOf(result: BatchResult["result"]): Error {
  return new Error(
    result?.$case === "error" ? `the store refuses: ${result.error.message}` : "the store's response is incomplete",
  );
}
