"""The fingerprint of a connection's context, read through libssl while a callback runs (docs/contexts.md).

Identities of certificates and digests of trust stores are cached. A cached certificate or store is kept alive, so that
its address cannot become another one's. A trust store only grows, so its size shows whether it changed.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ctypes import byref, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

from resumed._policy.fingerprint import (
    FINGERPRINT_BYTES,
    NO_CLIENT_AUTHENTICATION,
    ClientPolicy,
    client_authentication,
    names_of,
    server_identity,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._openssl.library import Library

VERIFY_PEER = 1
"""SSL_VERIFY_PEER: the connection asks for a certificate."""
_VERIFY_FAIL_IF_NO_PEER_CERT = 2
_VERIFY_POST_HANDSHAKE = 8

# <openssl/ssl.h>
_CTRL_SELECT_CURRENT_CERT = 116
_CTRL_SET_CURRENT_CERT = 117
_CTRL_GET_VERIFY_CERT_STORE = 137  # answered with nothing before OpenSSL 3.0
_CERT_SET_FIRST, _CERT_SET_NEXT = 1, 2
_FLAG_TRUSTED_FIRST = 0x8000  # set by some stacks, and OpenSSL's default anyway
_DIGEST_BYTES = 32
_MOST_IDENTITIES = 1024
_MOST_STORES = 256
_HALF = FINGERPRINT_BYTES // 2

_Value = TypeVar("_Value")


class Contexts:
    """Computes fingerprints of connections of one libssl."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._identities: _Kept[bytes] = _Kept(_MOST_IDENTITIES, library.X509_up_ref, library.X509_free)
        self._anchors: _Kept[_Anchors] = _Kept(_MOST_STORES, library.X509_STORE_up_ref, library.X509_STORE_free)

    def fingerprint(self, ssl: int, mode: int) -> bytes:
        """Return the fingerprint of a connection as it is now (32 bytes); `mode` is its SSL_get_verify_mode(3)."""
        current = self._library.SSL_get_certificate(ssl)
        return self._server_identity(ssl, current) + self._client_authentication(ssl, mode)

    def agrees(self, ssl: int, mode: int, fingerprint: bytes) -> bool:
        """Return whether a resumed connection is in the context that negotiated the session.

        Where a connection has no certificate, a callback of the application supplies it in full handshakes only. Then
        the client authentication decides, and the fingerprint that was learned for the name.
        """
        if self._client_authentication(ssl, mode) != fingerprint[_HALF:]:
            return False
        current = self._library.SSL_get_certificate(ssl)
        return not current or self._server_identity(ssl, current) == fingerprint[:_HALF]

    def _server_identity(self, ssl: int, current: int | None) -> bytes:
        certificates = self._certificates(ssl, current)
        identity = self._identities.get(certificates)
        if identity is None:
            names = (name for certificate in certificates for name in names_of(self._encoded(certificate)))
            identity = self._identities.keep(certificates, server_identity(names))
        return identity

    def _certificates(self, ssl: int, current: int | None) -> tuple[int, ...]:
        """Return all certificates with a key: a connection has one for each kind of key, and a current one."""
        library, which = self._library, _CERT_SET_FIRST
        found: tuple[int, ...] = ()
        while library.SSL_ctrl(ssl, _CTRL_SET_CURRENT_CERT, which, None):
            found, which = (*found, library.SSL_get_certificate(ssl)), _CERT_SET_NEXT
        if current and found[-1:] != (current,):
            library.SSL_ctrl(ssl, _CTRL_SELECT_CURRENT_CERT, 0, current)
        return found

    def _encoded(self, certificate: int) -> bytes:
        buffer = ctypes.create_string_buffer(max(self._library.i2d_X509(certificate, None), 0))
        self._library.i2d_X509(certificate, byref(c_void_p(ctypes.addressof(buffer))))
        return buffer.raw

    def _client_authentication(self, ssl: int, mode: int) -> bytes:
        if not mode & VERIFY_PEER:
            return NO_CLIENT_AUTHENTICATION
        library = self._library
        own = c_void_p()
        library.SSL_ctrl(ssl, _CTRL_GET_VERIFY_CERT_STORE, 0, byref(own))
        store = own.value or library.SSL_CTX_get_cert_store(library.SSL_get_SSL_CTX(ssl))
        param = library.SSL_get0_param(ssl)
        settings = (
            mode,
            library.SSL_get_verify_depth(ssl),
            library.SSL_get_security_level(ssl),
            library.X509_VERIFY_PARAM_get_flags(param) & ~_FLAG_TRUSTED_FIRST,
            library.X509_VERIFY_PARAM_get_flags(library.X509_STORE_get0_param(store)) & ~_FLAG_TRUSTED_FIRST,
            tuple(library.hosts(param)),
        )
        anchors = self._anchors_of(store)
        known = anchors.computed.get(settings)
        if known is None:
            policy = ClientPolicy(*settings, anchors.certificates, anchors.crls)
            known = anchors.computed[settings] = client_authentication(policy)
        return known

    def _anchors_of(self, store: int) -> _Anchors:
        library = self._library
        objects = library.X509_STORE_get0_objects(store)
        known = self._anchors.get((store,))
        if known is not None and known.number == library.OPENSSL_sk_num(objects):
            return known
        # Another thread may be adding to the store: a directory of certificates is read when one is looked for.
        library.X509_STORE_lock(store)
        try:
            number = library.OPENSSL_sk_num(objects)
            anchors = _Anchors(number)
            for place in range(number):
                each = library.OPENSSL_sk_value(objects, place)
                if certificate := library.X509_OBJECT_get0_X509(each):
                    anchors.certificates |= {self._digest(library.X509_digest, certificate)}
                elif crl := library.X509_OBJECT_get0_X509_CRL(each):
                    anchors.crls |= {self._digest(library.X509_CRL_digest, crl)}
        finally:
            library.X509_STORE_unlock(store)
        return self._anchors.keep((store,), anchors)

    def _digest(self, digest: Callable[..., int], pointer: int) -> bytes:
        buffer = ctypes.create_string_buffer(_DIGEST_BYTES)
        if not digest(pointer, self._library.EVP_sha256(), buffer, None):
            raise MemoryError  # it has no other reason to fail
        return buffer.raw


