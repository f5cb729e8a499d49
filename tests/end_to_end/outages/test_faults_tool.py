"""A short run of some faults of `make faults`, with a deadline that suits a loaded machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chaos.experiment import run
from chaos.lmdb_faults import LMDB
from chaos.redis_faults import REDIS

if TYPE_CHECKING:
    from chaos.experiment import Fault

SECONDS = 1.0
AROUND = 0.5
"""Seconds of traffic before and after the fault."""
DEADLINE = 1.0
"""Seconds that a look-up may take here."""
QUICK = ("server killed", "Redis killed, back empty")


@pytest.mark.parametrize(
    "fault", [fault for fault in [*LMDB, *REDIS] if fault.name in QUICK], ids=lambda fault: fault.name
)
def test_fault(fault: Fault) -> None:
    if hindrance := fault.hindrance():
        pytest.skip(hindrance)
    assert not run(fault, SECONDS, DEADLINE, around=AROUND).broken
