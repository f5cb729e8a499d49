"""Storage engines, by their URL."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from resumed_server.engines.base import Clock, Engine

_USE = "use lmdb: or lmdb:///path/to/directory"


def verify_url(url: str) -> None:
    """Raise ValueError, with what to do, if `url` names no engine. Opens nothing."""
    _path(url)


def open_engine(url: str, *, capacity: int, clock: Clock = time.time) -> Engine:
    """Open the engine that `url` names.

    Args:
        url: `lmdb:` for a private database that goes with the process, `lmdb:///path/to/directory` for one that stays.
        capacity: Bytes that the embedded engine may use.
        clock: The present, in Unix seconds.

    Raises:
        ValueError: The URL names no engine; the message says what to do.
        EngineUnavailable: The storage cannot be used; the message says why.
    """
    path = _path(url)
    # A driver is loaded when its engine is used.
    from resumed_server.engines.embedded import EmbeddedEngine  # noqa: PLC0415

    return EmbeddedEngine(path, capacity=capacity, clock=clock)


def _path(url: str) -> Path | None:
    scheme, colon, path = url.partition(":")
    if scheme != "lmdb" or not colon:
        raise ValueError(f"no engine is called {scheme!r}: {_USE}")
    if not path:
        return None
    if not path.startswith("///") or not path.strip("/") or "\0" in unquote(path):
        raise ValueError(f"{url!r} names no directory: {_USE}, with three slashes")
    return Path(unquote(path[2:]))
