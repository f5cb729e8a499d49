"""Certificates of servers, authorities and clients, and CRLs: files in one directory, made once for a run."""

from __future__ import annotations

import base64
import datetime as dt
import os
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from pathlib import Path

SITE = ("localhost", "other.example", "mtls.example")
_DAY = dt.timedelta(days=1)
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_CRL_SIGN = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
    key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
)  # fmt: skip


class Issued:
    """A certificate with its key and the certificates between it and the root."""

    def __init__(self, certificate: x509.Certificate, key: _Key, chain: tuple[x509.Certificate, ...] = ()) -> None:
        self.certificate, self.key, self.chain = certificate, key, chain

    def pem(self) -> bytes:
        """Return certificate, chain and key in one file."""
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return b"".join(each.public_bytes(Encoding.PEM) for each in (self.certificate, *self.chain)) + key


def _issue(
    common_name: str,
    *,
    names: tuple[str, ...] = (),
    issuer: Issued | None = None,
    authority: bool = False,
    rsa_key: bool = False,
    seconds: float | None = None,
) -> Issued:
    key: _Key = rsa.generate_private_key(65537, 2048) if rsa_key else ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = dt.datetime.now(dt.timezone.utc)
    end = now + 30 * _DAY if seconds is None else now + dt.timedelta(seconds=seconds)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    signer = issuer.key if issuer else key
    signer_public = signer.public_key()
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_public), critical=False)
    if authority:
        builder = builder.add_extension(_CRL_SIGN, critical=True)
    else:
        usages = [ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    chain = (
        (issuer.certificate, *issuer.chain)
        if issuer and issuer.certificate.issuer != issuer.certificate.subject
        else ()
    )
    return Issued(builder.sign(signer, hashes.SHA256()), key, chain)


def new_keyring(directory: Path) -> Path:
    """Write a keyring file."""
    path = directory / "fleet.keys"
    path.touch(0o600)
    path.write_bytes(base64.b64encode(os.urandom(32)) + b"\n")
    return path


class Files:
    """Writes all of them into a directory.

    Servers' (NAME.pem has certificate, chain and key): `site`, `renewed` (the same names), `rsa` (the same names),
    `unrelated` (another name). Authorities': `one`, `two`, `twin` (the subject of `one`, another key), `both` (both of
    these). Clients': `one`, `two`, `between` (an authority that `one` certified issued it), `revoked` (in `one.crl`),
    `self` (signed by itself).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        root = _issue("resumed servers", authority=True)
        for name, names in ("site", SITE), ("renewed", SITE), ("rsa", SITE), ("unrelated", ("unrelated.example",)):
            issued = _issue(names[0], names=names, issuer=root, rsa_key=name == "rsa")
            self._write(f"{name}.pem", issued.pem())
        self._write("ca-servers.pem", root.certificate.public_bytes(Encoding.PEM))
        self._one = _issue("authority one", authority=True)
        authorities = {
            "one": self._one, "two": _issue("authority two", authority=True),
            "twin": _issue("authority one", authority=True),
        }  # fmt: skip
        texts = {name: each.certificate.public_bytes(Encoding.PEM) for name, each in authorities.items()}
        for name, text in {**texts, "both": texts["one"] + texts["two"]}.items():
            self._write(f"ca-{name}.pem", text)
        revoked = _issue("revoked", issuer=self._one)
        clients = {
            "one": _issue("client of one", issuer=self._one),
            "two": _issue("client of two", issuer=authorities["two"]),
            "between": _issue("client between", issuer=_issue("between", issuer=self._one, authority=True)),
            "revoked": revoked,
            "self": _issue("signed by itself"),
        }
        for name, each in clients.items():
            self._write(f"client-{name}.pem", each.pem())
        for name, entries in ("one", [revoked]), ("empty", []):
            self._write(f"crl-{name}.pem", self._crl(entries))

    def expiring(self, name: str, seconds: float) -> Path:
        """Write a client's certificate that is valid for some seconds from now on."""
        return self._write(f"client-{name}.pem", _issue("client that expires", issuer=self._one, seconds=seconds).pem())

    def _crl(self, revoked: list[Issued]) -> bytes:
        now = dt.datetime.now(dt.timezone.utc)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._one.certificate.subject)
            .last_update(now - _DAY)
            .next_update(now + 30 * _DAY)
        )
        for each in revoked:
            entry = x509.RevokedCertificateBuilder(each.certificate.serial_number, now - _DAY)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self._one.key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        path.chmod(0o644)
        return path
