"""Parser of the URL of a Redis or Valkey (option `--storage`). Reads no file, opens nothing, needs no driver."""

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
"""By scheme: the topology, and whether to use TLS."""

_PORT, _SENTINEL_PORT, _LAST_PORT = 6379, 26_379, 65_535
_LONGEST_TIMEOUT_MS = 60_000
_ESCAPE = "in user and password, write @ as %40, / as %2F, : as %3A, ? as %3F and # as %23"
_is_prefix = re.compile(r"[!-z|~]{1,64}").fullmatch  # printable, without braces, which choose the slot in a cluster
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/\s]+))(?::(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True)
class RedisUrl:
    """The address of a Redis, and the options for its use.

    Attributes:
        topology: One server (or a name that follows the primary), nodes of a cluster, or Sentinels.
        tls: Whether to use TLS.
        hosts: Hosts and ports; some of a cluster or of the Sentinels are enough.
        database: The number of the database.
        sentinel_name: The name of the primary in the Sentinels.
        user: None for the default user.
        password: None if there is none, or it is in a file.
        password_file: Read for every connection.
        sentinel_user: The user for the Sentinels.
        sentinel_password_file: The file of the password for the Sentinels.
        ca: A file of trusted certificates, instead of the system's.
        cert: The client's certificate.
        key: The private key of `cert`.
        prefix: The beginning of every key.
        timeout: Maximum time, in seconds, for a connection and for an answer.
        wait_replicas: The number of replicas that must acknowledge a tombstone before Take and Remove return.
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
        """Parse a URL; raise ValueError, with the remedy and without the password, if it is invalid."""
        parts = urlsplit(url)
        topology, tls = SCHEMES[parts.scheme]
        credentials, _, hosts = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        default_port = _SENTINEL_PORT if topology == "sentinel" else _PORT
        if parts.fragment or "@" in parts.path:
            raise ValueError(f"the URL has a # or an @ that is not escaped; {_ESCAPE}")
        options = _options(parts.query, tls=tls, topology=topology)
        if password and options.get("password_file"):
            raise ValueError("set the password in the URL or in password_file, not in both")
        path = unquote(parts.path).strip("/").split("/") if parts.path.strip("/") else []
        name = path.pop(0) if topology == "sentinel" and path else ""
        if topology == "sentinel" and not name:
            raise ValueError(
                "the name of the primary in the Sentinels is missing, as in redis+sentinel://one:26379,two:26379/mymaster"
            )
        if topology == "cluster" and path:
            raise ValueError("a cluster has only one database; leave the path of the URL empty")
        if len(path) > 1 or not all(re.fullmatch(r"\d{1,5}", part, re.ASCII) for part in path):
            raise ValueError("the path of the URL must be the number of the database, as in redis://store:6379/1")
        if topology == "server" and "," in hosts:
            raise ValueError("redis:// accepts one host; for more, use redis+cluster:// or redis+sentinel://")
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
    """Parse the query of the URL."""
    allowed = ["password_file", "prefix", "timeout_ms", "wait_replicas"]
    allowed += ["ca", "cert", "key"] if tls else []
    allowed += ["sentinel_user", "sentinel_password_file"] if topology == "sentinel" else []
    options: dict[str, object] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in allowed or name in options:
            twice = f"{name} is set twice" if name in options else f"{name!r} is not an option of this URL"
            raise ValueError(f"{twice}; the options are {', '.join(allowed)}")
        if name == "timeout_ms":
            options["timeout"] = _parse_int(name, text, 1, _LONGEST_TIMEOUT_MS) / 1000
        elif name == "wait_replicas":
            options[name] = _parse_int(name, text, 0, 16)
        elif name == "prefix":
            if not _is_prefix(text):
                raise ValueError("prefix must be 1 to 64 printable characters without spaces and braces")
            options[name] = text
        elif not text:
            raise ValueError(f"{name} must not be empty")
        else:
            options[name] = text if name == "sentinel_user" else Path(text)
    if bool(options.get("cert")) != bool(options.get("key")):
        raise ValueError("set both cert and key, or neither")
    return options


def _parse_int(name: str, text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII) or not low <= int(text) <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}")
    return int(text)
