"""A frontend with a mirror resumes from memory, and never a removed session."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from support.processes import paused
from support.redis import RedisServer, valkey_sentinels, valkey_server
from support.server import running_server
from support.tls import PATIENCE, STACKS, VERSIONS, Client, Frontend, Mirrored, server_context
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from resumed._client.store import Watch
    from support.server import RunningServer
    from support.tls import Stack


def test_a_hit_costs_no_call(store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client) -> None:
    name = os.urandom(8).hex()
    negotiator = Frontend("ssl", store.target, keyring, namespace=name)
    frontend = Mirrored(stack, store.target, keyring, namespace=name)
    session = client.visit(negotiator).session
    frontend.await_sessions(1 if client.version == VERSIONS[0] else 2)
    assert client.visit(frontend, session).reused
    assert frontend.shim.stats.hits == {"mirror": 1}
    assert sum(frontend.shim.stats.lookup_seconds) == 0


def test_sessions_stored_before_are_mirrored_after_a_look_up(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    client = Client(VERSIONS[0])
    negotiator = Frontend("ssl", store.target, keyring)
    session = client.visit(negotiator).session
    assert negotiator.shim.flush()
    frontend = Mirrored(stack, store.target, keyring)
    assert [client.visit(frontend, session).reused for _ in range(2)] == [True, True]
    assert frontend.shim.stats.hits == {"store": 1, "mirror": 1}


def test_a_removal_anywhere_takes_effect_here(store: RunningServer, keyring: resumed.Keyring, stack: Stack) -> None:
    client = Client(VERSIONS[0])
    name = os.urandom(8).hex()
    negotiator = Frontend("ssl", store.target, keyring, namespace=name)
    frontend = Mirrored(stack, store.target, keyring, namespace=name)
    session = client.visit(negotiator).session
    assert session is not None
    frontend.await_sessions(1)
    negotiator.shim.remove(session.id)
    frontend.await_sessions(0)
    assert not client.visit(frontend, session).reused


def test_a_removal_here_takes_effect_at_once(store: RunningServer, keyring: resumed.Keyring, stack: Stack) -> None:
    client = Client(VERSIONS[0])
    frontend = Mirrored(stack, store.target, keyring)
    with client.connect(frontend) as connection:
        connection.echo(b"hello")
        session = connection.tls.session
        connection.send_garbage()
    assert frontend.shim.flush()
    assert not client.visit(frontend, session).reused


def test_a_purge_up_to_a_time_leaves_what_was_negotiated_since(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    client, name = Client(VERSIONS[0]), os.urandom(8).hex()
    frontend = Mirrored(stack, store.target, keyring, namespace=name)
    session = client.visit(frontend).session
    frontend.await_sessions(1)
    with resumed.Admin(store.target, deadline=PATIENCE) as admin:
        admin.purge(name, time.time() - 60.0)
    client.visit(frontend)  # told behind the purge
    frontend.await_sessions(2)
    assert client.visit(frontend, session).reused
    assert frontend.shim.stats.hits == {"mirror": 1}


def test_single_use_never_reads_it(store: RunningServer, keyring: resumed.Keyring, stack: Stack) -> None:
    client = Client(VERSIONS[0])
    frontend = Frontend(stack, store.target, keyring, mirror=True, single_use=True)
    session = client.visit(frontend).session
    assert [client.visit(frontend, session).reused for _ in range(3)] == [True, False, False]
    assert not frontend.shim.stats.hits["mirror"]


def test_it_answers_only_while_the_stream_is_alive(
    keyring: resumed.Keyring, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent server may have accepted removals."""
    monkeypatch.setattr("resumed._policy.mirror.STALE_SECONDS", 1.5)
    client = Client(VERSIONS[0])
    with running_server() as server:
        frontend = Mirrored(stack, server.target, keyring)
        session = client.visit(frontend).session
        frontend.await_sessions(1)
        with paused(server.process):
            until(lambda: not frontend.mirror.live)
            assert not client.visit(frontend, session).reused
        until(lambda: client.visit(frontend, session).reused)
        until(lambda: frontend.mirror.live)
        assert client.visit(frontend, session).reused


def test_connections_age_without_a_word(keyring: resumed.Keyring, caplog: pytest.LogCaptureFixture) -> None:
    with running_server("--max-connection-age", "1s") as server:
        frontend = Mirrored("ssl", server.target, keyring)
        Client(VERSIONS[0]).visit(frontend)
        frontend.await_sessions(1)
        streams: list[Watch | None] = []

        def another() -> bool:
            if frontend.mirror._watch not in streams:
                streams.append(frontend.mirror._watch)
            return len(streams) > 2 and frontend.mirror.live

        until(another)
        assert len(frontend.mirror.sessions) == 1
        frontend.mirror.close()
    assert not caplog.records


def test_a_removal_while_the_stream_was_down_is_caught_up_with(
    keyring: resumed.Keyring, stack: Stack, tmp_path: Path
) -> None:
    client = Client(VERSIONS[0])
    options = ("--storage", f"lmdb://{tmp_path}/db")
    with running_server(*options) as server:
        target = server.target
        frontend = Mirrored(stack, target, keyring)
        kept, removed = (client.visit(frontend).session for _ in range(2))
        assert removed is not None
        frontend.await_sessions(2)
    until(lambda: not frontend.mirror.live)
    frontend.mirror._store, connected = Unreachable(), frontend.mirror._store
    with running_server(*options, listen=target):
        other = Frontend("ssl", target, keyring)
        other.shim.remove(removed.id)
        assert other.shim.flush(PATIENCE)
        frontend.mirror._store = connected
        until(lambda: frontend.mirror.live)
        assert not client.visit(frontend, removed).reused
        assert client.visit(frontend, kept).reused
        assert frontend.shim.stats.hits["mirror"] == 1


