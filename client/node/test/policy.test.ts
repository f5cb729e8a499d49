/** protos/vectors/policy.json: the policy that the clients of all languages share. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test, type TestContext } from "node:test";

import * as agreement from "../src/agreement.js";
import { DEFAULTS, MAX_LIFETIME_SECONDS, NAMESPACE } from "../src/attach.js";
import * as breakers from "../src/breaker.js";
import * as sender from "../src/sender.js";
import * as shim from "../src/shim.js";
import { LOOKUP_BUCKETS, REASONS } from "../src/stats.js";
import { MAX_ROTATION_SECONDS } from "../src/ticket-secret.js";
import { REPOSITORY } from "./support.js";

interface Step {
  at_ms: number;
  event: "lookup" | "probe" | "batch" | "none";
  began_ms?: number;
  result?: "ok" | "timeout" | "unavailable" | "rejected" | "limited";
  lookups: "call" | "breaker-open" | "limited";
  next_probe_ms?: number;
}

interface SharedPolicy {
  constants: Record<string, unknown>;
  reasons: Record<string, string[]>;
  absent_reasons: { node: Record<string, string[]> };
  without_sealed_ids: { share_per_refusal: number; share_per_second: number };
  tickets: { constants: Record<string, unknown>; reasons: Record<string, string[]> };
  sequences: { name: string; steps: Step[] }[];
}

const policy = JSON.parse(readFileSync(join(REPOSITORY, "protos/vectors/policy.json"), "utf8")) as SharedPolicy;

/** Makes performance.now() return a time that the test sets; a mock would keep a record of each call. */
function clock(context: TestContext): { now: number } {
  const time = { now: 0 };
  Object.defineProperty(performance, "now", { configurable: true, value: () => time.now });
  context.after(() => Reflect.deleteProperty(performance, "now"));
  return time;
}

test("the constants are those of all clients", () => {
  const own = {
    namespace_pattern: NAMESPACE.source.slice(1, -1),
    default_lifetime_seconds: DEFAULTS.lifetimeSeconds,
    max_lifetime_seconds: MAX_LIFETIME_SECONDS,
    default_deadline_ms: DEFAULTS.deadlineMs,
    deadline_share: shim.DEADLINE_SHARE,
    default_max_lookups: DEFAULTS.maxLookups,
    fresh_seconds: shim.FRESH_SECONDS,
    retry_pauses_ms: shim.RETRY_PAUSES_MS,
    min_call_ms: shim.MIN_CALL_MS,
    breaker_failures: breakers.FAILURES,
    probe_pause_ms: breakers.PROBE_PAUSE_MS,
    probe_reset_ms: breakers.PROBE_RESET_MS,
    limit_pause_ms: breakers.LIMIT_PAUSE_MS,
    scarcity_ms: breakers.SCARCITY_MS,
    queue_bytes: sender.QUEUE_BYTES,
    queue_item_bytes: sender.ENTRY_BYTES,
    batch_operations: sender.BATCH_OPERATIONS,
    busy_batch_operations: sender.BUSY_OPERATIONS,
    busy_batch_pause_ms: sender.BUSY_PAUSE_MS,
    batch_deadline_ms: sender.BATCH_DEADLINE_MS,
    batch_retry_ms: sender.RETRY_MS,
    max_value_bytes: shim.MAX_VALUE_BYTES,
    lookup_buckets_ms: LOOKUP_BUCKETS,
  };
  for (const [name, value] of Object.entries(own)) assert.deepEqual(value, policy.constants[name], name);
  const share = { share_per_refusal: breakers.SHARE_PER_REFUSAL, share_per_second: breakers.SHARE_PER_SECOND };
  assert.deepEqual(share, policy.without_sealed_ids);
});

test("the constants of tickets are those of all clients", () => {
  const own = {
    default_rotation_seconds: agreement.DEFAULT_ROTATION_SECONDS,
    max_rotation_seconds: MAX_ROTATION_SECONDS,
    max_generations: agreement.MAX_GENERATIONS,
    max_recheck_seconds: agreement.MAX_RECHECK_SECONDS,
    next_secret_parts: agreement.NEXT_SECRET_PARTS,
    agreement_deadline_ms: agreement.AGREEMENT_DEADLINE_MS,
    agreement_retry_ms: agreement.AGREEMENT_RETRY_MS,
  };
  for (const [name, value] of Object.entries(own)) assert.deepEqual(value, policy.tickets.constants[name], name);
  for (const reason of REASONS.ticketsResumed) assert(policy.tickets.reasons.resumed?.includes(reason));
});

test("the reasons are those of all clients", () => {
  for (const [kind, all] of Object.entries({ ...policy.reasons, foreignHits: policy.reasons.hits ?? [] })) {
    const absent = policy.absent_reasons.node[kind === "foreignHits" ? "hits" : kind] ?? [];
    const expected = all.filter((reason) => !absent.includes(reason));
    assert.deepEqual(REASONS[kind as keyof typeof REASONS], expected, kind);
  }
});

