"""What sealing adds to a handshake: `python benchmarks/handshake_parts.py`.

The steps in a loop, and within handshakes, where each finds little of its code and data in the processor's caches: the
median of the server's part of a handshake with that step less the one without, in turns. Client and server are objects
of one thread here, so nothing waits for anything.
"""

from __future__ import annotations

import argparse
import os
import random
import ssl
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.bench.frontend import Dictionary
from resumed._crypto.keyring import Keyring
from resumed._crypto.store_key import StoreKeys
from resumed._openssl import CallbackBinding
from support.tls import VERSIONS, client_context, server_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._async.suspendable_handshake import SuspendableHandshake
    from resumed._crypto.envelope import Envelope
    from resumed._policy.session_policy import Offer

NAMESPACE = "shop"
KEYRING = Keyring.from_keys([os.urandom(32)])
KEYS = StoreKeys(NAMESPACE)


class Ids(Dictionary):
    """A dictionary whose ids Python makes."""

    seals_ids = True

    def issue_id(self, *, resumed: bool = False) -> bytes:
        """Return a random one."""
        del resumed
        return os.urandom(32)


class SealedIds(Ids):
    """A dictionary whose ids are sealed."""

    def issue_id(self, *, resumed: bool = False) -> bytes:
        """Return one of the fleet's."""
        del resumed
        return KEYRING.issue_id(NAMESPACE, time.time())


class OpensIds(SealedIds):
    """A dictionary that opens the ids that it is asked for."""

    def on_get_session(self, offer: Offer, handshake: SuspendableHandshake) -> int | None:
        """Find a session."""
        assert KEYRING.open_id(NAMESPACE, offer.session_id)
        return super().on_get_session(offer, handshake)


class OpensValues(SealedIds):
    """A dictionary that opens a value as it is asked for, whatever the session."""

    sealed = KEYRING.seal(KEYS.key(bytes(32)), os.urandom(200), 1 << 34)

    def on_get_session(self, offer: Offer, handshake: SuspendableHandshake) -> int | None:
        """Find a session."""
        KEYRING.open(KEYS.key(bytes(32)), self.sealed, time.time())
        return super().on_get_session(offer, handshake)


class Seals(SealedIds):
    """A dictionary that seals what is negotiated."""

    def on_new_session(self, session_id: bytes, envelope: Envelope, remaining: float, **named: Any) -> None:
        """Keep a session."""
        KEYRING.seal(KEYS.key(session_id), envelope.encode(), 1 << 34)
        super().on_new_session(session_id, envelope, remaining, **named)


KINDS = (Dictionary, Ids, SealedIds, OpensIds, OpensValues, Seals)
KEY, OFFERED = KEYS.key(bytes(32)), SealedIds().issue_id()
STEPS: dict[str, tuple[type[Dictionary], type[Dictionary], str, Callable[[], object]]] = {
    "an id made in Python": (Ids, Dictionary, "full", lambda: os.urandom(32)),
    "an id sealed": (SealedIds, Ids, "full", lambda: KEYRING.issue_id(NAMESPACE, time.time())),
    "an id opened": (OpensIds, SealedIds, "resumed", lambda: KEYRING.open_id(NAMESPACE, OFFERED)),
    "a value opened": (OpensValues, SealedIds, "resumed", lambda: KEYRING.open(KEY, OpensValues.sealed, 0)),
    "a session sealed": (Seals, SealedIds, "full", lambda: KEYRING.seal(KEY, bytes(200), 1 << 34)),
}
"""By step: the kinds whose handshakes differ by it, which handshakes, and the step alone."""


def handshake(
    context: ssl.SSLContext,
    client: ssl.SSLContext,
    session: ssl.SSLSession | None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, ssl.SSLObject]:
    """Return the server's seconds, and the client."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
    theirs = context.wrap_bio(to_server, to_client, server_side=True)
    seconds, shaking = 0.0, [ours, theirs]
    while shaking:
        for side in list(shaking):
            started = clock()
            try:
                side.do_handshake()
                shaking.remove(side)
            except ssl.SSLWantReadError:
                pass
            if side is theirs:
                seconds += clock() - started
    theirs.write(b"x")  # behind the tickets of TLS 1.3
    ours.read(1)
    return seconds, ours


def measure(turns: int, version: ssl.TLSVersion) -> dict[tuple[type[Dictionary], str], list[float]]:
    """Return the seconds of handshakes by their kind, full and resumed."""
    client = client_context(version)
    contexts = {kind: server_context("ssl") for kind in KINDS}
    bindings = [CallbackBinding(context, kind()) for kind, context in contexts.items()]
    sessions = {kind: handshake(context, client, None)[1].session for kind, context in contexts.items()}
    figures = defaultdict(list)
    for _ in track(range(turns), description=version.name):
        for kind in random.sample(KINDS, len(KINDS)):
            figures[kind, "full"].append(handshake(contexts[kind], client, None)[0])
            seconds, resumed = handshake(contexts[kind], client, sessions[kind])
            assert resumed.session_reused
            figures[kind, "resumed"].append(seconds)
    assert bindings
    return figures


def in_a_loop(step: Callable[[], object], calls: int = 2_000) -> float:
    """Return the seconds that a step takes."""
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - started) / calls


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2_000, help="of each kind of handshake (default %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    # In TLS 1.2 a full handshake issues one id and keeps one session.
    figures = measure(arguments.turns, VERSIONS[0])
    rows = []
    for name, (with_it, without, which, step) in STEPS.items():
        differences = [
            (one - other) * 1e6 for one, other in zip(figures[with_it, which], figures[without, which], strict=True)
        ]
        low, median, high = statistics.quantiles(differences, n=4)
        alone = min(in_a_loop(step) for _ in range(9)) * 1e6
        rows.append((name, f"{alone:.1f}", f"{median:.0f} ({low:.0f} to {high:.0f})"))
    heads = ("step", "in a loop, us", "within a handshake, us: median and quartiles")
    if arguments.markdown:
        sys.stdout.writelines(f"| {' | '.join(row)} |\n" for row in (heads, ("---",) * 3, *rows))
        return
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
