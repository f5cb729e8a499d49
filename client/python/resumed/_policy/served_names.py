"""Which context serves a name: learned from full handshakes, for contexts that are chosen by a servername callback.

OpenSSL looks a session up before that callback runs, so a look-up cannot see which context will serve. The table is
of one process and one context that connections begin with.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

MOST_NAMES = 4096
"""How many names are remembered. Peers choose names, so there is a bound; a forgotten name is learned again."""


class Expected(NamedTuple):
    """The context that a connection is expected to be served by."""

    fingerprint: bytes | None
    """Its fingerprint; None where that is not known, and nothing can resume."""
    reason: str = ""
    """The reason of the miss, if the fingerprint is not known."""


class ServedNames:
    """The fingerprints that full handshakes for a name ended with.

    Without a lock: the garbage collector may end a connection, and so run callbacks, at any time. Each step is one
    operation on a dict.
    """

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._fingerprints: dict[bytes, bytes | None] = {}  # None: not to be trusted any more

    def expected(self, name: bytes) -> Expected:
        """Return the fingerprint that the last full handshake for a name ended with."""
        fingerprint = self._fingerprints.get(name, b"")
        if fingerprint is None:
            return Expected(None, "context-unstable")
        return Expected(fingerprint) if fingerprint else Expected(None, "context-unknown")

    def learn(self, name: bytes, fingerprint: bytes) -> None:
        """Note that a full handshake for a name ended with a fingerprint."""
        if self._fingerprints.get(name, b"") is None:
            return
        self._fingerprints.pop(name, None)  # the last one learned is forgotten last
        self._set(name, fingerprint)

    def distrust(self, name: bytes) -> bool:
        """Note that the name alone does not decide; return whether that is news."""
        news = self._fingerprints.get(name, b"") is not None
        self._set(name, None)
        return news

    def _set(self, name: bytes, fingerprint: bytes | None) -> None:
        self._fingerprints[name] = fingerprint
        while len(self._fingerprints) > self._most:
            with suppress(KeyError, RuntimeError):  # another thread was quicker
                del self._fingerprints[next(iter(self._fingerprints))]
