package resumed

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Every frontend resumes the tickets of every other one, without a call, and without early data.
func TestAnyFrontendResumesTickets(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		frontends := []*frontend{newFrontend(t, store, both(Options{})), newFrontend(t, store, both(Options{}))}
		settled()
		calls := store.called("Batch")
		client := newClient(version)
		for n := range 10 {
			frontends[n%2].wantResumed(t, client, n > 0)
			if length := len(ticket(t, client)); length < minTicket {
				t.Fatal("ticket of ", length, " bytes")
			}
		}
		for n, resumed := range []uint64{4, 5} {
			stats := frontends[n].sessions.Stats()
			wantCounts(t, "resumed", stats.TicketsResumed, map[string]uint64{"current": resumed})
			wantCounts(t, "issued", stats.TicketsIssued, map[string]uint64{"current": 5})
			if total(stats.Hits)+total(stats.Misses)+total(stats.Puts)+total(stats.TicketsRefused) != 0 {
				t.Fatal(stats)
			}
		}
		if store.called("Batch") != calls || store.called("Get")+store.called("Put")+store.called("Take") != 0 {
			t.Fatal("handshakes made calls: ", store.calls)
		}
	})
}

// Without TicketsTLS12, sessions of TLS 1.2 are stored.
func TestSessionsOfTLS12AreStored(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{})
		settled()
		client := newClient(tls.VersionTLS12)
		for n := range 3 {
			frontend.wantResumed(t, client, n > 0)
			flush(t, frontend.sessions)
			if length := len(ticket(t, client)); length != idSize {
				t.Fatal("ticket of ", length, " bytes")
			}
		}
		stats := frontend.sessions.Stats()
		if total(stats.Hits) != 2 || total(stats.TicketsIssued)+total(stats.TicketsRefused) != 0 {
			t.Fatal(stats)
		}
	})
}

// A fleet changes its mode without losing sessions, and a lineage lives on from the negotiation of the stored session.
func TestStoredSessionsResumeWithTickets(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		before, after := newFrontend(t, store, Options{Sessions: StoredSessions}), newFrontend(t, store, both(Options{}))
		settled()
		client := newClient(version)
		before.wantResumed(t, client, false)
		flush(t, before.sessions)
		time.Sleep(time.Hour)
		after.wantResumed(t, client, true)
		wantCounts(t, "hits", after.sessions.Stats().Hits, map[string]uint64{"store": 1})
		time.Sleep(59 * time.Minute)
		after.wantResumed(t, client, true)
		wantCounts(t, "resumed", after.sessions.Stats().TicketsResumed, map[string]uint64{"current": 1})
		time.Sleep(time.Minute)
		after.wantRefused(t, client, "expired")
		before.wantResumed(t, client, false)
		wantCounts(t, "misses", before.sessions.Stats().Misses, map[string]uint64{foreignID: 1})
	})
}

// A session that is too large for a ticket is stored. It resumes with its certificate.
func TestLargeSessionsAreStored(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		certificate := newCertificate("client", strings.Repeat("long.", 40)+"example")
		certificate.Certificate = append(certificate.Certificate, slices.Repeat(certificate.Certificate, 20)...)
		config := newServer()
		config.ClientAuth = tls.RequireAnyClientCert
		frontend := newFrontendOf(t, config, store, both(Options{}))
		settled()
		client := newClient(version)
		client.Certificates = []tls.Certificate{certificate}
		frontend.wantResumed(t, client, false)
		flush(t, frontend.sessions)
		if len(ticket(t, client)) != idSize {
			t.Fatal("a ticket of ", len(ticket(t, client)), " bytes")
		}
		frontend.wantResumed(t, client, true)
		stats := frontend.sessions.Stats()
		if total(stats.Hits) != 1 || total(stats.TicketsIssued)+total(stats.TicketsWithheld) != 0 {
			t.Fatal(stats)
		}
	})
}

