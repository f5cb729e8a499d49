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

interface Gauge {
  name: string;
  help: string;
  /** Returns the value of the installation where it is worst. */
  worst: (...values: number[]) => number;
  value: (installation: Installation) => number | boolean | undefined;
}

const GAUGES: Gauge[] = [
  {
    name: "breaker_open",
    help: "Whether the circuit breaker is open, so that handshakes make no look-ups.",
    worst: Math.max,
    value: ({ breakerOpen }) => breakerOpen,
  },
  {
    name: "keyring_last_reload_successful",
    help: "Whether the present content of the keyring file is in use.",
    worst: Math.min,
    value: ({ keyringReload }) => keyringReload?.successful,
  },
  {
    name: "keyring_last_reload_success_timestamp_seconds",
    help: "Time of the last successful reload of the keyring file, in Unix seconds.",
    worst: Math.min,
    value: ({ keyringReload }) => keyringReload?.time,
  },
  {
    name: "ticket_secret_created_timestamp_seconds",
    help: "Creation of the secret that encrypts new tickets, in Unix seconds.",
    worst: Math.min,
    value: ({ ticketSecret }) => ticketSecret?.created,
  },
  {
    name: "ticket_secret_held_over",
    help: "Whether the secret that encrypts new tickets is that of an epoch that has ended.",
    worst: Math.max,
    value: ({ ticketSecret }) => ticketSecret?.heldOver,
  },
];

/**
 * Returns the counts of sessions in Prometheus' text format (content type `text/plain; version=0.0.4`), under the names that the
 * clients in other languages use and the dashboard of frontends draws. The counts of one namespace are added up.
 */
export function metrics(...sessions: Installation[]): string {
  const namespaces = [...new Set(sessions.map(({ namespace }) => namespace))].sort();
  const groups = namespaces.map((namespace) => {
    const group = sessions.filter((each) => each.namespace === namespace);
    return { namespace, group, stats: group.map((each) => each.stats) };
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
  for (const { name, help, worst, value } of GAUGES) {
    const series = groups.flatMap(({ namespace, group }) => {
      const values = group.map(value).filter((each) => each !== undefined);
      const labels = `session_namespace="${namespace}"`;
      return values.length > 0 ? [`resumed_frontend_${name}{${labels}} ${worst(...values.map(Number))}`] : [];
    });
    if (series.length > 0) head(name, "gauge", help);
    lines.push(...series);
  }
  return `${lines.join("\n")}\n`;
}

function total(stats: Stats[], count: (each: Stats) => number): number {
  return stats.reduce((sum, each) => sum + count(each), 0);
}
