package resumed

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

// onBothVersions runs test for TLS 1.2 and TLS 1.3 on one store.
func onBothVersions(t *testing.T, test func(t *testing.T, store *realStore, version uint16)) {
	t.Helper()
	forBothVersions(t, sharedStore, test)
}

// withOwnStores runs test for TLS 1.2 and TLS 1.3, each on a store that it may harm.
func withOwnStores(t *testing.T, test func(t *testing.T, store *realStore, version uint16)) {
	t.Helper()
	forBothVersions(t, ownStore, test)
}

func forBothVersions(t *testing.T, launch func(testing.TB) *realStore, test func(t *testing.T, store *realStore, version uint16)) {
	t.Helper()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) { test(t, launch(t), version) })
	}
}

// A frontend resumes what another one negotiated, and the ticket is 32 bytes.
func TestAnyFrontendResumes(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		first, second := newServer(), newServer()
		sessions := [2]*Installation{
			wrap(t, first, store.connect(t), Options{}),
			wrap(t, second, store.connect(t), Options{}),
		}
		addresses := [2]string{listen(t, first), listen(t, second)}
		client := newClient(version)
		for n := range 10 {
			if got := resumes(t, addresses[n%2], client); got != (n > 0) {
				t.Fatalf("connection %d: resumed %v", n, got)
			}
			if length := len(ticket(t, client)); length != idSize {
				t.Fatal("ticket of ", length, " bytes")
			}
		}
		for n, want := range []uint64{4, 5} {
			stats := sessions[n].Stats()
			if total(stats.Hits) != want || total(stats.Misses) != 0 {
				t.Fatalf("frontend %d: %+v", n, stats)
			}
		}
	})
}

// A frontend in another process resumes as well, for which the keyring and the namespace are enough.
func TestAnotherProcessResumes(t *testing.T) {
	const target, mode = "RESUMED_TEST_FRONTEND", "RESUMED_TEST_SESSIONS"
	optionsOf := func(mode string) Options {
		return Options{Namespace: "processes", Sessions: Mode(mode), TicketsTLS12: Mode(mode) == TicketSessions}
	}
	ready := func(sessions *Installation) {
		if sessions.tickets != nil {
			awaitSecrets(t, sessions)
			eventually(t, "a stream of removals", sessions.RemovalsLive)
		}
	}
	if target := os.Getenv(target); target != "" {
		config := newServer() // with a certificate of its own: the client of the test does not verify it
		ready(wrap(t, config, (&realStore{target: target}).connect(t), optionsOf(os.Getenv(mode))))
		fmt.Println("frontend at", listen(t, config))
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	for _, each := range []Mode{StoredSessions, TicketSessions} {
		t.Run(string(each), func(t *testing.T) {
			onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
				other := exec.Command(os.Args[0], "-test.run=^TestAnotherProcessResumes$")
				other.Env = append(os.Environ(), target+"="+store.target, mode+"="+string(each))
				stdin, err := other.StdinPipe()
				check(t, err)
				stdout, err := other.StdoutPipe()
				check(t, err)
				check(t, other.Start())
				defer func() { _ = stdin.Close(); _, _ = io.Copy(io.Discard, stdout); check(t, other.Wait()) }()
				var address string
				_, err = fmt.Fscanf(stdout, "frontend at %s\n", &address)
				check(t, err)

				config := newServer()
				sessions := wrap(t, config, store.connect(t), optionsOf(string(each)))
				ready(sessions)
				client := newClient(version)
				// The certificates differ, so crypto/tls clients would refuse to resume if they verified them.
				client.InsecureSkipVerify = true
				here := listen(t, config)
				for n, address := range []string{here, address, here, here, address} {
					if got := resumes(t, address, client); got != (n > 0) {
						t.Fatalf("connection %d: resumed %v", n, got)
					}
				}
				stats := sessions.Stats()
				if each == TicketSessions {
					wantCounts(t, "resumed", stats.TicketsResumed, map[string]uint64{"current": 2})
				} else if total(stats.Hits) != 2 || total(stats.ForeignHits) != 1 {
					t.Fatal(stats) // the other process issued the session of the first hit, and this one that of the second
				}
			})
		})
	}
}

