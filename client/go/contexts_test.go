package resumed

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"maps"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

func poolOf(certificates ...tls.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, certificate := range certificates {
		pool.AddCert(certificate.Leaf)
	}
	return pool
}

// A session resumes in the context that negotiated it, and in no other of the namespace.
func TestContexts(t *testing.T) {
	client, namesake, stranger := newCertificate("client"), newCertificate("client"), newCertificate("stranger")
	with := func(change func(*tls.Config)) *tls.Config {
		config := newServer()
		change(config)
		return config
	}
	demands := func(change func(*tls.Config)) *tls.Config {
		return with(func(c *tls.Config) {
			c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, poolOf(client)
			change(c)
		})
	}
	asIs := func(*tls.Config) {}
	certificates := func(certificates ...tls.Certificate) *tls.Config {
		return with(func(c *tls.Config) { c.Certificates = certificates })
	}
	unparsed := newCertificate("bank.example", "shop.example")
	unparsed.Leaf = nil
	const (
		resumed  = "resumed"
		full     = "context-mismatch"
		cryptoOn = "by crypto/tls" // the fingerprints agree
	)
	for name, test := range map[string]struct {
		from, to *tls.Config
		certFrom bool // whether the client has a certificate at first
		certTo   bool // and when it comes back
		want     string
		refused  bool // the full handshake fails
	}{
		"the same":                              {newServer(), newServer(), false, false, resumed, false},
		"demands, the same":                     {demands(asIs), demands(asIs), true, true, resumed, false},
		"asks for none, then demands":           {newServer(), demands(asIs), false, false, full, true},
		"asks for none, then demands; has one":  {newServer(), demands(asIs), true, true, full, false},
		"demands, then asks for none":           {demands(asIs), newServer(), true, false, full, false},
		"asks, then demands; shows one":         {demands(func(c *tls.Config) { c.ClientAuth = tls.RequestClientCert }), demands(asIs), true, true, full, false},
		"asks, then demands; shows none":        {demands(func(c *tls.Config) { c.ClientAuth = tls.VerifyClientCertIfGiven }), demands(asIs), false, false, full, true},
		"any certificate, then a verified one":  {demands(func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }), demands(asIs), true, true, full, false},
		"asks and trusts others, shows none":    {demands(func(c *tls.Config) { c.ClientAuth, c.ClientCAs = tls.RequestClientCert, poolOf(stranger) }), demands(func(c *tls.Config) { c.ClientAuth = tls.RequestClientCert }), false, false, full, false},
		"other authorities":                     {demands(asIs), demands(func(c *tls.Config) { c.ClientCAs = poolOf(stranger) }), true, true, full, true},
		"one authority more":                    {demands(asIs), demands(func(c *tls.Config) { c.ClientCAs = poolOf(stranger, client) }), true, true, full, false},
		"the same authorities in another order": {demands(func(c *tls.Config) { c.ClientCAs = poolOf(client, stranger) }), demands(func(c *tls.Config) { c.ClientCAs = poolOf(stranger, client, client) }), true, true, resumed, false},
		"an authority of the same name":         {demands(asIs), demands(func(c *tls.Config) { c.ClientCAs = poolOf(namesake) }), true, true, cryptoOn, true},
		"no authorities":                        {demands(asIs), demands(func(c *tls.Config) { c.ClientCAs = x509.NewCertPool() }), true, true, full, true},
		"the system's authorities, then none":   {demands(func(c *tls.Config) { c.ClientAuth, c.ClientCAs = tls.VerifyClientCertIfGiven, nil }), demands(func(c *tls.Config) { c.ClientAuth, c.ClientCAs = tls.VerifyClientCertIfGiven, x509.NewCertPool() }), false, false, full, false},
		"VerifyPeerCertificate": {demands(asIs), demands(func(c *tls.Config) {
			c.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { return errTest }
		}), true, true, full, true},
		"renewed":               {newServer(), certificates(unparsed), false, false, resumed, false},
		"another host":          {newServer(), certificates(newCertificate("bank.example")), false, false, full, false},
		"one name more":         {newServer(), certificates(newCertificate("shop.example", "bank.example", "pay.example")), false, false, full, false},
		"one certificate more":  {newServer(), certificates(testCertificate(), newCertificate("pay.example")), false, false, full, false},
		"two of the same names": {newServer(), certificates(testCertificate(), unparsed), false, false, resumed, false},
	} {
		t.Run(name, func(t *testing.T) {
			onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
				from, to := test.from.Clone(), test.to.Clone()
				wrap(t, from, store.connect(t), Options{})
				sessions := wrap(t, to, store.connect(t), Options{})
				visitor := newClient(version)
				visitor.InsecureSkipVerify = true
				if test.certFrom {
					visitor.Certificates = []tls.Certificate{client}
				}
				resumes(t, listen(t, from), visitor)
				visitor = freeze(t, visitor)
				if !test.certTo {
					visitor.Certificates = nil
				}
				state, err := visit(listen(t, to), visitor)
				stats := sessions.Stats()
				switch {
				case (err != nil) != test.refused:
					t.Fatal(err, stats)
				case err == nil && state.DidResume != (test.want == resumed):
					t.Fatal("resumed: ", state.DidResume, stats)
				case test.want == full && !maps.Equal(stats.Misses, map[string]uint64{full: 1}):
					t.Fatal(stats)
				case test.want != full && total(stats.Misses) != 0:
					t.Fatal(stats)
				}
			})
		})
	}
}

