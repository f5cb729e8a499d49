"""A running server, fuzzed over the wire for a moment: see wire.py."""

from __future__ import annotations

import pytest

from fuzz.wire import PATIENCE, Wire
from support.server import running_server


@pytest.mark.parametrize("front", ["grpcio", "native"])
def test_no_client_breaks_a_server(front: str) -> None:
    with running_server("--transport", front) as server:
        outcome = Wire(server, seed=7400).run(2 * PATIENCE, batches=5)
    assert outcome.answers["OK"] > 10
    assert outcome.answers["closed"] > 50
