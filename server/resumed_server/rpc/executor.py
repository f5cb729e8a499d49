"""The threads that answer calls.

grpcio hands every call to an executor, and has the thread that takes it wait for the call's message. A client that
opens calls and sends nothing would so hold all threads. Here a call is queued when its message is there; whoever sends
none holds no thread, and is cancelled after a while, or sooner where too many do so.

`ThreadPoolExecutor` makes a whole future of a call, with a lock and a condition: about a tenth of what a call costs in
all (benchmarks/results/server.md). grpcio wants nothing back but to hear when it is over.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import structlog

from resumed_server.errors import described
from resumed_server.rpc._grpcio_private import Answering

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from typing_extensions import Self

MESSAGE_SECONDS = 5.0
"""How long after its headers a call's message may come."""
MOST_WITHOUT_MESSAGE = 1_024
"""Calls that may wait for their messages; beyond that the oldest is cancelled. Almost always both come at once."""
MOST_HELD = 3_072
"""Refusals that are held back at the same time; beyond that the next one leaves. Fewer than a server has calls.

They are held even if their clients have given up: until then gRPC's core refuses further streams of the connection, at
a small part of what a call costs that gets here.
"""

log = structlog.get_logger()


class Held(BaseException):
    """A call is refused, but only later, so that whoever makes calls regardless is not answered as fast as they ask.

    It is no Exception: grpcio would answer those.

    Attributes:
        seconds: When.
        refuse: Aborts the call, given its context.
    """

    def __init__(self, seconds: float, refuse: Callable[[grpc.ServicerContext], NoReturn]) -> None:
        super().__init__()
        self.seconds = seconds
        self.refuse = refuse


class Load(Protocol):
    """Is told how busy a pool is."""

    def waited(self, seconds: float, /) -> None:
        """Note how long a call waited for a thread, from when its message was there."""

    def turned_away(self) -> None:
        """Note a call that came while as many as may be were under way."""


class Unmeasured:
    """A load that nobody wants to know."""

    def waited(self, _seconds: float) -> None:
        """See Load."""

    def turned_away(self) -> None:
        """See Load."""


class Most(int):
    """How many calls may be under way: grpcio compares with it, turns away what is beyond, and says so to nobody."""

    load: Load

    def __new__(cls, number: int, load: Load) -> Self:
        """Tell `load` of each call beyond so many."""
        most = super().__new__(cls, number)
        most.load = load
        return most

    def __le__(self, under_way: int) -> bool:
        """Return whether a call that comes now is turned away: what Python makes of `under_way >= most`."""
        full = super().__le__(under_way)
        if full:
            self.load.turned_away()
        return full


class Later:
    """Does things after a while, in a thread of its own that starts with the first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._todo: list[tuple[float, int, Callable[[], object]]] = []
        self._closed = False
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Do `action` in `seconds`. If there is too much to do, what is to be done next is done now."""
        with self._changed:
            heapq.heappush(self._todo, (self._clock() + seconds, next(self._numbers), action))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="later", daemon=True)
                self._thread.start()
            self._changed.notify()
            early = heapq.heappop(self._todo)[2] if len(self._todo) > MOST_HELD else None
        if early:
            _do(early)

    def close(self) -> None:
        """End the thread; what is still to be done is not."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._todo or self._todo[0][0] > self._clock()):
                    self._changed.wait(self._todo[0][0] - self._clock() if self._todo else None)
                if self._closed:
                    return
                _, _, action = heapq.heappop(self._todo)
            _do(action)


class CallPool(Executor):
    """Runs calls on a fixed number of threads, which do not keep the process from ending.

    Calls of a behaviour that has `threads`, an executor of its own, run there. Of calls that wait for their messages
    there are `most_silent` at most.
    """

    def __init__(self, threads: int, most_silent: int = MOST_WITHOUT_MESSAGE, load: Load | None = None) -> None:
        self._threads, self._most_silent, self._load = threads, most_silent, load or Unmeasured()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._silent: dict[_Call, float] = {}  # calls without a message, since when; only grpcio's thread is here
        self._later = Later()
        self._open: set[_Call] = set()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"call-{number}", daemon=True).start()

    @property
    def under_way(self) -> int:
        """How many calls have come and are not over."""
        return len(self._open)

    @property
    def silent(self) -> int:
        """How many of them wait for their messages, and so hold no thread."""
        return len(self._silent)

    def submit(self, function: Callable[..., object], /, *arguments: Any) -> _Call:  # type: ignore[override] # no Future
        """Queue a call, as soon as its message has come."""
        call = _Call(function, arguments)
        self._open.add(call)
        if call.answering and call.answering.waits_for_message:
            self._receive(call)
        else:
            self._queue(call)
        return call

    def _receive(self, call: _Call) -> None:
        """Ask for the message of a call, and queue the call when it is there. For grpcio's own thread."""

        def arrived() -> None:
            self._silent.pop(call, None)
            self._queue(call)

        call.receive(arrived)
        now = self._silent[call] = time.monotonic()
        # Whoever comes next sees to those that are late; while nobody comes they are in nobody's way.
        oldest, since = next(iter(self._silent.items()))
        if now - since > MESSAGE_SECONDS or len(self._silent) > self._most_silent:
            del self._silent[oldest]
            cast("Answering", oldest.answering).cancel()

    def _queue(self, call: _Call) -> None:
        if call.threads:
            call.threads.submit(self._run, call)
        else:
            call.queued_at = time.perf_counter()
            self._calls.put(call)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End the threads when they have answered what is there, without waiting for it."""
        for _ in range(self._threads):
            self._calls.put(None)
        self._later.close()

    def _work(self) -> None:
        while call := self._calls.get():
            self._load.waited(time.perf_counter() - call.queued_at)
            self._run(call)

    def _run(self, call: _Call) -> None:
        held = call.run()
        if not held:
            self._open.discard(call)
        else:
            self._later.after(held.seconds, lambda: self._queue(call))


class _Call:
    """As much of a Future as grpcio uses."""

    __slots__ = ("_arguments", "_callbacks", "_done", "_function", "answering", "queued_at", "threads")

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._callbacks: list[Callable[[_Call], object]] = []
        self._done = False
        self.queued_at = 0.0
        self.answering = Answering.of(arguments)
        self.threads: Executor | None = self.answering and getattr(self.answering.behaviour, "threads", None)

    def receive(self, arrived: Callable[[], object]) -> None:
        """Ask for the call's message; call `arrived` when it is there, or will never be."""
        self._arguments = cast("Answering", self.answering).receiving(arrived)

    def run(self) -> Held | None:
        """Answer the call; if it is to be refused later, return how, and run again then."""
        try:
            self._function(*self._arguments)
        except Held as held:
            refuse = held.refuse
            self._arguments = cast("Answering", self.answering)._replace(
                behaviour=lambda _request, context: refuse(context), request=lambda: b""
            )
            return held
        except BaseException as error:  # noqa: BLE001 - a thread that ends here would be missed for ever
            log.critical("call failed", **described(error))
        self._done = True
        self._tell()
        return None

    def add_done_callback(self, callback: Callable[[_Call], object]) -> None:
        self._callbacks.append(callback)
        if self._done:
            self._tell()

    def _tell(self) -> None:
        """Run what waits for the end; `pop` is atomic, so each runs once whoever comes here first."""
        while self._callbacks:
            try:
                callback = self._callbacks.pop()
            except IndexError:  # the other thread was faster
                return
            callback(self)


def _do(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - a thread that ends here would be missed for ever
        log.critical("call failed", **described(error))
