"""Calls to the store: HTTP/2 over TCP, TLS or a unix socket, and the pool of connections."""
