package resumed

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

const (
	batchSize     = 256
	batchDeadline = time.Second
	queueBytes    = 16 << 20
	itemBytes     = 256                   // an item's own memory, roughly, beside its value
	retryPause    = 50 * time.Millisecond // before a Batch that failed is sent again
)

var (
	errClosed  = errors.New("resumed: closed")
	errResting = errors.New("resumed: the store keeps failing")
)

// An item is a Put, or a Remove where value is nil.
type item struct {
	key      storeKey
	value    []byte
	notAfter time.Time // waiting in the queue does not prolong a life
	issued   time.Time // nor does it bring a session past a purge
}

func (i item) size() int { return itemBytes + len(i.value) }

// A sender sends Puts and Removes while no handshake waits: a bounded queue, many operations in one Batch. It also finds
// out that a failing store is back, so that no handshake has to.
type sender struct {
	store     pb.SessionStoreServiceClient
	namespace string
	deadline  time.Duration // of a handshake: a store that answers too late for one is no help
	breaker   *breaker
	recorder  *recorder
	logger    *slog.Logger
	now       func() time.Time

	mu        sync.Mutex
	changed   *sync.Cond
	queue     []item
	removing  map[storeKey]struct{} // of the Removes in the queue
	bytes     int
	submitted uint64
	finished  uint64
	closed    bool
}

func newSender(s *Sessions) *sender {
	sender := &sender{
		store: s.store, namespace: s.options.Namespace, deadline: s.options.Deadline,
		breaker: &s.breaker, recorder: &s.recorder, logger: s.options.Logger, now: s.now,
		removing: map[storeKey]struct{}{},
	}
	sender.changed = sync.NewCond(&sender.mu)
	return sender
}

// submit queues an item, or drops it if there is no room.
func (s *sender) submit(item item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.bytes+item.size() > queueBytes {
		s.count(item, "dropped")
		return
	}
	s.queue = append(s.queue, item)
	if item.value == nil {
		s.removing[item.key] = struct{}{}
	}
	s.bytes += item.size()
	s.submitted++
	s.changed.Broadcast()
}

// isRemoving reports whether a session's Remove is in the queue: for this frontend it is removed already.
func (s *sender) isRemoving(key storeKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, removing := s.removing[key]
	return removing
}

// flush waits until all that was submitted so far is sent.
func (s *sender) flush(ctx context.Context) error {
	defer context.AfterFunc(ctx, s.wake)()
	s.mu.Lock()
	defer s.mu.Unlock()
	for last := s.submitted; s.finished < last; s.changed.Wait() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if !s.breaker.closed() {
			return errResting
		}
	}
	return nil
}

// wake lets those who wait look again at what they wait for.
func (s *sender) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changed.Broadcast()
}

// run sends until ctx is done.
func (s *sender) run(ctx context.Context) {
	defer context.AfterFunc(ctx, s.wake)()
	for {
		batch := s.next(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case !s.breaker.closed():
			pause(ctx, s.breaker.nextPause())
			s.probe(ctx)
		default:
			pause(ctx, s.send(ctx, batch))
		}
	}
}

// next returns the head of the queue, which stays there until it is sent, or nothing if there is something else to do.
func (s *sender) next(ctx context.Context) []item {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) == 0 && s.breaker.closed() && ctx.Err() == nil {
		s.changed.Wait()
	}
	return s.queue[:min(len(s.queue), batchSize)]
}

