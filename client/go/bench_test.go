package resumed

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"testing"
	"time"
)

// Handshakes, client and server in one process over loopback TCP: full ones, resumed ones the stack's own way (a ticket
// key that all frontends share), and resumed ones through a call to a real store. Compare within one run only:
//
//	go test -run '^$' -bench Handshake -count 6
func BenchmarkHandshake(b *testing.B) {
	store := sharedStore(b)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		b.Run(tls.VersionName(version)+"/full", func(b *testing.B) {
			client := newClient(version)
			client.ClientSessionCache = nil
			benchmarkVisits(b, newServer(), client, false)
		})
		b.Run(tls.VersionName(version)+"/shared-keys", func(b *testing.B) {
			config := newServer()
			var key [32]byte
			_, _ = rand.Read(key[:])
			config.SetSessionTicketKeys([][32]byte{key})
			benchmarkVisits(b, config, newClient(version), true)
		})
		b.Run(tls.VersionName(version)+"/call", func(b *testing.B) {
			config := newServer()
			wrap(b, config, store.connect(b), Options{})
			benchmarkVisits(b, config, newClient(version), true)
		})
		b.Run(tls.VersionName(version)+"/full-and-stored", func(b *testing.B) {
			config := newServer()
			wrap(b, config, store.connect(b), Options{})
			client := newClient(version)
			client.ClientSessionCache = frozen{}
			benchmarkVisits(b, config, client, false)
		})
	}
}

func benchmarkVisits(b *testing.B, server, client *tls.Config, resumed bool) {
	b.Helper()
	address := listen(b, server)
	resumes(b, address, client)
	// A client that comes back within the same millisecond waits for its session: this benchmark does not measure that.
	time.Sleep(50 * time.Millisecond)
	if client.ClientSessionCache != nil && resumed {
		client = freeze(b, client)
	}
	b.ReportAllocs()
	for b.Loop() {
		if resumes(b, address, client) != resumed {
			b.Fatalf("resumed: %v", !resumed)
		}
	}
}

// The cost of the hooks for a handshake, without the call.
func BenchmarkSealAndIssue(b *testing.B) {
	keyring := testKeyring(b)
	session, now := make([]byte, 150), time.Now()
	b.ReportAllocs()
	for b.Loop() {
		id := keyring.issueID("shop", now)
		keyring.seal(storeKeyOf(format, "shop", id), session, now)
	}
}

func BenchmarkOpen(b *testing.B) {
	keyring := testKeyring(b)
	now := time.Now()
	id := keyring.issueID("shop", now)
	key := storeKeyOf(format, "shop", id)
	sealed := keyring.seal(key, make([]byte, 150), now.Add(time.Hour))
	b.ReportAllocs()
	for b.Loop() {
		keyring.openID("shop", id)
		if _, _, err := keyring.open(key, sealed, now); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkForeignID(b *testing.B) {
	keyring := testKeyring(b)
	id := make([]byte, idSize)
	b.ReportAllocs()
	for b.Loop() {
		keyring.openID("shop", id)
	}
}

// The cost of the fingerprint for a connection that stores, and for one that resumes.
func BenchmarkFingerprint(b *testing.B) {
	for _, authorities := range []int{0, 1, 10, 150} {
		b.Run(fmt.Sprint(authorities, " authorities"), func(b *testing.B) {
			config := newServer()
			if authorities > 0 {
				config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
				for n := range authorities {
					config.ClientCAs.AddCert(newCertificate(fmt.Sprint("authority ", n)).Leaf)
				}
			}
			var digests digests
			b.ReportAllocs()
			for b.Loop() {
				digests.fingerprintOf(config, "shop.example")
			}
		})
	}
}
