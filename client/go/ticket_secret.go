package resumed

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// The formats of ticket secrets, the same in every language (protos/README.md, section "Fleet tickets"; protos/vectors):
//
//   - epoch = start (4, Unix seconds, a multiple of rotation) | rotation (3, seconds) | generation (1)
//   - address = the store key of "ticket-secret" and key id (4) | epoch (8)
//   - plaintext of the value = 01 | created (8, microseconds) | secret (32)
//   - name = epoch (8) | tag (4) | the first 4 bytes of HMAC-SHA256(names key, namespace 00 epoch tag)

const (
	secretSize     = 32
	ticketKeySize  = 32
	epochSize      = 8
	keyTagSize     = 4
	keyNameSize    = epochSize + keyTagSize + 4
	secretVersion  = 1
	secretEncoding = 1 + 8 + secretSize
	maxRotation    = 7 * 24 * time.Hour
	keyInfo        = "resumed/v1 ticket key\x00"
)

var errSecretMalformed = errors.New("the value is no ticket secret")

// An epoch is a part of time with a ticket secret of its own, and one attempt to agree on that secret.
type epoch struct {
	start      uint32 // Unix seconds, a multiple of rotation
	rotation   uint32 // its length in seconds, at most maxRotation
	generation uint8  // above 0 if the secret of an earlier generation cannot be opened, or was removed
}

// epochAt returns the epoch of a time, of generation 0.
func epochAt(now time.Time, rotation time.Duration) epoch {
	length := uint32(rotation / time.Second)
	return epoch{start: uint32(now.Unix()) / length * length, rotation: length}
}

func parseEpoch(encoded [epochSize]byte) epoch {
	return epoch{
		start:      binary.BigEndian.Uint32(encoded[:]),
		rotation:   binary.BigEndian.Uint32(encoded[3:]) & 0xffffff,
		generation: encoded[7],
	}
}

func (e epoch) bytes() (encoded [epochSize]byte) {
	binary.BigEndian.PutUint32(encoded[3:], e.rotation)
	binary.BigEndian.PutUint32(encoded[:], e.start)
	encoded[7] = e.generation
	return encoded
}

// ofGeneration returns the epoch with another generation.
func (e epoch) ofGeneration(generation uint8) epoch {
	e.generation = generation
	return e
}

func (e epoch) next() epoch { return epoch{start: e.start + e.rotation, rotation: e.rotation} }

// notAfter returns the time at which the secret is erased. Tickets of the epoch may live for lifetime. In the epoch after it, frontends
// whose clocks are behind, or that cannot reach the store, still encrypt with the secret.
func (e epoch) notAfter(lifetime time.Duration) time.Time {
	return time.Unix(int64(e.start)+2*int64(e.rotation), 0).Add(lifetime)
}

// position returns where the epoch is as seen from now: the reason that a ticket which resumed counts under.
func (e epoch) position(now time.Time) string {
	switch passed := now.Unix() - int64(e.start); {
	case passed < 0:
		return "next"
	case passed < int64(e.rotation):
		return "current"
	case passed < 2*int64(e.rotation):
		return "previous"
	default:
		return "older"
	}
}

// A keyName is the beginning of a ticket: the name of the key that opens it.
type keyName [keyNameSize]byte

func (n keyName) epoch() epoch { return parseEpoch([epochSize]byte(n[:])) }

// namedBy reports whether the fleet named a key for this namespace: clients may send anything.
func (n keyName) namedBy(key *fleetKey, namespace string) bool {
	head := n[:epochSize+keyTagSize]
	return hmac.Equal(n[len(head):], key.nameCode(namespace, head))
}

// nameCode returns the last part of a name that begins with head.
func (k *fleetKey) nameCode(namespace string, head []byte) []byte {
	code := hmac.New(sha256.New, k.names)
	_, _ = io.WriteString(code, namespace)
	_, _ = code.Write([]byte{0})
	_, _ = code.Write(head)
	return code.Sum(nil)[:keyNameSize-epochSize-keyTagSize]
}

// secretAddress returns the store key of the secret of an epoch, sealed with a key of the fleet.
func (k *fleetKey) secretAddress(namespace string, epoch epoch) storeKey {
	encoded := epoch.bytes()
	return storeKeyOf("ticket-secret", namespace, append(k.id[:len(k.id):len(k.id)], encoded[:]...))
}

// A ticketSecret is the secret of an epoch: the keys and the value that are derived from it. None of them is ever printed.
type ticketSecret struct {
	keyID    [keyIDSize]byte // of the key of the fleet that seals it
	epoch    epoch
	address  storeKey
	created  time.Time
	notAfter time.Time
	name     keyName
	key      []byte // "aead32"
	sealed   []byte // the value in the store
}

// newTicketSecret returns the secret that this frontend proposes for an epoch.
func newTicketSecret(namespace string, key *fleetKey, epoch epoch, secret []byte, created, notAfter time.Time) *ticketSecret {
	plaintext := append(make([]byte, 0, secretEncoding), secretVersion)
	plaintext = binary.BigEndian.AppendUint64(plaintext, uint64(created.UnixMicro()))
	plaintext = append(plaintext, secret...)
	defer clear(plaintext)
	address := key.secretAddress(namespace, epoch)
	sealed := key.seal(address, plaintext, notAfter, thisProcess.nonce())
	return deriveTicketSecret(namespace, key, epoch, plaintext, notAfter, sealed)
}

// openTicketSecret returns the secret in a value, any bytes at all, that the store returned for the address of an epoch.
func openTicketSecret(namespace string, key *fleetKey, epoch epoch, sealed []byte, now time.Time) (*ticketSecret, error) {
	plaintext, notAfter, err := openSealed([]*fleetKey{key}, key.secretAddress(namespace, epoch), sealed, now)
	if err != nil {
		return nil, err
	}
	defer clear(plaintext)
	if len(plaintext) != secretEncoding || plaintext[0] != secretVersion {
		return nil, errSecretMalformed
	}
	return deriveTicketSecret(namespace, key, epoch, plaintext, notAfter, sealed), nil
}

func deriveTicketSecret(
	namespace string, key *fleetKey, epoch epoch, plaintext []byte, notAfter time.Time, sealed []byte,
) *ticketSecret {
	secret := plaintext[secretEncoding-secretSize:]
	encoded, tag, opener := epoch.bytes(), deriveKey(secret, nil, keyInfo+"tag"), deriveKey(secret, nil, keyInfo+"aead32")
	defer clear(opener[:])
	head := append(encoded[:], tag[:keyTagSize]...)
	return &ticketSecret{
		keyID:    key.id,
		epoch:    epoch,
		address:  key.secretAddress(namespace, epoch),
		created:  time.UnixMicro(int64(binary.BigEndian.Uint64(plaintext[1:]))),
		notAfter: notAfter,
		name:     keyName(append(head, key.nameCode(namespace, head)...)),
		key:      bytes.Clone(opener[:]),
		sealed:   sealed,
	}
}

// erase overwrites the keys in memory.
func (s *ticketSecret) erase() {
	clear(s.key)
	clear(s.sealed)
	s.sealed = nil
}

// Format prints nothing of the secret, for any verb.
func (s *ticketSecret) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, "ticketSecret") }