// send sends the head of the queue and returns for how long to send nothing more.
func (s *sender) send(ctx context.Context, batch []item) time.Duration {
	now := s.now()
	alive := func(item item) bool { return item.value == nil || now.Before(item.notAfter) }
	request := &pb.BatchRequest{}
	for _, item := range batch {
		if alive(item) {
			request.Operations = append(request.Operations, s.operation(item, now))
		}
	}
	began := time.Now()
	results, err := s.batch(ctx, request)
	if err != nil {
		// Everything stays in the queue, in its order: ids are write-once, so sending twice does no harm.
		return s.failed(ctx, err, began, began.Add(batchDeadline))
	}
	if len(request.Operations) > 0 && time.Since(began) <= s.deadline {
		// A store that answers, but too late for a handshake, is no help, and a Batch must not hide that.
		s.succeeded()
	}
	for _, item := range batch {
		switch {
		case !alive(item):
			s.count(item, "expired")
			continue
		case results[0].GetError() != nil:
			s.count(item, "refused")
		default:
			s.count(item, "stored")
		}
		results = results[1:]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, item := range batch {
		s.bytes -= item.size()
		if item.value == nil {
			delete(s.removing, item.key)
		}
	}
	clear(s.queue[:len(batch)]) // sealed sessions need not live as long as the array
	s.queue = s.queue[len(batch):]
	s.finished += uint64(len(batch))
	s.changed.Broadcast()
	return 0
}

func (s *sender) batch(ctx context.Context, request *pb.BatchRequest) ([]*pb.BatchResult, error) {
	if len(request.GetOperations()) == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, batchDeadline)
	defer cancel()
	response, err := s.store.Batch(ctx, request)
	if err == nil && len(response.GetResults()) != len(request.GetOperations()) {
		err = errors.New("the store answered another number of operations")
	}
	return response.GetResults(), err
}

func (s *sender) operation(item item, now time.Time) *pb.BatchOperation {
	if item.value == nil {
		remove := &pb.RemoveRequest{Namespace: s.namespace, Key: item.key[:]}
		return &pb.BatchOperation{Operation: &pb.BatchOperation_Remove{Remove: remove}}
	}
	ttl := durationpb.New(item.notAfter.Sub(now))
	issued := timestamppb.New(item.issued)
	put := &pb.PutRequest{Namespace: s.namespace, Key: item.key[:], Value: item.value, Ttl: ttl, IssueTime: issued}
	return &pb.BatchOperation{Operation: &pb.BatchOperation_Put{Put: put}}
}

func (s *sender) probe(ctx context.Context) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, s.deadline)
	defer cancel()
	_, err := s.store.Get(ctx, &pb.GetRequest{Namespace: s.namespace, Key: []byte("resumed/v1 probe")})
	switch failure(err) {
	case "":
		s.succeeded()
	case "limited":
		s.limited(began)
	}
}

// failed notes that a call failed which began then and had time until end, and opens the breaker if the store keeps failing.
// It returns how long to wait before the next Batch.
func (s *sender) failed(ctx context.Context, err error, began, end time.Time) time.Duration {
	switch {
	case errors.Is(context.Cause(ctx), errClosed):
	case failure(err) == "limited":
		return s.limited(began)
	case failure(err) == "timeout" && time.Since(end) > leastAsk:
		// The end was noticed too late: it is this process that stood still, and the answer may have been there.
	case s.breaker.failed(began):
		s.logger.Warn("the store keeps failing, resumption rests", "error", err)
		s.wake()
	}
	return retryPause
}

// limited notes that a call was refused because of a limit: the store is well. It returns how long to make no other.
func (s *sender) limited(began time.Time) time.Duration {
	s.answers(s.breaker.reached())
	return s.breaker.limited(began)
}

func (s *sender) succeeded() { s.answers(s.breaker.succeeded()) }

func (s *sender) answers(again bool) {
	if again {
		s.logger.Info("the store answers again")
	}
}

func (s *sender) count(item item, outcome string) {
	switch {
	case item.value != nil:
		s.recorder.count(puts, outcome)
	case outcome == "stored":
		s.recorder.count(removals, "application")
	default:
		s.recorder.count(removals, outcome)
	}
}

// close accepts nothing more.
func (s *sender) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

func pause(ctx context.Context, duration time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(duration): // at once, if it is 0
	}
}
