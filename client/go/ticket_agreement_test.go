package resumed

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var errUnavailableTest = status.Error(codes.Unavailable, "of the test")

// At its start a frontend looks up the secrets of all epochs whose tickets may live, and proposes those of the present epoch and the
// next one.
func TestAgreementAtTheStart(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		first := newFrontend(t, store, Options{})
		settled()
		second := newFrontend(t, store, Options{})
		settled()
		// Four epochs of an hour, with tickets of two hours, may live beside the next one: this one and three before.
		gets := strings.Repeat("Get ", 5)
		var batches []string
		for _, kinds := range store.batches {
			batches = append(batches, strings.Join(kinds, " ")+" ")
		}
		if want := []string{gets, "Put Put ", gets}; !slices.Equal(batches, want) {
			t.Fatalf("%q", batches)
		}
		if first.present(t).name != second.present(t).name || len(store.snapshot()) != 2 {
			t.Fatal("the secrets differ")
		}
	})
}

// However many frontends start at once, there is one secret for each epoch, after three calls of each at most.
func TestFrontendsThatStartAtOnceAgree(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		store.set(time.Millisecond, nil)
		frontends := make([]*frontend, 100)
		for n := range frontends {
			frontends[n] = newFrontend(t, store, Options{})
		}
		time.Sleep(time.Second)
		for _, each := range frontends {
			if each.present(t).name != frontends[0].present(t).name {
				t.Fatal("the secrets differ")
			}
		}
		if calls := store.called("Batch"); len(store.snapshot()) != 2 || calls > 3*len(frontends) {
			t.Fatal(len(store.snapshot()), " secrets, ", calls, " calls")
		}
	})
}

// Through many rotations tickets resume at every frontend, clocks that differ by 50 minutes or not, and each frontend has the secrets
// whose tickets may live and no others. A secret that ends is overwritten.
func TestRotation(t *testing.T) {
	for _, difference := range []time.Duration{0, 50 * time.Minute} {
		withTickets(t, func(t *testing.T, store *fakeStore) {
			options := Options{Rotation: time.Hour}
			frontends := []*frontend{newFrontend(t, store, options), newFrontendOf(t, later(difference), store, options)}
			settled()
			secrets := map[keyName]*ticketSecret{}
			for range 120 {
				for n, each := range frontends {
					client := newClient(tls.VersionTLS13)
					each.wantResumed(t, client, false)
					frontends[1-n].wantResumed(t, client, true)
					each.wantResumed(t, client, true)
					present := each.present(t)
					secrets[present.name] = present
				}
				time.Sleep(5 * time.Minute)
				settled()
			}
			for _, each := range frontends {
				stats := each.sessions.Stats()
				if total(stats.TicketsRefused) != 0 || stats.TicketsIssued["held-over"] != 0 || stats.TicketsResumed["current"] == 0 {
					t.Fatal(difference, stats)
				}
				if held := len(each.sessions.tickets.secrets.byName); held != 5 && held != 4 {
					t.Fatal(held, " secrets")
				}
			}
			if difference != 0 && frontends[0].sessions.Stats().TicketsResumed["next"] == 0 {
				t.Fatal("no frontend was ahead")
			}
			erased := 0
			for _, secret := range secrets {
				if secret.notAfter.Add(difference).Before(time.Now()) {
					erased++
					if !bytes.Equal(secret.key, make([]byte, ticketKeySize)) || secret.sealed != nil {
						t.Fatal("a secret is in memory after its end")
					}
				}
			}
			if erased < 5 {
				t.Fatal(erased, " secrets have ended")
			}
		})
	}
}

// The secret of the next epoch is there after a sixth of the epoch.
func TestTheNextSecretIsAgreedOnEarly(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		for n := range 5 {
			each := newFrontend(t, store, Options{Rotation: 2 * time.Hour, Namespace: fmt.Sprint("fleet-", n)})
			for range 3 {
				present := epochAt(time.Now(), each.sessions.options.Rotation)
				time.Sleep(time.Until(time.Unix(int64(present.next().start), 0)) + 20*time.Minute)
				present = epochAt(time.Now(), each.sessions.options.Rotation)
				if each.sessions.tickets.secrets.agreedFor(testKeyring(t).current()[0], present.next()) == nil {
					t.Fatal("there is no secret of the next epoch")
				}
			}
		}
	})
}

