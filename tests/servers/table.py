"""The servers of servers.toml."""

from __future__ import annotations

import re
import shlex
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contexts.client import MYSQL_LOGIN
from contexts.places import Exchange, Kind, next_port

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contexts.places import Site

FILES = Path("/etc/resumed")
"""The directory of certificates and keyrings in the servers' file system."""
VERSIONS = ("1.2", "1.3")

_STARTUP = struct.pack(">i", 196608) + b"user\0postgres\0database\0postgres\0\0"
_QUERY = b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x07example\0\0\x01\0\x01"
_XMPP = (
    "<?xml version='1.0'?><stream:stream to='localhost' version='1.0' xmlns='jabber:client' "
    "xmlns:stream='http://etherx.jabber.org/streams'>"
)
_OPTIONS = b"""OPTIONS sip:test@localhost SIP/2.0\r
Via: SIP/2.0/TLS localhost;branch=z9hG4bK1\r
From: <sip:test@localhost>;tag=1\r
To: <sip:test@localhost>\r
Call-ID: 1\r
CSeq: 1 OPTIONS\r
Content-Length: 0\r
\r
"""
PROTOCOLS = {
    "http": Exchange(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 200 "),
    "http/1.0": Exchange(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", b" 200 "),
    "http-any": Exchange(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1."),
    "greeting": Exchange(b"", b"served"),
    "mqtt": Exchange(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04abcd", b"\x20\x02\x00\x00"),
    "redis": Exchange(b"PING\r\n", b"+PONG"),
    "smtp": Exchange(b"", b"220 "),
    "ftp": Exchange(b"", b"220 "),
    "imap": Exchange(b"", b"* OK"),
    "xmpp": Exchange(_XMPP.encode(), b"stream:features"),
    "sip": Exchange(_OPTIONS, b"SIP/2.0 200 "),
    "irc": Exchange(b"NICK a\r\nUSER a a a :a\r\n", b" 464 "),
    "stun": Exchange(b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(12), b"\x21\x12\xa4\x42"),
    "dns": Exchange(struct.pack(">H", len(_QUERY)) + _QUERY, b"\x12\x34"),
    "postgresql": Exchange(struct.pack(">i", len(_STARTUP) + 4) + _STARTUP, b"R\0\0\0\x08\0\0\0\0", "postgresql"),
    "pgbouncer": Exchange(struct.pack(">i", len(_STARTUP) + 4) + _STARTUP, b"\0\0", "postgresql"),
    "mysql": Exchange(b"\x22\0\0\2" + MYSQL_LOGIN + b"\0\0", b"\0\0\3", "mysql"),
}


@dataclass(frozen=True)
class Server:
    """A [[server]] of servers.toml, which has the meaning of the fields."""

    name: str
    packages: Sequence[str]
    command: str
    ask: str
    files: dict[str, str]
    prepare: str = ""
    unpacked: bool = False
    user: str = "root"
    open: str = ""
    verify: str = ""
    offers: Sequence[str] = VERSIONS
    resumes: Sequence[str] | None = None
    loses: Sequence[str] = ()
    partly: bool = False
    alert: str = "removes"
    settings: str = ""
    how: str = ""
    note: str = ""

    @property
    def shared(self) -> Sequence[str]:
        """The versions of TLS in which a session of one instance resumes at the other one."""
        return self.offers if self.resumes is None else self.resumes

    def kind(self, root: Path, backend: int) -> Kind:
        """Return the server for contexts.places; `backend` is the port of an HTTP server for proxies."""

        def configure(site: Site) -> list[str]:
            (host,) = site.hosts
            (certificate,) = host.profile.certificates
            values = {
                "d": str(site.directory),
                "port": str(site.port),
                "port2": str(next_port()),
                "backend": str(backend),
                "site": f"{site.certificates}/{certificate}.pem",
                "chain": f"{site.certificates}/{certificate}-chain.pem",
                "rsa": f"{site.certificates}/rsa.pem",
                "ca": str(site.ca(host)),
                "env": " ".join(f"{name}={value}" for name, value in site.environment.items()),
            }

            def fill(text: str) -> str:
                return re.sub(r"@(\w+)@", lambda found: values.get(found[1], found[0]), text)

            values["verify"] = fill(self.verify if host.profile.verify else self.open)
            site.files |= {name: fill(text.lstrip("\n")) for name, text in self.files.items()}
            site.prepare = fill(self.prepare)
            return shlex.split(fill(self.command))

        return Kind("", PROTOCOLS[self.ask], configure, root, self.user)


def servers() -> list[Server]:
    """Return all servers, in the order of the file."""
    parsed = tomllib.loads(Path(__file__).with_name("servers.toml").read_text(encoding="utf-8"))
    return [Server(**{"files": {}, **values}) for values in parsed["server"]]
