from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Run a store."""
    with running_server() as server:
        yield server.target
