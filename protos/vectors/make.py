"""Writes sealing.json and ids.json, the vectors that every language must pass, after a change of the format.

python protos/vectors/make.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resumed.sealing import StoreKeys, _FleetKey

HERE = Path(__file__).parent
KEYS = [bytes(range(start, start + 32)) for start in (0, 100)]
STRANGER = bytes(range(200, 232))
NOT_AFTER = 1_800_000_000
ISSUED = 1_790_000_000


def sealing() -> dict[str, Any]:
    """Return the vectors of store keys and sealed values."""
    good, bad = [], []
    for number, (serialization, namespace, plaintext) in enumerate(
        (("openssl", "shop", b"a serialized session"), ("go", "a.b-c.0", b"\x00"), ("rustls", "x" * 63, bytes(300)))
    ):
        key, nonce, session_id = KEYS[number % 2], bytes([number]) * 12, bytes([number]) * 32
        store_key = StoreKeys(namespace, serialization).key(session_id)
        sealed = _FleetKey.of(key).seal(store_key, plaintext, NOT_AFTER + number, nonce)
        good.append(
            {
                "format": serialization,
                "namespace": namespace,
                "session_id": session_id.hex(),
                "store_key": store_key.hex(),
                "key": key.hex(),
                "nonce": nonce.hex(),
                "not_after": NOT_AFTER + number,
                "plaintext": plaintext.hex(),
                "sealed": sealed.hex(),
            }
        )
    sealed, store_key = bytes.fromhex(good[0]["sealed"]), bytes.fromhex(good[0]["store_key"])
    other_key = StoreKeys("shop").key(b"\xff" * 32)
    foreign = _FleetKey.of(STRANGER).seal(store_key, b"a serialized session", NOT_AFTER, bytes(12))
    longer = sealed[:5] + (NOT_AFTER + 1).to_bytes(8, "big") + sealed[13:]
    cases: list[tuple[str, bytes, bytes, int, str]] = [
        ("past its not_after", store_key, sealed, NOT_AFTER, "expired"),
        ("sealed for another store key", other_key, sealed, NOT_AFTER - 1, "not-authentic"),
        ("not_after prolonged", store_key, longer, NOT_AFTER - 1, "not-authentic"),
        ("sealed with a key that is not in the keyring", store_key, foreign, NOT_AFTER - 1, "unknown-key"),
        ("last byte flipped", store_key, sealed[:-1] + bytes([sealed[-1] ^ 1]), NOT_AFTER - 1, "not-authentic"),
        (
            "nonce flipped",
            store_key,
            sealed[:13] + bytes([sealed[13] ^ 1]) + sealed[14:],
            NOT_AFTER - 1,
            "not-authentic",
        ),
        ("another version", store_key, b"\x02" + sealed[1:], NOT_AFTER - 1, "malformed"),
        (
            "a plaintext value",
            store_key,
            b"\x00" + NOT_AFTER.to_bytes(8, "big") + b"x" * 40,
            NOT_AFTER - 1,
            "malformed",
        ),
        ("cut within the tag", store_key, sealed[:40], NOT_AFTER - 1, "malformed"),
        ("empty", store_key, b"", NOT_AFTER - 1, "malformed"),
    ]
    for name, for_key, value, now, reason in cases:
        bad.append({"case": name, "store_key": for_key.hex(), "sealed": value.hex(), "now": now, "reason": reason})
    return {"keyring": [key.hex() for key in KEYS], "opens": good, "does_not_open": bad}


def ids() -> dict[str, Any]:
    """Return the vectors of sealed ids."""
    good = []
    for number, (namespace, issued) in enumerate((("shop", ISSUED), ("x" * 63, 0), ("a.b-c.0", 2**32 - 1))):
        key, nonce = KEYS[number % 2], bytes([number + 1]) * 12
        session_id = _FleetKey.of(key).issue_id(namespace.encode(), issued, nonce)
        vector = {
            "namespace": namespace,
            "issued": issued,
            "key": key.hex(),
            "nonce": nonce.hex(),
            "id": session_id.hex(),
        }
        good.append(vector)
    first = bytes.fromhex(good[0]["id"])
    foreign = _FleetKey.of(STRANGER).issue_id(b"shop", ISSUED, bytes(12))
    cases = [
        ("issued for another namespace", "bank", first),
        ("issued with a key that is not in the keyring", "shop", foreign),
        ("nonce flipped", "shop", bytes([first[0] ^ 1]) + first[1:]),
        ("last byte flipped", "shop", first[:-1] + bytes([first[-1] ^ 1])),
        ("one byte short", "shop", first[:-1]),
        ("one byte long", "shop", first + b"\x00"),
        ("empty", "shop", b""),
        ("random", "shop", bytes.fromhex("c3" * 32)),
    ]
    bad = [{"case": name, "namespace": namespace, "id": value.hex()} for name, namespace, value in cases]
    return {"keyring": [key.hex() for key in KEYS], "opens": good, "does_not_open": bad}


if __name__ == "__main__":
    for name, vectors in (("sealing.json", sealing()), ("ids.json", ids())):
        (HERE / name).write_text(json.dumps(vectors, indent=2) + "\n", encoding="utf-8")
