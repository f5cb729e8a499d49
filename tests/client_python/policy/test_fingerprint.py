"""Context fingerprints match protos/vectors/contexts.json and an independent implementation."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from resumed._policy.fingerprint import ClientPolicy, client_authentication, names_of, server_identity

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[3] / "protos" / "vectors" / "contexts.json").read_text(encoding="utf-8")
)
CERTIFICATES = {name: bytes.fromhex(der) for name, der in VECTORS["certificates"].items()}
NAMES = {
    "two kinds of names": [
        *(b"D\0\x0cshop.example", b"D\0\x0e*.shop.example", b"D\0\x09a.example"),
        *(b"I\0\x04\xc0\0\x02\x01", b"I\0\x10\x20\x01\x0d\xb8" + bytes(11) + b"\x01"),
    ],
    "common names only": [b"C\0\x0bold.example", b"C\0\x0f" + "ältere.example".encode()],
    "no name at all": [b"X\0\x20" + hashlib.sha256(CERTIFICATES["no name at all"]).digest()],
}
NAMES["the same names"] = NAMES["two kinds of names"]


@pytest.mark.parametrize("name", CERTIFICATES)
def test_names_of_certificates(name: str) -> None:
    assert names_of(CERTIFICATES[name]) == frozenset(NAMES[name])


@pytest.mark.parametrize("vector", VECTORS["server_identities"], ids=lambda vector: ",".join(vector["certificates"]))
def test_server_identities(vector: dict[str, Any]) -> None:
    names = sorted({each for name in vector["certificates"] for each in NAMES[name]})
    expected = hashlib.sha256(b"resumed/v1 identity\0" + b"".join(names)).digest()[:16]
    assert vector["identity"] == expected.hex() == server_identity(reversed(names)).hex()


@pytest.mark.parametrize("vector", VECTORS["client_authentications"], ids=lambda vector: vector["case"])
def test_client_authentications(vector: dict[str, Any]) -> None:
    policy, encoded, ours = vector["policy"], b"", None
    if policy:
        encoded = struct.pack(
            ">BiIQQH",
            *(policy[key] for key in ("mode", "depth", "security_level", "flags", "store_flags")),
            len(policy["hosts"]),
        )
        encoded += b"".join(struct.pack(">H", len(host)) + host.encode() for host in policy["hosts"])
        anchors = [b"A" + bytes.fromhex(each) for each in policy["certificates"]]
        encoded += b"".join(sorted(anchors + [b"R" + bytes.fromhex(each) for each in policy["crls"]]))
        certificates, crls = (frozenset(map(bytes.fromhex, policy[key])) for key in ("certificates", "crls"))
        hosts = tuple(host.encode() for host in policy["hosts"])
        ours = ClientPolicy(**{**policy, "hosts": hosts, "certificates": certificates, "crls": crls})
    expected = hashlib.sha256(b"resumed/v1 client authentication\0" + encoded).digest()[:16]
    assert vector["client_authentication"] == expected.hex() == client_authentication(ours).hex()


def test_bytes_that_are_no_certificate_have_their_own_identity() -> None:
    assert names_of(b"nonsense") == {b"X\0\x20" + hashlib.sha256(b"nonsense").digest()}
