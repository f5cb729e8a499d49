"""Single-flight look-ups at the store: one for all handshakes that need a session, bounded in time and number.

A blocking handshake makes the calls on its own thread; for suspended handshakes a pool of threads makes them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from resumed._client.store import Get, Put, StoredSession
from resumed._exceptions import AlreadyExists, LimitExceeded, StoreError, StoreTimeout, StoreUnavailable
from resumed._process.fork import register_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._client.store import StoreClient
    from resumed._policy.circuit_breaker import Breaker
    from resumed._policy.mirror import Mirror
    from resumed._policy.stats import Recorder

_log = logging.getLogger("resumed")

_DEADLINE_SHARE = 0.9
"""The share of its deadline that a look-up gives its calls; the rest absorbs late timeouts on a busy machine."""
_FRESH_PAUSES = (0.001, 0.004, 0.016, 0.064)
"""Seconds to wait before each further call, or the rest of the deadline."""
_LEAST_ASK_SECONDS = 0.01
"""Seconds that must be left of the deadline for a further call."""
_CLAIM_BYTES = 16
_THREADS = 32
"""Threads that look up for suspended handshakes: 1,600 look-ups a second with a store 20 ms away."""

Accept: TypeAlias = "Callable[[bytes], str | None]"
"""Returns why a value cannot resume, or None."""
LookupResult: TypeAlias = tuple[bytes | None, str]
"""A value and the reason of the hit, or None and the reason of the miss."""
_Ask: TypeAlias = "Callable[[float], LookupResult]"
"""Calls the store until a time at most, in monotonic seconds."""


class Claim(NamedTuple):
    """The single use of a ticket.

    Attributes:
        key: A store key.
        negotiated: When the ticket's session was, in Unix seconds. The store refuses claims from before a purge or a
            restart of Redis, of which this process may not have been notified yet.
        ttl: Seconds for which the store is to keep the claim.
        least_ttl: Seconds for which it must.
        secret: The store key of the secret that encrypts the ticket.
        is_secret: Returns whether a value of that key, or None, is that secret. If it is not, the store has lost its
            storage, and may have lost an earlier claim as well.
    """

    key: bytes
    negotiated: float
    ttl: float
    least_ttl: float
    secret: bytes
    is_secret: Callable[[bytes | None], bool]


class Lookups:
    """The look-ups of one TLS context.

    Args:
        store: The store, with the deadline of a look-up.
        breaker: Shows whether the store may be called; records the outcomes of calls.
        recorder: Records how long each look-up took.
        probe: Called while the breaker is open, to start probing the store.
        single_use: Whether a session resumes once in the whole fleet: Get, then Take if the caller accepts it.
        max_concurrent: How many may be under way at once.
        mirror: Receives the sessions that were found.
    """

    def __init__(
        self,
        store: StoreClient,
        breaker: Breaker,
        recorder: Recorder,
        probe: Callable[[], None],
        *,
        single_use: bool,
        max_concurrent: int,
        mirror: Mirror | None,
    ) -> None:
        self._store, self._breaker, self._recorder, self._probe = store, breaker, recorder, probe
        self._single_use, self._max_concurrent, self._mirror = single_use, max_concurrent, mirror
        self._warned = False  # that the store keeps claims for too short a time
        self.after_fork_in_child()
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Begin with none under way."""
        self._lock = threading.RLock()  # forget() is called by the garbage collector, too
        self._flights: dict[bytes, Future[LookupResult]] = {}
        self._in_flight = 0
        self._threads = ThreadPoolExecutor(_THREADS, "resumed-prefetch")

    def start(self, key: bytes, accept: Accept, seconds: float, *, fresh: bool, blocking: bool) -> Future[LookupResult]:
        """Look `key` up, or join the look-up of it that is in flight.

        Args:
            key: A store key.
            accept: Returns the reason of the miss for a value that cannot resume, which then is not taken.
            seconds: The time that the look-up may take. With too little of it the store is not called: a late response
                would not show whether the store works.
            fresh: Whether the Put of the session may still be on its way, so that a miss is worth another call.
            blocking: Whether this thread makes the calls, not another one. A look-up that was joined may still be in
                flight when this returns.
        """
        return self._start(key, lambda end: self._look_up(key, accept, fresh, end), seconds, blocking=blocking)

    def claim(self, claim: Claim, seconds: float, *, blocking: bool) -> Future[LookupResult]:
        """Put a random value under a key, which succeeds once in the whole fleet; start() describes the rest.

        The value is pinned, so that neither a full store nor its maximum lifetime of sessions ends it.

        Args:
            claim: The single use of a ticket.
            seconds: The time that the call may take.
            blocking: Whether this thread makes the call.

        Returns:
            The value if it was stored; otherwise None, and `replayed` if the key has another value or the ticket is
            from before a purge, `unknown-secret` if the store has lost its storage since, or `rejected` if the store
            keeps the value for too short a time.
        """
        value = os.urandom(_CLAIM_BYTES)  # the same in a repetition, which so is the same claim
        return self._start(claim.key, lambda end: self._put(claim, value, end), seconds, blocking=blocking)

    def _start(self, key: bytes, ask: _Ask, seconds: float, *, blocking: bool) -> Future[LookupResult]:
        reason = self._reason_to_skip()
        if reason:
            return completed_future((None, reason))
        if seconds < min(_LEAST_ASK_SECONDS, self._store.deadline):
            return completed_future((None, "timeout"))
        flight, started = self._join_or_start(key)
        if not started:
            return _join(flight)
        run = partial(self._run, flight, key, ask, time.monotonic() + _DEADLINE_SHARE * seconds)
        if blocking:
            run()
            return flight
        try:
            self._threads.submit(copy_context().run, run)  # spans of the handshake are the parents of the call's
        except RuntimeError:  # closed, or the interpreter is about to exit
            self._finish(flight, key, (None, "unavailable"))
        return flight

    def forget(self, key: bytes) -> None:
        """Let no handshake join a look-up of `key` that is under way: its session is removed."""
        with self._lock:
            self._flights.pop(key, None)

    def close(self) -> None:
        """Begin no more of them on other threads."""
        self._threads.shutdown(wait=False)

    def _reason_to_skip(self) -> str:
        if not self._breaker.closed:
            self._probe()  # a forked child has no thread that does it
            return "breaker-open"
        return "limited" if self._breaker.rate_limited else ""

    def _join_or_start(self, key: bytes) -> tuple[Future[LookupResult], bool]:
        """Return the look-up of `key` that is under way, or a new one and True: the caller must _run() a new one."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, False
            if self._in_flight >= self._max_concurrent:
                return completed_future((None, "too-many-lookups")), False
            flight = Future()
            self._in_flight += 1
            if not self._single_use:  # a single use is for one handshake only
                self._flights[key] = flight
            return flight, True

    def _run(self, flight: Future[LookupResult], key: bytes, ask: _Ask, end: float) -> None:
        """Call the store, until `end` at most."""
        started = time.monotonic()
        found: LookupResult = (None, "internal-error")
        try:
            found = self._call(ask, end)
        finally:
            self._recorder.observe_lookup(time.monotonic() - started)
            self._finish(flight, key, found)

    def _finish(self, flight: Future[LookupResult], key: bytes, found: LookupResult) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._flights.get(key) is flight:
                del self._flights[key]
        flight.set_result(found)

    def _call(self, ask: _Ask, end: float) -> LookupResult:
        if end <= time.monotonic():  # no thread was free
            return None, "too-many-lookups"
        began = self._breaker.now()
        try:
            result = ask(end)
        except LimitExceeded:
            self._breaker.record_rate_limited(began)
            return None, "limited"
        except _DeadlinePassed:
            return None, "timeout"
        except StoreError as error:
            self._breaker.failed(began, late=isinstance(error, StoreTimeout))
            if not self._breaker.closed:
                _log.warning(
                    "the store at %s keeps failing, resumption is off until it answers: %s", self._store.target, error
                )
                self._probe()
            return None, _failure(error)
        self._breaker.succeeded()
        return result

    def _put(self, claim: Claim, value: bytes, end: float) -> LookupResult:
        put = Put(claim.key, value, claim.ttl, claim.negotiated, pinned=True)
        kept, found = self._store.batch([put, Get(claim.secret)], deadline=end - time.monotonic())
        if isinstance(kept, AlreadyExists):
            return None, "replayed"
        for result in (kept, found):
            if isinstance(result, StoreError):
                raise result
        if not claim.is_secret(found.value if isinstance(found, StoredSession) else None):
            return None, "unknown-secret"
        if isinstance(kept, float) and kept >= claim.least_ttl:
            return value, "store"
        if not self._warned:
            self._warned = True
            _log.error(
                "the store at %s keeps the claims of tickets for %d seconds, less than the tickets live: they do not "
                "resume; upgrade the store, or lower the lifetime of tickets",
                self._store.target,
                kept,
            )
        return None, "rejected"

    def _look_up(self, key: bytes, accept: Accept, fresh: bool, end: float) -> LookupResult:
        since = self._mirror.sessions.removals if self._mirror else 0
        found, outcome = self._get(key, fresh, end)
        if found is not None and self._single_use:
            found, outcome = self._take(key, found, accept, end)
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
        """Call a store that has answered this look-up before: a timeout now is no failure, as little time is left."""
        try:
            # The time before may have been longer than it was to be.
            return ask(key, deadline=max(end - time.monotonic(), _LEAST_ASK_SECONDS))
        except StoreTimeout:
            raise _DeadlinePassed from None


class _DeadlinePassed(Exception):
    """The deadline passed, which is no failure of the store."""


def result_or_late(flight: Future[LookupResult], patience: float) -> LookupResult:
    """Return the result of a look-up, or a timeout after `patience` seconds."""
    try:
        return flight.result(patience)
    except FutureTimeoutError:
        return None, "timeout"


def completed_future(found: LookupResult) -> Future[LookupResult]:
    """Return a look-up that is over."""
    flight: Future[LookupResult] = Future()
    flight.set_result(found)
    return flight


def _join(flight: Future[LookupResult]) -> Future[LookupResult]:
    """Return a future for a caller that joins a look-up in flight; its hits count as `coalesced`."""
    shared: Future[LookupResult] = Future()

    def land(flight: Future[LookupResult]) -> None:
        value, outcome = flight.result()
        shared.set_result((value, outcome if value is None else "coalesced"))

    flight.add_done_callback(land)
    return shared


def _failure(error: StoreError) -> str:
    if isinstance(error, StoreTimeout):
        return "timeout"
    return "unavailable" if isinstance(error, StoreUnavailable) else "rejected"
