package resumed

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"slices"
	"time"
)

const (
	maxValue = 65_536 // bytes, the server's limit
	// maxLookupsPerHandshake is the number of ids that a client offers in one handshake and that may cost a look-up.
	maxLookupsPerHandshake = 4
	// foreignID is the reason of the miss if the fleet did not issue a ticket for the namespace.
	foreignID = "foreign-id"
)

// A connection has the session hooks of one connection. They return no errors: crypto/tls would end the connection.
type connection struct {
	sessions *Installation
	config   *tls.Config // of this connection alone
	print    *fingerprint
	issued   time.Time // when the session that was found was negotiated
	notAfter time.Time // the end of its life
	end      time.Time // of the time in which this handshake may wait for calls
	asked    int       // number of ids that were looked up
	offered  [][]byte  // the ids that were looked up or rejected
	found    *found    // until crypto/tls has decided about it
	resumed  *lineage  // that of the ticket that was found, nil if it was a stored session
	descent  *descent  // of the tickets that were issued
}

// found is a session that a look-up or a ticket returned to crypto/tls, which may still not resume it.
type found struct {
	ticket         bool   // whether a ticket of the fleet had it
	reason         string // of the hit
	foreign        bool   // whether another process issued it
	version, suite uint16
}

// wrap returns the ticket of a connection: with its session, or with the id of the session, which it stores.
func (c *connection) wrap(state tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
	if c.sessions.tickets.issues(state.Version) {
		if serialized, err := session.Bytes(); err == nil && len(serialized) <= maxTicketSession {
			return c.issueTicket(state, serialized), nil
		}
	}
	return c.store(state, session), nil
}

// store stores the session of a connection, in the background, and returns its id.
func (c *connection) store(state tls.ConnectionState, session *tls.SessionState) []byte {
	s := c.sessions
	if !state.DidResume && s.breaker.isScarce() {
		s.recorder.count(puts, "dropped")
		return unknownID()
	}
	now := s.now()
	id := s.options.Keyring.issueID(s.options.Namespace, now)
	issued, notAfter := c.life(state, now)
	serialized, err := session.Bytes()
	if err != nil || len(serialized)+envelopeHeader+headerSize+nonceSize+tagSize > maxValue || !now.Before(notAfter) {
		s.recorder.count(puts, "unresumable")
		return unknownID()
	}
	key := storeKeyOf(format, s.options.Namespace, id)
	plaintext := envelope{c.fingerprint(state.ServerName), issued, serialized}.bytes()
	s.sender.submit(item{
		key: key, value: s.options.Keyring.seal(key, plaintext, notAfter), notAfter: notAfter, issued: issued,
	})
	if s.options.Issued != nil {
		s.options.Issued(state, id)
	}
	return id
}

// life returns when the session of a connection was negotiated, and the end of its life.
func (c *connection) life(state tls.ConnectionState, now time.Time) (issued, notAfter time.Time) {
	issued, notAfter = now, now.Add(c.sessions.options.Lifetime)
	if state.DidResume {
		issued, notAfter = c.issued, earlier(notAfter, c.notAfter)
	}
	if len(state.PeerCertificates) > 0 {
		notAfter = earlier(notAfter, state.PeerCertificates[0].NotAfter)
	}
	return issued, notAfter
}

// unwrap returns the session of a ticket that a client offered, any bytes at all, or nil for a full handshake.
func (c *connection) unwrap(id []byte, state tls.ConnectionState) (*tls.SessionState, error) {
	if len(id) == 0 { // TLS 1.2: no ticket was offered
		return nil, nil
	}
	c.settle(state) // crypto/tls asks for the next one if it does not resume the one before
	if slices.ContainsFunc(c.offered, func(known []byte) bool { return string(known) == string(id) }) {
		return nil, nil // the outcome would be the same
	}
	c.offered = append(c.offered, id)
	find, refusals := c.find, misses
	if c.sessions.tickets.accepts(id) {
		find, refusals = c.findTicket, ticketsRefused
	}
	session, outcome := find(id, state)
	if session == nil {
		if outcome == foreignID {
			refusals = misses
		}
		c.sessions.recorder.count(refusals, outcome)
		return nil, nil
	}
	// Early data could be replayed at any frontend of the fleet.
	session.EarlyData = session.EarlyData && c.sessions.options.SingleUse
	return session, nil
}

// verify is VerifyConnection, which crypto/tls calls in each handshake once it is decided whether it resumes; next is the
// server's own hook, or nil.
func (c *connection) verify(next func(tls.ConnectionState) error) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if next != nil {
			if err := next(state); err != nil {
				return err
			}
		}
		c.settle(state)
		return nil
	}
}

// settle counts the outcome of the session that was found.
func (c *connection) settle(state tls.ConnectionState) {
	found := c.found
	c.found = nil
	switch recorder := &c.sessions.recorder; {
	case found == nil:
	case found.ticket && !state.DidResume:
		recorder.count(ticketsRefused, found.refusal(state))
	case found.ticket:
		recorder.count(ticketsResumed, found.reason)
	case !state.DidResume:
		recorder.count(misses, found.refusal(state))
	default:
		recorder.count(hits, found.reason)
		if found.foreign {
			recorder.count(foreignHits, found.reason)
		}
	}
}

