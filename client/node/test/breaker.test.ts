import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";

import { Breaker } from "../src/breaker.js";

/** Lets a test set the time. */
function clock(context: TestContext): { now: number } {
  const time = { now: 1000 };
  context.mock.method(performance, "now", () => time.now);
  return time;
}

test("three failures in a row open a breaker, and after a trial one", () => {
  const breaker = new Breaker();
  const fails = (): boolean => breaker.failed(performance.now());
  assert(!fails() && !fails());
  breaker.succeeded();
  assert(!fails() && !fails() && breaker.closed);
  assert(fails() && !breaker.closed);
  assert(!fails(), "it opens once");
  assert(breaker.succeeded() && breaker.closed);
  assert(fails() && !breaker.closed);
});

test("of calls that fail together one counts", (context) => {
  const time = clock(context);
  const breaker = new Breaker();
  const failed = (began: number, end: number): boolean => {
    time.now = end;
    return breaker.failed(began);
  };
  for (let end = 1045; end < 1060; end++) assert(!failed(1000, end));
  assert(!failed(1046, 1091) && breaker.closed);
  assert(failed(1092, 1137) && !breaker.closed);
});

test("the first trial comes early, further ones less and less often, until the store was well for a while", (context) => {
  const time = clock(context);
  const breaker = new Breaker();
  const opens = (): void => {
    while (!breaker.failed(time.now)) time.now++;
  };
  opens();
  const pauses = (): number[] => Array.from({ length: 5 }, () => breaker.nextPause());
  assert.deepEqual(pauses(), [50, 100, 200, 400, 500]);
  breaker.succeeded();
  opens();
  assert.equal(breaker.nextPause(), 500); // it comes and goes
  breaker.succeeded();
  time.now += 10_001;
  opens();
  assert.equal(breaker.nextPause(), 50);
});

test("of calls under way together that a limit refuses, one makes the pause longer", (context) => {
  const time = clock(context);
  const breaker = new Breaker();
  time.now = 1010;
  for (let n = 0; n < 10; n++) assert.equal(breaker.limited(1000), 50);
  assert(breaker.resting && breaker.closed);
  time.now = 1030;
  assert.equal(breaker.limited(1005), 30);
  const pauses: number[] = [];
  for (let n = 0; n < 5; n++) {
    time.now += 1000;
    assert(!breaker.resting);
    pauses.push(breaker.limited(time.now));
  }
  assert.deepEqual(pauses, [100, 200, 400, 800, 800]);
  breaker.succeeded();
  assert(!breaker.resting);
  assert.equal(breaker.limited(time.now), 50);
});
