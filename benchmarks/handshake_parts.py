"""The cost of sealing in a handshake: `python benchmarks/handshake_parts.py`.

Each step runs in a loop, and within handshakes, where the processor's caches contain little of its code and data: the
server's time for a handshake with the step minus that for one without, in turns. Client and server are objects of one
thread, so no step waits for another process.
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

from benchmarks.bench.frontend import DictionaryPolicy
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


class RandomIds(DictionaryPolicy):
    """A dictionary with random ids that Python generates."""

    seals_ids = True

    def issue_id(self, *, resumed: bool = False) -> bytes:
        """Return a random id."""
        del resumed
        return os.urandom(32)


class SealedIds(RandomIds):
    """A dictionary with sealed ids."""

    def issue_id(self, *, resumed: bool = False) -> bytes:
        """Return a sealed id of the fleet."""
        del resumed
        return KEYRING.issue_id(NAMESPACE, time.time())


class OpenedIds(SealedIds):
    """A dictionary that opens the id of each look-up."""

    def on_get_session(self, offer: Offer, handshake: SuspendableHandshake) -> int | None:
        """Find a session."""
        assert KEYRING.open_id(NAMESPACE, offer.session_id)
        return super().on_get_session(offer, handshake)


class OpenedValues(SealedIds):
    """A dictionary that opens one constant value at each look-up."""

    sealed = KEYRING.seal(KEYS.key(bytes(32)), os.urandom(200), 1 << 34)

    def on_get_session(self, offer: Offer, handshake: SuspendableHandshake) -> int | None:
        """Find a session."""
        KEYRING.open(KEYS.key(bytes(32)), self.sealed, time.time())
        return super().on_get_session(offer, handshake)


class SealedSessions(SealedIds):
    """A dictionary that seals negotiated sessions."""

    def on_new_session(self, session_id: bytes, envelope: Envelope, remaining: float, **named: Any) -> None:
        """Keep a session."""
        KEYRING.seal(KEYS.key(session_id), envelope.encode(), 1 << 34)
        super().on_new_session(session_id, envelope, remaining, **named)


KINDS = (DictionaryPolicy, RandomIds, SealedIds, OpenedIds, OpenedValues, SealedSessions)
KEY, SEALED_ID = KEYS.key(bytes(32)), SealedIds().issue_id()
STEPS: dict[str, tuple[type[DictionaryPolicy], type[DictionaryPolicy], str, Callable[[], object]]] = {
    "an id made in Python": (RandomIds, DictionaryPolicy, "full", lambda: os.urandom(32)),
    "an id sealed": (SealedIds, RandomIds, "full", lambda: KEYRING.issue_id(NAMESPACE, time.time())),
    "an id opened": (OpenedIds, SealedIds, "resumed", lambda: KEYRING.open_id(NAMESPACE, SEALED_ID)),
    "a value opened": (OpenedValues, SealedIds, "resumed", lambda: KEYRING.open(KEY, OpenedValues.sealed, 0)),
    "a session sealed": (SealedSessions, SealedIds, "full", lambda: KEYRING.seal(KEY, bytes(200), 1 << 34)),
}
"""By step: the two kinds whose handshakes differ by it, the type of handshake, and the step alone."""


def make_handshake(
    context: ssl.SSLContext,
    client: ssl.SSLContext,
    session: ssl.SSLSession | None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, ssl.SSLObject]:
    """Make a handshake; return the server's time in seconds, and the client."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_side = client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
    server_side = context.wrap_bio(to_server, to_client, server_side=True)
    seconds, unfinished = 0.0, [client_side, server_side]
    while unfinished:
        for side in list(unfinished):
            started = clock()
            try:
                side.do_handshake()
                unfinished.remove(side)
            except ssl.SSLWantReadError:
                pass
            if side is server_side:
                seconds += clock() - started
    server_side.write(b"x")  # follows the tickets of TLS 1.3
    client_side.read(1)
    return seconds, client_side


def measure(turns: int, version: ssl.TLSVersion) -> dict[tuple[type[DictionaryPolicy], str], list[float]]:
    """Return the durations of full and of resumed handshakes in seconds, by kind."""
    client = client_context(version)
    contexts = {kind: server_context("ssl") for kind in KINDS}
    bindings = [CallbackBinding(context, kind()) for kind, context in contexts.items()]
    sessions = {kind: make_handshake(context, client, None)[1].session for kind, context in contexts.items()}
    figures = defaultdict(list)
    for _ in track(range(turns), description=version.name):
        for kind in random.sample(KINDS, len(KINDS)):
            figures[kind, "full"].append(make_handshake(contexts[kind], client, None)[0])
            seconds, resumed_client = make_handshake(contexts[kind], client, sessions[kind])
            assert resumed_client.session_reused
            figures[kind, "resumed"].append(seconds)
    assert bindings
    return figures


def measure_step(step: Callable[[], object], calls: int = 2_000) -> float:
    """Return the duration of a step in seconds."""
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
    for name, (with_step, without_step, which, step) in STEPS.items():
        differences = [
            (with_seconds - without_seconds) * 1e6
            for with_seconds, without_seconds in zip(
                figures[with_step, which], figures[without_step, which], strict=True
            )
        ]
        low, median, high = statistics.quantiles(differences, n=4)
        alone = min(measure_step(step) for _ in range(9)) * 1e6
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
