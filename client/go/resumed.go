// Package resumed keeps the sessions of a crypto/tls server in a central store, so that any frontend of a fleet resumes
// the sessions of every other.
//
// [Wrap] sets the session hooks of a [tls.Config]. A ticket then is an id of 32 bytes, which only the fleet can issue; the
// session itself is in the store, sealed with the fleet's key, where it can be removed, or taken once. With [TicketSessions] the
// ticket is the session, sealed with a key that all frontends derive from secrets in the store.
//
// A handshake never waits for the server beyond a deadline, and not at all while the circuit breaker is open. Any failure costs a
// full handshake and a count in [Stats], nothing else.
package resumed

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

const (
	defaultLifetime   = 2 * time.Hour
	maxLifetime       = 7 * 24 * time.Hour // RFC 8446 section 4.6.1
	defaultDeadline   = 50 * time.Millisecond
	defaultMaxLookups = 64
	closePatience     = time.Second
)

var namespacePattern = regexp.MustCompile(`^[a-z0-9.-]{1,63}$`)

// A Mode is the place in which a fleet keeps its sessions.
type Mode string

const (
	// StoredSessions are kept in the store, and a ticket is the id of one. Each resumption is a call.
	StoredSessions Mode = "stored"
	// TicketSessions are kept by the clients, in tickets that every frontend of the fleet opens. The store has the secrets of the
	// tickets, which change with each rotation, and the sessions that were removed. Resumptions make no call, unless SingleUse
	// is set. Sessions that were stored are accepted as well, so a fleet can change its mode.
	TicketSessions Mode = "tickets"
)

// Options of [Wrap]. Namespace and Keyring are required; the zero value of any other is its default.
type Options struct {
	// Namespace is the name of the fleet that shares these sessions: 1 to 63 characters of [a-z0-9.-]. Within it a session resumes only on a
	// connection with the same server name, certificate names, ClientAuth and ClientCAs. Servers that differ in something else
	// (VerifyPeerCertificate, GetCertificate, tenants of one certificate) need different namespaces.
	Namespace string
	// Keyring holds the fleet's keys: see [LoadKeyring].
	Keyring *Keyring
	// Sessions is the place of the sessions: [StoredSessions] by default.
	Sessions Mode
	// TicketsTLS12 makes sessions of TLS 1.2 tickets as well, with [TicketSessions]. Such a ticket opens the connections that were
	// recorded with it, if its secret becomes known; without this option, sessions of TLS 1.2 are stored.
	TicketsTLS12 bool
	// Rotation is the time after which tickets have a new secret, in whole seconds: 1 second to 7 days, 1 hour by default. Clocks of
	// frontends may differ by five sixths of it.
	Rotation time.Duration
	// RevocationGrace is the time for which tickets are accepted while removals cannot be received from the store; 5 minutes by
	// default, none if negative.
	RevocationGrace time.Duration
	// Lifetime of a session from its negotiation on, at most 7 days; 2 hours by default. Resuming never prolongs it.
	Lifetime time.Duration
	// Deadline is the time that a handshake may wait for calls, in all its look-ups together; 50 milliseconds by default.
	Deadline time.Duration
	// SingleUse makes a session resume once in the whole fleet (RFC 8446 section 8.1). Only then may QUIC servers accept
	// early data from it.
	SingleUse bool
	// MaxLookups is the number of look-ups that may be under way at once, 64 by default; beyond it a handshake makes none.
	MaxLookups int
	// Issued, if not nil, is called during the handshake for each session that will be stored or is sent as a ticket, with the state
	// of its connection and the id that [Installation.Remove] takes.
	Issued func(connection tls.ConnectionState, id []byte)
	// Logger gets a line when the circuit breaker opens or closes, and when a keyring cannot be read: slog.Default() if nil.
	Logger *slog.Logger
}

// Installation is the sessions of a wrapped config. It is safe for concurrent use.
type Installation struct {
	options  Options
	store    pb.SessionStoreServiceClient
	now      func() time.Time
	recorder recorder
	breaker  breaker
	sender   *sender
	flights  singleflight.Group
	lookups  chan struct{} // has one element for each look-up under way
	opened   chan struct{} // has one element when the breaker has opened
	digests  digests
	tickets  *tickets // nil with StoredSessions

	logShortClaims sync.Once

	ctx    context.Context // of all calls, until Close
	cancel context.CancelCauseFunc
	done   sync.WaitGroup
}

