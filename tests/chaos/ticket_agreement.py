"""Agree on ticket secrets with a real store and clocks of one's own: `python tests/chaos/ticket_agreement.py`.

Prints how many secrets and calls it takes when all frontends of a fleet start at once; how many tickets do not open at
frontends whose clocks differ by up to 50 minutes; and how soon frontends open each other's tickets after a failover has
left two secrets for one epoch. Exits 1 if that is more than docs/tickets.md states.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import resumed
from resumed._policy.ticket_secrets import TicketSecrets
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed._client.store import Operation, Result

ROTATION, LIFETIME = 3600, 7200
THREADS = 64
DEADLINE = 30.0
"""Seconds that a call may take here: the machine is not the object of the test."""
MOST_CALLS = 3
MINUTES = range(-50, 51, 10)
"""By how much clocks are ahead."""
LARGEST_DIFFERENCE = 50 * 60
"""Seconds by which two clocks may differ."""
EPOCHS = 5


class CountingStore:
    """A store, and the calls of one frontend."""

    def __init__(self, store: resumed.StoreClient) -> None:
        self._store, self.namespace = store, store.namespace
        self.calls = 0

    def move_to(self, store: resumed.StoreClient) -> None:
        """Make all further calls at another store."""
        self._store = store

    def batch(self, operations: Sequence[Operation], *, deadline: float) -> list[Result]:
        """Count a call, and make it."""
        self.calls += deadline > 0
        return self._store.batch(operations, deadline=DEADLINE)


class Fleet:
    """Frontends of one namespace, whose clock the caller sets."""

    def __init__(self, target: str, namespace: str) -> None:
        self.keyring = resumed.Keyring.from_keys([random.randbytes(32)])
        self.store = resumed.StoreClient(target, namespace=namespace, deadline=DEADLINE)
        self.now = time.time()

    def frontend(self, ahead: float = 0.0) -> tuple[TicketSecrets, CountingStore]:
        """Return the secrets of a new frontend, and its calls."""
        store = CountingStore(self.store)
        clock: Callable[[], float] = lambda: self.now + ahead  # noqa: E731
        return TicketSecrets(store, self.keyring, lifetime=LIFETIME, rotation=ROTATION, clock=clock), store  # type: ignore[arg-type]


def start_at_once(target: str, count: int) -> tuple[int, list[int], float]:
    """Return the secrets that a fleet agrees on, the calls of each frontend, and the seconds that it took."""
    fleet = Fleet(target, "thousand")
    frontends = [fleet.frontend() for _ in range(count)]
    begin = threading.Barrier(THREADS)

    def start(number: int) -> None:
        begin.wait()
        for secrets, _ in frontends[number::THREADS]:
            secrets.step()

    began = time.monotonic()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(start, range(THREADS)))
    names = {secret.name for secrets, _ in frontends for secret in secrets.held(fleet.now)}
    return len(names), [store.calls for _, store in frontends], time.monotonic() - began


def differ(target: str) -> tuple[Counter[bool], Counter[bool]]:
    """Offer a ticket of each frontend to each other one, once a minute through EPOCHS.

    Returns:
        Whether they opened, for two clocks that differ by LARGEST_DIFFERENCE at most, and for others.
    """
    fleet = Fleet(target, "clocks")
    frontends = [(60.0 * minutes, fleet.frontend(60.0 * minutes)[0]) for minutes in MINUTES]
    begin, near, far = fleet.now, Counter[bool](), Counter[bool]()
    while fleet.now < begin + EPOCHS * ROTATION:
        for _, secrets in frontends:
            secrets.step()
        for ahead, issuer in frontends:
            current = issuer.current(fleet.now + ahead)
            assert current
            for other, reader in frontends:
                opened = reader.named(current[0].name, fleet.now + other) is not None
                (near if abs(ahead - other) <= LARGEST_DIFFERENCE else far)[opened] += 1
        fleet.now += 60
    return near, far


def fail_over(targets: tuple[str, str], offers: bool) -> int:
    """Return the seconds after which two frontends encrypt with one secret, of the two that a failover has left.

    Args:
        targets: Two stores: each has the secret of one frontend, and the second one remains.
        offers: Whether a client offers tickets of each to the other once a second.
    """
    fleets = [Fleet(target, "failover") for target in targets]
    fleets[1].keyring, fleets[1].now = fleets[0].keyring, fleets[0].now
    (one, store), (other, _) = (fleet.frontend() for fleet in fleets)
    one.step()
    other.step()
    store.move_to(fleets[1].store)
    begin = fleets[0].now
    while True:
        now = fleets[0].now
        names = [current[0].name for secrets in (one, other) if (current := secrets.current(now))]
        if len(set(names)) == 1:
            return round(now - begin)
        for secrets, name in ((one, names[1]), (other, names[0])) if offers else ():
            secrets.named(name, now)
        for fleet, secrets in zip(fleets, (one, other), strict=True):
            secrets.step()
            fleet.now += 1


def main() -> int:
    """Run as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frontends", type=int, default=1000, help="how many start at once (default: %(default)s)")
    options = parser.parse_args()
    shown = Table("what", "result")
    with running_server() as store, running_server() as lost:
        secrets, calls, seconds = start_at_once(store.target, options.frontends)
        near, far = differ(store.target)
        healed = {
            offers: [fail_over((lost.target, store.target), offers) for _ in range(5)] for offers in (True, False)
        }
    shown.add_row(f"{options.frontends} frontends at once: secrets, of two epochs", f"{secrets}")
    shown.add_row("calls of each: median, maximum", f"{statistics.median(calls):.0f}, {max(calls)}")
    shown.add_row("seconds until all have agreed", f"{seconds:.1f}")
    shown.add_row(
        "clocks that differ by 50 minutes at most: tickets opened, not opened", f"{near[True]:,}, {near[False]}"
    )
    shown.add_row("by 60 to 100 minutes: opened, not opened at first", f"{far[True]:,}, {far[False]}")
    shown.add_row("two secrets for one epoch: seconds until one is left, with tickets offered", _range(healed[True]))
    shown.add_row("the same without a client", _range(healed[False]))
    Console(width=120).print(shown)
    good = secrets in (2, 3) and max(calls) <= MOST_CALLS and not near[False]  # three if an epoch ended in between
    return int(not good or max(healed[True]) > 1 or max(healed[False]) > ROTATION)


def _range(numbers: Sequence[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}"


if __name__ == "__main__":
    sys.exit(main())
