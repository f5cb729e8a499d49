"""The threads that answer calls.

grpcio hands every call to an executor, and has the thread that takes it wait for the call's message. A client that
opens calls and sends nothing would so hold all threads. Here a call is queued when its message is there; whoever sends
none holds no thread, and is cancelled after a while, or sooner where too many do so.

`ThreadPoolExecutor` makes a whole future of a call, with a lock and a condition: about a tenth of what a call costs in
all (docs/performance/server.md). grpcio wants nothing back but to hear when it is over.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Protocol, cast

import structlog

from resumed_server.errors import described
from resumed_server.rpc._grpcio_private import Answering
from resumed_server.rpc.delay_queue import Held, Later

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

MESSAGE_SECONDS = 5.0
"""How long after its headers a call's message may come."""
MOST_WITHOUT_MESSAGE = 1_024
"""Calls that may wait for their messages; beyond that the oldest is cancelled. Almost always both come at once."""
log = structlog.get_logger()


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
