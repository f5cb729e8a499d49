package resumed

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

const (
	// freshness is the time after its issue in which a miss for an id is worth further calls: its Put may be on its way.
	freshness = 10 * time.Second
	// minCallTime is the time that a call must have left to be worth making: a timeout after less says nothing about the server.
	minCallTime = 10 * time.Millisecond
	// deadlineShare is the share of a handshake's deadline that its calls get, in percent: the rest absorbs late timers.
	deadlineShare = 90
)

// retryPauses are the pauses before each further call for a fresh id; the deadline shortens them.
var retryPauses = []time.Duration{time.Millisecond, 4 * time.Millisecond, 16 * time.Millisecond, 64 * time.Millisecond}

// An answer is a value and the reason of the hit, or nil and the reason of the miss.
type answer struct {
	value  []byte
	reason string
}

// lookUp gets a session from the server, or waits for the look-up of another handshake; both end within timeout.
func (s *Installation) lookUp(key storeKey, fresh bool, timeout time.Duration) answer {
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

// take takes a session that a look-up has found, and returns the reason of the miss if another frontend took it first or the call
// failed.
func (s *Installation) take(key storeKey, timeout time.Duration) (miss string) {
	if s.hasTooLittle(timeout) { // a Take whose answer comes too late spends the session for nothing
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

func (s *Installation) hasTooLittle(timeout time.Duration) bool {
	return timeout < min(minCallTime, s.options.Deadline)
}

func (s *Installation) get(ctx context.Context, key storeKey) ([]byte, error) {
	response, err := s.store.Get(ctx, &pb.GetRequest{Namespace: s.options.Namespace, Key: key[:]})
	return response.GetSession().GetValue(), err
}

// ask makes a call, and further calls while a fresh session is unknown. answered is whether the server has answered this handshake
// already: then a timeout means that little time remained, and is no failure of the server.
func (s *Installation) ask(
	call func(context.Context, storeKey) ([]byte, error), key storeKey, fresh, answered bool, timeout time.Duration,
) answer {
	select {
	case s.lookups <- struct{}{}:
		defer func() { <-s.lookups }()
	default:
		return answer{reason: "too-many-lookups"}
	}
	began := time.Now()
	end := began.Add(timeout * deadlineShare / 100)
	ctx, cancel := context.WithDeadline(s.ctx, end)
	defer cancel()
	defer func() { s.recorder.observe(time.Since(began)) }()

	value, err := call(ctx, key)
	reason := "store"
	for again := 0; fresh && value == nil && err == nil && again < len(retryPauses); again++ {
		left := time.Until(end) - minCallTime
		if left <= 0 {
			break
		}
		pause(ctx, min(retryPauses[again], left))
		answered = true
		value, err = call(ctx, key)
		reason = "retried"
	}
	switch failure := failureReason(err); {
	case failure == "timeout" && answered:
		return answer{reason: failure}
	case err != nil:
		s.recordFailure(ctx, err, began, end)
		return answer{reason: failure}
	}
	s.recordSuccess()
	if value == nil {
		return answer{reason: "unknown"}
	}
	return answer{value, reason}
}

// failureReason returns the reason of a miss for the result of a call, or "" if the call succeeded.
func failureReason(err error) string {
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
