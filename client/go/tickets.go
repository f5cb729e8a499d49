package resumed

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

const (
	defaultRotation        = time.Hour
	defaultRevocationGrace = 5 * time.Minute
	// maxTicketSession is the size of the largest session that is sent as a ticket; a larger one is stored.
	maxTicketSession = 8192
	ticketIDSize     = lineageSize + 8
)

// tickets are the fleet tickets of one config: protos/README.md describes them. A nil *tickets is the mode in which all sessions are
// stored.
type tickets struct {
	tls12     bool
	namespace string
	keyring   *Keyring
	rotation  time.Duration
	lifetime  time.Duration
	secrets   *secrets
	removals  *removalSet
	agreement *agreement
	stream    *removalStream
}

func newTickets(s *Installation) *tickets {
	options := &s.options
	t := &tickets{
		tls12:     options.TicketsTLS12,
		namespace: options.Namespace,
		keyring:   options.Keyring,
		rotation:  options.Rotation,
		lifetime:  options.Lifetime,
		secrets:   &secrets{},
		removals:  newRemovalSet(max(options.RevocationGrace, 0), s.now, options.Logger),
	}
	t.agreement = &agreement{
		store: s.store, namespace: t.namespace, keyring: t.keyring, rotation: t.rotation, lifetime: t.lifetime, logger: options.Logger,
		now: s.now, secrets: t.secrets, removals: t.removals, restores: !options.SingleUse, wanted: make(chan struct{}, 1),
	}
	t.stream = &removalStream{
		store: s.store, namespace: t.namespace, removals: t.removals, logger: options.Logger, end: t.endSecrets, submit: s.sender.submit,
		recheck: t.agreement.want, singleUse: options.SingleUse,
	}
	return t
}

// endSecrets erases secrets and begins an agreement on others.
func (t *tickets) endSecrets(ends func(*ticketSecret) bool) {
	if t.secrets.drop(ends) {
		t.agreement.want()
	}
}

// issues reports whether sessions of a TLS version are sent as tickets.
func (t *tickets) issues(version uint16) bool {
	return t != nil && (version >= tls.VersionTLS13 || t.tls12)
}

// accepts reports whether a ticket, any bytes at all, is one of the fleet's by its size; the id of a stored session is shorter.
func (t *tickets) accepts(ticket []byte) bool { return t != nil && len(ticket) >= minTicket }

// encrypter returns the key for a ticket with that salt, and the reason under which the ticket counts.
func (t *tickets) encrypter(now time.Time, salt []byte) (key ticketKey, reason string, ok bool) {
	keys, present := t.keyring.current(), epochAt(now, t.rotation)
	key, ok = t.secrets.encrypter(keys, present, now, salt)
	reason = "current"
	if !ok || key.epoch.start != present.start || key.keyID != keys[0].id {
		t.agreement.want()
	}
	if key.epoch.start != present.start {
		reason = "held-over"
	}
	return key, reason, ok
}

// opener returns the key that opens a ticket, or the reason of the refusal: foreignID if the fleet did not name it.
func (t *tickets) opener(ticket []byte, now time.Time) (key ticketKey, refusal string) {
	name, keys := keyName(ticket), t.keyring.current()
	if key, ok := t.secrets.opener(name, ticket[keyNameSize:ticketHead]); ok && hasKey(keys, key.keyID) {
		if !now.Before(key.notAfter) {
			return ticketKey{}, "expired"
		}
		return key, ""
	}
	for _, fleetKey := range keys {
		if !name.namedBy(fleetKey, t.namespace) {
			continue
		}
		switch epoch := name.epoch(); {
		case !now.Before(epoch.notAfter(t.lifetime)):
			return ticketKey{}, "expired"
		case t.removals.has(fleetKey.secretAddress(t.namespace, epoch)):
			return ticketKey{}, "revoked"
		default:
			t.agreement.lookUp(fleetKey, epoch)
			return ticketKey{}, "unknown-secret"
		}
	}
	return ticketKey{}, foreignID
}