// However often it is resumed, a lineage ends when the lifetime has passed since its negotiation.
func TestTicketsNeverProlong(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		frontends := []*frontend{newFrontend(t, store, both(Options{})), newFrontend(t, store, both(Options{Lifetime: 5 * time.Hour}))}
		settled()
		client := newClient(version)
		frontends[0].wantResumed(t, client, false)
		for n := range 7 {
			time.Sleep(15 * time.Minute)
			frontends[n%2].wantResumed(t, client, true)
		}
		time.Sleep(15 * time.Minute)
		frontends[1].wantRefused(t, client, "expired")
		frontends[1].wantResumed(t, client, true)
	})
}

// A ticket ends with the certificate of its client, and with its secret.
func TestTicketsEndEarly(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		certificate := newCertificateUntil(time.Now().Add(time.Hour), "client")
		config := newServer()
		config.ClientAuth, config.ClientCAs = tls.RequestClientCert, poolOf(certificate)
		frontend := newFrontendOf(t, config, store, both(Options{}))
		settled()
		client := newClient(version)
		client.Certificates = []tls.Certificate{certificate}
		frontend.wantResumed(t, client, false)
		time.Sleep(59 * time.Minute)
		frontend.wantResumed(t, client, true)
		time.Sleep(time.Minute)
		frontend.wantRefused(t, client, "expired")
		wantCounts(t, "withheld", frontend.sessions.Stats().TicketsWithheld, map[string]uint64{"unresumable": 1})

		plain := newFrontend(t, store, both(Options{Namespace: "bank", Rotation: time.Minute, Lifetime: time.Minute, RevocationGrace: time.Hour}))
		settled()
		store.set(0, errUnavailableTest)
		time.Sleep(3*time.Minute + 30*time.Second) // of the four in which the secret that was the next one lives
		client = newClient(version)
		plain.wantResumed(t, client, false)
		issued := ticket(t, client)
		key, _, _ := plain.sessions.tickets.encrypter(time.Now(), saltOf(issued))
		plaintext, err := openTicket(key.key, issued)
		check(t, err)
		if state, _, _ := parseTicket(plaintext); !state.end.Equal(key.notAfter) {
			t.Fatal(state.end, key.notAfter)
		}
		time.Sleep(29 * time.Second)
		plain.wantResumed(t, client, true)
		time.Sleep(time.Second)
		plain.wantRefused(t, client, "expired")
	})
}

// A ticket resumes in its own context only: server name, certificate names, client authentication, namespace, and keys.
func TestTicketsKeepContextsApart(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		asks, elsewhere := newServer(), newServer()
		asks.ClientAuth = tls.RequestClientCert
		elsewhere.Certificates = []tls.Certificate{newCertificate("shop.example", "pay.example")}
		keyring, err := NewKeyring(bytes.Repeat([]byte{9}, keySize))
		check(t, err)
		own := newFrontend(t, store, both(Options{}))
		another := newFrontend(t, store, both(Options{Namespace: "bank"}))
		stranger := newFrontend(t, store, both(Options{Keyring: keyring}))
		asking := newFrontendOf(t, asks, store, both(Options{}))
		host := newFrontendOf(t, elsewhere, store, both(Options{}))
		settled()
		visitor := own.newVisitor(t, version)
		visitor.InsecureSkipVerify = true
		asking.wantRefused(t, visitor, "context-mismatch")
		host.wantRefused(t, visitor, "context-mismatch")
		for _, each := range []*frontend{another, stranger} {
			each.wantResumed(t, visitor, false)
			wantCounts(t, "misses", each.sessions.Stats().Misses, map[string]uint64{foreignID: 1})
		}
		other := visitor.Clone()
		other.ServerName = "bank.example"
		own.wantRefused(t, other, "server-name-mismatch")
		other.ServerName = "SHOP.example"
		own.wantResumed(t, other, true)
		own.config.GetConfigForClient = nil
		own.wantRefused(t, visitor, "context-unknown")
		wantCounts(t, "withheld", own.sessions.Stats().TicketsWithheld, map[string]uint64{"unresumable": 1})
	})
}

