"""What one worker tells of itself: what it counted, and how it, its engine and its watchers are."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from resumed_server.errors import described
from resumed_server.observability.metrics.instrumented_engine import CountedEngine
from resumed_server.observability.metrics.recorder import Recorder
from resumed_server.storage.engine import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resumed_server.observability.metrics.shared_segment import Board
    from resumed_server.storage.engine import Engine
    from resumed_server.storage.expiry import Sweeper
    from resumed_server.watch.hub import WatchHub

REPORT_SECONDS = 0.2
"""How often figures are pinned: rates over some seconds are right to a few percent then."""
USAGE_SECONDS = 2.0
"""How often the engine is asked what it holds."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_log = structlog.get_logger()


class Metrics:
    """The figures of one worker.

    Args:
        board: Where they are pinned.
        worker: Its number, from 0.
        engine: The storage.
        clock: Seconds that only go forward, the same for all processes of this machine.

    Attributes:
        recorder: Told of every call.
        engine: The storage, with what is done in it counted.
        ready: Whether the storage answered when it was asked last.
        expires: When the server's certificate does, in Unix seconds; None without TLS.
    """

    def __init__(self, board: Board, worker: int, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._board, self._worker, self._storage, self._clock = board, worker, engine, clock
        self.recorder = Recorder(board.admit)
        self.engine = CountedEngine(engine, self.recorder)
        self.ready = False
        self.expires: float | None = None
        self._stopping = threading.Event()
        self._started = time.time()
        self._usage: dict[str, int] = {}
        self._asked = float("-inf")
        before = board.read(worker)
        self._before: dict[str, float] = before["totals"] if before else {}
        if before:
            self.recorder.restore(before["recorded"])

    @contextlib.contextmanager
    def reporting(self, watchers: WatchHub, sweeper: Sweeper) -> Iterator[None]:
        """Keep the figures on the board current, in a thread, for as long as the context lasts."""

        def run() -> None:
            while True:
                stopping = self._stopping.wait(REPORT_SECONDS)
                try:
                    self.report(watchers, sweeper)
                except Exception as error:  # noqa: BLE001 - the next time it may work, and serving goes on anyway
                    _log.error("metrics cannot be reported", **described(error))
                if stopping:
                    return

        thread = threading.Thread(target=run, name="metrics-report", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    def report(self, watchers: WatchHub, sweeper: Sweeper) -> None:
        """Pin the present figures to the board."""
        state = watchers.stats()
        totals = {
            "evicted": self._storage.evicted,
            "swept": sweeper.swept,
            "watchers_cut_off": state.cut_off,
            "cpu_seconds": time.process_time(),
        }
        figures: dict[str, Any] = {
            "pid": os.getpid(),
            "started": self._started,
            "pinned": self._clock(),
            "ready": self.ready,
            "expires": self.expires,
            "watchers": state.watchers,
            "watchers_lag": state.lag,
            "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES,
            "usage": self._usage_of_late() if self.ready else self._usage,
            "totals": {name: total + self._before.get(name, 0) for name, total in totals.items()},
            "recorded": self.recorder.snapshot(),
        }
        self._board.pin(self._worker, figures)

    def _usage_of_late(self) -> dict[str, int]:
        now = self._clock()
        if now - self._asked >= USAGE_SECONDS:
            self._asked = now
            try:
                usage = self._storage.totals()
            except EngineError:
                return self._usage  # health tells, if it lasts
            self._usage = {"sessions": usage.sessions, "bytes": usage.bytes, "evicted": usage.evicted}
        return self._usage
