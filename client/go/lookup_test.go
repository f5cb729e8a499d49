package resumed

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var testKey = storeKey{1, 2, 3}

// inBubble runs test with a wrapped config, a fake store, and a clock that does not wait.
func inBubble(t *testing.T, options Options, test func(t *testing.T, sessions *Installation, store *fakeStore)) {
	t.Helper()
	options.Deadline = defaultDeadline
	synctest.Test(t, func(t *testing.T) {
		store := newFakeStore()
		test(t, wrap(t, newServer(), store, options), store)
	})
}

// A look-up ends before its deadline, however long the store hangs.
func TestHungStoreCostsTheDeadline(t *testing.T) {
	for _, singleUse := range []bool{false, true} {
		inBubble(t, Options{SingleUse: singleUse}, func(t *testing.T, s *Installation, store *fakeStore) {
			store.set(time.Hour, nil)
			started := time.Now()
			if answer := s.lookUp(testKey, true, s.options.Deadline); answer.reason != "timeout" {
				t.Fatal(answer.reason)
			}
			if took := time.Since(started); took > defaultDeadline {
				t.Fatal("took ", took)
			}
		})
	}
}

// After three failures in a row handshakes do not ask; a trial in the background finds the store again.
func TestBreaker(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		unwrap := func() {
			connection := &connection{sessions: s, config: newServer()}
			session, err := connection.unwrap(s.options.Keyring.issueID("shop", s.now()), tls.ConnectionState{})
			if session != nil || err != nil {
				t.Fatal(session, err)
			}
		}
		store.set(0, status.Error(codes.Unavailable, "of the test"))
		for range 10 {
			unwrap()
		}
		if got, want := s.Stats().Misses, (map[string]uint64{"unavailable": 3, "breaker-open": 7}); !maps.Equal(got, want) || !s.BreakerOpen() {
			t.Fatal(got)
		}
		// The first trial comes early, further ones less and less often.
		for _, pause := range []time.Duration{50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, maxProbePause, maxProbePause} {
			asked := store.called("Get")
			time.Sleep(pause - time.Nanosecond)
			synctest.Wait()
			if store.called("Get") != asked {
				t.Fatal("a trial before ", pause)
			}
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			if store.called("Get") != asked+1 {
				t.Fatal("no trial after ", pause)
			}
		}
		store.set(0, nil)
		time.Sleep(maxProbePause)
		synctest.Wait()
		if s.BreakerOpen() {
			t.Fatal("still resting")
		}
		store.set(0, errTest)
		unwrap()
		if !s.BreakerOpen() || s.Stats().Misses["rejected"] != 1 {
			t.Fatal("one failure after a trial did not open it")
		}
	})
}

// Look-ups that were under way together in a moment in which the store did not answer are one failure.
func TestCallsThatFailTogetherAreOneFailure(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		lookUp := func(n byte) { s.lookUp(storeKey{n}, false, s.options.Deadline) }
		store.set(60*time.Millisecond, nil)
		for n := range byte(20) {
			go lookUp(n)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(defaultDeadline)
		synctest.Wait()
		if s.BreakerOpen() {
			t.Fatal("a moment opened the breaker")
		}
		for n := range byte(2) {
			lookUp(n)
		}
		if !s.BreakerOpen() {
			t.Fatal("three failures one after the other did not open it")
		}
	})
}

// When this process stands still, and notices only then that its calls are late, that is no failure of the store.
func TestStandstillIsNoFailure(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.stall = defaultDeadline + minCallTime
		for range 2 * breakerFailures {
			if answer := s.lookUp(testKey, false, s.options.Deadline); answer.reason != "timeout" {
				t.Fatal(answer.reason)
			}
			synctest.Wait()
			time.Sleep(time.Second)
		}
		if s.BreakerOpen() || s.breaker.failures != 0 {
			t.Fatal("counted: ", s.breaker.failures)
		}
	})
}

