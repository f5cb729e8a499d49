"""Revocations of ticket secrets: purges of the namespace, and removals of single secrets.

They end all tickets of a secret, at once at the servers that the agent updates. Removals of single tickets do not: the
servers do not show which tickets they resume.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import structlog

import resumed
from resumed_server.errors import OutsideFailure

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._client.store import Change, Watch
    from resumed._crypto.ticket_secret import TicketSecret

log = structlog.get_logger()


class Revocable(Protocol):
    """Secrets that can be revoked."""

    def revoke(self, doomed: Callable[[TicketSecret], bool]) -> None:
        """Drop the secrets for which `doomed` returns True."""


class Revocations:
    """Follows the revocations of a namespace.

    Args:
        store: The store.
        secrets: The secrets to revoke.
        clock: The time in Unix seconds.
    """

    def __init__(self, store: resumed.StoreClient, secrets: Revocable, clock: Callable[[], float] = time.time) -> None:
        self._store, self._secrets, self._clock = store, secrets, clock
        self._position = b""
        self._watch: Watch | None = None

    def follow(self) -> float:
        """Follow a stream until it ends; return the seconds until the next one.

        Raises:
            OutsideFailure: The store is not available, or too old to send revocations.
        """
        try:
            with self._store.watch(self._position, removals_only=True) as watch:
                self._watch = watch
                if not watch.removals_only:
                    raise OutsideFailure("the store is too old to send revocations of ticket keys; upgrade it")
                for changes, position, _ in watch:
                    for change in changes:
                        self._apply(change)
                    self._position = position or self._position
        except resumed.StoreError as error:
            raise OutsideFailure(str(error)) from None
        return 0.0

    def close(self) -> None:
        """End the stream."""
        if self._watch:
            self._watch.cancel()

    def _apply(self, change: Change) -> None:
        if change.key:
            self._secrets.revoke(lambda secret: secret.address == change.key)
            return
        before = change.time if change.time is not None else change.purged
        log.warning("the namespace was purged: keys from before end", issued_before=change.time)
        moment = self._clock() if before is None else before
        self._secrets.revoke(lambda secret: change.time is None or secret.created < moment)
