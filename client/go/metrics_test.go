package resumed

import (
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Prometheus sees what sessions of a namespace count together, all reasons from the beginning, under the names of all clients.
func TestMetrics(t *testing.T) {
	var text string
	synctest.Test(t, func(t *testing.T) {
		store := newFakeStore()
		one, other := wrap(t, newServer(), store, Options{}), wrap(t, newServer(), store, Options{})
		bank := wrap(t, newServer(), store, Options{Namespace: "bank"})
		for _, sessions := range []*Installation{one, other, other} {
			sessions.recorder.count(hits, "store")
			sessions.recorder.count(foreignHits, "store")
			sessions.recorder.observe(3 * time.Millisecond)
		}
		withTickets := Options{Namespace: "tickets", Sessions: TicketSessions}
		sharing, alone := wrap(t, newServer(), store, withTickets), wrap(t, newServer(), store, withTickets)
		settled()
		sharing.tickets.removals.add(storeKey{}, time.Hour)
		sharing.recorder.count(ticketsIssued, "current")
		alone.recorder.count(ticketsIssued, "current")
		for range breakerFailures {
			bank.breaker.fail(time.Now(), false)
		}
		answer := httptest.NewRecorder()
		Metrics(one, bank, other, sharing, alone).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
		text = answer.Body.String()
		for _, line := range []string{
			`resumed_frontend_hits_total{session_namespace="shop",source="store"} 3`,
			`resumed_frontend_foreign_hits_total{session_namespace="shop",source="store"} 3`,
			`resumed_frontend_hits_total{session_namespace="bank",source="store"} 0`,
			`resumed_frontend_misses_total{session_namespace="shop",reason="breaker-open"} 0`,
			`resumed_frontend_puts_total{session_namespace="shop",outcome="stored"} 0`,
			`resumed_frontend_removals_total{session_namespace="shop",reason="application"} 0`,
			`resumed_frontend_lookup_duration_seconds_bucket{session_namespace="shop",le="0.0025"} 0`,
			`resumed_frontend_lookup_duration_seconds_bucket{session_namespace="shop",le="0.005"} 3`,
			`resumed_frontend_lookup_duration_seconds_bucket{session_namespace="shop",le="+Inf"} 3`,
			`resumed_frontend_lookup_duration_seconds_count{session_namespace="shop"} 3`,
			`resumed_frontend_lookup_duration_seconds_sum{session_namespace="shop"} 0.009`,
			`resumed_frontend_breaker_open{session_namespace="shop"} 0`,
			`resumed_frontend_breaker_open{session_namespace="bank"} 1`,
			`resumed_frontend_tickets_issued_total{session_namespace="tickets",secret="current"} 2`,
			`resumed_frontend_tickets_withheld_total{session_namespace="tickets",reason="no-secret"} 0`,
			`resumed_frontend_tickets_resumed_total{session_namespace="tickets",secret="previous"} 0`,
			`resumed_frontend_tickets_refused_total{session_namespace="tickets",reason="replayed"} 0`,
			`resumed_frontend_removals_live{session_namespace="tickets"} 1`,
			`resumed_frontend_removals_held{session_namespace="tickets"} 1`,
			`resumed_frontend_ticket_secrets_held{session_namespace="tickets"} 2`,
		} {
			if !strings.Contains(text, line+"\n") {
				t.Errorf("no line %s", line)
			}
		}
		if strings.Contains(text, `tickets_issued_total{session_namespace="shop"`) || strings.Contains(text, `removals_live{namespace="bank"`) {
			t.Error("series of tickets for a namespace without any")
		}
		if t.Failed() {
			t.Fatal(text)
		}
	})
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		return
	}
	check := exec.Command(promtool, "check", "metrics")
	check.Stdin = strings.NewReader(text)
	if output, err := check.CombinedOutput(); err != nil {
		t.Fatal(err, string(output))
	}
}