// While the store does not answer, the latest secret stays in use until its end, and handshakes go on after that.
func TestAnOutageHoldsSecretsOver(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		var log logBook
		options := Options{Rotation: time.Minute, Lifetime: time.Minute, RevocationGrace: 24 * time.Hour, Logger: log.logger()}
		frontends := []*frontend{newFrontend(t, store, options), newFrontend(t, store, options)}
		settled()
		store.set(0, errUnavailableTest)
		time.Sleep(2*time.Minute + 10*time.Second) // beyond the epoch that was the next one
		client := newClient(tls.VersionTLS13)
		frontends[0].wantResumed(t, client, false)
		frontends[1].wantResumed(t, client, true)
		frontends[0].wantResumed(t, client, true)
		wantCounts(t, "issued", frontends[0].sessions.Stats().TicketsIssued, map[string]uint64{"held-over": 2})
		wantCounts(t, "resumed", frontends[1].sessions.Stats().TicketsResumed, map[string]uint64{"previous": 1})
		time.Sleep(2 * time.Minute)
		frontends[0].wantResumed(t, client, false)
		frontends[0].wantResumed(t, client, false)
		wantCounts(t, "withheld", frontends[0].sessions.Stats().TicketsWithheld, map[string]uint64{"no-secret": 2})
		if lines := log.count("no agreement"); lines != 2 {
			t.Fatal(lines, " lines of two frontends")
		}
		store.set(0, nil)
		time.Sleep(maxAgreementRetry)
		frontends[0].wantResumed(t, client, false)
		frontends[1].wantResumed(t, client, true)
		if lines := log.count("agreement on ticket secrets restored"); lines != 2 {
			t.Fatal(lines, " lines of two frontends")
		}
	})
}

// A frontend that starts before its store makes full handshakes.
func TestNoSecretYet(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		store.set(0, errUnavailableTest)
		frontend := newFrontend(t, store, Options{})
		client := newClient(tls.VersionTLS13)
		for range 3 {
			frontend.wantResumed(t, client, false)
		}
		wantCounts(t, "withheld", frontend.sessions.Stats().TicketsWithheld, map[string]uint64{"no-secret": 3})
		wantCounts(t, "misses", frontend.sessions.Stats().Misses, map[string]uint64{foreignID: 2})
		store.set(0, nil)
		time.Sleep(maxAgreementRetry)
		frontend.wantResumed(t, client, false)
		frontend.wantResumed(t, client, true)
	})
}

// If the value at the address of a secret cannot be opened, frontends try the next generation, up to a number of generations.
func TestUselessValuesAreSkipped(t *testing.T) {
	for name, useless := range map[string]func(key *fleetKey, address storeKey) []byte{
		"garbage": func(*fleetKey, storeKey) []byte { return []byte("garbage") },
		"a sealed value of no secret": func(key *fleetKey, address storeKey) []byte {
			return key.seal(address, make([]byte, secretEncoding), time.Now().Add(time.Hour), thisProcess.nonce())
		},
		"of another key": func(_ *fleetKey, address storeKey) []byte {
			return newFleetKey(bytes.Repeat([]byte{7}, keySize)).seal(address, make([]byte, secretEncoding), time.Now(), thisProcess.nonce())
		},
	} {
		t.Run(name, func(t *testing.T) {
			withTickets(t, func(t *testing.T, store *fakeStore) {
				var log logBook
				key := testKeyring(t).current()[0]
				present := epochAt(time.Now(), time.Hour)
				fill := func(generations uint8) {
					for generation := range generations {
						address := key.secretAddress("shop", present.ofGeneration(generation))
						store.replace(address, useless(key, address))
					}
				}
				fill(maxGenerations)
				frontends := []*frontend{newFrontend(t, store, Options{Logger: log.logger()}), newFrontend(t, store, Options{})}
				time.Sleep(time.Minute)
				client := newClient(tls.VersionTLS13)
				frontends[0].wantResumed(t, client, false)
				if withheld := frontends[0].sessions.Stats().TicketsWithheld["no-secret"]; withheld != 1 || log.count("generations") != 1 {
					t.Fatal(withheld, log.count("generations"))
				}
				last := key.secretAddress("shop", present.ofGeneration(maxGenerations-1))
				store.replace(last, nil)
				time.Sleep(maxAgreementRetry)
				frontends[0].wantResumed(t, client, false)
				frontends[1].wantResumed(t, client, true)
				if frontends[0].present(t).address != last {
					t.Fatal("another generation")
				}
			})
		})
	}
}

