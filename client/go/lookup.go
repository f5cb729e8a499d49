package resumed

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

// freshness is how long after its issue an id that the store does not know is asked for again: its Put may be on its way.
const freshness = 10 * time.Second

// freshPauses are the times to wait before each further ask, or what the deadline leaves.
var freshPauses = []time.Duration{time.Millisecond, 4 * time.Millisecond, 16 * time.Millisecond, 64 * time.Millisecond}

// leastAsk is what a call must have left of the deadline to be worth it: an answer that is late then says nothing about the
// store.
const leastAsk = 10 * time.Millisecond

// An answer is a value and the reason of the hit, or nil and the reason of the miss.
type answer struct {
	value  []byte
	reason string
}

// lookUp asks the store for a session, or waits for the answer to another handshake that did, for timeout at most.
func (s *Sessions) lookUp(key storeKey, fresh bool, timeout time.Duration) answer {
	if s.hasTooLittle(timeout) {
		return answer{reason: "timeout"}
	}
	mine := false
	flight := s.flights.DoChan(string(key[:]), func() (any, error) {
		mine = true
		return s.ask(s.get, key, fresh, false, timeout), nil
	})
	late := time.NewTimer(timeout)
	defer late.Stop()
	select {
	case landed := <-flight:
		answer := landed.Val.(answer)
		if answer.value != nil && !mine {
			answer.reason = "coalesced"
		}
		return answer
	case <-late.C:
		return answer{reason: "timeout"}
	}
}

// take takes a session that a look-up has found, and returns the reason of the miss if it did not get it: of all who take a
// session one gets it.
func (s *Sessions) take(key storeKey, timeout time.Duration) (miss string) {
	if s.hasTooLittle(timeout) { // to take it and not to learn of it would use it up for nothing
		return "timeout"
	}
	call := func(ctx context.Context, key storeKey) ([]byte, error) {
		response, err := s.store.Take(ctx, &pb.TakeRequest{Namespace: s.options.Namespace, Key: key[:]})
		return response.GetSession().GetValue(), err
	}
	if answer := s.ask(call, key, false, true, timeout); answer.value == nil {
		return answer.reason
	}
	return ""
}

func (s *Sessions) hasTooLittle(timeout time.Duration) bool {
	return timeout < min(leastAsk, s.options.Deadline)
}

func (s *Sessions) get(ctx context.Context, key storeKey) ([]byte, error) {
	response, err := s.store.Get(ctx, &pb.GetRequest{Namespace: s.options.Namespace, Key: key[:]})
	return response.GetSession().GetValue(), err
}

// ask makes a call, and further ones if the session is fresh. answered is whether the store has answered this handshake
// already: if it is late now, it had little time.
func (s *Sessions) ask(
	call func(context.Context, storeKey) ([]byte, error), key storeKey, fresh, answered bool, timeout time.Duration,
) answer {
	select {
	case s.lookups <- struct{}{}:
		defer func() { <-s.lookups }()
	default:
		return answer{reason: "too-many-lookups"}
	}
	// A little less, so that a call that is too late is noticed here, and opens the breaker.
	began := time.Now()
	end := began.Add(timeout * 9 / 10)
	ctx, cancel := context.WithDeadline(s.ctx, end)
	defer cancel()
	defer func() { s.recorder.observe(time.Since(began)) }()

	value, err := call(ctx, key)
	reason := "store"
	for again := 0; fresh && value == nil && err == nil && again < len(freshPauses); again++ {
		left := time.Until(end) - leastAsk
		if left <= 0 {
			break
		}
		pause(ctx, min(freshPauses[again], left))
		answered = true
		value, err = call(ctx, key)
		reason = "retried"
	}
	switch failure := failure(err); {
	case failure == "timeout" && answered:
		return answer{reason: failure}
	case err != nil:
		_ = s.sender.failed(ctx, err, began, end)
		return answer{reason: failure}
	}
	s.sender.succeeded()
	if value == nil {
		return answer{reason: "unknown"}
	}
	return answer{value, reason}
}

// failure returns why a call failed, as misses are counted, or "" if it did not.
func failure(err error) string {
	switch status.Code(err) {
	case codes.OK:
		return ""
	case codes.DeadlineExceeded:
		return "timeout"
	case codes.Unavailable, codes.Canceled:
		return "unavailable"
	case codes.ResourceExhausted:
		return "limited"
	default:
		return "rejected"
	}
}