// A descent is the same in all tickets of a connection.
type descent struct {
	lineage         lineage
	negotiated, end time.Time
}

// descentOf returns the descent of the tickets of a connection.
func (c *connection) descentOf(state tls.ConnectionState, now time.Time) *descent {
	if c.descent == nil {
		c.descent = &descent{lineage: newLineage()}
		c.descent.negotiated, c.descent.end = c.life(state, now)
		if state.DidResume && c.resumed != nil {
			c.descent.lineage = *c.resumed
		}
	}
	return c.descent
}

// issueTicket returns the session of a connection as a ticket.
func (c *connection) issueTicket(state tls.ConnectionState, session []byte) []byte {
	s := c.sessions
	now := s.now()
	var salt [saltSize]byte
	_, _ = rand.Read(salt[:]) // never fails
	key, reason, ok := s.tickets.encrypter(now, salt[:])
	if !ok {
		s.recorder.count(ticketsWithheld, "no-secret")
		return unknownID()
	}
	descent := c.descentOf(state, now)
	end := earlier(descent.end, key.notAfter)
	if !now.Before(end) {
		s.recorder.count(ticketsWithheld, "unresumable")
		return unknownID()
	}
	ticket := sealTicket(key.name, key.key, salt, ticketState{
		fingerprint: c.fingerprint(state.ServerName), lineage: descent.lineage, negotiated: descent.negotiated, end: end,
		serverName: nameDigest(state.ServerName),
	}, session)
	s.recorder.count(ticketsIssued, reason)
	if s.options.Issued != nil {
		s.options.Issued(state, ticketID(descent.lineage, descent.end))
	}
	return ticket
}

// findTicket returns the session in a ticket and the reason under which it counts, or nil and the reason of the refusal.
func (c *connection) findTicket(ticket []byte, state tls.ConnectionState) (*tls.SessionState, string) {
	s, t := c.sessions, c.sessions.tickets
	now := s.now()
	key, refusal := t.opener(ticket, now)
	if refusal != "" {
		return nil, refusal
	}
	plaintext, err := openTicket(key.key, ticket)
	if err != nil {
		return nil, err.Error()
	}
	sealed, serialized, err := parseTicket(plaintext)
	if err != nil {
		return nil, err.Error()
	}
	switch {
	case !now.Before(sealed.end):
		return nil, "expired"
	case sealed.serverName != nameDigest(state.ServerName):
		return nil, "server-name-mismatch"
	case sealed.fingerprint != c.fingerprint(state.ServerName):
		return nil, "context-mismatch"
	}
	if refusal := t.removals.refusal(lineageKey(t.namespace, sealed.lineage), sealed.negotiated); refusal != "" {
		return nil, refusal
	}
	session, err := tls.ParseSessionState(serialized)
	if err != nil {
		return nil, "malformed"
	}
	found := &found{ticket: true, reason: key.epoch.position(now)}
	found.version, found.suite = headOf(serialized)
	if found.version != state.Version || found.hasOtherHash(state) {
		return nil, "other-cipher"
	}
	if s.options.SingleUse { // last, so that a connection that must not resume a ticket does not spend it
		if refusal := c.claim(ticket, key, sealed.negotiated, sealed.end.Sub(now)); refusal != "" {
			return nil, refusal
		}
	}
	c.issued, c.notAfter, c.resumed, c.found = sealed.negotiated, sealed.end, &sealed.lineage, found
	return session, found.reason
}

