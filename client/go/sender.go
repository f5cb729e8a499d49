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
	batchOperations = 256
	batchDeadline   = time.Second
	queueBytes      = 16 << 20
	itemBytes       = 256 // the memory of an item beside its value, roughly
	// maxRemoved is the number of sessions that a process removed and remembers: about 1.5 MB.
	maxRemoved = 16_384
	// firstRetryPause and maxRetryPause bound the pause before a failed Batch is sent again; it doubles with each failure in a row.
	firstRetryPause, maxRetryPause = 50 * time.Millisecond, 800 * time.Millisecond
	// busyOperations is the number of operations of a Batch that shows load: a Batch of any size costs about as much as a resumption,
	// so the next one gathers more, for busyPause. Until then a client that comes back is looked up again.
	busyOperations = 3
	busyPause      = 5 * time.Millisecond
	// flushFailures is the number of Batches in a row that fail before flush gives up.
	flushFailures = 3
)

var (
	errClosed      = errors.New("resumed: closed")
	errUnavailable = errors.New("resumed: the server does not accept sessions: see the log, and Puts in Stats")
	errNotRemoved  = errors.New("resumed: the server refused a removal, or the queue had no room for it: request it again")
)

// An item is a Put, or a Remove where value is nil.
type item struct {
	key      storeKey
	value    []byte
	notAfter time.Time // of a Put: waiting in the queue does not prolong a life; of a lasting Remove: its end; of any other: zero
	issued   time.Time // nor does it bring a session past a purge
}

func (i item) size() int { return itemBytes + len(i.value) }

// A sender sends Puts and Removes while no handshake waits: a bounded queue, many operations in one Batch.
type sender struct {
	store     pb.SessionStoreServiceClient
	namespace string
	recorder  *recorder
	limit     func(began time.Time) // records a Batch that the server refused because of a limit
	logger    *slog.Logger
	now       func() time.Time

	mu        sync.Mutex
	changed   *sync.Cond
	queue     []item
	removing  map[storeKey]struct{} // the keys of the Removes in the queue
	removed   recentKeys            // the keys of the last ones that left it, with any outcome
	failed    map[storeKey]struct{} // of those, the keys of at most maxRemoved that were refused or dropped
	bytes     int
	submitted uint64
	finished  uint64
	failures  int // Batches in a row that failed
	closed    bool
	due       chan struct{} // has one element when no Batch has to wait for more items
}

func newSender(s *Installation) *sender {
	sender := &sender{
		store: s.store, namespace: s.options.Namespace, recorder: &s.recorder, limit: s.recordLimit,
		logger: s.options.Logger, now: s.now, removing: map[storeKey]struct{}{},
		failed: map[storeKey]struct{}{}, due: make(chan struct{}, 1),
	}
	sender.changed = sync.NewCond(&sender.mu)
	return sender
}

// submit queues an item, or drops it if there is no room.
func (s *sender) submit(items ...item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, item := range items {
		if s.closed || s.bytes+item.size() > queueBytes {
			s.conclude(item, "dropped")
			continue
		}
		s.queue = append(s.queue, item)
		if item.value == nil {
			s.removing[item.key] = struct{}{}
		}
		s.bytes += item.size()
		s.submitted++
	}
	if len(s.queue) >= batchOperations {
		s.endPause()
	}
	s.changed.Broadcast()
}

// isRemoved reports whether this process has removed a session, whether the server knows of it or not.
func (s *sender) isRemoved(key storeKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, removing := s.removing[key]
	return removing || s.removed.has(key)
}

// recentKeys are the last keys that were added. The zero value is empty.
type recentKeys struct {
	known map[storeKey]struct{}
	ring  []storeKey
	next  int
}

func (k *recentKeys) has(key storeKey) bool {
	_, known := k.known[key]
	return known
}

func (k *recentKeys) add(key storeKey) {
	if k.has(key) {
		return
	}
	if k.known == nil {
		k.known = map[storeKey]struct{}{}
	}
	if len(k.ring) < maxRemoved {
		k.ring = append(k.ring, key)
	} else {
		delete(k.known, k.ring[k.next])
		k.ring[k.next] = key
		k.next = (k.next + 1) % maxRemoved
	}
	k.known[key] = struct{}{}
}

// flush waits until all items that were submitted before it are sent.
func (s *sender) flush(ctx context.Context) error {
	defer context.AfterFunc(ctx, s.wake)()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endPause()
	for last := s.submitted; s.finished < last; s.changed.Wait() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if s.failures >= flushFailures {
			return errUnavailable
		}
	}
	if len(s.failed) > 0 {
		return errNotRemoved
	}
	return nil
}

