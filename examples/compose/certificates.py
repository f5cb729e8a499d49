"""Issues the certificates of compose.yaml, and creates the keyring of the fleet if there is none.

Each directory below /certificates is the volume of that name. Only the authority and the keyring stay the same: run
this again to renew all other certificates.
"""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import resumed

if TYPE_CHECKING:
    from collections.abc import Sequence

VOLUMES = Path("/certificates")
USER = 65_532
"""User and group of the image, whose processes read the files."""
CERTIFICATES: dict[str, Sequence[x509.GeneralName]] = {
    # Volume and name of the files: the names in the certificate.
    "store/tls": [x509.DNSName("store")],
    "shop/tls": [x509.DNSName("localhost")],
    "shop/shop": [x509.UniformResourceIdentifier("spiffe://example.org/shop")],
    "operator/tls": [x509.UniformResourceIdentifier("spiffe://example.org/operator")],
}
_DAY = dt.timedelta(days=1)
_AUTHORITY_LIFETIME, _LIFETIME = 3650 * _DAY, 90 * _DAY


class Authority:
    """The certificate authority whose files are in a directory; it is created if there is none."""

    def __init__(self, directory: Path) -> None:
        certificate, key = directory / "ca.crt", directory / "ca.key"
        if not key.exists():
            own_key = ec.generate_private_key(ec.SECP256R1())
            name = _name("resumed example authority")
            builder = _builder(name, own_key, own_key, _AUTHORITY_LIFETIME).subject_name(name)
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            builder = builder.add_extension(_key_usage(issues=True), critical=True)
            _write(certificate, builder.sign(own_key, hashes.SHA256()).public_bytes(Encoding.PEM), os.getuid())
            _write(key, _pem(own_key), os.getuid())
        self.pem = certificate.read_bytes()
        self._certificate = x509.load_pem_x509_certificate(self.pem)
        loaded = load_pem_private_key(key.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)  # noqa: S101 - for the type checker
        self._key = loaded

    def issue(self, path: Path, names: Sequence[x509.GeneralName]) -> None:
        """Write PATH.crt and PATH.key for a client and server with these names, and the authority as ca.crt."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = _builder(self._certificate.subject, key, self._key, _LIFETIME).subject_name(_name(path.name))
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(issues=False), critical=True)
        builder = builder.add_extension(usages, critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        _write(path.with_suffix(".crt"), builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        _write(path.with_suffix(".key"), _pem(key))
        _write(path.with_name("ca.crt"), self.pem)


def main() -> None:
    """Write all files."""
    authority = Authority(VOLUMES / "authority")
    for name, names in CERTIFICATES.items():
        authority.issue(VOLUMES / name, names)
    keyring = VOLUMES / "shop/fleet.keys"
    if not keyring.exists():
        _write(keyring, resumed.Keyring.generate().encode())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    issuer: x509.Name, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey, lifetime: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.timezone.utc)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _key_usage(*, issues: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not issues,
        key_cert_sign=issues,
        crl_sign=issues,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, owner: int = USER) -> None:
    """Replace a file, which only its owner can read."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    os.chown(new, owner, owner)
    new.replace(path)


if __name__ == "__main__":
    main()
