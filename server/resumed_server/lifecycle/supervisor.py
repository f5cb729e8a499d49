"""Several processes on one port: a supervisor that forks workers, replaces the dead and takes all down together.

Signals are blocked and waited for, never handled: nothing runs at a moment that the code below did not choose.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import structlog

from resumed_server.errors import UserError, exception_fields, print_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
USER_ERROR = 2
"""Exit status of a worker that cannot work before the user puts something right."""

_SIGNALS = STOP_SIGNALS | {signal.SIGCHLD}
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0
_SETTLED = 30.0
"""Seconds after which a worker counts as having started well."""

log = structlog.get_logger()


def told_to_stop(timeout: float) -> bool:
    """Wait `timeout` seconds for one of STOP_SIGNALS, which must be blocked, and return whether it came."""
    return _received(STOP_SIGNALS, timeout) in STOP_SIGNALS


def supervise(count: int, work: Callable[[int], int], patience: float) -> int:
    """Keep `count` processes at `work` until SIGTERM or SIGINT, which reach them as SIGTERM; return the exit status.

    Each is told its number, from 0, which its replacement takes over. `patience` is how many seconds they have to end
    then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    crew = _Crew(work)
    crew.originals = {crew.start(number, _FIRST_DELAY) for number in range(count)}
    while not crew.refused and _signalled(crew.next_start()) not in STOP_SIGNALS:
        crew.replace_dead()
    return crew.stop(patience)


class _Crew:
    """The workers: those that run, and when the next ones are to start.

    Attributes:
        originals: The first ones. Where one of them cannot work, none will.
        refused: Whether that happened. What a later one lacks may be back soon: Redis, say, amid a failover.
    """

    def __init__(self, work: Callable[[int], int]) -> None:
        self.originals: set[int] = set()
        self.refused = False
        self._work = work
        # By process id: its number, when it started, and its delay if it dies.
        self._running: dict[int, tuple[int, float, float]] = {}
        self._due: list[tuple[float, int, float]] = []  # when to start one, its number, and its delay if it dies

    def start(self, number: int, delay: float) -> int:
        worker = _forked(lambda: self._work(number))
        self._running[worker] = (number, time.monotonic(), delay)
        return worker

    def next_start(self) -> float | None:
        """Return the seconds until a worker is to start, None if none is."""
        return max(0.0, min(self._due)[0] - time.monotonic()) if self._due else None

    def replace_dead(self) -> None:
        """Plan a replacement for every dead worker, later each time it dies young, and start those that are due."""
        now = time.monotonic()
        for worker, status in _reaped():
            number, started, delay = self._running.pop(worker)
            if status == USER_ERROR and worker in self.originals:
                self.refused = True
                return
            self.originals.discard(worker)
            delay = _FIRST_DELAY if now - started > _SETTLED else delay
            log.error("worker died", worker=worker, status=status, restart_in=delay)
            self._due.append((now + delay, number, min(2 * delay, _LONGEST_DELAY)))
        due = [plan for plan in self._due if plan[0] <= now]
        self._due = [plan for plan in self._due if plan[0] > now]
        for _, number, delay in due:
            self.start(number, delay)

    def stop(self, patience: float) -> int:
        """Tell all to stop, kill what is left after `patience` seconds or a second signal; return the exit status."""
        deadline = time.monotonic() + patience
        self._send(signal.SIGTERM)
        told_again = False
        while self._running and not told_again and (left := deadline - time.monotonic()) > 0:
            told_again = _signalled(left) in STOP_SIGNALS
            for worker, _ in _reaped():
                del self._running[worker]
        if self._running:
            log.warning("killing workers", workers=list(self._running))
            self._send(signal.SIGKILL)
        return USER_ERROR if self.refused else 0

    def _send(self, number: int) -> None:
        for worker in self._running:
            os.kill(worker, number)


def _signalled(timeout: float | None) -> int | None:
    return signal.sigwaitinfo(_SIGNALS).si_signo if timeout is None else _received(_SIGNALS, timeout)


def _received(signals: AbstractSet[int], timeout: float) -> int | None:
    # Once interrupted (by SIGSTOP and SIGCONT, say), CPython returns a siginfo of nothing at all when the time is up.
    got = signal.sigtimedwait(signals, timeout)
    return got.si_signo if got and got.si_signo in signals else None


def _reaped() -> Iterator[tuple[int, int]]:
    """Yield the process id of every worker that ended, with its exit status, or less than zero for a signal."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def _forked(work: Callable[[], int]) -> int:
    """Start a process that does `work`, which returns its exit status, and nothing else; return its id."""
    worker = os.fork()
    if worker:
        return worker
    status = 1
    try:
        # A terminal sends SIGINT to all of the group; whether to stop is the supervisor's to say, with SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGCHLD})
        status = work()
    except UserError as error:
        print_error(error)
        status = USER_ERROR
    except BaseException as error:  # noqa: BLE001 - nothing may get back into the supervisor's code
        log.critical("worker failed", **exception_fields(error))
    finally:
        os._exit(status)  # not the supervisor's clean-up
