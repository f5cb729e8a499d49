from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from docs.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """The servers and frontends of the docs' commands and programs."""
    with contextlib.closing(Stage()) as stage:
        yield stage
