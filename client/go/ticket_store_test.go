package resumed

import (
	"bytes"
	"context"
	"crypto/tls"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

// ticketServer serves config with fleet tickets in both versions, over TCP with a real store, and returns once it has its secrets
// and removals.
func ticketServer(t *testing.T, config *tls.Config, store grpc.ClientConnInterface, options Options) (*Installation, string) {
	t.Helper()
	options.Sessions, options.TicketsTLS12 = TicketSessions, true
	sessions := wrap(t, config, store, options)
	awaitSecrets(t, sessions)
	eventually(t, "a stream of removals", func() bool {
		return sessions.tickets.removals.refusal(storeKey{}, sessions.now()) == ""
	})
	return sessions, listen(t, config)
}

// awaitSecrets waits for the secrets of the present and the next epoch, and returns the former.
func awaitSecrets(t *testing.T, sessions *Installation) (present *ticketSecret) {
	t.Helper()
	key, tickets := sessions.options.Keyring.current()[0], sessions.tickets
	tickets.agreement.want()
	eventually(t, "agreement on secrets", func() bool {
		epoch := epochAt(sessions.now(), tickets.rotation)
		present = tickets.secrets.agreedFor(key, epoch)
		return present != nil && tickets.secrets.agreedFor(key, epoch.next()) != nil
	})
	return present
}

// Frontends resume each other's tickets, and the handshakes make no call.
func TestTicketsWithAStore(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		var calls atomic.Int32
		counts := intercept(func(method string, _ any) {
			if method != "Batch" { // the agreement's
				calls.Add(1)
			}
		})
		var addresses [2]string
		var sessions [2]*Installation
		for n := range addresses {
			sessions[n], addresses[n] = ticketServer(t, newServer(), store.connect(t, counts), Options{})
		}
		client, before := newClient(version), calls.Load()
		for n := range 10 {
			if got := resumes(t, addresses[n%2], client); got != (n > 0) {
				t.Fatalf("connection %d: resumed %v: %+v", n, got, sessions[n%2].Stats())
			}
		}
		if calls.Load() != before {
			t.Fatal("calls: ", calls.Load()-before)
		}
	})
}

// With each epoch there is a new secret, the tickets of earlier epochs resume until their end, and secrets are erased after it.
func TestRotationWithAStore(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		clock := &clock{}
		var addresses [2]string
		var sessions [2]*Installation
		for n := range addresses {
			config := newServer()
			config.Time = clock.now
			sessions[n], addresses[n] = ticketServer(t, config, store.connect(t), Options{Namespace: "rotation"})
		}
		client := newClient(version)
		client.Time = clock.now
		resumes(t, addresses[0], client)
		first := awaitSecrets(t, sessions[0])
		old := freeze(t, client)
		for n := range 6 {
			if n < 2 && !resumes(t, addresses[n%2], old) {
				t.Fatal(n, sessions[n%2].Stats())
			}
			clock.forward(50 * time.Minute)
			if one, other := awaitSecrets(t, sessions[0]), awaitSecrets(t, sessions[1]); one.name != other.name || n > 0 && one.name == first.name {
				t.Fatal(n, ": no new secret, or two")
			}
			visitor := newClient(version)
			visitor.Time = clock.now
			resumes(t, addresses[n%2], visitor)
			if !resumes(t, addresses[1-n%2], visitor) {
				t.Fatal(n, sessions[1-n%2].Stats())
			}
		}
		if resumes(t, addresses[0], old) {
			t.Fatal("resumed beyond its end")
		}
		tickets := sessions[0].tickets
		tickets.agreement.want()
		eventually(t, "erasure of the secret", func() bool { return tickets.secrets.valueOf(first) == nil })
		if !bytes.Equal(first.key, make([]byte, ticketKeySize)) {
			t.Fatal("the secret is still in memory")
		}
	})
}

// When the store is killed, no handshake fails and every ticket resumes, until the grace period is over.
func TestTicketsOutliveTheStore(t *testing.T) {
	withOwnStores(t, func(t *testing.T, store *realStore, version uint16) {
		var addresses [2]string
		var sessions [2]*Installation
		for n := range addresses {
			sessions[n], addresses[n] = ticketServer(t, newServer(), store.connect(t), Options{})
		}
		check(t, store.process.Kill())
		client := newClient(version)
		for n := range 20 {
			if got := resumes(t, addresses[n%2], client); got != (n > 0) {
				t.Fatalf("connection %d: resumed %v: %+v", n, got, sessions[n%2].Stats())
			}
		}
		removals := sessions[0].tickets.removals
		eventually(t, "the end of the grace period", func() bool {
			removals.mu.Lock()
			removals.liveAt = time.Now().Add(-defaultRevocationGrace) // again, if a response was on its way
			removals.mu.Unlock()
			return !resumes(t, addresses[0], client)
		})
		wantCounts(t, "refused", sessions[0].Stats().TicketsRefused, map[string]uint64{"removals-unknown": 1})
	})
}

