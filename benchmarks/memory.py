"""Memory per session in every engine: `python benchmarks/memory.py`.

Real handshakes determine the length of sealed sessions; keys have 32 random bytes. The engines store the sessions, so
keys and commands are those of a running server. Then the engines take all sessions, which leaves the tombstones.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import ssl
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from rich.progress import Progress

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.measuring import build_table, new_console
from resumed_server.storage.engine import Put, Take
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.registry import open_engine
from support.redis import redis_server, valkey_server
from support.tls import CA, CERTIFICATE, VERSIONS, Client, Frontend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from rich.table import Table

    from resumed_server.storage.engine import Engine, Operation

KEY_BYTES = 32
BATCH = 200
CAPACITY = 16 << 30
LIFETIME = 24 * 3_600.0
NAMES = {version: version.name.replace("TLSv1_", "TLS 1.") for version in VERSIONS}


class RecordingKeyring(resumed.Keyring):
    """A keyring that records the sealed values."""

    sealed: list[bytes]

    def seal(self, store_key: bytes, plaintext: bytes, not_after: int) -> bytes:
        """Seal a plaintext, and record the result."""
        self.sealed.append(super().seal(store_key, plaintext, not_after))
        return self.sealed[-1]


def measure_sealed_bytes(version: ssl.TLSVersion, *, client_certificate: bool = False) -> int:
    """Negotiate a session of `version`, and return the number of bytes that a frontend stores."""
    keyring = RecordingKeyring.from_keys([os.urandom(32)])
    assert isinstance(keyring, RecordingKeyring)
    keyring.sealed = []
    # No store listens at this address: the sealed session need not arrive.
    frontend, client = Frontend("ssl", "127.0.0.1:1", keyring), Client(version)
    if client_certificate:
        CA.configure_trust(frontend.context)
        frontend.context.verify_mode = ssl.CERT_REQUIRED
        CERTIFICATE.configure_cert(client.context)
    assert not client.visit(frontend).reused
    frontend.shim.uninstall()
    return len(keyring.sealed[0])


def put_all(engine: Engine, keys: Iterable[bytes], value_bytes: int) -> None:
    """Store a session of random bytes under each of `keys`."""
    carry_out(engine, (Put("shop", key, os.urandom(value_bytes), LIFETIME) for key in keys))


def carry_out(engine: Engine, operations: Iterable[Operation]) -> None:
    """Carry `operations` out in batches; a failure ends the run, because it would distort the figures."""
    operations = iter(operations)
    while batch := list(itertools.islice(operations, BATCH)):
        for outcome in engine.batch(batch):
            assert outcome is not None, "a session is missing: the engine is too small"
            assert not isinstance(outcome, Exception), outcome


class Storage(NamedTuple):
    """An empty engine, and a function that returns the bytes that it uses."""

    engine: Engine
    used_bytes: Callable[[], int]


@contextlib.contextmanager
def run_redis(running: Callable[[], AbstractContextManager[Any]]) -> Iterator[Storage]:
    """Start a Redis server and open its engine."""
    with running() as server:
        engine = open_engine(f"{server.url}?timeout_ms=5000", capacity=CAPACITY)
        info = redis.Redis.from_url(server.url)
        with contextlib.closing(engine), contextlib.closing(info):
            yield Storage(engine, lambda: int(info.info("memory")["used_memory"]))


@contextlib.contextmanager
def open_lmdb() -> Iterator[Storage]:
    """Open an LMDB engine in a new directory."""
    with tempfile.TemporaryDirectory() as place:
        engine = LmdbEngine(Path(place), capacity=CAPACITY)

        def used_bytes() -> int:
            pages = 0
            with engine._env.begin() as txn:
                for table in engine._directory.tables:
                    stat = txn.stat(table)
                    pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
            return int(pages * engine._page_bytes)

        with contextlib.closing(engine):
            yield Storage(engine, used_bytes)


def measure(storage: Storage, sessions: int, value_bytes: int, progress: Progress) -> tuple[float, float]:
    """Return the bytes per session, and the bytes per tombstone."""
    empty = storage.used_bytes()
    keys = [os.urandom(KEY_BYTES) for _ in range(sessions)]
    put_all(storage.engine, progress.track(keys, description="storing"), value_bytes)
    full = storage.used_bytes()
    carry_out(storage.engine, (Take("shop", key) for key in progress.track(keys, description="taking")))
    return (full - empty) / sessions, (storage.used_bytes() - empty) / sessions


def measure_values(*, markdown: bool) -> tuple[Table, dict[str, int]]:
    """Return the sizes of sealed sessions, and those to measure; with client certificates all versions are alike."""
    table = build_table("sealed session, bytes", "without client certificate", "with one", markdown=markdown)
    sizes = {}
    for version, name in NAMES.items():
        sizes[name], with_certificate = (
            measure_sealed_bytes(version),
            measure_sealed_bytes(version, client_certificate=True),
        )
        table.add_row(name, str(sizes[name]), str(with_certificate))
    return table, sizes | {f"{name}, client certificate": with_certificate}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--engines", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown, for docs/engines.md")
    options = parser.parse_args()
    values, sizes = measure_values(markdown=options.markdown)
    table = build_table(
        *("engine", "session", "value", "bytes per session", "beyond key and value", "bytes per tombstone"),
        markdown=options.markdown,
        title=f"Memory, {options.sessions:,} sessions",
    )
    with Progress(transient=True) as progress:
        for engine in options.engines:
            for name, value in sizes.items():
                with STORAGES[engine]() as storage:
                    session, tombstone = measure(storage, options.sessions, value, progress)
                overhead = session - KEY_BYTES - value
                table.add_row(engine, name, f"{value}", f"{session:,.0f}", f"{overhead:,.0f}", f"{tombstone:,.0f}")
    console = new_console()
    console.print(values)
    console.print(table)


STORAGES: dict[str, Callable[[], AbstractContextManager[Storage]]] = {
    "lmdb": open_lmdb,
    "redis-server": partial(run_redis, redis_server),
    "valkey-server": partial(run_redis, valkey_server),
}

if __name__ == "__main__":
    main()
