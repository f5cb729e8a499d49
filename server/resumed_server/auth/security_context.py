"""What stands before the sessions: TLS and grants, if the settings have them, and limits; their files are followed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resumed_server.auth import grants
from resumed_server.auth import tls as credentials
from resumed_server.auth.authorizer import Anybody, Granted
from resumed_server.auth.tls import Credentials
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import Budgets

if TYPE_CHECKING:
    from resumed_server.auth.authorizer import Access
    from resumed_server.config.reloading_file import Followed
    from resumed_server.config.settings import Settings
    from resumed_server.limits.enforcer import Shared

FOLLOW_SECONDS = 1.0
"""Seconds from one look at the files to the next."""


class Protection:
    """What the settings put before the sessions.

    Args:
        settings: What the server is told.
        counted: What is left of limits, for all workers together.

    Attributes:
        credentials: TLS, None without it.
        access: Who may do what.
        budgets: What identities and namespaces may use.

    Raises:
        ValueError: A file cannot be used; each line says why.
    """

    def __init__(self, settings: Settings, counted: Shared) -> None:
        self.credentials: Credentials | None = None
        self.access: Access = Anybody()
        limit = _namespace_limit(settings)
        self.budgets = Budgets(limit, None, counted)
        self._files: list[Followed[Any]] = []
        if settings.tls_cert:
            tls = credentials.followed(settings.tls_cert, settings.tls_key, settings.client_ca)
            self.credentials = Credentials(tls, renewal=settings.max_connection_age)
            self._files.append(tls)
        if settings.grants:
            granted = grants.followed(settings.grants)
            self.budgets = Budgets(limit, granted, counted)
            self.access = Granted(granted, self.budgets)
            self._files.append(granted)

    def follow(self) -> float:
        """Look at the files once; return the seconds until they are to be looked at again."""
        for files in self._files:
            files.follow()
        return FOLLOW_SECONDS


def _namespace_limit(settings: Settings) -> Limit:
    """Return the limit of a namespace for which the grants have none."""
    return Limit(
        operations_per_second=settings.namespace_ops_per_second or None,
        watchers=settings.namespace_watchers or None,
        sessions=settings.namespace_sessions or None,
        bytes=settings.namespace_bytes or None,
    )
