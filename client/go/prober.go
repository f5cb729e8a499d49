package resumed

import (
	"context"
	"errors"
	"time"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

var probeKey = []byte("resumed/v1 probe")

// runProber closes the breaker again once the server answers, so that no handshake waits to find that out. It returns when ctx is
// done.
func (s *Installation) runProber(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.opened:
		}
		for s.breaker.isOpen() && ctx.Err() == nil {
			pause(ctx, s.breaker.nextProbePause())
			s.probe(ctx)
		}
	}
}

// probe makes a call with the deadline of a handshake: a server that is slower than that stays excluded.
func (s *Installation) probe(ctx context.Context) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, s.options.Deadline)
	defer cancel()
	_, err := s.store.Get(ctx, &pb.GetRequest{Namespace: s.options.Namespace, Key: probeKey})
	switch failureReason(err) {
	case "":
		s.recordSuccess()
	case "limited":
		s.recordLimit(began)
	}
}

// recordFailure records a call that began then, had time until end, and failed.
func (s *Installation) recordFailure(ctx context.Context, err error, began, end time.Time) {
	reason := failureReason(err)
	switch {
	case errors.Is(context.Cause(ctx), errClosed):
	case reason == "limited":
		s.recordLimit(began)
	case reason == "timeout" && time.Since(end) > minCallTime:
		// This process stalled and noticed the deadline too late: the answer may have been there.
	case s.breaker.fail(began, reason == "timeout"):
		s.options.Logger.Warn("server unavailable (consecutive failures); resumption disabled until it recovers", "error", err)
		select {
		case s.opened <- struct{}{}:
		default:
		}
	}
}

// recordLimit records a call that the server refused because of a limit: the server is well.
func (s *Installation) recordLimit(began time.Time) { s.logRecovery(s.breaker.limit(began)) }

// recordSuccess records a call that the server carried out in time.
func (s *Installation) recordSuccess() { s.logRecovery(s.breaker.succeed()) }

func (s *Installation) logRecovery(recovered bool) {
	if recovered {
		s.options.Logger.Info("server available again")
	}
}
