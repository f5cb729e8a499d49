"""Who calls, and whether a grant lets them.

A caller is the certificate that they proved to have: its SPIFFE id or one of its DNS names. Both are read from the
certificate itself: what gRPC tells of them ends at the first NUL, which would make "shop.svc<NUL>.evil" a "shop.svc".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar, cast

from cryptography import x509

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from resumed_server.auth.grants import Grants
    from resumed_server.config.reloading_file import Followed
    from resumed_server.limits.enforcer import Budget, Budgets

_MOST_REMEMBERED = 4_096
"""Certificates, and decisions for each, that are remembered; beyond that it forgets all and starts again."""
_MOST_SHOWN = 3
_NAMELESS = "the client's certificate has neither a SPIFFE id nor a DNS name"
_UNREADABLE = (
    ValueError,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_is_printable = re.compile("[!-~]{1,2048}").fullmatch

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Unauthenticated(Exception):
    """The caller has no certificate, or one that names nobody; the message says which."""


class NotGranted(Exception):
    """No grant allows the caller the operation."""

    def __init__(self, identity: str, namespace: str, operation: str) -> None:
        super().__init__(f"{identity} has no grant for {operation} in the namespace {namespace}")
        self.identity = identity
        self.namespace = namespace
        self.operation = operation


class Caller(Protocol):
    """Whoever made a call."""

    budget: Budget | None
    """What they may spend, by whom they are; None if that has no limit."""

    def demand(self, operation: str, namespace: str) -> None:
        """Return if the caller may carry out `operation` (one of grants.OPERATIONS) in `namespace`.

        Raises:
            NotGranted: They may not.
        """


class Access(Protocol):
    """Knows who made a call."""

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Return who made the call of `context`, as they are granted now: ask again later in a call that lasts.

        Raises:
            Unauthenticated: Nobody knows.
        """


def admitted(access: Access, context: grpc.ServicerContext, operations: int = 1) -> Caller:
    """Return who made a call that asks for so many operations.

    Raises:
        Unauthenticated: Nobody knows.
        LimitExceeded: They asked for too many of late.
    """
    caller = access.caller(context)
    if caller.budget:
        caller.budget.spend(operations)
    return caller


class Anybody:
    """Access without grants: whoever gets here may do everything."""

    budget: Budget | None = None

    def caller(self, _context: grpc.ServicerContext) -> Anybody:
        """Ask nobody."""
        return self

    def demand(self, operation: str, namespace: str) -> None:
        """Allow it."""


class Granted:
    """Access for those whom `grants` name.

    Every call asks, so what was found out is remembered: by certificate, then by operation and namespace.
    """

    def __init__(self, grants: Followed[Grants], budgets: Budgets) -> None:
        self._followed, self._budgets = grants, budgets
        self._known: tuple[Grants, dict[bytes, _Certified]] = (grants.value, {})

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Return who holds the certificate that the connection of this call was made with."""
        # The stubs say bytes; grpcio returns a list of them.
        certificate = cast("Sequence[bytes]", context.auth_context().get("x509_pem_cert"))
        if not certificate:
            raise Unauthenticated("no client certificate came with the connection")
        pem = certificate[0]
        known = self._known
        if known[0] is not self._followed.value:
            known = self._known = (self._followed.value, {})
        grants, callers = known
        caller = callers.get(pem)
        if caller is None:
            identities = _identities(pem)
            caller = _Certified(identities, grants, self._budgets.of_identities(identities))
            _remember(callers, pem, caller)
        return caller


class _Certified:
    """A caller with a certificate."""

    def __init__(self, identities: tuple[str, ...], grants: Grants, budget: Budget | None) -> None:
        self._identities = identities
        self.budget = budget
        self._grants = grants
        self._decisions: dict[tuple[str, str], bool] = {}

    def demand(self, operation: str, namespace: str) -> None:
        asked = operation, namespace
        allowed = self._decisions.get(asked)
        if allowed is None:
            allowed = self._grants.allow(self._identities, namespace, operation)
            _remember(self._decisions, asked, allowed)
        if not allowed:
            self._refuse(operation, namespace)

    def _refuse(self, operation: str, namespace: str) -> NoReturn:
        shown = ", ".join(self._identities[:_MOST_SHOWN])
        more = len(self._identities) - _MOST_SHOWN
        raise NotGranted(shown + f" and {more} more" * (more > 0), namespace, operation)


def _remember(memory: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    if len(memory) >= _MOST_REMEMBERED:
        memory.clear()
    memory[key] = value


def _identities(pem: bytes) -> tuple[str, ...]:
    """Return the SPIFFE id of a certificate, then its DNS names.

    Raises:
        Unauthenticated: It has none that can be used.
    """
    try:
        names = (
            x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
    except _UNREADABLE:
        raise Unauthenticated(_NAMELESS) from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    # X509-SVID section 2: one that has several URIs is not to be trusted with any.
    found = uris if len(uris) == 1 and uris[0].startswith("spiffe://") else []
    found += (f"dns:{name.lower()}" for name in names.get_values_for_type(x509.DNSName))
    identities = tuple(filter(_is_printable, found))
    if not identities:
        raise Unauthenticated(_NAMELESS)
    return identities
