package resumed

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
)

// Get alone is retried by gRPC: after an unknown outcome a second Take misses, where an error tells the truth, and Batches
// are sent again by the sender.
const serviceConfig = `{
	"loadBalancingConfig": [{"round_robin": {}}],
	"methodConfig": [{
		"name": [{"service": "resumed.v1.SessionStoreService", "method": "Get"}],
		"retryPolicy": {
			"maxAttempts": 3, "initialBackoff": "0.005s", "maxBackoff": "0.02s", "backoffMultiplier": 2,
			"retryableStatusCodes": ["UNAVAILABLE"]
		}
	}]
}`

// Dial returns a connection to the store at target, a gRPC name such as "dns:///store:7400", "127.0.0.1:7400",
// "ipv4:10.0.0.1:7400,10.0.0.2:7400" or "unix:/run/resumed.sock", with the settings that suit it; options come after
// them. One of the options must be [grpc.WithTransportCredentials]. It does not wait for the store: handshakes resume as
// soon as it is there.
//
// Any other [grpc.ClientConnInterface] serves [Wrap] as well.
func Dial(target string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	if err := checkTarget(target); err != nil {
		return nil, err
	}
	defaults := []grpc.DialOption{
		grpc.WithDefaultServiceConfig(serviceConfig),
		listed,
		// A store that comes back is found again within a second or two.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
		// A store that vanished without a word (a node that lost power) is noticed without traffic to it.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 5 * time.Second}),
		// The store is part of the fleet; proxies are for the world outside.
		grpc.WithNoProxy(),
		// A frontend that had no traffic for a while resumes its next client as fast as any other.
		grpc.WithIdleTimeout(0),
	}
	conn, err := grpc.NewClient(target, append(defaults, options...)...)
	if err != nil {
		return nil, err
	}
	conn.Connect()
	return conn, nil
}
