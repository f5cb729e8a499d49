"""The settings of `resumed serve`: name, default, unit, environment variable and help of each stand here, only here.

`preflight.verified` reads all and checks them as a whole before anything opens, so the rest of the server trusts them.
"""

# ruff: noqa: RUF009 - `_setting` is `field`
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumed_server.config.types import LARGEST, Address, Between, Duration, Size, one_of, redacted, whole

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST_TTL = 7 * 86_400
"""Seconds; RFC 8446 section 4.6.1 allows no ticket to live longer."""
_MOST_WORKERS = 256
USUAL_AGE = "10m"
"""How long connections are kept unless the user says otherwise."""
_ADDRESSES, _STORAGE, _CALLERS, _LIMITS, _PROCESSES, _LOGS = (
    "Addresses",
    "Storage",
    "Access",
    "Limits of namespaces that the grants have none for",
    "Processes",
    "Logs and traces",
)
"""The panels of `resumed serve --help`."""


def _addresses(texts: list[str]) -> tuple[Address, ...]:
    return tuple(dict.fromkeys(map(Address.parse, texts)))


def _workers(text: str) -> int | None:
    return None if text == "auto" else int(Between(whole, 1, _MOST_WORKERS)(text))


def _cores() -> int:
    """Return how many cores this process may keep busy: those it is bound to, or what its container is granted."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max", or no such file
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return min(cores, _MOST_WORKERS)


def _setting(panel: str, default: Any, parse: Callable[[Any], Any], metavar: str, help_text: str) -> Any:
    if isinstance(parse, Between):
        help_text += f" {parse}."
    return dataclasses.field(
        metadata={"panel": panel, "default": default, "parse": parse, "metavar": metavar, "help": help_text}
    )


@dataclass(frozen=True)
class Settings:
    """What the server is told. `preflight.verified` makes them, so that nothing else checks them."""

    listen: tuple[Address, ...] = _setting(
        _ADDRESSES,
        ["127.0.0.1:7400"],
        _addresses,
        "ADDRESS",
        "Where to listen: host:port (an IPv6 host in brackets) or unix:/path; port 0 takes a free one. Repeat it "
        "for more (in the environment: separated by blanks).",
    )
    storage: str = _setting(
        _STORAGE,
        "lmdb:",
        str,
        "URL",
        "Where sessions are kept: lmdb: in a private temporary directory, lmdb:///path over restarts, "
        "redis://host:port in a Redis or Valkey (also rediss:, redis+cluster: and redis+sentinel:; docs/engines.md).",
    )
    capacity: Size = _setting(
        _STORAGE,
        "1GiB",
        Between(Size.parse, Size(1 << 20), Size(1 << 44)),
        "SIZE",
        "How much an lmdb: store may hold; when it is full, the soonest to expire go first.",
    )
    max_ttl: Duration = _setting(
        _STORAGE,
        "24h",
        Between(Duration.parse, Duration(1), Duration(_LONGEST_TTL)),
        "DURATION",
        "The longest that a session lives (RFC 8446 section 4.6.1 allows a week); longer requests are lowered to it.",
    )
    transport: str = _setting(
        _PROCESSES,
        "grpcio",
        one_of("grpcio", "native"),
        "TRANSPORT",
        "What speaks gRPC: grpcio, or native, which answers several times as many calls a core, without TLS, on "
        "loopback addresses and unix sockets only (docs/store.md).",
    )
    workers: int = _setting(
        _PROCESSES,
        "auto",
        _workers,
        "N",
        "Processes that share the addresses and the store, 1 to 256; auto is one a core, or one alone on a unix "
        "socket.",
    )
    threads: int = _setting(
        _PROCESSES,
        "8",
        Between(whole, 1, 256),
        "N",
        "Threads a process that answer calls; more than the default answer no faster from an embedded store.",
    )
    shutdown_delay: Duration = _setting(
        _PROCESSES,
        "5s",
        Between(Duration.parse, Duration(0), Duration(3_600)),
        "DURATION",
        "How long to go on serving after SIGTERM while health says NOT_SERVING, so that callers move away first.",
    )
    tls_cert: str = _setting(
        _CALLERS,
        "",
        str,
        "FILE",
        "Certificate of the server and its chain (PEM): speak TLS 1.2 or 1.3 on every --listen address. This file and "
        "the next three are read again when they change.",
    )
    tls_key: str = _setting(
        _CALLERS, "", str, "FILE", "Private key of the certificate (PEM, not encrypted): EC, or RSA of 2,048 bits up."
    )
    client_ca: str = _setting(
        _CALLERS,
        "",
        str,
        "FILE",
        "Authorities (PEM) whose client certificates are accepted; nobody gets in without one. Without this setting "
        "TLS hides the traffic, and whoever reaches the address may call.",
    )
    grants: str = _setting(
        _CALLERS,
        "",
        str,
        "FILE",
        "Which identities may do what in which namespaces (TOML, docs/store.md); needs --client-ca. Without it every "
        "client that gets in may do everything.",
    )
    namespace_ops_per_second: int = _setting(
        _LIMITS,
        "0",
        Between(whole, 0, LARGEST),
        "N",
        "Operations a second in a namespace for which the grants have no limit; a Batch counts each of its own, and 0 "
        "is as many as come. More are refused (docs/limits.md).",
    )
    namespace_sessions: int = _setting(
        _LIMITS,
        "0",
        Between(whole, 0, LARGEST),
        "N",
        "Sessions and tombstones in such a namespace; more are refused, and 0 is as many as the store holds.",
    )
    namespace_bytes: Size = _setting(
        _LIMITS,
        "0B",
        Between(Size.parse, Size(0), Size(1 << 44)),
        "SIZE",
        "What the values in such a namespace may take, with 256 bytes for each session and tombstone; 0B is as much as "
        "the store holds.",
    )
    namespace_watchers: int = _setting(
        _LIMITS,
        "0",
        Between(whole, 0, LARGEST),
        "N",
        "Watch streams of such a namespace in each process; 0 is as many as its share of all 256.",
    )
    max_connections: int = _setting(
        _ADDRESSES,
        "10000",
        Between(whole, 1, 1_000_000),
        "N",
        "Connections that each process may have; more are refused. One address may have them all: a packet filter "
        "limits the connections of an address (docs/limits.md).",
    )
    max_connection_age: Duration = _setting(
        _ADDRESSES,
        USUAL_AGE,
        Between(Duration.parse, Duration(1), Duration(86_400)),
        "DURATION",
        "How long a connection is kept before its client is asked to connect anew: how long those stay who got in with "
        "what --client-ca no longer accepts, and how long clients take to find new servers.",
    )
    health_listen: tuple[Address, ...] = _setting(
        _ADDRESSES,
        [],
        _addresses,
        "ADDRESS",
        "Where to serve health alone, without TLS, for probes that have no client certificate (Kubernetes).",
    )
    metrics_listen: tuple[Address, ...] = _setting(
        _ADDRESSES,
        [],
        _addresses,
        "ADDRESS",
        "Where to serve metrics for Prometheus, over plain HTTP: host:port, by custom port 9464. They show the names "
        "of namespaces, and no secret.",
    )
    insecure: bool = _setting(
        _ADDRESSES,
        False,
        bool,
        "",
        "Listen without --client-ca on addresses that other machines reach. Whoever reaches them can remove sessions "
        "and fill the store, though not read or forge any that is sealed.",
    )
    core_dumps: bool = _setting(
        _PROCESSES,
        False,
        bool,
        "",
        "Let crashes leave core dumps, and debuggers attach. The server's TLS key and sealed sessions are in a dump.",
    )
    log_format: str = _setting(
        _LOGS, "json", one_of("json", "console"), "FORMAT", "How log lines look: json or console."
    )
    log_level: str = _setting(
        _LOGS,
        "info",
        one_of("debug", "info", "warning", "error"),
        "LEVEL",
        "The least that is logged: debug, info, warning or error.",
    )
    otel: bool = _setting(
        _LOGS,
        False,
        bool,
        "",
        "Make a span of each call for OpenTelemetry, and export it over OTLP (gRPC), as OTEL_EXPORTER_OTLP_ENDPOINT, "
        "OTEL_TRACES_SAMPLER and its other environment variables say (docs/operations.md).",
    )

    def shown(self) -> dict[str, str]:
        """Return every setting by its name, as a user would write it."""
        texts = {setting.name: str(getattr(self, setting.name)) for setting in dataclasses.fields(self)}
        return texts | {
            "listen": " ".join(map(str, self.listen)),
            "health_listen": " ".join(map(str, self.health_listen)),
            "metrics_listen": " ".join(map(str, self.metrics_listen)),
            "storage": redacted(self.storage),
        }


def flag(name: str) -> str:
    """Return the option that a setting is given by."""
    return f"--{name.replace('_', '-')}"


def parse(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Read each setting by itself, from the values that the user gave and defaults.

    Returns:
        The values by the names of the settings, without those that cannot be read, and a line for each problem.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in dataclasses.fields(Settings):
        try:
            values[setting.name] = setting.metadata["parse"](given.get(setting.name, setting.metadata["default"]))
        except ValueError as problem:
            problems.append(f"{flag(setting.name)}: {problem}")
    if values.get("workers", 0) is None:
        addresses = (*values.get("listen", ()), *values.get("health_listen", ()))
        values["workers"] = 1 if any(address.path for address in addresses) else _cores()
    return values, problems
