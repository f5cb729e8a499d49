package resumed

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

const (
	// maxGenerations is the number of generations that a frontend tries in a row.
	maxGenerations = 8
	// maxRecheck bounds the time, a rotation otherwise, after which a frontend compares its secrets with those of the store again.
	maxRecheck = time.Hour
	// nextWithin is the part of an epoch, its first sixth, in which frontends agree on the next one: clocks may differ by the rest.
	nextWithin        = 6
	agreementDeadline = time.Second
	// firstAgreementRetry and maxAgreementRetry bound the pause before a failed call is made again; it doubles with each failure in a row.
	firstAgreementRetry, maxAgreementRetry = 50 * time.Millisecond, 5 * time.Second
	// unknownNamePause is the least time between two look-ups of secrets for names that this frontend does not know.
	unknownNamePause = time.Second
	// keyringLook is the longest time after which a frontend erases the secrets of a key that its keyring has no more.
	keyringLook = time.Second
)

var errGenerations = fmt.Errorf("%d generations in a row cannot be used: their values do not open, or were removed", maxGenerations)

// An agreement gets the ticket secrets of the fleet, in the background: those of all epochs whose tickets may live, and of the next
// epoch. Store keys are write-once, so of all frontends that propose a secret one wins.
type agreement struct {
	store     pb.SessionStoreServiceClient
	namespace string
	keyring   *Keyring
	rotation  time.Duration
	lifetime  time.Duration
	logger    *slog.Logger
	now       func() time.Time
	secrets   *secrets
	removals  *removalSet
	restores  bool // whether a secret that the store has lost is stored again; with single use its presence proves that no use is lost

	wanted   chan struct{} // has one element when a secret may be missing
	complete bool          // whether the epochs before the present one were looked up

	mu      sync.Mutex
	named   *bid // the secret that a ticket named and this frontend does not have
	namedAt time.Time
}

// A bid is the attempt to get the secret of an epoch.
type bid struct {
	key      *fleetKey
	epoch    epoch
	proposes bool          // whether this frontend proposes a secret if the store has none
	secret   *ticketSecret // the proposal, or the secret that the store had last
	agreed   bool          // whether the store had it
	tries    int           // number of generations that could not be used
}

// run agrees on secrets until ctx is done, and erases them then.
func (a *agreement) run(ctx context.Context) {
	defer a.secrets.drop(func(*ticketSecret) bool { return true })
	for failures := 0; ctx.Err() == nil; {
		select {
		case <-a.wanted: // by what happened before this round
		default:
		}
		err := a.agree(ctx)
		a.complete = err == nil
		switch {
		case err == nil:
			if failures > 0 {
				a.logger.Info("agreement on ticket secrets restored")
			}
			failures = 0
			a.wait(ctx, a.pauseAfterRound(), a.wanted)
		case ctx.Err() == nil:
			if failures++; failures == 1 {
				a.logger.Warn("no agreement on ticket secrets; tickets have the latest secret until its end, or there are none", "error", err)
			}
			longest := min(firstAgreementRetry<<min(failures-1, 10), maxAgreementRetry)
			a.wait(ctx, longest-mathrand.N(longest/2), nil) // not all frontends at once
		}
	}
}

// pauseAfterRound returns the pause until the next round: at most a rotation or an hour, and at most until the first part of the next
// epoch, at a random moment.
func (a *agreement) pauseAfterRound() time.Duration {
	longest := min(a.rotation, maxRecheck)
	recheck := longest - mathrand.N(longest/2)
	now := a.now()
	next := time.Unix(int64(epochAt(now, a.rotation).next().start), 0).Sub(now)
	return min(recheck, next+mathrand.N(a.rotation/nextWithin))
}

