"""Exceptions of signal handlers that interrupt a callback."""

from __future__ import annotations

import ctypes
import signal
from types import FunctionType
from typing import TYPE_CHECKING

import pytest

from resumed._async import interruption
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stop(BaseException):
    """The exception of a signal handler."""


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Restore the handler of SIGINT, which the background jobs of a shell ignore."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_a_slow_callback_returns_before_its_exception_is_raised(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """Raised within the callback, the exception would end in C and be lost: SIGTERM would not end the server."""
    monkeypatch.setattr(interruption, "_MOMENT", 0.0)
    attempts = list[int]()
    raise_in = interruption._raise_in

    def attempt(*arguments: object) -> None:
        attempts.append(len(attempts))
        raise_in(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(interruption, "_raise_in", attempt)
    returned = list[bool]()
    callback = FunctionType(interrupt_and_work.__code__, globals() | {"__name__": "resumed.callbacks"})
    function = ctypes.CFUNCTYPE(None)(lambda: callback(kind(), attempts, returned))

    def serve() -> None:
        function()
        until(lambda: False)

    with pytest.raises(kind):
        serve()
    assert returned == [True]


def interrupt_and_work(error: BaseException, attempts: list[int], returned: list[bool]) -> None:
    """Go on after the interruption until the exception could have been raised."""
    interruption.interrupted(error)
    until(lambda: len(attempts) >= 3)
    returned.append(True)


def test_an_exception_is_not_raised_in_the_next_callback_of_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be raised at the beginning of that callback, before its `try`, and be lost in C."""
    monkeypatch.setattr(interruption, "_MOMENT", 0.0)
    monkeypatch.setattr(interruption, "_STEP_MOMENTS", 1_000_000)
    attempts, entered = list[int](), list[bool]()
    raise_in = interruption._raise_in

    def attempt(*arguments: object) -> None:
        attempts.append(len(attempts))
        raise_in(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(interruption, "_raise_in", attempt)
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def call_back(_one: object, _other: object) -> int:
        entered.append(True)
        if len(entered) == 1:
            interruption.interrupted(Stop())
        return 0

    names = globals() | {"__name__": "resumed.callbacks"}
    callback = FunctionType(call_back.__code__, names, closure=call_back.__closure__)
    numbers = (ctypes.c_int * 2000)()
    sort = ctypes.CDLL(None).qsort  # a step of C that calls back thousands of times

    def serve() -> None:
        sort(numbers, ctypes.c_size_t(2000), ctypes.c_size_t(4), compare(callback))
        until(lambda: False)

    with pytest.raises(Stop):
        serve()
    assert len(entered) > 1000, "the step has ended"
    assert attempts
