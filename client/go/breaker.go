package resumed

import (
	"sync"
	"time"
)

// breakerLimit is how many failures in a row open a breaker.
const breakerLimit = 3

// For how long nobody asks a store that has just refused because of a limit; twice as long each time in a row.
const (
	firstRest   = 50 * time.Millisecond
	longestRest = 800 * time.Millisecond
)

// A breaker stops asking a store that keeps failing, so that an outage costs handshakes nothing. Somebody else than a
// handshake has to try whether it is back; once closed by such a trial, a single failure opens it again. It also stops for
// a moment asking a store that refused a call because of a limit, which is no outage.
type breaker struct {
	mu        sync.Mutex
	failures  int
	open      bool
	rest      time.Duration
	restsTill time.Time
}

func (b *breaker) closed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.open
}

// failed notes a failed call and reports whether it opened the breaker.
func (b *breaker) failed() (opened bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures++
	opened = !b.open && b.failures >= breakerLimit
	b.open = b.open || opened
	return opened
}

// resting reports whether the store refused a call a moment ago because of a limit.
func (b *breaker) resting() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rest > 0 && time.Now().Before(b.restsTill)
}

// limited notes a call that was refused because of a limit, and returns for how long to make none.
func (b *breaker) limited() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rest = min(max(2*b.rest, firstRest), longestRest)
	b.restsTill = time.Now().Add(b.rest)
	return b.rest
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
