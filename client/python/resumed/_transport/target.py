"""Where a store is: the names that gRPC gives to servers, and the socket addresses behind them.

https://github.com/grpc/grpc/blob/master/doc/naming.md
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import TypeAlias

SocketAddress: TypeAlias = "tuple[int, str | tuple[str, int]]"
"""A family of socket, and what connect() takes."""

_USE = "use host:port, dns:///host:port or unix:/path"
_HOST_AND_PORT = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/\s,]+)):(\d{1,5})", re.ASCII)
_LAST_PORT = 65_535


@dataclass(frozen=True)
class Target:
    """A store by its name.

    Attributes:
        authority: Its name in requests.
        host: What its certificate must be for.
        hosts: Hosts and ports; the addresses of all are the store's.
        path: The path of its unix socket instead; in the abstract namespace it begins with NUL.
    """

    authority: str
    host: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `host:port`, `dns:///host:port`, `ipv4:` or `ipv6:` and addresses, `unix:path` or `unix-abstract:name`.

        Raises:
            ValueError: It is none of these; the message says what to do.
        """
        scheme, colon, rest = text.partition(":")
        if "\0" in text:
            raise ValueError(f"target {text!r}: {_USE}")
        if scheme == "unix" and rest:
            path = "/" + rest.lstrip("/") if rest.startswith("/") else rest
            return cls("localhost", "localhost", path=path)
        if scheme == "unix-abstract" and rest:
            return cls("localhost", "localhost", path="\0" + rest)
        if colon and rest.startswith("//"):
            if scheme != "dns" or not rest.startswith("///"):
                raise ValueError(f"target {text!r}: {_USE}")
            names = [rest[3:]]
        elif scheme in {"ipv4", "ipv6"}:
            names = rest.split(",")
        else:
            names = [rest if scheme == "dns" and rest.count(":") else text]
        hosts = tuple(_host(name, text) for name in names)
        return cls(names[0], hosts[0][0], hosts)

    @property
    def literal(self) -> bool:
        """Whether it needs no name to be looked up."""
        return bool(self.path) or all(map(_is_address, (host for host, _ in self.hosts)))

    @property
    def attributes(self) -> dict[str, str | int]:
        """The attributes that a span has of a server by this name."""
        if not self.hosts:
            return {"server.address": self.path.replace("\0", "@")}
        host, port = self.hosts[0]
        return {"server.address": host, "server.port": port}

    def resolve(self) -> list[SocketAddress]:
        """Return the addresses; may take as long as the system's resolver does unless it is literal.

        Raises:
            OSError: A name does not resolve.
        """
        if self.path:
            return [(socket.AF_UNIX, self.path)]
        found: dict[SocketAddress, None] = {}
        for host, port in self.hosts:
            for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                found[family, where] = None  # type: ignore[index] # as its stubs have it, it may be something else
        return list(found)


def _host(name: str, text: str) -> tuple[str, int]:
    match = _HOST_AND_PORT.fullmatch(name)
    if match is None or not 0 < int(match[3]) <= _LAST_PORT or not name.isprintable():
        raise ValueError(f"target {text!r}: {_USE}")
    host = match[1] or match[2]
    try:
        host.encode("idna")  # as the resolver encodes it
    except UnicodeError:
        raise ValueError(f"target {text!r}: {host!r} is no host name (RFC 1035, RFC 3490)") from None
    return host, int(match[3])


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
