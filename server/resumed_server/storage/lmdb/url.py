"""The URL of an LMDB database. Opens nothing, needs no driver."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

PRIVATE = "lmdb:"
"""The URL of a database in a temporary directory of the process that opens it."""


def parse_url(url: str) -> Path | None:
    """Return the directory that a URL names, None for a private temporary one.

    Raises:
        ValueError: The URL names no directory; the message says what to do.
    """
    path = url.partition(":")[2]
    if not path:
        return None
    if not path.startswith("///") or not path.strip("/") or "\0" in unquote(path):
        raise ValueError(f"{url!r} names no directory: use lmdb: or lmdb:///path/to/directory, with three slashes")
    return Path(unquote(path[2:]))


def directory_url(directory: str) -> str:
    """Return the URL of the database in a directory, which is an absolute path."""
    return f"lmdb://{quote(directory)}"
