"""Exceptions that interrupt a callback, and are no defect: of a signal handler, or of a greenlet whose time is up.

No exception may leave a callback. The caller of the TLS library gets these once the library has returned: at the end of
the step that it is in (during()), or, where this package does not see the step, a moment later in the same thread.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_MOMENT = 0.01
"""Seconds until an exception is raised in a step that is not seen, if the callback has returned by then."""
_STEP_MOMENTS = 100
"""How often it waits for the end of the step: raised before, it may begin with another callback, and be lost."""

_Result = TypeVar("_Result")


class _Steps(threading.local):
    """The steps that this thread is in, and the exception that interrupted a callback of them."""

    depth = 0
    error: BaseException | None = None


_steps = _Steps()


def during(step: Callable[[], _Result]) -> _Result:
    """Call `step`, and then raise the exception that interrupted a callback within it, if any."""
    _steps.depth += 1
    try:
        return step()
    finally:
        _steps.depth -= 1
        error, _steps.error = _steps.error, None
        if error:
            raise error


def interrupted(error: BaseException) -> None:
    """Have an exception raised again that has interrupted a callback of this thread, once the callback has returned."""
    if _steps.depth:
        _steps.error = error
        return
    callback = _callback_of(sys._getframe())  # noqa: SLF001  # documented
    step = _Step(callback.f_back, callback.f_back.f_lasti) if callback.f_back else None
    _schedule(threading.get_ident(), error, callback, step, _STEP_MOMENTS)


class _Step(NamedTuple):
    """The step of the TLS library that a callback interrupts."""

    caller: FrameType
    """The frame that called the library."""
    instruction: int
    """Where it did."""

    def runs(self, frame: FrameType | None) -> bool:
        """Return whether a thread, given its present frame, is still in the step."""
        while frame and frame is not self.caller:
            frame = frame.f_back
        return frame is not None and frame.f_lasti == self.instruction


def _schedule(thread: int, error: BaseException, callback: FrameType, step: _Step | None, moments: int) -> None:
    threading.Timer(_MOMENT, _raise_in, (thread, error, callback, step, moments)).start()


def _callback_of(frame: FrameType) -> FrameType:
    """Return the frame that the TLS library called: those of this package end there."""
    while frame.f_back and _is_ours(frame.f_back):
        frame = frame.f_back
    return frame


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]


def _raise_in(thread: int, error: BaseException, callback: FrameType, step: _Step | None, moments: int) -> None:
    """Raise an exception in another thread, which the interpreter makes of a class there.

    If Python code called the TLS library, its step has to end first, for so many moments at most.
    """
    present = frame = sys._current_frames().get(thread)  # noqa: SLF001  # documented
    while frame and frame is not callback:
        frame = frame.f_back
    if frame:  # a busy machine: raised now, it would end in the callback, and be lost
        _schedule(thread, error, callback, step, moments)
        return
    if step and moments and step.runs(present):
        _schedule(thread, error, callback, step, moments - 1)
        return
    if isinstance(error, KeyboardInterrupt):  # a signal also ends the next wait of the main thread
        signal.pthread_kill(threading.main_thread().ident or thread, signal.SIGINT)
        return
    kind = type(type(error).__name__, (type(error),), {"__new__": lambda *_: error})
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