def test_another_store_begins_with_an_empty_mirror(keyring: resumed.Keyring, stack: Stack) -> None:
    client = Client(VERSIONS[0])
    with running_server() as server:
        target = server.target
        frontend = Mirrored(stack, target, keyring)
        session = client.visit(frontend).session
        frontend.await_sessions(1)
    with running_server(listen=target):
        until(lambda: not len(frontend.mirror.sessions))
        until(lambda: frontend.mirror.live)
        assert not client.visit(frontend, session).reused


@pytest.fixture
def valkey() -> Iterator[RedisServer]:
    with valkey_server() as server:
        yield server


def on_valkey(valkey: RedisServer, **options: Any) -> AbstractContextManager[RunningServer]:
    return running_server("--storage", f"{valkey.url}?timeout_ms=5000", **options)


def test_servers_on_one_valkey_report_changes_of_the_others(valkey: RedisServer, keyring: resumed.Keyring) -> None:
    client = Client(VERSIONS[0])
    with on_valkey(valkey) as one, on_valkey(valkey) as other:
        for targets in ((one.target, other.target), (other.target, one.target)):
            name = os.urandom(8).hex()
            here, there = (Mirrored(*where, keyring, namespace=name) for where in zip(STACKS, targets, strict=True))
            kept, removed = (client.visit(here).session for _ in range(2))
            assert removed is not None
            there.await_sessions(2)
            assert client.visit(there, kept).reused
            assert client.visit(there, removed).reused
            assert there.shim.stats.hits == {"mirror": 2}
            here.shim.remove(removed.id)
            there.await_sessions(1)
            assert not client.visit(there, removed).reused
            assert client.visit(there, kept).reused


def test_a_mirror_goes_on_at_another_server(valkey: RedisServer, keyring: resumed.Keyring) -> None:
    client = Client(VERSIONS[0])
    with on_valkey(valkey) as one:
        target = one.target
        frontend = Mirrored("ssl", target, keyring)
        kept, removed = (client.visit(frontend).session for _ in range(2))
        assert removed is not None
        frontend.await_sessions(2)
    until(lambda: not frontend.mirror.live)
    frontend.mirror._store, connected = Unreachable(), frontend.mirror._store
    with on_valkey(valkey, listen=target), on_valkey(valkey) as other:
        remover = Frontend("ssl", other.target, keyring)
        remover.shim.remove(removed.id)
        assert remover.shim.flush(PATIENCE)
        frontend.mirror._store = connected
        until(lambda: frontend.mirror.live)
        assert not client.visit(frontend, removed).reused
        assert client.visit(frontend, kept).reused
        assert frontend.shim.stats.hits["mirror"] == 1


def emptied(valkey: RedisServer) -> None:
    valkey.client.flushall()


@pytest.mark.parametrize("lose", [emptied, RedisServer.restart])
def test_a_valkey_that_lost_everything_empties_the_mirror(
    valkey: RedisServer, keyring: resumed.Keyring, lose: Callable[[RedisServer], None]
) -> None:
    client = Client(VERSIONS[0])
    with on_valkey(valkey) as server:
        frontend = Mirrored("ssl", server.target, keyring)
        session = client.visit(frontend).session
        frontend.await_sessions(1)
        lose(valkey)
        frontend.await_sessions(0)
        until(lambda: frontend.mirror.live)
        assert not client.visit(frontend, session).reused
        until(lambda: client.visit(frontend, client.visit(frontend).session).reused)
        until(lambda: len(frontend.mirror.sessions) > 0)


def test_a_failover_empties_the_mirror(keyring: resumed.Keyring) -> None:
    client = Client(VERSIONS[0])
    with (
        valkey_sentinels() as sentinels,
        running_server("--storage", f"{sentinels.url}?timeout_ms=5000") as server,
    ):
        frontend = Mirrored("ssl", server.target, keyring)
        sentinels.fall_behind()
        lost = client.visit(frontend).session
        frontend.await_sessions(1)
        sentinels.primary.kill()
        frontend.await_sessions(0)
        until(lambda: frontend.mirror.live)
        assert not client.visit(frontend, lost).reused
        until(lambda: len(frontend.mirror.sessions) > 0)


def test_a_server_that_lost_its_valkey_silences_the_mirror(valkey: RedisServer, keyring: resumed.Keyring) -> None:
    client = Client(VERSIONS[0])
    with on_valkey(valkey) as server:
        frontend = Mirrored("ssl", server.target, keyring)
        session = client.visit(frontend).session
        frontend.await_sessions(1)
        with paused(valkey.process):
            until(lambda: not frontend.mirror.live)
            assert not client.visit(frontend, session).reused
        until(lambda: frontend.mirror.live)
        until(lambda: client.visit(frontend, session).reused)


class Unreachable:
    target = "unreachable"

    def watch(self, _position: bytes) -> None:
        raise resumed.StoreUnavailable("unreachable")


@pytest.mark.parametrize(
    ("mirror", "size"), [(False, 0), (True, 64 << 20), ("128MiB", 128 << 20), (1_000_000, 1_000_000), ("5KiB", 5120)]
)
def test_its_size_may_be_given(keyring: resumed.Keyring, mirror: bool | int | str, size: int) -> None:
    context = server_context("ssl")
    shim = resumed.install(context, target="x:1", namespace="x", keyring=keyring, mirror=mirror)._policy
    assert (shim._mirror.sessions._limit if shim._mirror else 0) == size


def test_nonsense_for_a_size_is_refused(keyring: resumed.Keyring) -> None:
    with pytest.raises(ValueError, match="64MiB"):
        resumed.install(server_context("ssl"), target="x:1", namespace="x", keyring=keyring, mirror="much")
