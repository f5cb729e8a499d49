package resumed

import (
	"crypto/tls"
	"testing"
)

// A server of QUIC issues tickets that allow early data, and accepts early data from tickets of single use only: a replay of the others
// could reach any frontend.
func TestEarlyDataOfQUIC(t *testing.T) {
	for _, singleUse := range []bool{false, true} {
		withTickets(t, func(t *testing.T, store *fakeStore) {
			var configs []*tls.Config
			for range 2 {
				config := newServer()
				config.MinVersion, config.NextProtos = tls.VersionTLS13, []string{"x"}
				newFrontendOf(t, config, store, Options{SingleUse: singleUse})
				configs = append(configs, config)
			}
			settled()
			client := newClient(tls.VersionTLS13)
			client.NextProtos = []string{"x"}
			if state, early := quicHandshake(t, configs[0], client); state.DidResume || early {
				t.Fatal("resumed the first time")
			}
			again := freeze(t, client)
			if state, early := quicHandshake(t, configs[1], again); !state.DidResume || early != singleUse {
				t.Fatal(singleUse, state.DidResume, early)
			}
			if state, early := quicHandshake(t, configs[0], again); state.DidResume == singleUse || early {
				t.Fatal("the replay: ", singleUse, state.DidResume, early)
			}
		})
	}
}

// quicHandshake makes a handshake of QUIC, and returns the state of the client after its ticket, and whether the server accepts early
// data.
func quicHandshake(t *testing.T, server, client *tls.Config) (state tls.ConnectionState, early bool) {
	t.Helper()
	near, far := tls.QUICClient(&tls.QUICConfig{TLSConfig: client}), tls.QUICServer(&tls.QUICConfig{TLSConfig: server})
	defer func() { _, _ = near.Close(), far.Close() }()
	for _, conn := range []*tls.QUICConn{near, far} {
		conn.SetTransportParameters([]byte{})
		check(t, conn.Start(t.Context()))
	}
	for moved := true; moved; {
		moved = false
		for _, ends := range [][2]*tls.QUICConn{{near, far}, {far, near}} {
			for event := ends[0].NextEvent(); event.Kind != tls.QUICNoEvent; event = ends[0].NextEvent() {
				moved = true
				switch {
				case event.Kind == tls.QUICWriteData:
					check(t, ends[1].HandleData(event.Level, event.Data))
				case event.Kind == tls.QUICSetReadSecret && event.Level == tls.QUICEncryptionLevelEarly:
					early = ends[0] == far
				case event.Kind == tls.QUICHandshakeDone && ends[0] == far:
					check(t, far.SendSessionTicket(tls.QUICSessionTicketOptions{EarlyData: true}))
				}
			}
		}
	}
	return near.ConnectionState(), early
}
