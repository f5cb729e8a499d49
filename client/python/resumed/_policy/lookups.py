"""Look-ups at the store: one for all handshakes that ask for the same session, bounded in time and number.

A handshake waits for its look-up on its own thread; what handshakes of event loops wait for is looked up on others.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextvars import copy_context
from typing import TYPE_CHECKING, TypeAlias

from resumed._exceptions import LimitExceeded, StoreError, StoreTimeout, StoreUnavailable
from resumed._process.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._client.store import SessionStore, StoredSession
    from resumed._policy.circuit_breaker import Breaker
    from resumed._policy.mirror import Mirror
    from resumed._policy.stats import Recorder

_log = logging.getLogger("resumed")

_DEADLINE_SHARE = 0.9
"""How much of its deadline a look-up gives its calls: a busy machine tells a little late that the time is up."""
_FRESH_PAUSES = (0.001, 0.004, 0.016, 0.064)
"""Seconds to wait before each further ask, or what the deadline leaves."""
_LEAST_ASK_SECONDS = 0.01
"""What a further ask must have left of the deadline, to be worth it."""
_THREADS = 32
"""How many look up what handshakes of event loops wait for. With a store 20 ms away, 1,600 a second."""

Accept: TypeAlias = "Callable[[bytes], str | None]"
"""Returns why a value cannot resume, or None."""
Found: TypeAlias = tuple[bytes | None, str]
"""A value and the reason of the hit, or None and the reason of the miss."""


class Lookups:
    """Those of one TLS context.

    Args:
        store: The store, with the deadline of a look-up.
        breaker: Says whether the store is worth asking, and hears how it answered.
        recorder: Told how long each look-up took.
        probe: Called while the breaker is open, to have the store tried.
        single_use: Whether a session resumes once in the whole fleet: Get, then Take if the caller accepts it.
        most: How many may be under way at once.
        mirror: Told of what was found.
    """

    def __init__(
        self,
        store: SessionStore,
        breaker: Breaker,
        recorder: Recorder,
        probe: Callable[[], None],
        *,
        single_use: bool,
        most: int,
        mirror: Mirror | None,
    ) -> None:
        self._store, self._breaker, self._recorder, self._probe = store, breaker, recorder, probe
        self._single_use, self._most, self._mirror = single_use, most, mirror
        self._begin()
        renew_after_fork(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()  # forget() is called by the garbage collector, too
        self._flights: dict[bytes, Future[Found]] = {}
        self._under_way = 0
        self._threads = ThreadPoolExecutor(_THREADS, "resumed-prefetch")

    def begin(self, key: bytes, accept: Accept, *, fresh: bool) -> Future[Found]:
        """Begin to look `key` up, and return at once; see find()."""
        resting = self._resting()
        if resting is not None:
            return settled(resting)
        flight, mine = self._board(key)
        if not mine:
            return _shared(flight)
        try:
            # Spans of the handshake are the parents of the call's.
            end = self._end(self._store.deadline)
            self._threads.submit(copy_context().run, self._fly, flight, key, accept, fresh, end)
        except RuntimeError:  # closed, or the interpreter is about to exit
            self._land(flight, key, (None, "unavailable"))
        return flight

    def find(self, key: bytes, accept: Accept, seconds: float, *, fresh: bool) -> Found:
        """Look `key` up, or wait for the answer to somebody else who does.

        Args:
            key: A store key.
            accept: Returns the reason of the miss for a value that cannot resume, which then is not taken.
            seconds: How long that may take. If that is too little, nobody is asked: an answer that is late would tell
                nothing of the store.
            fresh: Whether its Put may still be on its way, so that a miss is worth another ask.
        """
        resting = self._resting()
        if resting is not None:
            return resting
        if seconds < min(_LEAST_ASK_SECONDS, self._store.deadline):
            return None, "timeout"
        flight, mine = self._board(key)
        if mine:
            self._fly(flight, key, accept, fresh, self._end(seconds))
            return flight.result()
        return landed(_shared(flight), seconds)

    def forget(self, key: bytes) -> None:
        """Let no handshake join a look-up of `key` that is under way: its session is removed."""
        with self._lock:
            self._flights.pop(key, None)

    def close(self) -> None:
        """Begin no more of them on other threads."""
        self._threads.shutdown(wait=False)

    def after_fork_in_child(self) -> None:
        """Begin with none under way."""
        self._begin()

    def _resting(self) -> Found | None:
        if not self._breaker.closed:
            self._probe()  # a forked child has no thread that does it
            return None, "breaker-open"
        return (None, "limited") if self._breaker.resting else None

    def _board(self, key: bytes) -> tuple[Future[Found], bool]:
        """Return the look-up of `key` that is under way, or a new one and True: whoever gets that has to _fly() it."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, False
            if self._under_way >= self._most:
                return settled((None, "too-many-lookups")), False
            flight = Future()
            self._under_way += 1
            if not self._single_use:  # of all who ask for a single use one is answered
                self._flights[key] = flight
            return flight, True

    def _fly(self, flight: Future[Found], key: bytes, accept: Accept, fresh: bool, end: float) -> None:
        """Look `key` up, until `end` at most."""
        started = time.monotonic()
        found: Found = (None, "internal-error")
        try:
            found = self._ask(key, accept, fresh, end)
        finally:
            self._recorder.observe_lookup(time.monotonic() - started)
            self._land(flight, key, found)

    def _land(self, flight: Future[Found], key: bytes, found: Found) -> None:
        with self._lock:
            self._under_way -= 1
            if self._flights.get(key) is flight:
                del self._flights[key]
        flight.set_result(found)

    def _end(self, seconds: float) -> float:
        """Return when a look-up that begins now, and may take so long, has to end."""
        return time.monotonic() + _DEADLINE_SHARE * seconds

    def _ask(self, key: bytes, accept: Accept, fresh: bool, end: float) -> Found:
        if end <= time.monotonic():  # no thread was free
            return None, "too-many-lookups"
        since = self._mirror.sessions.removals if self._mirror else 0
        began = self._breaker.now()
        try:
            found, outcome = self._get(key, fresh, end)
            if found is not None and self._single_use:
                found, outcome = self._take(key, found, accept, end)
        except LimitExceeded:
            self._breaker.limited(began)
            return None, "limited"
        except _Late:
            return None, "timeout"
        except StoreError as error:
            self._breaker.failed(began, late=isinstance(error, StoreTimeout))
            if not self._breaker.closed:
                _log.warning("the store at %s keeps failing, resumption rests: %s", self._store.target, error)
                self._probe()
            return None, _failure(error)
        self._breaker.succeeded()
        if found is None:
            return None, outcome
        if self._mirror:
            self._mirror.sessions.put(key, found, since)
        return found.value, outcome

    def _get(self, key: bytes, fresh: bool, end: float) -> tuple[StoredSession | None, str]:
        found = self._store.get(key, deadline=end - time.monotonic())
        if found is not None:
            return found, "store"
        for pause in _FRESH_PAUSES if fresh else ():
            left = end - _LEAST_ASK_SECONDS - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(pause, left))
            found = self._again(self._store.get, key, end)
            if found is not None:
                return found, "retried"
        return None, "unknown"

    def _take(self, key: bytes, found: StoredSession, accept: Accept, end: float) -> tuple[StoredSession | None, str]:
        """Take a session that was found, if it fits: one that does not stays for the connection that it fits."""
        refusal = accept(found.value)
        if refusal is not None:
            return None, refusal
        taken = self._again(self._store.take, key, end)
        return taken, "unknown" if taken is None else "store"

    def _again(self, ask: Callable[..., StoredSession | None], key: bytes, end: float) -> StoredSession | None:
        """Call a store that has answered this look-up before: if it is late now, it had little time."""
        try:
            # The time before may have been longer than it was to be.
            return ask(key, deadline=max(end - time.monotonic(), _LEAST_ASK_SECONDS))
        except StoreTimeout:
            raise _Late from None


class _Late(Exception):
    """The deadline passed, which is no failure of the store."""


def landed(flight: Future[Found], patience: float) -> Found:
    """Return what a look-up found, or that it is late, after `patience` seconds at most."""
    try:
        return flight.result(patience)
    except FutureTimeoutError:
        return None, "timeout"


def settled(found: Found) -> Future[Found]:
    """Return a look-up that is over."""
    flight: Future[Found] = Future()
    flight.set_result(found)
    return flight


def _shared(flight: Future[Found]) -> Future[Found]:
    """Return the same answer for somebody who did not ask himself."""
    shared: Future[Found] = Future()

    def land(flight: Future[Found]) -> None:
        value, outcome = flight.result()
        shared.set_result((value, outcome if value is None else "coalesced"))

    flight.add_done_callback(land)
    return shared


def _failure(error: StoreError) -> str:
    if isinstance(error, StoreTimeout):
        return "timeout"
    return "unavailable" if isinstance(error, StoreUnavailable) else "rejected"
