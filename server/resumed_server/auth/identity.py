"""The identities in a client certificate: its SPIFFE ID and its DNS names.

They are read from the certificate itself. The names that gRPC reports end at the first NUL, so "shop.svc<NUL>.evil"
would become "shop.svc".
"""

from __future__ import annotations

import re

from cryptography import x509

_NO_IDENTITY = "the client's certificate has neither a SPIFFE id nor a DNS name"
_UNREADABLE = (
    ValueError,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_is_printable = re.compile("[!-~]{1,2048}").fullmatch


class Unauthenticated(Exception):
    """The caller has no certificate, or one without a usable identity; the message names the reason."""


def read_identities(pem: bytes) -> tuple[str, ...]:
    """Return the SPIFFE ID of a certificate, then its DNS names as "dns:NAME".

    Raises:
        Unauthenticated: It has none that is usable.
    """
    try:
        names = (
            x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
    except _UNREADABLE:
        raise Unauthenticated(_NO_IDENTITY) from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    # X509-SVID section 2: a certificate with several URIs is not valid as an SVID.
    candidates = uris if len(uris) == 1 and uris[0].startswith("spiffe://") else []
    candidates += (f"dns:{name.lower()}" for name in names.get_values_for_type(x509.DNSName))
    identities = tuple(filter(_is_printable, candidates))
    if not identities:
        raise Unauthenticated(_NO_IDENTITY)
    return identities
