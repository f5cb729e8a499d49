// Visits hosts in turn with crypto/tls, keeping sessions: visits ADDRESS CA CERTIFICATE VERSION COUNT HOST...
//
// Prints a line for every 100 visits, and one "failed: ..." for each visit without an answer of status 200.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	address, version, hosts := os.Args[1], os.Args[4], os.Args[6:]
	count, _ := strconv.Atoi(os.Args[5])
	pem, err := os.ReadFile(os.Args[2])
	if err != nil {
		panic(err)
	}
	certificate, err := tls.LoadX509KeyPair(os.Args[3], os.Args[3])
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	number := uint16(tls.VersionTLS13)
	if version == "1.2" {
		number = tls.VersionTLS12
	}
	config := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{certificate}, MinVersion: number,
		MaxVersion: number, ClientSessionCache: tls.NewLRUClientSessionCache(64)}
	for visited := 1; visited <= count; visited++ {
		host := hosts[visited%len(hosts)]
		if err := visit(address, host, config); err != nil {
			fmt.Printf("failed: %s: %v\n", host, err)
		}
		if visited%100 == 0 {
			fmt.Println(visited)
		}
	}
}

func visit(address, host string, config *tls.Config) error {
	plain, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return err
	}
	defer plain.Close()
	plain.SetDeadline(time.Now().Add(10 * time.Second))
	own := config.Clone()
	own.ServerName = host
	connection := tls.Client(plain, own)
	if _, err = fmt.Fprintf(connection, "GET / HTTP/1.1\r\nHost: %s\r\nUser-Agent: go\r\nConnection: close\r\n\r\n", host); err != nil {
		return err
	}
	status, err := bufio.NewReader(connection).ReadString('\n')
	if err == nil && !strings.Contains(status, " 200 ") {
		err = fmt.Errorf("answer %q", status)
	}
	return err
}
