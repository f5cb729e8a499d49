/** The policy, with a store whose answers the tests choose. */
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { test } from "node:test";

import { element } from "../src/der.js";
import { wrap } from "../src/envelope.js";
import { Keyring } from "../src/index.js";
import { FleetKey, NONCE_BYTES } from "../src/sealing.js";
import { Session } from "../src/session.js";
import { Shim, type Policy } from "../src/shim.js";
import { CallError, GrpcStore, type Store } from "../src/store.js";
import type { BatchResult } from "../src/v1/resumed/v1/session_store.js";
import { status } from "@grpc/grpc-js";
import { fleetKey, notCalled, PATIENCE, quiet, sharedStore, skip } from "./support.js";

const CONTEXT = { fingerprint: Buffer.alloc(32), idContext: Buffer.alloc(0), certificates: false };
const ID = Buffer.alloc(32, 5);
/** Returns a session with that id. */
function sessionOf(id: Buffer): Session {
  const fields: [number, string][] = [
    [0x02, "01"],
    [0x02, "0304"],
    [0x04, "1301"],
    [0x04, id.toString("hex")],
    [0x04, ""],
    [0xa2, "0202" + "0e10"], // the timeout: an hour
  ];
  const content = Buffer.concat(fields.map(([tag, hex]) => element(tag, Buffer.from(hex, "hex"))));
  return Session.parse(element(0x30, content)) ?? assert.fail();
}

/** Returns the sealed value of a session with the id ID. */
function sealed(key: Buffer): Buffer {
  const envelope = wrap({ fingerprint: CONTEXT.fingerprint, issued: now(), session: sessionOf(ID).serialize() });
  return Keyring.fromKeys(fleetKey).seal(key, envelope, Math.floor(now()) + 3600);
}

const now = (): number => Date.now() / 1000;

function shimOf(store: Store, policy: Partial<Policy> = {}): Shim {
  // The machine may be busy; tests of the deadline set theirs.
  const given = {
    lifetimeSeconds: 7200,
    deadlineMs: 30_000,
    singleUse: false,
    puts: "background" as const,
    maxLookups: 64,
    ...policy,
  };
  return new Shim(store, Keyring.fromKeys(fleetKey), given, quiet, now);
}

function fakeStore(answers: Partial<Store>): Store {
  return {
    namespace: "shop",
    get: () => Promise.resolve(undefined),
    take: () => Promise.resolve(undefined),
    batch: (operations) => Promise.resolve(operations.map(() => ({ result: { $case: "remove", remove: {} } }) as never)),
    watchRemovals: notCalled,
    close: () => undefined,
    ...answers,
  };
}

function issuedAt(time: number): Buffer {
  return new FleetKey(fleetKey).issueId("shop", Math.floor(time), randomBytes(NONCE_BYTES));
}

const late = (): CallError => new CallError({ code: status.DEADLINE_EXCEEDED, details: "of the test" });

test("an event loop that stands still is no failure of the store", { skip }, async () => {
  const store = new GrpcStore((await sharedStore()).target, "still");
  await store.get(randomBytes(32), PATIENCE); // connects
  const shim = shimOf(store, { deadlineMs: 50 });
  const lookUp = (): Promise<unknown> => shim.lookUp(randomBytes(32), "", CONTEXT);
  for (let n = 0; n < 5; n++) {
    const three = [lookUp(), lookUp(), lookUp()];
    for (const end = performance.now() + 80; performance.now() < end;); // a collection, a long computation
    await Promise.all(three);
    assert(!shim.breakerOpen, JSON.stringify(shim.stats.misses));
  }
  await shim.close(1000);
});

test("a further ask that is late had little time: it is no failure of the store", async () => {
  let asked = 0;
  const shim = shimOf(fakeStore({ get: () => (asked++ % 2 ? Promise.reject(late()) : Promise.resolve(undefined)) }));
  for (let n = 0; n < 10; n++) await shim.lookUp(issuedAt(now()), "", CONTEXT);
  assert.deepEqual([shim.stats.misses, shim.breakerOpen, asked], [{ timeout: 10 }, false, 20]);
});