// claim claims a ticket, which has that much of its life left, for its single use. It returns the reason of the refusal, or "".
//
// The call also looks the secret of the ticket's key up: without it the store has lost its storage, and may have lost an earlier claim.
// The store itself refuses a ticket that was negotiated before a purge, even one that this process has not received yet.
func (c *connection) claim(ticket []byte, key ticketKey, negotiated time.Time, remaining time.Duration) (refusal string) {
	s, t := c.sessions, c.sessions.tickets
	if refusal := c.refuseCall(); refusal != "" {
		return refusal
	}
	timeout := c.timeLeft()
	if s.hasTooLittle(timeout) { // a claim whose answer comes too late spends the ticket for nothing
		return "timeout"
	}
	fleet := keyWithID(t.keyring.current(), key.keyID)
	if fleet == nil {
		return "unknown-secret"
	}
	use := make([]byte, 16) // the same in a call that is repeated
	_, _ = rand.Read(use)   // never fails
	var kept time.Duration
	lost := false
	call := func(ctx context.Context, usedKey storeKey) ([]byte, error) {
		// If a step of the store's clock ends the claim, it has ended the secret before.
		ttl := max(t.withMargin(remaining), key.notAfter.Sub(s.now()))
		put := &pb.PutRequest{
			Namespace: t.namespace, Key: usedKey[:], Value: use, Ttl: durationpb.New(ttl), IssueTime: timestamppb.New(negotiated), Pinned: true,
		}
		get := &pb.GetRequest{Namespace: t.namespace, Key: key.address[:]}
		results, err := sendBatch(ctx, s.store, &pb.BatchRequest{Operations: []*pb.BatchOperation{
			{Operation: &pb.BatchOperation_Put{Put: put}}, {Operation: &pb.BatchOperation_Get{Get: get}},
		}}, timeout)
		if err != nil {
			return nil, err
		}
		for _, result := range results {
			switch failure := result.GetError(); {
			case failure == nil:
			case codes.Code(failure.GetCode()) == codes.AlreadyExists:
				return nil, nil
			default:
				return nil, status.ErrorProto(failure)
			}
		}
		kept = results[0].GetPut().GetTtl().AsDuration()
		lost = !t.isSecretOf(key, fleet, results[1].GetGet().GetSession().GetValue(), s.now())
		return use, nil
	}
	switch answer := s.ask(call, useKey(t.namespace, ticket), false, false, timeout); {
	case answer.value != nil && lost:
		t.agreement.want()
		return "unknown-secret"
	case answer.value != nil && kept < remaining:
		s.logShortClaims.Do(func() {
			s.options.Logger.Error("the server keeps claims for less time than tickets of single use live, and those are refused: upgrade it, or lower "+
				"Lifetime", "server", kept, "ticket", remaining)
		})
		return "rejected"
	case answer.value != nil:
		return ""
	case answer.reason == "unknown":
		return "replayed"
	default:
		return answer.reason
	}
}

// isSecretOf reports whether a value, any bytes at all, is the secret of a ticket's key, sealed with a key of the fleet.
func (t *tickets) isSecretOf(key ticketKey, fleet *fleetKey, value []byte, now time.Time) bool {
	secret, err := openTicketSecret(t.namespace, fleet, key.epoch, value, now)
	if err != nil {
		return false
	}
	defer secret.erase()
	return secret.name == key.name
}

// withMargin returns how long the store keeps the removal of a lineage, or the claim of a ticket, with that much of its life left: by
// the clock of another frontend the ticket may live longer, by an epoch at most.
func (t *tickets) withMargin(remaining time.Duration) time.Duration { return remaining + t.rotation }

// ticketID returns the id of a lineage, for Remove.
func ticketID(lineage lineage, end time.Time) []byte {
	return binary.BigEndian.AppendUint64(lineage[:], uint64(end.Unix()))
}

// removeLineage removes the lineage of an id: here at once, and from the whole fleet in the background.
func (s *Installation) removeLineage(id []byte) {
	end := time.Unix(int64(binary.BigEndian.Uint64(id[lineageSize:])), 0)
	key := lineageKey(s.options.Namespace, lineage(id[:lineageSize]))
	now := s.now()
	remaining := s.tickets.withMargin(end.Sub(now))
	removal := item{key: key, notAfter: now.Add(remaining)}
	s.tickets.removals.addOwn(removal, remaining)
	s.sender.submit(removal)
}
