"""Targets that read bytes and do nothing else: values, ids, files, names, certificates, extensions."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import ipaddress
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from fuzz.target import Check, Target
from resumed._crypto.keyring import Keyring
from resumed._crypto.sealed_value import seal
from resumed._exceptions import KeyringError, UnsealError
from resumed._openssl.client_hello import identities, server_name, supported_versions
from resumed._transport.http2 import request_headers
from resumed._transport.target import Target as StoreTarget
from resumed_server.auth import grants
from resumed_server.auth.identity import Unauthenticated, read_identities

if TYPE_CHECKING:
    from collections.abc import Iterable

NOW = 1_800_000_000
KEYRING = Keyring.from_keys([hashlib.sha256(b"first").digest(), hashlib.sha256(b"second").digest()])
STORE_KEY = hashlib.sha256(b"session").digest()
REASONS = {"", "malformed", "unknown-key", "expired", "not-authentic"}
_PLAINTEXT = b"a serialized session"
_NAME = x509.Name([])


def _sealed() -> dict[bytes, bytes]:
    first, second = KEYRING._keys
    return {
        seal([first], STORE_KEY, _PLAINTEXT, NOW + 60, bytes(12)): _PLAINTEXT,
        seal([second], STORE_KEY, b"", NOW + 60, b"n" * 12): b"",
    }


def sealed_values() -> Check:
    """A value opens only if it was sealed for its key and has not expired."""
    known, plaintext = _sealed(), Keyring.plaintext()

    def check(data: bytes) -> None:
        try:
            opened, not_after = KEYRING.open(STORE_KEY, data, NOW)
        except UnsealError as error:
            reason = error.reason
        else:
            assert known[data] == opened
            assert not_after == NOW + 60
            reason = ""
        assert reason in REASONS
        with contextlib.suppress(UnsealError):
            assert plaintext.open(STORE_KEY, data, NOW)[0] == data[9:]

    return check


def _sealed_value_seeds() -> Iterable[bytes]:
    first = KEYRING._keys[0]
    yield from _sealed()
    yield seal([first], STORE_KEY, _PLAINTEXT, NOW, bytes(12))
    yield seal([first], bytes(32), _PLAINTEXT, NOW + 60, bytes(12))
    yield seal([Keyring.from_keys([bytes(32)])._keys[0]], STORE_KEY, _PLAINTEXT, NOW + 60, bytes(12))
    yield Keyring.plaintext().seal(STORE_KEY, _PLAINTEXT, NOW + 60)


def _issued() -> dict[bytes, int]:
    return {key.ids.seal(b"shop", NOW, bytes(12)): NOW for key in KEYRING._keys}


def sealed_ids() -> Check:
    """A session id was issued by the fleet or is rejected."""
    known = _issued()

    def check(data: bytes) -> None:
        assert KEYRING.open_id("shop", data) == known.get(data)

    return check


def _sealed_id_seeds() -> Iterable[bytes]:
    yield from _issued()
    yield KEYRING._keys[0].ids.seal(b"bank", NOW, bytes(12))
    yield bytes(33)


def keyring_files() -> Check:
    """A keyring file is read, or refused in one line that shows nothing of it."""
    file = os.memfd_create("fleet.keys")  # on a disk, writing would take longer than reading
    os.fchmod(file, 0o600)
    path = Path(f"/proc/self/fd/{file}")

    def check(data: bytes) -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, data, 0)
        try:
            keyring = Keyring.load(path)
        except KeyringError as error:
            message = str(error)
            assert message.isprintable()
            told = message.replace(str(path), "").encode()
            assert not any(len(word) >= 12 and word in told for word in data.split())
        else:
            assert keyring.seals
            assert all(base64.b64encode(key.secret)[:40] in data for key in keyring._keys)

    return check


def _keyring_file_seeds() -> Iterable[bytes]:
    first, second = (base64.b64encode(hashlib.sha256(word).digest()) for word in (b"first", b"second"))
    yield first + b"\n"
    yield b"# two keys\n\n" + first + b" # of today\r\n\t" + second
    yield first[:-1] + b"\n"
    yield b"YQ==\n"


def grants_files() -> Check:
    """A grants file is loaded, or rejected with one line per error; it allows only its grants."""
    path = "grants.toml"

    def check(data: bytes) -> None:
        try:
            found = grants._read(path, data)
        except ValueError as error:
            lines = str(error).split("\n")
            assert all(line.startswith(f"{path}: ") and line.isprintable() for line in lines), lines
            return
        for identity in ("spiffe://example.org/shop", "dns:frontend.shop.svc", "dns:*", ""):
            for operation in ("get", "purge", "*"):
                if found.is_allowed([identity], "shop", operation):
                    assert any(
                        identity.startswith(grant.identity.rstrip("*"))
                        and any("shop".startswith(name.rstrip("*")) for name in grant.namespaces)
                        and operation in grant.operations
                        for grant in found.grants
                    )

    return check


def _grants_file_seeds() -> Iterable[bytes]:
    yield b'[[grant]]\nidentity = "spiffe://example.org/shop"\nnamespaces = ["shop", "shop.*"]\noperations = ["get"]\n'
    yield b'[[grant]] # dns\nidentity = "dns:frontend.*"\nnamespaces = ["*"]\noperations = ["get", "purge"]\n' * 2
    yield b"[[grant]]\nidentity = 1\nnamespaces = 1979-05-27T07:32:00Z\nroles = {a = 0x1, 'b c' = [[1.5e3]]}\n"
    yield b'[grant]\n"\\u00e9" = """\n"""\n'
    yield b"grant = [[], {}]\n"


def store_names() -> Check:
    """The name of a store is refused in one line, or everything that calls need can be made of it."""

    def check(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")  # as Python reads arguments and the environment
        try:
            target = StoreTarget.parse(text)
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = ""
        assert refusal.isprintable()
        if refusal:
            return
        request_headers(target.authority, "/package.Service/Name", True)
        for host, port in target.hosts:
            assert 0 < port < 65_536
            host.encode("idna")  # as getaddrinfo() does
            assert host.isprintable()
        if target.literal:
            assert target.resolve()

    return check


def _store_name_seeds() -> Iterable[bytes]:
    yield from (b"dns:///store.example:7400", b"127.0.0.1:7400", b"[::1]:7400", b"dns:store:1", b"unix:/run/r.sock")
    yield from (b"unix-abstract:name", b"ipv4:127.0.0.1:1,127.0.0.2:65535", b"ipv6:[::1]:1,[::2]:2", b"https://a:1")
    yield from ("bücher.example:7400".encode(), b"unix:///run/r.sock")


def hello_extensions() -> Check:
    """An extension of a ClientHello is well-formed, or it says nothing."""

    def check(data: bytes) -> None:
        offered = identities(data)
        assert sum(map(len, offered)) + 6 * len(offered) + 2 <= max(len(data), 2)
        versions = supported_versions(data)
        assert not versions or 2 * len(versions) + 1 == len(data)
        name = server_name(data)
        assert not name or data[5:] == name

    return check


def _hello_extension_seeds() -> Iterable[bytes]:
    each = b"".join(b"\0\x20" + bytes((number,)) * 32 + bytes(4) for number in range(3))
    yield len(each).to_bytes(2, "big") + each + b"\0\x21\x20" + bytes(32)
    yield b"\x04\x03\x04\x03\x03"
    yield b"\0\x0c\0\0\x09localhost"


def certificates() -> Check:
    """The identity in a certificate consists of plain letters, or is rejected."""
    key, start = ec.generate_private_key(ec.SECP256R1()), dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
    builder = x509.CertificateBuilder(_NAME, _NAME, key.public_key(), 1, start, start + dt.timedelta(1))

    def check(data: bytes) -> None:
        pem = data
        if not data.startswith(b"-"):
            names = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, data)
            pem = builder.add_extension(names, critical=False).sign(key, SHA256()).public_bytes(Encoding.PEM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of certificates that break rules
            try:
                named = read_identities(pem)
            except Unauthenticated:
                return
        assert named
        assert all(name.startswith(("spiffe://", "dns:")) and name.isascii() and name.isprintable() for name in named)
        assert sum(name.startswith("spiffe://") for name in named) <= 1

    return check


def _certificate_seeds() -> Iterable[bytes]:
    yield trustme.CA(key_type=trustme.KeyType.ECDSA).cert_pem.bytes()
    dns, spiffe = x509.DNSName("frontend.shop.svc"), x509.UniformResourceIdentifier("spiffe://example.org/shop")
    oid = x509.ObjectIdentifier("1.2.3")
    for names in (
        [dns],
        [spiffe, dns],
        [spiffe, spiffe],
        [x509.RFC822Name("a@example.org"), x509.DirectoryName(_NAME), x509.RegisteredID(oid)],
        [x509.IPAddress(ipaddress.ip_address("::1")), x509.OtherName(oid, b"\x05\0")],
    ):
        yield x509.SubjectAlternativeName(names).public_bytes()


PARSERS = (
    Target("sealed_values", sealed_values, _sealed_value_seeds, ("resumed/_crypto/sealed_value.py",), 256),
    Target("sealed_ids", sealed_ids, _sealed_id_seeds, ("resumed/_crypto/session_id.py",), 64),
    Target("keyring_files", keyring_files, _keyring_file_seeds, ("resumed/_crypto/keyring.py",), 512),
    Target("grants_files", grants_files, _grants_file_seeds, ("resumed_server/auth/grants.py",), 1_024),
    Target("store_names", store_names, _store_name_seeds, ("resumed/_transport/target.py",), 256),
    Target("hello_extensions", hello_extensions, _hello_extension_seeds, ("resumed/_openssl/client_hello.py",), 512),
    Target("certificates", certificates, _certificate_seeds, ("resumed_server/auth/identity.py",), 2_048),
)