// A ticket that the fleet did not issue, or that was changed, costs a full handshake.
func TestSpoiltTickets(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		frontend := newFrontend(t, store, both(Options{}))
		settled()
		client := newClient(version)
		frontend.wantResumed(t, client, false)
		issued := ticket(t, client)
		secret := frontend.present(t).ticketKey(saltOf(issued))
		plaintext, err := openTicket(secret.key, issued)
		check(t, err)
		state, session, err := parseTicket(plaintext)
		check(t, err)
		seal := func(session []byte) []byte {
			return sealTicket(secret.name, secret.key, [saltSize]byte(saltOf(issued)), state, session)
		}
		changed := bytes.Clone(session)
		if version == tls.VersionTLS12 {
			binary.BigEndian.PutUint16(changed, tls.VersionTLS11)
		} else {
			binary.BigEndian.PutUint16(changed[3:], otherHash(binary.BigEndian.Uint16(changed[3:])))
		}
		spoilt := bytes.Clone(issued)
		spoilt[len(spoilt)-1]++
		for reason, ticket := range map[string][]byte{
			"not-authentic": spoilt, "malformed": seal([]byte("no session of crypto/tls")), "other-cipher": seal(changed),
		} {
			frontend.wantRefused(t, offering(t, client, ticket), reason)
		}
		frontend.wantResumed(t, offering(t, client, seal(session)), true)
		frontend.wantResumed(t, offering(t, client, issued[:minTicket-1]), false)
		wantCounts(t, "misses", frontend.sessions.Stats().Misses, map[string]uint64{foreignID: 1})
	})
}

// otherHash returns a cipher suite of TLS 1.3 with another hash.
func otherHash(suite uint16) uint16 {
	if suite == tls.TLS_AES_256_GCM_SHA384 {
		return tls.TLS_AES_128_GCM_SHA256
	}
	return tls.TLS_AES_256_GCM_SHA384
}

// offering returns a client that offers its session with another ticket.
func offering(t *testing.T, client *tls.Config, ticket []byte) *tls.Config {
	t.Helper()
	session, _ := client.ClientSessionCache.Get(client.ServerName)
	_, state, err := session.ResumptionState()
	check(t, err)
	serialized, err := state.Bytes()
	check(t, err)
	state, err = tls.ParseSessionState(serialized)
	check(t, err)
	session, err = tls.NewResumptionState(ticket, state)
	check(t, err)
	client = client.Clone()
	client.ClientSessionCache = frozen{session}
	return client
}

// A client's certificate is checked again by crypto/tls; that it did not resume a ticket counts as a refusal.
func TestTicketThatIsNotResumedIsARefusal(t *testing.T) {
	client, namesake := newCertificate("client"), newCertificate("client")
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		var frontends []*frontend
		for _, authority := range []tls.Certificate{client, namesake} {
			config := newServer()
			config.ClientAuth, config.ClientCAs = tls.VerifyClientCertIfGiven, poolOf(authority)
			frontends = append(frontends, newFrontendOf(t, config, store, both(Options{})))
		}
		settled()
		visitor := newClient(version)
		visitor.Certificates = []tls.Certificate{client}
		frontends[0].wantResumed(t, visitor, false)
		visitor = freeze(t, visitor)
		frontends[0].wantResumed(t, visitor, true)
		visitor.Certificates = nil
		frontends[1].wantRefused(t, visitor, "context-mismatch")
	})
}

