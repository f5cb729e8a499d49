"""Waiting for what must come about."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 30.0
"""Seconds; only something broken takes them."""


def until(condition: Callable[[], Any]) -> None:
    """Wait for something that must come about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.002)