// A session that was removed does not resume anywhere.
func TestRemovedSessionDoesNotResume(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		issued := make(chan []byte, 10)
		first, second := newServer(), newServer()
		options := Options{Issued: func(_ tls.ConnectionState, id []byte) { issued <- id }}
		sessions := wrap(t, first, store.connect(t), options)
		elsewhere := wrap(t, second, store.connect(t), Options{})
		client := newClient(version)
		resumes(t, listen(t, first), client)
		id := <-issued
		if !bytes.Equal(id, ticket(t, client)) {
			t.Fatal("the id is not the ticket")
		}
		flush(t, sessions)
		elsewhere.Remove(id)
		flush(t, elsewhere)
		if resumes(t, listen(t, second), client) || elsewhere.Stats().Misses["unknown"] != 1 {
			t.Fatal("resumed: ", elsewhere.Stats())
		}
	})
}

// With single use, of two frontends that are offered one session at once, one resumes it.
func TestSingleUseRaced(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		var addresses [2]string
		var sessions [2]*Installation
		for n := range addresses {
			config := newServer()
			sessions[n] = wrap(t, config, store.connect(t), Options{SingleUse: true})
			addresses[n] = listen(t, config)
		}
		for round := range 50 {
			client := newClient(version)
			resumes(t, addresses[0], client)
			client = freeze(t, client)
			flush(t, sessions[0])
			if resumed := offerAtOnce(t, addresses, client); resumed != 1 {
				t.Fatalf("round %d: resumed %d times", round, resumed)
			}
		}
	})
}

// A client whose key exchange is tried again (HelloRetryRequest) resumes, a session of single use too, with one look-up.
func TestHelloRetryRequest(t *testing.T) {
	store := sharedStore(t)
	for _, singleUse := range []bool{false, true} {
		var gets, takes atomic.Int32
		counts := intercept(func(method string, _ any) {
			switch method {
			case "Get":
				gets.Add(1)
			case "Take":
				takes.Add(1)
			}
		})
		config := newServer()
		config.CurvePreferences = []tls.CurveID{tls.CurveP384}
		sessions := wrap(t, config, store.connect(t, counts), Options{SingleUse: singleUse})
		address, client := listen(t, config), newClient(tls.VersionTLS13)
		client.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP384}
		for n := range 3 {
			state, err := visit(address, client)
			check(t, err)
			// A client brings a key for the first of its groups only.
			if state.DidResume != (n > 0) || state.CurveID != tls.CurveP384 {
				t.Fatal(singleUse, n, state.DidResume, state.CurveID, sessions.Stats())
			}
			flush(t, sessions)
		}
		if stats := sessions.Stats(); total(stats.Hits) != 2 || total(stats.Misses) != 0 || gets.Load() != 2 || takes.Load() > 2 {
			t.Fatal(stats, gets.Load(), takes.Load())
		}
	}
}

// A store that is down or hangs fails no handshake, and resumption comes back with it.
func TestOutage(t *testing.T) {
	withOwnStores(t, func(t *testing.T, store *realStore, version uint16) {
		config := newServer()
		sessions := wrap(t, config, store.connect(t), Options{Deadline: defaultDeadline})
		address := listen(t, config)
		client := newClient(version)
		eventually(t, "resumption", func() bool { return resumes(t, address, client) })
		flush(t, sessions)

		check(t, store.process.Signal(syscall.SIGSTOP)) // hangs
		frozen := freeze(t, client)
		visitInVain := func() {
			if resumes(t, address, frozen) {
				t.Fatal("resumed without a store")
			}
		}
		// A machine that stands still now and then makes calls late that do not count.
		eventually(t, "an open breaker", func() bool { visitInVain(); return sessions.BreakerOpen() })
		before := sessions.Stats().Misses
		for range 20 {
			visitInVain()
		}
		misses := sessions.Stats().Misses
		if misses["timeout"] != before["timeout"] || misses["breaker-open"] != before["breaker-open"]+20 {
			t.Fatal(before, misses)
		}
		check(t, store.process.Signal(syscall.SIGCONT))
		eventually(t, "resumption after a hang", func() bool { return resumes(t, address, client) })

		check(t, store.process.Kill()) // is down
		eventually(t, "an open breaker", func() bool {
			if resumes(t, address, client) {
				t.Fatal("resumed without a store")
			}
			return sessions.BreakerOpen()
		})
	})
}

