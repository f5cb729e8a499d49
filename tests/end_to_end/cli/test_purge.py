"""A purged session never resumes at any frontend, and later sessions do."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

import resumed
from support.tls import PATIENCE, STACKS, VERSIONS, Client, Frontend
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.server import RunningServer
    from support.tls import Stack

TLS13 = VERSIONS[1]


@pytest.fixture
def namespace() -> str:
    return os.urandom(8).hex()


@pytest.fixture
def fleet(store: RunningServer, keyring: resumed.Keyring, namespace: str) -> Callable[..., Frontend]:
    """Make a frontend of a namespace."""
    return partial(Frontend, target=store.target, keyring=keyring, namespace=namespace)


@pytest.fixture
def purge(store: RunningServer, namespace: str) -> Iterator[Callable[..., object]]:
    with resumed.Admin(store.target, deadline=PATIENCE) as admin:
        yield partial(admin.purge, namespace)


def test_after_a_purge_nothing_from_before_resumes_and_what_comes_later_does(
    fleet: Callable[..., Frontend], purge: Callable[..., object], client: Client
) -> None:
    mirrored = [fleet(stack, mirror=True) for stack in STACKS]
    frontends = [*mirrored, fleet("ssl")]
    mirrors = [frontend.shim._policy._mirror for frontend in mirrored]
    for mirror in mirrors:
        mirror.follow()
        until(partial(getattr, mirror, "live"))
    sessions = [client.visit(frontend).session for frontend in frontends]
    assert all(frontend.shim.flush(PATIENCE) for frontend in frontends)
    tickets = len(sessions) * (2 if client.version == TLS13 else 1)
    until(lambda: all(len(mirror.sessions) == tickets for mirror in mirrors))
    assert client.visit(mirrored[0], sessions[-1]).reused
    assert mirrored[0].shim.stats.hits == {"mirror": 1}

    purge()
    until(lambda: not any(len(mirror.sessions) for mirror in mirrors))
    for frontend in frontends:
        assert not any(client.visit(frontend, session).reused for session in sessions)

    later = client.visit(frontends[0]).session
    assert frontends[0].shim.flush(PATIENCE)
    assert all(client.visit(frontend, later).reused for frontend in frontends)
    assert mirrors[1].live


def test_a_session_that_waits_in_a_frontend_while_its_namespace_is_purged_is_not_stored(
    fleet: Callable[..., Frontend],
    purge: Callable[..., object],
    stack: Stack,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frontend = fleet(stack)
    before = client.visit(frontend).session
    assert frontend.shim.flush(PATIENCE)
    stored = frontend.shim.stats.puts["stored"]
    gate, sender = threading.Event(), frontend.shim._policy._write_queue
    batch = sender._store.batch
    monkeypatch.setattr(sender._store, "batch", lambda *a, **kw: gate.wait(PATIENCE) and batch(*a, **kw))
    waiting = client.visit(frontend).session
    derived = client.visit(frontend, before)
    assert derived.reused
    purge()
    gate.set()
    assert frontend.shim.flush(PATIENCE)
    assert frontend.shim.stats.puts == {"stored": stored, "refused": 3 if client.version == TLS13 else 1}
    assert not any(client.visit(frontend, session).reused for session in (before, waiting, derived.session))


def test_the_tickets_of_resumed_connections_are_as_old_as_the_first_handshake(
    fleet: Callable[..., Frontend], purge: Callable[..., object], stack: Stack
) -> None:
    """So a purge up to a time also ends the later tickets of an older session."""
    client = Client(TLS13)
    frontends = [fleet(each) for each in (stack, "ssl", stack)]
    line = [client.visit(frontends[0]).session]
    moment = time.time()
    spared = client.visit(frontends[1]).session
    for frontend in frontends:
        visit = client.visit(frontend, line[-1])
        assert visit.reused
        line.append(visit.session)
    assert all(frontend.shim.flush(PATIENCE) for frontend in frontends)
    purge(moment)
    for frontend in frontends:
        assert not any(client.visit(frontend, session).reused for session in line)
    assert client.visit(frontends[0], spared).reused
