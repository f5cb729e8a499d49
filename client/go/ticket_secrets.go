package resumed

import (
	"bytes"
	"maps"
	"sync"
	"time"
)

// secrets are the ticket secrets that a frontend has: any of them opens tickets, and one encrypts them. The zero value is ready for
// use.
type secrets struct {
	mu     sync.RWMutex
	byName map[keyName]*ticketSecret
	agreed map[secretSlot]*ticketSecret // those that the store had last
}

// A secretSlot has the one secret of an epoch that encrypts, of any generation.
type secretSlot struct {
	keyID           [keyIDSize]byte
	start, rotation uint32
}

func slotOf(keyID [keyIDSize]byte, epoch epoch) secretSlot {
	return secretSlot{keyID, epoch.start, epoch.rotation}
}

// A ticketKey is the key of one ticket. No copy of the key of its secret leaves the secrets, so that its erasure is one.
type ticketKey struct {
	name     keyName
	key      [ticketKeySize]byte
	keyID    [keyIDSize]byte
	epoch    epoch
	address  storeKey
	notAfter time.Time
}

func (s *ticketSecret) ticketKey(salt []byte) ticketKey {
	return ticketKey{s.name, deriveKey(s.key, salt, ticketInfo), s.keyID, s.epoch, s.address, s.notAfter}
}

// add adds a secret that the store has. It encrypts from now on, unless another generation of its epoch does.
func (s *secrets) add(secret *ticketSecret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byName == nil {
		s.byName, s.agreed = map[keyName]*ticketSecret{}, map[secretSlot]*ticketSecret{}
	}
	if known := s.byName[secret.name]; known != nil {
		if known != secret {
			secret.erase()
		}
		secret = known
	}
	s.byName[secret.name] = secret
	slot := slotOf(secret.keyID, secret.epoch)
	if present := s.agreed[slot]; present == nil || present.epoch == secret.epoch {
		s.agreed[slot] = secret
	}
}

// agreedFor returns the secret of an epoch that the store had last, or nil.
func (s *secrets) agreedFor(key *fleetKey, epoch epoch) *ticketSecret {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.agreed[slotOf(key.id, epoch)]
}

// valueOf returns a copy of the value of a secret in the store, or nil if the secret is nil or was erased.
func (s *secrets) valueOf(secret *ticketSecret) []byte {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if secret == nil {
		return nil
	}
	return bytes.Clone(secret.sealed)
}

// opener returns the key of a ticket with that salt, whose secret has that name.
func (s *secrets) opener(name keyName, salt []byte) (key ticketKey, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	secret, ok := s.byName[name]
	if !ok {
		return ticketKey{}, false
	}
	return secret.ticketKey(salt), true
}

// encrypter returns the key of a new ticket with that salt. Its secret is that of the present epoch: that of the first of keys that has
// one. If none has, it is that of the latest epoch before, so that tickets go on while the store does not answer.
func (s *secrets) encrypter(keys []*fleetKey, present epoch, now time.Time, salt []byte) (key ticketKey, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	secret := s.encrypting(keys, present, now)
	if secret == nil {
		return ticketKey{}, false
	}
	return secret.ticketKey(salt), true
}

// encryptingSince returns when the secret that encrypts new tickets was created, and whether it is that of an earlier epoch; ok is false
// if there is none.
func (s *secrets) encryptingSince(keys []*fleetKey, present epoch, now time.Time) (created time.Time, heldOver, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	secret := s.encrypting(keys, present, now)
	if secret == nil {
		return time.Time{}, false, false
	}
	return secret.created, secret.epoch.start != present.start, true
}

func (s *secrets) encrypting(keys []*fleetKey, present epoch, now time.Time) *ticketSecret {
	for _, each := range keys {
		if secret := s.agreed[slotOf(each.id, present)]; secret != nil && now.Before(secret.notAfter) {
			return secret
		}
	}
	var latest *ticketSecret
	for _, secret := range s.agreed {
		if secret.epoch.start < present.start && now.Before(secret.notAfter) && hasKey(keys, secret.keyID) &&
			(latest == nil || latest.epoch.start < secret.epoch.start) {
			latest = secret
		}
	}
	return latest
}

func hasKey(keys []*fleetKey, id [keyIDSize]byte) bool { return keyWithID(keys, id) != nil }

// keyWithID returns the key of the fleet with an id, or nil.
func keyWithID(keys []*fleetKey, id [keyIDSize]byte) *fleetKey {
	for _, key := range keys {
		if key.id == id {
			return key
		}
	}
	return nil
}

// drop erases the secrets that match, and reports whether there were any.
func (s *secrets) drop(matches func(*ticketSecret) bool) (dropped bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, secret := range s.byName {
		if !matches(secret) {
			continue
		}
		dropped = true
		delete(s.byName, name)
		maps.DeleteFunc(s.agreed, func(_ secretSlot, agreed *ticketSecret) bool { return agreed == secret })
		secret.erase()
	}
	return dropped
}

func (s *secrets) count() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.byName)
}

// firstEnd returns the earliest not_after, or a time that is far ahead.
func (s *secrets) firstEnd(now time.Time) time.Time {
	s.mu.RLock()
	defer s.mu.RUnlock()
	first := now.Add(maxRotation)
	for _, secret := range s.byName {
		first = earlier(first, secret.notAfter)
	}
	return first
}
