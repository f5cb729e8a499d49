"""A gRPC server that stops as soon as no call is under way.

grpcio says goodbye on every connection (GOAWAY and a ping, RFC 9113 section 6.8) and waits for the client's answer.
Clients without a thread that reads, as ours in Python, see it when they have a call to make: their idle connections
would keep the server for all of its grace period.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from resumed_server.rpc.decoding import DecodingServer

if TYPE_CHECKING:
    import grpc

    from resumed_server.rpc.executor import CallPool

QUIET_SECONDS = 0.25
"""How long no call must have been under way: time for answers to leave, and for calls that crossed the goodbye."""
_POLL = 0.02


class PartingServer(DecodingServer):
    """Does all that the `server` does which it is made of, whose calls run in `pool`."""

    def __init__(self, server: grpc.Server, pool: CallPool) -> None:
        super().__init__(server)
        self._pool = pool

    def stop(self, grace: float | None) -> threading.Event:
        """See grpc.Server."""
        stopped = super().stop(grace)
        if grace:
            threading.Thread(target=self._part, args=(stopped,), name="parting", daemon=True).start()
        return stopped

    def _part(self, stopped: threading.Event) -> None:
        quiet_since = time.monotonic()
        while not stopped.wait(_POLL):
            now = time.monotonic()
            if self._pool.under_way:
                quiet_since = now
            elif now - quiet_since >= QUIET_SECONDS:
                super().stop(None)
                return
