"""A clock for code that takes one."""

from __future__ import annotations


class Clock:
    """Returns `now`, in seconds, which a test advances."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
