package resumed

import (
	"crypto/tls"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A policy is protos/vectors/policy.json, the policy that the clients of all languages share.
type policy struct {
	Constants map[string]any
	Reasons   map[string][]string
	Absent    map[string]map[string][]string `json:"absent_reasons"`
	Tickets   struct {
		Constants map[string]any
		Reasons   map[string][]string
	}
	Sequences []struct {
		Name  string
		Steps []policyStep
	}
}

type policyStep struct {
	At          float64 `json:"at_ms"`
	Began       float64 `json:"began_ms"`
	Event       string
	Result      string
	Lookups     string
	NewSessions string  `json:"new_sessions"`
	NextProbe   float64 `json:"next_probe_ms"`
}

func readPolicy(t *testing.T) (policy policy) {
	t.Helper()
	readVectors(t, "policy.json", &policy)
	return policy
}

func ms(duration time.Duration) float64 { return float64(duration) / float64(time.Millisecond) }

func allMs(durations []time.Duration) (all []any) {
	for _, each := range durations {
		all = append(all, ms(each))
	}
	return all
}

func firstAndMax(first, maximum time.Duration) map[string]any {
	return map[string]any{"first": ms(first), "max": ms(maximum)}
}

func TestConstantsAreThoseOfAllClients(t *testing.T) {
	policy := readPolicy(t)
	constants := policy.Constants
	maps.Copy(constants, policy.Tickets.Constants)
	for name, value := range map[string]any{
		"namespace_pattern":         strings.Trim(namespacePattern.String(), "^$"),
		"default_lifetime_seconds":  defaultLifetime.Seconds(),
		"max_lifetime_seconds":      maxLifetime.Seconds(),
		"default_deadline_ms":       ms(defaultDeadline),
		"deadline_share":            deadlineShare / 100.0,
		"default_max_lookups":       float64(defaultMaxLookups),
		"max_lookups_per_handshake": float64(maxLookupsPerHandshake),
		"fresh_seconds":             freshness.Seconds(),
		"retry_pauses_ms":           allMs(retryPauses),
		"min_call_ms":               ms(minCallTime),
		"breaker_failures":          float64(breakerFailures),
		"probe_pause_ms":            firstAndMax(firstProbePause, maxProbePause),
		"probe_reset_ms":            ms(probeReset),
		"limit_pause_ms":            firstAndMax(firstLimitPause, maxLimitPause),
		"scarcity_ms":               ms(scarcity),
		"queue_bytes":               float64(queueBytes),
		"queue_item_bytes":          float64(itemBytes),
		"batch_operations":          float64(batchOperations),
		"busy_batch_operations":     float64(busyOperations),
		"busy_batch_pause_ms":       ms(busyPause),
		"batch_deadline_ms":         ms(batchDeadline),
		"batch_retry_ms":            firstAndMax(firstRetryPause, maxRetryPause),
		"max_value_bytes":           float64(maxValue),
		"lookup_buckets_ms":         allMs(lookupBuckets),

		"default_rotation_seconds":         defaultRotation.Seconds(),
		"max_rotation_seconds":             maxRotation.Seconds(),
		"default_revocation_grace_seconds": defaultRevocationGrace.Seconds(),
		"stale_stream_ms":                  ms(staleStream),
		"max_generations":                  float64(maxGenerations),
		"max_recheck_seconds":              maxRecheck.Seconds(),
		"agreement_deadline_ms":            ms(agreementDeadline),
		"agreement_retry_ms":               firstAndMax(firstAgreementRetry, maxAgreementRetry),
		"unknown_name_pause_ms":            ms(unknownNamePause),
		"max_removals":                     float64(maxRemovals),
		"max_own_removals":                 float64(maxOwnRemovals),
		"max_removal_seconds":              maxRemoval.Seconds(),
		"next_secret_parts":                float64(nextWithin),
		"max_session_bytes":                float64(maxTicketSession),
	} {
		if !reflect.DeepEqual(constants[name], value) {
			t.Errorf("%s: %v, want %v", name, value, constants[name])
		}
	}
}

func TestReasonsAreThoseOfAllClients(t *testing.T) {
	policy := readPolicy(t)
	maps.Copy(policy.Reasons, policy.Tickets.Reasons)
	for name, kind := range map[string]kind{
		"hits": hits, "misses": misses, "puts": puts, "removals": removals, "foreign_hits": foreignHits,
		"issued": ticketsIssued, "withheld": ticketsWithheld, "resumed": ticketsResumed, "refused": ticketsRefused,
	} {
		name = strings.TrimPrefix(name, "foreign_")
		want := slices.DeleteFunc(slices.Clone(policy.Reasons[name]), func(reason string) bool {
			return slices.Contains(policy.Absent["go"][name], reason)
		})
		if !slices.Equal(reasons[kind], want) {
			t.Errorf("%s: %v, want %v", name, reasons[kind], want)
		}
	}
}

func TestBreakerFollowsTheSequences(t *testing.T) {
	for _, sequence := range readPolicy(t).Sequences {
		t.Run(sequence.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, breaker := time.Now(), &breaker{}
				for _, step := range sequence.Steps {
					time.Sleep(time.Until(start.Add(time.Duration(step.At * float64(time.Millisecond)))))
					step.apply(breaker, start.Add(time.Duration(step.Began*float64(time.Millisecond))))
					if got := lookupsOf(breaker); got != step.Lookups {
						t.Fatalf("%+v: look-ups: %s", step, got)
					}
					if step.NewSessions != "" && (step.NewSessions == "dropped") != breaker.isScarce() {
						t.Fatalf("%+v", step)
					}
					if step.NextProbe > 0 {
						if pause := ms(breaker.nextProbePause()); pause != step.NextProbe {
							t.Fatalf("%+v: next probe: %v", step, pause)
						}
					}
				}
			})
		})
	}
}

