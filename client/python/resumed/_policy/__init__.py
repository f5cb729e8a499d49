"""Decisions at each session callback, independent of TLS and ctypes: look-ups, writes, circuit breaker, mirror."""
