"""TLS to callers, their identity, and their grants."""
