"""Writes sealing.json, ids.json, contexts.json and tickets.json, the vectors that every language must pass.

python protos/vectors/make.py
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import json
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID

from resumed._crypto.derivation import derive
from resumed._crypto.envelope import Envelope
from resumed._crypto.fleet_key import FleetKey, Secret
from resumed._crypto.sealed_value import seal
from resumed._crypto.store_key import StoreKeys
from resumed._crypto.ticket_secret import Epoch, TicketSecret
from resumed._crypto.ticket_state import LINEAGE_BYTES, TicketState, hash_name
from resumed._policy.fingerprint import ClientPolicy, client_authentication, names_of, server_identity

HERE = Path(__file__).parent
KEYS = [bytes(range(start, start + 32)) for start in (0, 100)]
STRANGER = bytes(range(200, 232))
NOT_AFTER = 1_800_000_000
ISSUED = 1_790_000_000


def sealing() -> dict[str, Any]:
    """Return the vectors of store keys and sealed values."""
    good, bad, envelopes = [], [], []
    for number, (form, namespace, session) in enumerate(
        (("openssl", "shop", b"a serialized session"), ("go", "a.b-c.0", b""), ("rustls", "x" * 63, bytes(300)))
    ):
        envelope = Envelope(bytes(range(number, number + 32)), ISSUED + number / 64, session)
        plaintext = envelope.encode()
        envelopes.append(
            {
                "fingerprint": envelope.fingerprint.hex(),
                "issued_microseconds": int(envelope.issued * 1e6),
                "session": session.hex(),
                "envelope": plaintext.hex(),
            }
        )
        key, nonce, session_id = KEYS[number % 2], bytes([number]) * 12, bytes([number]) * 32
        store_key = StoreKeys(namespace, form).key(session_id)
        sealed = seal([FleetKey.of(Secret(key))], store_key, plaintext, NOT_AFTER + number, nonce)
        good.append(
            {
                "format": form,
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
    foreign = seal([FleetKey.of(Secret(STRANGER))], store_key, b"a serialized session", NOT_AFTER, bytes(12))
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
        ("version 01, which had no fingerprint", store_key, b"\x01" + sealed[1:], NOT_AFTER - 1, "malformed"),
        ("another version", store_key, b"\x04" + sealed[1:], NOT_AFTER - 1, "malformed"),
        (
            "a plaintext value",
            store_key,
            b"\x03" + NOT_AFTER.to_bytes(8, "big") + b"x" * 40,
            NOT_AFTER - 1,
            "malformed",
        ),
        ("cut within the tag", store_key, sealed[:40], NOT_AFTER - 1, "malformed"),
        ("empty", store_key, b"", NOT_AFTER - 1, "malformed"),
    ]
    for name, for_key, value, now, reason in cases:
        bad.append({"case": name, "store_key": for_key.hex(), "sealed": value.hex(), "now": now, "reason": reason})
    return {
        "keyring": [key.hex() for key in KEYS],
        "opens": good,
        "does_not_open": bad,
        "envelopes": envelopes,
        "not_envelopes": ["", plaintext[:39].hex()],
    }


def ids() -> dict[str, Any]:
    """Return the vectors of sealed ids."""
    good = []
    for number, (namespace, issued) in enumerate((("shop", ISSUED), ("x" * 63, 0), ("a.b-c.0", 2**32 - 1))):
        key, nonce = KEYS[number % 2], bytes([number + 1]) * 12
        session_id = FleetKey.of(Secret(key)).ids.seal(namespace.encode(), issued, nonce)
        vector = {
            "namespace": namespace,
            "issued": issued,
            "key": key.hex(),
            "nonce": nonce.hex(),
            "id": session_id.hex(),
        }
        good.append(vector)
    first = bytes.fromhex(good[0]["id"])
    foreign = FleetKey.of(Secret(STRANGER)).ids.seal(b"shop", ISSUED, bytes(12))
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


def tickets() -> dict[str, Any]:
    """Return the vectors of fleet tickets: secrets, the keys derived of them, states, and tickets of Go and rustls."""
    secrets, states, encrypted = [], [], []
    epochs = (
        Epoch(1_790_000_000 // 3600 * 3600, 3600),
        Epoch(1_790_000_002, 2, 7),
        Epoch(604_800 * 2900, 604_800, 255),
    )
    for number, (namespace, epoch) in enumerate(zip(("shop", "a.b-c.0", "x" * 63), epochs, strict=True)):
        fleet_key = FleetKey.of(Secret(KEYS[number % 2]))
        created, not_after = ISSUED + number / 64, epoch.not_after(7200)
        secret = TicketSecret(
            namespace, fleet_key, epoch, Secret(bytes(range(number, number + 32))), created, not_after
        )
        nonce = bytes([number]) * 12
        secrets.append(
            {
                "namespace": namespace,
                "key": fleet_key.secret.hex(),
                "start": epoch.start,
                "rotation": epoch.rotation,
                "generation": epoch.generation,
                "secret": secret.secret.hex(),
                "created_microseconds": int(created * 1e6),
                "lifetime": 7200,
                "not_after": not_after,
                "address": secret.address.hex(),
                "plaintext": secret.encode().hex(),
                "nonce": nonce.hex(),
                "sealed": seal([fleet_key], secret.address, secret.encode(), not_after, nonce).hex(),
                "name": secret.name.hex(),
                "openssl": secret.openssl.hex(),
                "raw48": secret.raw48.hex(),
                "aead32": secret.aead.hex(),
            }
        )
        state = TicketState(
            bytes(range(number, number + 32)),
            bytes([number]) * LINEAGE_BYTES,
            ISSUED + number / 64,
            ISSUED + 7200,
            hash_name((b"", b"shop.example", b"a" * 253)[number]),
        )
        states.append(
            {
                "fingerprint": state.fingerprint.hex(),
                "lineage": state.lineage.hex(),
                "negotiated_microseconds": int(state.negotiated * 1e6),
                "end": state.end,
                "server_name": ("", "shop.example", "a" * 253)[number],
                "state": state.encode().hex(),
                "removal_key": StoreKeys(namespace, "ticket-lineage").key(state.lineage).hex(),
                "namespace": namespace,
            }
        )
        salt, plaintext = bytes([number + 1]) * 16, state.encode() + b"a serialized session"
        head = secret.name + salt
        aead = AESGCM(derive(secret.aead, 32, salt, b"resumed/v1 ticket"))
        ticket = head + aead.encrypt(bytes(12), plaintext, head)
        encrypted.append(
            {
                "aead32": secret.aead.hex(),
                "name": secret.name.hex(),
                "salt": salt.hex(),
                "plaintext": plaintext.hex(),
                "ticket": ticket.hex(),
                "namespace": namespace,
                "use_key": StoreKeys(namespace, "ticket-use").key(ticket[:32]).hex(),
            }
        )
    return {"secrets": secrets, "states": states, "tickets": encrypted}


def contexts() -> dict[str, Any]:
    """Return the vectors of context fingerprints."""
    no_names = x509.Name([])
    dns = [x509.DNSName(name) for name in ("Shop.Example", "*.shop.example", "a.example")]
    addresses = [x509.IPAddress(ipaddress.ip_address(each)) for each in ("192.0.2.1", "2001:db8::1")]
    uri = [x509.UniformResourceIdentifier("spiffe://example.org/shop")]
    certificates = {
        "two kinds of names": _certificate(_named("ignored.example"), [*dns, *addresses, *uri]),
        "the same names": _certificate(no_names, [*addresses, *dns[::-1]]),
        "common names only": _certificate(_named("Old.Example", "ältere.example"), uri),
        "no name at all": _certificate(no_names, []),
    }
    shown = [[name] for name in certificates] + [["no name at all", "the same names"], []]
    anchors = [hashlib.sha256(bytes([number])).digest() for number in range(3)]
    policies = {
        "asks for no certificate": None,
        "asks": ClientPolicy(mode=1, certificates=frozenset(anchors[:1])),
        "demands": ClientPolicy(mode=3, certificates=frozenset(anchors[:1])),
        "everything": ClientPolicy(
            mode=11,
            depth=4,
            security_level=2,
            flags=0x8000,
            store_flags=0xC,
            hosts=(b"client.example", b"other.example"),
            certificates=frozenset(anchors),
            crls=frozenset(anchors[:2]),
        ),
    }
    return {
        "certificates": {name: der.hex() for name, der in certificates.items()},
        "server_identities": [
            {
                "certificates": names,
                "identity": server_identity(each for name in names for each in names_of(certificates[name])).hex(),
            }
            for names in shown
        ],
        "client_authentications": [
            {"case": name, "policy": _shown(policy), "client_authentication": client_authentication(policy).hex()}
            for name, policy in policies.items()
        ],
    }


def _shown(policy: ClientPolicy | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    return {
        "mode": policy.mode,
        "depth": policy.depth,
        "security_level": policy.security_level,
        "flags": policy.flags,
        "store_flags": policy.store_flags,
        "hosts": [host.decode() for host in policy.hosts],
        "certificates": sorted(digest.hex() for digest in policy.certificates),
        "crls": sorted(digest.hex() for digest in policy.crls),
    }


def _named(*names: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])


def _certificate(subject: x509.Name, alternatives: list[Any]) -> bytes:
    """Return a certificate, the same one each time: the key signs deterministically (RFC 6979)."""
    key = ec.derive_private_key(1, ec.SECP256R1())
    builder = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=_named("authority"), public_key=key.public_key())
        .serial_number(1)
        .not_valid_before(dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc))
        .not_valid_after(dt.datetime(2126, 1, 1, tzinfo=dt.timezone.utc))
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(serialization.Encoding.DER)


if __name__ == "__main__":
    for name, make in (("sealing", sealing), ("ids", ids), ("contexts", contexts), ("tickets", tickets)):
        vectors = make()
        (HERE / f"{name}.json").write_text(json.dumps(vectors, indent=2) + "\n", encoding="utf-8")
