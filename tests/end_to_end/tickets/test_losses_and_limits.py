"""Tickets and the limits of the store: its lifetimes, and the loss of its storage."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest

import resumed
from support.ports import free_port
from support.server import running_server
from support.tickets import TicketFrontend
from support.waiting import until

if TYPE_CHECKING:
    import contextlib
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from support.server import RunningServer
    from support.tls import Client, Stack


class Spent(NamedTuple):
    """A frontend whose store has ended, and a ticket that was used there."""

    frontend: TicketFrontend
    used: ssl.SSLSession | None
    empty_store: Callable[[], contextlib.AbstractContextManager[RunningServer]]
    """Runs a store without contents in the place of the other."""


@pytest.fixture
def spent(keyring: resumed.Keyring, stack: Stack, client: Client, tmp_path: Path) -> Spent:
    listen = f"127.0.0.1:{free_port()}"
    with running_server("--storage", f"lmdb://{tmp_path}/one", listen=listen) as store:
        frontend = TicketFrontend(stack, store.target, keyring, single_use=True)
        used = client.visit(frontend).session
        assert client.visit(frontend, used).reused
    return Spent(frontend, used, partial(running_server, "--storage", f"lmdb://{tmp_path}/other", listen=listen))


def test_no_ticket_of_one_use_resumes_after_the_store_has_lost_its_storage(spent: Spent, client: Client) -> None:
    frontend = spent.frontend
    (before, _) = frontend.tickets._secrets.current(time.time())
    with spent.empty_store():
        until(lambda: (frontend.tickets._secrets.current(time.time()) or (before,))[0] is not before)
        assert not client.visit(frontend, spent.used).reused
        assert client.visit(frontend, client.visit(frontend).session).reused


def test_no_ticket_of_one_use_resumes_before_its_frontend_knows_that_the_store_has_lost_its_storage(
    spent: Spent, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontend = spent.frontend
    monkeypatch.setattr(frontend.tickets, "_make_up_for_loss", lambda: None)

    def refused_by_the_store() -> bool:
        assert not client.visit(frontend, spent.used).reused
        return "unknown-secret" in frontend.refused

    with spent.empty_store():
        until(refused_by_the_store)
        until(lambda: client.visit(frontend, client.visit(frontend).session).reused)


def test_no_ticket_of_one_use_from_before_a_purge_resumes_where_the_purge_is_not_known_yet(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontend = TicketFrontend(stack, store.target, keyring, single_use=True, namespace="late-purge")
    session = client.visit(frontend).session
    monkeypatch.setattr(frontend.tickets, "_apply", lambda *_, **__: None)
    with resumed.Admin(store.target) as admin:
        admin.purge("late-purge")
    assert not client.visit(frontend, session).reused
    assert frontend.refused == {"replayed": 1}
    until(lambda: client.visit(frontend, client.visit(frontend).session).reused)


def test_the_maximum_lifetime_of_sessions_is_that_of_no_secret_and_no_claim(
    keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    with running_server("--max-ttl", "1m") as store:
        one, other = (TicketFrontend(stack, store.target, keyring, single_use=True) for _ in range(2))
        session = client.visit(one).session
        assert [client.visit(frontend, session).reused for frontend in (other, one)] == [True, False]
        later = TicketFrontend(stack, store.target, keyring)
        secrets = later.tickets._secrets
        assert all(each.not_after - time.time() > 7200 for each in secrets.held(time.time()))
        assert client.visit(later, client.visit(one).session).reused


def test_a_ticket_does_not_resume_if_the_store_forgets_its_one_use_too_early(
    store: RunningServer,
    keyring: resumed.Keyring,
    client: Client,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frontend = TicketFrontend("ssl", store.target, keyring, single_use=True, namespace="claims")
    session = client.visit(frontend).session
    store_client = frontend.tickets._lookups._store
    batch = store_client.batch
    monkeypatch.setattr(store_client, "batch", lambda *args, **options: [7100.0, batch(*args, **options)[1]])
    assert [client.visit(frontend, session).reused for _ in range(2)] == [False, False]
    assert frontend.refused == {"rejected": 2}
    assert caplog.text.count("less than the tickets live") == 1


def test_a_removal_that_the_store_cannot_keep_long_enough_is_refused_at_the_start(
    store: RunningServer, keyring: resumed.Keyring
) -> None:
    with pytest.raises(ValueError, match="lifetime and rotation must be 604800 seconds together at most"):
        TicketFrontend("ssl", store.target, keyring, lifetime=604_800)