// Servers of a store that are gone, or accept connections and say nothing, cost no resumption while another answers.
func TestSeveralServers(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		hanging, err := net.Listen("tcp", "127.0.0.1:0")
		check(t, err)
		defer func() { _ = hanging.Close() }()
		several := &realStore{target: "ipv4:127.0.0.1:1," + hanging.Addr().String() + "," + store.target}
		config := newServer()
		sessions := wrap(t, config, several.connect(t), Options{Namespace: "several"})
		address, client := listen(t, config), newClient(version)
		for n := range 20 {
			if got := resumes(t, address, client); got != (n > 0) {
				t.Fatalf("connection %d: resumed %v: %+v", n, got, sessions.Stats())
			}
		}
	})
	for _, target := range []string{"ipv4:store:7400", "ipv4:127.0.0.1:1,", "ipv6:127.0.0.1:1", "ipv4:127.0.0.1:0"} {
		if _, err := Dial(target, grpc.WithTransportCredentials(insecure.NewCredentials())); err == nil {
			t.Error(target, ": accepted")
		}
	}
}

// A frontend starts, and serves, before there is a store.
func TestNoStoreYet(t *testing.T) {
	config := newServer()
	sessions := wrap(t, config, (&realStore{target: "127.0.0.1:1"}).connect(t), Options{Deadline: defaultDeadline})
	address, client := listen(t, config), newClient(tls.VersionTLS13)
	eventually(t, "an open breaker", func() bool {
		if resumes(t, address, client) {
			t.Fatal("resumed without a store")
		}
		return sessions.BreakerOpen()
	})
}

// Any value that is no session of this fleet costs a full handshake, counted by reason.
func TestMalformedValues(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		keyring := testKeyring(t)
		stranger, err := NewKeyring(bytes.Repeat([]byte{7}, keySize))
		check(t, err)
		later := time.Now().Add(time.Hour)
		var key storeKey
		for reason, spoil := range map[string][]func(value []byte) []byte{
			"malformed": {
				func([]byte) []byte { return []byte{0} },
				func(value []byte) []byte { return value[:40] },
				func(value []byte) []byte { return append([]byte{1}, value[1:]...) },
				func([]byte) []byte { return make([]byte, maxValue) },
				func([]byte) []byte { return keyring.seal(key, make([]byte, envelopeHeader-1), later) },
			},
			"not-authentic": {
				func(value []byte) []byte { return append(value, 0) },
				func(value []byte) []byte { value[len(value)-1] ^= 1; return value },
				func(value []byte) []byte { value[12] ^= 1; return value }, // not_after
				func([]byte) []byte { return keyring.seal(storeKey{}, []byte("another session"), later) },
			},
			"unknown-key": {func([]byte) []byte { return stranger.seal(key, []byte("a session"), later) }},
			"expired":     {func([]byte) []byte { return keyring.seal(key, []byte("a session"), time.Now()) }},
			"undecodable": {
				func([]byte) []byte {
					return keyring.seal(key, envelope{session: []byte("a session of another format")}.bytes(), later)
				},
				func([]byte) []byte { return keyring.seal(key, envelope{}.bytes(), later) },
			},
		} {
			for n, spoil := range spoil {
				spoils := intercept(func(method string, reply any) {
					if get, ok := reply.(*pb.GetResponse); ok && get.GetSession() != nil {
						get.Session.Value = spoil(get.GetSession().GetValue())
					}
				})
				config := newServer()
				sessions := wrap(t, config, store.connect(t, spoils), Options{})
				address, client := listen(t, config), newClient(version)
				resumes(t, address, client)
				key = storeKeyOf(format, "shop", ticket(t, client))
				if resumes(t, address, client) {
					t.Errorf("%s %d: resumed", reason, n)
				}
				if want := map[string]uint64{reason: 1}; !maps.Equal(sessions.Stats().Misses, want) {
					t.Errorf("%s %d: %v", reason, n, sessions.Stats().Misses)
				}
			}
		}
	})
}

