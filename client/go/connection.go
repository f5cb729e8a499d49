package resumed

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"slices"
	"time"
)

const (
	maxValue = 65_536 // bytes, the store's limit

	// These mark our entries of SessionState.Extra: the server name that the session was negotiated for, and when that was
	// (microseconds after the Unix epoch, 8 bytes, big endian).
	namePrefix   = "resumed/v1 server name\x00"
	issuedPrefix = "resumed/v1 issued\x00"
)

// A connection has the session hooks of one connection. They return no errors: crypto/tls would end the connection.
type connection struct {
	sessions *Sessions
	shared   bool      // by connections that have none of their own: nothing is remembered
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
		issued = c.issued
	}
	if state.DidResume && (c.shared || c.notAfter.Before(notAfter)) {
		notAfter = c.notAfter // zero, and so never stored, where nobody knows when the session was negotiated
	}
	session.Extra = append(session.Extra, []byte(namePrefix+state.ServerName),
		binary.BigEndian.AppendUint64([]byte(issuedPrefix), uint64(issued.UnixMicro())))
	serialized, err := session.Bytes()
	if err != nil || len(serialized)+headerSize+nonceSize+tagSize > maxValue || !now.Before(notAfter) {
		s.recorder.count(puts, "unresumable")
		return id, nil // a ticket that nobody will find
	}
	key := storeKeyOf(format, s.options.Namespace, id)
	s.sender.submit(item{
		key: key, value: s.options.Keyring.seal(key, serialized, notAfter), notAfter: notAfter, issued: issued,
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
		c.issued, c.notAfter = issuedAt(session), notAfter
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
	case s.breaker.resting():
		return nil, time.Time{}, "limited"
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

// issuedAt tells when a stored session was negotiated. What nobody knows the time of was before any purge.
func issuedAt(session *tls.SessionState) time.Time {
	for _, extra := range session.Extra {
		if micros, found := bytes.CutPrefix(extra, []byte(issuedPrefix)); found && len(micros) == 8 {
			return time.UnixMicro(int64(binary.BigEndian.Uint64(micros)))
		}
	}
	return time.UnixMicro(0)
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
