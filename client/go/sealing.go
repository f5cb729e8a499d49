package resumed

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"time"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

// The formats that the server stores, the same in every language (protos/README.md, protos/vectors):
//
//   - store key = SHA-256("resumed/v1" 00 format 00 namespace 00 session id)
//   - sealed value = 02 | key id (4) | not_after (8, Unix seconds, big endian) | nonce (12) | AES-256-GCM(envelope), under
//     the key HKDF-SHA256(fleet key, salt = store key, info = "resumed/v1 seal"), with the first 13 bytes and the store
//     key as associated data
//   - sealed id = nonce (12) | AES-SIV(issue time: Unix seconds, 4, big endian), RFC 5297, under the 64-byte key
//     HKDF-SHA256(fleet key, salt = "", info = "resumed/v1 id"), with the one associated string namespace 00 nonce

const (
	format    = "go" // tls.SessionState.Bytes
	idSize    = 32
	keySize   = 32
	keyIDSize = 4

	sealedVersion = 2
	headerSize    = 1 + keyIDSize + 8
	nonceSize     = 12
	tagSize       = 16
)

// The errors of a stored value that cannot be opened; their texts are the reasons of the misses.
var (
	errMalformed    = errors.New("malformed")
	errUnknownKey   = errors.New("unknown-key")
	errExpired      = errors.New("expired")
	errNotAuthentic = errors.New("not-authentic")
)

type storeKey [sha256.Size]byte

func storeKeyOf(format, namespace string, id []byte) storeKey {
	input := make([]byte, 0, 128)
	input = append(input, "resumed/v1\x00"...)
	input = append(append(input, format...), 0)
	input = append(append(input, namespace...), 0)
	return sha256.Sum256(append(input, id...))
}

// fleetKey is one line of a keyring.
type fleetKey struct {
	secret []byte
	id     [keyIDSize]byte
	ids    *subtle.AESSIV
	names  []byte // the key of the codes in the names of ticket keys
}

func newFleetKey(secret []byte) *fleetKey {
	siv, err := subtle.NewAESSIV(derive(secret, nil, "resumed/v1 id", subtle.AESSIVKeySize))
	if err != nil {
		panic(err) // the key has the one size that it checks
	}
	digest := sha256.Sum256(secret)
	names := derive(secret, nil, "resumed/v1 ticket name", sha256.Size)
	return &fleetKey{secret: secret, id: [keyIDSize]byte(digest[:]), ids: siv, names: names}
}

func (k *fleetKey) seal(key storeKey, plaintext []byte, notAfter time.Time, nonce [nonceSize]byte) []byte {
	sealed := make([]byte, 0, headerSize+nonceSize+len(plaintext)+tagSize)
	sealed = append(append(sealed, sealedVersion), k.id[:]...)
	sealed = binary.BigEndian.AppendUint64(sealed, uint64(notAfter.Unix()))
	associated := append(sealed[:headerSize:headerSize], key[:]...)
	sealed = append(sealed, nonce[:]...)
	return k.aead(key).Seal(sealed, nonce[:], plaintext, associated)
}

func (k *fleetKey) open(key storeKey, sealed []byte) ([]byte, error) {
	header, rest := sealed[:headerSize], sealed[headerSize:]
	associated := append(header[:headerSize:headerSize], key[:]...)
	plaintext, err := k.aead(key).Open(nil, rest[:nonceSize], rest[nonceSize:], associated)
	if err != nil {
		return nil, errNotAuthentic
	}
	return plaintext, nil
}

// aead returns the session's own cipher: the nonce limit of GCM never binds.
func (k *fleetKey) aead(key storeKey) cipher.AEAD {
	block, err := aes.NewCipher(derive(k.secret, key[:], "resumed/v1 seal", 32))
	if err != nil {
		panic(err) // the key has 32 bytes
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // AES has the one block size that it checks
	}
	return aead
}

func (k *fleetKey) issueID(namespace string, issued time.Time, nonce [nonceSize]byte) []byte {
	var plaintext [4]byte
	binary.BigEndian.PutUint32(plaintext[:], uint32(issued.Unix()))
	sealed, err := k.ids.EncryptDeterministically(plaintext[:], associatedID(namespace, nonce[:]))
	if err != nil {
		panic(err) // four bytes are not too many
	}
	return append(nonce[:], sealed...)
}

func (k *fleetKey) openID(namespace string, id []byte) (issued time.Time, ok bool) {
	plaintext, err := k.ids.DecryptDeterministically(id[nonceSize:], associatedID(namespace, id[:nonceSize]))
	if err != nil {
		return time.Time{}, false
	}
	return time.Unix(int64(binary.BigEndian.Uint32(plaintext)), 0), true
}

func associatedID(namespace string, nonce []byte) []byte {
	associated := make([]byte, 0, 80)
	return append(append(append(associated, namespace...), 0), nonce...)
}

func derive(secret, salt []byte, info string, size int) []byte {
	key, err := hkdf.Key(sha256.New, secret, salt, info, size)
	if err != nil {
		panic(err) // the size is far below HKDF's limit
	}
	return key
}
