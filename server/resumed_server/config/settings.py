"""The settings of `resumed serve`: the only definition of their names, defaults, units and help texts.

`preflight.verified` parses and validates them before anything opens, so the rest of the server does not check them.
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

from resumed_server.config.types import (
    MAX_INT,
    Address,
    Duration,
    InRange,
    Size,
    choice_parser,
    parse_int,
    redact_password,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST_TTL = 7 * 86_400
"""Seconds; the longest ticket lifetime of RFC 8446 section 4.6.1."""
_MOST_WORKERS = 256
USUAL_AGE = "10m"
"""Default of --max-connection-age."""
_ADDRESSES, _STORAGE, _CALLERS, _LIMITS, _PROCESSES, _LOGS = (
    "Addresses",
    "Storage",
    "Access",
    "Default limits of namespaces",
    "Processes",
    "Logs and traces",
)
"""The panels of `resumed serve --help`."""


def _addresses(texts: list[str]) -> tuple[Address, ...]:
    return tuple(dict.fromkeys(map(Address.parse, texts)))


def _workers(text: str) -> int | None:
    return None if text == "auto" else int(InRange(parse_int, 1, _MOST_WORKERS)(text))


def _cores() -> int:
    """Return the number of cores of this process: its CPU affinity, or the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max", or no such file
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return min(cores, _MOST_WORKERS)


def _setting(panel: str, default: Any, parse: Callable[[Any], Any], metavar: str, help_text: str) -> Any:
    if isinstance(parse, InRange):
        help_text += f" {parse}."
    return dataclasses.field(
        metadata={"panel": panel, "default": default, "parse": parse, "metavar": metavar, "help": help_text}
    )


