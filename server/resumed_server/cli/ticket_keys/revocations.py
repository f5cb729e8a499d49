"""Revocations of ticket secrets: purges of the namespace, and removals of single secrets.

They end all tickets of a secret, at once at the servers that the agent updates. Removals of single tickets do not: the
servers do not show which tickets they resume.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

import resumed
from resumed_server.errors import OutsideFailure

if TYPE_CHECKING:
    from resumed._client.store import Change, Watch
    from resumed._policy.ticket_secrets import TicketSecrets

log = structlog.get_logger()


class Revocations:
    """Follows the revocations of a namespace.

    Args:
        store: The store.
        secrets: The secrets to revoke.
    """

    def __init__(self, store: resumed.StoreClient, secrets: TicketSecrets) -> None:
        self._store, self._secrets = store, secrets
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
                in_snapshot = not watch.resumed_from_position
                for changes, position, live in watch:
                    in_snapshot = in_snapshot and not live
                    for change in changes:
                        self._apply(change, in_snapshot=in_snapshot)
                    self._position = position or self._position
        except resumed.StoreError as error:
            raise OutsideFailure(str(error)) from None
        return 0.0

    def close(self) -> None:
        """End the stream."""
        if self._watch:
            self._watch.cancel()

    def _apply(self, change: Change, *, in_snapshot: bool) -> None:
        if change.key:
            self._secrets.revoke(lambda secret: secret.address == change.key)
            return
        before = self._secrets.apply_purge(change, in_snapshot=in_snapshot)
        log.warning("the namespace was purged: keys from before end", before=before)
