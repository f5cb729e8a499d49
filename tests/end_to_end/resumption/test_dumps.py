"""A short run of `make dump`: memory and files of the server contain no session id, secret or fleet key."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import resumed
from chaos.dump import PLANTED, broken, files_in, look_into, memory_of, plant, search
from chaos.needles import Needles, forms
from support.server import running_server
from support.session import known
from support.tls import VERSIONS, Client, Frontend

if TYPE_CHECKING:
    from pathlib import Path

SESSIONS = 24


@pytest.mark.parametrize("store", ["lmdb", "redis"])
def test_no_secret_is_in_a_store(store: str) -> None:
    """The scan finds planted needles and the store keys of the sessions, so it can find secrets."""
    searches = look_into(store, SESSIONS, workers=1)
    assert not broken(searches, SESSIONS)
    # Only in the memory of the process that keeps the data; other processes may have reused theirs.
    assert max(each.planted for each in searches if "memory" in each.place) == PLANTED


def test_secrets_that_are_there_are_found(tmp_path: Path) -> None:
    with running_server("--storage", f"lmdb://{tmp_path}", "--core-dumps", "--capacity", "8MiB") as server:
        frontend = Frontend("ssl", server.target, resumed.Keyring.plaintext(), deadline=5.0)
        sessions = [client.visit(frontend).session for client in map(Client, VERSIONS)]
        assert frontend.shim.flush(5.0)
        negotiated = [known(session) for session in sessions if session]
        found = search([*memory_of(server), *files_in(tmp_path)], negotiated, [os.urandom(32)], plant(server.target))
    expected = {f"secret of session {number}, raw" for number in range(len(VERSIONS))}
    assert expected <= set(found[0].secrets)
    assert expected <= set(found[-1].secrets)
    assert broken(found, len(VERSIONS))


def test_every_form_is_found_at_every_offset() -> None:
    needle = os.urandom(32)
    needles = Needles([("needle", needle)])
    for form in forms(needle):
        for offset in range(9):
            assert needles.found_in([os.urandom(offset) + form.encoded + os.urandom(20)]), (form.name, offset)
    assert not needles.found_in([os.urandom(100_000)])
