package resumed_test

import (
	"crypto/tls"
	"log"
	"net/http"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	resumed "github.com/resumed/resumed/client/go"
)

func Example() {
	server := &http.Server{Addr: ":8443", TLSConfig: &tls.Config{}}

	keyring, err := resumed.LoadKeyring("fleet.keys", nil)
	if err != nil {
		log.Fatal(err)
	}
	store, err := resumed.Dial("127.0.0.1:7400", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	sessions, err := resumed.Wrap(server.TLSConfig, store, resumed.Options{Namespace: "shop", Keyring: keyring})
	if err != nil {
		log.Fatal(err)
	}

	err = server.ListenAndServeTLS("server.pem", "server.key")
	_ = sessions.Close()
	log.Fatal(err)
}

// Two virtual hosts, each with sessions of its own.
func ExampleInstallation_ForClient() {
	var store grpc.ClientConnInterface // of Dial
	var keyring *resumed.Keyring       // of LoadKeyring
	shop, bank := &tls.Config{}, &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert}

	shopSessions, err := resumed.Wrap(shop, store, resumed.Options{Namespace: "shop", Keyring: keyring})
	if err != nil {
		log.Fatal(err)
	}
	bankSessions, err := resumed.Wrap(bank, store, resumed.Options{Namespace: "bank", Keyring: keyring})
	if err != nil {
		log.Fatal(err)
	}
	_ = &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if hello.ServerName == "bank.example" {
			return bankSessions.ForClient(bank), nil
		}
		return shopSessions.ForClient(shop), nil
	}}
}

// Logging a user out everywhere: remember the ids of each client's sessions, and remove them.
func ExampleInstallation_Remove() {
	var store grpc.ClientConnInterface // of Dial
	var keyring *resumed.Keyring       // of LoadKeyring
	remember := func(client string, id []byte) {}
	recall := func(client string) [][]byte { return nil }

	sessions, err := resumed.Wrap(&tls.Config{ClientAuth: tls.RequireAndVerifyClientCert}, store, resumed.Options{
		Namespace: "shop",
		Keyring:   keyring,
		Issued: func(connection tls.ConnectionState, id []byte) {
			remember(connection.PeerCertificates[0].Subject.CommonName, id)
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, id := range recall("alice") {
		sessions.Remove(id)
	}
}