def has_peer_as_asked(mode: int, has_peer: bool) -> bool:
    """Return whether a session has a client certificate if one is required, and none if none is requested.

    Args:
        mode: SSL_get_verify_mode(3) of the connection.
        has_peer: Whether the session has a certificate.
    """
    if has_peer:
        return bool(mode & VERIFY_PEER)
    insists = mode & VERIFY_PEER and mode & _VERIFY_FAIL_IF_NO_PEER_CERT
    # In TLS 1.3 such a connection asks behind the handshake, when the application wants to.
    return not insists or bool(mode & _VERIFY_POST_HANDSHAKE)


@cache
def contexts_of(library: Library) -> Contexts:
    """Return the one Contexts of a library."""
    return Contexts(library)


class _Anchors:
    """The content of a trust store, and the client authentications computed with it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.certificates: frozenset[bytes] = frozenset()
        self.crls: frozenset[bytes] = frozenset()
        self.computed: dict[tuple[int, int, int, int, int, tuple[bytes, ...]], bytes] = {}


class _Kept(Generic[_Value]):
    """Values by pointers to things that are kept alive for it: the last `most` of them.

    Without a lock: a garbage collection may call back in here at any time.
    """

    def __init__(self, most: int, up_ref: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._most, self._up_ref, self._free = most, up_ref, free
        self._values: dict[tuple[int, ...], _Value] = {}
        self.get = self._values.get

    def keep(self, pointers: tuple[int, ...], value: _Value) -> _Value:
        if pointers not in self._values:
            for pointer in pointers:
                self._up_ref(pointer)
        self._values[pointers] = value
        while len(self._values) > self._most:
            with suppress(KeyError, RuntimeError):  # another thread was quicker
                oldest = next(iter(self._values))
                del self._values[oldest]
                for pointer in oldest:
                    self._free(pointer)
        return value
