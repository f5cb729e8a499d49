/** The agreement on ticket secrets, against a store in memory. */
import assert from "node:assert/strict";
import { utimesSync, writeFileSync } from "node:fs";
import { test } from "node:test";

import { AGREEMENT_RETRY_MS, TicketSecrets } from "../src/agreement.js";
import type { Logger } from "../src/files.js";
import { Keyring } from "../src/keyring.js";
import { FleetKey } from "../src/sealing.js";
import type { Store } from "../src/store.js";
import { addressOf, epochAt } from "../src/ticket-secret.js";
import type { BatchOperation, BatchResult } from "../src/v1/resumed/v1/session_store.js";
import { fleetKey, keyringFile, notCalled, quiet } from "./support.js";

const [ROTATION, LIFETIME, BEGIN] = [100, 200, 1_000_000];

/** A store whose keys are write-once. */
class MemoryStore implements Store {
  readonly namespace = "shop";
  readonly values = new Map<string, Buffer | "removed">();
  calls = 0;
  pinned = true;
  down = false;
  /** Calls that it answers before it is down. */
  left = Infinity;

  get(): Promise<undefined> {
    return Promise.reject(new Error("not called"));
  }

  take(): Promise<undefined> {
    return Promise.reject(new Error("not called"));
  }

  batch(operations: BatchOperation[]): Promise<BatchResult[]> {
    this.calls++;
    if (this.down || --this.left < 0) return Promise.reject(new Error("down"));
    return Promise.resolve(operations.map((each) => this.#carryOut(each)));
  }

  readonly watchRemovals = notCalled;

  close(): void {
    // nothing to close
  }

  #carryOut({ operation }: BatchOperation): BatchResult {
    if (operation?.$case === "get") {
      const value = this.values.get(operation.get.key.toString("hex"));
      const session = Buffer.isBuffer(value) ? { value, ttl: undefined, issueTime: undefined } : undefined;
      return { result: { $case: "get", get: { session } } };
    }
    if (operation?.$case !== "put") throw new Error("not called");
    const { key, value, pinned } = operation.put;
    this.pinned &&= pinned;
    const present = this.values.get(key.toString("hex"));
    if (present === "removed" || (present && !present.equals(value))) {
      return { result: { $case: "error", error: { code: 6, message: "exists", details: [] } } };
    }
    this.values.set(key.toString("hex"), value);
    return { result: { $case: "put", put: { ttl: undefined } } };
  }
}

const clock = { now: BEGIN };
const ring = Keyring.fromKeys(fleetKey);

function member(store: Store, random = 0.5, keyring = ring, logger: Logger = quiet): TicketSecrets {
  clock.now = BEGIN;
  return new TicketSecrets(
    store,
    keyring,
    ROTATION,
    LIFETIME,
    logger,
    () => clock.now,
    () => random,
  );
}

function keyOf(secrets: TicketSecrets, heldOver = false): string | undefined {
  const current = secrets.current(clock.now);
  if (current) assert.equal(current.heldOver, heldOver);
  return current?.secret.raw48.toString("hex");
}

function address(start: number, generation = 0): string {
  return addressOf("shop", new FleetKey(fleetKey), { start, rotation: ROTATION, generation }).toString("hex");
}

test("all frontends have the secret of the first, in at most three calls", async () => {
  const store = new MemoryStore();
  const fleet = Array.from({ length: 8 }, () => member(store));
  await Promise.all(fleet.map((each) => each.step()));
  assert.equal(new Set(fleet.map((each) => keyOf(each))).size, 1);
  assert(fleet.every((each) => keyOf(each)));
  assert.equal(store.values.size, 2, "the present and the next epoch");
  assert(store.pinned, "a full store must not evict them");
  assert(store.calls <= 3 * fleet.length, String(store.calls));
});

test("the next epoch's secret is agreed on at a random moment of the first sixth of an epoch", async () => {
  const store = new MemoryStore();
  const secrets = member(store, 0.5);
  await secrets.step();
  clock.now = BEGIN + ROTATION;
  await secrets.step();
  assert.equal(store.values.size, 2, "the one after the next is not due");
  clock.now += ROTATION / 12 - 1;
  await secrets.step();
  assert.equal(store.values.size, 2, "nor is it before its moment");
  clock.now += 1;
  await secrets.step();
  assert.equal(store.values.size, 3);
});

test("the key changes with the epoch, without a call", async () => {
  const store = new MemoryStore();
  const secrets = member(store);
  await secrets.step();
  const [before, calls] = [keyOf(secrets), store.calls];
  clock.now = BEGIN + ROTATION;
  assert.notEqual(keyOf(secrets), before);
  assert.equal(store.calls, calls);
});

test("while the store is down the last key is held over, up to its end, and calls are repeated ever less often", async () => {
  const store = new MemoryStore();
  const secrets = member(store);
  await secrets.step();
  clock.now = BEGIN + ROTATION;
  const last = keyOf(secrets);
  store.down = true;
  clock.now = BEGIN + 2 * ROTATION;
  const pauses: number[] = [];
  for (let n = 0; n < 9; n++) pauses.push(await secrets.step());
  assert.deepEqual(pauses.slice(0, 2), [0.75 * AGREEMENT_RETRY_MS.first, 1.5 * AGREEMENT_RETRY_MS.first]);
  assert.equal(pauses.at(-1), 0.75 * AGREEMENT_RETRY_MS.max);
  assert.equal(keyOf(secrets, true), last);
  clock.now = BEGIN + 3 * ROTATION + LIFETIME;
  await secrets.step();
  assert.equal(keyOf(secrets), undefined);
  store.down = false;
  await secrets.step();
  assert(keyOf(secrets));
});

test("without the key that seals it a secret is dropped", async (context) => {
  let now = 0;
  context.mock.method(performance, "now", () => now);
  const other = Buffer.alloc(32, 2);
  const path = keyringFile(fleetKey, other);
  const secrets = member(new MemoryStore(), 0.5, Keyring.load(path, quiet));
  await secrets.step();
  const before = keyOf(secrets);
  writeFileSync(path, `${other.toString("base64")}\n`);
  utimesSync(path, 0, Date.now() / 1000 - 60);
  now += 1000;
  await secrets.step();
  assert.notEqual(keyOf(secrets), before);
  assert(keyOf(secrets));
});

test("a purge ends the secrets that were created before", async () => {
  const store = new MemoryStore();
  const secrets = member(store);
  await secrets.step();
  const before = keyOf(secrets);
  secrets.forget(BEGIN);
  assert.equal(keyOf(secrets), before);
  for (const time of [BEGIN + 1, undefined]) {
    store.values.clear();
    const last = keyOf(secrets);
    secrets.forget(time);
    assert.equal(keyOf(secrets), undefined);
    await secrets.step();
    assert(keyOf(secrets) && keyOf(secrets) !== last);
  }
});

test("a value that does not open is passed over, and the next generation replaces it", async () => {
  const store = new MemoryStore();
  store.values.set(address(epochAt(BEGIN, ROTATION).start), Buffer.alloc(80, 2));
  const [one, other] = [member(store), member(store)];
  await one.step();
  await other.step();
  assert(keyOf(one));
  assert.equal(keyOf(one), keyOf(other));
  assert(store.values.has(address(BEGIN, 1)));
});

test("a removed secret ends at the next comparison, and the next generation replaces it", async () => {
  const store = new MemoryStore();
  const secrets = member(store);
  await secrets.step();
  const before = keyOf(secrets);
  store.values.set(address(BEGIN), "removed");
  clock.now = BEGIN + 0.8 * ROTATION;
  await secrets.step();
  assert(keyOf(secrets));
  assert.notEqual(keyOf(secrets), before);
});

test("a removed secret is not used while the store does not answer, either", async () => {
  const store = new MemoryStore();
  const secrets = member(store);
  await secrets.step();
  store.values.set(address(BEGIN), "removed");
  store.left = 2; // the comparison
  clock.now = BEGIN + 0.8 * ROTATION;
  await secrets.step();
  assert.equal(keyOf(secrets), undefined);
});

test("after a failover the store's secret is used", async () => {
  const store = new MemoryStore();
  const [one, other] = [member(store), member(store)];
  await one.step();
  store.values.clear();
  await other.step();
  assert.notEqual(keyOf(one), keyOf(other));
  clock.now = BEGIN + 0.8 * ROTATION;
  await one.step();
  assert.equal(keyOf(one), keyOf(other));
});

test("a secret that the store has lost is put again", async () => {
  const store = new MemoryStore();
  const secrets = member(store);
  await secrets.step();
  const before = keyOf(secrets);
  store.values.clear();
  clock.now = BEGIN + 0.8 * ROTATION;
  await secrets.step();
  assert.equal(keyOf(secrets), before);
  assert(store.values.has(address(BEGIN)));
});

test("a store that answers with nothing usable is an outage, not a defect", async () => {
  const store = new MemoryStore();
  store.batch = () => Promise.resolve([]);
  const secrets = member(store);
  assert((await secrets.step()) > 0);
  assert.equal(keyOf(secrets), undefined);
});

test("a fleet key that replaces the first one seals the next secret elsewhere", async () => {
  const store = new MemoryStore();
  const other = member(store, 0.5, Keyring.fromKeys(Buffer.alloc(32, 2)));
  const one = member(store);
  await one.step();
  await other.step();
  assert.notEqual(keyOf(one), keyOf(other));
  assert.equal(store.values.size, 4);
});

test("no line of the log has a key", async () => {
  const lines: string[] = [];
  const write = (line: string): number => lines.push(line);
  const logger = { info: write, warn: write, error: write };
  const store = new MemoryStore();
  store.values.set(address(BEGIN), Buffer.alloc(80, 2));
  const secrets = member(store, 0.5, ring, logger);
  await secrets.step();
  assert(lines.length > 0);
  const key = Buffer.from(keyOf(secrets) ?? "", "hex").subarray(16);
  for (const line of lines) for (const form of ["hex", "base64", "latin1"] as const) assert(!line.includes(key.toString(form)));
});
