package resumed

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// patience bounds every wait; only defects take that long.
const patience = 30 * time.Second

var quiet = slog.New(slog.DiscardHandler)

// A realStore is `resumed serve` in a process of its own.
type realStore struct {
	target  string
	process *os.Process
	stop    func()
}

// sharedStore is the store of all tests that do not harm it.
func sharedStore(t testing.TB) *realStore {
	t.Helper()
	if store := launchShared(); store != nil {
		return store
	}
	t.Skip("needs a store: put the resumed command into PATH, or its path into RESUMED_COMMAND")
	return nil
}

var (
	launchShared = sync.OnceValue(func() *realStore {
		store := launchStore("127.0.0.1:0")
		if store != nil {
			stopShared = store.stop
		}
		return store
	})
	stopShared = func() {}
)

func TestMain(m *testing.M) {
	status := m.Run()
	stopShared()
	os.Exit(status)
}

// ownStore is a store that the test may harm.
func ownStore(t testing.TB) *realStore {
	t.Helper()
	return ownStoreAt(t, "127.0.0.1:0")
}

// ownStoreAt is an empty store at an address.
func ownStoreAt(t testing.TB, address string) *realStore {
	t.Helper()
	store := launchStore(address)
	if store == nil {
		t.Skip("needs a store: put the resumed command into PATH, or its path into RESUMED_COMMAND")
	}
	t.Cleanup(store.stop)
	return store
}

// launchStore returns a store that is ready, or nil where there is no command to start one.
func launchStore(address string) *realStore {
	command := os.Getenv("RESUMED_COMMAND")
	if command == "" {
		var err error
		if command, err = exec.LookPath("resumed"); err != nil {
			return nil
		}
	}
	serve := exec.Command(command, "serve", "--listen", address, "--workers", "1", "--shutdown-delay", "0s")
	log, err := serve.StderrPipe()
	if err != nil {
		panic(err)
	}
	if err := serve.Start(); err != nil {
		panic(err)
	}
	read := make(chan struct{})
	store := &realStore{process: serve.Process, stop: sync.OnceFunc(func() {
		_ = serve.Process.Signal(syscall.SIGCONT)
		_ = serve.Process.Signal(syscall.SIGTERM)
		<-read
		_ = serve.Wait()
	})}
	ready := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(log)
		for lines.Scan() {
			var line struct {
				Event     string
				Addresses []string
			}
			_ = json.Unmarshal(lines.Bytes(), &line)
			switch line.Event {
			case "listening":
				store.target = line.Addresses[0]
			case "ready":
				close(ready)
			}
		}
	}()
	select {
	case <-ready:
		return store
	case <-read:
		panic("the store ended: " + serve.String())
	}
}

func (s *realStore) connect(t testing.TB, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := Dial(s.target, options...)
	check(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// wrap wraps config for the namespace "shop" of store, unless options say otherwise.
func wrap(t testing.TB, config *tls.Config, store grpc.ClientConnInterface, options Options) *Installation {
	t.Helper()
	if options.Namespace == "" {
		options.Namespace = "shop"
	}
	if options.Keyring == nil {
		options.Keyring = testKeyring(t)
	}
	if options.Deadline == 0 {
		options.Deadline = 5 * time.Second // the machine may be busy; tests of the deadline set theirs
	}
	if options.Logger == nil {
		options.Logger = quiet
	}
	sessions, err := Wrap(config, store, options)
	check(t, err)
	t.Cleanup(func() { _ = sessions.Close() })
	return sessions
}

func testKeyring(t testing.TB) *Keyring {
	t.Helper()
	keyring, err := NewKeyring(make([]byte, keySize))
	check(t, err)
	return keyring
}

func flush(t testing.TB, sessions *Installation) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	check(t, sessions.Flush(ctx))
}

// listen serves config on the loopback interface and returns the address: each connection gets one byte.
func listen(t testing.TB, config *tls.Config) string {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
	check(t, err)
	var connections sync.WaitGroup
	t.Cleanup(func() { _ = listener.Close(); connections.Wait() })
	connections.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Go(func() {
				defer func() { _ = conn.Close() }()
				_ = conn.SetDeadline(time.Now().Add(patience))
				if _, err := conn.Write([]byte{1}); err == nil {
					_, _ = conn.Read(make([]byte, 1)) // until the client has read everything
				}
			})
		}
	})
	return listener.Addr().String()
}

