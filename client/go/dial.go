package resumed

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
)

// Get and Put are retried by gRPC. After an unknown outcome a second Take would miss, and the goroutines that make Batches repeat
// them.
const serviceConfig = `{
	"loadBalancingConfig": [{"round_robin": {}}],
	"methodConfig": [{
		"name": [
			{"service": "resumed.v1.SessionStoreService", "method": "Get"},
			{"service": "resumed.v1.SessionStoreService", "method": "Put"}
		],
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
		// The connection is back within a second or two after an outage.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
		// Detects a server that vanished (a node that lost power) without traffic to it.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 5 * time.Second}),
		// The server is part of the fleet; proxies are for the internet.
		grpc.WithNoProxy(),
		// Keeps the connection of an idle frontend, so that its next look-up is fast.
		grpc.WithIdleTimeout(0),
	}
	conn, err := grpc.NewClient(target, append(defaults, options...)...)
	if err != nil {
		return nil, err
	}
	conn.Connect()
	return conn, nil
}
