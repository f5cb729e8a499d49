"""A store whose outages are counted and logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

import resumed
from resumed_server.cli.diagnosis import explain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed_server.cli.tls_options import TlsOptions

log = structlog.get_logger()


class ObservedStore(resumed.StoreClient):
    """A StoreClient that counts and logs the failures of batch(), the call of an agreement on secrets.

    Args:
        target: The store.
        tls: The options of the connection.
        options: Those of StoreClient.

    Attributes:
        failures: Number of calls that failed.
        available: Whether the last call succeeded.
    """

    def __init__(self, target: str, tls: TlsOptions, **options: Any) -> None:
        super().__init__(target, credentials=tls.credentials(), **options)
        self._tls = tls
        self.failures = 0
        self.available = True

    def batch(self, operations: Sequence[Any], *, deadline: float | None = None) -> list[Any]:
        """Carry out `operations`; see StoreClient."""
        try:
            results = super().batch(operations, deadline=deadline)
        except resumed.StoreError as error:
            self.failures += 1
            if self.available:
                problem, remedy, _ = explain(error, self.target, self._tls)
                log.warning("the store does not answer, the keys stay", store=self.target, cause=problem, remedy=remedy)
            self.available = False
            raise
        if not self.available:
            log.info("the store answers again", store=self.target)
        self.available = True
        return results
