package resumed

import (
	"bytes"
	"crypto/tls"
	"io"
	"log/slog"
	"maps"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
)

// A frontend is a server with fleet tickets, without a network: it works with the clock of a bubble.
type frontend struct {
	config   *tls.Config
	sessions *Installation
}

// newFrontend returns a frontend of TicketSessions, unless options say otherwise.
func newFrontend(t testing.TB, store grpc.ClientConnInterface, options Options) *frontend {
	t.Helper()
	return newFrontendOf(t, newServer(), store, options)
}

func newFrontendOf(t testing.TB, config *tls.Config, store grpc.ClientConnInterface, options Options) *frontend {
	t.Helper()
	if options.Sessions == "" {
		options.Sessions = TicketSessions
	}
	return &frontend{config, wrap(t, config, store, options)}
}

// handshake makes a connection to the frontend, and returns the state of the client once it has its ticket. No handshake may fail.
func (f *frontend) handshake(t testing.TB, client *tls.Config) tls.ConnectionState {
	t.Helper()
	state, err := f.tryHandshake(client)
	check(t, err)
	return state
}

func (f *frontend) tryHandshake(client *tls.Config) (tls.ConnectionState, error) {
	near, far := newMemoryConns()
	var serving sync.WaitGroup
	defer serving.Wait()
	defer func() { _ = near.Close() }()
	serving.Go(func() {
		defer func() { _ = far.Close() }()
		server := tls.Server(far, f.config)
		if _, err := server.Write([]byte{1}); err == nil {
			_, _ = io.Copy(io.Discard, far)
		}
	})
	conn := tls.Client(near, client)
	_, err := io.ReadFull(conn, make([]byte, 1))
	return conn.ConnectionState(), err
}

// A memoryConn is an end of a connection. Unlike that of net.Pipe, it has a buffer: both ends of TLS may write at the same time.
type memoryConn struct {
	net.Conn

	in, out *memoryStream
}

type memoryStream struct {
	mu      sync.Mutex
	changed *sync.Cond
	bytes   bytes.Buffer
	closed  bool
}

func newMemoryConns() (near, far net.Conn) {
	one, other := &memoryStream{}, &memoryStream{}
	one.changed, other.changed = sync.NewCond(&one.mu), sync.NewCond(&other.mu)
	return &memoryConn{in: one, out: other}, &memoryConn{in: other, out: one}
}

func (c *memoryConn) Read(buffer []byte) (int, error) {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	for c.in.bytes.Len() == 0 && !c.in.closed {
		c.in.changed.Wait()
	}
	return c.in.bytes.Read(buffer)
}

func (c *memoryConn) Write(data []byte) (int, error) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	defer c.out.changed.Broadcast()
	return c.out.bytes.Write(data)
}

func (c *memoryConn) Close() error {
	for _, stream := range []*memoryStream{c.in, c.out} {
		stream.mu.Lock()
		stream.closed = true
		stream.changed.Broadcast()
		stream.mu.Unlock()
	}
	return nil
}

// resumes makes a connection and reports whether it resumed.
func (f *frontend) resumes(t testing.TB, client *tls.Config) bool {
	t.Helper()
	return f.handshake(t, client).DidResume
}

// wantResumed makes a connection, which must resume, or must not.
func (f *frontend) wantResumed(t testing.TB, client *tls.Config, want bool) {
	t.Helper()
	if f.resumes(t, client) != want {
		t.Fatalf("resumed: %v; %+v", !want, f.sessions.Stats())
	}
}

// wantRefused makes a connection, whose ticket must be refused for a reason.
func (f *frontend) wantRefused(t testing.TB, client *tls.Config, reason string) {
	t.Helper()
	before := f.sessions.Stats().TicketsRefused
	f.wantResumed(t, client, false)
	after := f.sessions.Stats().TicketsRefused
	if after[reason] != before[reason]+1 || total(after) != total(before)+1 {
		t.Fatalf("refused: %v, then %v, want %s", before, after, reason)
	}
}

// newVisitor returns a client that offers its only session again and again, which the frontend negotiated.
func (f *frontend) newVisitor(t testing.TB, version uint16) *tls.Config {
	t.Helper()
	client := newClient(version)
	f.wantResumed(t, client, false)
	return freeze(t, client)
}

// settled waits until all goroutines of the bubble wait for time to pass.
func settled() { synctest.Wait() }

// withTickets runs test in a bubble.
func withTickets(t *testing.T, test func(t *testing.T, store *fakeStore)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newFakeStore()) })
}

// onVersionsOfTickets runs test in a bubble for TLS 1.3, and for TLS 1.2 with TicketsTLS12.
func onVersionsOfTickets(t *testing.T, test func(t *testing.T, store *fakeStore, version uint16)) {
	t.Helper()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			withTickets(t, func(t *testing.T, store *fakeStore) { test(t, store, version) })
		})
	}
}

// both makes frontends issue tickets in both versions.
func both(options Options) Options {
	options.TicketsTLS12 = true
	return options
}

// present returns the secret that encrypts.
func (f *frontend) present(t testing.TB) *ticketSecret {
	t.Helper()
	tickets := f.sessions.tickets
	secret := tickets.secrets.agreedFor(tickets.keyring.current()[0], epochAt(f.sessions.now(), tickets.rotation))
	if secret == nil {
		t.Fatal("there is no secret of the present epoch")
	}
	return secret
}

// A logBook keeps the lines of a log.
type logBook struct {
	mu    sync.Mutex
	lines bytes.Buffer
}

func (b *logBook) Write(line []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lines.Write(line)
}

func (b *logBook) count(text string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Count(b.lines.Bytes(), []byte(text))
}

func (b *logBook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

func wantCounts(t testing.TB, what string, got, want map[string]uint64) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Fatalf("%s: %v, want %v", what, got, want)
	}
}

// later returns a config whose clock is ahead.
func later(by time.Duration) *tls.Config {
	config := newServer()
	config.Time = func() time.Time { return time.Now().Add(by) }
	return config
}
