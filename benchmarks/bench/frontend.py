"""The demo frontend with options of the benchmark alone, which precede its own on the command line."""

from __future__ import annotations

import argparse
import os
import ssl
import sys
import threading
import time
from ctypes import byref, c_int
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL

from resumed._async.suspendable_handshake import SuspendableHandshake
from resumed._openssl import CallbackBinding
from resumed._policy.session_policy import SessionPolicy
from resumed._policy.stats import Recorder
from resumed_server.cli.demo import frontend as demo_frontend

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Iterable

    from resumed._crypto.envelope import Envelope
    from resumed._policy.session_policy import Offer

_BURST_SECONDS = 0.001


class DictionaryPolicy(SessionPolicy):
    """The simplest session policy: it keeps the sessions of one frontend in a dictionary."""

    seals_ids = False
    tickets = None

    def __init__(self) -> None:
        self.namespace, self.lifetime = "local", 7200
        self._sessions: dict[bytes, Envelope] = {}
        self._recorder = Recorder()

    def on_new_session(
        self, session_id: bytes, envelope: Envelope, remaining: float, *, last: bool, family: Collection[bytes] = ()
    ) -> None:
        """Keep a session."""
        del remaining, last, family
        self._sessions[session_id] = envelope

    def handshake(self, waker: Callable[[], Callable[[], None] | None] = lambda: None) -> SuspendableHandshake:
        """Begin a handshake."""
        return SuspendableHandshake(1.0, waker)

    def on_get_session(self, offer: Offer, handshake: SuspendableHandshake) -> int | None:
        """Find a session."""
        del handshake
        envelope = self._sessions.get(offer.session_id)
        return None if envelope is None else offer.decode(envelope, self.lifetime)

    def now(self) -> float:
        """Return the current Unix time."""
        return time.time()

    def on_connection_failed(self, session_ids: Iterable[bytes], reason: int, end: int | None = None) -> None:
        """Keep all sessions."""

    def close(self, timeout: float = 0) -> None:
        """Do nothing."""


class Frontend(demo_frontend.Frontend):
    """A frontend with a dictionary instead of a store, with TLS 1.2 only, or under a flood of made-up ids."""

    options: argparse.Namespace

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        context: Any = self._stack.context
        if self.options.tls12_only and isinstance(context, ssl.SSLContext):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        elif self.options.tls12_only:
            context.set_max_proto_version(SSL.TLS1_2_VERSION)
        if self.options.dictionary:
            self._dictionary = CallbackBinding(context, DictionaryPolicy())

    def serve(self, listener: socket.socket) -> None:
        """Serve connections, while a thread offers session ids that no frontend issued."""
        if self.options.made_up_ids:
            threading.Thread(target=self._flood, args=(self.options.made_up_ids,), daemon=True).start()
        super().serve(listener)

    def _flood(self, per_second: int) -> None:
        """Call the callback that OpenSSL uses for look-ups, with made-up ids."""
        assert self._shim
        look_up, burst = self._shim.get_callback, int(per_second * _BURST_SECONDS)
        ids = [os.urandom(32) for _ in range(1 << 12)]
        copy, due, offered = byref(c_int(1)), time.monotonic(), 0
        while True:
            for number in range(offered, offered + burst):
                look_up(None, ids[number % len(ids)], 32, copy)
            offered += burst
            due += _BURST_SECONDS
            time.sleep(max(0.0, due - time.monotonic()))


def main() -> None:
    """Run a frontend until a signal stops it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dictionary", action="store_true", help="keep sessions in a dictionary")
    parser.add_argument("--tls12-only", action="store_true", help="speak nothing newer than TLS 1.2")
    parser.add_argument(
        "--made-up-ids",
        type=int,
        default=0,
        metavar="N",
        help="offer N made-up session ids per second to the get callback",
    )
    Frontend.options, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    demo_frontend.Frontend = Frontend  # type: ignore[assignment,misc]
    demo_frontend.main()


if __name__ == "__main__":
    main()