// A further ask that is late had little time, and one that has too little is not made: neither is a failure of the store.
func TestLittleTimeIsNoFailure(t *testing.T) {
	inBubble(t, Options{SingleUse: true}, func(t *testing.T, s *Installation, store *fakeStore) {
		for range 2 * breakerFailures {
			time.AfterFunc(30*time.Millisecond, func() { store.set(time.Hour, nil) })
			store.set(0, nil)
			if answer := s.lookUp(testKey, true, s.options.Deadline); answer.reason != "timeout" {
				t.Fatal(answer.reason)
			}
			if reason := s.take(testKey, 2*minCallTime); reason != "timeout" {
				t.Fatal(reason)
			}
			asked := store.called("Get") + store.called("Take")
			if answer := s.lookUp(testKey, true, minCallTime-1); answer.reason != "timeout" {
				t.Fatal(answer.reason)
			}
			if reason := s.take(testKey, minCallTime-1); reason != "timeout" {
				t.Fatal(reason)
			}
			if store.called("Get")+store.called("Take") != asked {
				t.Fatal("asked with too little time")
			}
		}
		if s.BreakerOpen() || s.breaker.failures != 0 {
			t.Fatal("counted: ", s.breaker.failures)
		}
	})
}

// Batches that a slow store carries out do not hide that its look-ups are late.
func TestSlowBatchesDoNotHideLateLookups(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(100*time.Millisecond, nil)
		for n := range byte(breakerFailures) {
			s.sender.submit(item{key: storeKey{n}, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
			s.lookUp(testKey, false, s.options.Deadline)
			time.Sleep(time.Second)
		}
		if stored := s.Stats().Puts["stored"]; stored != breakerFailures || !s.BreakerOpen() {
			t.Fatal(stored, s.BreakerOpen())
		}
	})
}

// A session is sent at once, those that come during the call together, and after a Batch of several the next one gathers more.
func TestBatches(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(time.Millisecond, nil)
		start := time.Now()
		for _, step := range []struct {
			at             time.Duration
			submit, called int // sessions, and Batches that have begun by then
		}{
			{0, 1, 1},
			{500 * time.Microsecond, busyOperations - 1, 1},
			{1500 * time.Microsecond, busyOperations, 2},
			{2500 * time.Microsecond, 1, 3},
			{4 * time.Millisecond, 1, 3},
			{3*time.Millisecond + busyPause - 1, 0, 3},
			{3*time.Millisecond + busyPause + 1, 0, 4},
			{time.Second, 1, 5},
			{2 * time.Second, busyOperations, 6},
		} {
			time.Sleep(time.Until(start.Add(step.at)))
			var items []item
			for n := range step.submit {
				key := storeKey{byte(step.at / 500_000), byte(n)}
				items = append(items, item{key: key, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
			}
			s.sender.submit(items...)
			if synctest.Wait(); store.called("Batch") != step.called {
				t.Fatal(step.at, store.called("Batch"))
			}
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		store.mu.Lock()
		defer store.mu.Unlock()
		var sizes []int
		for _, batch := range store.batches {
			sizes = append(sizes, len(batch))
		}
		if want := []int{1, busyOperations - 1, busyOperations, 2, 1, busyOperations}; !slices.Equal(sizes, want) {
			t.Fatal(sizes)
		}
	})
}

// Flush ends the pause of a sender under load, and so does a Batch that is full.
func TestPauseEndsWithAFullBatch(t *testing.T) {
	for _, full := range []bool{false, true} {
		inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
			submit := func(count int) {
				var items []item
				for n := range count {
					key := storeKey{byte(n), byte(n >> 8), byte(count)}
					items = append(items, item{key: key, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
				}
				s.sender.submit(items...)
			}
			submit(busyOperations)
			synctest.Wait()
			start := time.Now()
			if full {
				submit(batchOperations)
			} else {
				submit(1)
				check(t, s.Flush(t.Context()))
			}
			if synctest.Wait(); store.called("Batch") != 2 || time.Since(start) != 0 {
				t.Fatal(store.called("Batch"), time.Since(start))
			}
		})
	}
}

// Batches that fail do not keep handshakes from look-ups: a server whose disk is full still answers those.
func TestFailedBatchesDoNotOpenTheBreaker(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(0, status.Error(codes.Unavailable, "of the test"))
		s.sender.submit(item{key: testKey, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
		var pauses []time.Duration
		for started := time.Now(); len(pauses) < 7; started = time.Now() {
			for sent := store.called("Batch"); store.called("Batch") == sent; synctest.Wait() {
				time.Sleep(time.Millisecond)
			}
			pauses = append(pauses, time.Since(started))
		}
		if want := maxRetryPause; pauses[2] >= want || pauses[5] != want || pauses[6] != want || s.BreakerOpen() {
			t.Fatal(pauses, s.BreakerOpen())
		}
	})
}

// A namespace at its limit of sessions loses new ones, and nothing else.
func TestFullNamespaceLosesPutsOnly(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.values[string(testKey[:])] = []byte("value")
		store.full = true
		for n := range byte(10) {
			s.sender.submit(item{key: storeKey{n}, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
			check(t, s.Flush(t.Context()))
			if answer := s.lookUp(testKey, false, s.options.Deadline); answer.reason != "store" {
				t.Fatal(answer.reason)
			}
		}
		if stats := s.Stats(); stats.Puts["refused"] != 10 || s.BreakerOpen() || s.breaker.isLimited() {
			t.Fatal(stats)
		}
	})
}

// Of calls under way together that a limit refuses, one makes the pause longer.
func TestLimitedTogetherIsOnePause(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(time.Millisecond, status.Error(codes.ResourceExhausted, "of the test"))
		for n := range byte(10) {
			go s.lookUp(storeKey{n}, false, s.options.Deadline)
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if !s.breaker.isLimited() || s.breaker.limitPause != firstLimitPause || s.BreakerOpen() {
			t.Fatal(s.breaker.limitPause, s.BreakerOpen())
		}
		time.Sleep(firstLimitPause)
		if s.breaker.isLimited() {
			t.Fatal("still resting")
		}
	})
}

