"""A short run of `make rotation`, with a lookup deadline that suits a loaded machine."""

from __future__ import annotations

from chaos.rotation import Settings, run


def test_certificates_grants_and_keyrings_are_rotated_under_traffic() -> None:
    outcome = run(Settings(seconds=0, rate=600, calls=2, lifetime=4, deadline=5.0))
    assert not outcome.problems
    assert outcome.offered > 50
