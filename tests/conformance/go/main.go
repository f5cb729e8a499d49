// A TLS server of Go that the scenarios talk to: see ../behaviour.toml.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	resumed "github.com/resumed/resumed/client/go"
)

func main() {
	certificate := flag.String("certificate", "", "file with the certificate and its key")
	clientCA := flag.String("client-ca", "", "file with the authorities of the client certificates that are required")
	target := flag.String("target", "", "where the store is; without one there is no shim")
	ticketKey := flag.String("ticket-key", "", "file with the key of tickets that others have too, where there is no shim")
	namespace := flag.String("namespace", "", "of the sessions")
	keyringFile := flag.String("keyring", "", "file")
	deadline := flag.Duration("deadline", 50*time.Millisecond, "of a look-up")
	singleUse := flag.Bool("single-use", false, "whether a session resumes once")
	tickets := flag.Bool("tickets", false, "whether sessions are kept in tickets, in TLS 1.2 as well")
	rotation := flag.Duration("rotation", time.Hour, "of the secrets of tickets")
	lifetime := flag.Duration("lifetime", 2*time.Hour, "of a session")
	grace := flag.Duration("revocation-grace", 5*time.Minute, "for which tickets resume without a stream of removals; negative for none")
	flag.Parse()

	pair, err := tls.LoadX509KeyPair(*certificate, *certificate)
	check(err)
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	if *clientCA != "" {
		authorities, err := os.ReadFile(*clientCA)
		check(err)
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
		config.ClientCAs.AppendCertsFromPEM(authorities)
	}
	end := func() error { return nil }
	switch {
	case *target != "":
		options := resumed.Options{
			Namespace: *namespace, Deadline: *deadline, SingleUse: *singleUse, Lifetime: *lifetime, Rotation: *rotation, RevocationGrace: *grace,
			Logger: slog.New(slog.DiscardHandler),
		}
		if *tickets {
			options.Sessions, options.TicketsTLS12 = resumed.TicketSessions, true
		}
		end = wrap(config, *target, *keyringFile, options).Close
	case *ticketKey != "":
		key, err := os.ReadFile(*ticketKey)
		check(err)
		config.SetSessionTicketKeys([][32]byte{[32]byte(key[:32])})
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
	check(err)
	fmt.Printf("{\"port\": %d}\n", listener.Addr().(*net.TCPAddr).Port)

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() {
		<-stop
		_ = end()
		os.Exit(0)
	}()
	for {
		connection, err := listener.Accept()
		check(err)
		go serve(connection)
	}
}

func wrap(config *tls.Config, target, keyringFile string, options resumed.Options) *resumed.Installation {
	keyring, err := resumed.LoadKeyring(keyringFile, options.Logger)
	check(err)
	options.Keyring = keyring
	store, err := resumed.Dial(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	sessions, err := resumed.Wrap(config, store, options)
	check(err)
	return sessions
}

// serve answers whatever a client sends, and reads on after that.
func serve(connection net.Conn) {
	buffer := make([]byte, 4096)
	for {
		if _, err := connection.Read(buffer); err != nil {
			_ = connection.(*tls.Conn).NetConn().Close() // without close_notify, as a frontend that is killed
			return
		}
		if _, err := connection.Write([]byte("ok\n")); err != nil {
			return
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