// A session negotiated for one server name does not resume for another.
func TestAnotherServerName(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		config := newServer()
		sessions := wrap(t, config, store.connect(t), Options{})
		address, client := listen(t, config), newClient(version)
		resumes(t, address, client)
		client = freeze(t, client)
		client.ServerName = "bank.example"
		if resumes(t, address, client) || sessions.Stats().Misses["context-mismatch"] != 1 {
			t.Fatal(sessions.Stats())
		}
		client.ServerName = "SHOP.example"
		if !resumes(t, address, client) {
			t.Fatal(sessions.Stats())
		}
	})
}

// Of two hosts that GetConfigForClient chooses, the one that demands certificates lets in no session of the other.
func TestContextsOfVirtualHosts(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		certificate := newCertificate("client")
		public, private, front := newServer(), newServer(), &tls.Config{}
		private.ClientAuth, private.ClientCAs = tls.RequireAndVerifyClientCert, poolOf(certificate)
		byAddress := atomic.Pointer[tls.Config]{} // of one name; what chooses them is not the name
		front.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if chosen := byAddress.Load(); chosen != nil {
				return chosen, nil
			}
			if hello.ServerName == "bank.example" {
				return private, nil
			}
			return public, nil
		}
		sessions := wrap(t, front, store.connect(t), Options{})
		address, visitor := listen(t, front), newClient(version)
		resumes(t, address, visitor)
		visitor = freeze(t, visitor)
		if !resumes(t, address, visitor) {
			t.Fatal("the public host does not resume its own session")
		}
		visitor.ServerName = "bank.example"
		if state, err := visit(address, visitor); err == nil {
			t.Fatalf("the private host let a stranger in: resumed %v", state.DidResume)
		}
		visitor.ServerName = "shop.example"
		byAddress.Store(private)
		if state, err := visit(address, visitor); err == nil {
			t.Fatalf("the private host let a stranger in by the public name: resumed %v", state.DidResume)
		}
		if misses := sessions.Stats().Misses; misses["context-mismatch"] != 2 {
			t.Fatal(misses)
		}
		visitor = newClient(version)
		visitor.Certificates = []tls.Certificate{certificate}
		for n := range 3 {
			if got := resumes(t, address, visitor); got != (n > 0) {
				t.Fatalf("connection %d of the private host: resumed %v", n, got)
			}
		}
	})
}

// A session ends with the certificate of its client.
func TestSessionEndsWithTheClientsCertificate(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		clock := &clock{}
		certificate := newCertificateUntil(time.Now().Add(time.Hour), "client")
		config := newServer()
		config.ClientAuth, config.ClientCAs, config.Time = tls.RequestClientCert, poolOf(certificate), clock.now
		sessions := wrap(t, config, store.connect(t), Options{})
		address, visitor := listen(t, config), newClient(version)
		visitor.Certificates = []tls.Certificate{certificate}
		resumes(t, address, visitor)
		flush(t, sessions)
		clock.forward(59 * time.Minute)
		if !resumes(t, address, visitor) {
			t.Fatal("not resumed within the certificate's life: ", sessions.Stats())
		}
		flush(t, sessions)
		clock.forward(time.Minute + time.Second)
		if resumes(t, address, visitor) || !maps.Equal(sessions.Stats().Misses, map[string]uint64{"expired": 1}) {
			t.Fatal("resumed past the certificate's life: ", sessions.Stats())
		}
	})
}

