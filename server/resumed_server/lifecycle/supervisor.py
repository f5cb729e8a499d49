"""A supervisor of worker processes: it forks them, replaces those that end, and stops them together.

Signals are blocked and received by sigwait(), so no signal handler interrupts the code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import structlog

from resumed_server.errors import ExitStatus, UserError, exception_fields
from resumed_server.observability.logging import log_start_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}

_SIGNALS = STOP_SIGNALS | {signal.SIGCHLD}
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0
_SETTLED = 30.0
"""Seconds after which a start of a worker counts as successful."""

log = structlog.get_logger()


def wait_for_stop_signal(timeout: float) -> bool:
    """Wait up to `timeout` seconds for one of STOP_SIGNALS, which must be blocked; return whether it arrived."""
    return _wait_for_signal(STOP_SIGNALS, timeout) in STOP_SIGNALS


def run(count: int, work: Callable[[int], int], timeout: float) -> int:
    """Run `work` in `count` processes until SIGTERM or SIGINT, and return the exit status.

    `work` receives the number of the worker, from 0; a replacement has the number of its predecessor. At the end the
    workers receive SIGTERM, and SIGKILL after `timeout` seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pool = _WorkerPool(work)
    pool.first_generation = {pool.start(number, _FIRST_DELAY) for number in range(count)}
    while not pool.failed and _next_signal(pool.next_start()) not in STOP_SIGNALS:
        pool.replace_dead()
    return pool.stop(timeout)


class _WorkerPool:
    """The running workers, and the times at which replacements start.

    Attributes:
        first_generation: Process ids of the first workers.
        failed: Whether one of those could not start, which ends the server. A replacement that cannot start is tried
            again: the cause may be temporary, such as a failover of Redis.
    """

    def __init__(self, work: Callable[[int], int]) -> None:
        self.first_generation: set[int] = set()
        self.failed = False
        self._work = work
        # By process id: number, start time, and delay of its replacement.
        self._running: dict[int, tuple[int, float, float]] = {}
        self._due: list[tuple[float, int, float]] = []  # start time, number, and delay of the replacement

    def start(self, number: int, delay: float) -> int:
        worker = _fork(lambda: self._work(number))
        self._running[worker] = (number, time.monotonic(), delay)
        return worker

    def next_start(self) -> float | None:
        """Return the seconds until the next start of a worker; None if none is planned."""
        return max(0.0, min(self._due)[0] - time.monotonic()) if self._due else None

    def replace_dead(self) -> None:
        """Plan a replacement for every worker that ended, with exponential backoff, and start those that are due."""
        now = time.monotonic()
        for worker, status in _reap():
            number, started, delay = self._running.pop(worker)
            if status == ExitStatus.USAGE and worker in self.first_generation:
                self.failed = True
                return
            self.first_generation.discard(worker)
            delay = _FIRST_DELAY if now - started > _SETTLED else delay
            log.error("worker died", worker=worker, status=status, restart_in=delay)
            self._due.append((now + delay, number, min(2 * delay, _LONGEST_DELAY)))
        due = [plan for plan in self._due if plan[0] <= now]
        self._due = [plan for plan in self._due if plan[0] > now]
        for _, number, delay in due:
            self.start(number, delay)

    def stop(self, timeout: float) -> int:
        """Send SIGTERM, and SIGKILL after `timeout` seconds or a second signal; return the exit status."""
        deadline = time.monotonic() + timeout
        self._send(signal.SIGTERM)
        second_signal = False
        while self._running and not second_signal and (left := deadline - time.monotonic()) > 0:
            second_signal = _next_signal(left) in STOP_SIGNALS
            for worker, _ in _reap():
                del self._running[worker]
        if self._running:
            log.warning("killing workers", workers=list(self._running))
            self._send(signal.SIGKILL)
        return ExitStatus.USAGE if self.failed else 0

    def _send(self, number: int) -> None:
        for worker in self._running:
            os.kill(worker, number)


def _next_signal(timeout: float | None) -> int | None:
    return signal.sigwaitinfo(_SIGNALS).si_signo if timeout is None else _wait_for_signal(_SIGNALS, timeout)


def _wait_for_signal(signals: AbstractSet[int], timeout: float) -> int | None:
    # After an interruption, as by SIGSTOP and SIGCONT, CPython returns an empty siginfo on a timeout.
    got = signal.sigtimedwait(signals, timeout)
    return got.si_signo if got and got.si_signo in signals else None


def _reap() -> Iterator[tuple[int, int]]:
    """Yield the process id and the exit status of every worker that ended; negative for a signal."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def _fork(work: Callable[[], int]) -> int:
    """Fork a process that runs `work`, whose result is the exit status; return the process id."""
    worker = os.fork()
    if worker:
        return worker
    status = 1
    try:
        # A terminal sends SIGINT to the whole process group; workers stop only by the supervisor's SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGCHLD})
        status = work()
    except UserError as error:
        log_start_error(error)
        status = ExitStatus.USAGE
    except BaseException as error:  # noqa: BLE001 - the child must not return into the supervisor's code
        log.critical("worker failed", **exception_fields(error))
    finally:
        os._exit(status)  # without the supervisor's clean-up
