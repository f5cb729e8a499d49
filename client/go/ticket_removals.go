package resumed

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

const (
	// maxRemovals is the number of removals that a frontend keeps; beyond it, it forgets them and refuses all tickets from before.
	maxRemovals = 262_144
	// maxOwnRemovals is the number of its own removals that a frontend sends again to a store that has lost its storage.
	maxOwnRemovals = 16_384
	// maxRemoval is the longest time for which the server keeps a removal or a claim.
	maxRemoval = 7 * 24 * time.Hour
	// staleStream is the time without a response after which a stream of removals is lost.
	staleStream     = 3 * time.Second
	removedKeySize  = 16
	minRemovalSweep = 1024
)

var (
	errOldServer = errors.New("the server is too old for fleet tickets: it has no stream of removals; upgrade it")
	errSilent    = errors.New("no response from the stream of removals for 3 seconds")
)

// A removalSet has the lasting removals of a namespace and its last purge, and when they were last known to be complete. Its times are
// those of the monotonic clock, except those that are compared with the negotiation of a ticket.
type removalSet struct {
	grace   time.Duration // for which tickets are accepted after the stream was live
	maximum int
	now     func() time.Time // the clock by which this frontend negotiates
	logger  *slog.Logger

	mu       sync.RWMutex
	keys     map[removedKey]time.Time // until when each is in force
	sweepAt  int                      // the number of keys beyond which those that are not in force are forgotten
	purge    time.Time                // sessions negotiated before are purged
	forgot   time.Time                // removals of sessions negotiated before may be forgotten
	complete bool                     // whether a stream has been live
	liveAt   time.Time                // when the stream was live last
	own      []item                   // the last removals of this frontend
}

// A removedKey is the beginning of a store key: that two of them agree costs a full handshake at most.
type removedKey [removedKeySize]byte

func newRemovalSet(grace time.Duration, now func() time.Time, logger *slog.Logger) *removalSet {
	return &removalSet{
		grace: grace, maximum: maxRemovals, now: now, logger: logger, keys: map[removedKey]time.Time{}, sweepAt: minRemovalSweep,
	}
}

// add adds a removal that is in force for some time; it never shortens one.
func (r *removalSet) add(key storeKey, remaining time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	removed, end := removedKey(key[:]), now.Add(remaining)
	if r.keys[removed].After(end) {
		return
	}
	r.keys[removed] = end
	if len(r.keys) <= min(r.sweepAt, r.maximum) {
		return
	}
	maps.DeleteFunc(r.keys, func(_ removedKey, end time.Time) bool { return !now.Before(end) })
	if len(r.keys) > r.maximum {
		r.logger.Error("too many removals; tickets from before now are refused", "removals", len(r.keys))
		clear(r.keys)
		r.forgot = r.now()
	}
	r.sweepAt = max(2*len(r.keys), minRemovalSweep)
}

// addOwn adds a removal of this frontend.
func (r *removalSet) addOwn(removal item, remaining time.Duration) {
	r.add(removal.key, remaining)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.own) == maxOwnRemovals {
		r.own = r.own[1:]
	}
	r.own = append(r.own, removal)
}

// ownInForce returns the removals of this frontend that have not ended.
func (r *removalSet) ownInForce() []item {
	r.mu.RLock()
	defer r.mu.RUnlock()
	ended := func(removal item) bool { return !r.now().Before(removal.notAfter) }
	return slices.DeleteFunc(slices.Clone(r.own), ended)
}

// addPurge adds a purge of all that was negotiated before a time, and reports whether it is news.
func (r *removalSet) addPurge(before time.Time) (news bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !before.After(r.purge) {
		return false
	}
	r.purge = before
	return true
}

func (r *removalSet) setLive() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.complete, r.liveAt = true, time.Now()
}

// isLive reports whether the stream is live.
func (r *removalSet) isLive() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.complete && time.Since(r.liveAt) < staleStream
}

// count returns the number of removals in force.
func (r *removalSet) count() (count int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, end := range r.keys {
		if time.Now().Before(end) {
			count++
		}
	}
	return count
}

func (r *removalSet) has(key storeKey) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.contains(key)
}

func (r *removalSet) contains(key storeKey) bool {
	end, ok := r.keys[removedKey(key[:])]
	return ok && time.Now().Before(end)
}

// endsSecret reports whether a secret was removed or purged.
func (r *removalSet) endsSecret(secret *ticketSecret) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.contains(secret.address) || secret.created.Before(r.purge)
}

