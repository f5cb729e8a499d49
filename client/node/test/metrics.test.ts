import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { test } from "node:test";

import { metrics, type Installation } from "../src/index.js";
import { Recorder } from "../src/stats.js";

test("Prometheus sees what servers of a namespace count together, all reasons from the beginning", () => {
  const counting = (
    namespace: string,
    handshakes: number,
    breakerOpen: boolean,
    states: Partial<Installation> = {},
  ): Installation => {
    const recorder = new Recorder();
    for (let n = 0; n < handshakes; n++) {
      recorder.count("hits", "store");
      recorder.count("foreignHits", "store");
      recorder.observe(3);
    }
    return { namespace, breakerOpen, stats: recorder.snapshot(), ...states } as Installation;
  };
  const states = (created: number, heldOver: boolean, time: number, successful: boolean): Partial<Installation> => {
    return { ticketSecret: { created, heldOver }, keyringReload: { time, successful } };
  };
  const text = metrics(
    counting("shop", 1, false, states(1000.5, true, 2000, true)),
    counting("bank", 0, true),
    counting("shop", 2, false, states(3000, false, 1000.5, false)),
  );
  const lines = new Set(text.split("\n"));
  for (const line of [
    'resumed_frontend_hits_total{session_namespace="shop",source="store"} 3',
    'resumed_frontend_foreign_hits_total{session_namespace="shop",source="store"} 3',
    'resumed_frontend_hits_total{session_namespace="bank",source="store"} 0',
    'resumed_frontend_misses_total{session_namespace="shop",reason="breaker-open"} 0',
    'resumed_frontend_puts_total{session_namespace="shop",outcome="stored"} 0',
    'resumed_frontend_removals_total{session_namespace="shop",reason="fatal-error"} 0',
    'resumed_frontend_terminations_total{session_namespace="shop",reason="context-mismatch"} 0',
    'resumed_frontend_lookup_duration_seconds_bucket{session_namespace="shop",le="0.0025"} 0',
    'resumed_frontend_lookup_duration_seconds_bucket{session_namespace="shop",le="0.005"} 3',
    'resumed_frontend_lookup_duration_seconds_bucket{session_namespace="shop",le="+Inf"} 3',
    'resumed_frontend_lookup_duration_seconds_count{session_namespace="shop"} 3',
    'resumed_frontend_lookup_duration_seconds_sum{session_namespace="shop"} 0.009',
    'resumed_frontend_breaker_open{session_namespace="shop"} 0',
    'resumed_frontend_breaker_open{session_namespace="bank"} 1',
    'resumed_frontend_keyring_last_reload_successful{session_namespace="shop"} 0',
    'resumed_frontend_keyring_last_reload_success_timestamp_seconds{session_namespace="shop"} 1000.5',
    'resumed_frontend_ticket_secret_created_timestamp_seconds{session_namespace="shop"} 1000.5',
    'resumed_frontend_ticket_secret_held_over{session_namespace="shop"} 1',
  ]) {
    assert(lines.has(line), `${line} is not in\n${text}`);
  }
  assert(!/(keyring|ticket_secret)\w+{session_namespace="bank"/.test(text), text);
  const promtool = spawnSync("promtool", ["check", "metrics"], { input: text, encoding: "utf8" });
  if (!promtool.error) assert.equal(promtool.status, 0, promtool.stdout + promtool.stderr);
});
