/** The counts of servers, for Prometheus. */
import type { Installation } from "./attach.js";
import { LOOKUP_BUCKETS, REASONS, type Kind, type Stats } from "./stats.js";

const FAMILIES: Record<Kind, { name: string; label: string; help: string }> = {
  hits: { name: "hits", label: "source", help: "Sessions that were resumed, by where they came from." },
  foreignHits: {
    name: "foreign_hits",
    label: "source",
    help: "Those of the hits whose sessions another process had issued.",
  },
  misses: { name: "misses", label: "reason", help: "Sessions that clients offered and that were not resumed." },
  puts: { name: "puts", label: "outcome", help: "Sessions that were negotiated, by outcome." },
  removals: { name: "removals", label: "reason", help: "Sessions that were removed from the fleet." },
  ticketsResumed: { name: "tickets_resumed", label: "secret", help: "Tickets that resumed, by the epoch of their secret." },
  terminations: { name: "terminations", label: "reason", help: "Resumed connections that were ended after their handshake." },
};

/**
 * Returns the counts of sessions in Prometheus' text format (content type `text/plain; version=0.0.4`), under the names that the
 * clients in other languages use and the dashboard of frontends draws. The counts of one namespace are added up.
 */
export function metrics(...sessions: Installation[]): string {
  const namespaces = [...new Set(sessions.map(({ namespace }) => namespace))].sort();
  const groups = namespaces.map((namespace) => {
    const group = sessions.filter((each) => each.namespace === namespace);
    return { namespace, stats: group.map((each) => each.stats), open: group.some((each) => each.breakerOpen) };
  });
  const lines: string[] = [];
  const head = (name: string, type: string, help: string): void => {
    lines.push(`# HELP resumed_frontend_${name} ${help}`, `# TYPE resumed_frontend_${name} ${type}`);
  };
  for (const [kind, { name, label, help }] of Object.entries(FAMILIES) as [Kind, (typeof FAMILIES)[Kind]][]) {
    head(`${name}_total`, "counter", help);
    for (const { namespace, stats } of groups) {
      // Zeros too: Prometheus does not see the first increase of a series that begins above zero.
      for (const reason of REASONS[kind]) {
        const labels = `session_namespace="${namespace}",${label}="${reason}"`;
        lines.push(`resumed_frontend_${name}_total{${labels}} ${total(stats, (each) => each[kind][reason] ?? 0)}`);
      }
    }
  }
  head("lookup_duration_seconds", "histogram", "Time that look-ups at the store took.");
  for (const { namespace, stats } of groups) {
    let count = 0;
    for (const [n, bound] of [...LOOKUP_BUCKETS, Infinity].entries()) {
      count += total(stats, ({ lookups }) => lookups[n] ?? 0);
      const le = bound === Infinity ? "+Inf" : bound / 1000;
      lines.push(`resumed_frontend_lookup_duration_seconds_bucket{session_namespace="${namespace}",le="${le}"} ${count}`);
    }
    const seconds = total(stats, ({ lookupMilliseconds }) => lookupMilliseconds) / 1000;
    lines.push(`resumed_frontend_lookup_duration_seconds_count{session_namespace="${namespace}"} ${count}`);
    lines.push(`resumed_frontend_lookup_duration_seconds_sum{session_namespace="${namespace}"} ${seconds}`);
  }
  head("breaker_open", "gauge", "Whether the circuit breaker is open, so that handshakes make no look-ups.");
  for (const { namespace, open } of groups)
    lines.push(`resumed_frontend_breaker_open{session_namespace="${namespace}"} ${open ? 1 : 0}`);
  return `${lines.join("\n")}\n`;
}

function total(stats: Stats[], count: (each: Stats) => number): number {
  return stats.reduce((sum, each) => sum + count(each), 0);
}
