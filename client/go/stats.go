package resumed

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// LookupBuckets are the upper bounds of the buckets of [Stats.Lookups]; one more holds what took longer.
func LookupBuckets() []time.Duration { return slices.Clone(lookupBuckets) }

var lookupBuckets = []time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond,
}

// Stats are the counts since Wrap, by reason. The reasons are those of the clients in other languages.
type Stats struct {
	// Hits are handshakes that resumed: store, retried (a session just negotiated, found by a further call), coalesced (found
	// by the look-up of another handshake).
	Hits map[string]uint64
	// ForeignHits are those of Hits whose sessions another process issued, by the same reasons: a cache in this process
	// would not have them. A ticket that was issued when a session resumed is its issuer's.
	ForeignHits map[string]uint64
	// Misses: unknown; foreign-id (not issued by this fleet for this namespace) and expired-id, both without a call; timeout,
	// unavailable and rejected: the call failed; limited (the server refused the call because of a limit; for a moment after that, no call);
	// breaker-open (no call); too-many-lookups (too many look-ups under way, or four in this handshake: no call);
	// malformed, unknown-key, expired, not-authentic, undecodable: the value was no session of this fleet;
	// context-mismatch: it was negotiated for another server name, with other certificate names, or under another client
	// authentication, or crypto/tls finds its client's certificate wanting; other-cipher: it has another hash than the
	// cipher that was chosen (TLS 1.3), another version, or a cipher that is not chosen any more (TLS 1.2); context-unknown: the connection has no config of its
	// own (see Wrap), no call.
	Misses map[string]uint64
	// Puts: stored, refused, dropped (the queue was full, or a limit is used up), expired (not sent in time), unresumable (nothing to store).
	Puts map[string]uint64
	// Removals: application, dropped, refused.
	Removals map[string]uint64
	// TicketsIssued are the tickets of [TicketSessions]: current (with the secret of the present epoch), held-over (with that of an earlier
	// one, since the store did not answer).
	TicketsIssued map[string]uint64
	// TicketsWithheld are connections with a ticket that resumes nowhere: no-secret (the store has not answered yet), unresumable
	// (its life would have ended, or the connection has no config of its own: see Wrap).
	TicketsWithheld map[string]uint64
	// TicketsResumed are handshakes that resumed a ticket, by the epoch of its secret: current, previous, older, next.
	TicketsResumed map[string]uint64
	// TicketsRefused are tickets of the fleet that did not resume: unknown-secret (this frontend does not have it, and looks it up); not-authentic and
	// malformed: no ticket of this fleet after all; expired; revoked (removed, or its secret was); purged; removals-unknown (the stream of
	// removals has not been live for the grace period); replayed (it was used before, with SingleUse); server-name-mismatch, context-mismatch,
	// other-cipher and context-unknown as in Misses; timeout, unavailable, rejected, limited, breaker-open and too-many-lookups: the call
	// that SingleUse needs failed, or was not made.
	TicketsRefused map[string]uint64
	// Lookups counts look-ups that made a call by their duration, one for each of LookupBuckets and one for
	// longer ones; with SingleUse Get and Take count apart. LookupTime is their total duration.
	Lookups    []uint64
	LookupTime time.Duration
}

type kind int

const (
	hits kind = iota
	foreignHits
	misses
	puts
	removals
	ticketsIssued
	ticketsWithheld
	ticketsResumed
	ticketsRefused
	kinds
)

// reasons are all reasons that a recorder may count.
var reasons = [kinds][]string{
	hits:        {"store", "retried", "coalesced"},
	foreignHits: {"store", "retried", "coalesced"},
	misses: {
		"unknown", "foreign-id", "expired-id", "timeout", "unavailable", "rejected", "limited", "breaker-open", "too-many-lookups", "malformed", "unknown-key",
		"expired", "not-authentic", "undecodable", "context-mismatch", "context-unknown", "other-cipher",
	},
	puts:     {"stored", "refused", "dropped", "expired", "unresumable"},
	removals: {"application", "dropped", "refused"},

	ticketsIssued:   {"current", "held-over"},
	ticketsWithheld: {"no-secret", "unresumable"},
	ticketsResumed:  {"current", "previous", "older", "next"},
	ticketsRefused: {
		"unknown-secret", "not-authentic", "malformed", "expired", "revoked", "purged", "removals-unknown", "replayed", "server-name-mismatch",
		"context-mismatch", "context-unknown", "other-cipher", "timeout", "unavailable", "rejected", "limited", "breaker-open",
		"too-many-lookups",
	},
}

// recorder counts; the zero value is ready for use.
type recorder struct {
	mu      sync.Mutex
	counts  [kinds]map[string]uint64
	buckets [11]uint64
	total   time.Duration
}

func (r *recorder) count(kind kind, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts[kind] == nil {
		r.counts[kind] = map[string]uint64{}
	}
	r.counts[kind][reason]++
}

func (r *recorder) observe(lookup time.Duration) {
	bucket, _ := slices.BinarySearch(lookupBuckets, lookup)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.buckets[bucket]++
	r.total += lookup
}

func (r *recorder) snapshot() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Stats{
		Hits:        maps.Clone(r.counts[hits]),
		ForeignHits: maps.Clone(r.counts[foreignHits]),
		Misses:      maps.Clone(r.counts[misses]),
		Puts:        maps.Clone(r.counts[puts]),
		Removals:    maps.Clone(r.counts[removals]),
		Lookups:     slices.Clone(r.buckets[:]),
		LookupTime:  r.total,

		TicketsIssued:   maps.Clone(r.counts[ticketsIssued]),
		TicketsWithheld: maps.Clone(r.counts[ticketsWithheld]),
		TicketsResumed:  maps.Clone(r.counts[ticketsResumed]),
		TicketsRefused:  maps.Clone(r.counts[ticketsRefused]),
	}
}

// add adds the counts of other.
func (r *recorder) add(other *recorder) {
	other.mu.Lock()
	defer other.mu.Unlock()
	for kind, counts := range other.counts {
		if r.counts[kind] == nil {
			r.counts[kind] = map[string]uint64{}
		}
		for reason, count := range counts {
			r.counts[kind][reason] += count
		}
	}
	for n, bucket := range other.buckets {
		r.buckets[n] += bucket
	}
	r.total += other.total
}