func (s policyStep) apply(breaker *breaker, began time.Time) {
	switch {
	case s.Result == "limited":
		breaker.limit(began)
	case s.Event == "lookup" && s.Result != "ok":
		breaker.fail(began, s.Result == "timeout")
	case s.Event == "lookup" || s.Event == "probe" && s.Result == "ok":
		breaker.succeed()
	}
}

func lookupsOf(breaker *breaker) string {
	switch {
	case breaker.isOpen():
		return "breaker-open"
	case breaker.isLimited():
		return "limited"
	default:
		return "call"
	}
}

// While operations are scarce, a full handshake stores nothing, and its ticket costs no call at any frontend; sessions that are stored
// resume, and the sessions that follow them are stored.
func TestBeyondALimitNewSessionsAreDropped(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		full, resumed := tls.ConnectionState{}, tls.ConnectionState{DidResume: true}
		negotiate := func(state tls.ConnectionState) []byte {
			connection := &connection{sessions: s, config: newServer(), issued: s.now(), notAfter: s.now().Add(time.Hour)}
			id, err := connection.wrap(state, &tls.SessionState{})
			check(t, err)
			return id
		}
		store.set(0, status.Error(codes.ResourceExhausted, "of the test"))
		s.lookUp(testKey, false, s.options.Deadline)
		store.set(0, nil)
		time.Sleep(firstLimitPause)
		id := negotiate(full)
		if _, issued := s.options.Keyring.openID("shop", id); issued {
			t.Fatal("the fleet would look the id up")
		}
		negotiate(resumed)
		time.Sleep(scarcity)
		negotiate(full)
		check(t, s.Flush(t.Context()))
		if got, want := s.Stats().Puts, (map[string]uint64{"dropped": 1, "stored": 2}); !maps.Equal(got, want) {
			t.Fatal(got)
		}
	})
}

// A session that a client of the model offers: the fleet knows its id, and it may be stored by now.
type modelSession struct{ issued, stored bool }

// A modelFrontend is a frontend as far as it makes calls; breaker is the real one.
type modelFrontend struct {
	breaker     breaker
	queue       []*modelSession
	pausedUntil time.Time
	retry       time.Duration
}

// A bucket has the operations of a second, as a limit of the server does.
type bucket struct {
	rate, tokens float64
	filledAt     time.Time
}

func (b *bucket) spend(operations int) bool {
	now := time.Now()
	b.tokens = min(b.rate, b.tokens+b.rate*now.Sub(b.filledAt).Seconds())
	b.filledAt = now
	if b.tokens <= 0 {
		return false
	}
	b.tokens -= float64(operations)
	return true
}

func (f *modelFrontend) visit(offered *modelSession, tickets bool, limit *bucket) (resumed bool, next *modelSession) {
	if offered != nil && offered.issued && !f.breaker.isLimited() {
		resumed = f.lookUp(limit) && offered.stored
		if resumed && !tickets {
			return true, offered
		}
	}
	next = &modelSession{issued: resumed || !f.breaker.isScarce()}
	if next.issued {
		f.queue = append(f.queue, next)
	}
	return resumed, next
}

func (f *modelFrontend) lookUp(limit *bucket) bool {
	if !limit.spend(1) {
		f.breaker.limit(time.Now())
		return false
	}
	f.breaker.succeed()
	return true
}

func (f *modelFrontend) send(limit *bucket) {
	if len(f.queue) == 0 || time.Now().Before(f.pausedUntil) {
		return
	}
	batch := f.queue[:min(len(f.queue), batchOperations)]
	if !limit.spend(len(batch)) {
		f.breaker.limit(time.Now())
		f.pausedUntil = time.Now().Add(f.retry)
		f.retry = min(2*f.retry, maxRetryPause)
		return
	}
	f.retry = firstRetryPause
	for _, each := range batch {
		each.stored = true
	}
	f.queue = f.queue[len(batch):]
}

// A namespace that needs more operations than its limit resumes in proportion, from a cold start; with 60 of 80 operations a second at
// least 60 %.
func TestWhatResumesIsInProportionToTheLimit(t *testing.T) {
	const clients, seconds, need = 200, 60, 80
	for _, tickets := range []bool{false, true} { // TLS 1.3: another one each time
		for _, frontends := range []int{1, 4, 40} {
			for _, operations := range []float64{32, 60, 72, 120} {
				synctest.Test(t, func(t *testing.T) {
					chance := rand.New(rand.NewPCG(7, 7))
					limit := &bucket{rate: operations, tokens: operations, filledAt: time.Now()}
					fleet := make([]*modelFrontend, frontends)
					for n := range fleet {
						fleet[n] = &modelFrontend{retry: firstRetryPause}
					}
					visits := need * seconds
					if tickets {
						visits /= 2 // each takes a Get and a Put
					}
					sessions := make([]*modelSession, clients)
					resumed := 0.0
					for visit := range visits {
						time.Sleep(seconds * time.Second / time.Duration(visits))
						hit, next := fleet[chance.IntN(frontends)].visit(sessions[visit%clients], tickets, limit)
						sessions[visit%clients] = next
						if hit && visit >= visits/2 {
							resumed++
						}
						for _, each := range fleet {
							each.send(limit)
						}
					}
					share := resumed / float64(visits-visits/2)
					t.Logf("%v of %v operations, %d frontends, tickets %v: %.2f", operations, need, frontends, tickets, share)
					if want := min(operations/need, 1) - 0.15; share < want {
						t.Errorf("want at least %.2f", want)
					}
					for _, each := range fleet {
						if each.breaker.isOpen() {
							t.Error("a refusal was taken for an outage")
						}
					}
				})
			}
		}
	}
}