// A lineage that is removed resumes no more: here at once, elsewhere by the stream, and at frontends that start later.
func TestRemovedLineageDoesNotResume(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		var ids [][]byte
		options := both(Options{Issued: func(_ tls.ConnectionState, id []byte) { ids = append(ids, id) }})
		first, second := newFrontend(t, store, options), newFrontend(t, store, both(Options{}))
		settled()
		client := newClient(version)
		first.wantResumed(t, client, false)
		oldest := freeze(t, client)
		first.wantResumed(t, client, true)
		latest := freeze(t, client)
		if len(ids) != 2 || !bytes.Equal(ids[0], ids[1]) {
			t.Fatalf("%x", ids)
		}
		store.set(time.Second, nil) // the store removes it only then
		first.sessions.Remove(ids[1])
		first.wantRefused(t, oldest, "revoked")
		first.wantRefused(t, latest, "revoked")
		second.wantResumed(t, latest, true)
		flush(t, first.sessions)
		store.set(0, nil)
		settled()
		third := newFrontend(t, store, both(Options{}))
		settled()
		for _, each := range []*frontend{second, third} {
			each.wantRefused(t, oldest, "revoked")
			each.wantRefused(t, latest, "revoked")
		}
		wantCounts(t, "removals", first.sessions.Stats().Removals, map[string]uint64{"application": 1})
		second.wantResumed(t, second.newVisitor(t, version), true)
		// It lasts beyond the end, by an epoch: the clock of another frontend may be behind.
		removed := store.lasting[0].GetRemoved()
		if ttl := removed.GetTtl().AsDuration(); ttl < 3*time.Hour-2*time.Second || ttl > 3*time.Hour {
			t.Fatal(ttl)
		}
	})
}

// A purge ends the tickets and the secrets from before, everywhere; those that follow resume.
func TestPurge(t *testing.T) {
	for name, test := range map[string]struct {
		before func(negotiated time.Time) time.Time
		reason string // for a ticket from before
		kept   bool   // whether the secret is
	}{
		"of all":             {func(time.Time) time.Time { return time.Time{} }, "unknown-secret", false},
		"before now":         {func(time.Time) time.Time { return time.Now() }, "unknown-secret", false},
		"before some moment": {func(negotiated time.Time) time.Time { return negotiated.Add(time.Minute) }, "purged", true},
	} {
		t.Run(name, func(t *testing.T) {
			onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
				frontends := []*frontend{newFrontend(t, store, both(Options{})), newFrontend(t, store, both(Options{}))}
				time.Sleep(55 * time.Minute)
				client, negotiated := newClient(version), time.Now()
				frontends[0].wantResumed(t, client, false)
				time.Sleep(70 * time.Minute)
				frontends[0].wantResumed(t, client, true) // with a secret that was created after the negotiation
				visitor, secret := freeze(t, client), frontends[0].present(t).name
				store.purge(test.before(negotiated))
				settled()
				frontends = append(frontends, newFrontend(t, store, both(Options{})))
				settled()
				for _, each := range frontends {
					each.wantRefused(t, visitor, test.reason)
					if kept := each.present(t).name == secret; kept != test.kept {
						t.Fatal("the secret was kept: ", kept)
					}
				}
				visitor = frontends[0].newVisitor(t, version)
				for _, each := range frontends {
					each.wantResumed(t, visitor, true)
				}
			})
		})
	}
}

// While removals cannot be received, tickets resume for the grace period, and then no more until the stream is live again.
func TestRevocationGrace(t *testing.T) {
	for _, grace := range []time.Duration{0, -1, time.Minute} {
		for _, silent := range []bool{false, true} {
			withTickets(t, func(t *testing.T, store *fakeStore) {
				var log logBook
				frontend := newFrontend(t, store, Options{RevocationGrace: grace, Logger: log.logger()})
				settled()
				visitor := frontend.newVisitor(t, tls.VersionTLS13)
				if silent {
					store.change(func() { store.silent = true })
				} else {
					store.set(0, errUnavailableTest)
				}
				accepted := map[time.Duration]time.Duration{0: defaultRevocationGrace, -1: staleStream, time.Minute: time.Minute}[grace]
				time.Sleep(accepted - 2*time.Second)
				frontend.wantResumed(t, visitor, true)
				time.Sleep(4 * time.Second) // a response may be on its way
				for range 3 {
					frontend.wantRefused(t, visitor, "removals-unknown")
				}
				if log.count("stream of removals lost") != 1 {
					t.Fatal(log.lines.String())
				}
				store.set(0, nil)
				store.change(func() { store.silent = false })
				time.Sleep(2 * maxAgreementRetry)
				frontend.wantResumed(t, visitor, true)
				if log.count("stream of removals live") != 2 {
					t.Fatal(log.lines.String())
				}
			})
		}
	}
}

