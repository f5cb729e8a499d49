package resumed

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
)

// Metrics returns a handler that returns the counts of sessions in Prometheus' text format, under the names that the clients in
// other languages use and the dashboard of frontends draws. The counts of one namespace are added up.
func Metrics(sessions ...*Installation) http.Handler {
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

	ticketsIssued:   {"tickets_issued", "secret", "Tickets that were issued, by the epoch of their secret."},
	ticketsWithheld: {"tickets_withheld", "reason", "Tickets that were not issued."},
	ticketsResumed:  {"tickets_resumed", "secret", "Tickets that resumed, by the epoch of their secret."},
	ticketsRefused:  {"tickets_refused", "reason", "Tickets that clients offered and that did not resume."},
}

func metricsOf(sessions []*Installation) []byte {
	namespaces, all := byNamespace(sessions)
	sharing := slices.DeleteFunc(slices.Clone(namespaces), func(namespace string) bool { return !all[namespace].tickets })
	var text bytes.Buffer
	head := func(name, kind, help string) {
		_, _ = fmt.Fprintf(&text, "# HELP resumed_frontend_%[1]s %[3]s\n# TYPE resumed_frontend_%[1]s %[2]s\n", name, kind, help)
	}
	for kind := range kinds {
		family := families[kind]
		counted := namespaces
		if kind >= ticketsIssued {
			counted = sharing
		}
		if len(counted) == 0 {
			continue
		}
		head(family.name+"_total", "counter", family.help)
		for _, namespace := range counted {
			for _, reason := range reasons[kind] { // zeros too: Prometheus does not see the first increase of a series that begins above zero
				_, _ = fmt.Fprintf(&text, "resumed_frontend_%s_total{session_namespace=%q,%s=%q} %d\n",
					family.name, namespace, family.label, reason, all[namespace].counts[kind][reason])
			}
		}
	}
	head("lookup_duration_seconds", "histogram", "Time that look-ups at the store took.")
	for _, namespace := range namespaces {
		sum, count := all[namespace], uint64(0)
		for n, bucket := range sum.buckets {
			count += bucket
			bound := "+Inf"
			if n < len(lookupBuckets) {
				bound = fmt.Sprint(lookupBuckets[n].Seconds())
			}
			_, _ = fmt.Fprintf(&text, "resumed_frontend_lookup_duration_seconds_bucket{session_namespace=%q,le=%q} %d\n", namespace, bound, count)
		}
		_, _ = fmt.Fprintf(&text, "resumed_frontend_lookup_duration_seconds_count{session_namespace=%q} %d\n", namespace, count)
		_, _ = fmt.Fprintf(&text, "resumed_frontend_lookup_duration_seconds_sum{session_namespace=%q} %v\n", namespace, sum.total.Seconds())
	}
	gauge := func(name, help string, value func(*sum) int, namespaces []string) {
		head(name, "gauge", help)
		for _, namespace := range namespaces {
			_, _ = fmt.Fprintf(&text, "resumed_frontend_%s{session_namespace=%q} %d\n", name, namespace, value(all[namespace]))
		}
	}
	gauge("breaker_open", "Whether the circuit breaker is open, so that handshakes make no look-ups.",
		func(sum *sum) int { return sum.open }, namespaces)
	if len(sharing) > 0 {
		gauge("removals_live", "Whether the removals of tickets are received.", func(sum *sum) int { return sum.live }, sharing)
		gauge("removals_held", "Removals of tickets that are in force.", func(sum *sum) int { return sum.removals }, sharing)
		gauge("ticket_secrets_held", "Secrets that may open a ticket.", func(sum *sum) int { return sum.secrets }, sharing)
	}
	return text.Bytes()
}

// A sum has the counts and states of a namespace.
type sum struct {
	recorder
	open     int  // 1 if one of the breakers is open
	tickets  bool // whether some installations share tickets; the rest is of these
	live     int  // 1 if all of them receive removals
	removals int  // the largest number of removals
	secrets  int  // the smallest number of secrets
}

// addTickets adds the states of installations that share tickets.
func (s *sum) addTickets(sessions *Installation) {
	live, removals, secrets := 0, sessions.tickets.removals.count(), sessions.tickets.secrets.count()
	if sessions.RemovalsLive() {
		live = 1
	}
	if s.tickets {
		live, removals, secrets = min(live, s.live), max(removals, s.removals), min(secrets, s.secrets)
	}
	s.tickets, s.live, s.removals, s.secrets = true, live, removals, secrets
}

func byNamespace(sessions []*Installation) (namespaces []string, all map[string]*sum) {
	all = map[string]*sum{}
	for _, s := range sessions {
		namespace := s.options.Namespace
		if all[namespace] == nil {
			namespaces = append(namespaces, namespace)
			all[namespace] = &sum{}
		}
		all[namespace].add(&s.recorder)
		if s.tickets != nil {
			all[namespace].addTickets(s)
		}
		if s.BreakerOpen() {
			all[namespace].open = 1
		}
	}
	slices.Sort(namespaces)
	return namespaces, all
}
