package resumed

import (
	"crypto/rand"
	"encoding/binary"
	"hash/maphash"
)

const nonceRandom = 8 // bytes of a nonce; the rest is the mark

// An issuer makes nonces, and recognises ids that begin with one of them without keeping a list: four bytes of a nonce are a keyed
// hash of the other eight. Without the issuer's key, even with the fleet's, the nonce looks random. One foreign id in four thousand
// million is taken for an own one; nothing is trusted because of it.
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
