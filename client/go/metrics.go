package resumed

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
)

// Metrics returns a handler that returns the counts of sessions in Prometheus' text format, under the names that the clients in
// other languages use and the dashboard of frontends draws. The counts of one namespace are added up.
func Metrics(sessions ...*Sessions) http.Handler {
	return http.HandlerFunc(func(writer http.ResponseWriter, _ *http.Request) {
		writer.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = writer.Write(metricsOf(sessions))
	})
}

var families = [kinds]struct{ name, label, help string }{
	hits:        {"hits", "source", "Sessions that were resumed, by where they came from."},
	foreignHits: {"foreign_hits", "source", "Those of the hits whose sessions another process had issued."},
	misses:      {"misses", "reason", "Sessions that clients offered and that were not resumed."},
	puts:        {"puts", "outcome", "Sessions that were negotiated, by outcome."},
	removals:    {"removals", "reason", "Sessions that were removed from the fleet."},

	ticketsIssued:   {"tickets_issued", "secret", "Fleet tickets that were issued, by the epoch of their secret."},
	ticketsWithheld: {"tickets_withheld", "reason", "Handshakes that ended without a fleet ticket."},
	ticketsResumed:  {"tickets_resumed", "epoch", "Fleet tickets that were resumed, by the epoch of their secret."},
	ticketsRefused:  {"tickets_refused", "reason", "Fleet tickets that clients offered and that were not resumed."},
}

func metricsOf(sessions []*Sessions) []byte {
	namespaces, all := byNamespace(sessions)
	var text bytes.Buffer
	head := func(name, kind, help string) {
		_, _ = fmt.Fprintf(&text, "# HELP resumed_frontend_%[1]s %[3]s\n# TYPE resumed_frontend_%[1]s %[2]s\n", name, kind, help)
	}
	for kind := range kinds {
		family := families[kind]
		counted := slices.DeleteFunc(slices.Clone(namespaces), func(namespace string) bool { return !all[namespace].has(kind) })
		if len(counted) == 0 {
			continue
		}
		head(family.name+"_total", "counter", family.help)
		for _, namespace := range counted {
			for _, reason := range reasons[kind] { // zeros too: Prometheus does not see the first increase of a series that begins above zero
				_, _ = fmt.Fprintf(&text, "resumed_frontend_%s_total{namespace=%q,%s=%q} %d\n",
					family.name, namespace, family.label, reason, all[namespace].counts[kind][reason])
			}
		}
	}
	head("lookup_seconds", "histogram", "Time that look-ups at the store took.")
	for _, namespace := range namespaces {
		sum, count := all[namespace], uint64(0)
		for n, bucket := range sum.buckets {
			count += bucket
			bound := "+Inf"
			if n < len(lookupBuckets) {
				bound = fmt.Sprint(lookupBuckets[n].Seconds())
			}
			_, _ = fmt.Fprintf(&text, "resumed_frontend_lookup_seconds_bucket{namespace=%q,le=%q} %d\n", namespace, bound, count)
		}
		_, _ = fmt.Fprintf(&text, "resumed_frontend_lookup_seconds_count{namespace=%q} %d\n", namespace, count)
		_, _ = fmt.Fprintf(&text, "resumed_frontend_lookup_seconds_sum{namespace=%q} %v\n", namespace, sum.total.Seconds())
	}
	head("breaker_open", "gauge", "Whether the circuit breaker is open, so that handshakes make no look-ups.")
	for _, namespace := range namespaces {
		_, _ = fmt.Fprintf(&text, "resumed_frontend_breaker_open{namespace=%q} %d\n", namespace, all[namespace].open)
	}
	return text.Bytes()
}

// A sum has the counts of a namespace, and 1 if one of its breakers is open, else 0.
type sum struct {
	recorder
	open    int
	tickets bool // whether one of them issues tickets
}

// has reports whether counts of a kind are part of the metrics.
func (s *sum) has(kind kind) bool { return kind < ticketsIssued || s.tickets }

func byNamespace(sessions []*Sessions) (namespaces []string, all map[string]*sum) {
	all = map[string]*sum{}
	for _, s := range sessions {
		namespace := s.options.Namespace
		if all[namespace] == nil {
			namespaces = append(namespaces, namespace)
			all[namespace] = &sum{}
		}
		all[namespace].add(&s.recorder)
		all[namespace].tickets = all[namespace].tickets || s.tickets != nil
		if s.BreakerOpen() {
			all[namespace].open = 1
		}
	}
	slices.Sort(namespaces)
	return namespaces, all
}