// refusal returns the reason for which the tickets of a lineage are refused, or "".
func (r *removalSet) refusal(lineage storeKey, negotiated time.Time) string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	switch {
	case r.contains(lineage):
		return "revoked"
	case negotiated.Before(r.purge) || negotiated.Before(r.forgot):
		return "purged"
	case !r.complete || time.Since(r.liveAt) >= max(staleStream, r.grace):
		return "removals-unknown"
	default:
		return ""
	}
}

// A removalStream follows the removals of a namespace in the store.
type removalStream struct {
	store     pb.SessionStoreServiceClient
	namespace string
	removals  *removalSet
	end       func(ends func(*ticketSecret) bool) // ends ticket secrets
	submit    func(...item)                       // sends a removal in the background
	recheck   func()                              // compares ticket secrets with the store's
	singleUse bool
	logger    *slog.Logger

	position []byte
}

// run follows the stream until ctx is done, and begins it again when it was lost.
func (s *removalStream) run(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; failures++ {
		live, err := s.follow(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case live:
			failures = 0
			s.logger.Warn("stream of removals lost; tickets are accepted for a while", "grace", s.removals.grace, "error", err)
		case failures == 0:
			s.logger.Warn("no stream of removals; tickets are refused after the grace period", "grace", s.removals.grace, "error", err)
		}
		pause(ctx, min(firstAgreementRetry<<min(failures, 10), maxAgreementRetry))
	}
}

// follow follows one stream to its end, and reports whether it was live.
func (s *removalStream) follow(ctx context.Context) (live bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(staleStream, func() { cancel(errSilent) })
	defer silence.Stop()
	stream, err := s.store.Watch(ctx, &pb.WatchRequest{Namespace: s.namespace, Position: s.position, RemovalsOnly: true})
	for first := true; err == nil; first = false {
		var response *pb.WatchResponse
		if response, err = stream.Recv(); err != nil {
			break
		}
		if first && !response.GetRemovalsOnly() {
			return false, errOldServer
		}
		if first && len(s.position) > 0 && !response.GetContinued() {
			s.makeUpForLoss()
		}
		silence.Reset(staleStream)
		for _, event := range response.GetEvents() {
			s.apply(event)
		}
		s.position = response.GetPosition()
		if response.GetLive() {
			if s.removals.setLive(); !live {
				s.logger.Info("stream of removals live")
			}
			live = true
		}
	}
	if context.Cause(ctx) == errSilent {
		err = errSilent
	}
	return live, err
}

// makeUpForLoss sends the removals of this frontend again: the store may have lost them with its storage, as well as secrets. It may have
// lost the uses of tickets, too, so tickets of single use are refused from here on.
func (s *removalStream) makeUpForLoss() {
	s.recheck()
	for _, removal := range s.removals.ownInForce() {
		s.submit(removal)
	}
	if s.singleUse {
		s.purge(s.removals.now(), true)
	}
}

// apply applies an event. An event that this client cannot decode counts as a purge now.
func (s *removalStream) apply(event *pb.WatchEvent) {
	switch event := event.GetEvent().(type) {
	case *pb.WatchEvent_Removed:
		s.remove(event.Removed)
	case *pb.WatchEvent_Purged:
		switch purged := event.Purged; {
		case purged.GetIssuedBeforeTime() != nil:
			s.purge(purged.GetIssuedBeforeTime().AsTime(), false)
		case purged.GetPurgeTime() != nil:
			s.purge(purged.GetPurgeTime().AsTime(), true)
		default:
			s.purge(s.removals.now(), true)
		}
	case *pb.WatchEvent_Stored: // of a server that ignores removals_only
	default:
		s.purge(s.removals.now(), true)
	}
}

func (s *removalStream) remove(event *pb.SessionRemoved) {
	if len(event.GetKey()) != len(storeKey{}) {
		return // no key of a ticket
	}
	key, remaining := storeKey(event.GetKey()), maxLifetime
	if event.GetTtl() != nil {
		remaining = event.GetTtl().AsDuration()
	}
	s.removals.add(key, remaining)
	s.end(func(secret *ticketSecret) bool { return secret.address == key })
}

// purge ends the sessions that were negotiated before a time, and the secrets: all of them, or those that were created before.
func (s *removalStream) purge(before time.Time, allSecrets bool) {
	if s.removals.addPurge(before) {
		s.end(func(secret *ticketSecret) bool { return allSecrets || secret.created.Before(before) })
	}
}