// From Remove on a session does not resume here, whether the store knows of it yet or not, nor by a look-up from before.
func TestRemovalBindsAtOnce(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		id := s.options.Keyring.issueID("shop", s.now().Add(-time.Minute))
		offer := func() {
			_, _ = (&connection{sessions: s, config: newServer()}).unwrap(id, tls.ConnectionState{})
		}
		store.set(40*time.Millisecond, nil)
		go offer()
		synctest.Wait()
		store.set(10*time.Millisecond, nil)
		s.Remove(id)
		offer() // the Batch is under way
		if got, want := s.Stats().Misses, (map[string]uint64{"unknown": 1}); !maps.Equal(got, want) || store.called("Get") != 1 {
			t.Fatal(got, store.called("Get"))
		}
		check(t, s.Flush(t.Context()))
		offer() // the look-up from before is under way
		if got, want := s.Stats().Misses, (map[string]uint64{"unknown": 2}); !maps.Equal(got, want) || store.called("Get") != 1 {
			t.Fatal(got, store.called("Get"))
		}
		if len(s.sender.removing) != 0 {
			t.Fatal("a Remove that was sent is still in the queue")
		}
	})
}

func TestFlushReportsARemovalThatFailedUntilItIsRepeated(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		id := s.options.Keyring.issueID("shop", s.now())
		store.change(func() { store.refuses = true })
		s.Remove(id)
		if err := s.Flush(t.Context()); !errors.Is(err, errNotRemoved) {
			t.Fatal(err)
		}
		store.change(func() { store.refuses = false })
		s.Remove(id)
		check(t, s.Flush(t.Context()))
		s.sender.bytes = queueBytes // there is no room
		s.Remove(id)
		if err := s.Flush(t.Context()); !errors.Is(err, errNotRemoved) || s.Stats().Removals["dropped"] != 1 {
			t.Fatal(err, s.Stats().Removals)
		}
	})
}

// Nor by a look-up that is under way and finds it.
func TestASessionThatIsRemovedDuringItsLookupDoesNotResume(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		id := s.options.Keyring.issueID("shop", s.now().Add(-time.Minute))
		key := storeKeyOf(format, "shop", id)
		c := &connection{sessions: s, config: newServer()}
		plaintext := envelope{c.fingerprint("shop.example"), s.now(), sessionBytes(t)}.bytes()
		store.replace(key, s.options.Keyring.seal(key, plaintext, s.now().Add(time.Hour)))
		state := tls.ConnectionState{ServerName: "shop.example", Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_128_GCM_SHA256}
		find := func(during func()) *tls.SessionState {
			found := make(chan *tls.SessionState, 1)
			go func() {
				session, _ := (&connection{sessions: s, config: newServer()}).unwrap(id, state)
				found <- session
			}()
			synctest.Wait()
			during()
			return <-found
		}
		store.set(40*time.Millisecond, nil)
		if find(func() {}) == nil {
			t.Fatal("the session is not found at all")
		}
		if find(func() { s.Remove(id) }) != nil {
			t.Fatal("resumed")
		}
	})
}

