"""Fixtures of the command's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)
