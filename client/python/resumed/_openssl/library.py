"""Finds the functions of the libssl that a TLS context belongs to, and the SSL_CTX inside the context.

Two libraries may live in one process: the one that the `ssl` module links, and the one inside cryptography, which
pyOpenSSL uses. A pointer of one must never reach the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import ssl
import struct
import sys
import weakref
from ctypes import POINTER, c_char_p, c_int, c_long, c_size_t, c_uint, c_uint16, c_uint64, c_ulong, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from resumed._exceptions import UnsupportedContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

NEW_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
"""int (*)(SSL *, SSL_SESSION *): SSL_CTX_sess_set_new_cb(3)."""
GET_CALLBACK = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_int, c_void_p)
"""SSL_SESSION *(*)(SSL *, const unsigned char *id, int length, int *copy): SSL_CTX_sess_set_get_cb(3)."""
REMOVE_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
"""void (*)(SSL_CTX *, SSL_SESSION *): SSL_CTX_sess_set_remove_cb(3)."""
ID_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p)
"""int (*)(SSL *, unsigned char *id, unsigned int *length): SSL_CTX_set_generate_session_id(3)."""
INFO_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_int)
"""void (*)(const SSL *, int where, int ret): SSL_set_info_callback(3)."""
HELLO_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p)
"""int (*)(SSL *, int *alert, void *): SSL_CTX_set_client_hello_cb(3)."""
TICKET_KEY_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int)
"""int (*)(SSL *, unsigned char *name, unsigned char *iv, EVP_CIPHER_CTX *, EVP_MAC_CTX *, int encrypt):
SSL_CTX_set_tlsext_ticket_key_evp_cb(3)."""
GENERATE_TICKET_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
"""int (*)(SSL *, void *): SSL_CTX_set_session_ticket_cb(3)."""
DECRYPT_TICKET_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_size_t, c_int, c_void_p)
"""int (*)(SSL *, SSL_SESSION *, const unsigned char *name, size_t length, int status, void *):
SSL_CTX_set_session_ticket_cb(3)."""

# name: result, arguments. Called with the GIL held: each takes about a microsecond and waits for no lock.
_QUICK: dict[str, tuple[Any, list[Any]]] = {
    "ASN1_TIME_diff": (c_int, [POINTER(c_int), POINTER(c_int), c_void_p, c_void_p]),
    "ERR_peek_last_error": (c_ulong, []),
    "ERR_set_mark": (c_int, []),
    "ERR_pop_to_mark": (c_int, []),
    "CRYPTO_get_ex_new_index": (c_int, [c_int, c_long, c_void_p, c_void_p, c_void_p, c_void_p]),
    "EVP_sha256": (c_void_p, []),
    "OPENSSL_sk_num": (c_int, [c_void_p]),
    "OPENSSL_sk_value": (c_void_p, [c_void_p, c_int]),
    "OpenSSL_version_num": (c_ulong, []),
    "SSL_CIPHER_get_handshake_digest": (c_void_p, [c_void_p]),
    "SSL_CIPHER_get_protocol_id": (c_uint16, [c_void_p]),
    "SSL_client_hello_get0_ciphers": (c_size_t, [c_void_p, POINTER(c_void_p)]),
    "SSL_client_hello_get0_ext": (c_int, [c_void_p, c_uint, POINTER(c_void_p), POINTER(c_size_t)]),
    "SSL_client_hello_get0_session_id": (c_size_t, [c_void_p, POINTER(c_void_p)]),
    "SSL_ctrl": (c_long, [c_void_p, c_int, c_long, c_void_p]),
    "SSL_get0_param": (c_void_p, [c_void_p]),
    "SSL_get_certificate": (c_void_p, [c_void_p]),
    "SSL_get_ciphers": (c_void_p, [c_void_p]),
    "SSL_get_ex_data": (c_void_p, [c_void_p, c_int]),
    "SSL_get_finished": (c_size_t, [c_void_p, c_void_p, c_size_t]),
    "SSL_get_num_tickets": (c_size_t, [c_void_p]),
    "SSL_get_options": (c_uint64, [c_void_p]),
    "SSL_get_pending_cipher": (c_void_p, [c_void_p]),
    "SSL_get_security_level": (c_int, [c_void_p]),
    "SSL_get_servername": (c_char_p, [c_void_p, c_int]),
    "SSL_get_session": (c_void_p, [c_void_p]),
    "SSL_get_shutdown": (c_int, [c_void_p]),
    "SSL_get_SSL_CTX": (c_void_p, [c_void_p]),
    "SSL_in_init": (c_int, [c_void_p]),
    "SSL_get_verify_depth": (c_int, [c_void_p]),
    "SSL_get_verify_mode": (c_int, [c_void_p]),
    "SSL_get_verify_result": (c_long, [c_void_p]),
    "SSL_session_reused": (c_int, [c_void_p]),
    "SSL_set_ex_data": (c_int, [c_void_p, c_int, c_void_p]),
    "SSL_set_info_callback": (None, [c_void_p, c_void_p]),
    "SSL_set_shutdown": (None, [c_void_p, c_int]),
    "SSL_set_session_id_context": (c_int, [c_void_p, c_char_p, c_uint]),
    "SSL_version": (c_int, [c_void_p]),
    "SSL_CTX_ctrl": (c_long, [c_void_p, c_int, c_long, c_void_p]),
    "SSL_CTX_get_cert_store": (c_void_p, [c_void_p]),
    "SSL_CTX_get_ciphers": (c_void_p, [c_void_p]),
    "SSL_CTX_get_info_callback": (c_void_p, [c_void_p]),
    "SSL_CTX_get_max_early_data": (c_uint, [c_void_p]),
    "SSL_CTX_get_options": (c_uint64, [c_void_p]),
    "SSL_CTX_set_options": (c_uint64, [c_void_p, c_uint64]),
    "SSL_CTX_clear_options": (c_uint64, [c_void_p, c_uint64]),
    "SSL_CTX_set_client_hello_cb": (None, [c_void_p, c_void_p, c_void_p]),
    "SSL_CTX_get_timeout": (c_long, [c_void_p]),
    "SSL_CTX_set_timeout": (c_long, [c_void_p, c_long]),
    "SSL_CTX_set_session_id_context": (c_int, [c_void_p, c_char_p, c_uint]),
    "SSL_CTX_up_ref": (c_int, [c_void_p]),
    "SSL_SESSION_free": (None, [c_void_p]),
    "SSL_SESSION_get0_id_context": (c_void_p, [c_void_p, POINTER(c_uint)]),
    "SSL_SESSION_get0_peer": (c_void_p, [c_void_p]),
    "SSL_SESSION_get0_ticket": (None, [c_void_p, POINTER(c_void_p), POINTER(c_size_t)]),
    "SSL_SESSION_get_ex_data": (c_void_p, [c_void_p, c_int]),
    "SSL_SESSION_set_ex_data": (c_int, [c_void_p, c_int, c_void_p]),
    "SSL_SESSION_get_id": (c_void_p, [c_void_p, POINTER(c_uint)]),
    "SSL_SESSION_get0_cipher": (c_void_p, [c_void_p]),
    "SSL_SESSION_get0_hostname": (c_char_p, [c_void_p]),
    "SSL_SESSION_set1_hostname": (c_int, [c_void_p, c_char_p]),
    "SSL_SESSION_get_timeout": (c_long, [c_void_p]),
    "SSL_SESSION_set_timeout": (c_long, [c_void_p, c_long]),
    "SSL_SESSION_set_time": (c_long, [c_void_p, c_long]),
    "SSL_SESSION_set1_id_context": (c_int, [c_void_p, c_char_p, c_uint]),
    "SSL_SESSION_is_resumable": (c_int, [c_void_p]),
    "SSL_SESSION_get0_ticket_appdata": (c_int, [c_void_p, POINTER(c_void_p), POINTER(c_size_t)]),
    "SSL_SESSION_set1_ticket_appdata": (c_int, [c_void_p, c_char_p, c_size_t]),
    "X509_CRL_digest": (c_int, [c_void_p, c_void_p, c_char_p, c_void_p]),
    "X509_OBJECT_get0_X509": (c_void_p, [c_void_p]),
    "X509_OBJECT_get0_X509_CRL": (c_void_p, [c_void_p]),
    "X509_STORE_free": (None, [c_void_p]),
    "X509_STORE_get0_objects": (c_void_p, [c_void_p]),
    "X509_STORE_get0_param": (c_void_p, [c_void_p]),
    "X509_STORE_lock": (c_int, [c_void_p]),
    "X509_STORE_unlock": (c_int, [c_void_p]),
    "X509_STORE_up_ref": (c_int, [c_void_p]),
    "X509_VERIFY_PARAM_get_flags": (c_ulong, [c_void_p]),
    "X509_digest": (c_int, [c_void_p, c_void_p, c_char_p, c_void_p]),
    "X509_free": (None, [c_void_p]),
    "X509_get0_notAfter": (c_void_p, [c_void_p]),
    "X509_up_ref": (c_int, [c_void_p]),
    "i2d_SSL_SESSION": (c_int, [c_void_p, POINTER(c_void_p)]),
    "i2d_X509": (c_int, [c_void_p, POINTER(c_void_p)]),
    "d2i_SSL_SESSION": (c_void_p, [c_void_p, POINTER(c_void_p), c_long]),
}
# Called without the GIL: they may wait for the lock of the context, whose holder may be waiting for the GIL in a
# callback.
_SLOW: dict[str, tuple[Any, list[Any]]] = {
    "SSL_CTX_free": (None, [c_void_p]),
    "SSL_CTX_sess_get_new_cb": (c_void_p, [c_void_p]),
    "SSL_CTX_sess_get_get_cb": (c_void_p, [c_void_p]),
    "SSL_CTX_sess_get_remove_cb": (c_void_p, [c_void_p]),
    "SSL_CTX_sess_set_new_cb": (None, [c_void_p, c_void_p]),
    "SSL_CTX_sess_set_get_cb": (None, [c_void_p, c_void_p]),
    "SSL_CTX_sess_set_remove_cb": (None, [c_void_p, c_void_p]),
    "SSL_CTX_set_generate_session_id": (c_int, [c_void_p, c_void_p]),
}
# Called without the GIL, and not needed for serving: a library that lacks one of them will do (see benchmark.py).
_OPTIONAL: dict[str, tuple[Any, list[Any]]] = {
    "EVP_DigestSign": (c_int, [c_void_p, c_char_p, POINTER(c_size_t), c_char_p, c_size_t]),
    "EVP_DigestSignInit": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p]),
    "EVP_MD_CTX_free": (None, [c_void_p]),
    "EVP_MD_CTX_new": (c_void_p, []),
    "SSL_CTX_get0_privatekey": (c_void_p, [c_void_p]),
}
# Called with the GIL held, and needed for tickets of a fleet only: OpenSSL 3.0 has them.
_TICKETS: dict[str, tuple[Any, list[Any]]] = {
    "EVP_CIPHER_fetch": (c_void_p, [c_void_p, c_char_p, c_char_p]),
    "EVP_DecryptInit_ex": (c_int, [c_void_p, c_void_p, c_void_p, c_char_p, c_void_p]),
    "EVP_EncryptInit_ex": (c_int, [c_void_p, c_void_p, c_void_p, c_char_p, c_void_p]),
    "EVP_MAC_CTX_set_params": (c_int, [c_void_p, c_void_p]),
    "SSL_CTX_set_session_ticket_cb": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "SSL_CTX_set_tlsext_ticket_key_evp_cb": (c_int, [c_void_p, c_void_p]),
    "SSL_SESSION_get_time": (c_long, [c_void_p]),
    "SSL_SESSION_set1_id": (c_int, [c_void_p, c_char_p, c_uint]),
    "SSL_clear_options": (c_uint64, [c_void_p, c_uint64]),
    "SSL_set_generate_session_id": (c_int, [c_void_p, c_void_p]),
    "SSL_set_options": (c_uint64, [c_void_p, c_uint64]),
}
_EX_INDEX_SSL, _EX_INDEX_SSL_SESSION = 0, 2  # CRYPTO_EX_INDEX_SSL, CRYPTO_EX_INDEX_SSL_SESSION
_HOST = "X509_VERIFY_PARAM_get0_host"
# The callbacks that receive a connection, on which they may set anything. That of set_verify() runs in full handshakes
# only.
_PYOPENSSL_CALLBACKS = (
    "_tlsext_servername_callback",
    "_alpn_select_callback",
    "_info_callback",
    "_keylog_callback",
    "_ocsp_callback",
)
_NAMES = [*_QUICK, *_SLOW]


class Library:
    """The functions of one libssl, as attributes of their own names.

    Args:
        address: Returns the address of a function; raises AttributeError or KeyError if there is none.

    Attributes:
        signs: Whether the functions are there that signing takes.
        has_tickets: Whether the functions are there that tickets of a fleet take.
        connection_index: Where a connection keeps a number of ours: SSL_get_ex_data(3).
        taught_index: Where it keeps whether it has taught which context serves its name.
        session_index: Where a session keeps the connection that has negotiated or resumed it:
            SSL_SESSION_get_ex_data(3).
    """

    _host: Callable[[int, int], bytes | None] | None = None

    def __init__(self, address: Callable[[str], int]) -> None:
        for kind, prototypes in ((ctypes.PYFUNCTYPE, _QUICK), (ctypes.CFUNCTYPE, _SLOW)):
            for name, (result, arguments) in prototypes.items():
                setattr(self, name, kind(result, *arguments)(address(name)))
        self.connection_index, self.taught_index, self.session_index = (
            self.CRYPTO_get_ex_new_index(kind, 0, None, None, None, None)
            for kind in (_EX_INDEX_SSL, _EX_INDEX_SSL, _EX_INDEX_SSL_SESSION)
        )
        self.signs = self._load(_OPTIONAL, ctypes.CFUNCTYPE, address)
        self.has_tickets = self._load(_TICKETS, ctypes.PYFUNCTYPE, address)
        with contextlib.suppress(AttributeError, KeyError):
            self._host = ctypes.PYFUNCTYPE(c_char_p, c_void_p, c_int)(address(_HOST))

    def _load(self, prototypes: dict[str, tuple[Any, list[Any]]], kind: Any, address: Callable[[str], int]) -> bool:
        """Load functions that a library may lack; return whether all are there."""
        with contextlib.suppress(AttributeError, KeyError):
            for name, (result, arguments) in prototypes.items():
                setattr(self, name, kind(result, *arguments)(address(name)))
            return True
        return False

    def hosts(self, param: int) -> Iterator[bytes]:
        """Yield the names of which a peer's certificate must have one; none before OpenSSL 3.0, which has no getter."""
        place = 0
        while self._host and (host := self._host(param, place)) is not None:
            yield host
            place += 1

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