// An id that the fleet did not issue, or issued for another namespace, or too long ago, is no call.
func TestForeignAndOldIDsAreNoCall(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		var lookups atomic.Int32
		counts := intercept(func(method string, _ any) {
			if method == "Get" {
				lookups.Add(1)
			}
		})
		clock := &clock{}
		bank, shop, stateless := newServer(), newServer(), newServer()
		shop.Time = clock.now
		wrap(t, bank, store.connect(t), Options{Namespace: "bank"})
		sessions := wrap(t, shop, store.connect(t, counts), Options{})
		address := listen(t, shop)

		for _, other := range []*tls.Config{bank, stateless} {
			client := newClient(version)
			resumes(t, listen(t, other), client)
			if resumes(t, address, client) {
				t.Fatal("resumed a foreign session")
			}
		}
		client := newClient(version)
		resumes(t, address, client)
		clock.forward(defaultLifetime + time.Minute)
		if resumes(t, address, client) {
			t.Fatal("resumed an old session")
		}
		if want := (map[string]uint64{"foreign-id": 2, "expired-id": 1}); !maps.Equal(sessions.Stats().Misses, want) || lookups.Load() != 0 {
			t.Fatal(sessions.Stats().Misses, lookups.Load())
		}
	})
}

// However often it is resumed, a session ends when its lifetime has passed since its negotiation.
func TestResumingNeverProlongs(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		clock := &clock{}
		config := newServer()
		config.Time = clock.now
		sessions := wrap(t, config, store.connect(t), Options{})
		address, client := listen(t, config), newClient(version)
		resumes(t, address, client)
		for range 3 {
			flush(t, sessions) // by its clock, no session is fresh then
			clock.forward(defaultLifetime / 4)
			if !resumes(t, address, client) {
				t.Fatal("not resumed within its life: ", sessions.Stats().Misses)
			}
		}
		flush(t, sessions)
		clock.forward(defaultLifetime/4 + 2*time.Second) // ends are whole seconds
		if resumes(t, address, client) {
			t.Fatal("resumed past its life")
		}
		if !resumes(t, address, client) {
			t.Fatal("the new session does not resume")
		}
		if want := map[string]uint64{"expired": 1}; !maps.Equal(sessions.Stats().Misses, want) {
			t.Fatal(sessions.Stats().Misses)
		}
	})
}

// Of a connection without a config of its own nothing is known: it neither stores nor resumes.
func TestUnknownContext(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		known, unknown := newServer(), newServer()
		wrap(t, known, store.connect(t), Options{})
		sessions := wrap(t, unknown, store.connect(t), Options{})
		unknown.GetConfigForClient = nil
		client := newClient(version)
		resumes(t, listen(t, known), client)
		address := listen(t, unknown)
		for n := range 3 {
			if resumes(t, address, client) {
				t.Fatal("resumed connection ", n)
			}
		}
		stats := sessions.Stats()
		// The tickets that it issues itself are the fleet's, too.
		if !maps.Equal(stats.Misses, map[string]uint64{"context-unknown": 3}) || stats.Puts["unresumable"] != 3 {
			t.Fatal(stats)
		}
	})
}

