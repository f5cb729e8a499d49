"""Storage engines, by their URL."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from resumed_server.storage.redis.url import SCHEMES, RedisUrl

if TYPE_CHECKING:
    from resumed_server.storage.engine import Clock, Engine

_USE = "use lmdb: or lmdb:///path/to/directory"


def verify_url(url: str) -> None:
    """Raise ValueError, with what to do, if `url` names no engine. Opens nothing."""
    _parsed(url)


def open_engine(
    url: str, *, capacity: int, threads: int = 8, clock: Clock = time.time, quarantine_after_crash: bool = False
) -> Engine:
    """Open the engine that `url` names.

    Args:
        url: `lmdb:` for a private database that goes with the process, `lmdb:///path/to/directory` for one that stays,
            `redis://host:port` or one of its relatives (see docs/engines.md) for a Redis or Valkey.
        capacity: Bytes that the embedded engine may use.
        threads: How many will call the engine at the same time.
        clock: The present, in Unix seconds. Redis has a clock of its own.
        quarantine_after_crash: Whether a crash of this process (SIGSEGV, SIGBUS, SIGABRT) means that the embedded engine's file
            is damaged, so that the next process begins a new one. For processes that do little else.

    Raises:
        ValueError: The URL names no engine; the message says what to do.
        EngineUnavailable: The storage cannot be used; the message says why and what to do.
    """
    parsed = _parsed(url)
    # A driver is loaded when its engine is used.
    if isinstance(parsed, RedisUrl):
        from resumed_server.storage.redis.engine import RedisEngine  # noqa: PLC0415

        return RedisEngine(parsed, threads=threads)
    from resumed_server.storage.lmdb.engine import LmdbEngine  # noqa: PLC0415

    return LmdbEngine(parsed, capacity=capacity, clock=clock, quarantine_after_crash=quarantine_after_crash)


def _parsed(url: str) -> RedisUrl | Path | None:
    scheme, colon, path = url.partition(":")
    if scheme in SCHEMES and colon:
        return RedisUrl.parse(url)
    if scheme != "lmdb" or not colon:
        raise ValueError(f"no engine is called {scheme!r}: {_USE}, or redis://host:port or a relative of it")
    if not path:
        return None
    if not path.startswith("///") or not path.strip("/") or "\0" in unquote(path):
        raise ValueError(f"{url!r} names no directory: {_USE}, with three slashes")
    return Path(unquote(path[2:]))
