package resumed

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	pb "github.com/resumed/resumed/client/go/resumedv1"
)

// Credentials of files hold for connections that begin once the files have changed and settled; files that cannot be used
// are reported once, and the content that was read before stays in use.
func TestCredentialsFollowTheirFiles(t *testing.T) {
	var log bytes.Buffer
	directory := t.TempDir()
	from := CredentialFiles{
		CA: filepath.Join(directory, "ca.pem"), Cert: filepath.Join(directory, "cert.pem"), Key: filepath.Join(directory, "key.pem"),
		ServerName: "store.example",
	}
	server := newCertificate("store.example")
	writePEM(t, from.CA, filepath.Join(directory, "unused.pem"), server)
	first, second := newCertificate("first"), newCertificate("second")
	writePEM(t, from.Cert, from.Key, first)
	followed, err := FollowCredentials(from, slog.New(slog.NewTextHandler(&log, nil)))
	check(t, err)

	config := &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
	check(t, err)
	defer func() { _ = listener.Close() }()
	shows := func() string { // twice, so that files settle
		var name string
		for range 2 {
			followed.(*followedCredentials).files.nextCheck.Store(0)
			name = shownBy(t, followed, listener)
		}
		return name
	}
	if name := shows(); name != "first" {
		t.Fatal(name)
	}
	writePEM(t, from.Cert, filepath.Join(directory, "unused.pem"), second) // the key does not fit yet
	for range 2 {
		if name := shows(); name != "first" {
			t.Fatal(name)
		}
	}
	writePEM(t, from.Cert, from.Key, second)
	if name := shows(); name != "second" {
		t.Fatal(name)
	}
	if strings.Count(log.String(), "not read again") != 1 || strings.Count(log.String(), "read again") != 2 {
		t.Fatal(&log)
	}
}

// shownBy returns the name in the certificate that a connection with these credentials shows.
func shownBy(t *testing.T, credentials credentials.TransportCredentials, listener net.Listener) string {
	t.Helper()
	names := make(chan string, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			names <- err.Error()
			return
		}
		defer func() { _ = conn.Close() }()
		if err := conn.(*tls.Conn).Handshake(); err != nil {
			names <- err.Error()
			return
		}
		names <- conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Subject.CommonName
	}()
	raw, err := net.Dial("tcp", listener.Addr().String())
	check(t, err)
	conn, _, err := credentials.ClientHandshake(t.Context(), "store.example", raw)
	check(t, err)
	defer func() { _ = conn.Close() }()
	return <-names
}

// Calls of Dial go over them, also where the store's certificate has another name than the target.
func TestCredentialsOfDial(t *testing.T) {
	certificate := newCertificate("store.example")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	writePEM(t, ca, filepath.Join(t.TempDir(), "unused.pem"), certificate)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&certificate)))
	defer server.Stop()
	go func() { _ = server.Serve(listener) }()
	for name, want := range map[string]codes.Code{"store.example": codes.Unimplemented, "other.example": codes.Unavailable} {
		followed, err := FollowCredentials(CredentialFiles{CA: ca, ServerName: name}, quiet)
		check(t, err)
		conn, err := Dial(listener.Addr().String(), grpc.WithTransportCredentials(followed))
		check(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		_, err = pb.NewSessionStoreServiceClient(conn).Get(ctx, &pb.GetRequest{})
		cancel()
		check(t, conn.Close())
		if status.Code(err) != want {
			t.Fatal(name, err)
		}
	}
}

// Credentials that cannot be used are refused.
func TestUnusableCredentials(t *testing.T) {
	directory := t.TempDir()
	cert, key, text := filepath.Join(directory, "cert.pem"), filepath.Join(directory, "key.pem"), filepath.Join(directory, "text")
	writePEM(t, cert, key, newCertificate("first"))
	check(t, os.WriteFile(text, []byte("nothing"), 0o600))
	for name, from := range map[string]CredentialFiles{
		"no such file":   {CA: filepath.Join(directory, "none")},
		"no authorities": {CA: text},
		"no key":         {Cert: cert},
		"no certificate": {Cert: text, Key: key},
	} {
		if _, err := FollowCredentials(from, quiet); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := FollowCredentials(CredentialFiles{}, quiet); err != nil {
		t.Error(err)
	}
}
