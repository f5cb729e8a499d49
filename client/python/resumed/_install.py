"""install(): puts the store under a TLS context."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from resumed._async.ssl_classes import enable
from resumed._client.limits import NAMESPACE_PATTERN
from resumed._client.store import StoreClient
from resumed._crypto.keyring import Keyring
from resumed._openssl import CallbackBinding, session_ids
from resumed._policy.mirror import DEFAULT_BYTES, Mirror
from resumed._policy.session_policy import SessionPolicy
from resumed._policy.ticket_secrets import DEFAULT_ROTATION
from resumed._policy.tickets import DEFAULT_GRACE, TicketOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from concurrent.futures import Future

    from opentelemetry.trace import TracerProvider

    from resumed._policy.stats import Stats
    from resumed._transport.tls import Credentials


class Installation:
    """A TLS context that shares its sessions: keep it for `stats` and uninstall(); the context itself needs no help."""

    def __init__(
        self, policy: SessionPolicy, binding: CallbackBinding, disable_suspension: Callable[[], None] | None
    ) -> None:
        self._policy, self._binding, self._disable_suspension = policy, binding, disable_suspension

    @property
    def namespace(self) -> str:
        """The name of the fleet that shares these sessions."""
        return self._policy.namespace

    @property
    def stats(self) -> Stats:
        """Hits, misses, puts and removals by reason, and look-up times, of this process."""
        return self._policy.stats

    @property
    def breaker_open(self) -> bool:
        """Whether the store kept failing, so that handshakes do not call it at present."""
        return self._policy.breaker_open

    @property
    def keyring_last_reload(self) -> tuple[bool, float] | None:
        """Whether the keyring file can be used now, and when it last could, in Unix seconds; None without a file."""
        return self._policy.keyring_last_reload

    @property
    def mirror_live(self) -> bool | None:
        """Whether the mirror is up to date and used for look-ups; None without a mirror."""
        return self._policy.mirror_live

    @property
    def removals_live(self) -> bool | None:
        """Whether this process has all removals of tickets up to a moment ago; None without tickets."""
        return self._policy.tickets.live if self._policy.tickets else None

    @property
    def removals_held(self) -> int:
        """How many removals of tickets this process holds."""
        return len(self._policy.tickets.removals) if self._policy.tickets else 0

    @property
    def ticket_secrets_held(self) -> int:
        """How many secrets of tickets this process holds: 0 until the store has answered."""
        return self._policy.tickets.secrets_held if self._policy.tickets else 0

    @property
    def ticket_secret(self) -> tuple[float, bool] | None:
        """The secret that encrypts new tickets: its creation in Unix seconds, and whether its epoch has ended.

        None until the store has answered, and without tickets.
        """
        current = self._policy.tickets and self._policy.tickets.encrypting_secret
        return (current[0].created, current[1]) if current else None

    @property
    def signature_seconds(self) -> float | None:
        """How long a signature with the context's own key takes on this machine, in seconds.

        Each resumption saves the server at least this much processor time: the key exchange that TLS 1.2 skips as well,
        the certificates that are not sent, and the savings of the client are not included. Measured when first
        asked for, the fastest of five. None if the context has no key of its own.
        """
        return self._binding.signature_seconds

    @property
    def new_callback(self) -> Any:
        """The context's new-session callback (SSL_CTX_sess_get_new_cb) as a ctypes function; None when unset."""
        return self._binding.callbacks[0]

    @property
    def get_callback(self) -> Any:
        """The context's get-session callback (SSL_CTX_sess_get_get_cb) as a ctypes function; None when unset."""
        return self._binding.callbacks[1]

    @property
    def remove_callback(self) -> Any:
        """The context's remove-session callback (SSL_CTX_sess_get_remove_cb) as a ctypes function; None when unset."""
        return self._binding.callbacks[2]

    def remove(self, sessions: object) -> Future[bool]:
        """Remove sessions from the whole fleet, in the background.

        In this process they resume no more when this returns. In others they resume until the store has removed them;
        in those that have a mirror, until the mirror has received the change.

        Args:
            sessions: A connection of this context or its session, for all sessions that the connection has negotiated
                or resumed, as in session_ids(): a TLS 1.3 connection has several. Or ids: `bytes` for one, an iterable
                of them for several; of their connections it removes the others as well if it was this process that
                served them lately (the last 16,384 sessions).

        Returns:
            Its result is whether the store has acknowledged all of them; False if the store refused one, or it was
            never sent. While the store does not answer there is no result. Wait for it with `result(timeout)`, or under
            asyncio with `asyncio.wrap_future()`.

        Raises:
            TypeError: They are nothing of that kind.
            ValueError: The connection has no session: its handshake is not over, or it is closed.
        """
        if isinstance(sessions, bytes):
            return self._policy.remove([sessions])
        if not isinstance(sessions, Iterable):
            return self._policy.remove(self.session_ids(sessions))
        ids = frozenset(sessions)
        if not all(isinstance(each, bytes) for each in ids):
            raise TypeError("session ids are bytes")
        return self._policy.remove(ids)

    @staticmethod
    def session_ids(source: object) -> frozenset[bytes]:
        """Return the ids of all sessions that a connection has negotiated or resumed so far, for a later remove().

        Args:
            source: A connection of this context (`ssl.SSLSocket`, `ssl.SSLObject`, `OpenSSL.SSL.Connection`) or its
                session (`ssl.SSLSession`, `OpenSSL.SSL.Session`).

        Raises:
            TypeError: It is nothing of that kind.
            ValueError: The connection has no session: its handshake is not over, or it is closed.
        """
        return session_ids(source)

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait until all Puts and removals so far are sent.

        Returns:
            Whether that was done within `timeout` seconds, and the store has acknowledged all removals. One that it
            refused, or that was dropped, counts until it is repeated.
        """
        return self._policy.flush(timeout)

    def uninstall(self) -> None:
        """Put back the callbacks and settings that the context had, send the pending writes, and disconnect."""
        if self._disable_suspension:
            self._disable_suspension()
        self._binding.uninstall()
        self._policy.close()


def install(
    context: Any,
    *,
    target: str,
    namespace: str,
    keyring: Keyring | str | os.PathLike[str],
    lifetime: int = 7200,
    deadline: float = 0.05,
    single_use: bool = False,
    accept_foreign_ids: bool = False,
    puts: Literal["wait", "background"] | None = None,
    max_lookups: int = 64,
    mirror: bool | int | str = False,
    credentials: Credentials | None = None,
    replace: bool = False,
    ignore_id_context: bool = False,
    tracer_provider: TracerProvider | None = None,
    sessions: Literal["stored", "tickets"] = "stored",
    tickets_tls12: bool = False,
    rotation: int = DEFAULT_ROTATION,
    revocation_grace: float = DEFAULT_GRACE,
) -> Installation:
    """Let a TLS server's context keep its sessions in the store, and resume what any other frontend negotiated.

    Sets the context's session callbacks, id generator and session timeout, and switches stateless tickets and the
    internal cache off. Call it before the first connection; a server that forks may call it before
    it does.

    Args:
        context: An `ssl.SSLContext` or an `OpenSSL.SSL.Context`, for servers.
        target: Where the store is, as a gRPC name: `dns:///store:7400`, `127.0.0.1:7400`, `unix:/run/resumed.sock`.
        namespace: The name of the fleet that shares these sessions: 1 to 63 characters of [a-z0-9.-]. Within it a
            session resumes only where the server shows a certificate of the same names, and verifies clients in the
            same way, as where it was negotiated (docs/contexts.md). Tenants need different namespaces, and so do
            contexts whose verify callbacks decide differently.
        keyring: The fleet's keys: a keyring file (`resumed keygen`), or a Keyring.
        lifetime: Seconds that a session lives after its negotiation, 1 to 604,800 (RFC 8446 section 4.6.1).
        deadline: Seconds that a handshake may wait for the store, above 0; all of its look-ups together.
        single_use: Whether a session resumes once in the whole fleet (RFC 8446 section 8.1): a look-up Gets it, and
            Takes it if it fits. The mirror is not used then.
        accept_foreign_ids: Whether ids that the fleet did not issue are looked up, too, as in a fleet with TLS stacks
            that cannot choose their ids (Node).
        puts: `background` never holds up a handshake; `wait` holds a full one until its sessions are stored, at most
            for the deadline. None is `background`, but `wait` with a plaintext keyring.
        max_lookups: How many look-ups may be under way at once, each on a connection of its own; beyond that handshakes
            do not ask.
        mirror: Whether to keep a copy of the namespace's sealed sessions in memory, which the store keeps current, so
            that most look-ups cost no call: True for 64 MiB of them, or a size as bytes or as in "256MiB".
        credentials: For TLS to the store; None for plaintext.
        replace: Whether session callbacks that the context already has are replaced.
        ignore_id_context: Whether sessions resume regardless of the session id contexts that applications set
            (`Context.set_session_id` of pyOpenSSL). Needed in a fleet of unlike stacks, such as `ssl` beside pyOpenSSL
            or nginx; set it at all of its frontends. Otherwise a session resumes only under the session id context that
            it was negotiated under. The order of the server's ciphers then decides, so that unlike stacks choose the
            same one for a client.
        tracer_provider: OpenTelemetry's, to make spans of look-ups and of calls to the store; None for none. Needs
            `pip install 'resumed[otel]'`.
        sessions: How the fleet shares sessions (docs/tickets.md). With `stored` the store keeps each of them. With
            `tickets` each client keeps its own in a ticket, and the frontends agree on the tickets' keys through the
            store; sessions that were stored before resume as well. Tickets need OpenSSL 3.0 and a keyring.
        tickets_tls12: Whether connections of TLS 1.2 get tickets, too; otherwise their sessions are stored. Such a
            ticket contains the keys of its connection: until its secret is erased, an attacker with the keyring and
            the content of the store can decrypt the connection from a recording.
        rotation: Seconds after which the secret of tickets changes, 1 to 604,800. It is erased, at all frontends and in
            the store, two rotations and a lifetime after the beginning of its use.
        revocation_grace: Seconds for which tickets resume while this process does not receive the removals of other
            frontends, 0 or more. After that, handshakes are full ones.

    Raises:
        UnsupportedContext: The callbacks of this context cannot be set; the message says what to do.
        KeyringError: The keyring is missing, malformed, or readable by others.
        ValueError: An argument is outside its range.
    """
    if not re.fullmatch(NAMESPACE_PATTERN, namespace):
        raise ValueError(f"namespace must be 1 to 63 characters of [a-z0-9.-], not {namespace!r}")
    if not isinstance(keyring, Keyring):
        keyring = Keyring.load(keyring)
    store = StoreClient(
        target, namespace=namespace, deadline=deadline, credentials=credentials, tracer_provider=tracer_provider
    )
    spans = None
    if tracer_provider is not None:
        from resumed._tracing import LookupSpans  # noqa: PLC0415 - an extra

        spans = LookupSpans(tracer_provider, namespace)
    if sessions not in ("stored", "tickets"):
        raise ValueError(f"sessions must be 'stored' or 'tickets', not {sessions!r}")
    size = _size(mirror)
    policy = SessionPolicy(
        store,
        keyring,
        lifetime=lifetime,
        single_use=single_use,
        accept_foreign_ids=accept_foreign_ids,
        puts=puts,
        max_lookups=max_lookups,
        mirror=Mirror(store, size) if size else None,
        tickets=TicketOptions(rotation, revocation_grace, tickets_tls12) if sessions == "tickets" else None,
        spans=spans,
    )
    binding = CallbackBinding(context, policy, replace=replace, ignore_id_context=ignore_id_context)
    if policy.tickets:
        policy.tickets.start()
    return Installation(policy, binding, enable(context, binding) if isinstance(context, ssl.SSLContext) else None)


def _size(mirror: bool | int | str) -> int:
    if isinstance(mirror, bool):
        return DEFAULT_BYTES if mirror else 0
    size = re.fullmatch(r"(\d+)\s*([KMG]i)?B?", str(mirror))
    if not size:
        raise ValueError(f'mirror must be True, False, or a size such as "64MiB", not {mirror!r}')
    return int(size[1]) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30}[size[2]]
