"""Recognises the session ids that this process issued, for the statistic of foreign hits.

A sealed id begins with a nonce of 12 bytes, which its issuer chooses. Of ours four are a hash of the other
eight and a random key that never leaves this process. So the process needs no table of its ids; to every other
process, those with the fleet key included, the nonce looks random. One foreign id in 2^32 is taken for our own.

The hash is Python's own (SipHash), which every look-up in a dictionary keeps in the processor's caches: within a
handshake a keyed BLAKE2 took 25 us, twenty times as much as in a loop. No security decision depends on it.
"""

from __future__ import annotations

import os

from resumed._process.fork import register_after_fork

_RANDOM_BYTES, _TAG_BYTES = 8, 4
_TAG_MASK = 0xFFFFFFFF


class ProcessTag:
    """Makes nonces, and recognises ids that begin with one of them. A forked child has a key of its own."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Take a new key: the parent's ids are foreign."""
        self._key = os.urandom(16)

    def nonce(self) -> bytes:
        """Return a new nonce of 12 bytes."""
        random = os.urandom(_RANDOM_BYTES)
        return random + self._tag(random)

    def is_own(self, session_id: bytes) -> bool:
        """Return whether this process issued an id that is known to be the fleet's."""
        tag = session_id[_RANDOM_BYTES : _RANDOM_BYTES + _TAG_BYTES]
        return tag == self._tag(session_id[:_RANDOM_BYTES])

    def _tag(self, random: bytes) -> bytes:
        return (hash(random + self._key) & _TAG_MASK).to_bytes(_TAG_BYTES, "big")


CURRENT_PROCESS = ProcessTag()
