from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from resumed import AlreadyExists, StoreUnavailable
from resumed._client.store import Change, WatchBatch
from resumed._policy.ticket_secrets import TicketSecrets
from resumed_server.cli.ticket_keys.revocations import Revocations
from resumed_server.errors import OutsideFailure
from support.ticket_secrets import secret_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resumed._crypto.ticket_secret import TicketSecret

SECRETS = [secret_of(number) for number in (1, 2, 3)]


class Held(TicketSecrets):
    """Secrets that can be revoked, at 250.0."""

    def __init__(self) -> None:
        self.secrets, self._clock = list(SECRETS), lambda: 250.0

    def revoke(self, doomed: Callable[[TicketSecret], bool]) -> None:
        self.secrets = [each for each in self.secrets if not doomed(each)]


class Store:
    """A store whose streams have some changes, and end."""

    def __init__(self, *changes: Change, removals_only: bool = True, live: bool = True) -> None:
        self.changes, self.removals_only, self.live = changes, removals_only, live
        self.resumed_from_position = False
        self.positions: list[bytes] = []

    @contextmanager
    def watch(self, position: bytes, *, removals_only: bool) -> Iterator[Store]:
        assert removals_only
        self.positions.append(position)
        yield self

    def __iter__(self) -> Iterator[WatchBatch]:
        yield WatchBatch(list(self.changes), b"behind", self.live)
        raise StoreUnavailable("the stream ended")


def follow(store: Store) -> list[TicketSecret]:
    held = Held()
    revocations = Revocations(store, held)  # type: ignore[arg-type]
    with pytest.raises(OutsideFailure):
        revocations.follow()
    return held.secrets


def test_a_purge_ends_all_secrets() -> None:
    assert follow(Store(Change(b"", purged=150.0))) == []


def test_the_last_purge_with_which_a_stream_begins_ends_the_secrets_from_before() -> None:
    assert follow(Store(Change(b"", purged=250.0), live=False)) == SECRETS[2:]


def test_a_purge_with_a_time_ends_the_secrets_from_before() -> None:
    assert follow(Store(Change(b"", time=200.0))) == SECRETS[1:]


def test_the_removal_of_a_secret_ends_it() -> None:
    assert follow(Store(Change(SECRETS[1].address, ttl=10.0))) == [SECRETS[0], SECRETS[2]]


def test_the_removal_of_a_ticket_ends_no_secret() -> None:
    assert follow(Store(Change(b"k" * 32, ttl=10.0))) == SECRETS


def test_a_stream_continues_where_the_last_one_ended() -> None:
    store = Store()
    revocations = Revocations(store, Held())  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(OutsideFailure, match="the stream ended"):
            revocations.follow()
    assert store.positions == [b"", b"behind"]


def test_a_store_that_is_too_old_is_an_error_that_says_so() -> None:
    with pytest.raises(OutsideFailure, match=r"too old.*upgrade"):
        Revocations(Store(removals_only=False), Held()).follow()  # type: ignore[arg-type]


def test_another_error_of_the_store_is_one_of_the_outside() -> None:
    class Refusing(Store):
        def __iter__(self) -> Iterator[WatchBatch]:
            raise AlreadyExists("no")

    with pytest.raises(OutsideFailure, match="no"):
        Revocations(Refusing(), Held()).follow()  # type: ignore[arg-type]