// No frontend resumes a lineage after its removal or a purge, including frontends that start later.
func TestRemovalsWithAStore(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		var id atomic.Pointer[[]byte] // of the last ticket
		options := Options{Namespace: "removals", Issued: func(_ tls.ConnectionState, issued []byte) { id.Store(&issued) }}
		first, address := ticketServer(t, newServer(), store.connect(t), options)
		second, elsewhere := ticketServer(t, newServer(), store.connect(t), Options{Namespace: "removals"})
		client := newClient(version)
		resumes(t, address, client)
		removed := freeze(t, client)
		first.Remove(*id.Load())
		if resumes(t, address, removed) {
			t.Fatal("resumed here")
		}
		flush(t, first)
		eventually(t, "the removal elsewhere", func() bool { return !resumes(t, elsewhere, removed) })
		_, later := ticketServer(t, newServer(), store.connect(t), Options{Namespace: "removals"})
		if resumes(t, later, removed) || second.Stats().TicketsRefused["revoked"] != 1 {
			t.Fatal("resumed at a frontend that started later, or for another reason: ", second.Stats())
		}

		for _, before := range []*timestamppb.Timestamp{nil, timestamppb.Now()} {
			visitor := newClient(version)
			resumes(t, address, visitor)
			purged := freeze(t, visitor)
			if !resumes(t, elsewhere, purged) {
				t.Fatal("not resumed before the purge: ", second.Stats())
			}
			if before != nil {
				before = timestamppb.Now()
			}
			admin := pb.NewAdminServiceClient(store.connect(t))
			_, err := admin.Purge(t.Context(), &pb.PurgeRequest{Namespace: "removals", IssuedBeforeTime: before})
			check(t, err)
			for _, each := range []string{address, elsewhere, later} {
				eventually(t, "the purge", func() bool { return !resumes(t, each, purged) })
			}
			_, latest := ticketServer(t, newServer(), store.connect(t), Options{Namespace: "removals"})
			if resumes(t, latest, purged) {
				t.Fatal("resumed at a frontend that started after the purge")
			}
			eventually(t, "resumption after the purge", func() bool {
				visitor := newClient(version)
				resumes(t, address, visitor)
				return resumes(t, elsewhere, visitor) && resumes(t, latest, visitor)
			})
		}
	})
}

// A store that has lost its storage gets the removals again, and a frontend that starts later has them.
func TestRemovalsOutliveTheStorage(t *testing.T) {
	withOwnStores(t, func(t *testing.T, store *realStore, version uint16) {
		var id atomic.Pointer[[]byte]
		options := Options{Issued: func(_ tls.ConnectionState, issued []byte) { id.Store(&issued) }}
		first, address := ticketServer(t, newServer(), store.connect(t), options)
		client := newClient(version)
		resumes(t, address, client)
		removed := freeze(t, client)
		first.Remove(*id.Load())
		flush(t, first)
		secret := awaitSecrets(t, first)
		store.stop()
		empty := ownStoreAt(t, store.target)
		second, elsewhere := ticketServer(t, newServer(), empty.connect(t), Options{})
		eventually(t, "the removal in the empty store", func() bool { return second.tickets.removals.count() == 1 })
		second.tickets.secrets.add(secret)
		if resumes(t, elsewhere, removed) {
			t.Fatal("resumed")
		}
		wantCounts(t, "refused", second.Stats().TicketsRefused, map[string]uint64{"revoked": 1})
	})
}

// No ticket of single use resumes after a loss of the storage, which had the record of its use.
func TestSingleUseAndALossOfTheStorage(t *testing.T) {
	withOwnStores(t, func(t *testing.T, store *realStore, version uint16) {
		frontend, address := ticketServer(t, newServer(), store.connect(t), Options{SingleUse: true})
		client := newClient(version)
		resumes(t, address, client)
		used := freeze(t, client)
		if !resumes(t, address, used) {
			t.Fatal("not resumed: ", frontend.Stats())
		}
		before := awaitSecrets(t, frontend)
		store.stop()
		ownStoreAt(t, store.target)
		eventually(t, "another secret", func() bool { return awaitSecrets(t, frontend).name != before.name })
		if resumes(t, address, used) {
			t.Fatal("resumed twice")
		}
		client = newClient(version)
		if resumes(t, address, client) || !resumes(t, address, client) {
			t.Fatal("no ticket since then resumes: ", frontend.Stats())
		}
	})
}

