package resumed

import (
	"sync"
	"time"
)

// breakerLimit is how many failures in a row open a breaker.
const breakerLimit = 3

const (
	// For how long nobody asks a store that has just refused a call because of a limit; twice as long each time in a row.
	firstRest, longestRest = 50 * time.Millisecond, 800 * time.Millisecond
	// How long to wait before each trial of a store that keeps failing; twice as long each time in a row.
	firstPause, longestPause = 50 * time.Millisecond, 500 * time.Millisecond
	// calm is how long a breaker must not have opened, so that its next trials begin with firstPause again.
	calm = 10 * time.Second
)

// A breaker stops asking a store that keeps failing, so that an outage costs handshakes nothing. Somebody else than a
// handshake has to try whether it is back; once closed by such a trial, a single failure opens it again. It also stops for
// a moment asking a store that refused a call because of a limit, which is no outage.
//
// Calls that were under way together count once: a machine that stands still for a moment makes all of them late. The zero
// value is ready for use.
type breaker struct {
	mu        sync.Mutex
	failures  int
	failedAt  time.Time // of the last failure that counted
	open      bool
	openedAt  time.Time
	pause     time.Duration // before the last trial
	rest      time.Duration
	restsTill time.Time
}

func (b *breaker) closed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.open
}

// failed notes that a call failed which began then, and reports whether that opened the breaker.
func (b *breaker) failed(began time.Time) (opened bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if began.Before(b.failedAt) {
		return false
	}
	b.failures++
	b.failedAt = time.Now()
	if b.open || b.failures < breakerLimit {
		return false
	}
	if b.failedAt.Sub(b.openedAt) > calm {
		b.pause = 0
	}
	b.open, b.openedAt = true, b.failedAt
	return true
}

// nextPause returns how long to wait before the store is tried again.
func (b *breaker) nextPause() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pause = min(max(2*b.pause, firstPause), longestPause)
	return b.pause
}

// resting reports whether the store refused a call a moment ago because of a limit.
func (b *breaker) resting() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rest > 0 && time.Now().Before(b.restsTill)
}

// limited notes that a call which began then was refused because of a limit, and returns for how long to make none.
func (b *breaker) limited(began time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	restsFrom := b.restsTill.Add(-b.rest)
	if b.rest == 0 || !began.Before(restsFrom) || !now.Before(b.restsTill) {
		b.rest = min(max(2*b.rest, firstRest), longestRest)
		b.restsTill = now.Add(b.rest)
	}
	return b.restsTill.Sub(now)
}

// succeeded notes a call that was carried out in time and reports whether it closed the breaker.
func (b *breaker) succeeded() (closed bool) {
	closed = b.reached()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rest = 0
	return closed
}

// reached notes a call that was answered in time, whatever the answer, and reports whether it closed the breaker.
func (b *breaker) reached() (closed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	closed, b.failures = b.open, 0
	if closed {
		b.failures = breakerLimit - 1
	}
	b.open = false
	return closed
}
