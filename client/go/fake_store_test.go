package resumed

import (
	"bytes"
	"context"
	"path"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

// A fakeStore is a store for tests of what depends on time. Nothing expires in it.
type fakeStore struct {
	grpc.ClientConnInterface

	mu      sync.Mutex
	values  map[string][]byte
	issued  []time.Time          // of each Put
	times   map[string]time.Time // the issue time of each value
	removed map[string]bool      // keys that cannot be stored again
	lasting []*pb.WatchEvent     // for streams that begin later
	purged  time.Time            // values that were issued before cannot be stored any more
	streams map[*fakeStream]any  // the streams that are open
	calls   map[string]int
	batches [][]string    // the kinds of the operations in each Batch
	delay   time.Duration // of each answer; beyond the caller's deadline there is none
	err     error
	full    bool          // whether the namespace is at its limit of sessions
	refuses bool          // whether removals are refused
	old     bool          // whether the server knows no stream of removals
	silent  bool          // whether streams have no further responses
	maxTTL  time.Duration // of a Put; 0 is none
	lost    bool          // whether the store has lost its storage, so that no stream continues
	stall   time.Duration // for which this process stands still in each call, and notices its deadline only then
}

func newFakeStore() *fakeStore {
	return &fakeStore{
		values: map[string][]byte{}, times: map[string]time.Time{}, removed: map[string]bool{}, streams: map[*fakeStream]any{}, calls: map[string]int{},
	}
}

// set changes the answers to later calls. An error also ends all streams.
func (f *fakeStore) set(delay time.Duration, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delay, f.err = delay, err
	if err != nil {
		for stream := range f.streams {
			stream.cancel()
		}
	}
}

// change changes the store.
func (f *fakeStore) change(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeStore) called(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

// snapshot returns the values in the store.
func (f *fakeStore) snapshot() map[storeKey][]byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	values := map[storeKey][]byte{}
	for key, value := range f.values {
		values[storeKey([]byte(key))] = bytes.Clone(value)
	}
	return values
}

// replace stores a value as a malicious store would, or as another store after a failover; nil forgets the key.
func (f *fakeStore) replace(key storeKey, value []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.values[string(key[:])] = value; value == nil {
		delete(f.values, string(key[:]))
	}
}

// remove is a lasting removal by an operator.
func (f *fakeStore) remove(key storeKey, ttl time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.removeLasting(key[:], durationpb.New(ttl))
}

func (f *fakeStore) removeLasting(key []byte, ttl *durationpb.Duration) {
	delete(f.values, string(key))
	f.removed[string(key)] = true
	f.notify(&pb.WatchEvent{Event: &pb.WatchEvent_Removed{Removed: &pb.SessionRemoved{Key: key, Ttl: ttl}}})
}

// purge purges the values that were issued before a time, or all values if the time is zero.
func (f *fakeStore) purge(before time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	event := &pb.NamespacePurged{PurgeTime: timestamppb.Now()}
	f.purged = time.Now()
	if !before.IsZero() {
		event.IssuedBeforeTime, f.purged = timestamppb.New(before), before
	}
	for key := range f.values {
		if f.times[key].Before(f.purged) {
			delete(f.values, key)
		}
	}
	f.notify(&pb.WatchEvent{Event: &pb.WatchEvent_Purged{Purged: event}})
}

func (f *fakeStore) notify(event *pb.WatchEvent) {
	f.lasting = append(f.lasting, event)
	for stream := range f.streams {
		stream.events <- event
	}
}

func (f *fakeStore) Invoke(ctx context.Context, method string, request, reply any, _ ...grpc.CallOption) error {
	f.mu.Lock()
	delay, err, stall := f.delay, f.err, f.stall
	f.calls[path.Base(method)]++
	f.mu.Unlock()
	time.Sleep(stall)
	select {
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-time.After(delay):
	}
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var response proto.Message
	switch request := request.(type) {
	case *pb.PutRequest:
		put, failure := f.put(request)
		if failure != nil {
			return failure.Err()
		}
		response = put
	case *pb.GetRequest:
		response = &pb.GetResponse{Session: f.session(request.GetKey())}
	case *pb.TakeRequest:
		response = &pb.TakeResponse{Session: f.session(request.GetKey())}
		delete(f.values, string(request.GetKey()))
	case *pb.BatchRequest:
		response = f.batch(request)
	}
	proto.Merge(reply.(proto.Message), response)
	return nil
}

func (f *fakeStore) batch(request *pb.BatchRequest) *pb.BatchResponse {
	response := &pb.BatchResponse{}
	var kinds []string
	for _, operation := range request.GetOperations() {
		result := &pb.BatchResult{}
		switch operation := operation.GetOperation().(type) {
		case *pb.BatchOperation_Put:
			kinds = append(kinds, "Put")
			if put, failure := f.put(operation.Put); failure != nil {
				result.Result = &pb.BatchResult_Error{Error: failure.Proto()}
			} else {
				result.Result = &pb.BatchResult_Put{Put: put}
			}
		case *pb.BatchOperation_Get:
			kinds = append(kinds, "Get")
			result.Result = &pb.BatchResult_Get{Get: &pb.GetResponse{Session: f.session(operation.Get.GetKey())}}
		case *pb.BatchOperation_Remove:
			kinds = append(kinds, "Remove")
			key, ttl := operation.Remove.GetKey(), operation.Remove.GetTtl()
			switch {
			case f.refuses:
				result.Result = &pb.BatchResult_Error{Error: status.New(codes.PermissionDenied, "of the test").Proto()}
			case ttl != nil:
				f.removeLasting(key, ttl)
			default:
				delete(f.values, string(key))
			}
		}
		response.Results = append(response.Results, result)
	}
	f.batches = append(f.batches, kinds)
	return response
}

func (f *fakeStore) put(request *pb.PutRequest) (*pb.PutResponse, *status.Status) {
	key := string(request.GetKey())
	known, stored := f.values[key]
	purged := request.GetIssueTime() != nil && request.GetIssueTime().AsTime().Before(f.purged)
	switch {
	case f.full:
		return nil, status.New(codes.ResourceExhausted, "of the test")
	case stored && !bytes.Equal(known, request.GetValue()) || f.removed[key] || purged:
		return nil, status.New(codes.AlreadyExists, "of the test")
	}
	f.values[key] = bytes.Clone(request.GetValue())
	f.times[key] = request.GetIssueTime().AsTime()
	f.issued = append(f.issued, request.GetIssueTime().AsTime())
	ttl := request.GetTtl().AsDuration()
	if f.maxTTL > 0 {
		ttl = min(ttl, f.maxTTL)
	}
	return &pb.PutResponse{Ttl: durationpb.New(ttl)}, nil
}

func (f *fakeStore) session(key []byte) *pb.StoredSession {
	if value := f.values[string(key)]; value != nil {
		return &pb.StoredSession{Value: bytes.Clone(value)}
	}
	return nil
}

// NewStream begins a Watch.
func (f *fakeStore) NewStream(ctx context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[path.Base(method)]++
	if f.err != nil {
		return nil, f.err
	}
	stream := &fakeStream{store: f, events: make(chan *pb.WatchEvent, 10_000)}
	stream.ctx, stream.cancel = context.WithCancel(ctx)
	f.streams[stream] = nil
	for _, event := range f.lasting {
		stream.events <- event
	}
	return stream, nil
}

// A fakeStream is a stream of removals. It begins with all of them.
type fakeStream struct {
	grpc.ClientStream

	store  *fakeStore
	ctx    context.Context
	cancel context.CancelFunc
	events chan *pb.WatchEvent
	begun  bool
	live   bool

	continued bool
}

func (s *fakeStream) SendMsg(request any) error {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.continued = len(request.(*pb.WatchRequest).GetPosition()) > 0 && !s.store.lost
	return nil
}
func (*fakeStream) CloseSend() error { return nil }

func (s *fakeStream) RecvMsg(reply any) error {
	response := reply.(*pb.WatchResponse)
	s.store.mu.Lock()
	response.RemovalsOnly = !s.begun && !s.store.old
	silent, first := s.store.silent, !s.begun
	s.begun = true
	s.store.mu.Unlock()
	if first {
		response.Position, response.Continued = []byte{0}, s.continued
		return nil
	}
	if events := s.rest(); len(events) > 0 { // before the first response that is live
		response.Events, response.Position = events, []byte{1}
		return nil
	}
	var heartbeat <-chan time.Time
	if !silent {
		heartbeat = time.After(s.untilHeartbeat())
	}
	select {
	case <-s.ctx.Done():
		s.store.mu.Lock()
		defer s.store.mu.Unlock()
		delete(s.store.streams, s)
		return status.FromContextError(s.ctx.Err()).Err()
	case event := <-s.events:
		response.Events = slices.Concat([]*pb.WatchEvent{event}, s.rest())
		response.Live = !silent
	case <-heartbeat:
		response.Live = true
	}
	response.Position = []byte{1}
	return nil
}

// untilHeartbeat returns the time until the next response of a stream without events: the first one is live at once.
func (s *fakeStream) untilHeartbeat() time.Duration {
	if !s.live {
		s.live = true
		return 0
	}
	return time.Second
}

func (s *fakeStream) rest() (events []*pb.WatchEvent) {
	for len(s.events) > 0 {
		events = append(events, <-s.events)
	}
	return events
}
