"""The outcome of a removal, which an application can wait for."""

from __future__ import annotations

import threading
from concurrent.futures import Future


class Removal(Future[bool]):
    """Whether the store has acknowledged the removal of all sessions of one call; cannot be cancelled.

    The result is False as soon as the store has refused one of them, or one was never sent: the queue was full, or the
    installation was closed. Without an answer of the store there is no result yet: wait with a time-out.

    Args:
        sessions: How many sessions are removed.
    """

    def __init__(self, sessions: int) -> None:
        super().__init__()
        self._outstanding, self._counting = sessions, threading.Lock()
        self.set_running_or_notify_cancel()
        if not sessions:
            self.set_result(True)

    def report(self, acknowledged: bool) -> None:
        """Note the outcome for one of the sessions."""
        with self._counting:
            self._outstanding -= 1
            ends = not self.done() and (not acknowledged or not self._outstanding)
            if ends:
                super().set_result(acknowledged)
