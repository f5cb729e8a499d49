package resumed

import (
	"cmp"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Handshakes with fleet tickets, with ticket keys that all frontends share, and with nothing that is shared, in turns over loopback TCP,
// client and server in this process. RESUMED_COMPARE_ROUNDS has the number of rounds; each has 20 handshakes of each kind:
//
//	RESUMED_COMPARE_ROUNDS=300 go test -run CompareHandshakes -v -timeout 1h .
func TestCompareHandshakes(t *testing.T) {
	rounds, err := strconv.Atoi(cmp.Or(os.Getenv("RESUMED_COMPARE_ROUNDS"), "0"))
	check(t, err)
	if rounds == 0 {
		t.Skip("RESUMED_COMPARE_ROUNDS is not set")
	}
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		_, tickets := ticketServer(t, newServer(), store.connect(t), Options{})
		shared := newServer()
		var key [32]byte
		_, _ = rand.Read(key[:])
		shared.SetSessionTicketKeys([][32]byte{key})
		keys := listen(t, shared)
		plain := newServer()
		plain.SessionTicketsDisabled = true
		none := listen(t, plain)

		sides := []*side{
			{name: "full, fleet tickets", address: tickets}, {name: "full, shared keys", address: keys}, {name: "full, none", address: none},
			{name: "resumed, fleet tickets", address: tickets, resumes: true}, {name: "resumed, shared keys", address: keys, resumes: true},
		}
		for _, side := range sides {
			side.client = newClient(version)
			resumes(t, side.address, side.client)
			if !side.resumes {
				side.client.ClientSessionCache = frozen{}
			}
		}
		for range rounds {
			for _, side := range sides {
				side.run(t, 20)
			}
			slices.Reverse(sides)
		}
		slices.SortFunc(sides, func(a, b *side) int { return cmp.Compare(a.name, b.name) })
		for _, side := range sides {
			t.Logf("%-24s %s a second; processor %s us each", side.name, spread(side.rates, 0), spread(side.costs, 0))
		}
		byName := func(name string) *side {
			return sides[slices.IndexFunc(sides, func(side *side) bool { return side.name == name })]
		}
		for _, pair := range [][2]string{
			{"full, fleet tickets", "full, none"}, {"full, shared keys", "full, none"}, {"full, fleet tickets", "full, shared keys"},
			{"resumed, fleet tickets", "resumed, shared keys"}, {"resumed, fleet tickets", "full, none"},
		} {
			one, other := byName(pair[0]), byName(pair[1])
			t.Logf("%s / %s: time %s, processor %s", pair[0], pair[1],
				spread(ratios(other.rates, one.rates), 3), spread(ratios(one.costs, other.costs), 3))
		}
	})
}

// A side is one of the kinds of handshakes that are compared.
type side struct {
	name    string
	address string
	client  *tls.Config
	resumes bool
	rates   []float64 // handshakes a second, in each round
	costs   []float64 // microseconds of processor time for each handshake
}

func (s *side) run(t *testing.T, handshakes int) {
	t.Helper()
	began, used := time.Now(), processorTime()
	for range handshakes {
		if resumes(t, s.address, s.client) != s.resumes {
			t.Fatalf("%s: resumed %v", s.name, !s.resumes)
		}
	}
	s.rates = append(s.rates, float64(handshakes)/time.Since(began).Seconds())
	s.costs = append(s.costs, float64((processorTime()-used).Microseconds())/float64(handshakes))
}

func processorTime() time.Duration {
	var usage syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func ratios(numerators, denominators []float64) (ratios []float64) {
	for n := range numerators {
		ratios = append(ratios, numerators[n]/denominators[n])
	}
	return ratios
}

// spread returns the median and the quartiles.
func spread(values []float64, digits int) string {
	values = slices.Clone(values)
	slices.Sort(values)
	at := func(share float64) float64 { return values[int(share*float64(len(values)-1))] }
	return fmt.Sprintf("%.*f (%.*f to %.*f)", digits, at(0.5), digits, at(0.25), digits, at(0.75))
}