class Context(NamedTuple):
    """The SSL_CTX inside a Python TLS context."""

    library: Library
    pointer: int
    chooses_by_name: Callable[[], bool]
    """Returns whether the context has a servername callback: OpenSSL has no getter for it. Keeps no reference."""
    may_change: Callable[[], bool]
    """Returns whether code of the application may run between the look-up of a session and the end of its handshake: it
    may choose another context, or other settings. Keeps no reference."""


def context_of(context: object) -> Context:
    """Return the SSL_CTX of an `ssl.SSLContext` or an `OpenSSL.SSL.Context`.

    Raises:
        UnsupportedContext: It is neither, it is a client's, or its libssl cannot be reached.
    """
    if isinstance(context, ssl.SSLContext):
        if context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise UnsupportedContext(
                "this context is for clients; sessions are stored by servers (PROTOCOL_TLS_SERVER)"
            )
        return _of_ssl(context)
    pyopenssl = sys.modules.get("OpenSSL.SSL")
    if pyopenssl is not None and isinstance(context, pyopenssl.Context):
        return _of_pyopenssl(context)
    raise UnsupportedContext(f"need an ssl.SSLContext or an OpenSSL.SSL.Context, not {type(context).__qualname__}")


def _of_ssl(context: ssl.SSLContext) -> Context:
    if sys.implementation.name != "cpython":
        raise UnsupportedContext("ssl.SSLContext is supported on CPython only; use an OpenSSL.SSL.Context here")
    library, reference = ssl_library(), weakref.ref(context)
    # PySSLContext begins with the SSL_CTX pointer, right behind the object header (CPython 3.10 to 3.14).
    pointer = c_void_p.from_address(id(context) + object.__basicsize__).value
    if not pointer or library.SSL_CTX_get_options(pointer) & 0xFFFFFFFF != int(context.options) & 0xFFFFFFFF:
        raise UnsupportedContext(
            f"the SSL_CTX of ssl.SSLContext was not found on Python {sys.version.split()[0]}; "
            "use an OpenSSL.SSL.Context here"
        )
    if not _is_shown(library, pointer, context):
        raise UnsupportedContext(
            f"this {type(context).__qualname__} forwards to another context, as truststore's do; pass an "
            "ssl.SSLContext that was made before truststore.inject_into_ssl(), or an OpenSSL.SSL.Context"
        )

    def chooses_by_name() -> bool:
        return _attribute(reference, "sni_callback")

    return Context(library, pointer, chooses_by_name, chooses_by_name)


