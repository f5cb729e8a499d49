"""The look-ups of one handshake, which may be suspended until their results are there.

A client may offer many sessions, and may send its ClientHello twice (HelloRetryRequest, RFC 8446 section 4.1.4), for
which OpenSSL requests them again. All look-ups of a handshake share one deadline, at most MAX_LOOKUPS of them are
calls, and the first result for a session is kept.

When a ClientHello is complete, OpenSSL's client hello callback may suspend the handshake
(SSL_CTX_set_client_hello_cb(3)), so that it does not block a thread that serves many connections. Other threads then
make the calls, and the driver of the handshake (ssl_classes.py, twisted.py) takes the next step when it is resumed.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeAlias

from resumed._policy.lookups import completed_future, result_or_late

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from resumed._policy.lookups import LookupResult

    StartLookup: TypeAlias = Callable[[float, bool], Future[LookupResult]]

MAX_LOOKUPS = 4
"""How many of the ids in one handshake are looked up. Clients offer one or two; a thousand fit in a ClientHello."""

_TOO_MANY = completed_future((None, "too-many-lookups"))


class SuspendableHandshake:
    """The results of the look-ups of one handshake.

    Args:
        deadline: Seconds that all of its look-ups together may take.
        find_resume_callback: Called during a step; returns a function that schedules the next step, from any thread, or
            None if nothing would take it.
        clock: Seconds that only go forward.

    Attributes:
        suspended: Whether its last step ended because a result was not there yet.
    """

    def __init__(
        self,
        deadline: float,
        find_resume_callback: Callable[[], Callable[[], None] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left, self._find_resume_callback, self._clock = deadline, find_resume_callback, clock
        self._results: dict[bytes, Future[LookupResult]] = {}
        self._counted: set[bytes] = set()
        self.suspended = False

    def start_lookups(self, session_ids: Iterable[bytes], find: Callable[[bytes], Future[LookupResult]]) -> None:
        """Look up the sessions of a ClientHello, one after the other until one is found.

        Called again for the same ClientHello at each step, until the handshake is `suspended` no more.

        Args:
            session_ids: The ids that the client offers.
            find: Returns the result for one of them; see look_up().
        """
        self.suspended = False
        for session_id in session_ids:
            result = find(session_id)
            if not result.done():
                self.suspended = True
                return
            if result.result()[0] is not None:
                self._results[session_id] = result
                return

    def result_for(self, session_id: bytes) -> Future[LookupResult] | None:
        """Return the result of the look-up of an id, or None if there was none."""
        return self._results.get(session_id) or (_TOO_MANY if len(self._results) >= MAX_LOOKUPS else None)

    def look_up(self, session_id: bytes, start: StartLookup, *, may_suspend: bool) -> Future[LookupResult]:
        """Look a session up, in the rest of the deadline, and keep the result.

        Args:
            session_id: The id of the session.
            start: Starts the look-up; called with its seconds, and with whether it blocks.
            may_suspend: Whether the handshake can be suspended now. If it has a resume callback, that is called when
                the result is there; otherwise this waits for the result.
        """
        resume = self._find_resume_callback() if may_suspend else None  # not kept: it refers to the handshake's driver
        began = self._clock()
        result = start(self._left, resume is None)
        if resume and not result.done():
            result = self._resumed_after(result, began, resume)
        else:
            result = completed_future(result_or_late(result, self._left))
            self._left -= self._clock() - began
        self._results[session_id] = result
        return result

    def _resumed_after(
        self, lookup: Future[LookupResult], began: float, resume: Callable[[], None]
    ) -> Future[LookupResult]:
        """Return a future with the result of a look-up, after which the handshake is resumed."""
        result: Future[LookupResult] = Future()

        def finish(lookup: Future[LookupResult]) -> None:
            self._left -= self._clock() - began  # before the next step can start another look-up
            result.set_result(lookup.result())
            resume()

        lookup.add_done_callback(finish)
        return result

    def is_first(self, session_id: bytes) -> bool:
        """Return whether this is the first call with an id: a session that a client offers twice counts once.

        Of ids that are not looked up only the first few are remembered, and the others count each time.
        """
        if session_id in self._counted:
            return False
        if session_id in self._results or len(self._counted) < MAX_LOOKUPS:
            self._counted.add(session_id)
        return True
