"""The queue of one Watch stream."""

from __future__ import annotations

import contextlib
import queue
from typing import TYPE_CHECKING, NamedTuple

from resumed_server.storage.engine import EngineError, EngineUnavailable, NamespacePurged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.errors import Stopping
    from resumed_server.limits.enforcer import LimitState
    from resumed_server.storage.engine import Change

HEARTBEAT_SECONDS = 1.0
"""Maximum time without a message on a stream."""
MAX_LOG_AGE_SECONDS = 1.0
"""A heartbeat reports that the stream is complete only if the change log was read within this time."""
MAX_QUEUED_MESSAGES = 64
"""Maximum number of messages in the queue of a watcher: some seconds of a busy log."""
MAX_QUEUED_BYTES = 4 << 20
"""Maximum size of the messages in the queue of a watcher; a single message may be larger."""
CHANGE_BYTES = 256
"""Approximate memory of a change, in addition to its key and value."""


class WatcherTooSlow(EngineError):
    """A watcher did not read its messages."""


class Topic(NamedTuple):
    """The changes that a watcher receives: those of a namespace, or only its lasting removals and purges."""

    namespace: str
    removals_only: bool = False

    @classmethod
    def all_of(cls, change: Change | NamespacePurged) -> tuple[Topic, ...]:
        """Return the topics that a change belongs to."""
        everything = cls(change.namespace)
        if isinstance(change, NamespacePurged) or change.ttl is not None:
            return everything, cls(change.namespace, removals_only=True)
        return (everything,)


class Message:
    """Changes of one topic, the position of the log after them, and the time at which they were read.

    The first watcher that sends it encodes it, for all watchers of the topic.
    """

    __slots__ = ("changes", "encoded", "position", "size", "time")

    def __init__(self, changes: Sequence[Change | NamespacePurged], position: bytes, time: float) -> None:
        self.size = sum(map(_size, changes))
        self.changes = changes
        self.position = position
        self.time = time
        self.encoded: object = None


class LogPosition(NamedTuple):
    """The position up to which all messages are in the queues of their watchers."""

    position: bytes
    time: float
    """The time at which this was the end of the log, by the clock of the hub."""


class Subscription:
    """A watcher of one topic.

    Args:
        topic: The changes that it receives.
        progress: Returns the position up to which messages are queued.
        clock: Monotonic seconds.
        limits: The limits that count this watcher.
        cancel_call: Cancels the call of the watcher, from any thread.

    Attributes:
        position: The end of the log when the queue began; its messages contain the changes after it.
        paused_at: While the queue is paused, so that it takes no messages, the time of the last progress; else None.
        ended_at: The time at which it was ended, None before.
    """

    def __init__(
        self,
        topic: Topic,
        progress: Callable[[], LogPosition],
        clock: Callable[[], float],
        limits: Sequence[LimitState] = (),
        cancel_call: Callable[[], object] = lambda: None,
    ) -> None:
        self.topic = topic
        self.limit_subjects = {limit.subject for limit in limits}
        self.cancel_call = cancel_call
        self.ended_at: float | None = None
        self.paused_at: float | None = None
        self.position = progress().position
        self._progress, self._clock = progress, clock
        self._messages: queue.Queue[Message | None] = queue.Queue()
        self._error: EngineError | Stopping | None = None

    def enqueue(self, message: Message) -> None:
        """Queue a message unless the queue is paused; end the subscription instead if its queue is full."""
        if self.paused_at is not None:
            return
        sizes = [each.size for each in self.unread_messages]
        if len(sizes) >= MAX_QUEUED_MESSAGES or (sizes and sum(sizes) + message.size > MAX_QUEUED_BYTES):
            self.end(WatcherTooSlow("a watcher did not read its messages"))
        elif not self._error:  # after the end, a message would only use memory
            self._messages.put(message)

    @property
    def unread_messages(self) -> list[Message]:
        """The messages that the watcher has not read."""
        with self._messages.mutex:
            return [each for each in self._messages.queue if each]

    @property
    def too_slow(self) -> bool:
        """Whether it was ended because the watcher did not read its messages."""
        return isinstance(self._error, WatcherTooSlow)

    def lag(self) -> float:
        """Return the age of the oldest message in the queue, in seconds; 0.0 if it is empty.

        While the queue is paused, return the time since the last progress.
        """
        if (paused_at := self.paused_at) is not None:
            return self._clock() - paused_at
        with self._messages.mutex:
            oldest = self._messages.queue[0] if self._messages.queue else None
        return self._clock() - oldest.time if oldest else 0.0

    def resume(self) -> None:
        """Let the queue, which was paused, begin anew at the present position; the caller holds the lock of the hub."""
        with self._messages.mutex:
            self._messages.queue.clear()
        self.position, self.paused_at = self._progress().position, None

    def raise_if_ended(self) -> None:
        """Raise the error with which the subscription was ended, if it was."""
        if self._error:
            raise self._error

    def end(self, error: EngineError | Stopping) -> None:
        """Drop the messages in the queue, and let the watcher end with `error`."""
        self._error = error
        self.ended_at = self.ended_at or self._clock()
        with self._messages.mutex:
            self._messages.queue.clear()
        self._messages.put(None)

    def messages(self) -> Iterator[Message]:
        """Yield messages as they arrive; after HEARTBEAT_SECONDS without one, yield a message without changes.

        Raises:
            WatcherTooSlow: The watcher did not read its messages, or the log lost changes before they were read.
            EngineUnavailable: The log cannot be read.
            Stopping: The server is stopping.
        """
        while True:
            message = self._next()
            self.raise_if_ended()
            if message:
                yield message

    def _next(self) -> Message | None:
        with contextlib.suppress(queue.Empty):
            return self._messages.get(timeout=HEARTBEAT_SECONDS)
        log = self._progress()
        if not self._messages.empty():  # a heartbeat must follow all messages up to its position
            return None
        if self._clock() - log.time > MAX_LOG_AGE_SECONDS:
            raise EngineUnavailable("the change log could not be read in time")
        return Message((), log.position, log.time)


def _size(change: Change | NamespacePurged) -> int:
    """Return the approximate memory of a change."""
    if isinstance(change, NamespacePurged):
        return CHANGE_BYTES
    return CHANGE_BYTES + len(change.key) + (len(change.session.value) if change.session else 0)
