from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.cmac import CMAC
from hypothesis import given
from hypothesis import strategies as st

import resumed
from resumed._crypto.envelope import Envelope
from resumed._crypto.keyring import Keyring
from resumed._crypto.store_key import StoreKeys

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS = Path(__file__).parents[3] / "protos" / "vectors"
SEALING: dict[str, Any] = json.loads((VECTORS / "sealing.json").read_text())
IDS: dict[str, Any] = json.loads((VECTORS / "ids.json").read_text())
SEALING_KEYRING = Keyring.from_keys([bytes.fromhex(key) for key in SEALING["keyring"]])
IDS_KEYRING = Keyring.from_keys([bytes.fromhex(key) for key in IDS["keyring"]])
STORE_KEY = bytes(range(32))
SECRET = os.urandom(32)


def unhex(vector: dict[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def hkdf(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """An independent implementation of RFC 5869."""
    extracted = hmac.digest(salt or bytes(32), key, "sha256")
    output, block = b"", b""
    for counter in range(1, length // 32 + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        output += block
    return output


def siv_decrypt(key: bytes, sealed: bytes, associated: bytes) -> bytes | None:
    """An independent implementation of RFC 5297 for one associated string and a short plaintext."""

    def cmac(message: bytes) -> bytes:
        mac = CMAC(algorithms.AES(key[:32]))
        mac.update(message)
        return mac.finalize()

    def double(block: bytes) -> bytes:
        number = int.from_bytes(block, "big") << 1
        return ((number & (1 << 128) - 1) ^ (0x87 if number >> 128 else 0)).to_bytes(16, "big")

    def xor(left: bytes, right: bytes) -> bytes:
        return bytes(a ^ b for a, b in zip(left, right, strict=True))

    tag, ciphertext = sealed[:16], sealed[16:]
    counter = int.from_bytes(tag, "big") & ~(1 << 63 | 1 << 31)
    decryptor = Cipher(algorithms.AES(key[32:]), modes.CTR(counter.to_bytes(16, "big"))).decryptor()
    plaintext = decryptor.update(ciphertext) + decryptor.finalize()
    chained = xor(double(cmac(bytes(16))), cmac(associated))
    padded = (plaintext + b"\x80").ljust(16, b"\0")
    return plaintext if cmac(xor(double(chained), padded)) == tag else None


@pytest.mark.parametrize("vector", SEALING["opens"], ids=lambda vector: vector["format"])
def test_sealed_values_are_what_the_format_says(vector: dict[str, Any]) -> None:
    session_id, store_key, key, nonce, plaintext, sealed = unhex(
        vector, "session_id", "store_key", "key", "nonce", "plaintext", "sealed"
    )
    prefix = f"resumed/v1\0{vector['format']}\0{vector['namespace']}\0".encode()
    assert hashlib.sha256(prefix + session_id).digest() == store_key
    header = b"\x02" + hashlib.sha256(key).digest()[:4] + vector["not_after"].to_bytes(8, "big")
    assert sealed[:25] == header + nonce
    aead = AESGCM(hkdf(key, store_key, b"resumed/v1 seal", 32))
    assert aead.decrypt(nonce, sealed[25:], header + store_key) == plaintext


@pytest.mark.parametrize("vector", SEALING["opens"], ids=lambda vector: vector["format"])
def test_sealed_vectors_open(vector: dict[str, Any]) -> None:
    store_key, plaintext, sealed, session_id = unhex(vector, "store_key", "plaintext", "sealed", "session_id")
    assert StoreKeys(vector["namespace"], vector["format"]).key(session_id) == store_key
    assert SEALING_KEYRING.open(store_key, sealed, vector["not_after"] - 1) == (plaintext, vector["not_after"])


@pytest.mark.parametrize("vector", SEALING["does_not_open"], ids=lambda vector: vector["case"])
def test_forged_values_do_not_open(vector: dict[str, Any]) -> None:
    store_key, sealed = unhex(vector, "store_key", "sealed")
    with pytest.raises(resumed.UnsealError) as caught:
        SEALING_KEYRING.open(store_key, sealed, vector["now"])
    assert caught.value.reason == vector["reason"]


@pytest.mark.parametrize("vector", SEALING["envelopes"], ids=lambda vector: vector["session"][:8])
def test_envelopes_are_what_the_format_says(vector: dict[str, Any]) -> None:
    fingerprint, session, encoded = unhex(vector, "fingerprint", "session", "envelope")
    assert encoded == fingerprint + vector["issued_microseconds"].to_bytes(8, "big") + session
    envelope = Envelope(fingerprint, vector["issued_microseconds"] / 1e6, session)
    assert envelope.encode() == encoded
    assert Envelope.decode(encoded) == envelope


@pytest.mark.parametrize("encoded", SEALING["not_envelopes"])
def test_a_short_plaintext_is_no_envelope(encoded: str) -> None:
    with pytest.raises(resumed.UnsealError, match="malformed"):
        Envelope.decode(bytes.fromhex(encoded))


@pytest.mark.parametrize("vector", IDS["opens"], ids=lambda vector: vector["namespace"][:8])
def test_sealed_ids_are_what_the_format_says(vector: dict[str, Any]) -> None:
    key, nonce, session_id = unhex(vector, "key", "nonce", "id")
    siv_key = hkdf(key, b"", b"resumed/v1 id", 64)
    associated = vector["namespace"].encode() + b"\0" + nonce
    assert session_id[:12] == nonce
    assert siv_decrypt(siv_key, session_id[12:], associated) == vector["issued"].to_bytes(4, "big")
    assert IDS_KEYRING.open_id(vector["namespace"], session_id) == vector["issued"]


@pytest.mark.parametrize("vector", IDS["does_not_open"], ids=lambda vector: vector["case"])
def test_foreign_ids_do_not_open(vector: dict[str, Any]) -> None:
    assert IDS_KEYRING.open_id(vector["namespace"], bytes.fromhex(vector["id"])) is None


@given(
    plaintext=st.binary(max_size=300),
    not_after=st.integers(1, 2**40),
    namespace=st.from_regex(r"[a-z0-9.-]{1,63}", fullmatch=True),
)
def test_sealed_values_open(plaintext: bytes, not_after: int, namespace: str) -> None:
    keyring = Keyring.from_keys([os.urandom(32)])
    assert keyring.open(STORE_KEY, keyring.seal(STORE_KEY, plaintext, not_after), not_after - 1) == (
        plaintext,
        not_after,
    )
    issued = not_after % 2**32
    assert keyring.open_id(namespace, keyring.issue_id(namespace, issued)) == issued


@given(value=st.binary(max_size=200))
def test_no_bytes_at_all_do_more_than_not_open(value: bytes) -> None:
    with pytest.raises(resumed.UnsealError):
        SEALING_KEYRING.open(STORE_KEY, value, 0)
    with pytest.raises(resumed.UnsealError):
        SEALING_KEYRING.open(STORE_KEY, b"\x01" + hashlib.sha256(bytes(range(32))).digest()[:4] + value, 0)
    assert IDS_KEYRING.open_id("shop", value) is None


SESSION = b"a serialized session"


class Defective:
    """Stands in for a primitive of cryptography's, and fails."""

    def __init__(self, *_arguments: object) -> None:
        raise RuntimeError("a defect")


def traceback_of(step: Callable[[], object]) -> str:
    """Return the traceback of a step that fails, with the values of all variables but the test's own."""
    try:
        step()
    except (resumed.ResumedError, RuntimeError, OverflowError) as error:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        shown.stack[:] = [frame for frame in shown.stack if frame.filename != __file__]
        return "".join(shown.format())
    return ""


def shown_secrets(text: str) -> list[str]:
    """Return which forms of SECRET or SESSION a text has."""
    forms = [form for secret in (SECRET, SESSION) for form in (repr(secret)[2:-1], secret.hex())]
    return [form for form in (*forms, base64.b64encode(SECRET).decode()) if form in text]


class TestKeyringFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "fleet.keys"
        path.touch(0o600)
        return path

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "holds no key"),
            ("# only a comment\n\n", "holds no key"),
            ("not base64!\n", "line 1: not a key"),
            ("\n" + "QUJD\n", "line 2: not a key"),
            ("\u00e9\u00e9\n", "line 1: not a key"),
        ],
    )
    def test_a_malformed_file_is_refused(self, path: Path, text: str, complaint: str) -> None:
        path.write_text(text)
        with pytest.raises(resumed.KeyringError, match=complaint) as caught:
            Keyring.load(path)
        assert not text.strip() or text.strip() not in str(caught.value)

    @pytest.mark.parametrize("mode", [0o604, 0o666, 0o620, 0o601])
    def test_a_file_that_others_may_read_is_refused(self, path: Path, mode: int) -> None:
        path.write_text(Keyring.generate())
        path.chmod(mode)
        with pytest.raises(resumed.KeyringError, match="chmod 600"):
            Keyring.load(path)

    @pytest.mark.parametrize(("owner", "user", "refused"), [(1, 2, True), (0, 2, False), (2, 2, False), (2, 0, False)])
    def test_a_file_of_another_user_is_refused(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, owner: int, user: int, refused: bool
    ) -> None:
        """The owner of a file can change it, so the owner must be this user or root."""
        path.write_text(Keyring.generate())
        status = path.stat()
        owned = os.stat_result((*status[:4], owner, *status[5:]))
        monkeypatch.setattr("resumed._reload.os.fstat", lambda _: owned)
        monkeypatch.setattr("resumed._crypto.keyring.os.geteuid", lambda: user)
        if refused:
            with pytest.raises(resumed.KeyringError, match="another user owns it"):
                Keyring.load(path)
        else:
            assert Keyring.load(path).key_ids

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(resumed.KeyringError, match="resumed keygen"):
            Keyring.load(tmp_path / "nowhere")

    def test_a_changed_file_is_read_again(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [1000.0]
        monkeypatch.setattr("resumed._reload.time.monotonic", lambda: now[0])
        old, new = Keyring.generate(), Keyring.generate()
        path.write_text(old)
        keyring = Keyring.load(path)
        sealed, session_id = keyring.seal(STORE_KEY, b"session", 2000), keyring.issue_id("shop", 1000)
        [old_id] = keyring.key_ids
        path.write_text(f"{new} # new\n{old}\n")
        now[0] += 2
        assert keyring.key_ids == [old_id], "it may be the middle of a change"
        now[0] += 2
        assert keyring.key_ids[1] == old_id
        assert keyring.seal(STORE_KEY, b"", 1)[1:5].hex() == keyring.key_ids[0]
        assert keyring.open(STORE_KEY, sealed, 1000) == (b"session", 2000)
        assert keyring.open_id("shop", session_id) == 1000
        path.write_text(new)
        for _ in range(2):
            now[0] += 2
            assert keyring.key_ids
        with pytest.raises(resumed.UnsealError, match="unknown-key"):
            keyring.open(STORE_KEY, sealed, 1000)

    def test_a_file_that_breaks_keeps_the_old_keys(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr("resumed._reload.time.monotonic", lambda: now[0])
        path.write_text(Keyring.generate())
        keyring = Keyring.load(path)
        before = keyring.key_ids
        path.write_text("half a k")
        with caplog.at_level(logging.ERROR, "resumed"):
            for _ in range(2):
                now[0] += 2
                assert keyring.key_ids == before
        assert "keys read before stay" in caplog.text
        assert "half a k" not in caplog.text

    def test_no_key_shows_in_a_repr(self) -> None:
        keyring = Keyring.from_keys([SECRET])
        inside = vars(keyring) | {name: getattr(keyring._keys[0], name) for name in keyring._keys[0].__slots__}
        assert not shown_secrets(repr(keyring) + repr(keyring._keys) + f"{keyring._keys[0]}" + str(inside))

    @pytest.mark.parametrize("defect", ["", "derivation.HKDF", "sealed_value.AESGCM", "session_id.AESSIV"])
    def test_no_key_and_no_session_shows_in_a_traceback(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, defect: str
    ) -> None:
        """Error reporters include the values of local variables."""
        keyring = Keyring.from_keys([SECRET])
        sealed = keyring.seal(STORE_KEY, SESSION, 1000)
        malformed = f"{base64.b64encode(SECRET).decode()}\nnot a key\n"
        path.write_text(malformed)
        if defect:
            monkeypatch.setattr(f"resumed._crypto.{defect}", Defective)

        def follow() -> None:
            path.write_text(Keyring.generate())
            followed = Keyring.load(path)
            path.write_text(malformed)
            for _ in range(2):
                assert followed._file
                followed._file._next_look = 0
                assert len(followed.key_ids) == 1

        shown = [
            traceback_of(step)
            for step in (
                lambda: keyring.open(STORE_KEY, sealed, 1000),
                lambda: keyring.open(STORE_KEY, sealed[:-1] + b"x", 0),
                lambda: keyring.open(STORE_KEY, b"", 0),
                lambda: keyring.open(b"another key", sealed, 0),
                lambda: keyring.issue_id("shop", -1),
                lambda: Keyring.load(path),
                follow,
            )
        ]
        assert any(shown)
        assert not shown_secrets("".join(shown) + caplog.text)

    def test_keys_of_another_length_are_refused(self) -> None:
        for keys in ([], [b"short"], [bytes(33)]):
            with pytest.raises(resumed.KeyringError):
                Keyring.from_keys(keys)


def test_plaintext_values_do_not_pass_for_sealed_ones() -> None:
    plaintext = Keyring.plaintext()
    assert not plaintext.seals
    value = plaintext.seal(STORE_KEY, b"session", 2000)
    assert plaintext.open(STORE_KEY, value, 1999) == (b"session", 2000)
    with pytest.raises(resumed.UnsealError):
        SEALING_KEYRING.open(STORE_KEY, value, 1999)
    with pytest.raises(resumed.UnsealError):
        plaintext.open(STORE_KEY, SEALING_KEYRING.seal(STORE_KEY, b"session", 2000), 1999)
