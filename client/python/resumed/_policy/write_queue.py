"""Background write queue: one thread a process seals Puts, and sends them with Removes in Batches."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from resumed._client.limits import BATCH_OPERATIONS
from resumed._client.store import Operation, Put, Remove, StoreClient
from resumed._exceptions import LimitExceeded, StoreError
from resumed._process.fork import register_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._policy.stats import Recorder

QUEUE_BYTES = 16 << 20
"""Bytes of pending writes; beyond that Puts and Removes are dropped, and counted."""
BUSY_OPERATIONS = 3
"""Operations of a Batch that show load, since a handshake alone has one or two. A Batch of any size costs about as
much as a resumption, so the next one gathers more."""
BUSY_PAUSE = 0.005
"""Seconds after such a Batch until the next one. Until then a client that returns is looked up again (lookups.py)."""
BATCH_DEADLINE = 1.0
"""Seconds that a Batch may take; no handshake waits for it."""
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.05, 0.8
"""Seconds after which a Batch that failed is sent again; twice as long each time in a row, up to the second number."""
MAX_FAILURES = 3
"""How many Batches in a row fail until close() drops the rest."""

EXIT_SECONDS = 1.0
"""Seconds that the interpreter waits at exit for pending writes."""

_OVERHEAD = 256  # an entry's own memory, roughly, beside its value
_MOST_REMOVED = 16_384
"""How many removals are remembered beside those in the queue: a session that was removed here does not resume here."""

_log = logging.getLogger("resumed")


class PendingWrite(NamedTuple):
    """A Put, or a Remove where `value` is None."""

    key: bytes
    value: bytes | None
    """The serialized session, not sealed yet."""
    not_after: int
    """When the session's life ends, in Unix seconds: waiting in the queue does not prolong it."""
    reason: str
    """For a Remove, why: it is counted under this reason."""
    issued: float = 0.0
    """When the session was negotiated, in Unix seconds: waiting in the queue does not bring it past a purge."""
    report: Callable[[bool], None] | None = None
    """For a Remove: called with whether the store acknowledged it."""
    lasting: bool = False
    """For a Remove: whether it is in force until `not_after`, also at frontends that start later."""

    def __repr__(self) -> str:
        """Show nothing of the session."""
        return "PendingWrite(Remove)" if self.value is None else "PendingWrite(Put)"


