"""Fill a store with real sessions and search it for their secrets: `python tests/chaos/dump.py`.

Clients negotiate sessions with real frontends of both stacks, TLS 1.2 and 1.3, and resume some. Then all memory of the
store's processes, its LMDB file, or the memory and the dump file of its Valkey, are searched for every session id and
every master secret or resumption key, as the clients know them, and for the fleet key: raw, in hex, in base64.

Two controls show that the search works: needles planted as values in each form, and the store keys and
sealed values of the sessions, which the store does have. Exits 1 if a secret is found, or a control is not.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.fleet import VERSION_NAMES, Client, Fleet
from benchmarks.measuring import process_tree
from chaos.needles import Needles, chunks_of_file, chunks_of_memory
from resumed._crypto.store_key import StoreKeys
from support.redis import valkey_server
from support.server import running_server
from support.session import Known, known
from support.tls import STACKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from support.redis import RedisServer
    from support.server import RunningServer

NAMESPACE = "shop"
PLANTED = 9
"""Number of planted needles: raw, in hex, and in base64 at every offset."""
_CLIENTS = 8
_RESUMED = 10
"""Every tenth session is offered to the other frontend, so that the store has processed look-ups as well."""


class Place(NamedTuple):
    """A place to search for secrets."""

    name: str
    chunks: Callable[[], Iterator[bytes]]


class Search(NamedTuple):
    """The result of the search of one place.

    Attributes:
        place: The name of the place.
        size: Bytes that were searched.
        secrets: Secrets that were found, with their forms; empty if the test passes.
        planted: The number of planted needles that were found, and the expected number.
        stored: The number of store keys that were found, and the expected number.
    """

    place: str
    size: int
    secrets: list[str]
    planted: int
    stored: int


def plant(target: str) -> list[tuple[str, bytes]]:
    """Store values that must be found, one for each form of a needle, and return the needles with their forms."""
    with contextlib.closing(resumed.StoreClient(target, namespace=NAMESPACE, deadline=10.0)) as store:
        planted = [("raw", os.urandom(48)), ("hex", os.urandom(48)), ("HEX", os.urandom(48))]
        planted += [(form, os.urandom(48)) for form in ("base64", "base64url") for _ in range(3)]
        for number, (form, needle) in enumerate(planted):
            before = bytes(number % 3)
            written = {
                "raw": needle,
                "hex": needle.hex().encode(),
                "HEX": needle.hex().upper().encode(),
                "base64": base64.b64encode(before + needle),
                "base64url": base64.urlsafe_b64encode(before + needle),
            }
            store.put(os.urandom(32), os.urandom(5) + written[form] + os.urandom(5), 3600)
    return planted


def memory_of(server: RunningServer) -> list[Place]:
    """Return the memory of a server's processes."""
    return [_memory("the store's memory", pid) for pid in process_tree(server.process.pid)]


def files_in(directory: Path) -> list[Place]:
    """Return the files of a database in the order of their size."""
    files = sorted(directory.iterdir(), key=lambda path: path.stat().st_size)
    return [Place(f"the file {path.name}", partial(chunks_of_file, path)) for path in files]


def all_of(valkey: RedisServer) -> list[Place]:
    """Return the memory of a Valkey and the file to which it dumps its database."""
    valkey.client.config_set("rdbcompression", "no")  # LZF would split the planted needles
    valkey.client.save()
    directory = Path(valkey.client.config_get("dir")["dir"])
    return [_memory("Valkey's memory", valkey.client.info("server")["process_id"]), *files_in(directory)]


def _memory(name: str, pid: int) -> Place:
    return Place(f"{name} (process {pid})", partial(chunks_of_memory, pid))


def search(
    places: Iterable[Place],
    sessions: Sequence[Known],
    fleet_keys: Iterable[bytes],
    planted: Sequence[tuple[str, bytes]],
) -> list[Search]:
    """Search all places for all secrets and controls."""
    keys = StoreKeys(NAMESPACE)
    named = [(f"planted {form} {number}", needle) for number, (form, needle) in enumerate(planted)]
    named += [(f"fleet key {number}", key) for number, key in enumerate(fleet_keys)]
    for number, session in enumerate(sessions):
        named.append((f"id of session {number}", session.offered))
        named.append((f"secret of session {number}", session.secret))
        named.append((f"store key of session {number}", keys.key(session.offered)))
    needles = Needles(named)
    return [_search(place, needles) for place in places]


