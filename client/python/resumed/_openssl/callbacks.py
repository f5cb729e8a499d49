"""Sets the session callbacks of one SSL_CTX, which call the session policy.

OpenSSL's rules are in SSL_CTX_sess_set_get_cb(3), SSL_CTX_set_session_cache_mode(3) and
SSL_CTX_set_generate_session_id(3). No exception leaves a callback. C must never point to a trampoline that is gone:
they live until the context is gone, and at exit of the interpreter they are unset first.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import itertools
import os
import threading
import time
import weakref
from ctypes import c_int, c_uint, c_void_p, string_at
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from resumed._async.interruption import during, interrupted
from resumed._crypto.envelope import Envelope
from resumed._exceptions import UnsupportedContext
from resumed._openssl.benchmark import measure_signature_seconds
from resumed._openssl.client_hello import TLS1_3_VERSION, offered_ids
from resumed._openssl.context_settings import (
    NO_CALLBACKS,
    OP_NO_TICKET,
    ContextSettings,
    session_callbacks,
    set_session_callbacks,
    unusual_cipher,
)
from resumed._openssl.library import (
    GET_CALLBACK,
    HELLO_CALLBACK,
    ID_CALLBACK,
    INFO_CALLBACK,
    NEW_CALLBACK,
    REMOVE_CALLBACK,
    context_of,
)
from resumed._openssl.offer import StoredOffer
from resumed._openssl.session_checks import BOTH_SHUTDOWN, SessionChecks
from resumed._openssl.session_codec import ID_BYTES, Memory
from resumed._openssl.ticket_callbacks import TicketCallbacks

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._async.suspendable_handshake import SuspendableHandshake
    from resumed._policy.session_policy import SessionPolicy

# <openssl/ssl.h>
_CLIENT_HELLO_SUCCESS = 1
_CLIENT_HELLO_RETRY = -1
_HANDSHAKE_DONE = 0x20  # SSL_CB_HANDSHAKE_DONE
_REASON_MASK = 0x7FFFFF  # ERR_GET_REASON
_MOST_HANDSHAKES = 256
"""How many handshakes are remembered that have looked a session up: those of a thread that serves many at a time."""

_Result = TypeVar("_Result")


class CallbackBinding:
    """The callbacks of a session policy in a TLS context.

    Args:
        context: An `ssl.SSLContext` or an `OpenSSL.SSL.Context`, for servers.
        policy: Decides for the callbacks.
        replace: Whether callbacks that the context already has are replaced (uninstall() puts them back).
        ignore_id_context: Whether sessions resume regardless of the session id contexts that the application sets.

    Raises:
        UnsupportedContext: The callbacks cannot be set; the message says what to do.
    """

    def __init__(
        self, context: Any, policy: SessionPolicy, *, replace: bool = False, ignore_id_context: bool = False
    ) -> None:
        self.library, self._pointer, chooses_by_name, self.context_may_change = context_of(context)
        self._handshakes: dict[int, SuspendableHandshake] = {}  # by the numbers in their connections, the last ones
        self._policy = policy
        library, pointer = self.library, self._pointer
        if library.SSL_CTX_get_max_early_data(pointer):
            raise UnsupportedContext(
                "this context accepts early data, which can be replayed across a fleet; set max_early_data to 0"
            )
        self._own: ContextSettings
        self._context_freed = False
        self._installed = False
        self._checks = SessionChecks(
            library,
            pointer,
            chooses_by_name,
            namespace=policy.namespace,
            namespace_of=_namespace_of,
            # None: that of the application, which OpenSSL compares.
            id_context=hashlib.sha256(policy.namespace.encode()).digest() if ignore_id_context else None,
        )
        self._codec = self._checks.codec
        callbacks = session_callbacks(library, pointer)
        if any(callbacks) and not replace:
            raise UnsupportedContext("this context already has session callbacks; pass replace=True to replace them")
        replaced = _bindings.get(pointer)
        self._replaced = replaced if replaced and replaced._own.callbacks == callbacks else None  # noqa: SLF001  # of this class
        self._previous = ContextSettings.of(library, pointer, self._replaced._own.id_callback if self._replaced else 0)  # noqa: SLF001  # of this class
        self._trampolines = (
            NEW_CALLBACK(self._on_new),
            GET_CALLBACK(self._on_get),
            REMOVE_CALLBACK(self._on_remove),
            ID_CALLBACK(self._on_id),
            HELLO_CALLBACK(self._on_hello),
            INFO_CALLBACK(self._on_info),
        )
        addresses = [ctypes.cast(trampoline, c_void_p).value or 0 for trampoline in self._trampolines]
        own_id, self._own_hello, self._own_info = addresses[3:]
        self.id_callback: int = own_id if policy.seals_ids else 0
        self._tickets = TicketCallbacks(self, self._checks, policy.tickets) if policy.tickets else None
        self._own = self._previous.shared(
            tuple(addresses[:3]),
            0 if self._tickets else self.id_callback,
            policy.lifetime,
            stateless=self._tickets is not None,
            mixed=ignore_id_context,
        )
        if ignore_id_context and (cipher := unusual_cipher(library, pointer)):
            self._checks.warn(
                f"this context prefers {cipher} in TLS 1.3; its sessions resume only at frontends with the same order "
                "of ciphersuites, and theirs only here: configure the same order everywhere"
            )
        self._current_handshake = _CurrentHandshake()
        library.SSL_CTX_up_ref(pointer)  # until the finalizer has unset the callbacks
        weakref.finalize(context, self._release).atexit = False  # at exit see _unset_at_exit
        self._install()
        _bindings[pointer] = self
        _live.add(self)

    @property
    def callbacks(self) -> tuple[Any, ...]:
        """The context's callbacks for new sessions, look-ups and removals as ctypes functions; None where unset."""
        prototypes = NEW_CALLBACK, GET_CALLBACK, REMOVE_CALLBACK
        pairs = zip(prototypes, self._current(), strict=True)
        return tuple(prototype(address) if address else None for prototype, address in pairs)

    @cached_property
    def signature_seconds(self) -> float | None:
        """How long a signature with the context's own key takes here; measured when first asked for."""
        return None if self._context_freed else measure_signature_seconds(self.library, self._pointer)

    def begin(self, find_resume_callback: Callable[[], Callable[[], None] | None]) -> SuspendableHandshake:
        """Return the handshake of a connection that begins, for run_step(); see SuspendableHandshake."""
        return self._policy.handshake(find_resume_callback)

    def run_step(self, handshake: SuspendableHandshake, step: Callable[[], _Result]) -> _Result:
        """Take a step of a handshake that may rest until its look-ups are done.

        Args:
            handshake: Says by `handshake.suspended`, when the step has failed, that it is to be taken again.
            step: Calls SSL_do_handshake, or what calls it.
        """
        if self._installed:
            # Not before, as it costs handshakes of other threads another wait for the GIL.
            self._set_hello_callback(self._own_hello)
        self._current_handshake.handshake = handshake
        handshake.suspended = False
        try:
            return during(step)
        finally:
            self._current_handshake.handshake = None

    def uninstall(self) -> None:
        """Put back the callbacks and settings that the context had; another CallbackBinding that was replaced goes on.

        OpenSSL has no getter for the id generator and the session id context: the generator becomes OpenSSL's own, and
        where `ignore_id_context` was set the namespace's id context stays, as contexts that verify clients must have
        one. If another CallbackBinding has replaced this one, that one will put back this one's settings. If the
        application has, or if the context is gone, this does nothing.
        """
        if self._current() != self._own.callbacks:
            binding = _bindings.get(self._pointer)
            while binding and binding._replaced is not self:  # noqa: SLF001  # of this class
                binding = binding._replaced  # noqa: SLF001  # of this class
            if binding:
                binding._previous, binding._replaced = self._previous, self._replaced  # noqa: SLF001  # of this class
            return
        self._apply(self._previous)
        if self._replaced:
            _bindings[self._pointer] = self._replaced
            self._replaced._install_hooks()  # noqa: SLF001  # of this class
        else:
            _bindings.pop(self._pointer, None)

    def _install(self) -> None:
        library, pointer, id_context = self.library, self._pointer, self._checks.id_context
        if id_context:
            library.SSL_CTX_set_session_id_context(pointer, id_context, len(id_context))
        if self._replaced:
            self._replaced._uninstall_hooks()  # noqa: SLF001  # of this class
        self._apply(self._own)
        self._install_hooks()
        if self._current() != self._own.callbacks:
            raise UnsupportedContext("libssl does not give the callbacks back that were set; please report this")

    def _install_hooks(self) -> None:
        """Set the callbacks that OpenSSL has no getters for."""
        self._installed = True
        if self._tickets:
            self._tickets.install(self._pointer)
            self._set_hello_callback(self._own_hello)  # it decides for each connection whether it gets tickets

    def _current(self) -> tuple[int, ...]:
        return NO_CALLBACKS if self._context_freed else session_callbacks(self.library, self._pointer)

    def _apply(self, settings: ContextSettings) -> None:
        settings.apply(self.library, self._pointer)
        self._uninstall_hooks()

    def _uninstall_hooks(self) -> None:
        self._installed = False
        self._set_hello_callback(None)  # none until run_step() needs one
        if self._tickets:
            self._tickets.uninstall(self._pointer)

    def _set_hello_callback(self, address: int | None) -> None:
        self.library.SSL_CTX_set_client_hello_cb(self._pointer, address, None)

    def _unset(self) -> None:
        if self._current() == self._own.callbacks:
            set_session_callbacks(self.library, self._pointer, NO_CALLBACKS, 0)
            self._uninstall_hooks()

    def _release(self) -> None:
        """Release a context that Python has freed. SSL objects that C still uses call nothing any more."""
        self._unset()
        self._context_freed = True
        self.library.SSL_CTX_free(self._pointer)
        _live.discard(self)
        self._policy.close(timeout=0)

    def _on_new(self, ssl: int, session: int) -> int:
        """Store a session. Returns 0: no reference is kept, OpenSSL releases its own."""
        try:
            if self._tickets and self._tickets.is_ticket(session):
                return 0
            self._store(ssl, session)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self.handle_callback_error(error)
        return 0

    def _store(self, ssl: int, session: int) -> None:
        library, codec = self.library, self._codec
        session_id = codec.id_of(session)
        if self._tickets and len(session_id) != ID_BYTES:  # of a ticket; see TicketCallbacks
            return
        tls13 = library.SSL_version(ssl) == TLS1_3_VERSION
        # A stateless ticket carries its session itself: in TLS 1.2 it has no id, in TLS 1.3 the option shows it.
        stateless = not session_id or (tls13 and not library.SSL_get_options(ssl) & OP_NO_TICKET)
        if stateless or not library.SSL_SESSION_is_resumable(session):
            self._policy.count_unresumable()
            return
        if id_context := self._checks.id_context:
            # CPython 3.13 and later set a session id context of their own in each SSL (cpython issue 105293).
            library.SSL_SESSION_set1_id_context(session, id_context, len(id_context))
        memory = self._check_session(ssl, session)
        if memory is None:
            self._policy.count_unresumable()
            return
        # OpenSSL notes the name only where the server has a servername callback, and compares it nowhere: see offer.py.
        library.SSL_SESSION_set1_hostname(session, self._checks.server_name(ssl) or None)
        codec.remember(session, None)  # the memory is not stored
        serialized = codec.serialized(session)
        remaining = self._remaining(session, memory)
        last, family = True, frozenset[bytes]()
        if tls13:
            memory = memory._replace(siblings=memory.siblings + session_id)
            tickets = 1 if library.SSL_session_reused(ssl) else library.SSL_get_num_tickets(ssl)
            last = len(memory.siblings) >= tickets * ID_BYTES
            family = frozenset(memory.ids) if last else family
        codec.remember(session, memory)
        library.SSL_SESSION_set_ex_data(session, library.session_index, ssl)
        envelope = Envelope(memory.fingerprint, memory.issued, serialized)
        self._policy.on_new_session(session_id, envelope, remaining, last=last, family=family)

    def _check_session(self, ssl: int, session: int) -> Memory | None:
        """Return the memory of a session that is about to be stored; None if it must not be shared."""
        library, checks = self.library, self._checks
        data = self._codec.data_of(session)
        memory = Memory.decode(data)
        if data and memory is None:
            checks.warn_of_foreign_data()
            return None
        mode = library.SSL_get_verify_mode(ssl)
        if not checks.may_share(ssl, session, mode):
            return None
        reused = bool(library.SSL_session_reused(ssl))
        if memory and (
            self._ends_handshake(ssl, memory, reused)
            or (reused and checks.contexts.agrees(ssl, mode, memory.fingerprint))
        ):
            return memory
        if reused:
            return None
        fingerprint = checks.learn(ssl, session, mode)
        # Later tickets of a connection are issued as it is then: post-handshake authentication may have changed it.
        return memory._replace(fingerprint=fingerprint) if memory else Memory(fingerprint, time.time(), 0, b"")

    def _ends_handshake(self, ssl: int, memory: Memory, reused: bool) -> bool:
        """Return whether a ticket is one of those that end a handshake: nothing has changed since its memory was made.

        What resumed was confirmed before its ticket is written; later ones may follow post-handshake authentication.
        """
        tickets: int = self.library.SSL_get_num_tickets(ssl)
        if reused:
            tickets = min(tickets, 1) + 1  # with the one that was offered
        return len(memory.siblings) < tickets * ID_BYTES

    def _remaining(self, session: int, memory: Memory) -> float:
        """Return the seconds that a session lives, at most until its peer's certificate ends."""
        remaining: float = self.library.SSL_SESSION_get_timeout(session)
        if memory.end:
            # The timeout begins with the ticket, and so behind a handshake that a client can draw out.
            remaining = memory.end - self._policy.now()
        valid = self._codec.peer_seconds(session)
        return remaining if valid is None else min(remaining, valid)

    def _on_get(self, ssl: int, data: int, length: int, copy: int) -> int | None:
        """Return a session for the id that a client offers, or None. Its one reference goes to OpenSSL."""
        try:
            c_int.from_address(copy).value = 0
            session_id = string_at(data, length) if length > 0 else b""
            session = self._policy.on_get_session(self._offer(ssl, session_id), self.handshake(ssl))
            if session is not None:
                self.confirm_later(ssl)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self.handle_callback_error(error)
            return None
        return session

    def confirm_later(self, ssl: int) -> None:
        """Have a resumed connection checked once more when its handshake is done, if its context may change by then."""
        if self.context_may_change():
            self.library.SSL_set_info_callback(ssl, self._own_info)

    def _offer(self, ssl: int, session_id: bytes) -> StoredOffer:
        return StoredOffer(self.library, self._checks, ssl, session_id, self._policy.now)

    def handshake(self, ssl: int) -> SuspendableHandshake:
        """Return what keeps the look-ups of a connection's handshake: OpenSSL may ask many times in each.

        A number in the connection distinguishes it from later ones at the same address.
        """
        if self._current_handshake.handshake is not None:
            return self._current_handshake.handshake
        if not ssl:  # Installation.get_callback may be called without a connection
            return self._policy.handshake()
        library = self.library
        handshake = self._handshakes.get(library.SSL_get_ex_data(ssl, library.connection_index) or 0)
        if handshake is None:
            number, handshake = next(_numbers), self._policy.handshake()
            library.SSL_set_ex_data(ssl, library.connection_index, number)
            self._handshakes[number] = handshake
            if len(self._handshakes) > _MOST_HANDSHAKES:
                with contextlib.suppress(KeyError, RuntimeError):  # another thread was quicker
                    del self._handshakes[next(iter(self._handshakes))]
        return handshake

    def _on_info(self, ssl: int, where: int, result: int) -> None:
        """Check a connection once more when its handshake is done; set for connections that received a session."""
        try:
            library = self.library
            replaced = library.SSL_CTX_get_info_callback(library.SSL_get_SSL_CTX(ssl))
            if replaced:
                INFO_CALLBACK(replaced)(ssl, where, result)
            if where & _HANDSHAKE_DONE:
                library.SSL_set_info_callback(ssl, None)
                self._confirm(ssl)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self.handle_callback_error(error)

    def _confirm(self, ssl: int) -> None:
        """End a resumed connection if the context that serves is not the one that negotiated its session.

        A servername callback, or any other code of the application, may have chosen it since the look-up.
        """
        library = self.library
        if not library.SSL_session_reused(ssl) or self._checks.is_confirmed(ssl):
            return
        library.SSL_set_shutdown(ssl, BOTH_SHUTDOWN)
        self._policy.count_termination()
        # A ticket has no name in its session, and the callback of the application has shown the connection's by now.
        self._checks.distrust(
            library.SSL_SESSION_get0_hostname(library.SSL_get_session(ssl)) or self._checks.server_name(ssl)
        )

    def _on_hello(self, ssl: int, _alert: int, _data: int) -> int:
        """Suspend a handshake whose sessions are being looked up, if its driver can resume it."""
        try:
            tickets = self._tickets if self._tickets and self._tickets.choose_kind(ssl) else None
            handshake = self._current_handshake.handshake
            if handshake is not None:
                if tickets:
                    tickets.start_claim(ssl, handshake)
                else:
                    handshake.start_lookups(
                        offered_ids(self.library, ssl),
                        lambda session_id: self._policy.find(self._offer(ssl, session_id), handshake, may_suspend=True),
                    )
                if handshake.suspended:
                    return _CLIENT_HELLO_RETRY
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self.handle_callback_error(error)
        return _CLIENT_HELLO_SUCCESS

    def _on_remove(self, _ctx: int, session: int) -> None:
        """Report a connection that ended without our close_notify to the policy.

        May run under the context's lock, so it never blocks.
        """
        try:
            library = self.library
            connection = library.SSL_SESSION_get_ex_data(session, library.session_index)
            # A connection has failed by itself if it is back in its handshake (ossl_statem_fatal()). Without that it is
            # freed, and the thread's last error may have another cause: the garbage collector frees connections, too.
            failed = connection and library.SSL_in_init(connection)
            reason = library.ERR_peek_last_error() & _REASON_MASK if failed else 0
            state = self._codec.ticket_state(session)
            if state:
                self._policy.on_connection_failed({state.lineage}, reason, state.end)
            else:
                self._policy.on_connection_failed(self._codec.ids_of(session), reason)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self.handle_callback_error(error)

    def _on_id(self, ssl: int, data: int, length: int) -> int:
        """Write a session id. Returning 0 would end the handshake, so a defect here means a random id."""
        try:
            self._checks.warn_of_missing_id_context(ssl)
            session_id = self.issue_id(ssl)
            ctypes.memmove(data, session_id, len(session_id))
            c_uint.from_address(length).value = len(session_id)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self.handle_callback_error(error)
            ctypes.memmove(data, os.urandom(ID_BYTES), ID_BYTES)
            c_uint.from_address(length).value = ID_BYTES
        return 1

    def issue_id(self, ssl: int) -> bytes:
        """Return the id for a stored session of a connection."""
        return self._policy.issue_id(resumed=bool(self.library.SSL_session_reused(ssl)))

    def handle_callback_error(self, error: BaseException) -> None:
        """Count a defect that a callback caught, and log it; or have its interruption raised later."""
        if isinstance(error, Exception):
            self._policy.count_internal_error()
        else:
            interrupted(error)


class _CurrentHandshake(threading.local):
    """The handshake that this thread takes a step of."""

    handshake: SuspendableHandshake | None = None


def _namespace_of(pointer: int) -> str | None:
    """Return the namespace in which a context shares its sessions; None if it shares none."""
    binding = _bindings.get(pointer)
    return binding._policy.namespace if binding else None  # noqa: SLF001  # of this module


_numbers = itertools.count(1)
_bindings: weakref.WeakValueDictionary[int, CallbackBinding] = weakref.WeakValueDictionary()
_live: weakref.WeakSet[CallbackBinding] = weakref.WeakSet()


@atexit.register
def _unset_at_exit() -> None:
    """Unset all callbacks before the interpreter goes."""
    for binding in list(_live):
        # A thread may be on its way into a trampoline: they stay, the process ends anyway.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(binding))
        binding._unset()  # noqa: SLF001  # of this module
