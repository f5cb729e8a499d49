"""The URL of a Redis or Valkey: what `--storage` may say of one. Reads no file, opens nothing, needs no driver."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

Topology = Literal["server", "cluster", "sentinel"]

SCHEMES: Mapping[str, tuple[Topology, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
}
"""By scheme: what is there, and whether it speaks TLS."""

_PORT, _SENTINEL_PORT, _LAST_PORT = 6379, 26_379, 65_535
_LONGEST_TIMEOUT_MS = 60_000
_ESCAPE = "in user and password, write @ as %40, / as %2F, : as %3A, ? as %3F and # as %23"
_is_prefix = re.compile(r"[!-z|~]{1,64}").fullmatch  # printable, without braces: in a cluster, these choose the node
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/\s]+))(?::(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True)
class RedisUrl:
    """Where a Redis is, and how to use it.

    Attributes:
        topology: One server (or a name that follows the primary), the nodes of a cluster, or Sentinels.
        tls: Whether to speak TLS.
        hosts: Hosts and ports; of a cluster or of Sentinels, some are enough.
        database: The number of the database.
        sentinel_name: What Sentinels call the primary.
        user: None for the default user.
        password: None if it is in a file, or there is none.
        password_file: Read anew for every connection.
        sentinel_user: The same for the Sentinels themselves.
        sentinel_password_file: The same for the Sentinels themselves.
        ca: A file of certificates to trust instead of the system's.
        cert: The client's certificate.
        key: Its key.
        prefix: What every key begins with.
        timeout: Seconds that Redis may take to connect, and to answer.
        wait_replicas: How many replicas must have a tombstone before Take and Remove are answered.
    """

    topology: Topology
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    database: int = 0
    sentinel_name: str = ""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    sentinel_user: str | None = None
    sentinel_password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    prefix: str = "resumed:"
    timeout: float = 0.04
    wait_replicas: int = 0

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Read a URL; raise ValueError, with what to do and without the password, if it is none."""
        parts = urlsplit(url)
        topology, tls = SCHEMES[parts.scheme]
        credentials, _, hosts = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        default_port = _SENTINEL_PORT if topology == "sentinel" else _PORT
        if parts.fragment or "@" in parts.path:
            raise ValueError(f"something in the URL is cut off; {_ESCAPE}")
        options = _options(parts.query, tls=tls, topology=topology)
        if password and options.get("password_file"):
            raise ValueError("give the password in the URL or in password_file, not in both")
        path = unquote(parts.path).strip("/").split("/") if parts.path.strip("/") else []
        name = path.pop(0) if topology == "sentinel" and path else ""
        if topology == "sentinel" and not name:
            raise ValueError(
                "say what the Sentinels call the primary, as in redis+sentinel://one:26379,two:26379/mymaster"
            )
        if topology == "cluster" and path:
            raise ValueError("a cluster has only one database; leave the path of the URL empty")
        if len(path) > 1 or not all(re.fullmatch(r"\d{1,5}", part, re.ASCII) for part in path):
            raise ValueError("the path of the URL must be the number of the database, as in redis://store:6379/1")
        if topology == "server" and "," in hosts:
            raise ValueError("redis:// takes one host; for more, use redis+cluster:// or redis+sentinel://")
        return cls(
            topology=topology,
            tls=tls,
            hosts=tuple(_host(host, default_port) for host in hosts.split(",")),
            database=int(path[0]) if path else 0,
            sentinel_name=name,
            user=unquote(user) or None,
            password=unquote(password) or None,
            **options,  # type: ignore[arg-type] # checked one by one
        )


def _host(text: str, default_port: int) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if match is None or not 0 < int(match[3] or default_port) <= _LAST_PORT:
        # Not the text itself: it may be a password with an @ or a / in it.
        raise ValueError(f"the URL needs hosts such as store:6379 or [::1]:6379, separated by commas; {_ESCAPE}")
    return match[1] or match[2], int(match[3] or default_port)


def _options(query: str, *, tls: bool, topology: Topology) -> dict[str, object]:
    """Return what stands behind the question mark."""
    allowed = ["password_file", "prefix", "timeout_ms", "wait_replicas"]
    allowed += ["ca", "cert", "key"] if tls else []
    allowed += ["sentinel_user", "sentinel_password_file"] if topology == "sentinel" else []
    options: dict[str, object] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in allowed or name in options:
            twice = f"{name} is there twice" if name in options else f"{name!r} is no option of this URL"
            raise ValueError(f"{twice}; it may have {', '.join(allowed)}")
        if name == "timeout_ms":
            options["timeout"] = _whole(name, text, 1, _LONGEST_TIMEOUT_MS) / 1000
        elif name == "wait_replicas":
            options[name] = _whole(name, text, 0, 16)
        elif name == "prefix":
            if not _is_prefix(text):
                raise ValueError("prefix must be 1 to 64 printable characters without blanks and braces")
            options[name] = text
        elif not text:
            raise ValueError(f"{name} must not be empty")
        else:
            options[name] = text if name == "sentinel_user" else Path(text)
    if bool(options.get("cert")) != bool(options.get("key")):
        raise ValueError("cert and key go together")
    return options


def _whole(name: str, text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or not low <= int(text) <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}")
    return int(text)
