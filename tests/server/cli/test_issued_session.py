"""Sessions that `resumed doctor` reads: tickets of each form, from the vectors of the contract."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import resumed
from resumed_server.cli.diagnose.issued_session import IssuedSession, SessionReader, explain_difference
from resumed_server.cli.diagnosis import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[3] / "protos" / "vectors" / "tickets.json").read_text(encoding="utf-8")
)
SECRET, STATE, TICKET = (VECTORS[each][0] for each in ("secrets", "states", "tickets"))


class Store:
    """A store that has the secret of the vectors."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def get(self, key: bytes) -> resumed.StoredSession | None:
        value = self._values.get(key.hex())
        return resumed.StoredSession(bytes.fromhex(value), 60.0) if value else None


@pytest.fixture
def reader() -> SessionReader:
    store = Store({SECRET["address"]: SECRET["sealed"]})
    keyring = resumed.Keyring.from_keys([bytes.fromhex(SECRET["key"])])
    return SessionReader(cast("resumed.StoreClient", store), keyring, SECRET["namespace"])


def test_a_ticket_of_go_or_rustls_shows_its_state_and_how_to_remove_it(reader: SessionReader) -> None:
    ticket = bytes.fromhex(TICKET["ticket"])
    assert reader.recognise(ticket, list) == "tickets of this keyring and namespace"
    session = reader.read(ticket)
    assert (session.is_ticket, session.serialization) == (True, "go or rustls")
    assert session.issued == STATE["negotiated_microseconds"] / 1e6
    assert session.fingerprint.hex() == STATE["fingerprint"]
    assert session.removal
    assert session.removal.key.hex() == STATE["removal_key"]


def test_a_ticket_of_a_server_with_ticket_keys_only_has_no_state(reader: SessionReader) -> None:
    keys = bytes.fromhex(SECRET["openssl"])
    body = keys[:16] + bytes(16) + os.urandom(160)
    ticket = body + hmac.digest(keys[16:48], body, hashlib.sha256)
    assert reader.read(ticket) == IssuedSession(True, "", 60.0)


def test_a_ticket_with_another_authentication_is_not_read(reader: SessionReader) -> None:
    assert reader.read(bytes.fromhex(SECRET["name"]) + bytes(240)) == IssuedSession(True, "", 60.0)


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        (b"", "it issues no session"),
        (bytes(32), "its session ids are of another keyring or namespace"),
        (bytes(range(200)), "it issues stateless tickets of its own"),
        (bytes.fromhex(TICKET["ticket"])[:12] + bytes(150), "its tickets are of another keyring or namespace"),
    ],
)
def test_a_foreign_session_is_explained(
    reader: SessionReader, shown: bytes, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resumed_server.cli.diagnose.issued_session.STORED_SECONDS", 0.0)
    with pytest.raises(Failure, match=problem):
        reader.recognise(shown, list)


def session_with(**changes: Any) -> IssuedSession:
    return IssuedSession(True, "openssl", 60.0, 0.0, bytes(32))._replace(**changes)


@pytest.mark.parametrize(
    ("theirs", "problem"),
    [
        ({"is_ticket": False}, "it issues tickets, and there stores its sessions"),
        ({"serialization": "go or rustls"}, "format openssl, and those of there of go or rustls"),
        ({"serialization": "", "fingerprint": b""}, "has only ticket keys"),
        ({"fingerprint": b"1" * 16 + bytes(16)}, "other names"),
        ({"fingerprint": bytes(16) + b"1" * 16}, "client certificates"),
    ],
)
def test_the_difference_of_two_frontends_is_named(theirs: dict[str, Any], problem: str) -> None:
    difference = explain_difference(session_with(), session_with(**theirs), "there")
    assert difference
    assert problem in difference[0]


def test_sessions_that_should_resume_have_no_difference() -> None:
    assert explain_difference(session_with(), session_with(seconds=1.0, issued=1.0), "there") is None
