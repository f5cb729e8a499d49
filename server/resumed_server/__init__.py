"""The store: a gRPC service over a storage engine."""