// Until it has received the removals for the first time, a frontend resumes nothing; a server that is too old for it is reported once.
func TestNoTicketsBeforeTheFirstRemovals(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		other := newFrontend(t, store, Options{})
		settled()
		visitor := other.newVisitor(t, tls.VersionTLS13)
		store.change(func() { store.old = true })
		var log logBook
		frontend := newFrontend(t, store, Options{Logger: log.logger()})
		time.Sleep(time.Minute)
		frontend.wantRefused(t, visitor, "removals-unknown")
		if log.count("too old") != 1 {
			t.Fatal(log.lines.String())
		}
		store.change(func() { store.old = false })
		time.Sleep(2 * maxAgreementRetry)
		frontend.wantResumed(t, visitor, true)
	})
}

// Beyond its maximum, a frontend forgets the removals and accepts nothing that was negotiated before.
func TestTooManyRemovals(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		var log logBook
		frontend := newFrontend(t, store, Options{Logger: log.logger()})
		settled()
		removals := frontend.sessions.tickets.removals
		removals.maximum = 5
		visitor := frontend.newVisitor(t, tls.VersionTLS13)
		for n := range byte(20) { // those whose time has passed do not count
			removals.add(storeKey{n}, time.Second)
			time.Sleep(time.Second)
		}
		frontend.wantResumed(t, visitor, true)
		for n := range byte(6) {
			removals.add(storeKey{n}, time.Hour)
		}
		frontend.wantRefused(t, visitor, "purged")
		frontend.wantResumed(t, frontend.newVisitor(t, tls.VersionTLS13), true)
		if log.count("too many removals") != 1 {
			t.Fatal(log.lines.String())
		}
	})
}

// A removal is never shortened, ends with its time, and takes no memory for long after.
func TestRemovalsEnd(t *testing.T) {
	withTickets(t, func(t *testing.T, _ *fakeStore) {
		removals := newRemovalSet(0, time.Now, quiet)
		removals.setLive()
		lineage := storeKey{1}
		removals.add(lineage, 2*time.Second)
		removals.add(lineage, time.Second)
		for n := range 3 * minRemovalSweep {
			if n == 2*minRemovalSweep {
				time.Sleep(time.Second)
			}
			removals.add(storeKey(append(binary.BigEndian.AppendUint64(nil, uint64(n+1)), make([]byte, 24)...)), time.Second)
		}
		if removals.refusal(lineage, time.Now()) != "revoked" || len(removals.keys) > 2*minRemovalSweep {
			t.Fatal("a removal was shortened, or others are still there: ", len(removals.keys))
		}
		time.Sleep(time.Second)
		if refusal := removals.refusal(lineage, time.Now()); refusal != "" {
			t.Fatal(refusal)
		}
	})
}

