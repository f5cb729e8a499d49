"""Knows the session ids again that this process issued, and so the sessions that another one negotiated.

A sealed id begins with a nonce of 12 bytes, which are its issuer's own affair. Of ours four are a hash of the other
eight and a key that this process made up and tells nobody. So it needs no memory of what it issued; to everybody
else, those who hold the fleet key included, the nonce is as random as any. One foreign id in four thousand million is
taken for our own.

The hash is Python's own (SipHash), which every look-up in a dictionary keeps in the processor's caches: within a
handshake a keyed BLAKE2 took 25 us, twenty times what it takes in a loop. Nothing is trusted because of it.
"""

from __future__ import annotations

import os

from resumed._process.fork import register_after_fork

_RANDOM_BYTES, _TAG_BYTES = 8, 4
_TAG_MASK = 0xFFFFFFFF


class ProcessTag:
    """Makes nonces, and knows ids again that begin with one of them. A forked child makes others."""

    def __init__(self) -> None:
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._key = os.urandom(16)

    def nonce(self) -> bytes:
        """Return a new nonce of 12 bytes."""
        random = os.urandom(_RANDOM_BYTES)
        return random + self._tag(random)

    def is_own(self, session_id: bytes) -> bool:
        """Return whether an id that the fleet issued, and nobody made up, was issued here."""
        tag = session_id[_RANDOM_BYTES : _RANDOM_BYTES + _TAG_BYTES]
        return tag == self._tag(session_id[:_RANDOM_BYTES])

    def after_fork_in_child(self) -> None:
        """Know the parent's ids no more."""
        self._reset()

    def _tag(self, random: bytes) -> bytes:
        return (hash(random + self._key) & _TAG_MASK).to_bytes(_TAG_BYTES, "big")


CURRENT_PROCESS = ProcessTag()