// With single use, a connection that must not resume a session leaves it to one that may.
func TestMismatchDoesNotUseUp(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		var takes atomic.Int32
		counts := intercept(func(method string, _ any) {
			if method == "Take" {
				takes.Add(1)
			}
		})
		right, wrong := newServer(), newServer()
		wrong.ClientAuth = tls.RequestClientCert
		sessions := wrap(t, right, store.connect(t), Options{SingleUse: true})
		other := wrap(t, wrong, store.connect(t, counts), Options{SingleUse: true})
		address, visitor := listen(t, right), newClient(version)
		resumes(t, address, visitor)
		visitor = freeze(t, visitor)
		if resumes(t, listen(t, wrong), visitor) || other.Stats().Misses["context-mismatch"] != 1 || takes.Load() != 0 {
			t.Fatal(other.Stats(), takes.Load())
		}
		if !resumes(t, address, visitor) {
			t.Fatal("the session was used up: ", sessions.Stats())
		}
		flush(t, sessions)
		if resumes(t, address, visitor) || sessions.Stats().Misses["unknown"] != 1 {
			t.Fatal("resumed twice: ", sessions.Stats())
		}
	})
}

// A session of TLS 1.3 with another hash than the cipher that was chosen is a miss, and stays for a handshake that it fits.
func TestOtherCipher(t *testing.T) {
	store := newFakeStore()
	config := newServer()
	keyring := testKeyring(t)
	sessions := wrap(t, config, store, Options{SingleUse: true, Keyring: keyring})
	address, visitor := listen(t, config), newClient(tls.VersionTLS13)
	resumes(t, address, visitor)
	visitor = freeze(t, visitor)
	flush(t, sessions)
	key := storeKeyOf(format, "shop", ticket(t, visitor))
	plaintext, notAfter, err := keyring.open(key, store.values[string(key[:])], time.Now())
	check(t, err)
	suite := plaintext[envelopeHeader+3:]
	if binary.BigEndian.Uint16(suite) == tls.TLS_AES_256_GCM_SHA384 {
		binary.BigEndian.PutUint16(suite, tls.TLS_AES_128_GCM_SHA256)
	} else {
		binary.BigEndian.PutUint16(suite, tls.TLS_AES_256_GCM_SHA384)
	}
	store.values[string(key[:])] = keyring.seal(key, plaintext, notAfter)
	if resumes(t, address, visitor) {
		t.Fatal("resumed")
	}
	stats := sessions.Stats()
	if !maps.Equal(stats.Misses, map[string]uint64{"other-cipher": 1}) || total(stats.Hits) != 0 || store.called("Take") != 0 {
		t.Fatal(stats, store.called("Take"))
	}
}

// What crypto/tls does not resume, although it was found, is a miss: here a client's certificate that the authorities of this
// frontend did not issue, though they have the same names.
func TestFoundAndNotResumedIsAMiss(t *testing.T) {
	client, namesake := newCertificate("client"), newCertificate("client")
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		var addresses [2]string
		var sessions [2]*Installation
		for n, authority := range []tls.Certificate{client, namesake} {
			config := newServer()
			config.ClientAuth, config.ClientCAs = tls.VerifyClientCertIfGiven, poolOf(authority)
			sessions[n] = wrap(t, config, store.connect(t), Options{})
			addresses[n] = listen(t, config)
		}
		visitor := newClient(version)
		visitor.Certificates = []tls.Certificate{client}
		resumes(t, addresses[0], visitor)
		visitor = freeze(t, visitor)
		visitor.Certificates = nil
		if resumes(t, addresses[1], visitor) {
			t.Fatal("resumed")
		}
		stats := sessions[1].Stats()
		if !maps.Equal(stats.Misses, map[string]uint64{"context-mismatch": 1}) || total(stats.Hits) != 0 {
			t.Fatal(stats)
		}
	})
}

