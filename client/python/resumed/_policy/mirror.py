"""A copy of the namespace's sealed sessions in the frontend's memory: a look-up that finds its session here is no call.

The store's Watch keeps it current, and the frontend's own look-ups add sessions stored before. It is used only
while the stream is alive: a store that is silent for STALE_SECONDS may have removed something, so the mirror returns
nothing until the next message. A stream that cannot continue where it ended begins with an empty mirror, never with a
wrong one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from resumed._exceptions import StoreError, StoreTimeout, StoreUnavailable
from resumed._process.fork import register_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from resumed._client.store import Change, StoreClient, StoredSession, Watch

DEFAULT_BYTES = 64 << 20
"""Default memory of a mirror's sessions, in bytes."""
STALE_SECONDS = 3.0
"""How long a mirror is used without a message from the store, which sends one at least once a second."""
RETRY_SECONDS = 1.0
"""Seconds between two attempts to watch, from the end of one that failed, from the beginning of one that served."""

_OVERHEAD = 195  # bytes of an entry's overhead, measured: keys, objects, and a table that is mostly too large
_KEY_BYTES = 15  # of the 32 of a store key: enough to find a session, which opens under the whole key only
_EXPIRY_BYTES = 5  # in milliseconds, for 34 years of uptime
_LAST_EXPIRY = (1 << 8 * _EXPIRY_BYTES) - 1
_ISSUE_BYTES = 4  # in seconds, until 2106
_LAST_ISSUE = (1 << 8 * _ISSUE_BYTES) - 1
_ISSUE = slice(_EXPIRY_BYTES, _EXPIRY_BYTES + _ISSUE_BYTES)
_FORGOTTEN = 1024
_RECENT_REMOVALS = 1024

_log = logging.getLogger("resumed")


