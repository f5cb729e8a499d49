package resumed

import (
	"crypto/tls"
	"slices"
	"time"
)

const (
	maxValue = 65_536 // bytes, the store's limit

	// namePrefix marks our entry of SessionState.Extra: the server name that the session was negotiated for.
	namePrefix = "resumed/v1 server name\x00"
)

// A connection has the session hooks of one connection. They return no errors: crypto/tls would end the connection.
type connection struct {
	sessions *Sessions
	shared   bool      // by connections that have none of their own: nothing is remembered
	notAfter time.Time // the end of life of the session that was found
	end      time.Time // of the time that this handshake may wait for the store
}

// wrap stores the session of a connection, in the background, and returns its id as the ticket.
func (c *connection) wrap(state tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
	s := c.sessions
	now := s.now()
	id := s.options.Keyring.issueID(s.options.Namespace, now)
	notAfter := now.Add(s.options.Lifetime)
	if state.DidResume && (c.shared || c.notAfter.Before(notAfter)) {
		notAfter = c.notAfter // zero, and so never stored, where nobody knows when the session was negotiated
	}
	session.Extra = append(session.Extra, []byte(namePrefix+state.ServerName))
	serialized, err := session.Bytes()
	if err != nil || len(serialized)+headerSize+nonceSize+tagSize > maxValue || !now.Before(notAfter) {
		s.recorder.count(puts, "unresumable")
		return id, nil // a ticket that nobody will find
	}
	key := storeKeyOf(format, s.options.Namespace, id)
	s.sender.submit(item{
		key: key, value: s.options.Keyring.seal(key, serialized, notAfter), notAfter: notAfter,
		issued: notAfter.Add(-s.options.Lifetime), // the tickets of a resumed connection end when the first one does
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
	session, notAfter, outcome := c.find(id, state.ServerName)
	if session == nil {
		c.sessions.recorder.count(misses, outcome)
		return nil, nil
	}
	c.sessions.recorder.count(hits, outcome)
	if !c.shared {
		c.notAfter = notAfter
	}
	// Early data could be replayed at any frontend of the fleet.
	session.EarlyData = session.EarlyData && c.sessions.options.SingleUse
	return session, nil
}

// find returns a session, the end of its life, and the reason of the hit; or nil and the reason of the miss.
func (c *connection) find(id []byte, serverName string) (*tls.SessionState, time.Time, string) {
	s := c.sessions
	now := s.now()
	issued, ok := s.options.Keyring.openID(s.options.Namespace, id)
	switch {
	case !ok:
		return nil, time.Time{}, "foreign-id"
	case now.Sub(issued) > s.options.Lifetime:
		return nil, time.Time{}, "old-id"
	case s.Resting():
		return nil, time.Time{}, "breaker-open"
	}
	key := storeKeyOf(format, s.options.Namespace, id)
	answer := s.lookUp(key, now.Sub(issued) <= freshness, c.timeLeft())
	if answer.value == nil {
		return nil, time.Time{}, answer.reason
	}
	serialized, notAfter, err := s.options.Keyring.open(key, answer.value, now)
	if err != nil {
		return nil, time.Time{}, err.Error()
	}
	session, err := tls.ParseSessionState(serialized)
	if err != nil {
		return nil, time.Time{}, "undecodable"
	}
	// RFC 6066 section 3, and the virtual host of another name may verify its clients otherwise.
	if !slices.ContainsFunc(session.Extra, func(extra []byte) bool { return string(extra) == namePrefix+serverName }) {
		return nil, time.Time{}, "other-name"
	}
	return session, notAfter, answer.reason
}

// timeLeft returns what the handshake may still wait for the store: a client may offer several sessions.
func (c *connection) timeLeft() time.Duration {
	if c.shared {
		return c.sessions.options.Deadline
	}
	if c.end.IsZero() {
		c.end = time.Now().Add(c.sessions.options.Deadline)
	}
	return time.Until(c.end)
}
