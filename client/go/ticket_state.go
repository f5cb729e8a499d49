package resumed

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"time"
)

// The format of tickets, the same in every language (protos/README.md, section "Fleet tickets"; protos/vectors):
//
//   - ticket = name (16) | salt (16) | AES-256-GCM(state, session), under the key HKDF-SHA256(key of the secret, salt, info =
//     "resumed/v1 ticket"), with a nonce of zeros and the first 32 bytes as associated data
//   - state = "resumed" 03 | fingerprint (32) | lineage (16) | negotiated (8, microseconds) | end (8, Unix seconds) | digest of the
//     server name (16)

const (
	ticketMark     = "resumed\x03"
	saltSize       = 16
	ticketHead     = keyNameSize + saltSize
	lineageSize    = 16
	nameDigestSize = 16
	stateSize      = len(ticketMark) + fingerprintSize + lineageSize + 8 + 8 + nameDigestSize
	minTicket      = ticketHead + stateSize + tagSize
	ticketInfo     = "resumed/v1 ticket"
)

// A lineage is random, and the same in all tickets that stem from one full handshake.
type lineage [lineageSize]byte

func newLineage() (lineage lineage) {
	_, _ = rand.Read(lineage[:]) // never fails
	return lineage
}

// A ticketState is the part of a ticket that the rules of the fleet need, beside the session of crypto/tls.
type ticketState struct {
	fingerprint fingerprint
	lineage     lineage
	negotiated  time.Time // the full handshake of the lineage
	end         time.Time // of its life, in whole seconds
	serverName  [nameDigestSize]byte
}

func (s ticketState) appendTo(plaintext []byte) []byte {
	plaintext = append(plaintext, ticketMark...)
	plaintext = append(plaintext, s.fingerprint[:]...)
	plaintext = append(plaintext, s.lineage[:]...)
	plaintext = binary.BigEndian.AppendUint64(plaintext, uint64(s.negotiated.UnixMicro()))
	plaintext = binary.BigEndian.AppendUint64(plaintext, uint64(s.end.Unix()))
	return append(plaintext, s.serverName[:]...)
}

// parseTicket returns the state and the session in the plaintext of a ticket.
func parseTicket(plaintext []byte) (state ticketState, session []byte, err error) {
	if len(plaintext) < stateSize || string(plaintext[:len(ticketMark)]) != ticketMark {
		return ticketState{}, nil, errMalformed
	}
	rest := plaintext[len(ticketMark):]
	rest = rest[copy(state.fingerprint[:], rest):]
	rest = rest[copy(state.lineage[:], rest):]
	state.negotiated = time.UnixMicro(int64(binary.BigEndian.Uint64(rest)))
	state.end = time.Unix(int64(binary.BigEndian.Uint64(rest[8:])), 0)
	rest = rest[16:]
	return state, rest[copy(state.serverName[:], rest):], nil
}

// nameDigest returns the digest of the server name that a client asked for, "" if it sent none.
func nameDigest(serverName string) [nameDigestSize]byte {
	return [nameDigestSize]byte(digest([]byte("resumed/v1 server name\x00" + strings.ToLower(serverName))))
}

// sealTicket returns the ticket of a session, with the key of the ticket.
func sealTicket(name keyName, key [ticketKeySize]byte, salt [saltSize]byte, state ticketState, session []byte) []byte {
	ticket := make([]byte, 0, ticketHead+stateSize+len(session)+tagSize)
	ticket = append(append(ticket, name[:]...), salt[:]...)
	plaintext := append(state.appendTo(make([]byte, 0, stateSize+len(session))), session...)
	return ticketCipher(key).Seal(ticket, make([]byte, nonceSize), plaintext, ticket)
}

// openTicket returns the plaintext of a ticket of at least ticketHead bytes, with the key of the ticket.
func openTicket(key [ticketKeySize]byte, ticket []byte) ([]byte, error) {
	head := ticket[:ticketHead]
	plaintext, err := ticketCipher(key).Open(nil, make([]byte, nonceSize), ticket[ticketHead:], head)
	if err != nil {
		return nil, errNotAuthentic
	}
	return plaintext, nil
}

// ticketCipher returns the cipher of one ticket, so that the nonce may be zeros.
func ticketCipher(key [ticketKeySize]byte) cipher.AEAD {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err) // the key has the one size that it checks
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // AES has the one block size that it checks
	}
	return aead
}

// deriveKey returns one block of HKDF-SHA256 (RFC 5869). hkdf.Key returns the same after twice the time and 16 allocations, which
// resumptions of TLS 1.2 notice, and leaves a copy of the key in each. info has at most 63 bytes.
func deriveKey(key, salt []byte, info string) [sha256.Size]byte {
	extracted := authenticate(salt, key)
	defer clear(extracted[:])
	return authenticate(extracted[:], append([]byte(info), 1))
}

// authenticate returns HMAC-SHA256 (RFC 2104) of a key and a message of at most 64 bytes each.
func authenticate(key, message []byte) [sha256.Size]byte {
	var input [2 * sha256.BlockSize]byte
	defer clear(input[:])
	pad, rest := input[:sha256.BlockSize], input[sha256.BlockSize:]
	copy(pad, key)
	for n := range pad {
		pad[n] ^= 0x36
	}
	inner := sha256.Sum256(input[:sha256.BlockSize+copy(rest, message)])
	for n := range pad {
		pad[n] ^= 0x36 ^ 0x5c
	}
	return sha256.Sum256(input[:sha256.BlockSize+copy(rest, inner[:])])
}

func lineageKey(namespace string, lineage lineage) storeKey {
	return storeKeyOf("ticket-lineage", namespace, lineage[:])
}

// useKey returns the store key under which a ticket is claimed for its single use.
func useKey(namespace string, ticket []byte) storeKey {
	return storeKeyOf("ticket-use", namespace, ticket[:ticketHead])
}
