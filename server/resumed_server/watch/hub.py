"""Fan out the engine's change log to Watch streams.

One thread reads the log for all watchers of this process, and creates one message for all watchers of a topic. Each
watcher has a bounded queue; a watcher that does not read is ended, and delays no other. A watcher that reconnects with
a position reads the changes that it missed from the log itself, before its queue. A watcher of removals without a
position first reads a snapshot from the engine, and then the changes since its beginning from the log.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from resumed_server.errors import Stopping
from resumed_server.periodic import PeriodicTask
from resumed_server.storage.engine import EngineError
from resumed_server.watch.subscription import LogPosition, Message, Subscription, Topic, WatcherTooSlow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.limits.enforcer import LimitState
    from resumed_server.storage.engine import Change, Engine, NamespacePurged

MAX_WATCHERS = 256
"""Maximum number of watchers of a process, each with a thread of its own. Namespaces share them fairly."""
READ_SECONDS = 0.05
"""Seconds between two reads of the log; on average, a change is delayed by half of it."""
READ_CHANGES = 1024
"""Maximum number of changes per read and per message."""
CANCEL_SECONDS = 2.0
"""Time for an ended watcher to leave. Then its call is cancelled: a client that does not read blocks its thread."""
STALL_SECONDS = 10.0
"""Maximum age of a message in the queue of a watcher."""
MAX_TOTAL_BYTES = 64 << 20
"""Maximum size of the messages in all queues of this process; one that is in several queues counts once."""
MAX_REPLAYS = 2
"""Maximum number of watchers that read missed changes at the same time. Others wait, but live watchers do not: the
engine serves more readers than these."""


class TooManyWatchers(EngineError):
    """The process has MAX_WATCHERS watchers, and other namespaces have fewer of them."""


class WatchStats(NamedTuple):
    """The state of the watchers of a process.

    Attributes:
        watchers: Number of watchers.
        lag: Age, in seconds, of the oldest message in a queue, or the time since the log was last read, whichever is
            greater.
        cut_off: Number of watchers that were ended, so far, because they did not read.
    """

    watchers: int
    lag: float
    cut_off: int


class WatchHub:
    """The watchers of one process, on `engine`; `clock` returns monotonic seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._lock = threading.Lock()
        self._replays = threading.Semaphore(MAX_REPLAYS)
        self._subscriptions: dict[Subscription, None] = {}  # by age
        self._progress = LogPosition(b"", 0.0)
        self._closed = threading.Event()
        self._reader: PeriodicTask | None = None
        self._cut_off = 0

    def stats(self) -> WatchStats:
        """Return the state of the watchers. It takes no lock, so storage that does not respond cannot block it."""
        subscriptions = list(self._subscriptions)
        if not subscriptions:
            return WatchStats(0, 0.0, self._cut_off)
        unread = self._clock() - self._progress.time
        lag = max(unread - READ_SECONDS, *(each.lag() for each in subscriptions), 0.0)
        return WatchStats(len(subscriptions), lag, self._cut_off)

    @contextlib.contextmanager
    def subscribe(
        self, topic: Topic, limits: Sequence[LimitState] = (), cancel_call: Callable[[], object] = lambda: None
    ) -> Iterator[Subscription]:
        """Subscribe to a topic until the context ends.

        Args:
            topic: The changes to receive.
            limits: The limits that count the watcher.
            cancel_call: Cancels the call of a watcher that does not read, from any thread.

        Raises:
            LimitExceeded: A limit allows no more watchers.
            TooManyWatchers: The process has MAX_WATCHERS watchers, and this namespace has its share.
            EngineUnavailable: The engine does not respond.
            Stopping: The server is stopping.
        """
        with self._lock:
            if self._closed.is_set():
                raise Stopping
            for limit in limits:
                limit.admit_watcher(sum(limit.subject in each.limit_subjects for each in self._active()))
            self._evict_one_if_full(topic.namespace)
            if self._subscriptions:
                self._publish()  # so that the subscription begins at the end of the log
            else:
                now = self._clock()
                self._progress = LogPosition(self._engine.position(), now)
            subscription = Subscription(topic, lambda: self._progress, self._clock, limits, cancel_call)
            self._subscriptions[subscription] = None
            if self._reader is None:
                self._reader = PeriodicTask("watch", self._read, "cannot read the change log", retry=READ_SECONDS)
                self._reader.start()
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscriptions.pop(subscription, None)
                self._cut_off += subscription.too_slow

    def replay(self, after: bytes, subscription: Subscription) -> Iterator[Message]:
        """Yield the changes after the position `after`, up to the beginning of `subscription`.

        The first message has no changes: it confirms that the log still contains `after`. Otherwise nothing is yielded.

        Raises:
            WatcherTooSlow: The log lost changes before they were read.
            EngineUnavailable: The engine does not respond.
        """
        until, topic = subscription.position, subscription.topic
        read = self._read_missed(after, until, topic)
        if not read:
            return
        yield Message((), after, self._clock())
        while read:
            changes, position = read
            ours = [change for change in changes if topic in Topic.all_of(change)]
            if ours:
                yield Message(ours, position, self._clock())
            if position == until:
                return
            read = self._read_missed(position, until, topic)
        raise WatcherTooSlow("the change log moved on while a watcher caught up")

    def snapshot(self, subscription: Subscription) -> Iterator[Message]:
        """Yield the last purge of the namespace, all lasting removals in force, and the changes in the meantime.

        Messages up to the last removals have no position. The log keeps the changes in the meantime, and the queue of
        `subscription` begins after them, so the time that the watcher takes does not matter as long as it reads.

        Raises:
            WatcherTooSlow: The log lost changes before they were read.
            EngineUnavailable: The engine does not respond.
        """
        start, namespace = subscription.position, subscription.topic.namespace
        subscription.paused_at = self._clock()
        with self._replays:
            purge = self._engine.last_purge(namespace)
        if purge:
            yield Message((purge,), b"", self._clock())
        parts = self._engine.removals(namespace, READ_CHANGES)
        while True:
            with self._replays:
                removals = next(parts, None)
            if removals is None:
                break
            subscription.raise_if_ended()
            subscription.paused_at = self._clock()
            if removals:
                yield Message(removals, b"", self._clock())
        with self._lock:
            self._publish()
            subscription.resume()
        missed = self.replay(start, subscription)
        if next(missed, None) is None:
            raise WatcherTooSlow("the change log moved on while a watcher read a snapshot")
        yield from missed

    def close(self) -> None:
        """End all watchers; they may continue at another server."""
        if self._reader:
            self._reader.stop(0.0)
        with self._lock:
            self._closed.set()
            for subscription in self._subscriptions:
                subscription.end(Stopping())

    def _read_missed(
        self, after: bytes, until: bytes, topic: Topic
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        # After a restart of the server all its watchers reconnect at once, and look-ups need the engine as well.
        with self._replays:
            return self._engine.changes(after, until, READ_CHANGES, removals_only=topic.removals_only)

    def _active(self) -> list[Subscription]:
        """Return the subscriptions that have not been ended."""
        return [each for each in self._subscriptions if each.ended_at is None]

    def _evict_one_if_full(self, namespace: str) -> None:
        """Make room for one more watcher of `namespace`; the caller holds the lock.

        The namespace with most watchers loses its youngest one.
        """
        active = self._active()
        if len(active) < MAX_WATCHERS:
            return
        counts = Counter(each.topic.namespace for each in active)
        largest, most = counts.most_common(1)[0]
        if counts[namespace] + 1 >= most:
            raise TooManyWatchers(f"the process has its maximum of {MAX_WATCHERS} watchers")
        youngest = next(each for each in reversed(active) if each.topic.namespace == largest)
        youngest.end(TooManyWatchers("a namespace with fewer watchers needs the place"))

    def _cancel_stalled(self) -> None:
        """End watchers that do not read, and cancel the calls of ended ones that remain; the caller holds the lock."""
        for subscription in self._active():
            if subscription.lag() > STALL_SECONDS:
                subscription.end(WatcherTooSlow("a watcher did not read its messages"))
        latest = self._clock() - CANCEL_SECONDS
        for subscription in [each for each in self._subscriptions if each.ended_at and each.ended_at < latest]:
            del self._subscriptions[subscription]
            subscription.cancel_call()

    def _read(self) -> float:
        with self._lock:
            self._cancel_stalled()
            if self._subscriptions:
                self._publish()
        return READ_SECONDS

    def _publish(self) -> None:
        """Queue all changes up to the end of the log; the caller holds the lock."""
        now = self._clock()
        removals_only = all(each.topic.removals_only for each in self._subscriptions)
        until = self._engine.position()
        while (position := self._progress.position) != until:
            read = self._engine.changes(position, until, READ_CHANGES, removals_only=removals_only)
            if read is None:  # the log dropped changes that this process had not read, or it is another log
                for subscription in self._subscriptions:
                    subscription.end(WatcherTooSlow("the change log moved on, or was replaced"))
                break
            changes, position = read
            by_topic: dict[Topic, list[Change | NamespacePurged]] = {}
            for change in changes:
                for topic in Topic.all_of(change):
                    by_topic.setdefault(topic, []).append(change)
            messages = {topic: Message(ours, position, now) for topic, ours in by_topic.items()}
            for subscription in self._subscriptions:
                if subscription.topic in messages:
                    subscription.enqueue(messages[subscription.topic])
            self._progress = LogPosition(position, self._progress.time)
            self._bound_total_bytes()
        self._progress = LogPosition(until, now)

    def _bound_total_bytes(self) -> None:
        """End the watchers with the fullest queues until MAX_TOTAL_BYTES suffice; the caller holds the lock."""
        sizes = {each: sum(message.size for message in each.unread_messages) for each in self._active()}
        if sum(sizes.values()) <= MAX_TOTAL_BYTES:
            return
        for subscription in sorted(sizes, key=sizes.__getitem__, reverse=True):
            messages = {message: message.size for each in self._active() for message in each.unread_messages}
            if sum(messages.values()) <= MAX_TOTAL_BYTES:
                return
            subscription.end(WatcherTooSlow("a watcher did not read its messages, and others need the memory"))
