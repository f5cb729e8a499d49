package resumed

import (
	"crypto/tls"
	"time"
)

const maxValue = 65_536 // bytes, the store's limit

// A connection has the session hooks of one connection. They return no errors: crypto/tls would end the connection.
type connection struct {
	sessions *Sessions
	config   *tls.Config // of this connection alone
	print    *fingerprint
	issued   time.Time // when the session that was found was negotiated
	notAfter time.Time // the end of its life
	end      time.Time // of the time that this handshake may wait for the store
}

// wrap stores the session of a connection, in the background, and returns its id as the ticket.
func (c *connection) wrap(state tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
	s := c.sessions
	now := s.now()
	id := s.options.Keyring.issueID(s.options.Namespace, now)
	issued, notAfter := now, now.Add(s.options.Lifetime)
	if state.DidResume {
		issued, notAfter = c.issued, earlier(notAfter, c.notAfter)
	}
	if len(state.PeerCertificates) > 0 {
		notAfter = earlier(notAfter, state.PeerCertificates[0].NotAfter)
	}
	serialized, err := session.Bytes()
	if err != nil || len(serialized)+envelopeHeader+headerSize+nonceSize+tagSize > maxValue || !now.Before(notAfter) {
		s.recorder.count(puts, "unresumable")
		return id, nil // a ticket that nobody will find
	}
	key := storeKeyOf(format, s.options.Namespace, id)
	plaintext := envelope{c.fingerprint(state.ServerName), issued, serialized}.bytes()
	s.sender.submit(item{
		key: key, value: s.options.Keyring.seal(key, plaintext, notAfter), notAfter: notAfter, issued: issued,
	})
	if s.options.Issued != nil {
		s.options.Issued(state, id)
	}
	return id, nil
}

// unwrap returns the session of an id that a client offered, any bytes at all, or nil for a full handshake.
func (c *connection) unwrap(id []byte, state tls.ConnectionState) (*tls.SessionState, error) {
	if len(id) == 0 { // TLS 1.2: no ticket was offered
		return nil, nil
	}
	session, outcome := c.find(id, state.ServerName)
	if session == nil {
		c.sessions.recorder.count(misses, outcome)
		return nil, nil
	}
	c.sessions.recorder.count(hits, outcome)
	// Early data could be replayed at any frontend of the fleet.
	session.EarlyData = session.EarlyData && c.sessions.options.SingleUse
	return session, nil
}

// find returns a session and the reason of the hit, or nil and the reason of the miss.
func (c *connection) find(id []byte, serverName string) (*tls.SessionState, string) {
	s := c.sessions
	now := s.now()
	issued, ok := s.options.Keyring.openID(s.options.Namespace, id)
	switch {
	case !ok:
		return nil, "foreign-id"
	case now.Sub(issued) > s.options.Lifetime:
		return nil, "old-id"
	case s.Resting():
		return nil, "breaker-open"
	case s.breaker.resting():
		return nil, "limited"
	}
	key := storeKeyOf(format, s.options.Namespace, id)
	answer := s.lookUp(key, now.Sub(issued) <= freshness, c.timeLeft())
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
	if stored.fingerprint != c.fingerprint(serverName) {
		return nil, "context-mismatch"
	}
	if s.options.SingleUse { // only now: a connection that must not resume a session does not use it up
		if reason := s.take(key, c.timeLeft()); reason != "" {
			return nil, reason
		}
	}
	c.issued, c.notAfter = stored.issued, notAfter
	return session, answer.reason
}

// fingerprint returns the fingerprint of the connection, whose server name never changes.
func (c *connection) fingerprint(serverName string) fingerprint {
	if c.print == nil {
		print := c.sessions.digests.fingerprintOf(c.config, serverName)
		c.print = &print
	}
	return *c.print
}

// timeLeft returns what the handshake may still wait for the store: a client may offer several sessions.
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

// wrapUnknown is WrapSession of connections that have no config of their own, so that nothing is known of their context. It
// stores nothing.
func (s *Sessions) wrapUnknown(tls.ConnectionState, *tls.SessionState) ([]byte, error) {
	s.recorder.count(puts, "unresumable")
	return s.options.Keyring.issueID(s.options.Namespace, s.now()), nil // a ticket that nobody will find
}

// unwrapUnknown is UnwrapSession of such connections. It finds nothing.
func (s *Sessions) unwrapUnknown(id []byte, _ tls.ConnectionState) (*tls.SessionState, error) {
	if len(id) > 0 {
		s.recorder.count(misses, "context-unknown")
	}
	return nil, nil
}
