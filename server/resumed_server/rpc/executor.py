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
from resumed_server.rpc._grpcio_private import HandlerArgs
from resumed_server.rpc.delay_queue import DelayedRejection, DelayQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

MESSAGE_TIMEOUT_SECONDS = 5.0
"""How long after its headers a call's message may come."""
MAX_AWAITING_MESSAGE = 1_024
"""Calls that may wait for their messages; beyond that the oldest is cancelled. Almost always both come at once."""
log = structlog.get_logger()


class LoadObserver(Protocol):
    """Is told how busy a pool is."""

    def on_wait(self, seconds: float, /) -> None:
        """Note how long a call waited for a thread, from when its message was there."""

    def on_rejection(self) -> None:
        """Note a call that came while as many as may be were under way."""


class NullLoadObserver:
    """A load that nobody wants to know."""

    def on_wait(self, _seconds: float) -> None:
        """See LoadObserver."""

    def on_rejection(self) -> None:
        """See LoadObserver."""


class ConcurrencyLimit(int):
    """How many calls may be under way: grpcio compares with it, turns away what is beyond, and says so to nobody."""

    load: LoadObserver

    def __new__(cls, number: int, load: LoadObserver) -> Self:
        """Tell `load` of each call beyond so many."""
        most = super().__new__(cls, number)
        most.load = load
        return most

    def __le__(self, in_flight: int) -> bool:
        """Return whether a call that comes now is turned away: what Python makes of `in_flight >= most`."""
        full = super().__le__(in_flight)
        if full:
            self.load.on_rejection()
        return full


class CallExecutor(Executor):
    """Runs calls on a fixed number of threads, which do not keep the process from ending.

    Calls of a behaviour that has `threads`, an executor of its own, run there. Of calls that wait for their messages
    there are `max_awaiting_message` at most.
    """

    def __init__(
        self, threads: int, max_awaiting_message: int = MAX_AWAITING_MESSAGE, load: LoadObserver | None = None
    ) -> None:
        self._threads, self._max_awaiting_message, self._load = (
            threads,
            max_awaiting_message,
            load or NullLoadObserver(),
        )
        self._calls: queue.SimpleQueue[PendingCall | None] = queue.SimpleQueue()
        self._awaiting_message: dict[
            PendingCall, float
        ] = {}  # calls without a message, since when; only grpcio's thread is here
        self._delay_queue = DelayQueue()
        self._open: set[PendingCall] = set()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"call-{number}", daemon=True).start()

    @property
    def in_flight(self) -> int:
        """How many calls have come and are not over."""
        return len(self._open)

    @property
    def awaiting_message(self) -> int:
        """How many of them wait for their messages, and so hold no thread."""
        return len(self._awaiting_message)

    def submit(self, function: Callable[..., object], /, *arguments: Any) -> PendingCall:  # type: ignore[override] # no Future
        """Queue a call, as soon as its message has come."""
        call = PendingCall(function, arguments)
        self._open.add(call)
        if call.answering and call.answering.awaits_message:
            self._receive(call)
        else:
            self._queue(call)
        return call

    def _receive(self, call: PendingCall) -> None:
        """Ask for the message of a call, and queue the call when it is there. For grpcio's own thread."""

        def arrived() -> None:
            self._awaiting_message.pop(call, None)
            self._queue(call)

        call.receive(arrived)
        now = self._awaiting_message[call] = time.monotonic()
        # Whoever comes next sees to those that are late; while nobody comes they are in nobody's way.
        oldest, since = next(iter(self._awaiting_message.items()))
        if now - since > MESSAGE_TIMEOUT_SECONDS or len(self._awaiting_message) > self._max_awaiting_message:
            del self._awaiting_message[oldest]
            cast("HandlerArgs", oldest.answering).cancel()

    def _queue(self, call: PendingCall) -> None:
        if call.threads:
            call.threads.submit(self._run, call)
        else:
            call.queued_at = time.perf_counter()
            self._calls.put(call)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End the threads when they have answered what is there, without waiting for it."""
        for _ in range(self._threads):
            self._calls.put(None)
        self._delay_queue.close()

    def _work(self) -> None:
        while call := self._calls.get():
            self._load.on_wait(time.perf_counter() - call.queued_at)
            self._run(call)

    def _run(self, call: PendingCall) -> None:
        held = call.run()
        if not held:
            self._open.discard(call)
        else:
            self._delay_queue.schedule(held.seconds, lambda: self._queue(call))


class PendingCall:
    """As much of a Future as grpcio uses."""

    __slots__ = ("_arguments", "_callbacks", "_done", "_function", "answering", "queued_at", "threads")

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._callbacks: list[Callable[[PendingCall], object]] = []
        self._done = False
        self.queued_at = 0.0
        self.answering = HandlerArgs.parse(arguments)
        self.threads: Executor | None = self.answering and getattr(self.answering.behaviour, "threads", None)

    def receive(self, arrived: Callable[[], object]) -> None:
        """Ask for the call's message; call `arrived` when it is there, or will never be."""
        self._arguments = cast("HandlerArgs", self.answering).start_receiving(arrived)

    def run(self) -> DelayedRejection | None:
        """Answer the call; if it is to be refused later, return how, and run again then."""
        try:
            self._function(*self._arguments)
        except DelayedRejection as held:
            refuse = held.refuse
            self._arguments = cast("HandlerArgs", self.answering)._replace(
                behaviour=lambda _request, context: refuse(context), request=lambda: b""
            )
            return held
        except BaseException as error:  # noqa: BLE001 - a thread that ends here would be missed for ever
            log.critical("call failed", **described(error))
        self._done = True
        self._tell()
        return None

    def add_done_callback(self, callback: Callable[[PendingCall], object]) -> None:
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
