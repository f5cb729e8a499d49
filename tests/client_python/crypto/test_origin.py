"""A process recognises the ids that it issued, and no others."""

from __future__ import annotations

import os

from resumed._crypto.keyring import Keyring
from resumed._crypto.origin import ProcessTag

KEYRING = Keyring.from_keys([os.urandom(32)])


def test_own_ids_are_known_and_those_of_others_are_not() -> None:
    ours, theirs = ProcessTag(), ProcessTag()
    own = {KEYRING.issue_id("shop", 1_800_000_000, ours.nonce()) for _ in range(10_000)}
    others = [KEYRING.issue_id("shop", 1_800_000_000, theirs.nonce()) for _ in range(10_000)]
    assert len(own) == 10_000
    assert all(map(ours.is_own, own))
    assert not any(map(ours.is_own, others))
    assert all(KEYRING.open_id("shop", each) == 1_800_000_000 for each in [*own, *others])


def test_a_child_is_another_process() -> None:
    issuer = ProcessTag()
    nonce = issuer.nonce()
    child = os.fork()
    if not child:
        os._exit(issuer.is_own(nonce) or not issuer.is_own(issuer.nonce()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert issuer.is_own(nonce)


def test_bytes_of_any_length_are_no_ids_of_ours() -> None:
    issuer = ProcessTag()
    assert not any(issuer.is_own(os.urandom(length)) for length in range(64))
