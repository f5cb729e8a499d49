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
	gauge := func(name, help string, value func(*sum) *int64) {
		having := slices.DeleteFunc(slices.Clone(namespaces), func(namespace string) bool { return value(all[namespace]) == nil })
		if len(having) == 0 {
			return
		}
		head(name, "gauge", help)
		for _, namespace := range having {
			_, _ = fmt.Fprintf(&text, "resumed_frontend_%s{session_namespace=%q} %d\n", name, namespace, *value(all[namespace]))
		}
	}
	gauge("breaker_open", "Whether the circuit breaker is open, so that handshakes make no look-ups.",
		func(sum *sum) *int64 { return sum.breakerOpen })
	gauge("keyring_last_reload_successful", "Whether the present content of the keyring file is in use.",
		func(sum *sum) *int64 { return sum.keyringInUse })
	gauge("keyring_last_reload_success_timestamp_seconds", "Time of the last successful reload of the keyring file, in Unix seconds.",
		func(sum *sum) *int64 { return sum.keyringRead })
	gauge("removals_live", "Whether the removals of tickets are received.", func(sum *sum) *int64 { return sum.removalsLive })
	gauge("removals_held", "Removals of tickets that are in force.", func(sum *sum) *int64 { return sum.removals })
	gauge("ticket_secrets_held", "Secrets that may open a ticket.", func(sum *sum) *int64 { return sum.secrets })
	gauge("ticket_secret_created_timestamp_seconds", "Creation of the secret that encrypts new tickets, in Unix seconds.",
		func(sum *sum) *int64 { return sum.secretCreated })
	gauge("ticket_secret_held_over", "Whether the secret that encrypts new tickets is that of an epoch that has ended.",
		func(sum *sum) *int64 { return sum.secretHeldOver })
	return text.Bytes()
}

// A sum has the counts of a namespace, and the states of its installations: of each state that of the installation where it is worst,
// nil if no installation has it.
type sum struct {
	recorder
	tickets                       bool // whether some installations share tickets
	breakerOpen                   *int64
	keyringInUse, keyringRead     *int64
	removalsLive                  *int64
	removals, secrets             *int64
	secretCreated, secretHeldOver *int64
}

// addStates adds the states of an installation.
func (s *sum) addStates(sessions *Installation) {
	s.breakerOpen = largest(s.breakerOpen, number(sessions.BreakerOpen()))
	if successful, at, ok := sessions.options.Keyring.lastReload(); ok {
		s.keyringInUse = smallest(s.keyringInUse, number(successful))
		s.keyringRead = smallest(s.keyringRead, at.Unix())
	}
	tickets := sessions.tickets
	if tickets == nil {
		return
	}
	s.tickets = true
	s.removalsLive = smallest(s.removalsLive, number(sessions.RemovalsLive()))
	s.removals = largest(s.removals, int64(tickets.removals.count()))
	s.secrets = smallest(s.secrets, int64(tickets.secrets.count()))
	now := sessions.now()
	if created, heldOver, ok := tickets.secrets.encryptingSince(tickets.keyring.current(), epochAt(now, tickets.rotation), now); ok {
		s.secretCreated = smallest(s.secretCreated, created.Unix())
		s.secretHeldOver = largest(s.secretHeldOver, number(heldOver))
	}
}

func number(state bool) int64 {
	if state {
		return 1
	}
	return 0
}

func smallest(known *int64, value int64) *int64 {
	if known != nil {
		value = min(value, *known)
	}
	return &value
}

func largest(known *int64, value int64) *int64 {
	if known != nil {
		value = max(value, *known)
	}
	return &value
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
		all[namespace].addStates(s)
	}
	slices.Sort(namespaces)
	return namespaces, all
}