class WriteQueue:
    """Sends in the order of submit(). Its thread starts when there is something to do.

    Args:
        store: Where to.
        recorder: Counts the outcome of each Put and Remove.
        clock: Unix seconds.
        seal: Makes the stored value of a store key, a serialized session and its not_after. It is cheaper here, for
            several sessions at a time, than in a handshake, where the processor's caches are cold.
        limited: Called when a Batch is rejected because of a limit.
    """

    def __init__(
        self,
        store: StoreClient,
        recorder: Recorder,
        clock: Callable[[], float],
        seal: Callable[[bytes, bytes, int], bytes],
        limited: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._recorder, self._clock, self._seal = store, recorder, clock, seal
        self._limited = limited
        self._removed: dict[bytes, bool] = {}  # the last removals, and whether the store acknowledged them
        self._reset()
        register_after_fork(self)
        _queues.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[PendingWrite] = deque()
        self._batch: list[PendingWrite] = []  # the first of the queue, sealed, until they are sent
        self._bytes = 0
        self._removing: set[bytes] = set()  # of the Removes in the queue
        self._submitted = 0
        self._finished = 0
        self._urgent = 0
        self._failures = 0  # in a row
        self._retry = RETRY_SECONDS
        self._idle = False
        self._busy = False  # the last Batch showed load
        self._incomplete = False  # the handshake of the last write is about to submit another one
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, write: PendingWrite, *, urgent: bool = False, more: bool = False) -> int:
        """Queue `write` and return its number for wait(), or 0 if there was no room.

        Args:
            write: What to send.
            urgent: Whether a handshake waits for it, so that it is sent without delay.
            more: Whether the same handshake is about to submit another one: it is sent with that, or after BUSY_PAUSE.
        """
        size = _size(write)
        with self._changed:
            if not self._closing and self._bytes + size <= QUEUE_BYTES:
                self._queue.append(write)
                self._bytes += size
                if write.value is None:
                    self._removing.add(write.key)
                self._submitted += 1
                if urgent:
                    self._urgent = self._submitted
                # A thread that pauses or sends finds it in the queue: to wake it would cost this handshake its turn.
                idle, complete = self._idle or self._thread is None, self._incomplete and not more
                self._incomplete = more
                if urgent or idle or complete or len(self._queue) >= BATCH_OPERATIONS:
                    self._wake()
                return self._submitted
        self._finish(write, "dropped")
        return 0

    def is_removed(self, key: bytes) -> bool:
        """Return whether this process has submitted a Remove of a session, with any outcome."""
        return key in self._removing or key in self._removed

    @property
    def last_batch_succeeded(self) -> bool:
        """Whether the last Batch was carried out, if there was any."""
        return self._retry == RETRY_SECONDS

    def wait(self, number: int, timeout: float) -> bool:
        """Wait until the write with a number of submit() was sent or dropped; return False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._finished >= number, timeout)

    def flush(self, timeout: float) -> bool:
        """Send all that was submitted so far at once.

        Returns:
            Whether that was done within `timeout` seconds, and the store has acknowledged all removals. One that it
            refused, or that was dropped, counts until it is submitted again.
        """
        with self._changed:
            self._urgent = last = self._submitted
            self._changed.notify_all()
            return self.wait(last, timeout) and all(list(self._removed.values()))

    def close(self, timeout: float) -> None:
        """Accept nothing more, and wait up to `timeout` seconds until all is sent.

        After that the thread still sends the rest, if the store answers; then it disconnects and ends.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
            if thread:
                self._changed.wait_for(lambda: not self._queue or self._failures >= MAX_FAILURES, timeout)
        if thread is None:
            self._end()

    def after_fork_in_child(self) -> None:
        """Begin with an empty queue: the parent sends its content."""
        self._removed |= dict.fromkeys(self._removing, True)
        self._reset()

    def _wake(self) -> None:
        if self._thread is None and not self._closing:
            thread = threading.Thread(target=self._run, name="resumed-sender", daemon=True)
            with contextlib.suppress(RuntimeError):  # the system has no thread now: the next one to submit tries again
                thread.start()
                self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        while self._await_work():
            try:
                self._send()
            except Exception:  # noqa: BLE001  # a defect must not end the thread: all later Puts would be lost in silence
                _log.exception("sending to the store failed")
                self._pause()
        self._end()

    def _end(self) -> None:
        """Drop the pending writes, and disconnect."""
        with self._changed:
            left = list(self._queue)
            self._drop_sent(len(left))
        for write in left:
            self._finish(write, "dropped")
        self._store.close()

    def _await_work(self) -> bool:
        with self._changed:
            if self._busy:
                self._changed.wait_for(
                    lambda: self._urgent > self._finished or len(self._queue) >= BATCH_OPERATIONS or self._closing,
                    BUSY_PAUSE,
                )
            self._idle = True
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._idle = False
            self._changed.wait_for(
                lambda: not self._incomplete or self._urgent > self._finished or self._closing, BUSY_PAUSE
            )
            self._incomplete = False  # or each Batch would wait: the handshake may have ended
            return bool(self._queue) and not (self._closing and self._failures >= MAX_FAILURES)

    def _send(self) -> None:
        if not self._batch:
            with self._changed:
                batch = list(islice(self._queue, BATCH_OPERATIONS))
            self._batch = [self._seal_value(write) for write in batch]
        batch, now = self._batch, self._clock()
        operations = [_make_operation(write, now) for write in batch]
        try:
            results = iter(self._store.batch([each for each in operations if each], deadline=BATCH_DEADLINE))
        except StoreError as error:
            # Everything stays as it is, in its order: ids are write-once, so sending the same twice does no harm.
            _log.debug("sending to the store failed: %s", error)
            if isinstance(error, LimitExceeded):
                self._limited()
            else:
                self._failures += 1
            self._pause()
            return
        self._failures, self._retry = 0, RETRY_SECONDS
        self._busy = len(batch) >= BUSY_OPERATIONS
        for write, operation in zip(batch, operations, strict=True):
            refused = isinstance(next(results), StoreError) if operation else False
            self._finish(write, "expired" if operation is None else "refused" if refused else "sent")
        with self._changed:
            self._drop_sent(len(batch))

    def _drop_sent(self, number: int) -> None:
        """Take so many out of the queue, which have ended; called with the lock."""
        for _ in range(number):
            write = self._queue.popleft()
            self._bytes -= _size(write)
            if write.value is None:
                self._removing.discard(write.key)
        self._batch = []
        self._finished += number
        self._changed.notify_all()

    def _finish(self, write: PendingWrite, outcome: str) -> None:
        """Count the outcome of a Put or Remove, and report it."""
        if write.value is not None:
            self._recorder.count("puts", "stored" if outcome == "sent" else outcome)
            return
        self._recorder.count("removals", write.reason if outcome == "sent" else outcome)
        with self._changed:
            self._removed[write.key] = outcome == "sent"
            if len(self._removed) > _MOST_REMOVED:
                with contextlib.suppress(RuntimeError):  # the garbage collector has ended a connection just now
                    self._removed.pop(next(iter(self._removed)), None)
        if write.report:
            write.report(outcome == "sent")

    def _pause(self) -> None:
        seconds, self._retry = self._retry, min(2 * self._retry, LONGEST_RETRY_SECONDS)
        with self._changed:
            closing = self._closing
            self._changed.wait_for(lambda: self._closing and not closing, seconds)

    def _seal_value(self, write: PendingWrite) -> PendingWrite:
        value = write.value
        return write if value is None else write._replace(value=self._seal(write.key, value, write.not_after))


def _size(write: PendingWrite) -> int:
    return _OVERHEAD + len(write.value or b"")


def _make_operation(write: PendingWrite, now: float) -> Operation | None:
    ttl = write.not_after - now
    if write.value is None:
        return Remove(write.key, max(ttl, 1.0) if write.lasting else None)
    return Put(write.key, write.value, ttl, write.issued) if ttl > 0 else None


_queues: weakref.WeakSet[WriteQueue] = weakref.WeakSet()


@atexit.register
def _flush_at_exit() -> None:
    end = time.monotonic() + EXIT_SECONDS
    for sender in list(_queues):
        sender.close(max(0.0, end - time.monotonic()))