// A secret that an operator removes ends everywhere at once, and the next generation follows it. A frontend that starts later agrees.
func TestRemovedSecret(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontends := []*frontend{newFrontend(t, store, Options{}), newFrontend(t, store, Options{})}
		settled()
		visitor := frontends[0].newVisitor(t, tls.VersionTLS13)
		old := frontends[0].present(t)
		store.remove(old.address, 5*time.Hour)
		settled()
		frontends = append(frontends, newFrontend(t, store, Options{}))
		settled()
		for _, each := range frontends {
			each.wantRefused(t, visitor, "revoked")
			if present := each.present(t); present.epoch != old.epoch.ofGeneration(1) || present.name != frontends[0].present(t).name {
				t.Fatal(present.epoch)
			}
		}
		if !bytes.Equal(old.key, make([]byte, ticketKeySize)) {
			t.Fatal("the secret is still in memory")
		}
	})
}

// A secret that was removed or purged is not used, even if a Get returned it before that.
func TestSecretsThatHaveEndedAreNotUsed(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		for name, end := range map[string]func(*removalSet, *ticketSecret){
			"removed": func(removals *removalSet, secret *ticketSecret) { removals.add(secret.address, time.Hour) },
			"purged":  func(removals *removalSet, secret *ticketSecret) { removals.addPurge(secret.created.Add(1)) },
		} {
			frontend := newFrontend(t, store, Options{Namespace: name})
			settled()
			secret, agreement := frontend.present(t), frontend.sessions.tickets.agreement
			value, bid := store.snapshot()[secret.address], &bid{key: testKeyring(t).current()[0], epoch: secret.epoch}
			if agreement.open(bid, value) == nil {
				t.Fatal(name, ": does not open")
			}
			if end(agreement.removals, secret); agreement.open(bid, value) != nil {
				t.Error(name, ": opens")
			}
		}
	})
}

// A secret that was removed while a frontend received no removals ends with the next comparison.
func TestRemovedSecretIsNoticedByComparison(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{Rotation: 2 * time.Hour})
		settled()
		old := frontend.present(t)
		store.replace(old.address, nil)
		store.change(func() { store.removed[string(old.address[:])] = true })
		time.Sleep(61 * time.Minute)
		settled()
		if present := frontend.present(t); present.epoch != old.epoch.ofGeneration(1) {
			t.Fatal(present.epoch)
		}
	})
}

// A store that lost a secret gets it again.
func TestLostSecretIsStoredAgain(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{Rotation: 2 * time.Hour})
		settled()
		secret := frontend.present(t)
		value := store.snapshot()[secret.address]
		store.replace(secret.address, nil)
		time.Sleep(61 * time.Minute)
		settled()
		if again := store.snapshot()[secret.address]; !bytes.Equal(again, value) || frontend.present(t) != secret {
			t.Fatal("the store has no secret, or another one")
		}
	})
}