// Wrap makes config keep its sessions in store, and resume the sessions of every other frontend. It sets the hooks
// WrapSession, UnwrapSession and GetConfigForClient; call it before the first connection. Configs that an earlier
// GetConfigForClient returns are wrapped as well, unless they have session hooks of their own: then see
// [Installation.ForClient]. A connection whose config did not come from this GetConfigForClient, nor from ForClient, neither
// stores sessions nor resumes any.
//
// Several configs may share a store, which Dial makes. Close the Installation when the server has ended.
func Wrap(config *tls.Config, store grpc.ClientConnInterface, options Options) (*Installation, error) {
	switch {
	case config == nil || store == nil:
		return nil, errors.New("resumed: Wrap needs a tls.Config and a store")
	case config.WrapSession != nil || config.UnwrapSession != nil:
		return nil, errors.New("resumed: the tls.Config has session hooks already")
	case config.SessionTicketsDisabled:
		return nil, errors.New("resumed: SessionTicketsDisabled is set, so nothing could be resumed")
	}
	if err := options.complete(); err != nil {
		return nil, err
	}
	s := &Installation{
		options: options,
		store:   pb.NewSessionStoreServiceClient(store),
		now:     config.Time,
		lookups: make(chan struct{}, options.MaxLookups),
		opened:  make(chan struct{}, 1),
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.sender = newSender(s)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.done.Go(func() { s.sender.run(s.ctx) })
	s.done.Go(func() { s.runProber(s.ctx) })
	if options.Sessions == TicketSessions {
		s.tickets = newTickets(s)
		s.done.Go(func() { s.tickets.agreement.run(s.ctx) })
		s.done.Go(func() { s.tickets.stream.run(s.ctx) })
	}

	if _, ok := configField(reflect.ValueOf(&tls.ClientHelloInfo{})); !ok {
		s.options.Logger.Warn("this Go version has no config in tls.ClientHelloInfo: only connections with a config from ForClient resume")
	}
	config.WrapSession, config.UnwrapSession = s.wrapUnknown, s.unwrapUnknown
	config.GetConfigForClient = s.configForClient(config.GetConfigForClient)
	return s, nil
}

func (o *Options) complete() error {
	switch {
	case !namespacePattern.MatchString(o.Namespace):
		return fmt.Errorf("resumed: Namespace must be 1 to 63 characters of [a-z0-9.-], not %q", o.Namespace)
	case o.Keyring == nil:
		return errors.New("resumed: Keyring is required: see LoadKeyring")
	case o.Lifetime != 0 && (o.Lifetime < time.Second || o.Lifetime > maxLifetime):
		return fmt.Errorf("resumed: Lifetime must be 1 second to 7 days, not %v", o.Lifetime)
	case o.Sessions != "" && o.Sessions != StoredSessions && o.Sessions != TicketSessions:
		return fmt.Errorf("resumed: Sessions must be %q or %q, not %q", StoredSessions, TicketSessions, o.Sessions)
	case o.TicketsTLS12 && o.Sessions != TicketSessions:
		return fmt.Errorf("resumed: TicketsTLS12 needs Sessions: %q", TicketSessions)
	case o.Rotation != 0 && (o.Rotation < time.Second || o.Rotation > maxRotation || o.Rotation%time.Second != 0):
		return fmt.Errorf("resumed: Rotation must be 1 second to 7 days, in whole seconds, not %v", o.Rotation)
	case o.Deadline < 0:
		return fmt.Errorf("resumed: Deadline must be above 0, not %v", o.Deadline)
	case o.MaxLookups < 0:
		return fmt.Errorf("resumed: MaxLookups must be above 0, not %d", o.MaxLookups)
	}
	o.Lifetime = cmp.Or(o.Lifetime, defaultLifetime)
	o.Deadline = cmp.Or(o.Deadline, defaultDeadline)
	o.Sessions = cmp.Or(o.Sessions, StoredSessions)
	o.Rotation = cmp.Or(o.Rotation, defaultRotation)
	o.RevocationGrace = cmp.Or(o.RevocationGrace, defaultRevocationGrace)
	if o.Sessions == TicketSessions && o.Lifetime+o.Rotation > maxRemoval {
		return fmt.Errorf("resumed: Lifetime and Rotation must be 7 days together at most, not %v and %v: the server keeps the removal of a "+
			"ticket no longer", o.Lifetime, o.Rotation)
	}
	o.MaxLookups = cmp.Or(o.MaxLookups, defaultMaxLookups)
	o.Logger = cmp.Or(o.Logger, slog.Default())
	return nil
}

// ForClient returns a copy of config for one connection, with the hooks that keep its sessions here. It is for servers
// whose own GetConfigForClient chooses among configs with Sessions of their own: return ForClient of the chosen one.
func (s *Installation) ForClient(config *tls.Config) *tls.Config {
	config = config.Clone()
	connection := &connection{sessions: s, config: config}
	config.WrapSession, config.UnwrapSession = connection.wrap, connection.unwrap
	config.VerifyConnection = connection.verify(config.VerifyConnection)
	return config
}

// Remove removes a session from the whole fleet, in the background: see [Installation.Flush]. In this process it resumes no
// more once Remove returns. It takes the id that [Options.Issued] got. That of a ticket removes all tickets that stem from the
// same full handshake.
func (s *Installation) Remove(id []byte) {
	if s.tickets != nil && len(id) == ticketIDSize {
		s.removeLineage(id)
		return
	}
	key := storeKeyOf(format, s.options.Namespace, id)
	s.sender.submit(item{key: key})
	s.flights.Forget(string(key[:])) // no handshake joins a look-up that began before
}

// Flush waits until all sessions and removals so far are sent. It returns an error when ctx ends first, when three Batches in a row
// fail, and when a removal was refused or dropped, until the same one is requested again.
func (s *Installation) Flush(ctx context.Context) error { return s.sender.flush(ctx) }

// Stats returns the counts since Wrap.
func (s *Installation) Stats() Stats { return s.recorder.snapshot() }

// BreakerOpen reports whether the server kept failing, so that handshakes make no look-ups at present.
func (s *Installation) BreakerOpen() bool { return s.breaker.isOpen() }

// RemovalsLive reports whether removals of tickets are received from the store at present; false with [StoredSessions].
func (s *Installation) RemovalsLive() bool { return s.tickets != nil && s.tickets.removals.isLive() }

// Close sends the rest of the queue, for up to a second, and stops. Connections go on; nothing more is stored or resumed.
// The connection to the store stays open: it is the caller's.
func (s *Installation) Close() error {
	s.sender.close()
	ctx, cancel := context.WithTimeout(s.ctx, closePatience)
	defer cancel()
	err := s.Flush(ctx)
	s.cancel(errClosed)
	s.done.Wait()
	if errors.Is(err, errClosed) { // before
		return nil
	}
	return err
}

// configForClient gives each connection a config of its own: crypto/tls passes the session hooks neither the config of
// a connection nor the session that it resumed. next is the server's own hook, or nil.
func (s *Installation) configForClient(next func(*tls.ClientHelloInfo) (*tls.Config, error)) func(*tls.ClientHelloInfo) (*tls.Config, error) {
	return func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if next != nil {
			switch config, err := next(hello); {
			case err != nil:
				return nil, err
			case config != nil && (config.WrapSession != nil || config.UnwrapSession != nil || config.SessionTicketsDisabled):
				return config, nil
			case config != nil:
				return s.ForClient(config), nil
			}
		}
		if config := configOf(hello); config != nil {
			return s.ForClient(config), nil
		}
		return nil, nil
	}
}

// configOf returns the config that the connection of hello has now, or nil if crypto/tls has changed where it keeps it.
// It need not be the one that was wrapped: net/http, gRPC and others clone theirs and complete the clone, with
// certificates or protocols, which must not get lost.
func configOf(hello *tls.ClientHelloInfo) *tls.Config {
	field, ok := configField(reflect.ValueOf(hello))
	if !ok || field.IsNil() {
		return nil
	}
	return reflect.NewAt(field.Type().Elem(), field.UnsafePointer()).Interface().(*tls.Config)
}

func configField(hello reflect.Value) (reflect.Value, bool) {
	field := hello.Elem().FieldByName("config")
	return field, field.IsValid() && field.Type() == reflect.TypeFor[*tls.Config]()
}
