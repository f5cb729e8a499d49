"""Some of the faults of `make faults`, shortly and with a patient deadline: a busy machine is no broken promise."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from faults.experiment import run
from faults.scenarios import FAULTS

if TYPE_CHECKING:
    from faults.experiment import Fault

SECONDS = 1.5
DEADLINE = 0.25
"""Seconds that a look-up may take here."""
QUICK = ("server killed", "server frozen", "disk full", "Redis killed, back empty")
ROOT = 0


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in QUICK], ids=lambda fault: fault.name)
def test_fault(fault: Fault) -> None:
    """No handshake fails, nothing that was removed or taken resumes, and resumption comes back."""
    if fault.privileged and os.geteuid() != ROOT:
        pytest.skip("only root can set it up")
    assert not run(fault, SECONDS, DEADLINE).broken
