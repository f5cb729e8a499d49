"""Slots in shared memory."""

from __future__ import annotations

from resumed_server.limits.shared_slots import SharedSlots


def test_callers_cannot_choose_names_that_share_a_slot() -> None:
    """Each server has a random key, which its workers share."""
    one, other = SharedSlots("q"), SharedSlots("q")
    hashes = [slots.hash_name("pay.example") for slots in (one, one, other)]
    assert hashes[0] == hashes[1] != hashes[2]
