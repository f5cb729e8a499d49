package resumed

import (
	"encoding/binary"
	"slices"
	"time"
)

const (
	fingerprintSize = 32
	envelopeHeader  = fingerprintSize + 8
)

// A fingerprint tells contexts apart: a session resumes only on a connection with the fingerprint of the one that negotiated it.
type fingerprint [fingerprintSize]byte

// An envelope is the plaintext of a sealed value, the same in every language (protos/README.md, protos/vectors):
//
//	fingerprint (32) | issue time (8, microseconds after the Unix epoch, big endian) | session
type envelope struct {
	fingerprint fingerprint
	issued      time.Time // of the full handshake
	session     []byte
}

func (e envelope) bytes() []byte {
	header := binary.BigEndian.AppendUint64(e.fingerprint[:], uint64(e.issued.UnixMicro()))
	return slices.Concat(header, e.session)
}

func parseEnvelope(plaintext []byte) (envelope, error) {
	if len(plaintext) < envelopeHeader {
		return envelope{}, errMalformed
	}
	return envelope{
		fingerprint: fingerprint(plaintext[:fingerprintSize]),
		issued:      time.UnixMicro(int64(binary.BigEndian.Uint64(plaintext[fingerprintSize:]))),
		session:     plaintext[envelopeHeader:],
	}, nil
}
