package resumed

import (
	"fmt"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
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

// The state of a keyring file is that of its present content, and the time that of the content in use.
func TestMetricsOfKeyringFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "fleet.keys")
		writeKeyring(t, path, keyLine(1))
		keyring, err := LoadKeyring(path, quiet)
		check(t, err)
		store := newFakeStore()
		bank := wrap(t, newServer(), store, Options{Namespace: "bank", Keyring: keyring})
		alone := wrap(t, newServer(), store, Options{})
		started := time.Now()
		for _, step := range []struct {
			text         string
			successful   int
			readAfterAll time.Duration
		}{{keyLine(1), 1, 0}, {keyLine(2), 1, time.Minute}, {"nonsense\n", 0, time.Minute}, {keyLine(3), 1, 3 * time.Minute}} {
			writeKeyring(t, path, step.text)
			settle(keyring.files, func() { metricsOf([]*Installation{bank}) })
			text := string(metricsOf([]*Installation{bank, alone}))
			for _, line := range []string{
				fmt.Sprintf(`resumed_frontend_keyring_last_reload_successful{session_namespace="bank"} %d`, step.successful),
				fmt.Sprintf(`resumed_frontend_keyring_last_reload_success_timestamp_seconds{session_namespace="bank"} %d`,
					started.Add(step.readAfterAll).Unix()),
			} {
				if !strings.Contains(text, line+"\n") {
					t.Errorf("no line %s in\n%s", line, text)
				}
			}
			if strings.Contains(text, `keyring_last_reload_successful{session_namespace="shop"}`) {
				t.Error("a series of a keyring without a file")
			}
			time.Sleep(time.Minute)
		}
	})
}

// While the store does not answer, the secret that encrypts becomes older, and is held over from the next epoch on.
func TestMetricsOfTicketSecrets(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		sharing := wrap(t, newServer(), store, Options{Sessions: TicketSessions, Rotation: time.Minute, Lifetime: time.Minute})
		secret := func() (created, heldOver string) {
			text := string(metricsOf([]*Installation{sharing}))
			return seriesOf(text, "ticket_secret_created_timestamp_seconds"), seriesOf(text, "ticket_secret_held_over")
		}
		settled()
		created, heldOver := secret()
		if created != fmt.Sprint(time.Now().Unix()) || heldOver != "0" {
			t.Fatal(created, heldOver)
		}
		store.set(0, errUnavailableTest)
		time.Sleep(2*time.Minute + 10*time.Second) // beyond the epoch that was the next one
		if since, heldOver := secret(); since == "" || heldOver != "1" {
			t.Fatal(since, heldOver)
		}
		time.Sleep(2 * time.Minute)
		if since, heldOver := secret(); since+heldOver != "" {
			t.Fatal("a series of a secret that has ended: ", since, heldOver)
		}
	})
}

// seriesOf returns the value of the only series of a metric of frontends, or "".
func seriesOf(text, name string) string {
	_, after, _ := strings.Cut(text, "\nresumed_frontend_"+name+`{session_namespace="shop"} `)
	value, _, _ := strings.Cut(after, "\n")
	return value
}
