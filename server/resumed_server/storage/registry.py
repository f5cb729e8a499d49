"""The storage engines, by the scheme of their URL.

To add an engine, write its module and an entry of ENGINES; docs/engines.md says what else it needs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from resumed_server.storage.lmdb import url as lmdb_url
from resumed_server.storage.redis.url import SCHEMES, RedisUrl

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.storage.engine import Clock, Engine


class EngineOptions(NamedTuple):
    """How to open an engine; an engine ignores the options that do not concern it.

    Attributes:
        capacity: Bytes that the engine may use.
        threads: How many threads call the engine at the same time.
        clock: The present, in Unix seconds.
        quarantine_after_crash: Whether a crash of this process (SIGSEGV, SIGBUS, SIGABRT) means that the files of the
            engine are damaged, so that the next process begins new ones. For processes that do little else.
    """

    capacity: int
    threads: int
    clock: Clock
    quarantine_after_crash: bool


@dataclass(frozen=True)
class EngineSpec:
    """A kind of storage engine.

    Attributes:
        schemes: The schemes of its URLs.
        usage: The forms of its URLs, for the message about a URL that names no engine.
        verify: Raises ValueError, with what to do, if a URL of these schemes cannot be used. Opens nothing.
        open: Opens the engine that a URL names. Imports the driver, so that no other engine needs it.
        driver: The top-level module of the driver.
        extra: The extra of this distribution that installs the driver, beside `server`; empty if `server` does.
        has_capacity: Whether the option `capacity` bounds the engine.
        private_url: The URL of storage that only the process which opens it can reach, if there is such a URL.
        directory_url: Returns the URL of the storage in a directory that several processes share. Only with
            `private_url`, whose place it takes where a server has several workers.
    """

    schemes: frozenset[str]
    usage: str
    verify: Callable[[str], object]
    open: Callable[[str, EngineOptions], Engine]
    driver: str
    extra: str = ""
    has_capacity: bool = False
    private_url: str | None = None
    directory_url: Callable[[str], str] | None = None


def _open_lmdb(url: str, options: EngineOptions) -> Engine:
    from resumed_server.storage.lmdb.engine import LmdbEngine  # noqa: PLC0415 - loads the driver

    return LmdbEngine(
        lmdb_url.parse_url(url),
        capacity=options.capacity,
        clock=options.clock,
        quarantine_after_crash=options.quarantine_after_crash,
    )


def _open_redis(url: str, options: EngineOptions) -> Engine:
    from resumed_server.storage.redis.engine import RedisEngine  # noqa: PLC0415 - loads the driver

    return RedisEngine(RedisUrl.parse(url), threads=options.threads)


ENGINES = [
    EngineSpec(
        schemes=frozenset({"lmdb"}),
        usage="lmdb: or lmdb:///path/to/directory",
        verify=lmdb_url.parse_url,
        open=_open_lmdb,
        driver="lmdb",
        has_capacity=True,
        private_url=lmdb_url.PRIVATE,
        directory_url=lmdb_url.directory_url,
    ),
    EngineSpec(
        schemes=frozenset(SCHEMES),
        usage=f"redis://host:port ({', '.join(f'{scheme}:' for scheme in SCHEMES)})",
        verify=RedisUrl.parse,
        open=_open_redis,
        driver="redis",
        extra="redis",
    ),
]


def find_engine(url: str) -> EngineSpec:
    """Return the engine that `url` names; raise ValueError, with what to do, if there is none."""
    scheme, colon, _ = url.partition(":")
    for spec in ENGINES:
        if colon and scheme in spec.schemes:
            return spec
    raise ValueError(f"unknown storage engine {scheme!r}: use {', or '.join(spec.usage for spec in ENGINES)}")


def verify_url(url: str) -> None:
    """Raise ValueError, with what to do, if `url` names no engine. Opens nothing."""
    find_engine(url).verify(url)


def shared_url(url: str, make_directory: Callable[[], str]) -> str:
    """Return a URL by which several processes reach one storage: `url`, or a new directory's if `url` is private."""
    spec = find_engine(url)
    return spec.directory_url(make_directory()) if spec.directory_url and url == spec.private_url else url


def extras_for(module: str) -> list[str]:
    """Return the extras of this distribution that install a missing module of the server."""
    return ["server", *(spec.extra for spec in ENGINES if spec.driver == module and spec.extra)]


def open_engine(
    url: str, *, capacity: int, threads: int = 8, clock: Clock = time.time, quarantine_after_crash: bool = False
) -> Engine:
    """Open the engine that `url` names (see docs/engines.md), with EngineOptions.

    Raises:
        ValueError: The URL names no engine; the message says what to do.
        EngineUnavailable: The storage cannot be used; the message says why and what to do.
    """
    return find_engine(url).open(url, EngineOptions(capacity, threads, clock, quarantine_after_crash))