test("Get and Take share one deadline: with too little left a single use is not spent, and nothing has failed", async (context) => {
  let [tick, taken, took] = [1000, 0, 42];
  context.mock.method(performance, "now", () => tick);
  const get = (key: Buffer): Promise<Buffer> => {
    tick += took;
    return Promise.resolve(sealed(key));
  };
  const take = (key: Buffer): Promise<Buffer> => {
    taken++;
    return Promise.resolve(sealed(key));
  };
  const shim = shimOf(fakeStore({ get, take }), { deadlineMs: 50, singleUse: true });
  for (let n = 0; n < 5; n++) assert.equal(await shim.lookUp(ID, "", CONTEXT), undefined);
  assert.deepEqual([shim.stats.misses, taken, shim.breakerOpen], [{ timeout: 5 }, 0, false]);
  took = 20;
  assert.equal((await shim.lookUp(ID, "", CONTEXT))?.outcome, "store");
  assert.equal(taken, 1);
});

test("a removed session does not resume here, nor does a later lookup join one from before", async () => {
  const id = issuedAt(now() - 60);
  let asked = 0;
  let answer: (value: Buffer) => void = () => undefined;
  let acknowledge: () => void = () => undefined;
  const shim = shimOf(
    fakeStore({
      get: () => {
        asked++;
        return new Promise((resolve) => (answer = resolve));
      },
      batch: (operations) =>
        new Promise((resolve) => {
          acknowledge = () => {
            resolve(operations.map(() => ({ result: { $case: "remove", remove: {} } }) as never));
          };
        }),
    }),
  );
  const before = shim.lookUp(id, "", CONTEXT);
  const send = answer;
  shim.remove(id, "application");
  await shim.lookUp(id, "", CONTEXT);
  assert.deepEqual([shim.stats.misses, asked], [{ unknown: 1 }, 1]);
  const flushed = shim.flush(30_000);
  await new Promise(setImmediate);
  acknowledge();
  await flushed;
  await shim.lookUp(id, "", CONTEXT);
  assert.deepEqual([shim.stats.misses, asked], [{ unknown: 2 }, 1]);
  send(Buffer.alloc(1));
  await before;
  await shim.close(1000);
});

test("a session that is removed during its lookup does not resume", async () => {
  let answer: () => void = () => undefined;
  const get = (key: Buffer): Promise<Buffer> =>
    new Promise(
      (resolve) =>
        (answer = () => {
          resolve(sealed(key));
        }),
    );
  const shim = shimOf(fakeStore({ get }));
  const offers = [];
  for (const removes of [false, true]) {
    const lookup = shim.lookUp(ID, "", CONTEXT);
    await new Promise(setImmediate);
    if (removes) shim.remove(ID, "application");
    answer();
    offers.push(await lookup);
  }
  assert.deepEqual([offers[0]?.outcome, offers[1], shim.stats.misses], ["store", undefined, { unknown: 1 }]);
  await shim.close(1000);
});

test("a namespace at its limit of sessions loses new ones, and nothing else", async () => {
  const refused: BatchResult = {
    result: { $case: "error", error: { code: status.RESOURCE_EXHAUSTED, message: "", details: [] } },
  };
  const get = (key: Buffer): Promise<Buffer> => Promise.resolve(sealed(key));
  const shim = shimOf(fakeStore({ get, batch: (operations) => Promise.resolve(operations.map(() => refused)) }));
  for (let n = 0; n < 10; n++) {
    shim.remove(randomBytes(32), "application"); // refused as a Put would be
    await shim.flush(30_000);
    assert.equal((await shim.lookUp(ID, "", CONTEXT))?.outcome, "store");
  }
  assert.deepEqual([shim.stats.removals, shim.stats.misses, shim.breakerOpen], [{ refused: 10 }, {}, false]);
  await shim.close(1000);
});