// With single use, of two frontends that are offered one ticket at once, one resumes it; also where the key exchange is tried again.
func TestTicketsOfSingleUseRaced(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		var claims atomic.Int32 // those that were stored
		counts := intercept(func(_ string, reply any) {
			batch, _ := reply.(*pb.BatchResponse)
			if results := batch.GetResults(); len(results) == 2 && results[0].GetPut() != nil && results[1].GetGet() != nil {
				claims.Add(1)
			}
		})
		var addresses [2]string
		for n := range addresses {
			config := newServer()
			config.CurvePreferences = []tls.CurveID{tls.CurveP384}
			_, addresses[n] = ticketServer(t, config, store.connect(t, counts), Options{SingleUse: true})
		}
		const rounds = 20
		for round := range rounds {
			client := newClient(version)
			client.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP384} // a client brings a key for the first of its groups only
			resumes(t, addresses[0], client)
			client = freeze(t, client)
			if resumed := offerAtOnce(t, addresses, client); resumed != 1 {
				t.Fatalf("round %d: resumed %d times", round, resumed)
			}
		}
		if claims.Load() != rounds {
			t.Fatal(claims.Load(), " claims")
		}
	})
}

// However many frontends agree at once, there is one secret for each epoch, and each frontend makes three calls at most.
func TestAThousandFrontendsAgree(t *testing.T) {
	store := sharedStore(t)
	keyring := testKeyring(t)
	conns := make([]*grpc.ClientConn, 20) // each carries a hundred calls at once
	for n := range conns {
		conns[n] = store.connect(t)
	}
	agreements := make([]*agreement, 1000)
	counters := make([]*countingStore, len(agreements))
	begin := make(chan struct{})
	var all sync.WaitGroup
	for n := range agreements {
		counters[n] = &countingStore{SessionStoreServiceClient: pb.NewSessionStoreServiceClient(conns[n%len(conns)])}
		secrets, removals := &secrets{}, newRemovalSet(0, time.Now, quiet)
		agreements[n] = &agreement{
			store: counters[n], namespace: "thousand", keyring: keyring, rotation: time.Hour, lifetime: time.Hour, logger: quiet, now: time.Now,
			secrets: secrets, removals: removals, restores: true, wanted: make(chan struct{}, 1),
		}
		all.Go(func() {
			<-begin
			if err := agreements[n].agree(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	close(begin)
	all.Wait()
	names, most := map[keyName]bool{}, 0
	for n, each := range agreements {
		present := epochAt(time.Now(), time.Hour)
		for _, epoch := range []epoch{present, present.next()} {
			if secret := each.secrets.agreedFor(keyring.current()[0], epoch); secret != nil {
				names[secret.name] = true
			}
		}
		most = max(most, counters[n].calls)
	}
	t.Logf("%d frontends, %d secrets, at most %d calls each", len(agreements), len(names), most)
	if len(names) > 3 || most > 3 { // three if an epoch ended in between
		t.Fatal(len(names), " secrets, ", most, " calls")
	}
}

// A countingStore counts the calls of one frontend. They have no deadline: a loaded machine is slow.
type countingStore struct {
	pb.SessionStoreServiceClient

	calls int
}

func (s *countingStore) Batch(ctx context.Context, request *pb.BatchRequest, options ...grpc.CallOption) (*pb.BatchResponse, error) {
	s.calls++
	return s.SessionStoreServiceClient.Batch(context.WithoutCancel(ctx), request, options...)
}

// The server forgets the removals and claims of a fleet no earlier than it has to.
func TestLargestLives(t *testing.T) {
	store := sharedStore(t)
	lifetime := maxRemoval - 24*time.Hour
	sessions, _ := ticketServer(t, newServer(), store.connect(t), Options{Namespace: "long", Lifetime: lifetime, Rotation: 24 * time.Hour})
	sessions.Remove(ticketID(lineage{1}, time.Now().Add(lifetime)))
	flush(t, sessions)
	wantCounts(t, "removals", sessions.Stats().Removals, map[string]uint64{"application": 1})
}
