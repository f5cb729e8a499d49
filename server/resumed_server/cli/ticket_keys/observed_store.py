"""A store whose outages are counted and logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

import resumed

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger()


class ObservedStore(resumed.StoreClient):
    """A StoreClient that counts and logs the failures of batch(), the call of an agreement on secrets.

    Attributes:
        failures: Number of calls that failed.
        available: Whether the last call succeeded.
    """

    def __init__(self, target: str, **options: Any) -> None:
        super().__init__(target, **options)
        self.failures = 0
        self.available = True

    def batch(self, operations: Sequence[Any], *, deadline: float | None = None) -> list[Any]:
        """Carry out `operations`; see StoreClient."""
        try:
            results = super().batch(operations, deadline=deadline)
        except resumed.StoreError as error:
            self.failures += 1
            if self.available:
                log.warning("the store does not answer, the keys stay", store=self.target, cause=str(error))
            self.available = False
            raise
        if not self.available:
            log.info("the store answers again", store=self.target)
        self.available = True
        return results
