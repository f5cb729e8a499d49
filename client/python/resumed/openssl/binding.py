"""Sets the session callbacks of one SSL_CTX, which have the shim decide.

OpenSSL's rules are in SSL_CTX_sess_set_get_cb(3), SSL_CTX_set_session_cache_mode(3) and
SSL_CTX_set_generate_session_id(3). No exception leaves a callback. C must never point to a trampoline that is gone:
they live until the context is gone, and at exit of the interpreter they are unset first.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import math
import os
import signal
import threading
import time
import weakref
from ctypes import c_int, c_uint, c_void_p, string_at
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from resumed.errors import Unsealable, UnsupportedContext
from resumed.openssl.hello import offered_ids, requested_name
from resumed.openssl.library import (
    GET_CALLBACK,
    HELLO_CALLBACK,
    ID_CALLBACK,
    NEW_CALLBACK,
    REMOVE_CALLBACK,
    context_of,
)
from resumed.openssl.sessions import ID_BYTES, Sessions
from resumed.openssl.signing import signature_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed.prefetch import Handshake
    from resumed.shim import Shim

# <openssl/ssl.h>
_CTRL_SET_SESS_CACHE_MODE = 44
_CTRL_GET_SESS_CACHE_MODE = 45
_SESS_CACHE_SERVER = 0x2
_SESS_CACHE_NO_INTERNAL = 0x300
_OP_NO_TICKET = 1 << 14
_CLIENT_HELLO_SUCCESS = 1
_CLIENT_HELLO_RETRY = -1
_TLS1_3_VERSION = 0x304
_HOST_NAME = 0  # TLSEXT_NAMETYPE_host_name

_REASON_MASK = 0x7FFFFF  # ERR_GET_REASON

_Result = TypeVar("_Result")


class Binding:
    """The callbacks of a shim in a TLS context.

    Args:
        context: An `ssl.SSLContext` or an `OpenSSL.SSL.Context`, for servers.
        shim: What the callbacks ask.
        replace: Whether callbacks that the context already has are replaced (uninstall() puts them back).

    Raises:
        UnsupportedContext: The callbacks cannot be set; the message says what to do.
    """

    def __init__(self, context: Any, shim: Shim, *, replace: bool = False) -> None:
        self._library, self._pointer, self._default_id_context = context_of(context)
        self._sessions = Sessions(self._library)
        self._shim = shim
        library, pointer = self._library, self._pointer
        if library.SSL_CTX_get_max_early_data(pointer):
            raise UnsupportedContext(
                "this context accepts early data, which can be replayed across a fleet; set max_early_data to 0"
            )
        self._gone = False
        self._id_context = hashlib.sha256(shim.namespace.encode()).digest()
        self._previous = self._current()
        if any(self._previous) and not replace:
            raise UnsupportedContext("this context already has session callbacks; pass replace=True to replace them")
        self._previous_settings = (
            library.SSL_CTX_ctrl(pointer, _CTRL_GET_SESS_CACHE_MODE, 0, None),
            library.SSL_CTX_get_options(pointer) & _OP_NO_TICKET,
            library.SSL_CTX_get_timeout(pointer),
        )
        self._trampolines = (
            NEW_CALLBACK(self._on_new),
            GET_CALLBACK(self._on_get),
            REMOVE_CALLBACK(self._on_remove),
            ID_CALLBACK(self._on_id),
            HELLO_CALLBACK(self._on_hello),
        )
        addresses = [ctypes.cast(trampoline, c_void_p).value or 0 for trampoline in self._trampolines]
        self._own, self._own_id, self._own_hello = tuple(addresses[:3]), addresses[3], addresses[4]
        self._driven = _Driven()
        library.SSL_CTX_up_ref(pointer)  # until the finalizer has unset the callbacks
        weakref.finalize(context, self._release).atexit = False  # at exit see _leave
        self._install()
        _live.add(self)

    @property
    def new_callback(self) -> Any:
        """What SSL_CTX_sess_get_new_cb returns, as a ctypes function; None when unset."""
        return _function(NEW_CALLBACK, self._current()[0])

    @property
    def get_callback(self) -> Any:
        """What SSL_CTX_sess_get_get_cb returns, as a ctypes function; None when unset."""
        return _function(GET_CALLBACK, self._current()[1])

    @property
    def remove_callback(self) -> Any:
        """What SSL_CTX_sess_get_remove_cb returns, as a ctypes function; None when unset."""
        return _function(REMOVE_CALLBACK, self._current()[2])

    @cached_property
    def signature_seconds(self) -> float | None:
        """How long a signature with the context's own key takes here; measured when first asked for."""
        return None if self._gone else signature_seconds(self._library, self._pointer)

    def drive(self, handshake: Handshake, step: Callable[[], _Result]) -> _Result:
        """Take a step of a handshake that may rest until its look-ups are done.

        Args:
            handshake: Says by `handshake.rests`, when the step has failed, that it is to be taken again.
            step: Calls SSL_do_handshake, or what calls it.
        """
        if self._installed:
            # Not before, as it costs handshakes of other threads another wait for the GIL.
            self._library.SSL_CTX_set_client_hello_cb(self._pointer, self._own_hello, None)
        self._driven.handshake = handshake
        handshake.rests = False
        try:
            return step()
        finally:
            self._driven.handshake = None

    def uninstall(self) -> None:
        """Put back the callbacks and settings that the context had.

        OpenSSL has no getter for the session id context and the id generator: they become what the Python module sets
        itself. Does nothing if the callbacks were replaced since, or the context is gone.
        """
        if self._current() != self._own:
            return
        mode, no_ticket, timeout = self._previous_settings
        self._set(self._previous, 0)
        self._library.SSL_CTX_ctrl(self._pointer, _CTRL_SET_SESS_CACHE_MODE, mode, None)
        self._library.SSL_CTX_set_timeout(self._pointer, timeout)
        if not no_ticket:
            self._library.SSL_CTX_clear_options(self._pointer, _OP_NO_TICKET)
        self._set_id_context(self._default_id_context)

    def _install(self) -> None:
        library, pointer = self._library, self._pointer
        # No internal cache: in it a session would outlive its removal from the fleet, and its eviction would remove it
        # there.
        library.SSL_CTX_ctrl(pointer, _CTRL_SET_SESS_CACHE_MODE, _SESS_CACHE_SERVER | _SESS_CACHE_NO_INTERNAL, None)
        library.SSL_CTX_set_options(pointer, _OP_NO_TICKET)
        library.SSL_CTX_set_timeout(pointer, self._shim.lifetime)
        self._set_id_context(self._id_context)
        self._set(self._own, self._own_id if self._shim.seals_ids else 0)
        if self._current() != self._own:
            raise UnsupportedContext("libssl does not give the callbacks back that were set; please report this")

    def _current(self) -> tuple[int, ...]:
        if self._gone:
            return (0, 0, 0)
        library, pointer = self._library, self._pointer
        return (
            library.SSL_CTX_sess_get_new_cb(pointer) or 0,
            library.SSL_CTX_sess_get_get_cb(pointer) or 0,
            library.SSL_CTX_sess_get_remove_cb(pointer) or 0,
        )

    def _set(self, callbacks: tuple[int, ...], id_callback: int) -> None:
        new, get, remove = callbacks
        # Nobody's, until drive() needs it.
        self._installed = callbacks == self._own
        self._library.SSL_CTX_set_client_hello_cb(self._pointer, None, None)
        self._library.SSL_CTX_sess_set_new_cb(self._pointer, new)
        self._library.SSL_CTX_sess_set_get_cb(self._pointer, get)
        self._library.SSL_CTX_sess_set_remove_cb(self._pointer, remove)
        self._library.SSL_CTX_set_generate_session_id(self._pointer, id_callback)

    def _set_id_context(self, id_context: bytes) -> None:
        self._library.SSL_CTX_set_session_id_context(self._pointer, id_context, len(id_context))

    def _unset(self) -> None:
        if self._current() == self._own:
            self._set((0, 0, 0), 0)

    def _release(self) -> None:
        """Let go of a context that Python has let go of. SSL objects that C still holds call nothing any more."""
        self._unset()
        self._gone = True
        self._library.SSL_CTX_free(self._pointer)
        _live.discard(self)
        self._shim.close(timeout=0)

    def _on_new(self, ssl: int, session: int) -> int:
        """Store a session. Returns 0: no reference is kept, OpenSSL releases its own."""
        try:
            self._store(ssl, session)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._caught(error)
        return 0

    def _store(self, ssl: int, session: int) -> None:
        library, sessions = self._library, self._sessions
        session_id = sessions.id_of(session)
        tls13 = library.SSL_version(ssl) == _TLS1_3_VERSION
        # A stateless ticket carries its session itself: in TLS 1.2 it has no id, in TLS 1.3 it is told by the option.
        stateless = not session_id or (tls13 and not library.SSL_get_options(ssl) & _OP_NO_TICKET)
        if stateless or not library.SSL_SESSION_is_resumable(session):
            self._shim.unresumable()
            return
        # CPython 3.13 and later set a session id context of their own in each SSL (cpython issue 105293).
        library.SSL_SESSION_set1_id_context(session, self._id_context, len(self._id_context))
        # OpenSSL notes the name only where the server has a servername callback, and compares it nowhere: see _decode.
        library.SSL_SESSION_set1_hostname(session, (library.SSL_get_servername(ssl, _HOST_NAME) or b"").lower() or None)
        last, issued, remaining = True, time.time(), library.SSL_SESSION_get_timeout(session)
        if tls13:
            known, end, siblings = sessions.remembered(session)
            issued = issued if known is None else known
            sessions.remember(session, issued)  # end and siblings are not part of what is stored
            serialized = sessions.serialized(session)
            siblings += session_id
            sessions.remember(session, issued, end, siblings)
            tickets = 1 if library.SSL_session_reused(ssl) else library.SSL_get_num_tickets(ssl)
            last = len(siblings) >= tickets * ID_BYTES
            if end:
                # The timeout begins with the ticket, and so behind a handshake that a client can draw out.
                remaining = end - self._shim.now()
        else:
            serialized = sessions.serialized(session)
        self._shim.negotiated(session_id, serialized, remaining, last=last, issued=issued)

    def _on_get(self, ssl: int, data: int, length: int, copy: int) -> int | None:
        """Return a session for the id that a client offers, or None. Its one reference goes to OpenSSL."""
        try:
            c_int.from_address(copy).value = 0
            session_id = string_at(data, length) if length > 0 else b""
            handshake = self._driven.handshake
            return self._shim.look_up(
                session_id,
                lambda serialized, remaining: self._decode(ssl, session_id, serialized, remaining),
                None if handshake is None else handshake.answer(session_id),
            )
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._caught(error)
            return None

    def _on_hello(self, ssl: int, _alert: int, _data: int) -> int:
        """Have a handshake rest whose sessions are being looked up, if its driver goes on with it later."""
        try:
            handshake = self._driven.handshake
            if handshake is not None:
                handshake.offers(offered_ids(self._library, ssl))
                if handshake.rests:
                    return _CLIENT_HELLO_RETRY
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._caught(error)
        return _CLIENT_HELLO_SUCCESS

    def _on_remove(self, _ctx: int, session: int) -> None:
        """Tell the shim of a connection that ended without our close_notify.

        May run under the context's lock, so it never blocks.
        """
        try:
            reason = self._library.ERR_peek_last_error() & _REASON_MASK
            ids = self._sessions.remembered(session).ids | {self._sessions.id_of(session)}
            self._shim.ended(ids - {b""}, reason)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._caught(error)

    def _on_id(self, _ssl: int, data: int, length: int) -> int:
        """Write a session id. Returning 0 would end the handshake, so a defect here means a random id."""
        try:
            session_id = self._shim.issue_id()
            ctypes.memmove(data, session_id, len(session_id))
            c_uint.from_address(length).value = len(session_id)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._caught(error)
            ctypes.memmove(data, os.urandom(ID_BYTES), ID_BYTES)
            c_uint.from_address(length).value = ID_BYTES
        return 1

    def _decode(self, ssl: int, session_id: bytes, serialized: bytes, remaining: float) -> int:
        library, sessions = self._library, self._sessions
        session = sessions.decoded(serialized, session_id)
        # RFC 6066 section 3. A servername callback may choose another context, one that wants client certificates, say,
        # only after OpenSSL has accepted the session by what this one wants.
        if (library.SSL_SESSION_get0_hostname(session) or b"") != requested_name(library, ssl):
            library.SSL_SESSION_free(session)
            raise Unsealable("other-name")
        library.SSL_SESSION_set_time(session, int(time.time()))
        library.SSL_SESSION_set_timeout(session, math.ceil(remaining))
        # What nobody knows the time of was before any purge. Tickets issued on the resumed connection end when the
        # negotiated session does, which is at a whole second.
        issued = sessions.remembered(session).issued
        sessions.remember(session, issued or 0.0, int(self._shim.now() + remaining), session_id)
        # OpenSSL compares it with the session's next: see _store.
        library.SSL_set_session_id_context(ssl, self._id_context, len(self._id_context))
        return session

    def _caught(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            # It belongs to the main thread's own code: signal again once this callback has returned.
            main = threading.main_thread().ident or 0
            threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            self._shim.internal_error()


class _Driven(threading.local):
    """The handshake that this thread takes a step of."""

    handshake: Handshake | None = None


def _function(prototype: Any, address: int) -> Any:
    return prototype(address) if address else None


_live: weakref.WeakSet[Binding] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    """Unset all callbacks before the interpreter goes."""
    for binding in list(_live):
        # A thread may be on its way into a trampoline: they stay, the process ends anyway.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(binding))
        binding._unset()  # noqa: SLF001  # of this module
