package resumed

import "sync"

// breakerLimit is how many failures in a row open a breaker.
const breakerLimit = 3

// A breaker stops asking a store that keeps failing, so that an outage costs handshakes nothing. Somebody else than a
// handshake has to try whether it is back; once closed by such a trial, a single failure opens it again.
type breaker struct {
	mu       sync.Mutex
	failures int
	open     bool
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

// succeeded notes a call that was answered in time and reports whether it closed the breaker.
func (b *breaker) succeeded() (closed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	closed, b.failures = b.open, 0
	if closed {
		b.failures = breakerLimit - 1
	}
	b.open = false
	return closed
}
