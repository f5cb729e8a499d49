"""The look-ups of one handshake, and how a handshake rests while its sessions are looked up.

A handshake may offer many sessions, and may send its ClientHello twice (HelloRetryRequest, RFC 8446 section 4.1.4), for
each of which OpenSSL asks again. All of its look-ups share one deadline, at most MAX_LOOKUPS of them are calls, and the
first answer for a session is kept.

When a ClientHello is complete, OpenSSL's client hello callback may have the handshake rest
(SSL_CTX_set_client_hello_cb(3)), so that a thread that serves many connections is not held up. The look-ups then happen
in other threads, and whoever drives the handshake takes its next step when it is woken. Event loops are such drivers
(loops.py, twisted.py).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

from resumed._policy.lookups import settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from resumed._policy.lookups import Found

    Prefetch: TypeAlias = Callable[[bytes], "Future[Found] | None"]

MAX_LOOKUPS = 4
"""How many of the ids in one handshake are looked up. Clients offer one or two; a thousand fit in a ClientHello."""

_BUSY = settled((None, "too-many-lookups"))


class Handshake:
    """What was found for one handshake.

    Args:
        deadline: Seconds that all of its look-ups together may take.
        waker: Called in the midst of a step; returns what has the next step taken soon, from any thread, or None if
            nobody would take it.
        clock: Seconds that only go forward.

    Attributes:
        rests: Whether its last step ended because an answer was not there yet.
    """

    def __init__(
        self,
        deadline: float,
        waker: Callable[[], Callable[[], None] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left, self._waker, self._clock = deadline, waker, clock
        self._answers: dict[bytes, Future[Found]] = {}
        self._counted: set[bytes] = set()
        self.rests = False

    def offers(self, session_ids: Iterable[bytes], prefetch: Prefetch) -> None:
        """See to it that the sessions of a ClientHello are looked up, one after the other until one is found.

        Called again for the same ClientHello at each step, until the handshake `rests` no more.

        Args:
            session_ids: The ids that the client offers.
            prefetch: Begins to look one up, without waiting; returns None if that is not worth a call.
        """
        self.rests = False
        for session_id in session_ids:
            answer = self.answer(session_id) or self._begin(session_id, prefetch)
            if answer is None:
                continue
            if not answer.done():
                self.rests = True
                return
            if answer.result()[0] is not None:
                return

    def answer(self, session_id: bytes) -> Future[Found] | None:
        """Return what was found, or None for an id that nobody was asked about."""
        return self._answers.get(session_id) or (_BUSY if len(self._answers) >= MAX_LOOKUPS else None)

    def ask(self, session_id: bytes, find: Callable[[float], Found]) -> Found:
        """Look a session up, in what is left of the deadline, and keep the answer."""
        began = self._clock()
        found = find(self._left)
        self._left -= self._clock() - began
        self._answers[session_id] = settled(found)
        return found

    def is_news(self, session_id: bytes) -> bool:
        """Return whether this is called for the first time with an id: what a client offers twice counts once.

        Of ids that are not looked up only the first few are remembered, and the others count each time.
        """
        if session_id in self._counted:
            return False
        if session_id in self._answers or len(self._counted) < MAX_LOOKUPS:
            self._counted.add(session_id)
        return True

    def _begin(self, session_id: bytes, prefetch: Prefetch) -> Future[Found] | None:
        wake = self._waker()  # which is not kept: it leads back to whoever drives this
        if wake is None:
            return None
        answer = prefetch(session_id)
        if answer is not None:
            self._answers[session_id] = answer
            if not answer.done():
                answer.add_done_callback(lambda _: wake())
        return answer