// sessionBytes returns a session that a server negotiated.
func sessionBytes(t *testing.T) (encoded []byte) {
	server, client := newServer(), newClient(tls.VersionTLS13)
	server.WrapSession = func(state tls.ConnectionState, session *tls.SessionState) (ticket []byte, err error) {
		encoded, err = session.Bytes()
		check(t, err)
		return server.EncryptTicket(state, session)
	}
	ours, theirs := net.Pipe()
	go func() {
		connection := tls.Server(theirs, server)
		_ = connection.Handshake()
		_, _ = connection.Write([]byte{1})
	}()
	connection := tls.Client(ours, client)
	check(t, connection.Handshake())
	_, err := connection.Read(make([]byte, 1))
	check(t, err)
	return encoded
}

func TestRecentKeysAreTheLastOnes(t *testing.T) {
	var recent recentKeys
	keyOf := func(number int) (key storeKey) {
		binary.BigEndian.PutUint32(key[:], uint32(number))
		return key
	}
	for number := range maxRemoved + 2 {
		recent.add(keyOf(number))
		recent.add(keyOf(number))
	}
	if recent.has(keyOf(1)) || !recent.has(keyOf(2)) || !recent.has(keyOf(maxRemoved+1)) || len(recent.known) != maxRemoved {
		t.Fatal(len(recent.known))
	}
}

// With a clock that is behind, ids of other frontends are from the future; they are not asked for again and again.
func TestIdsFromTheFutureAreNotFresh(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		for _, issued := range []time.Duration{5 * time.Minute, -5 * time.Minute} {
			asked := store.called("Get")
			id := s.options.Keyring.issueID("shop", s.now().Add(issued))
			_, _ = (&connection{sessions: s, config: newServer()}).unwrap(id, tls.ConnectionState{})
			if asked = store.called("Get") - asked; asked != 1 {
				t.Fatal(issued, ": asked ", asked)
			}
		}
	})
}

// However many sessions a client offers in a handshake, at most four are looked up, and each once.
func TestAtMostFourAreLookedUp(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		connection := &connection{sessions: s, config: newServer()}
		for range 6 {
			id := s.options.Keyring.issueID("shop", s.now().Add(-time.Minute))
			for range 2 {
				_, _ = connection.unwrap(id, tls.ConnectionState{})
			}
		}
		if got, want := s.Stats().Misses, (map[string]uint64{"unknown": 4, "too-many-lookups": 2}); !maps.Equal(got, want) || store.called("Get") != 4 {
			t.Fatal(got, store.called("Get"))
		}
	})
}

// A refusal because of a limit is a miss and no outage: there are calls again after a pause, which grows each time.
func TestLimitIsNoOutage(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		unwrap := func() {
			connection := &connection{sessions: s, config: newServer()}
			_, _ = connection.unwrap(s.options.Keyring.issueID("shop", s.now()), tls.ConnectionState{})
		}
		store.set(0, status.Error(codes.ResourceExhausted, "of the test"))
		for _, rest := range []time.Duration{firstLimitPause, 2 * firstLimitPause, 4 * firstLimitPause, 8 * firstLimitPause, maxLimitPause, maxLimitPause} {
			asked := store.called("Get")
			for range 5 {
				unwrap()
			}
			time.Sleep(rest)
			if asked = store.called("Get") - asked; asked != 1 {
				t.Fatal(rest, ": asked ", asked)
			}
		}
		if got, want := s.Stats().Misses, (map[string]uint64{"limited": 30}); !maps.Equal(got, want) || s.BreakerOpen() {
			t.Fatal(got)
		}
		s.sender.submit(item{key: testKey, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
		time.Sleep(maxLimitPause)
		store.set(0, nil)
		time.Sleep(maxLimitPause)
		check(t, s.Flush(t.Context()))
		unwrap()
		if s.Stats().Puts["stored"] != 1 || s.Stats().Misses["unknown"] != 1 {
			t.Fatal(s.Stats())
		}
	})
}