// wait waits for pause, or until an element arrives in wanted, and erases secrets at their end, or once the keyring no longer has their key.
func (a *agreement) wait(ctx context.Context, pause time.Duration, wanted <-chan struct{}) {
	for end := time.Now().Add(pause); ; {
		a.eraseExpired()
		left := time.Until(end)
		if left <= 0 {
			return
		}
		timer := time.NewTimer(min(left, keyringLook, a.secrets.firstEnd(a.now()).Sub(a.now())))
		select {
		case <-ctx.Done():
		case <-wanted:
		case <-timer.C:
			continue
		}
		timer.Stop()
		return
	}
}

func (a *agreement) eraseExpired() {
	now, keys := a.now(), a.keyring.current()
	a.secrets.drop(func(secret *ticketSecret) bool {
		return !now.Before(secret.notAfter) || !hasKey(keys, secret.keyID)
	})
}

// want begins a round soon.
func (a *agreement) want() {
	select {
	case a.wanted <- struct{}{}:
	default:
	}
}

// lookUp looks the secret of an epoch up in the next round, if the last such look-up is long enough ago.
func (a *agreement) lookUp(key *fleetKey, epoch epoch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.namedAt.IsZero() && time.Since(a.namedAt) < unknownNamePause {
		return
	}
	a.named, a.namedAt = &bid{key: key, epoch: epoch}, time.Now()
	a.want()
}

// agree makes one round: it gets the secrets, proposes those that are missing, and gets those that others proposed at the same time.
func (a *agreement) agree(ctx context.Context) error {
	a.eraseExpired()
	for open := a.bids(); len(open) > 0; {
		absent, useless, err := a.get(ctx, open)
		if err != nil {
			return err
		}
		for _, bid := range absent {
			if bid.agreed && !a.restores {
				a.giveUp(bid)
			}
		}
		contested, err := a.put(ctx, absent)
		if err != nil {
			return err
		}
		revoked, others, err := a.get(ctx, contested)
		if err != nil {
			return err
		}
		for _, bid := range revoked {
			a.giveUp(bid)
		}
		for _, bid := range slices.Concat(useless, others) {
			bid.advance()
		}
		open = slices.Concat(revoked, useless, others)
		if slices.ContainsFunc(open, func(bid *bid) bool { return bid.tries == maxGenerations }) {
			return errGenerations
		}
	}
	return nil
}

// bids returns a bid for each secret that this frontend lacks or that it compares with the store's, as many as fit in one Batch. A
// secret beyond it is looked up when a ticket names it.
func (a *agreement) bids() (bids []*bid) {
	now, keys := a.now(), a.keyring.current()
	present := epochAt(now, a.rotation)
	for n, key := range keys {
		for _, epoch := range []epoch{present, present.next()} {
			known := a.secrets.agreedFor(key, epoch)
			switch {
			case known == nil:
				bids = append(bids, &bid{key: key, epoch: epoch, proposes: n == 0})
			case n == 0:
				bids = append(bids, &bid{key: key, epoch: known.epoch, proposes: true, secret: known, agreed: true})
			}
		}
	}
	bids = append(bids, a.takeNamed()...)
	for past := present; !a.complete && past.start >= past.rotation && len(bids) < batchOperations; {
		past.start -= past.rotation
		if !now.Before(past.notAfter(a.lifetime)) {
			break
		}
		for _, key := range keys {
			if a.secrets.agreedFor(key, past) == nil {
				bids = append(bids, &bid{key: key, epoch: past})
			}
		}
	}
	return bids[:min(len(bids), batchOperations)]
}

func (a *agreement) takeNamed() (bids []*bid) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.named != nil {
		bids = append(bids, a.named)
	}
	a.named = nil
	return bids
}

// giveUp gives the secret of a bid up: the store has none at its address, and accepts it no more, or must not get it again.
func (a *agreement) giveUp(bid *bid) {
	if !bid.agreed {
		bid.advance()
		return
	}
	// It was removed or purged. After a purge, the address of the first generation is free.
	a.secrets.drop(func(secret *ticketSecret) bool { return secret == bid.secret })
	bid.secret, bid.agreed, bid.epoch = nil, false, bid.epoch.ofGeneration(0)
}

