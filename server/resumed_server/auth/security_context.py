"""Access control for the session services: TLS, grants and limits, reloaded when their files change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from resumed_server.auth import grants, tls
from resumed_server.auth.authorizer import AllowAll, GrantsAuthorizer
from resumed_server.auth.tls import ServerCertificates
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitEnforcer

if TYPE_CHECKING:
    from resumed_server.auth.authorizer import Authorizer
    from resumed_server.config.reloading_file import Followed
    from resumed_server.config.settings import Settings
    from resumed_server.limits.enforcer import SharedCounters

POLL_SECONDS = 1.0
"""Seconds between two checks of the files."""

log = structlog.get_logger()


class SecurityContext:
    """TLS, authorization and limits, as the settings configure them.

    Args:
        settings: The settings of the server.
        counters: The counters of limits, which all workers share.

    Attributes:
        certificates: TLS; None without it.
        authorizer: Authenticates and authorizes callers.
        enforcer: The limits of identities and namespaces.
        files: The files that are reloaded.

    Raises:
        ValueError: A file is invalid; each line names a reason.
    """

    def __init__(self, settings: Settings, counters: SharedCounters) -> None:
        self.certificates: ServerCertificates | None = None
        self.authorizer: Authorizer = AllowAll()
        self.files: list[Followed[Any]] = []
        if settings.tls_cert:
            certificates = tls.watch_files(settings.tls_cert, settings.tls_key, settings.client_ca)
            self.certificates = ServerCertificates(certificates, renewal=settings.max_connection_age)
            self.files.append(certificates)
        granted = grants.watch_file(settings.grants) if settings.grants else None
        self.enforcer = LimitEnforcer(_namespace_limit(settings), granted, counters)
        if granted:
            if not granted.value.grants:
                log.warning("the grants file has no grant: every call is denied", file=settings.grants)
            self.authorizer = GrantsAuthorizer(granted, self.enforcer)
            self.files.append(granted)

    def poll(self) -> float:
        """Check once whether the files have changed; return the seconds until the next check."""
        for files in self.files:
            files.follow()
        return POLL_SECONDS


def _namespace_limit(settings: Settings) -> Limit:
    """Return the limit of each namespace without a limit in the grants file."""
    return Limit(
        operations_per_second=settings.namespace_ops_per_second or None,
        watchers=settings.namespace_watchers or None,
        sessions=settings.namespace_sessions or None,
        bytes=settings.namespace_bytes or None,
    )
