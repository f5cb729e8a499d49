"""The thread pool of calls, which protects against calls that never send a message.

grpcio passes every call to an executor, and its thread waits for the message of the call. So clients that open calls
and send nothing would occupy all threads. Here a call is queued when its message arrives. A call without a message
occupies no thread; it is cancelled after MESSAGE_TIMEOUT_SECONDS, or earlier if too many calls wait.

`ThreadPoolExecutor` creates a future with a lock and a condition for each call, about a tenth of the cost of a call
(benchmarks/results/server.md). grpcio only needs a notification when the call ends.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Protocol, cast

import structlog

from resumed_server.errors import exception_fields
from resumed_server.rpc._grpcio_private import HandlerArgs
from resumed_server.rpc.delay_queue import DelayedRejection, DelayQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

MESSAGE_TIMEOUT_SECONDS = 5.0
"""Maximum time from the headers of a call to its message."""
MAX_AWAITING_MESSAGE = 1_024
"""Maximum number of calls without a message; beyond it the oldest is cancelled. Headers and message usually arrive
together."""
GIVEN_UP_SECONDS = 2.5, 5.0
"""Range of the seconds for which a call stays open that its client gave up while it was in the queue.

It takes one of the calls that the connection may have in flight. Otherwise a client that gives up and calls again would
send as many calls as the server can receive, and no limit would count them. The time is random, so that not all of them
end at the same moment.
"""

log = structlog.get_logger()


class LoadObserver(Protocol):
    """Is notified of the load of an executor."""

    def on_wait(self, seconds: float, /) -> None:
        """Record the time that a call waited for a thread after its message arrived."""

    def on_rejection(self) -> None:
        """Record a call that gRPC rejected because of too many calls in flight."""


class NullLoadObserver:
    """A load observer that records nothing."""

    def on_wait(self, _seconds: float) -> None:
        """See LoadObserver."""

    def on_rejection(self) -> None:
        """See LoadObserver."""


class ConcurrencyLimit(int):
    """Maximum number of calls in flight. grpcio compares with it, and rejects calls beyond it without a notification.

    Args:
        number: The maximum.
        load: Is notified of rejected calls.
    """

    _load: LoadObserver

    def __new__(cls, number: int, load: LoadObserver) -> Self:
        """Create the number."""
        limit = super().__new__(cls, number)
        limit._load = load
        return limit

    def __le__(self, in_flight: int) -> bool:
        """Return whether grpcio rejects a call: Python evaluates its `in_flight >= limit` as `limit <= in_flight`."""
        full = super().__le__(in_flight)
        if full:
            self._load.on_rejection()
        return full


class CallExecutor(Executor):
    """Runs calls in a fixed number of daemon threads.

    A method with an attribute `executor`, an executor of its own, runs there instead.

    Args:
        threads: The number of threads.
        max_awaiting_message: Maximum number of calls without a message.
        load: Is notified of waiting times.
    """

    def __init__(
        self, threads: int, max_awaiting_message: int = MAX_AWAITING_MESSAGE, load: LoadObserver | None = None
    ) -> None:
        self._threads, self._load = threads, load or NullLoadObserver()
        self._max_awaiting_message = max_awaiting_message
        self._calls: queue.SimpleQueue[PendingCall | None] = queue.SimpleQueue()
        self._awaiting_message: dict[PendingCall, float] = {}  # by time of arrival; used by grpcio's thread only
        self._delay_queue = DelayQueue()
        self._in_flight: set[PendingCall] = set()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"call-{number}", daemon=True).start()

    @property
    def in_flight(self) -> int:
        """Number of calls that have not ended."""
        return len(self._in_flight)

    @property
    def awaiting_message(self) -> int:
        """Number of calls that wait for their message, without a thread."""
        return len(self._awaiting_message)

    def submit(self, function: Callable[..., object], /, *arguments: Any) -> PendingCall:  # type: ignore[override] # no Future
        """Queue a call when its message arrives."""
        call = PendingCall(function, arguments)
        self._in_flight.add(call)
        if call.handler and call.handler.awaits_message:
            self._receive(call)
        else:
            self._queue(call)
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End the threads after the calls in the queue; return at once."""
        for _ in range(self._threads):
            self._calls.put(None)
        self._delay_queue.close()

    def _receive(self, call: PendingCall) -> None:
        """Start to receive the message of a call, and queue the call when it arrives. Runs in grpcio's thread."""

        def on_arrival() -> None:
            self._awaiting_message.pop(call, None)
            self._queue(call)

        call.start_receiving(on_arrival)
        now = self._awaiting_message[call] = time.monotonic()
        # Expired calls are cancelled when the next call arrives. Without new calls they occupy no needed resource.
        oldest, since = next(iter(self._awaiting_message.items()))
        if now - since > MESSAGE_TIMEOUT_SECONDS or len(self._awaiting_message) > self._max_awaiting_message:
            del self._awaiting_message[oldest]
            cast("HandlerArgs", oldest.handler).cancel()

    def _queue(self, call: PendingCall) -> None:
        if call.executor:
            call.executor.submit(self._run, call)
        else:
            call.queued_at = time.perf_counter()
            self._calls.put(call)

    def _work(self) -> None:
        while call := self._calls.get():
            self._load.on_wait(time.perf_counter() - call.queued_at)
            self._run(call)

    def _run(self, call: PendingCall) -> None:
        delay = call.run()
        if delay:
            self._delay_queue.schedule(delay, lambda: self._queue(call))
        else:
            self._in_flight.discard(call)


class PendingCall:
    """A call in flight, with the part of a Future that grpcio uses."""

    __slots__ = ("_arguments", "_callbacks", "_delayed", "_done", "_function", "executor", "handler", "queued_at")

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._callbacks: list[Callable[[PendingCall], object]] = []
        self._delayed = self._done = False
        self.queued_at = 0.0
        self.handler = HandlerArgs.parse(arguments)
        self.executor: Executor | None = self.handler and getattr(self.handler.behaviour, "executor", None)

    def start_receiving(self, on_arrival: Callable[[], object]) -> None:
        """Start to receive the message; call `on_arrival` when it has arrived, or cannot arrive any more."""
        self._arguments = cast("HandlerArgs", self.handler).start_receiving(on_arrival)

    def run(self) -> float:
        """Execute the call; return 0, or the seconds after which to call this once more, which ends the call."""
        if self.handler and not self._delayed and self.handler.is_given_up():
            self._delayed = True
            return random.uniform(*GIVEN_UP_SECONDS)  # noqa: S311 - no secret
        try:
            self._function(*self._arguments)
        except DelayedRejection as rejection:
            reject = rejection.reject
            self._delayed = True
            self._arguments = cast("HandlerArgs", self.handler)._replace(
                behaviour=lambda _request, context: reject(context), request=lambda: b""
            )
            return rejection.seconds
        except BaseException as error:  # noqa: BLE001 - the thread must serve the next call
            log.critical("call failed", **exception_fields(error))
        self._done = True
        self._run_callbacks()
        return 0.0

    def add_done_callback(self, callback: Callable[[PendingCall], object]) -> None:
        """Call `callback` when the call has ended."""
        self._callbacks.append(callback)
        if self._done:
            self._run_callbacks()

    def _run_callbacks(self) -> None:
        """Run each callback once, even if two threads call this at the same time: `pop` is atomic."""
        while self._callbacks:
            try:
                callback = self._callbacks.pop()
            except IndexError:  # the other thread was faster
                return
            callback(self)
