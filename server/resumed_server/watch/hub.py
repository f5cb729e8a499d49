"""Tells watchers what happens in their namespaces.

One thread reads the engine's log of changes for all watchers of this process, and makes one message for all who follow
the same namespace. Each watcher has a bounded queue: whoever does not keep up is cut off, and slows nobody down. A
watcher that comes back with a position reads what it missed from the log by itself before it joins.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from resumed_server.errors import Stopping
from resumed_server.periodic import Periodic
from resumed_server.storage.engine import EngineError, EngineUnavailable, Purged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.limits.enforcer import Budget
    from resumed_server.storage.engine import Change, Engine

MAX_WATCHERS = 256
"""Watchers that one process serves; each holds a thread of its own. Namespaces share them fairly."""
READ_SECONDS = 0.05
"""How often the log is read: on average, half of it is what a change is late by."""
HEARTBEAT_SECONDS = 1.0
"""How long a stream is silent at most."""
CURRENT_SECONDS = 1.0
"""How long ago the log was read, at most, when a quiet stream says that all has been told."""
READ_CHANGES = 1024
"""Changes that are read and sent at once, at most."""
CUT_SECONDS = 2.0
"""How long a watcher that was ended may take to go. One that does not read holds up whoever would tell it."""
QUEUED_MESSAGES = 64
"""Messages that a watcher may be behind, at most: some seconds at the pace of the log."""
QUEUED_BYTES = 4 << 20
"""What they may take together; a message alone may have more."""
ALL_QUEUED_BYTES = 64 << 20
"""What all messages that wait for some watcher of this process may take; one that waits for several counts once."""
CHANGE_BYTES = 256
"""What a change takes beside its key and value, roughly."""
MOST_CATCHING_UP = 2
"""How many watchers may read at once what they missed; each reads a part at a time. Others wait, but not those who are
told as it happens: an engine has room for more readers."""
LATE_SECONDS = 10.0
"""How long a message may wait for its watcher."""


class WatcherTooSlow(EngineError):
    """A watcher did not read what was sent to it."""


class TooManyWatchers(EngineError):
    """There are MAX_WATCHERS already, and others have fewer of them."""


class Message:
    """Changes of one namespace, where the log is behind them, and when they were read.

    Encoded once, by whoever sends it first.
    """

    __slots__ = ("changes", "encoded", "position", "size", "time")

    def __init__(self, changes: Sequence[Change | Purged], position: bytes, time: float) -> None:
        self.size = sum(map(_size, changes))
        self.changes = changes
        self.position = position
        self.time = time
        self.encoded: object = None


class State(NamedTuple):
    """How the watchers of a process are.

    Attributes:
        watchers: How many there are.
        lag: Seconds since the oldest change was read that some watcher has yet to be told, or since the log was last
            read, whichever is more.
        cut_off: How many did not keep up so far.
    """

    watchers: int
    lag: float
    cut_off: int


class Progress(NamedTuple):
    """How far the log has been told: all messages up to `position` are queued."""

    position: bytes
    time: float
    """When the log was asked for its end, by the clock of the watchers."""


class Subscription:
    """What one watcher still has to be told.

    Args:
        namespace: What it follows.
        progress: Returns how far the log has been told.
        clock: Seconds that only go forward.
        budgets: Those that it counts for.
        cut: Ends the call that it belongs to, from any thread.
    """

    def __init__(
        self,
        namespace: str,
        progress: Callable[[], Progress],
        clock: Callable[[], float],
        budgets: Sequence[Budget] = (),
        cut: Callable[[], object] = lambda: None,
    ) -> None:
        self.namespace = namespace
        self.holders = {budget.name for budget in budgets}
        self.cut = cut
        self.ended_at: float | None = None
        self.position = progress().position
        """Where the log was when the subscription began: nothing before that is in its messages."""
        self._progress, self._clock = progress, clock
        self._messages: queue.Queue[Message | None] = queue.Queue()
        self._end: EngineError | Stopping | None = None

    def tell(self, message: Message) -> None:
        """Queue a message, or end the subscription if its watcher does not keep up."""
        waiting = [each.size for each in self.waiting]
        if len(waiting) >= QUEUED_MESSAGES or (waiting and sum(waiting) + message.size > QUEUED_BYTES):
            self.end(WatcherTooSlow("a watcher did not read its messages"))
        elif not self._end:  # what comes after the end would only take memory
            self._messages.put(message)

    @property
    def waiting(self) -> list[Message]:
        """The messages that are not read yet."""
        with self._messages.mutex:
            return [each for each in self._messages.queue if each]

    @property
    def cut_off(self) -> bool:
        """Whether it ended because its watcher did not keep up."""
        return isinstance(self._end, WatcherTooSlow)

    def lag(self) -> float:
        """Return for how many seconds the oldest message has been waiting."""
        with self._messages.mutex:
            oldest = self._messages.queue[0] if self._messages.queue else None
        return self._clock() - oldest.time if oldest else 0.0

    def end(self, error: EngineError | Stopping) -> None:
        """Have the watcher end with `error`, whatever is queued: that is dropped."""
        self._end = error
        self.ended_at = self.ended_at or self._clock()
        with self._messages.mutex:
            self._messages.queue.clear()
        self._messages.put(None)

    def messages(self) -> Iterator[Message]:
        """Yield the messages as they come, and one without changes whenever HEARTBEAT_SECONDS passed without any.

        Raises:
            WatcherTooSlow: The watcher did not keep up, or nobody knows what happened meanwhile.
            EngineUnavailable: The log cannot be read.
            Stopping: The server is stopping.
        """
        while True:
            message = self._next()
            if self._end:
                raise self._end
            if message:
                yield message

    def _next(self) -> Message | None:
        with contextlib.suppress(queue.Empty):
            return self._messages.get(timeout=HEARTBEAT_SECONDS)
        told = self._progress()
        if not self._messages.empty():  # or all that was told up to then has been yielded
            return None
        if self._clock() - told.time > CURRENT_SECONDS:
            raise EngineUnavailable("the log of changes could not be read of late")
        return Message((), told.position, told.time)


class Watchers:
    """The watchers of one process, on `engine`; `clock` counts seconds that only go forward."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._lock = threading.Lock()
        self._catching_up = threading.Semaphore(MOST_CATCHING_UP)
        self._subscriptions: dict[Subscription, None] = {}  # in the order in which they came
        self._progress = Progress(b"", 0.0)
        self._closed = threading.Event()
        self._reading: Periodic | None = None
        self._cut_off = 0

    def state(self) -> State:
        """Return how the watchers are; waits for nobody, not even for storage that does not answer."""
        subscriptions = list(self._subscriptions)
        if not subscriptions:
            return State(0, 0.0, self._cut_off)
        unread = self._clock() - self._progress.time
        lag = max(unread - READ_SECONDS, *(each.lag() for each in subscriptions), 0.0)
        return State(len(subscriptions), lag, self._cut_off)

    @contextlib.contextmanager
    def subscribed(
        self, namespace: str, budgets: Sequence[Budget] = (), cut: Callable[[], object] = lambda: None
    ) -> Iterator[Subscription]:
        """Subscribe to a namespace for as long as the context lasts.

        Args:
            namespace: Which.
            budgets: What the watcher counts for.
            cut: Ends the watcher's call, from any thread: for one that does not read.

        Raises:
            LimitExceeded: One of the budgets has no room for it.
            TooManyWatchers: There are MAX_WATCHERS already, and this namespace has its share.
            EngineUnavailable: The engine does not answer.
            Stopping: The server is stopping.
        """
        with self._lock:
            if self._closed.is_set():
                raise Stopping
            for budget in budgets:
                budget.admit_watcher(sum(budget.name in each.holders for each in self._present()))
            self._make_room(namespace)
            if self._subscriptions:
                self._tell_all()  # so that the subscription begins at the present
            else:
                now = self._clock()
                self._progress = Progress(self._engine.position(), now)
            subscription = Subscription(namespace, lambda: self._progress, self._clock, budgets, cut)
            self._subscriptions[subscription] = None
            if self._reading is None:
                self._reading = Periodic("watchers", self._read, "changes cannot be read", retry=READ_SECONDS)
                self._reading.start()
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscriptions.pop(subscription, None)
                self._cut_off += subscription.cut_off

    def missed(self, after: bytes, subscription: Subscription) -> Iterator[Message]:
        """Yield what happened behind the position `after` until `subscription` began.

        The first message has no changes: it says that the log reaches back that far. Nothing is yielded if it does not.

        Raises:
            WatcherTooSlow: The log moved on meanwhile.
            EngineUnavailable: The engine does not answer.
        """
        until, position = subscription.position, after
        if (read := self._missed(position, until)) is None:
            return
        yield Message((), after, self._clock())
        while True:
            changes, position = read
            ours = [change for change in changes if change.namespace == subscription.namespace]
            if ours:
                yield Message(ours, position, self._clock())
            if position == until:
                return
            if (again := self._missed(position, until)) is None:
                raise WatcherTooSlow("the log of changes moved on while a watcher caught up")
            read = again

    def _missed(self, after: bytes, until: bytes) -> tuple[list[Change | Purged], bytes] | None:
        # When a server was started again, all its watchers come back at once, and look-ups need the engine as well.
        with self._catching_up:
            return self._engine.changes(after, until, READ_CHANGES)

    def close(self) -> None:
        """End all watchers, who may go on at another server."""
        if self._reading:
            self._reading.stop(0.0)
        with self._lock:
            self._closed.set()
            for subscription in self._subscriptions:
                subscription.end(Stopping())

    def _present(self) -> list[Subscription]:
        """Return those that have not been ended."""
        return [each for each in self._subscriptions if each.ended_at is None]

    def _make_room(self, namespace: str) -> None:
        """See to it that one more may watch `namespace`; called with the lock.

        Where there are as many as can be, the namespace that has most of them loses the one that came last.
        """
        present = self._present()
        if len(present) < MAX_WATCHERS:
            return
        counts = Counter(each.namespace for each in present)
        largest, most = counts.most_common(1)[0]
        if counts[namespace] + 1 >= most:
            raise TooManyWatchers(f"{MAX_WATCHERS} watchers are served already")
        last = next(each for each in reversed(present) if each.namespace == largest)
        last.end(TooManyWatchers("the place is needed for a namespace that has fewer watchers"))

    def _cut_late(self) -> None:
        """End those that do not read, and the calls of those that were ended and are still there; with the lock."""
        for subscription in self._present():
            if subscription.lag() > LATE_SECONDS:
                subscription.end(WatcherTooSlow("a watcher did not read its messages"))
        late = self._clock() - CUT_SECONDS
        for subscription in [each for each in self._subscriptions if each.ended_at and each.ended_at < late]:
            del self._subscriptions[subscription]
            subscription.cut()

    def _read(self) -> float:
        with self._lock:
            self._cut_late()
            if self._subscriptions:
                self._tell_all()
        return READ_SECONDS

    def _tell_all(self) -> None:
        """Tell every watcher what happened up to now; called with the lock."""
        now = self._clock()
        until = self._engine.position()
        while (position := self._progress.position) != until:
            read = self._engine.changes(position, until, READ_CHANGES)
            if read is None:  # this process did not keep up with the others, or the store is no longer the same
                for subscription in self._subscriptions:
                    subscription.end(WatcherTooSlow("the log of changes moved on, or is another one"))
                break
            changes, position = read
            by_namespace: dict[str, list[Change | Purged]] = {}
            for change in changes:
                by_namespace.setdefault(change.namespace, []).append(change)
            messages = {name: Message(ours, position, now) for name, ours in by_namespace.items()}
            for subscription in self._subscriptions:
                if subscription.namespace in messages:
                    subscription.tell(messages[subscription.namespace])
            self._progress = Progress(position, self._progress.time)
            self._bound_bytes()
        self._progress = Progress(until, now)

    def _bound_bytes(self) -> None:
        """End those who are most behind until all that waits takes no more than it may; called with the lock."""
        behind = {each: sum(message.size for message in each.waiting) for each in self._present()}
        if sum(behind.values()) <= ALL_QUEUED_BYTES:
            return
        for subscription in sorted(behind, key=behind.__getitem__, reverse=True):
            sizes = {message: message.size for each in self._present() for message in each.waiting}
            if sum(sizes.values()) <= ALL_QUEUED_BYTES:
                return
            subscription.end(WatcherTooSlow("a watcher did not read its messages, and others need the room"))


def _size(change: Change | Purged) -> int:
    """Return what a change takes in memory, roughly."""
    if isinstance(change, Purged):
        return CHANGE_BYTES
    return CHANGE_BYTES + len(change.key) + (len(change.session.value) if change.session else 0)
