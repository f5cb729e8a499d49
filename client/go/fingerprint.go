package resumed

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"slices"
	"strings"
	"sync"
)

const (
	identityLabel   = "resumed/v1 go identity\x00"
	clientAuthLabel = "resumed/v1 go client authentication\x00"
	maxDigests      = 256
)

// fingerprintOf returns the fingerprint of a connection with this config, for this server name:
//
//	server identity (16) | client authentication (16)
//
// Sessions of crypto/tls resume on no other stack, so the encoding is this package's own.
func (d *digests) fingerprintOf(config *tls.Config, serverName string) (print fingerprint) {
	names := d.namesOf(config.Certificates)
	identity := append(append([]byte(identityLabel), names[:]...), strings.ToLower(serverName)...)
	copy(print[:16], digest(identity))
	copy(print[16:], digest(d.appendClientAuth([]byte(clientAuthLabel), config)))
	return print
}

func digest(input []byte) []byte {
	sum := sha256.Sum256(input)
	return sum[:]
}

// appendClientAuth appends what config demands of its clients, nothing if it does not ask for certificates.
func (d *digests) appendClientAuth(input []byte, config *tls.Config) []byte {
	if config.ClientAuth == tls.NoClientCert {
		return input
	}
	input = append(input, byte(config.ClientAuth), 0)
	if config.VerifyPeerCertificate != nil { // not called on resumption
		input[len(input)-1] = 1
	}
	if config.ClientCAs == nil { // the roots of the system; an empty pool has no authorities
		return input
	}
	authorities := d.subjectsOf(config.ClientCAs)
	return append(input, authorities[:]...)
}

// digests caches digests that take long to compute, until their input changes. The zero value is ready for use.
type digests struct {
	mu         sync.Mutex
	identities map[*byte]identity // by the first leaf
	pools      map[*x509.CertPool]pool
}

type identity struct {
	leaves []*byte // the first byte of each leaf's DER, which never changes
	names  [sha256.Size]byte
}

type pool struct {
	copy     *x509.CertPool
	subjects [sha256.Size]byte
}

// namesOf returns the digest of the set of names in the leaves of certificates. Renewed certificates with the same names have
// the same.
func (d *digests) namesOf(certificates []tls.Certificate) [sha256.Size]byte {
	var first *byte
	if len(certificates) > 0 {
		first = leafDER(&certificates[0])
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if known, ok := d.identities[first]; ok && known.isOf(certificates) {
		return known.names
	}
	var names []string
	fresh := identity{}
	for n := range certificates {
		names = append(names, namesOf(&certificates[n])...)
		fresh.leaves = append(fresh.leaves, leafDER(&certificates[n]))
	}
	fresh.names = digestSet(names)
	if d.identities == nil || len(d.identities) >= maxDigests {
		d.identities = map[*byte]identity{}
	}
	d.identities[first] = fresh
	return fresh.names
}

func (i identity) isOf(certificates []tls.Certificate) bool {
	if len(i.leaves) != len(certificates) {
		return false
	}
	for n, leaf := range i.leaves {
		if leaf != leafDER(&certificates[n]) {
			return false
		}
	}
	return true
}

// subjectsOf returns the digest of the set of subjects in authorities: a pool shows no more of its certificates. Among authorities
// with one subject and different keys crypto/tls decides: on resumption it checks that the session's chain ends in the pool.
func (d *digests) subjectsOf(authorities *x509.CertPool) [sha256.Size]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	if known, ok := d.pools[authorities]; ok && known.copy.Equal(authorities) {
		return known.subjects
	}
	var subjects []string
	//lint:ignore SA1019 it leaves out the system's roots, where a pool loads them only when it verifies: there is nothing else
	for _, subject := range authorities.Subjects() {
		subjects = append(subjects, string(subject))
	}
	fresh := pool{authorities.Clone(), digestSet(subjects)}
	if d.pools == nil || len(d.pools) >= maxDigests {
		d.pools = map[*x509.CertPool]pool{}
	}
	d.pools[authorities] = fresh
	return fresh.subjects
}

func digestSet(set []string) [sha256.Size]byte {
	slices.Sort(set)
	var input []byte
	for _, each := range slices.Compact(set) {
		input = append(binary.BigEndian.AppendUint32(input, uint32(len(each))), each...)
	}
	return sha256.Sum256(input)
}

func leafDER(certificate *tls.Certificate) *byte {
	if len(certificate.Certificate) == 0 || len(certificate.Certificate[0]) == 0 {
		return nil
	}
	return &certificate.Certificate[0][0]
}

// namesOf returns the host names and addresses of a certificate, each behind its kind; of one that has none its common name,
// or else its digest.
func namesOf(certificate *tls.Certificate) (names []string) {
	if len(certificate.Certificate) == 0 {
		return nil
	}
	der := certificate.Certificate[0]
	leaf := certificate.Leaf
	if leaf == nil {
		var err error
		if leaf, err = x509.ParseCertificate(der); err != nil {
			return []string{"X" + string(digest(der))}
		}
	}
	for _, name := range leaf.DNSNames {
		names = append(names, "D"+strings.ToLower(name))
	}
	for _, address := range leaf.IPAddresses {
		names = append(names, "I"+string(address))
	}
	switch {
	case len(names) > 0:
		return names
	case leaf.Subject.CommonName != "":
		return []string{"C" + strings.ToLower(leaf.Subject.CommonName)}
	default:
		return []string{"X" + string(digest(der))}
	}
}
