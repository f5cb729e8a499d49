/** The queue of Puts and Removes, with a store whose answers the test chooses. */
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { test, type TestContext } from "node:test";
import { setImmediate as turn } from "node:timers/promises";

import { BATCH_OPERATIONS, BUSY_OPERATIONS, BUSY_PAUSE_MS, Sender } from "../src/sender.js";
import { Recorder } from "../src/stats.js";
import type { Store } from "../src/store.js";
import type { BatchResult } from "../src/v1/resumed/v1/session_store.js";
import { notCalled } from "./support.js";

interface Rig {
  sender: Sender;
  /** How many operations each Batch has. */
  batches: number[];
  submit: (count: number, urgent?: boolean) => Promise<void>;
  /** Has the store answer the Batch that is under way. */
  answer: () => Promise<void>;
}

function rig(context: TestContext): Rig {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const batches: number[] = [];
  const answers: (() => void)[] = [];
  const done: BatchResult = { result: { $case: "remove", remove: { removed: true } } };
  const store: Store = {
    namespace: "shop",
    get: () => Promise.resolve(undefined),
    take: () => Promise.resolve(undefined),
    batch: (operations) =>
      new Promise((resolve) => {
        batches.push(operations.length);
        answers.push(() => {
          resolve(operations.map(() => done));
        });
      }),
    watchRemovals: notCalled,
    close: () => undefined,
  };
  const sender = new Sender({ store, limited: () => undefined, recorder: new Recorder(), clock: () => 0 });
  const settle = async (): Promise<void> => {
    for (let n = 0; n < 3; n++) await turn();
  };
  return {
    sender,
    batches,
    submit: (count, urgent = false) => {
      for (let n = 0; n < count; n++) void sender.submit({ key: randomBytes(32) }, urgent);
      return settle();
    },
    answer: () => {
      answers.shift()?.();
      return settle();
    },
  };
}

test("a write is sent at once, and those that come during the call together", async (context) => {
  const { batches, submit, answer } = rig(context);
  await submit(1);
  assert.deepEqual(batches, [1]);
  await submit(BUSY_OPERATIONS - 1);
  assert.deepEqual(batches, [1]);
  await answer();
  assert.deepEqual(batches, [1, BUSY_OPERATIONS - 1]);
  await answer();
  await submit(1);
  assert.deepEqual(batches, [1, BUSY_OPERATIONS - 1, 1]);
});

test("under load writes gather for a pause, until a Batch is full or a handshake waits", async (context) => {
  const { batches, submit, answer } = rig(context);
  for (const end of ["pause", "full", "urgent", "urgent during the call"]) {
    batches.length = 0;
    await submit(BUSY_OPERATIONS);
    if (end === "urgent during the call") await submit(1, true);
    await answer();
    if (end !== "urgent during the call") {
      await submit(1);
      assert.deepEqual(batches, [BUSY_OPERATIONS], end);
      if (end === "pause") context.mock.timers.tick(BUSY_PAUSE_MS);
      await submit({ pause: 0, full: BATCH_OPERATIONS - 1, urgent: 1 }[end] ?? 0, end === "urgent");
    }
    assert.deepEqual(batches.length, 2, end);
    await answer();
    context.mock.timers.tick(BUSY_PAUSE_MS);
    await submit(1); // after the pause there is no load any more
    assert.deepEqual(batches.length, 3, end);
    await answer();
  }
});