// A ticket of single use resumes once, at any frontend. So does the ticket that follows it.
func TestTicketsOfSingleUse(t *testing.T) {
	onVersionsOfTickets(t, func(t *testing.T, store *fakeStore, version uint16) {
		first, second := newFrontend(t, store, both(Options{SingleUse: true})), newFrontend(t, store, both(Options{SingleUse: true}))
		settled()
		client := newClient(version)
		first.wantResumed(t, client, false)
		old := freeze(t, client)
		for n := range 4 {
			[]*frontend{first, second}[n%2].wantResumed(t, client, true)
		}
		first.wantRefused(t, old, "replayed")
		second.wantRefused(t, old, "replayed")

		visitor := first.newVisitor(t, version)
		store.set(time.Millisecond, nil)
		var all sync.WaitGroup
		resumed := make(chan bool, 8)
		for n := range cap(resumed) {
			all.Go(func() { resumed <- []*frontend{first, second}[n%2].resumes(t, visitor) })
		}
		all.Wait()
		close(resumed)
		count := 0
		for each := range resumed {
			if each {
				count++
			}
		}
		if count != 1 {
			t.Fatal("resumed ", count, " times")
		}
	})
}

// No ticket of single use from before a purge resumes, even at a frontend that has not received the purge.
func TestSingleUseAfterAnUnknownPurge(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{SingleUse: true})
		settled()
		visitor := frontend.newVisitor(t, tls.VersionTLS13)
		time.Sleep(time.Second)
		store.change(func() { store.purged = time.Now() })
		frontend.wantRefused(t, visitor, "replayed")
		frontend.wantResumed(t, frontend.newVisitor(t, tls.VersionTLS13), true)
	})
}

// No ticket of single use from before a loss of the storage resumes, even at a frontend that does not know of the loss.
func TestSingleUseAfterAnUnknownLoss(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{SingleUse: true})
		settled()
		visitor := frontend.newVisitor(t, tls.VersionTLS13)
		before := awaitSecrets(t, frontend.sessions).name
		store.change(func() { clear(store.values) })
		frontend.wantRefused(t, visitor, "unknown-secret")
		settled()
		if awaitSecrets(t, frontend.sessions).name == before {
			t.Fatal("the lost secret was restored")
		}
		frontend.wantResumed(t, frontend.newVisitor(t, tls.VersionTLS13), true)
	})
}

// A ticket of single use resumes only after the store has recorded that; a handshake that cannot resume it does not spend it.
func TestSingleUseNeedsTheStore(t *testing.T) {
	for reason, test := range map[string]struct {
		delay time.Duration
		err   error
	}{
		"timeout":     {time.Hour, nil},
		"unavailable": {0, errUnavailableTest},
		"rejected":    {0, errTest},
		"limited":     {0, status.Error(codes.ResourceExhausted, "of the test")},
	} {
		t.Run(reason, func(t *testing.T) {
			withTickets(t, func(t *testing.T, store *fakeStore) {
				asks := newServer()
				asks.ClientAuth = tls.RequestClientCert
				frontend, other := newFrontend(t, store, Options{SingleUse: true}), newFrontendOf(t, asks, store, Options{SingleUse: true})
				settled()
				visitor := frontend.newVisitor(t, tls.VersionTLS13)
				other.wantRefused(t, visitor, "context-mismatch")
				store.set(test.delay, test.err)
				frontend.wantRefused(t, visitor, reason)
				if reason != "limited" {
					frontend.wantRefused(t, visitor, reason)
					frontend.wantRefused(t, visitor, reason)
					frontend.wantRefused(t, visitor, "breaker-open")
				}
				store.set(0, nil)
				time.Sleep(2 * maxProbePause)
				frontend.wantResumed(t, visitor, true)
				frontend.wantRefused(t, visitor, "replayed")
			})
		})
	}
}

// A server that would forget the use of a ticket before its end does not let it be used; that is reported once.
func TestShortClaims(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		var log logBook
		frontend := newFrontend(t, store, Options{SingleUse: true, Logger: log.logger()})
		settled()
		store.change(func() { store.maxTTL = time.Hour })
		for range 2 {
			frontend.wantRefused(t, frontend.newVisitor(t, tls.VersionTLS13), "rejected")
		}
		if log.count("keeps claims for less time") != 1 || frontend.sessions.BreakerOpen() {
			t.Fatal(log.lines.String())
		}
		visitor := frontend.newVisitor(t, tls.VersionTLS13)
		time.Sleep(time.Hour)
		frontend.wantResumed(t, visitor, true)
	})
}