// Between the Get and the Take of a session another frontend may take it.
func TestTakenBetweenGetAndTake(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		config := newServer()
		loses := intercept(func(method string, reply any) {
			if take, ok := reply.(*pb.TakeResponse); ok {
				take.Session = nil
			}
		})
		sessions := wrap(t, config, store.connect(t, loses), Options{SingleUse: true})
		address, visitor := listen(t, config), newClient(version)
		resumes(t, address, visitor)
		if resumes(t, address, visitor) || !maps.Equal(sessions.Stats().Misses, map[string]uint64{"unknown": 1}) {
			t.Fatal(sessions.Stats())
		}
	})
}

// crypto/tls itself resumes no session without a certificate where one is required, and none with one where the server requests none,
// should the fingerprints ever agree.
func TestNoCertificateNoEntry(t *testing.T) {
	onBothVersions(t, func(t *testing.T, store *realStore, version uint16) {
		certificate := newCertificate("client")
		demanding := newServer()
		demanding.ClientAuth, demanding.ClientCAs = tls.RequireAndVerifyClientCert, poolOf(certificate)
		for _, test := range []struct {
			from, to *tls.Config
			misses   map[string]uint64 // the first handshake fails, and counts nothing that crypto/tls had not decided about
		}{{newServer(), demanding, nil}, {demanding, newServer(), map[string]uint64{"context-mismatch": 1}}} {
			from, to := test.from.Clone(), test.to.Clone()
			wrap(t, from, store.connect(t), Options{})
			visitor := newClient(version)
			visitor.Certificates = []tls.Certificate{certificate}
			resumes(t, listen(t, from), visitor)
			visitor = freeze(t, visitor)
			visitor.Certificates = nil

			keyring := testKeyring(t)
			key := storeKeyOf(format, "shop", ticket(t, visitor))
			var sessions *Installation
			forge := intercept(func(_ string, reply any) {
				if get, ok := reply.(*pb.GetResponse); ok && get.GetSession() != nil {
					plaintext, end, err := keyring.open(key, get.GetSession().GetValue(), time.Now())
					check(t, err)
					stored, err := parseEnvelope(plaintext)
					check(t, err)
					stored.fingerprint = sessions.digests.fingerprintOf(to, visitor.ServerName)
					get.Session.Value = keyring.seal(key, stored.bytes(), end)
				}
			})
			sessions = wrap(t, to, store.connect(t, forge), Options{})
			state, _ := visit(listen(t, to), visitor)
			if stats := sessions.Stats(); state.DidResume || total(stats.Hits) != 0 || !maps.Equal(stats.Misses, test.misses) {
				t.Fatal("resumed: ", state.DidResume, stats)
			}
		}
	})
}

// Digests are computed once, also for configs that are made anew, and again when a certificate or an authority is another.
func TestDigestsAreKept(t *testing.T) {
	var known digests
	certificate, other := newCertificate("a.example"), newCertificate("b.example")
	certificate.Leaf = nil
	one, both := []tls.Certificate{certificate}, []tls.Certificate{certificate, other}
	pool := poolOf(other)
	first, authorities := known.namesOf(one), known.subjectsOf(pool)
	if allocations := testing.AllocsPerRun(10, func() { known.namesOf(one); known.subjectsOf(pool) }); allocations > 0 {
		t.Error("allocations: ", allocations)
	}
	if known.namesOf(both) == first || known.namesOf(nil) == first || known.namesOf(one) != first {
		t.Error("identities are mixed up")
	}
	before := known.namesOf(both)
	both[1] = newCertificate("c.example")
	if known.namesOf(both) == before {
		t.Error("a certificate that was replaced in its list is not noticed")
	}
	pool.AddCert(newCertificate("c.example").Leaf)
	if known.subjectsOf(pool) == authorities {
		t.Error("an authority that was added to its pool is not noticed")
	}
	for range 2 * maxDigests {
		known.namesOf([]tls.Certificate{{Certificate: [][]byte{{0}}}})
		known.subjectsOf(x509.NewCertPool())
	}
	if len(known.identities) > maxDigests || len(known.pools) > maxDigests {
		t.Error("keeps ", len(known.identities), len(known.pools))
	}
}