def _is_shown(library: Library, pointer: int, context: ssl.SSLContext) -> bool:
    """Return whether an option that is set in an SSL_CTX shows in the context: then its connections are made of it."""
    before = library.SSL_CTX_get_options(pointer)
    library.SSL_CTX_set_options(pointer, int(ssl.OP_NO_TICKET))
    shown = bool(context.options & ssl.OP_NO_TICKET)
    if not before & ssl.OP_NO_TICKET:
        library.SSL_CTX_clear_options(pointer, int(ssl.OP_NO_TICKET))
    return shown


def _of_pyopenssl(context: Any) -> Context:
    from cryptography.hazmat.bindings.openssl.binding import Binding  # noqa: PLC0415  # needed for these contexts only

    pointer, reference = int(Binding().ffi.cast("uintptr_t", context._context)), weakref.ref(context)  # noqa: SLF001
    return Context(
        cryptography_library(),
        pointer,
        lambda: _attribute(reference, "_tlsext_servername_callback"),
        lambda: any(_attribute(reference, name) for name in _PYOPENSSL_CALLBACKS),
    )


def _attribute(reference: weakref.ref[Any], name: str) -> bool:
    """Return whether a context has that callback; True if that is unknown."""
    return getattr(reference(), name, True) is not None


@cache
def ssl_library() -> Library:
    """Return the libssl of the `ssl` module; raises UnsupportedContext."""
    import _ssl  # noqa: PLC0415

    # A handle's symbols include those of the libraries it was linked with. A statically linked _ssl has no file of its
    # own: its libssl is then in the interpreter.
    path = getattr(_ssl, "__file__", None)
    library = _shared(path)
    if library is None:
        raise UnsupportedContext(
            f"libssl's functions are not visible through {path or 'this statically linked interpreter'}; use a Python "
            "whose _ssl module links a shared libssl, or an OpenSSL.SSL.Context"
        )
    return library


