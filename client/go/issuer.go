package resumed

import (
	"crypto/rand"
	"encoding/binary"
	"hash/maphash"
)

const nonceRandom = 8 // bytes of a nonce; the rest is the mark

// An issuer makes nonces, and knows ids again that begin with one of them, without a memory of what it issued: four bytes of a
// nonce are a keyed hash of the other eight. To those who do not have its key, the fleet key's holders among them, the nonce
// is as random as any. One foreign id in four thousand million is taken for an own one; nothing is trusted because of it.
type issuer struct{ seed maphash.Seed }

// thisProcess issues all ids of this process.
var thisProcess = issuer{maphash.MakeSeed()}

func (i issuer) nonce() (nonce [nonceSize]byte) {
	_, _ = rand.Read(nonce[:nonceRandom]) // never fails
	binary.BigEndian.PutUint32(nonce[nonceRandom:], i.mark(nonce[:nonceRandom]))
	return nonce
}

// issued reports whether an id that the fleet issued was issued here.
func (i issuer) issued(id []byte) bool {
	return binary.BigEndian.Uint32(id[nonceRandom:]) == i.mark(id[:nonceRandom])
}

func (i issuer) mark(random []byte) uint32 { return uint32(maphash.Bytes(i.seed, random)) }