@dataclass(frozen=True)
class Settings:
    """The settings of the server; preflight.verified() has validated them."""

    listen: tuple[Address, ...] = _setting(
        _ADDRESSES,
        ["127.0.0.1:7400"],
        _addresses,
        "ADDRESS",
        "Address to listen on: host:port (an IPv6 host in brackets) or unix:/path; port 0 selects a free port. Repeat "
        "the option for more addresses (in the environment, separate them by spaces).",
    )
    storage: str = _setting(
        _STORAGE,
        "lmdb:",
        str,
        "URL",
        "Storage of the sessions: lmdb: is a private temporary directory, lmdb:///path survives restarts, "
        "redis://host:port is a Redis or Valkey (also rediss:, redis+cluster: and redis+sentinel:; docs/engines.md).",
    )
    capacity: Size = _setting(
        _STORAGE,
        "1GiB",
        InRange(Size.parse, Size(1 << 20), Size(1 << 44)),
        "SIZE",
        "Capacity of an lmdb: storage. When it is full, the sessions that expire soonest are evicted.",
    )
    max_ttl: Duration = _setting(
        _STORAGE,
        "24h",
        InRange(Duration.parse, Duration(1), Duration(_LONGEST_TTL)),
        "DURATION",
        "Maximum lifetime of a session (RFC 8446 section 4.6.1 allows 7 days). Longer ones are reduced to it.",
    )
    transport: str = _setting(
        _PROCESSES,
        "grpcio",
        choice_parser("grpcio", "native"),
        "TRANSPORT",
        "Implementation of gRPC: grpcio, or native, which serves several times as many calls per core, without TLS, "
        "on loopback addresses and unix sockets only (docs/store.md).",
    )
    workers: int = _setting(
        _PROCESSES,
        "auto",
        _workers,
        "N",
        "Processes that share the addresses and the storage, 1 to 256; auto is one per core, or one with a unix "
        "socket.",
    )
    threads: int = _setting(
        _PROCESSES,
        "8",
        InRange(parse_int, 1, 256),
        "N",
        "RPC threads per process. More than 8 do not increase the throughput with LMDB.",
    )
    shutdown_delay: Duration = _setting(
        _PROCESSES,
        "5s",
        InRange(Duration.parse, Duration(0), Duration(3_600)),
        "DURATION",
        "Time after SIGTERM in which calls are served, while health reports NOT_SERVING and clients leave.",
    )
    tls_cert: str = _setting(
        _CALLERS,
        "",
        str,
        "FILE",
        "Certificate of the server and its chain (PEM): use TLS 1.2 or 1.3 on every --listen address. This file and "
        "the next three are reloaded when they change.",
    )
    tls_key: str = _setting(
        _CALLERS,
        "",
        str,
        "FILE",
        "Private key of the certificate (PEM, not encrypted): EC, or RSA with at least 2,048 bits.",
    )
    client_ca: str = _setting(
        _CALLERS,
        "",
        str,
        "FILE",
        "Authorities (PEM) of client certificates; a client without a certificate of theirs is rejected. Without this "
        "setting TLS only encrypts, and every client that can reach the address may call.",
    )
    grants: str = _setting(
        _CALLERS,
        "",
        str,
        "FILE",
        "Permissions of identities by namespace and operation (TOML, docs/store.md); requires --client-ca. Without it "
        "every accepted client may call everything.",
    )
    namespace_ops_per_second: int = _setting(
        _LIMITS,
        "0",
        InRange(parse_int, 0, MAX_INT),
        "N",
        "Maximum operations per second of a namespace without a limit in the grants; each operation of a Batch counts, "
        "0 = unlimited. Further ones are rejected (docs/limits.md).",
    )
    namespace_sessions: int = _setting(
        _LIMITS,
        "0",
        InRange(parse_int, 0, MAX_INT),
        "N",
        "Maximum sessions and tombstones of such a namespace; 0 = unlimited. Further ones are rejected.",
    )
    namespace_bytes: Size = _setting(
        _LIMITS,
        "0B",
        InRange(Size.parse, Size(0), Size(1 << 44)),
        "SIZE",
        "Maximum size of the values of such a namespace, plus 256 bytes for each session and tombstone; 0B = "
        "unlimited.",
    )
    namespace_watchers: int = _setting(
        _LIMITS,
        "0",
        InRange(parse_int, 0, MAX_INT),
        "N",
        "Maximum Watch streams per namespace and process; 0 = only a fair share of a process's 256 streams.",
    )
    max_connections: int = _setting(
        _ADDRESSES,
        "10000",
        InRange(parse_int, 1, 1_000_000),
        "N",
        "Maximum connections per process; further ones are rejected. One client address may use all of them; limit the "
        "connections of an address with a packet filter (docs/limits.md).",
    )
    max_connection_age: Duration = _setting(
        _ADDRESSES,
        USUAL_AGE,
        InRange(Duration.parse, Duration(1), Duration(86_400)),
        "DURATION",
        "Maximum age of a connection before the server requests a new one. It bounds how long a client stays connected "
        "after its authority was removed from --client-ca, and how long clients take to discover new servers.",
    )
    health_listen: tuple[Address, ...] = _setting(
        _ADDRESSES,
        [],
        _addresses,
        "ADDRESS",
        "Address that serves health only, without TLS, for probes without a client certificate (Kubernetes).",
    )
    metrics_listen: tuple[Address, ...] = _setting(
        _ADDRESSES,
        [],
        _addresses,
        "ADDRESS",
        "Address that serves metrics for Prometheus over plain HTTP: host:port, by convention port 9464. Metrics "
        "contain the names of namespaces, and no secret.",
    )
    insecure: bool = _setting(
        _ADDRESSES,
        False,
        bool,
        "",
        "Listen without --client-ca on addresses that other machines can reach. Every client there can remove sessions "
        "and fill the storage, but cannot read or forge sealed sessions.",
    )
    core_dumps: bool = _setting(
        _PROCESSES,
        False,
        bool,
        "",
        "Enable core dumps and debuggers. A dump contains the server's TLS key and sealed sessions.",
    )
    log_format: str = _setting(
        _LOGS, "json", choice_parser("json", "console"), "FORMAT", "Format of log lines: json or console."
    )
    log_level: str = _setting(
        _LOGS,
        "info",
        choice_parser("debug", "info", "warning", "error"),
        "LEVEL",
        "Minimum level of log lines: debug, info, warning or error.",
    )
    otel: bool = _setting(
        _LOGS,
        False,
        bool,
        "",
        "Create an OpenTelemetry span of each call, and export it over OTLP (gRPC), configured by "
        "OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER and the other variables (docs/operations.md).",
    )

    def as_text(self) -> dict[str, str]:
        """Return the text of every setting by its name, without passwords."""
        values = vars(self) | {"storage": redact_password(self.storage)}
        return {
            name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
        }


def flag(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"


def parse(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Parse each setting, from the user's values and the defaults.

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