// Two secrets for one epoch, after a failover of the store: both open, and that of the store encrypts. The first ticket of a secret that
// a frontend does not have makes it look the secret up.
func TestTwoSecretsForOneEpochHeal(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		first := newFrontend(t, store, Options{})
		settled()
		old := first.newVisitor(t, tls.VersionTLS13)
		secret := first.present(t)
		store.replace(secret.address, nil)
		second := newFrontend(t, store, Options{})
		settled()
		visitor := second.newVisitor(t, tls.VersionTLS13)
		if first.present(t).name == second.present(t).name {
			t.Fatal("there is only one secret")
		}
		first.wantRefused(t, visitor, "unknown-secret")
		settled()
		first.wantResumed(t, visitor, true)
		first.wantResumed(t, old, true)
		if first.present(t).name != second.present(t).name {
			t.Fatal("frontends encrypt with different secrets")
		}
		calls := store.called("Batch")
		for range 20 { // the store has no such secret any more
			second.wantRefused(t, old, "unknown-secret")
			settled()
			time.Sleep(unknownNamePause / 10)
		}
		if calls = store.called("Batch") - calls; calls != 2 {
			t.Fatal(calls, " look-ups in two seconds")
		}
	})
}

// A key name that the fleet did not make costs no call.
func TestInventedNamesAreNoCall(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{})
		settled()
		calls := store.called("Batch")
		name := frontend.present(t).name
		connection := &connection{sessions: frontend.sessions, config: newServer()}
		for n := range keyNameSize {
			ticket := make([]byte, minTicket)
			copy(ticket, name[:])
			ticket[n]++
			session, err := connection.unwrap(ticket, tls.ConnectionState{Version: tls.VersionTLS13})
			if session != nil || err != nil {
				t.Fatal(session, err)
			}
		}
		settled()
		wantCounts(t, "misses", frontend.sessions.Stats().Misses, map[string]uint64{foreignID: keyNameSize})
		if store.called("Batch") != calls {
			t.Fatal("an invented name reached the store")
		}
	})
}

// A keyring with a new first key makes secrets of its own; those of the old key open as long as the keyring lists it.
func TestTicketsAndKeyRotation(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		one, two := bytes.Repeat([]byte{1}, keySize), bytes.Repeat([]byte{2}, keySize)
		rotated, err := NewKeyring(one)
		check(t, err)
		rotate := func(secrets ...[]byte) {
			next, err := NewKeyring(secrets...)
			check(t, err)
			rotated.keys.Store(next.keys.Load())
		}
		added, err := NewKeyring(one, two)
		check(t, err)
		first, second := newFrontend(t, store, Options{Keyring: rotated}), newFrontend(t, store, Options{Keyring: added})
		settled()
		old := first.newVisitor(t, tls.VersionTLS13)
		rotate(two, one)
		first.wantResumed(t, old, true)
		settled()
		visitor := first.newVisitor(t, tls.VersionTLS13)
		first.wantResumed(t, old, true)
		second.wantRefused(t, visitor, "unknown-secret")
		settled()
		second.wantResumed(t, visitor, true)
		secret := first.sessions.tickets.secrets.agreedFor(newFleetKey(one), epochAt(time.Now(), time.Hour))
		rotate(two)
		first.wantResumed(t, old, false)
		wantCounts(t, "misses", first.sessions.Stats().Misses, map[string]uint64{foreignID: 1})
		first.wantResumed(t, visitor, true)
		time.Sleep(keyringLook)
		settled()
		if !bytes.Equal(secret.key, make([]byte, ticketKeySize)) {
			t.Fatal("the secret of a retired key is still in memory")
		}
	})
}

// Close erases all secrets; connections go on without resumption.
func TestTicketsAfterClose(t *testing.T) {
	withTickets(t, func(t *testing.T, store *fakeStore) {
		frontend := newFrontend(t, store, Options{})
		settled()
		client := newClient(tls.VersionTLS13)
		frontend.wantResumed(t, client, false)
		secret := frontend.present(t)
		check(t, frontend.sessions.Close())
		for range 3 {
			frontend.wantResumed(t, client, false)
		}
		if !bytes.Equal(secret.key, make([]byte, ticketKeySize)) {
			t.Fatal("the secret is still in memory")
		}
	})
}