test("flush() reports a removal that failed until it is repeated", async () => {
  const outcomes: BatchResult["result"][] = [
    { $case: "error", error: { code: status.PERMISSION_DENIED, message: "", details: [] } },
    { $case: "remove", remove: { removed: true } },
  ];
  const shim = shimOf(fakeStore({ batch: () => Promise.resolve([{ result: outcomes.shift() }]) }));
  for (const removed of [false, true]) {
    shim.remove(ID, "application");
    assert.equal(await shim.flush(30_000), removed);
  }
  assert.deepEqual(shim.stats.removals, { refused: 1, application: 1 });
  await shim.close(1000);
});

test("with a clock that is behind, ids of others are not asked for again and again", async () => {
  let asked = 0;
  const shim = shimOf(
    fakeStore({
      get: () => {
        asked++;
        return Promise.resolve(undefined);
      },
    }),
  );
  for (const seconds of [300, -300]) await shim.lookUp(issuedAt(now() + seconds), "", CONTEXT);
  assert.equal(asked, 2);
});

test("Batches that a slow store carries out do not hide that its look-ups are late", async (context) => {
  let tick = 1000;
  context.mock.method(performance, "now", () => tick);
  const shim = shimOf(
    fakeStore({
      get: () => {
        tick += 46;
        return Promise.reject(late());
      },
      batch: (operations) => {
        tick += 100;
        return Promise.resolve(operations.map(() => ({ result: { $case: "remove", remove: {} } }) as never));
      },
    }),
    { deadlineMs: 50 },
  );
  for (let n = 0; n < 3; n++) {
    shim.remove(randomBytes(32), "application");
    assert(await shim.flush(30_000));
    await shim.lookUp(randomBytes(32), "", CONTEXT);
  }
  assert.deepEqual([shim.stats.misses, shim.breakerOpen], [{ timeout: 3 }, true]);
  await shim.close(1000);
});

test("beyond a limit a share of the sessions is stored and looked up, the same in all frontends", async (context) => {
  let tick = 1000;
  context.mock.method(performance, "now", () => tick);
  let limited = true;
  const [asked, stored]: [Set<string>, Set<string>] = [new Set(), new Set()];
  const store = fakeStore({
    get: (key) => {
      asked.add(key.toString("hex"));
      return limited
        ? Promise.reject(new CallError({ code: status.RESOURCE_EXHAUSTED, details: "" }))
        : Promise.resolve(undefined);
    },
    batch: (operations) => {
      for (const { operation } of operations) if (operation?.$case === "put") stored.add(operation.put.key.toString("hex"));
      return Promise.resolve(operations.map(() => ({ result: { $case: "put", put: {} } }) as never));
    },
  });
  const shims = [shimOf(store), shimOf(store)];
  const ids = Array.from({ length: 200 }, (_, n) => createHash("sha256").update(String(n)).digest());
  for (const shim of shims) {
    for (const id of ids.slice(0, 20)) {
      await shim.lookUp(id, "", CONTEXT);
      tick += 1000; // longer than a pause
    }
  }
  limited = false;
  const served: number[] = [];
  for (const shim of shims) {
    for (const calls of [asked, stored]) calls.clear();
    for (const id of ids) await shim.lookUp(id, "", CONTEXT);
    served.push(asked.size);
    for (const id of ids) await shim.negotiated(sessionOf(id), CONTEXT, now());
    assert(await shim.flush(30_000));
    assert(stored.size === asked.size && [...asked].every((key) => stored.has(key)));
    assert.deepEqual(shim.stats.puts, { stored: asked.size, dropped: ids.length - asked.size });
  }
  assert(
    served.every((count) => count > 10 && count < 150),
    String(served),
  );
  tick += 200_000;
  for (const shim of shims) {
    asked.clear();
    for (const id of ids) await shim.lookUp(id, "", CONTEXT);
    assert.deepEqual([asked.size, shim.breakerOpen], [ids.length, false]);
    await shim.close(1000);
  }
});