// visit connects to address, waits for its byte (and so for its tickets), and returns the state of the connection.
func visit(address string, config *tls.Config) (tls.ConnectionState, error) {
	dialer := &net.Dialer{Timeout: patience}
	conn, err := tls.DialWithDialer(dialer, "tcp", address, config)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, err = io.ReadFull(conn, make([]byte, 1))
	return conn.ConnectionState(), err
}

// resumes visits address and reports whether a session was resumed. The handshake must not fail.
func resumes(t testing.TB, address string, config *tls.Config) bool {
	t.Helper()
	state, err := visit(address, config)
	check(t, err)
	return state.DidResume
}

// offerAtOnce offers the client's session in four connections at once, two for each address, and returns how many of them resumed it.
func offerAtOnce(t *testing.T, addresses [2]string, client *tls.Config) int32 {
	t.Helper()
	var resumed atomic.Int32
	var all sync.WaitGroup
	for n := range 4 {
		all.Go(func() {
			state, err := visit(addresses[n%2], client)
			if err != nil {
				t.Error(err)
			}
			if state.DidResume {
				resumed.Add(1)
			}
		})
	}
	all.Wait()
	return resumed.Load()
}

// newClient returns the config of a client that keeps one session for each server name.
func newClient(version uint16) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(testCertificate().Leaf)
	return &tls.Config{
		ServerName:         "shop.example",
		RootCAs:            roots,
		MinVersion:         version,
		MaxVersion:         version,
		ClientSessionCache: tls.NewLRUClientSessionCache(0),
	}
}

func newServer() *tls.Config { return &tls.Config{Certificates: []tls.Certificate{testCertificate()}} }

// frozen is a session cache that never changes: a client that offers one session again and again.
type frozen struct{ session *tls.ClientSessionState }

func (f frozen) Get(string) (*tls.ClientSessionState, bool) { return f.session, f.session != nil }
func (frozen) Put(string, *tls.ClientSessionState)          {}

// ticket returns the ticket that client would offer.
func ticket(t testing.TB, client *tls.Config) []byte {
	t.Helper()
	session, ok := client.ClientSessionCache.Get(client.ServerName)
	if !ok {
		t.Fatal("the client has no session")
	}
	ticket, _, err := session.ResumptionState()
	check(t, err)
	return ticket
}

// freeze returns a client that always offers the session that client has now.
func freeze(t testing.TB, client *tls.Config) *tls.Config {
	t.Helper()
	session, ok := client.ClientSessionCache.Get(client.ServerName)
	if !ok {
		t.Fatal("the client has no session")
	}
	client = client.Clone()
	client.ClientSessionCache = frozen{session}
	return client
}

var testCertificate = sync.OnceValue(func() tls.Certificate { return newCertificate("shop.example", "bank.example") })

// newCertificate returns a certificate that is its own authority, for servers and clients.
func newCertificate(names ...string) tls.Certificate {
	return newCertificateUntil(time.Now().AddDate(50, 0, 0), names...)
}

func newCertificateUntil(notAfter time.Time, names ...string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: names[0]},
		NotBefore:             time.Unix(0, 0), // also by the clocks of bubbles
		NotAfter:              notAfter,
		DNSNames:              names,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// intercept returns an option that calls hook after each call that the store answered.
func intercept(hook func(method string, reply any)) grpc.DialOption {
	return grpc.WithUnaryInterceptor(func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn,
		invoke grpc.UnaryInvoker, options ...grpc.CallOption,
	) error {
		err := invoke(ctx, method, request, reply, conn, options...)
		if err == nil {
			hook(filepath.Base(method), reply)
		}
		return err
	})
}

// A clock that tests set.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time           { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) forward(by time.Duration) { c.offset.Add(int64(by)) }
func total(counts map[string]uint64) (n uint64) {
	for _, count := range counts {
		n += count
	}
	return n
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until something of another process or goroutine is so.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never happened: ", what)
		}
	}
}

var errTest = errors.New("of the test")

func writePEM(t testing.TB, certFile, keyFile string, certificate tls.Certificate) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	check(t, err)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})
	check(t, os.WriteFile(certFile, cert, 0o600))
	check(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))
}