@cache
def cryptography_library() -> Library:
    """Return the libssl of pyOpenSSL; raises UnsupportedContext."""
    from cryptography.hazmat.bindings import _rust  # noqa: PLC0415
    from cryptography.hazmat.bindings.openssl.binding import Binding  # noqa: PLC0415

    path = _rust.__file__
    # Distributions link a shared libssl; the wheels carry their own, whose names are in the symbol table only.
    library = _shared(path)
    if library is None and ctypes.sizeof(c_void_p) != 8:  # noqa: PLR2004
        raise UnsupportedContext(
            f"the symbol table of {path} is read on 64-bit systems only; use a cryptography that links a shared "
            "libssl, such as your distribution's package, or an ssl.SSLContext"
        )
    library = library or _from_symbol_table(path)
    if library is None or library.OpenSSL_version_num() != Binding().lib.OpenSSL_version_num():
        raise UnsupportedContext(
            f"libssl's functions were not found in {path} (stripped?); use the cryptography wheel from PyPI or your "
            "distribution's package, or an ssl.SSLContext"
        )
    return library


def _shared(path: str | None) -> Library | None:
    handle = ctypes.CDLL(path)
    try:
        return Library(lambda name: c_void_p.from_buffer(handle[name]).value or 0)
    except AttributeError:
        return None


