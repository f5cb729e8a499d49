"""Tries a store that keeps failing until it answers again, so that no handshake has to."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from resumed._exceptions import LimitExceeded, StoreError
from resumed._process.fork import register_after_fork

if TYPE_CHECKING:
    from resumed._client.store import StoreClient
    from resumed._policy.circuit_breaker import Breaker

_KEY = b"resumed/v1 probe"

_log = logging.getLogger("resumed")


class Prober:
    """Closes the circuit breaker again; has a thread while the breaker is open.

    Args:
        store: The store, with the deadline of a look-up: a store that answers, but too late for one, is no help.
        breaker: Told when the store answers.
    """

    def __init__(self, store: StoreClient, breaker: Breaker) -> None:
        self._store, self._breaker = store, breaker
        self._closed = threading.Event()
        self.after_fork_in_child()
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Begin without the parent's thread."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Try the store from now on, unless that is under way. Call it for as long as the breaker is open."""
        if self._thread or self._closed.is_set():
            return
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="resumed-prober", daemon=True)
                with contextlib.suppress(RuntimeError):  # the system has no thread now: the next call tries again
                    thread.start()
                    self._thread = thread

    def close(self) -> None:
        """Try no more."""
        self._closed.set()

    def _run(self) -> None:
        while not (self._breaker.closed or self._closed.wait(self._breaker.next_probe_delay())):
            try:
                self._store.get(_KEY)
            except LimitExceeded:
                self._breaker.record_rate_limited()
            except StoreError:
                continue
            except Exception:  # noqa: BLE001  # a defect must not end the thread: the breaker would stay open
                _log.exception("trying the store failed")
                continue
            else:
                self._breaker.succeeded()
            _log.info("the store at %s answers again", self._store.target)
        self._thread = None