def _search(place: Place, needles: Needles) -> Search:
    size = 0

    def measured() -> Iterator[bytes]:
        nonlocal size
        for chunk in place.chunks():
            size += len(chunk)
            yield chunk

    found = needles.found_in(measured())
    # A needle must be found in the form in which it was planted.
    planted = {name for name, form in found if name.startswith(f"planted {form} ")}
    stored = {name for name, _ in found if name.startswith("store key")}
    secrets = sorted(f"{name}, {form}" for name, form in found if not name.startswith(("planted", "store key")))
    return Search(place.name, size, secrets, len(planted), len(stored))


def negotiate(ports: Sequence[int], count: int) -> list[Known]:
    """Return `count` sessions that clients negotiated with frontends in turns."""
    versions = list(VERSION_NAMES.values())

    def visits(number: int) -> list[Known]:
        clients = [Client(version) for version in versions]
        mine = []
        for turn in range(number, count, _CLIENTS):
            client, port, other = clients[turn // 2 % 2], ports[turn % 2], ports[1 - turn % 2]
            session = client.visit(port).session
            assert session is not None
            mine.append(known(session))
            if turn // _CLIENTS % _RESUMED == 0:
                client.visit(other, session)
        return mine

    with ThreadPoolExecutor(_CLIENTS) as pool:
        return [each for mine in pool.map(visits, range(_CLIENTS)) for each in mine]


def look_into(store: str, count: int, workers: int) -> list[Search]:
    """Fill one kind of store, and search all of it."""
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="resumed-dump-")))
        database = directory / "database"
        database.mkdir()
        valkey = held.enter_context(valkey_server()) if store == "redis" else None
        url = valkey.url if valkey else f"lmdb://{database}"
        # Without core dumps, only root may read the memory. A small map takes less time to search.
        options = ("--storage", url, "--core-dumps", "--capacity", "64MiB")
        server = held.enter_context(running_server(*options, workers=workers))
        fleet = Fleet(str(directory))
        ports = [held.enter_context(fleet.frontend(stack, server.target, "--deadline", "1")) for stack in STACKS]
        planted = plant(server.target)
        sessions = negotiate(ports, count)
        for port in ports:
            Client(VERSION_NAMES["TLS 1.2"]).ask(port, b"flush")
        places = [*memory_of(server), *(all_of(valkey) if valkey else files_in(database))]
        return search(places, sessions, [base64.b64decode(fleet.keyring.read_bytes())], planted)


def broken(searches: Sequence[Search], count: int) -> list[str]:
    """Return the problems: secrets that were found, and controls that are missing where the sessions are stored."""
    problems = [f"{each.place}: {secret}" for each in searches for secret in each.secrets]
    *_, data = searches
    if data.stored < count:
        problems.append(f"{data.place}: only {data.stored} of {count} sessions are there")
    if data.planted < PLANTED:
        problems.append(f"{data.place}: only {data.planted} of {PLANTED} planted needles were found")
    return problems


def main() -> int:
    """Run, print, and return 1 if a secret was found or a control was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--store", choices=["lmdb", "redis"], action="append", help="both, if not given")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    console, status = Console(width=None if os.isatty(1) else 140, highlight=False), 0
    for store in options.store or ["lmdb", "redis"]:
        searches = look_into(store, options.sessions, options.workers)
        table = Table("where", "MiB", "secrets found", "controls found: planted", "store keys")
        for each in searches:
            size = f"{each.size / (1 << 20):,.0f}"
            table.add_row(each.place, size, f"{len(each.secrets)}", f"{each.planted} of {PLANTED}", f"{each.stored:,}")
        console.print(f"{store}: {options.sessions:,} sessions", table)
        for problem in broken(searches, options.sessions)[:20]:
            console.print(problem, style="bold red", markup=False)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
