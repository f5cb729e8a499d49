"""Keeps the connections of one address from taking the places of all others.

gRPC refuses connections beyond a number, whoever has the others. So before there are as many, the address that has most
of them loses some. gRPC hands no connection out, but they are this process' sockets: one that is shut down looks to
gRPC as if its peer had closed it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections import defaultdict
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

OTHER_FILES = 256
"""Open files that a process needs beside its connections, at most."""
_CROWDED, _FAIR = 3 / 4, 1 / 2
"""What share of the connections is so many that an address is held to the other share of them."""

_log = structlog.get_logger()


def possible(wanted: int) -> int:
    """Return how many connections this process can have of those that are wanted; raise its limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        _log.warning("fewer connections than --max-connections: raise the limit of open files", files=soft)
    return max(1, min(wanted, soft - OTHER_FILES))


def make_room(most: int, ports: Collection[int]) -> None:
    """Where a process has almost `most` connections to its `ports`, leave no address more than half of that number."""
    if len(os.listdir("/proc/self/fd")) < most * _CROWDED:  # noqa: PTH208 - every second, and only to count
        return
    with contextlib.ExitStack() as held:
        by_address: defaultdict[str, list[socket.socket]] = defaultdict(list)
        for connection in map(held.enter_context, _sockets()):
            with contextlib.suppress(OSError):  # it has just ended
                here, there = connection.getsockname(), connection.getpeername()
                if connection.family in {socket.AF_INET, socket.AF_INET6} and here[1] in ports:
                    by_address[_network(there[0])].append(connection)
        if sum(map(len, by_address.values())) < most * _CROWDED:
            return
        for address, theirs in by_address.items():
            excess = theirs[int(most * _FAIR) :]
            for connection in excess:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            if excess:
                _log.warning("connections closed, to leave some to others", address=address, connections=len(excess))


def _sockets() -> Iterator[socket.socket]:
    """Yield this process' sockets, each with a descriptor of its own, which cannot become another's meanwhile."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - there may be thousands
        with contextlib.suppress(OSError):  # closed meanwhile
            descriptor = os.dup(int(name))
            try:
                found = socket.socket(fileno=descriptor)
            except OSError:  # no socket
                os.close(descriptor)
            else:
                yield found


def _network(address: str) -> str:
    """Return whose an address is: of IPv6, a host has as many as begin alike (RFC 4291 section 2.5.4)."""
    address = address.removeprefix("::ffff:")  # IPv4, on a socket for both
    if ":" not in address:
        return address
    return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address)[:8] + bytes(8))