// refusal returns the reason for which crypto/tls did not resume a session. If the cipher suite does not explain it, the client's
// certificate does.
func (f *found) refusal(state tls.ConnectionState) string {
	if state.Version < tls.VersionTLS13 && f.suite != state.CipherSuite {
		return "other-cipher"
	}
	return "context-mismatch"
}

// hasOtherHash reports whether a session of TLS 1.3 cannot resume with the cipher that was chosen (RFC 8446 section 4.2.11).
func (f *found) hasOtherHash(state tls.ConnectionState) bool {
	return state.Version == tls.VersionTLS13 &&
		(f.suite == tls.TLS_AES_256_GCM_SHA384) != (state.CipherSuite == tls.TLS_AES_256_GCM_SHA384)
}

// find returns a session and the reason of the hit, or nil and the reason of the miss.
func (c *connection) find(id []byte, state tls.ConnectionState) (*tls.SessionState, string) {
	s := c.sessions
	now := s.now()
	key := storeKeyOf(format, s.options.Namespace, id)
	issued, ok := s.options.Keyring.openID(s.options.Namespace, id)
	switch {
	case !ok:
		return nil, foreignID
	case now.Sub(issued) > s.options.Lifetime:
		return nil, "expired-id"
	case s.sender.isRemoved(key):
		return nil, "unknown"
	}
	if miss := c.refuseCall(); miss != "" {
		return nil, miss
	}
	// On a frontend whose clock is behind, new ids of other frontends are from the future: the age counts without its sign.
	fresh := now.Sub(issued).Abs() <= freshness
	answer := s.lookUp(key, fresh, c.timeLeft())
	if answer.value == nil {
		return nil, answer.reason
	}
	plaintext, notAfter, err := s.options.Keyring.open(key, answer.value, now)
	if err != nil {
		return nil, err.Error()
	}
	stored, err := parseEnvelope(plaintext)
	if err != nil {
		return nil, err.Error()
	}
	session, err := tls.ParseSessionState(stored.session)
	if err != nil {
		return nil, "undecodable"
	}
	if stored.fingerprint != c.fingerprint(state.ServerName) {
		return nil, "context-mismatch"
	}
	found := &found{reason: answer.reason, foreign: !thisProcess.issued(id)}
	found.version, found.suite = headOf(stored.session)
	if found.version != state.Version || found.hasOtherHash(state) {
		return nil, "other-cipher"
	}
	if s.options.SingleUse { // last, so that a connection that must not resume a session does not spend it
		if reason := s.take(key, c.timeLeft()); reason != "" {
			return nil, reason
		}
	}
	if s.sender.isRemoved(key) { // since the look-up began
		return nil, "unknown"
	}
	c.issued, c.notAfter, c.resumed, c.found = stored.issued, notAfter, nil, found
	return session, answer.reason
}

// refuseCall returns the reason for which this handshake makes no call, or "" and counts the call.
func (c *connection) refuseCall() string {
	switch s := c.sessions; {
	case s.breaker.isOpen():
		return "breaker-open"
	case s.breaker.isLimited():
		return "limited"
	case c.asked >= maxLookupsPerHandshake:
		return "too-many-lookups"
	}
	c.asked++
	return ""
}

// headOf returns the version and the cipher suite of a session that crypto/tls has parsed: it exports neither, but documents
// the encoding at [tls.SessionState].
func headOf(session []byte) (version, suite uint16) {
	return binary.BigEndian.Uint16(session), binary.BigEndian.Uint16(session[3:])
}

// fingerprint returns the fingerprint of the connection, whose server name never changes.
func (c *connection) fingerprint(serverName string) fingerprint {
	if c.print == nil {
		print := c.sessions.digests.fingerprintOf(c.config, serverName)
		c.print = &print
	}
	return *c.print
}

// timeLeft returns the rest of the deadline: all look-ups of a handshake share it.
func (c *connection) timeLeft() time.Duration {
	if c.end.IsZero() {
		c.end = time.Now().Add(c.sessions.options.Deadline)
	}
	return time.Until(c.end)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// unknownID returns a ticket for which no frontend of the fleet makes a call: crypto/tls sends a ticket in any case.
func unknownID() []byte {
	id := make([]byte, idSize)
	_, _ = rand.Read(id) // never fails
	return id
}

// wrapUnknown is WrapSession of connections that have no config of their own, so that their context is unknown. It
// stores nothing.
func (s *Installation) wrapUnknown(state tls.ConnectionState, _ *tls.SessionState) ([]byte, error) {
	kind := puts
	if s.tickets.issues(state.Version) {
		kind = ticketsWithheld
	}
	s.recorder.count(kind, "unresumable")
	return unknownID(), nil
}

// unwrapUnknown is UnwrapSession of such connections. It finds nothing.
func (s *Installation) unwrapUnknown(id []byte, _ tls.ConnectionState) (*tls.SessionState, error) {
	switch {
	case s.tickets.accepts(id):
		s.recorder.count(ticketsRefused, "context-unknown")
	case len(id) > 0:
		s.recorder.count(misses, "context-unknown")
	}
	return nil, nil
}
