package resumed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
)

// CredentialFiles are the PEM files of [FollowCredentials].
type CredentialFiles struct {
	// CA has certificates of the authorities that the store's certificate must come from; those of the system if empty.
	CA string
	// Cert has the frontend's own certificate with its chain, and Key its private key; both empty if it has none.
	Cert, Key string
	// ServerName is the name that the store's certificate must have; the host of the target if empty.
	ServerName string
}

// FollowCredentials returns credentials for [Dial] (with [grpc.WithTransportCredentials]) of files that are read again when they
// have changed and settled for a second. A change holds for connections that begin after it; those that are
// open go on. Files that cannot be used (such as a key that does not fit its certificate, in the middle of a rotation) are
// reported to logger (nil means slog.Default()), and the content that was read before stays in use.
//
// It fails when a file cannot be read, or has no certificate or key.
func FollowCredentials(from CredentialFiles, logger *slog.Logger) (credentials.TransportCredentials, error) {
	if (from.Cert == "") != (from.Key == "") {
		return nil, errors.New("resumed: Cert and Key go together: give both, or neither")
	}
	var paths []string
	for _, path := range []string{from.CA, from.Cert, from.Key} {
		if path != "" {
			paths = append(paths, path)
		}
	}
	followed := &followedCredentials{from: from, files: newFiles("credentials of the store", logger, paths...)}
	if _, err := followed.read(); err != nil {
		return nil, err
	}
	return followed, nil
}

type followedCredentials struct {
	from   CredentialFiles
	files  *files
	latest atomic.Pointer[credentials.TransportCredentials]
}

func (c *followedCredentials) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	c.files.follow(c.read)
	return (*c.latest.Load()).ClientHandshake(ctx, authority, conn)
}

func (*followedCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("resumed: these are credentials of a client")
}

func (c *followedCredentials) Info() credentials.ProtocolInfo { return (*c.latest.Load()).Info() }

// Clone returns the same credentials: nothing of them can be set.
func (c *followedCredentials) Clone() credentials.TransportCredentials { return c }

func (*followedCredentials) OverrideServerName(string) error {
	return errors.New("resumed: the server name is set in CredentialFiles")
}

func (c *followedCredentials) read() (slog.Attr, error) {
	config := &tls.Config{ServerName: c.from.ServerName, MinVersion: tls.VersionTLS12}
	if c.from.CA != "" {
		text, err := os.ReadFile(c.from.CA)
		if err != nil {
			return slog.Attr{}, fmt.Errorf("resumed: credentials of the store: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return slog.Attr{}, fmt.Errorf("resumed: credentials of the store: %s has no certificates of authorities", c.from.CA)
		}
	}
	if c.from.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.from.Cert, c.from.Key)
		if err != nil {
			return slog.Attr{}, fmt.Errorf("resumed: credentials of the store: %s and %s: %w", c.from.Cert, c.from.Key, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	latest := credentials.NewTLS(config)
	c.latest.Store(&latest)
	return slog.Attr{}, nil
}
