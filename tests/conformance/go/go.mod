module github.com/resumed/resumed/tests/conformance/go

go 1.25.7

replace github.com/resumed/resumed/client/go => ../../../client/go

require (
	github.com/resumed/resumed/client/go v0.0.0
	google.golang.org/grpc v1.82.1
)

require (
	github.com/tink-crypto/tink-go/v2 v2.7.0 // indirect
	golang.org/x/net v0.53.0 // indirect
	golang.org/x/sync v0.20.0 // indirect
	golang.org/x/sys v0.43.0 // indirect
	golang.org/x/text v0.36.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260414002931-afd174a4e478 // indirect
	google.golang.org/protobuf v1.36.11 // indirect
)