// Early data of QUIC, which could be replayed, is accepted from tickets of single use only.
func TestEarlyDataNeedsSingleUse(t *testing.T) {
	for _, singleUse := range []bool{false, true} {
		withTickets(t, func(t *testing.T, store *fakeStore) {
			frontend := newFrontend(t, store, Options{SingleUse: singleUse})
			settled()
			client := newClient(tls.VersionTLS13)
			frontend.wantResumed(t, client, false)
			secret := frontend.present(t)
			plaintext, err := openTicket(secret.ticketKey(saltOf(ticket(t, client))).key, ticket(t, client))
			check(t, err)
			_, serialized, err := parseTicket(plaintext)
			check(t, err)
			session, err := tls.ParseSessionState(serialized)
			check(t, err)
			session.EarlyData = true
			full := tls.ConnectionState{Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_128_GCM_SHA256, ServerName: "shop.example"}
			offer := &connection{sessions: frontend.sessions, config: newServer()}
			issued, err := offer.wrap(full, session)
			check(t, err)
			again, err := offer.wrap(full, session)
			check(t, err)
			if bytes.Equal(issued, again) || !bytes.Equal(lineageIn(t, secret, issued), lineageIn(t, secret, again)) {
				t.Fatal("two tickets of a connection have one salt, or two lineages")
			}
			full.CipherSuite = binary.BigEndian.Uint16(serialized[3:])
			found, err := (&connection{sessions: frontend.sessions, config: newServer()}).unwrap(issued, full)
			check(t, err)
			if found == nil || found.EarlyData != singleUse {
				t.Fatal(found, frontend.sessions.Stats())
			}
		})
	}
}

func saltOf(ticket []byte) []byte { return ticket[keyNameSize:ticketHead] }

func lineageIn(t *testing.T, secret *ticketSecret, ticket []byte) []byte {
	t.Helper()
	plaintext, err := openTicket(secret.ticketKey(saltOf(ticket)).key, ticket)
	check(t, err)
	state, _, err := parseTicket(plaintext)
	check(t, err)
	return state.lineage[:]
}

func TestTicketOptions(t *testing.T) {
	for name, options := range map[string]Options{
		"mode":                  {Sessions: "cookies"},
		"no tickets":            {TicketsTLS12: true},
		"short rotation":        {Sessions: TicketSessions, Rotation: time.Second - 1},
		"long rotation":         {Sessions: TicketSessions, Rotation: maxRotation + time.Second},
		"parts of a second":     {Sessions: TicketSessions, Rotation: 1500 * time.Millisecond},
		"long removals":         {Sessions: TicketSessions, Lifetime: maxRemoval},
		"a short rotation only": {Rotation: time.Millisecond},
	} {
		options.Namespace, options.Keyring = "shop", testKeyring(t)
		if sessions, err := Wrap(newServer(), newFakeStore(), options); err == nil {
			_ = sessions.Close()
			t.Error(name, ": accepted")
		}
	}
	complete := Options{Namespace: "shop", Keyring: testKeyring(t)}
	check(t, complete.complete())
	if complete.Sessions != StoredSessions || complete.Rotation != time.Hour || complete.RevocationGrace != 5*time.Minute {
		t.Error(complete)
	}
}

// Without tickets nothing is agreed on, and no removals are followed.
func TestStoredModeMakesNoAgreement(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{Sessions: StoredSessions})
		frontend.wantResumed(t, newClient(tls.VersionTLS13), false)
		flush(t, frontend.sessions)
		if want := map[string]int{"Batch": 1}; !maps.Equal(store.calls, want) {
			t.Fatal(store.calls)
		}
	})
}
