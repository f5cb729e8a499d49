"""Ports for servers that need one before they listen, and ports where no server listens."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port of 127.0.0.1 where nothing listens at present."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
