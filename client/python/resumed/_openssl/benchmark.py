"""Measures a signature with a context's own key: the least that each resumption saves its server."""

from __future__ import annotations

import time
from contextlib import ExitStack
from ctypes import byref, c_size_t, create_string_buffer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resumed._openssl.library import Library

_SIGNATURES = 5
_LONGEST = 4096  # of an RSA key of 32,768 bits
_TO_SIGN = bytes(130)  # about what CertificateVerify signs (RFC 8446 section 4.4.3)


def measure_signature_seconds(library: Library, context: int) -> float | None:
    """Return the seconds of the fastest of a few signatures; None if the context has no key or libssl cannot sign.

    Args:
        library: The libssl of the context.
        context: Its SSL_CTX.
    """
    key = library.SSL_CTX_get0_privatekey(context) if library.signs else None
    if not key:
        return None
    fastest = None
    for _ in range(_SIGNATURES):
        with ExitStack() as held:
            digest = library.EVP_MD_CTX_new()
            held.callback(library.EVP_MD_CTX_free, digest)
            started = time.perf_counter()
            # Without a digest of ours it is the key's own, and for Ed25519 none (EVP_DigestSignInit(3)).
            if library.EVP_DigestSignInit(digest, None, None, None, key) != 1:
                return None
            length = c_size_t(_LONGEST)
            signature = create_string_buffer(length.value)
            if library.EVP_DigestSign(digest, signature, byref(length), _TO_SIGN, len(_TO_SIGN)) != 1:
                return None
            taken = time.perf_counter() - started
        fastest = taken if fastest is None else min(fastest, taken)
    return fastest
