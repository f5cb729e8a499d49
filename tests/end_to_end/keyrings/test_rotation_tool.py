"""`make rotation`, shortly, and with patient look-ups: a busy machine is no failed rotation."""

from __future__ import annotations

from chaos.rotation import Settings, run


def test_certificates_grants_and_keyrings_are_rotated_under_traffic() -> None:
    """Each at least once: no handshake and no call fails, and every session resumes that is offered."""
    outcome = run(Settings(seconds=0, rate=600, lifetime=4, deadline=5.0))
    assert not outcome.problems
    assert outcome.offered > 50
