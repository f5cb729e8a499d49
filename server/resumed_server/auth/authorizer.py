"""Authenticate callers by client certificate, and authorize their operations by grants."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol, cast

from resumed_server.auth.identity import Unauthenticated, read_identities

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc

    from resumed_server.auth.grants import Grants
    from resumed_server.config.reloading_file import Followed
    from resumed_server.limits.enforcer import LimitEnforcer, LimitState

_MAX_CACHED = 4_096
"""Maximum number of cached certificates, and of cached decisions for each."""
_MAX_NAMED = 3
"""Maximum number of identities in an error message."""


class NotGranted(Exception):
    """No grant allows the caller the operation."""

    def __init__(self, identity: str, namespace: str, operation: str) -> None:
        super().__init__(f"{identity} has no grant for {operation} in the namespace {namespace}")
        self.identity = identity
        self.namespace = namespace
        self.operation = operation


class Caller(Protocol):
    """The client that made a call."""

    limit: LimitState | None
    """The limit of its identity, None if it has none."""

    def authorize(self, operation: str, namespace: str) -> None:
        """Return if the caller may execute `operation` (one of grants.OPERATIONS) in `namespace`.

        Raises:
            NotGranted: No grant allows it.
        """


class Authorizer(Protocol):
    """Authenticates callers."""

    def authenticate(self, context: grpc.ServicerContext) -> Caller:
        """Return the caller, with its present grants. A long call repeats this to notice changed grants.

        Raises:
            Unauthenticated: The call has no usable client certificate.
        """


def admit(authorizer: Authorizer, context: grpc.ServicerContext, operations: int = 1) -> Caller:
    """Return the caller, and count the operations of its call for the limit of its identity.

    Raises:
        Unauthenticated: The call has no usable client certificate.
        LimitExceeded: The rate of the identity is exceeded.
    """
    caller = authorizer.authenticate(context)
    if caller.limit:
        caller.limit.acquire(operations)
    return caller


class AllowAll:
    """The authorizer of a server without grants, and its only caller: every operation is allowed."""

    limit: LimitState | None = None

    def authenticate(self, _context: grpc.ServicerContext) -> AllowAll:
        """Return itself."""
        return self

    def authorize(self, operation: str, namespace: str) -> None:
        """Allow it."""


class GrantsAuthorizer:
    """Authorizes callers by a grants file.

    Every call is authorized, so identities are cached by certificate, and decisions by operation and namespace.
    """

    def __init__(self, grants: Followed[Grants], enforcer: LimitEnforcer) -> None:
        self._grants, self._enforcer = grants, enforcer
        self._cache = self._create_cache()

    def authenticate(self, context: grpc.ServicerContext) -> Caller:
        """Return the caller, by the client certificate of its connection."""
        pem = _certificate(context)
        cache = self._cache
        if cache[0] is not self._grants.value:
            cache = self._cache = self._create_cache()
        return cache[1](pem)

    def _create_cache(self) -> tuple[Grants, Callable[[bytes], CertificateIdentity]]:
        """Return the present grants, and a function that returns a caller with them by its certificate."""
        grants = self._grants.value

        @functools.lru_cache(_MAX_CACHED)
        def caller_of(pem: bytes) -> CertificateIdentity:
            identities = read_identities(pem)
            return CertificateIdentity(identities, grants, self._enforcer.for_identities(identities))

        return grants, caller_of


def describe_caller(context: grpc.ServicerContext) -> str:
    """Return the identities of a caller for the log, also on a server without grants; "anonymous" if it has none."""
    try:
        return _join(read_identities(_certificate(context)))
    except Unauthenticated:
        return "anonymous"


class CertificateIdentity:
    """A caller with a client certificate."""

    def __init__(self, identities: tuple[str, ...], grants: Grants, limit: LimitState | None) -> None:
        self.limit = limit
        self._identities = identities
        self._is_allowed = functools.lru_cache(_MAX_CACHED)(functools.partial(grants.is_allowed, identities))

    def authorize(self, operation: str, namespace: str) -> None:
        """See Caller."""
        if not self._is_allowed(namespace, operation):
            raise NotGranted(_join(self._identities), namespace, operation)


def _certificate(context: grpc.ServicerContext) -> bytes:
    """Return the client certificate of a connection, in PEM."""
    # The stubs say bytes; grpcio returns a list of them.
    certificate = cast("Sequence[bytes]", context.auth_context().get("x509_pem_cert"))
    if not certificate:
        raise Unauthenticated("no client certificate came with the connection")
    return certificate[0]


def _join(identities: Sequence[str]) -> str:
    more = len(identities) - _MAX_NAMED
    return ", ".join(identities[:_MAX_NAMED]) + f" and {more} more" * (more > 0)