// advance goes on with the next generation.
func (b *bid) advance() {
	b.secret, b.agreed, b.epoch = nil, false, b.epoch.ofGeneration(b.epoch.generation+1)
	b.tries++
}

// get looks bids up and adds the secrets that it finds. It returns the bids for which this frontend may propose a secret, since the
// store has none, and those whose value cannot be used.
func (a *agreement) get(ctx context.Context, bids []*bid) (absent, useless []*bid, err error) {
	results, err := a.call(ctx, bids, func(bid *bid) *pb.BatchOperation {
		address := bid.key.secretAddress(a.namespace, bid.epoch)
		get := &pb.GetRequest{Namespace: a.namespace, Key: address[:]}
		return &pb.BatchOperation{Operation: &pb.BatchOperation_Get{Get: get}}
	})
	if err != nil {
		return nil, nil, err
	}
	for n, bid := range bids {
		if failure := results[n].GetError(); failure != nil {
			return nil, nil, errors.New(failure.GetMessage())
		}
		value := results[n].GetGet().GetSession().GetValue()
		switch secret := a.open(bid, value); {
		case secret != nil:
			a.secrets.add(secret)
		case !bid.proposes:
		case value == nil:
			absent = append(absent, bid)
		default:
			useless = append(useless, bid)
		}
	}
	return absent, useless, nil
}

// open returns the secret in a value, or nil if it cannot be used. A Get may have returned it before it was removed or purged.
func (a *agreement) open(bid *bid, value []byte) *ticketSecret {
	if value == nil {
		return nil
	}
	secret, err := openTicketSecret(a.namespace, bid.key, bid.epoch, value, a.now())
	if err != nil || a.removals.endsSecret(secret) {
		return nil
	}
	return secret
}

// put proposes secrets, and returns the bids at whose address the store has, or had, another value.
func (a *agreement) put(ctx context.Context, bids []*bid) (contested []*bid, err error) {
	results, err := a.call(ctx, bids, func(bid *bid) *pb.BatchOperation {
		value := a.secrets.valueOf(bid.secret)
		if value == nil {
			bid.secret, bid.agreed = a.propose(bid), false
			value = bytes.Clone(bid.secret.sealed)
		}
		return &pb.BatchOperation{Operation: &pb.BatchOperation_Put{Put: &pb.PutRequest{
			Namespace: a.namespace, Key: bid.secret.address[:], Value: value, Pinned: true,
			Ttl: durationpb.New(bid.secret.notAfter.Sub(a.now())), IssueTime: timestamppb.New(bid.secret.created),
		}}}
	})
	if err != nil {
		return nil, err
	}
	for n, bid := range bids {
		switch failure := results[n].GetError(); {
		case failure == nil:
			a.secrets.add(bid.secret)
		case codes.Code(failure.GetCode()) == codes.AlreadyExists:
			contested = append(contested, bid)
		default:
			return nil, errors.New(failure.GetMessage())
		}
	}
	return contested, nil
}

func (a *agreement) propose(bid *bid) *ticketSecret {
	var secret [secretSize]byte
	defer clear(secret[:])
	_, _ = rand.Read(secret[:]) // never fails
	return newTicketSecret(a.namespace, bid.key, bid.epoch, secret[:], a.now(), bid.epoch.notAfter(a.lifetime))
}

// call makes a Batch of one operation for each bid.
func (a *agreement) call(ctx context.Context, bids []*bid, operation func(*bid) *pb.BatchOperation) ([]*pb.BatchResult, error) {
	request := &pb.BatchRequest{}
	for _, bid := range bids {
		request.Operations = append(request.Operations, operation(bid))
	}
	return sendBatch(ctx, a.store, request, agreementDeadline)
}