// The sessions of a resumed connection have the issue time of the one that it resumed, with any lifetime of the frontends.
func TestIssueTimeIsThatOfTheNegotiation(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		store, clock := newFakeStore(), &clock{}
		var sessions [2]*Installation
		var addresses [2]string
		for n, lifetime := range []time.Duration{24 * time.Hour, time.Hour} {
			config := newServer()
			config.Time = clock.now
			sessions[n] = wrap(t, config, store, Options{Lifetime: lifetime})
			addresses[n] = listen(t, config)
		}
		client := newClient(version)
		for n, frontend := range []int{0, 1, 1} {
			if resumes(t, addresses[frontend], client) != (n > 0) {
				t.Fatal(tls.VersionName(version), n, sessions[frontend].Stats())
			}
			flush(t, sessions[frontend])
			clock.forward(20 * time.Minute)
		}
		for _, issued := range store.issued {
			if issued.UnixMicro() != store.issued[0].UnixMicro() || time.Since(issued).Abs() > time.Minute {
				t.Fatal(tls.VersionName(version), store.issued)
			}
		}
	}
}

// Concurrent look-ups of one session are one call, and each gets the session.
func TestLookupsOfOneSessionAreOneCall(t *testing.T) {
	inBubble(t, Options{MaxLookups: 1}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(10*time.Millisecond, nil)
		store.values[string(testKey[:])] = []byte("value")
		var all sync.WaitGroup
		reasons := make(chan string, 20)
		for range cap(reasons) {
			all.Go(func() {
				answer := s.lookUp(testKey, false, s.options.Deadline)
				if string(answer.value) != "value" {
					t.Errorf("%q: %s", answer.value, answer.reason)
				}
				reasons <- answer.reason
			})
		}
		all.Wait()
		counts := map[string]int{}
		for range cap(reasons) {
			counts[<-reasons]++
		}
		if want := (map[string]int{"store": 1, "coalesced": 19}); store.called("Get") != 1 || !maps.Equal(counts, want) {
			t.Fatal(store.called("Get"), counts)
		}
	})
}

// No more look-ups are under way than allowed: a further one is a miss at once.
func TestLookupsUnderWayAreBounded(t *testing.T) {
	inBubble(t, Options{MaxLookups: 2}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(time.Hour, nil)
		for n := range byte(2) {
			go s.lookUp(storeKey{n}, false, s.options.Deadline)
		}
		synctest.Wait()
		started := time.Now()
		if answer := s.lookUp(storeKey{9}, false, s.options.Deadline); answer.reason != "too-many-lookups" || time.Since(started) != 0 {
			t.Fatal(answer.reason, time.Since(started))
		}
		time.Sleep(defaultDeadline)
		synctest.Wait()
		store.set(0, nil)
		if answer := s.lookUp(storeKey{9}, false, s.options.Deadline); answer.reason != "unknown" {
			t.Fatal(answer.reason)
		}
	})
}

// A fresh id that the server does not know costs further calls, since its Put may be on its way; an older one does not.
func TestFreshSessionsAreAskedForAgain(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		time.AfterFunc(3*time.Millisecond, func() {
			store.mu.Lock()
			defer store.mu.Unlock()
			store.values[string(testKey[:])] = []byte("value")
		})
		if answer := s.lookUp(testKey, true, s.options.Deadline); answer.reason != "retried" || store.called("Get") != 3 {
			t.Fatal(answer.reason, store.called("Get"))
		}
		if answer := s.lookUp(storeKey{9}, false, s.options.Deadline); answer.reason != "unknown" || store.called("Get") != 4 {
			t.Fatal(answer.reason, store.called("Get"))
		}
		if answer := s.lookUp(storeKey{9}, true, s.options.Deadline); answer.reason != "unknown" || store.called("Get") != 9 {
			t.Fatal(answer.reason, store.called("Get"))
		}
	})
}

