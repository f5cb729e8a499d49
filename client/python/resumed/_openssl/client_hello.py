"""Parses ClientHello extensions in OpenSSL's client hello and get callbacks (SSL_client_hello_get0_ext(3)).

OpenSSL has put the message together and split it into its parts by then, but it has not looked into the extensions:
their content is the peer's.
"""

from __future__ import annotations

from ctypes import byref, c_size_t, c_void_p, string_at
from typing import TYPE_CHECKING

from resumed._openssl.context_settings import OP_CIPHER_SERVER_PREFERENCE, TLS13_CIPHERS
from resumed._openssl.session_codec import ID_BYTES

if TYPE_CHECKING:
    from resumed._openssl.library import Library

# RFC 8446 section 4.2
_SERVER_NAME = 0
_SESSION_TICKET = 35
_PRE_SHARED_KEY = 41
_SUPPORTED_VERSIONS = 43
# <openssl/ssl.h>
_CTRL_GET_MAX_PROTO_VERSION = 131
_OP_NO_TLS1_3 = 1 << 29
TLS1_3_VERSION = 0x304
"""<openssl/ssl.h>"""

_AGE_BYTES = 4


def offered_ids(library: Library, ssl: int) -> list[bytes]:
    """Return the ids that OpenSSL will ask the get callback for, in its order, until one has a session."""
    if is_tls13(library, ssl):
        # The legacy_session_id is a random one then, for middleboxes' sake (RFC 8446 appendix D.4).
        return [identity for identity in offered_identities(library, ssl) if len(identity) == ID_BYTES]
    data = c_void_p()
    length = library.SSL_client_hello_get0_session_id(ssl, byref(data))
    return [string_at(data.value, length)] if length and data.value else []


def is_tls13(library: Library, ssl: int) -> bool:
    """Return whether both ends speak TLS 1.3."""
    versions = _extension(library, ssl, _SUPPORTED_VERSIONS)
    if versions is None or TLS1_3_VERSION not in supported_versions(versions):
        return False
    highest = library.SSL_ctrl(ssl, _CTRL_GET_MAX_PROTO_VERSION, 0, None)
    return highest in {0, TLS1_3_VERSION} and not library.SSL_get_options(ssl) & _OP_NO_TLS1_3


def offered_tickets(library: Library, ssl: int) -> list[bytes]:
    """Return the tickets that a client offers (RFC 8446 section 4.2.11; TLS 1.2: RFC 5077 section 3.2)."""
    if is_tls13(library, ssl):
        return offered_identities(library, ssl)
    ticket = _extension(library, ssl, _SESSION_TICKET)
    return [ticket] if ticket else []


def offered_identities(library: Library, ssl: int) -> list[bytes]:
    """Return the identities of pre-shared keys that a client offers for TLS 1.3, where they are tickets."""
    extension = _extension(library, ssl, _PRE_SHARED_KEY)
    return identities(extension) if extension else []


def chosen_digest(library: Library, ssl: int) -> int | None:
    """Return the hash of the cipher that OpenSSL is going to choose in TLS 1.3 (ssl3_choose_cipher()).

    None if it will not be TLS 1.3, or there is no common cipher.
    """
    if not is_tls13(library, ssl):
        return None
    data = c_void_p()
    length = library.SSL_client_hello_get0_ciphers(ssl, byref(data))
    offered = string_at(data.value, length) if data.value else b""
    theirs = [int.from_bytes(offered[at : at + 2], "big") for at in range(0, len(offered), 2)]
    ours: dict[int, int] = {}
    ciphers = library.SSL_get_ciphers(ssl)
    for place in range(library.OPENSSL_sk_num(ciphers)):
        cipher = library.OPENSSL_sk_value(ciphers, place)
        number = library.SSL_CIPHER_get_protocol_id(cipher)
        if number >> 8 != TLS13_CIPHERS:
            break  # those of TLS 1.3 come first
        ours[number] = cipher
    servers_order = library.SSL_get_options(ssl) & OP_CIPHER_SERVER_PREFERENCE
    common = (each for each in (ours if servers_order else theirs) if each in ours and each in theirs)
    chosen = next(common, None)
    return None if chosen is None else library.SSL_CIPHER_get_handshake_digest(ours[chosen])


def requested_name(library: Library, ssl: int) -> bytes:
    """Return the host name that the client asks for, in lower case; empty if it asks for none."""
    return server_name(_extension(library, ssl, _SERVER_NAME) or b"").lower()


def server_name(extension: bytes) -> bytes:
    """Return the host of a client's server_name (RFC 6066 section 3); of a malformed one, nothing."""
    # A list of one: its length, the type of the name (0), the length of the name.
    name = extension[5:]
    lists, kind, names = extension[:2], extension[2:3], extension[3:5]
    well_formed = kind == b"\0" and int.from_bytes(lists, "big") - 3 == int.from_bytes(names, "big") == len(name)
    return name if well_formed else b""


def supported_versions(extension: bytes) -> list[int]:
    """Return the versions of a client's supported_versions (RFC 8446 section 4.2.1); of a malformed one, none."""
    if not extension or extension[0] != len(extension) - 1 or extension[0] % 2:
        return []
    return [int.from_bytes(extension[at : at + 2], "big") for at in range(1, len(extension), 2)]


def identities(extension: bytes) -> list[bytes]:
    """Return the identities of a client's pre_shared_key (RFC 8446 section 4.2.11); of a malformed one, none."""
    end = 2 + int.from_bytes(extension[:2], "big")
    found, at = [], 2
    while at < end <= len(extension):
        start = at + 2
        at = start + int.from_bytes(extension[at:start], "big") + _AGE_BYTES
        found.append(extension[start : at - _AGE_BYTES])
    return found if at == end <= len(extension) else []


def _extension(library: Library, ssl: int, kind: int) -> bytes | None:
    data, length = c_void_p(), c_size_t()
    if not library.SSL_client_hello_get0_ext(ssl, kind, byref(data), byref(length)):
        return None
    return string_at(data.value, length.value) if data.value else b""