for (const { name, steps } of policy.sequences) {
  test(name, (context) => {
    const time = clock(context);
    const breaker = new breakers.Breaker();
    for (const step of steps) {
      time.now = step.at_ms;
      apply(step, breaker);
      const lookups = breaker.open ? "breaker-open" : breaker.limited ? "limited" : "call";
      assert.equal(lookups, step.lookups, JSON.stringify(step));
      if (step.next_probe_ms) assert.equal(breaker.nextProbePause(), step.next_probe_ms, JSON.stringify(step));
    }
  });
}

function apply({ event, result, began_ms: began = 0 }: Step, breaker: breakers.Breaker): void {
  if (result === "limited") breaker.limit(began);
  else if (event === "lookup" && result !== "ok") breaker.fail(began, result === "timeout");
  else if (event === "lookup" || (event === "probe" && result === "ok")) breaker.succeed();
}

/** A limit of the server: as many operations as there are in a second may be spent at once. */
class Limit {
  #tokens: number;
  #filledAt = performance.now();

  constructor(readonly rate: number) {
    this.#tokens = rate;
  }

  spend(operations: number): boolean {
    const now = performance.now();
    this.#tokens = Math.min(this.rate, this.#tokens + (this.rate * (now - this.#filledAt)) / 1000);
    this.#filledAt = now;
    if (this.#tokens <= 0) return false;
    this.#tokens -= operations;
    return true;
  }
}

let digests = 0;
/** Returns 32 bytes that are as good as random, and the same in each run. */
function digest(name: string): Buffer {
  return createHash("sha256").update(`${name} ${digests++}`).digest();
}

interface Offered {
  key: Buffer;
  stored: boolean;
}

/** A frontend as far as it makes calls; the breaker is the real one. */
class Frontend {
  readonly breaker = new breakers.Breaker();
  #queue: Offered[] = [];
  #pausedUntil = 0;
  #retry = sender.RETRY_MS.first;

  constructor(readonly limit: Limit) {}

  /** Returns whether a client resumes, and its next session: with TLS 1.3 another session each time. */
  visit(offered: Offered | undefined, tls13: boolean): [boolean, Offered] {
    const calls = offered && !this.breaker.limited && this.breaker.serves(offered.key);
    const resumed = Boolean(calls && this.#lookUp() && offered.stored);
    if (offered && resumed && !tls13) return [true, offered];
    const next = { key: digest("session"), stored: false };
    if (this.breaker.serves(next.key)) this.#queue.push(next);
    return [resumed, next];
  }

  #lookUp(): boolean {
    if (!this.limit.spend(1)) {
      this.breaker.limit(performance.now());
      return false;
    }
    this.breaker.succeed();
    return true;
  }

  send(): void {
    const now = performance.now();
    if (this.#queue.length === 0 || now < this.#pausedUntil) return;
    const batch = this.#queue.slice(0, sender.BATCH_OPERATIONS);
    if (!this.limit.spend(batch.length)) {
      this.breaker.limit(now);
      this.#pausedUntil = now + this.#retry;
      this.#retry = Math.min(2 * this.#retry, sender.RETRY_MS.max);
      return;
    }
    this.#retry = sender.RETRY_MS.first;
    this.#queue.splice(0, batch.length);
    for (const each of batch) each.stored = true;
  }
}

const [CLIENTS, SECONDS, NEED] = [200, 60, 80];
for (const tls13 of [false, true]) {
  for (const frontends of [1, 4, 40]) {
    for (const operations of [32, 60, 72, 120]) {
      const version = tls13 ? "TLS 1.3" : "TLS 1.2";
      test(`${operations} of ${NEED} operations, ${frontends} frontends, ${version}: what resumes is in proportion`, (context) => {
        const time = clock(context);
        digests = 0;
        const limit = new Limit(operations);
        const fleet = Array.from({ length: frontends }, () => new Frontend(limit));
        const sessions: (Offered | undefined)[] = [];
        const visits = (NEED * SECONDS) / (tls13 ? 2 : 1); // with TLS 1.3 each takes a Get and a Put
        let resumed = 0;
        for (let visit = 0; visit < visits; visit++) {
          time.now += (SECONDS * 1000) / visits;
          const frontend = fleet[digest("visit").readUInt32BE() % frontends] ?? assert.fail();
          const [hit, next] = frontend.visit(sessions[visit % CLIENTS], tls13);
          sessions[visit % CLIENTS] = next;
          if (hit && visit >= visits / 2) resumed++;
          for (const each of fleet) each.send();
        }
        const share = resumed / (visits / 2);
        context.diagnostic(`${(100 * share).toFixed()} % resume`);
        assert(share > Math.min(1, operations / NEED) - 0.15, String(share));
        assert(!fleet.some((each) => each.breaker.open), "a refusal is no outage");
      });
    }
  }
}
