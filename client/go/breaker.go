package resumed

import (
	"sync"
	"time"
)

const (
	// breakerFailures is how many failures in a row open a breaker.
	breakerFailures = 3
	// firstProbePause and maxProbePause bound the pause before each probe while a breaker is open; it doubles each time.
	firstProbePause, maxProbePause = 50 * time.Millisecond, 500 * time.Millisecond
	// probeReset is the time without an opening after which the probes begin with firstProbePause again.
	probeReset = 10 * time.Second
	// firstLimitPause and maxLimitPause bound the pause after a call that the server refused because of a limit; it doubles with
	// each refusal in a row.
	firstLimitPause, maxLimitPause = 50 * time.Millisecond, 800 * time.Millisecond
	// scarcity is the time after such a refusal in which operations are scarce: each of many frontends gets few refusals.
	scarcity = 5 * time.Second
)

// A breaker is a circuit breaker: it opens after failures in a row, so that an outage costs handshakes nothing, and closes with the
// first success of a probe. Once closed by a probe, a single failure opens it again.
//
// A refusal because of a limit is no failure: calls pause for a moment, and for some seconds operations are scarce. Then they go to
// sessions that are stored already, since the Get of a session that is not stored gains nothing. So a namespace at 60 % of the
// operations that it needs resumes about 60 % of its handshakes, and not none.
//
// Calls that were under way together count once: if the process or the network stalls for a moment, all of them time out. The zero
// value is ready for use. protos/vectors/policy.json has the policy that all clients share.
type breaker struct {
	mu         sync.Mutex
	failures   int
	failedAt   time.Time // end of the last failure that counted
	open       bool
	openedAt   time.Time
	probePause time.Duration
	limitPause time.Duration
	pausedAt   time.Time // start of limitPause
	limitedAt  time.Time // the last refusal because of a limit
}

func (b *breaker) isOpen() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open
}

// isLimited reports whether calls pause because the server has just refused one for a limit.
func (b *breaker) isLimited() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Now().Before(b.pausedAt.Add(b.limitPause))
}

// isScarce reports whether the server refused a call because of a limit in the last seconds.
func (b *breaker) isScarce() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.scarce()
}

func (b *breaker) scarce() bool { return !b.limitedAt.IsZero() && time.Since(b.limitedAt) < scarcity }

// fail records a failed call and reports whether it opened the breaker. A timeout while operations are scarce is no failure: a server
// that refuses much delays its refusals.
func (b *breaker) fail(began time.Time, timeout bool) (opened bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if timeout && b.scarce() {
		b.lengthenLimitPause(began)
		return false
	}
	if began.Before(b.failedAt) {
		return false
	}
	b.failures++
	b.failedAt = time.Now()
	if b.open || b.failures < breakerFailures {
		return false
	}
	if b.failedAt.Sub(b.openedAt) > probeReset {
		b.probePause = 0
	}
	b.open, b.openedAt = true, b.failedAt
	return true
}

// nextProbePause returns the pause before the next probe.
func (b *breaker) nextProbePause() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probePause = min(max(2*b.probePause, firstProbePause), maxProbePause)
	return b.probePause
}

// limit records a call that the server refused because of a limit, and reports whether it closed the breaker.
func (b *breaker) limit(began time.Time) (closed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limitedAt = time.Now()
	b.lengthenLimitPause(began)
	return b.close()
}

func (b *breaker) lengthenLimitPause(began time.Time) {
	if began.Before(b.pausedAt) {
		return
	}
	b.limitPause = min(max(2*b.limitPause, firstLimitPause), maxLimitPause)
	b.pausedAt = time.Now()
}

// succeed records a call that the server carried out in time, and reports whether it closed the breaker.
func (b *breaker) succeed() (closed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limitPause, b.pausedAt = 0, time.Time{}
	return b.close()
}

func (b *breaker) close() (closed bool) {
	closed, b.failures = b.open, 0
	if closed {
		b.failures = breakerFailures - 1
	}
	b.open = false
	return closed
}