def _from_symbol_table(path: str) -> Library | None:
    addresses = _symbol_addresses(Path(path), [*_NAMES, *_OPTIONAL, *_TICKETS, _HOST])
    return Library(addresses.__getitem__) if addresses.keys() >= set(_NAMES) else None


def _symbol_addresses(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Return the addresses, in this process, of functions named in the symbol table of a loaded 64-bit ELF file."""
    try:
        from elftools.elf.elffile import ELFFile  # noqa: PLC0415  # needed for wheels only
    except ImportError:
        raise UnsupportedContext(
            "pyelftools is needed for OpenSSL.SSL.Context: pip install 'resumed[pyopenssl]'"
        ) from None
    with path.open("rb") as file:
        elf = ELFFile(file)
        symbols, strings = elf.get_section_by_name(".symtab"), elf.get_section_by_name(".strtab")
        if elf.elfclass != 64 or symbols is None or strings is None:  # noqa: PLR2004
            return {}
        table, text, order = symbols.data(), strings.data(), "<" if elf.little_endian else ">"
        first_load = next(segment["p_vaddr"] for segment in elf.iter_segments("PT_LOAD"))
    # The names' offsets first, then one pass over the raw table: building an object for each symbol takes over a
    # second.
    pattern = re.compile(b"\0(" + b"|".join(name.encode() for name in names) + rb")(?=\0)")
    offsets = {match.start(1): match[1].decode() for match in pattern.finditer(text)}
    base, executable = _mappings(path.resolve())  # the kernel shows where symbolic links lead
    addresses = {}
    for name_offset, _, _, section, value, _ in struct.iter_unpack(f"{order}IBBHQQ", table):
        if section and name_offset in offsets:
            address = base + value - first_load
            if any(start <= address < end for start, end in executable):
                addresses[offsets[name_offset]] = address
    return addresses


def _mappings(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Return where a file is loaded in this process, and the ranges of its executable mappings."""
    starts, executable = [], []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if not line.endswith(f" {path}"):
            continue
        start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
        starts.append(start)
        if "x" in line.split(" ", 2)[1]:
            executable.append((start, end))
    return min(starts, default=0), executable