// Keys rotate while serving: sessions that the old key sealed resume as long as the keyring lists it.
func TestKeyRotation(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		path := filepath.Join(t.TempDir(), "fleet.keys")
		writeKeyring(t, path, keyLine(1))
		keyring, err := LoadKeyring(path, quiet)
		check(t, err)
		rotate := func(text string) {
			writeKeyring(t, path, text)
			settle(keyring.files, func() { keyring.current() })
		}
		config := newServer()
		sessions := wrap(t, config, store.connect(t), Options{Keyring: keyring})
		address, client := listen(t, config), newClient(version)
		resumes(t, address, client)
		old := freeze(t, client)
		rotate(keyLine(2) + keyLine(1))
		if !resumes(t, address, old) || !resumes(t, address, client) {
			t.Fatal("the old key's session does not resume")
		}
		rotate(keyLine(2))
		if resumes(t, address, old) || sessions.Stats().Misses["foreign-id"] != 1 {
			t.Fatal("the retired key's session resumes")
		}
		if !resumes(t, address, client) {
			t.Fatal("the new key's session does not resume")
		}
	})
}

// A client's certificate travels in its session: it is there on resumption, its chain is checked against the authorities of
// the config, crypto/tls calls VerifyConnection again, and VerifyPeerCertificate not.
func TestClientCertificates(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		certificate := newCertificate("client")
		trusted, other := x509.NewCertPool(), x509.NewCertPool()
		trusted.AddCert(certificate.Leaf)
		other.AddCert(testCertificate().Leaf)
		var peers, connections atomic.Int32
		server := func(roots *x509.CertPool) string {
			config := newServer()
			config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, roots
			config.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { peers.Add(1); return nil }
			config.VerifyConnection = func(state tls.ConnectionState) error {
				connections.Add(1)
				if len(state.VerifiedChains) == 0 || !state.PeerCertificates[0].Equal(certificate.Leaf) {
					return errTest
				}
				return nil
			}
			wrap(t, config, store.connect(t), Options{})
			return listen(t, config)
		}
		client := newClient(version)
		client.Certificates = []tls.Certificate{certificate}
		first := server(trusted)
		for n, address := range []string{first, server(trusted), first} {
			if got := resumes(t, address, client); got != (n > 0) {
				t.Fatalf("connection %d: resumed %v", n, got)
			}
		}
		if peers.Load() != 1 || connections.Load() != 3 {
			t.Fatal(peers.Load(), connections.Load())
		}
		client = freeze(t, client)
		if state, err := visit(server(other), client); err == nil {
			t.Fatalf("a config with other authorities accepted the client: resumed %v", state.DidResume)
		}
		plain := newServer()
		wrap(t, plain, store.connect(t), Options{})
		if resumes(t, listen(t, plain), client) {
			t.Fatal("a config that asks for no certificate resumed a session with one")
		}
	})
}

// net/http clones the config and completes the clone with certificates and protocols: both are there on every connection.
func TestHTTPServer(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		certificate := testCertificate()
		directory := t.TempDir()
		certFile, keyFile := filepath.Join(directory, "cert.pem"), filepath.Join(directory, "key.pem")
		writePEM(t, certFile, keyFile, certificate)

		server := &http.Server{Addr: "127.0.0.1:0", TLSConfig: &tls.Config{}, Handler: http.HandlerFunc(
			func(writer http.ResponseWriter, request *http.Request) {
				_, _ = fmt.Fprint(writer, request.Proto, " ", request.TLS.DidResume)
			})}
		sessions := wrap(t, server.TLSConfig, store.connect(t), Options{})
		listener, err := net.Listen("tcp", server.Addr)
		check(t, err)
		served := make(chan error, 1)
		go func() { served <- server.ServeTLS(listener, certFile, keyFile) }()
		defer func() { _ = server.Close(); <-served }()

		client := newClient(version)
		var answers []string
		for range 3 {
			transport := &http.Transport{TLSClientConfig: client, ForceAttemptHTTP2: true}
			response, err := (&http.Client{Transport: transport, Timeout: patience}).Get("https://" + listener.Addr().String())
			check(t, err)
			body, err := io.ReadAll(response.Body)
			check(t, err)
			_ = response.Body.Close()
			transport.CloseIdleConnections()
			answers = append(answers, string(body))
		}
		if want := "HTTP/2.0 false, HTTP/2.0 true, HTTP/2.0 true"; strings.Join(answers, ", ") != want {
			t.Fatal(answers, sessions.Stats())
		}
	})
}