class SessionCache:
    """Values by store key, bounded in bytes, until they expire. The oldest go first. Thread-safe.

    remove() may also be called within any other method, by the garbage collector when it ends a connection: then it is
    carried out when that method is done.

    Args:
        limit: Bytes that all entries together may take.
        clock: Seconds that only go forward.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._lock = threading.RLock()
        self._changing = False
        self._to_remove: deque[bytes] = deque()
        self.removals = 0
        """How many removals there were: a look-up notes it when it begins, and put() wants it back."""
        self._recent: dict[bytes, int] = {}  # the last removals, with their numbers
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        with self._change():
            self._values: dict[bytes, bytes] = {}  # expiry, issue, value: one object an entry
            self._order: deque[bytes] = deque()
            self._bytes = 0
            self.removals += 1
            self._oldest_known_removal = self.removals  # up to here anything may have been removed

    def __len__(self) -> int:
        """Return how many sessions there are, expired ones included."""
        return len(self._values)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a live session, or None."""
        entry = self._values.get(key[-_KEY_BYTES:])
        if entry is None or int.from_bytes(entry[:_EXPIRY_BYTES], "big") <= self._clock() * 1000:
            return None
        return entry[_ISSUE.stop :]

    def put(self, key: bytes, session: StoredSession, since: int | None = None, issued: float = 0.0) -> None:
        """Keep a session for as long as it lives.

        Args:
            key: Its store key.
            session: Its value and the seconds it has left.
            since: For a session that a look-up found: the removals when it began. If it was removed since, or that
                is unknown, it is not kept. None for a session of the change stream, which may be late: it is not kept
                if it was removed recently, as this process may have removed it first.
            issued: When it was issued, in Unix seconds, for a purge to go by; 0 if that is not known.
        """
        key = key[-_KEY_BYTES:]
        expiry = int((self._clock() + session.ttl) * 1000)  # on the word of the store, which may say anything
        entry = min(max(expiry, 0), _LAST_EXPIRY).to_bytes(_EXPIRY_BYTES, "big")
        entry += min(max(int(issued), 0), _LAST_ISSUE).to_bytes(_ISSUE_BYTES, "big") + session.value
        with self._change():
            if self._was_removed(key, since):
                return
            old = self._values.get(key)
            if old is None:
                self._order.append(key)
            else:
                self._bytes -= _OVERHEAD + len(old)
            self._values[key] = entry
            self._bytes += _OVERHEAD + len(entry)
            self._make_room()

    def remove(self, key: bytes) -> None:
        """Forget a session, and refuse it from look-ups that are under way, and from a stream that is behind."""
        self._to_remove.append(key[-_KEY_BYTES:])
        with self._change():
            pass

    def purge(self, before: float) -> None:
        """Forget the sessions that were issued before a time, or at an unknown time; and refuse those of look-ups."""
        with self._change():
            self.removals += 1
            self._oldest_known_removal = self.removals
            issues = ((key, int.from_bytes(entry[_ISSUE], "big")) for key, entry in self._values.items())
            for key in [key for key, issued in issues if issued < before]:
                self._drop(key)
            self._shorten_order()

    def apply(self, changes: Iterable[Change]) -> None:
        """Apply changes of the store."""
        for change in changes:
            if change.session:
                self.put(change.key, change.session, issued=change.time or 0.0)
            elif change.key:
                self.remove(change.key)
            elif change.time is None:
                self.clear()
            else:
                self.purge(change.time)

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Hold the lock; carry out the removals so far, unless this thread is in the midst of a change already."""
        with self._lock:
            if self._changing:
                yield
                return
            self._changing = True
            try:
                yield
                while self._to_remove:
                    self._remove(self._to_remove.popleft())
            finally:
                self._changing = False

    def _remove(self, key: bytes) -> None:
        self.removals += 1
        self._recent.pop(key, None)
        self._recent[key] = self.removals
        if len(self._recent) > _RECENT_REMOVALS:
            oldest = next(iter(self._recent))
            self._oldest_known_removal = max(self._oldest_known_removal, self._recent.pop(oldest))
        self._drop(key)
        self._shorten_order()

    def _shorten_order(self) -> None:
        if len(self._order) > 1.25 * len(self._values) + _FORGOTTEN:  # or removed keys would take ever more memory
            self._order = deque(self._values)

    def _was_removed(self, key: bytes, since: int | None) -> bool:
        removal = self._recent.get(key, 0)
        return removal > 0 if since is None else max(removal, self._oldest_known_removal) > since

    def _drop(self, key: bytes) -> None:
        entry = self._values.pop(key, None)
        if entry is not None:
            self._bytes -= _OVERHEAD + len(entry)

    def _make_room(self) -> None:
        # Sessions live about equally long, so the oldest is the first to expire. Removed keys are still in the
        # order, and cost nothing to skip.
        now = int(self._clock() * 1000).to_bytes(_EXPIRY_BYTES, "big")
        while self._order and (
            self._bytes > self._limit or self._values.get(self._order[0], b"")[:_EXPIRY_BYTES] <= now
        ):
            self._drop(self._order.popleft())


class Mirror:
    """The sessions of a namespace, followed in a thread of its own from the second look-up of the process on.

    A server that forks a process for each connection has no use for a copy, and opens no stream for it.

    Args:
        store: Whose sessions; its connection is used.
        limit: Bytes that the sessions may take.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, store: StoreClient, limit: int = DEFAULT_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._limit, self._clock = store, limit, clock
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self.sessions = SessionCache(self._limit, self._clock)
        self._lock = threading.Lock()
        self._looked_up = False
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._watch: Watch | None = None
        self._caught_up_at = float("-inf")  # when the mirror had received all changes
        self._last_message_at = float("inf")  # when the stream last sent anything

    @property
    def live(self) -> bool:
        """Whether the stream is alive, so that the mirror is up to date."""
        return self._clock() - self._caught_up_at < STALE_SECONDS

    def get(self, key: bytes) -> bytes | None:
        """Return the sealed value of a live session, or None: then the caller looks it up at the store."""
        if self._thread is None and self._looked_up:
            self.follow()
        self._looked_up = True
        if self.live:
            return self.sessions.get(key)
        watch = self._watch
        if watch is not None and self._clock() - self._last_message_at >= STALE_SECONDS:
            watch.cancel()  # its thread watches anew; one that catches up continues
        return None

    def follow(self) -> None:
        """Follow the namespace from now on."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="resumed-mirror", daemon=True)
                with contextlib.suppress(RuntimeError):  # the system has no thread now: the next look-up tries again
                    thread.start()
                    self._thread = thread

    def close(self) -> None:
        """Stop following."""
        self._closed.set()
        watch = self._watch
        if watch is not None:
            watch.cancel()

    def after_fork_in_child(self) -> None:
        """Begin anew: the child follows by itself."""
        self._reset()

    def _run(self) -> None:
        position, failing = b"", False
        while not self._closed.is_set():
            began, serving = self._clock(), False
            try:
                with self._store.watch(position) as watch:
                    self._last_message_at, self._watch = self._clock(), watch
                    if self._closed.is_set():  # by a close() that knew of no stream yet
                        return
                    if not watch.resumed_from_position:
                        self.sessions.clear()
                    failing, serving = False, True
                    for changes, behind, live in watch:
                        self._last_message_at = self._clock()
                        self.sessions.apply(changes)
                        position = behind or position
                        if live:
                            self._caught_up_at = min(watch.confirmed, self._clock())
            except Exception as error:  # noqa: BLE001  # a defect must not end the thread: all look-ups would be calls
                # A server that stops, or a connection that has reached its age: the next one may serve at once.
                orderly = serving and isinstance(error, StoreUnavailable) and not isinstance(error, StoreTimeout)
                if not (orderly or failing or self._closed.is_set()):  # once per outage
                    defect = None if isinstance(error, StoreError) else error
                    _log.warning(
                        "the mirror of %s is disconnected, look-ups call the store: %s",
                        self._store.target,
                        error,
                        exc_info=defect,
                    )
                failing = not orderly
            now = self._clock()
            self._caught_up_at = min(self._caught_up_at, now - STALE_SECONDS)
            self._closed.wait(RETRY_SECONDS if failing else max(0.0, began + RETRY_SECONDS - now))
