package resumed

import (
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
)

// Targets such as "ipv4:10.0.0.1:7400,10.0.0.2:7400", for the servers of a store that has no name: gRPC has them in the other
// languages, but not in Go.
var listed = grpc.WithResolvers(list("ipv4"), list("ipv6"))

type list string

func (l list) Scheme() string { return string(l) }

func (list) OverrideAuthority(target resolver.Target) string {
	first, _, _ := strings.Cut(target.Endpoint(), ",")
	return first
}

func (l list) Build(target resolver.Target, conn resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	endpoints, err := l.endpoints(target.Endpoint())
	if err != nil {
		return nil, err
	}
	return l, conn.UpdateState(resolver.State{Endpoints: endpoints})
}

func (l list) endpoints(text string) (endpoints []resolver.Endpoint, err error) {
	for text := range strings.SplitSeq(text, ",") {
		address, err := netip.ParseAddrPort(text)
		if err != nil || address.Port() == 0 || address.Addr().Is4() != (l == "ipv4") {
			return nil, fmt.Errorf("resumed: target %s:...: %q is no such address with a port", l, text)
		}
		endpoints = append(endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: text}}})
	}
	return endpoints, nil
}

func (list) ResolveNow(resolver.ResolveNowOptions) {}
func (list) Close()                                {}

// checkTarget returns an error for a malformed list, which gRPC would report only at the first call.
func checkTarget(target string) error {
	switch scheme, text, _ := strings.Cut(target, ":"); scheme {
	case "ipv4", "ipv6":
		_, err := list(scheme).endpoints(text)
		return err
	default:
		return nil
	}
}