// wake makes all waiting goroutines check their conditions again.
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
		if ctx.Err() != nil {
			return
		}
		switch {
		case !s.send(ctx, batch):
			pause(ctx, s.retryPause())
		case len(batch) >= busyOperations:
			s.gather(ctx)
		}
	}
}

// gather pauses so that the next Batch has more items, until it is full or to be flushed.
func (s *sender) gather(ctx context.Context) {
	pause, cancel := context.WithTimeout(ctx, busyPause)
	defer cancel()
	select {
	case <-pause.Done():
	case <-s.due:
	}
}

// endPause ends the present or the next pause of gather.
func (s *sender) endPause() {
	select {
	case s.due <- struct{}{}:
	default:
	}
}

// next waits for items and returns the head of the queue, which stays there until it is sent; nothing once ctx is done.
func (s *sender) next(ctx context.Context) []item {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) == 0 && ctx.Err() == nil {
		s.changed.Wait()
	}
	return s.queue[:min(len(s.queue), batchOperations)]
}

// send sends the head of the queue and reports whether the server carried that out.
func (s *sender) send(ctx context.Context, batch []item) bool {
	now := s.now()
	alive := func(item item) bool { return item.value == nil || now.Before(item.notAfter) }
	request := &pb.BatchRequest{}
	for _, item := range batch {
		if alive(item) {
			request.Operations = append(request.Operations, s.operation(item, now))
		}
	}
	began := time.Now()
	results, err := sendBatch(ctx, s.store, request, batchDeadline)
	if err != nil {
		// All items stay in the queue, in their order: ids are write-once, so a second Put does no harm.
		s.logger.Debug("sending a Batch failed", "error", err)
		if failureReason(err) == "limited" {
			s.limit(began)
		}
		s.finish(nil, nil)
		return false
	}
	outcomes := make([]string, len(batch))
	for n, item := range batch {
		switch {
		case !alive(item):
			outcomes[n] = "expired"
			continue
		case results[0].GetError() != nil:
			outcomes[n] = "refused"
		default:
			outcomes[n] = "stored"
		}
		results = results[1:]
	}
	s.finish(batch, outcomes)
	return true
}

// finish takes the head of the queue out of it, or counts the failure of a Batch that has to be sent again.
func (s *sender) finish(batch []item, outcomes []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.changed.Broadcast()
	if len(batch) == 0 {
		s.failures++
		return
	}
	s.failures = 0
	for n, item := range batch {
		s.bytes -= item.size()
		s.conclude(item, outcomes[n])
	}
	clear(s.queue[:len(batch)]) // sealed sessions need not live as long as the array
	s.queue = s.queue[len(batch):]
	s.finished += uint64(len(batch))
}

func (s *sender) retryPause() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return min(firstRetryPause<<min(s.failures-1, 10), maxRetryPause)
}

// sendBatch makes a Batch, if it has any operations.
func sendBatch(
	ctx context.Context, store pb.SessionStoreServiceClient, request *pb.BatchRequest, deadline time.Duration,
) ([]*pb.BatchResult, error) {
	if len(request.GetOperations()) == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	response, err := store.Batch(ctx, request)
	if err == nil && len(response.GetResults()) != len(request.GetOperations()) {
		err = errors.New("the number of results differs from the number of operations")
	}
	return response.GetResults(), err
}

func (s *sender) operation(item item, now time.Time) *pb.BatchOperation {
	if item.value == nil {
		remove := &pb.RemoveRequest{Namespace: s.namespace, Key: item.key[:]}
		if !item.notAfter.IsZero() {
			remove.Ttl = durationpb.New(max(item.notAfter.Sub(now), time.Second))
		}
		return &pb.BatchOperation{Operation: &pb.BatchOperation_Remove{Remove: remove}}
	}
	ttl := durationpb.New(item.notAfter.Sub(now))
	issued := timestamppb.New(item.issued)
	put := &pb.PutRequest{Namespace: s.namespace, Key: item.key[:], Value: item.value, Ttl: ttl, IssueTime: issued}
	return &pb.BatchOperation{Operation: &pb.BatchOperation_Put{Put: put}}
}

// conclude counts the outcome of an item that is no longer queued, and remembers that of a removal.
func (s *sender) conclude(item item, outcome string) {
	if item.value != nil {
		s.recorder.count(puts, outcome)
		return
	}
	delete(s.removing, item.key)
	s.removed.add(item.key)
	if outcome == "stored" {
		s.recorder.count(removals, "application")
		delete(s.failed, item.key)
		return
	}
	s.recorder.count(removals, outcome)
	if len(s.failed) < maxRemoved {
		s.failed[item.key] = struct{}{}
	}
}

// close makes submit drop all later items.
func (s *sender) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

func pause(ctx context.Context, duration time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(duration):
	}
}