// Configs that the server's own GetConfigForClient chooses are wrapped too; one with Sessions of its own keeps them.
func TestVirtualHosts(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		shop, bank, front := newServer(), newServer(), &tls.Config{}
		ofBank := wrap(t, bank, store.connect(t), Options{Namespace: "bank"})
		front.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			switch hello.ServerName {
			case "shop.example":
				return shop, nil
			case "bank.example":
				return ofBank.ForClient(bank), nil
			default:
				return nil, errTest
			}
		}
		ofFront := wrap(t, front, store.connect(t), Options{})
		address := listen(t, front)
		for name, sessions := range map[string]*Installation{"shop.example": ofFront, "bank.example": ofBank} {
			client := newClient(version)
			client.ServerName = name
			for n := range 3 {
				if got := resumes(t, address, client); got != (n > 0) {
					t.Fatalf("%s: resumed %v", name, got)
				}
			}
			if hits := total(sessions.Stats().Hits); hits != 2 {
				t.Fatal(name, ": ", hits)
			}
		}
		client := newClient(version)
		client.ServerName = "unknown.example"
		if _, err := visit(address, client); err == nil {
			t.Fatal("the error of GetConfigForClient was lost")
		}
	})
}

// After Close connections go on, without resumption.
func TestHandshakesAfterClose(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		config := newServer()
		sessions := wrap(t, config, store.connect(t), Options{})
		address, client := listen(t, config), newClient(version)
		resumes(t, address, client)
		check(t, sessions.Close())
		for range 5 {
			if resumes(t, address, client) {
				t.Fatal("resumed after Close")
			}
		}
	})
}

// Memory does not grow with the number of handshakes: RESUMED_LEAK_HANDSHAKES says how many (500).
func TestNoLeak(t *testing.T) {
	handshakes := 500
	if text := os.Getenv("RESUMED_LEAK_HANDSHAKES"); text != "" {
		var err error
		handshakes, err = strconv.Atoi(text)
		check(t, err)
	}
	noLeak := func(t *testing.T, store *realStore, version uint16, options Options) {
		config := newServer()
		sessions := wrap(t, config, store.connect(t), options)
		address, client := listen(t, config), newClient(version)
		measure := func() (heap, resident uint64, goroutines int) {
			flush(t, sessions)
			runtime.GC()
			runtime.GC()
			var stats runtime.MemStats
			runtime.ReadMemStats(&stats)
			return stats.HeapAlloc, residentBytes(), runtime.NumGoroutine()
		}
		run := func(count int) {
			for range count {
				resumes(t, address, client)
			}
		}
		run(500) // fills pools and caches
		heap, resident, goroutines := measure()
		run(handshakes)
		heapThen, residentThen, goroutinesThen := measure()
		growth := int64(heapThen) - int64(heap)
		t.Logf("%d handshakes: heap %d kB, then %d kB; resident %d kB, then %d kB; goroutines %d, then %d; %v", handshakes,
			heap>>10, heapThen>>10, resident>>10, residentThen>>10, goroutines, goroutinesThen, sessions.Stats())
		if growth > 1<<18 || goroutinesThen > goroutines+10 {
			t.Fatalf("grew by %d bytes and %d goroutines", growth, goroutinesThen-goroutines)
		}
	}
	for _, options := range []Options{{}, both(Options{Sessions: TicketSessions})} {
		onBothVersions(t, func(t *testing.T, store *realStore, version uint16) { noLeak(t, store, version, options) })
	}
}

// residentBytes tells how much of this process is in memory, or 0 where that is not to be had.
func residentBytes() uint64 {
	var virtual, resident uint64 // pages
	if text, err := os.ReadFile("/proc/self/statm"); err == nil {
		_, _ = fmt.Sscan(string(text), &virtual, &resident)
	}
	return resident * uint64(os.Getpagesize())
}