// All look-ups of a handshake share one deadline.
func TestManyIdentitiesShareOneDeadline(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		connection := &connection{sessions: s, config: newServer()}
		store.set(20*time.Millisecond, nil)
		started := time.Now()
		for range 5 {
			_, _ = connection.unwrap(s.options.Keyring.issueID("shop", s.now().Add(-time.Minute)), tls.ConnectionState{})
		}
		if took := time.Since(started); took > defaultDeadline {
			t.Fatal("took ", took)
		}
	})
}

// After an outage the queue is sent in order; sessions that expired in it are not, and items beyond its size were dropped.
func TestQueueOutlivesAnOutage(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(0, status.Error(codes.Unavailable, "of the test"))
		submit := func(key byte, value []byte, life time.Duration) {
			s.sender.submit(item{key: storeKey{key}, value: value, notAfter: s.now().Add(life)})
		}
		for range 600 {
			submit(1, []byte("first"), time.Hour)
		}
		submit(2, []byte("short"), time.Second)
		submit(3, make([]byte, queueBytes), time.Hour)
		s.sender.submit(item{key: storeKey{1}})
		submit(4, []byte("last"), time.Hour)
		time.Sleep(5 * time.Second)
		if err := s.Flush(t.Context()); err != errUnavailable {
			t.Fatal("flushed in an outage: ", err)
		}
		store.set(0, nil)
		time.Sleep(maxRetryPause)
		check(t, s.Flush(t.Context()))
		stats := s.Stats()
		want := map[string]uint64{"stored": 601, "expired": 1, "dropped": 1}
		if !maps.Equal(stats.Puts, want) || stats.Removals["application"] != 1 || s.sender.bytes != 0 {
			t.Fatal(stats.Puts, stats.Removals, s.sender.bytes)
		}
		first, last := storeKey{1}, storeKey{4}
		if store.values[string(first[:])] != nil || store.values[string(last[:])] == nil {
			t.Fatal("not in order")
		}
	})
}

// Close sends the rest of the queue, waits for a server that hangs at most for a second, and may be called again.
func TestClose(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		s.sender.submit(item{key: testKey, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
		check(t, s.Close())
		if store.values[string(testKey[:])] == nil {
			t.Fatal("not sent")
		}
		check(t, s.Close())
	})
	inBubble(t, Options{}, func(t *testing.T, s *Installation, store *fakeStore) {
		store.set(time.Hour, nil)
		s.sender.submit(item{key: testKey, value: []byte("value"), notAfter: s.now().Add(time.Hour)})
		started := time.Now()
		if err := s.Close(); err == nil || time.Since(started) > closePatience {
			t.Fatal(err, time.Since(started))
		}
	})
}

// Options outside their ranges, and configs that cannot be wrapped, are refused.
func TestWrapRefuses(t *testing.T) {
	keyring := testKeyring(t)
	good := Options{Namespace: "shop", Keyring: keyring}
	hooked, disabled := newServer(), newServer()
	hooked.WrapSession = hooked.EncryptTicket
	disabled.SessionTicketsDisabled = true
	for name, call := range map[string]func() (*Installation, error){
		"no config":    func() (*Installation, error) { return Wrap(nil, newFakeStore(), good) },
		"no store":     func() (*Installation, error) { return Wrap(newServer(), nil, good) },
		"hooked":       func() (*Installation, error) { return Wrap(hooked, newFakeStore(), good) },
		"tickets off":  func() (*Installation, error) { return Wrap(disabled, newFakeStore(), good) },
		"no namespace": func() (*Installation, error) { return Wrap(newServer(), newFakeStore(), Options{Keyring: keyring}) },
		"no keyring":   func() (*Installation, error) { return Wrap(newServer(), newFakeStore(), Options{Namespace: "shop"}) },
		"eternal": func() (*Installation, error) {
			o := good
			o.Lifetime = maxLifetime + 1
			return Wrap(newServer(), newFakeStore(), o)
		},
		"no deadline": func() (*Installation, error) { o := good; o.Deadline = -1; return Wrap(newServer(), newFakeStore(), o) },
		"capital letters": func() (*Installation, error) {
			o := good
			o.Namespace = "Shop"
			return Wrap(newServer(), newFakeStore(), o)
		},
	} {
		if _, err := call(); err == nil {
			t.Error(name, ": accepted")
		}
	}
}
