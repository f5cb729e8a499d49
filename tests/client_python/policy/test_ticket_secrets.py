"""Frontends agree on ticket secrets through a store, which here is a table: its failures and clocks are the test's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import resumed
from resumed._client.store import Get, Put, Remove, StoredSession
from resumed._crypto.ticket_secret import Epoch, TicketSecret, address_of
from resumed._exceptions import AlreadyExists, StoreError, StoreUnavailable
from resumed._policy.ticket_secrets import TicketSecrets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed._client.store import Operation, Result

ROTATION, LIFETIME = 3600, 7200
NOON = 1_790_000_000 // ROTATION * ROTATION


class Table:
    """A store whose calls are counted."""

    namespace = "shop"

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.removed: set[bytes] = set()
        self.calls = 0
        self.fails = False
        self.pinned: list[bool] = []

    def batch(self, operations: Sequence[Operation], *, deadline: float) -> list[Result]:
        self.calls += 1
        if self.fails:
            raise StoreUnavailable("UNAVAILABLE: the test has stopped it")
        assert deadline > 0
        return [self._result(each) for each in operations]

    def _result(self, operation: Operation) -> Result:
        match operation:
            case Get(key):
                value = self.values.get(key)
                return None if value is None else StoredSession(value, 60.0)
            case Put(key, value, ttl):
                if key in self.removed or self.values.setdefault(key, value) != value:
                    return AlreadyExists("ALREADY_EXISTS")
                self.pinned.append(operation.pinned)
                return ttl
            case Remove(key):
                self.removed.add(key)
                return self.values.pop(key, None) is not None
            case _:
                raise AssertionError(operation)


class Fleet:
    """Frontends with one keyring, one store, and a clock each."""

    def __init__(self, *keys: bytes) -> None:
        self.store, self.keys = Table(), keys or (os.urandom(32),)
        self.now = float(NOON)

    def frontend(self, *keys: bytes, ahead: float = 0.0, spread: float = 0.5, restores: bool = True) -> TicketSecrets:
        return TicketSecrets(
            self.store,  # type: ignore[arg-type]
            resumed.Keyring.from_keys(list(keys or self.keys)),
            lifetime=LIFETIME,
            rotation=ROTATION,
            restores=restores,
            clock=lambda: self.now + ahead,
            random=lambda: spread,
        )


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def name(secrets: TicketSecrets, now: float) -> bytes:
    current = secrets.current(now)
    assert current
    return current[0].name


def test_frontends_that_start_together_hold_one_secret_of_three_calls_at_most(fleet: Fleet) -> None:
    frontends = [fleet.frontend() for _ in range(50)]
    for frontend in frontends:
        before = fleet.store.calls
        frontend.step()
        assert fleet.store.calls - before <= 3
    assert len({name(frontend, fleet.now) for frontend in frontends}) == 1
    assert fleet.store.pinned == [True, True]  # the present and the next


def test_the_loser_of_a_race_takes_the_winners_secret(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = fleet.frontend(), fleet.frontend()
    batch = fleet.store.batch

    def overtaken(operations: Sequence[Operation], *, deadline: float) -> list[Result]:
        results = batch(operations, deadline=deadline)
        if isinstance(operations[0], Get) and not fleet.store.values:
            monkeypatch.setattr(fleet.store, "batch", batch)
            first.step()
        return results

    monkeypatch.setattr(fleet.store, "batch", overtaken)
    second.step()
    assert name(first, fleet.now) == name(second, fleet.now)


def test_the_next_secret_is_agreed_on_within_the_epoch_before(fleet: Fleet) -> None:
    one, other = fleet.frontend(spread=0.25), fleet.frontend(spread=0.75)
    for frontend in (one, other):
        frontend.step()
    first = name(one, fleet.now)
    fleet.now += ROTATION
    fleet.store.fails = True  # they need no call at the moment of the rotation
    assert name(one, fleet.now) == name(other, fleet.now) != first
    fleet.store.fails = False
    assert one.step() == pytest.approx(ROTATION / 6 * 0.25)
    assert other.step() == pytest.approx(ROTATION / 6 * 0.75)
    fleet.now += ROTATION / 6
    one.step()
    other.step()
    fleet.now = NOON + 2 * ROTATION
    assert name(one, fleet.now) == name(other, fleet.now)


def test_secrets_of_earlier_epochs_open_until_their_tickets_have_ended_and_are_erased(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    secret = frontend.current(fleet.now)
    assert secret
    first = secret[0]
    assert first.not_after == NOON + 2 * ROTATION + LIFETIME
    while fleet.now < first.not_after - ROTATION / 2:
        fleet.now += ROTATION / 2
        frontend.step()
    assert frontend.named(first.name, fleet.now) is first
    fleet.now = first.not_after
    assert frontend.named(first.name, fleet.now) is None
    frontend.step()
    assert first not in frontend.held(0.0)


def test_a_frontend_that_starts_later_holds_the_earlier_secrets(fleet: Fleet) -> None:
    first = fleet.frontend()
    first.step()
    names = {name(first, fleet.now)}
    for _ in range(6):
        fleet.now += ROTATION / 2
        first.step()
        names.add(name(first, fleet.now))
    later = fleet.frontend()
    later.step()
    assert all(later.named(each, fleet.now) for each in names)
    assert len(names) == 4


def test_without_the_store_the_present_secret_stays_in_use_until_it_ends(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    fleet.store.fails = True
    fleet.now += 2.5 * ROTATION
    frontend.step()
    current = frontend.current(fleet.now)
    assert current
    secret, held_over = current
    assert held_over
    fleet.now = secret.not_after
    frontend.step()
    assert frontend.current(fleet.now) is None
    fleet.store.fails = False
    fleet.now += 10
    frontend.step()
    current = frontend.current(fleet.now)
    assert current
    assert not current[1]


def test_a_store_that_fails_is_called_with_growing_pauses(fleet: Fleet) -> None:
    frontend = fleet.frontend(spread=1.0)
    fleet.store.fails = True
    pauses = []
    for _ in range(10):
        pauses.append(frontend.step())
        assert frontend.step() == pytest.approx(pauses[-1])  # too early: no call
        fleet.now += pauses[-1]
    assert pauses[:4] == pytest.approx([0.05, 0.1, 0.2, 0.4])
    assert max(pauses) == 5.0
    assert fleet.store.calls == 10


@pytest.mark.parametrize("ahead", [-3000.0, 3000.0])
def test_clocks_that_differ_by_fifty_minutes_open_each_others_tickets(fleet: Fleet, ahead: float) -> None:
    right, wrong = fleet.frontend(), fleet.frontend(ahead=ahead)
    for minutes in range(240):
        fleet.now = NOON + 60.0 * minutes
        for frontend in (wrong, right):
            frontend.step()
        assert wrong.named(name(right, fleet.now), fleet.now + ahead)
        assert right.named(name(wrong, fleet.now + ahead), fleet.now)


def test_a_value_that_does_not_open_gives_way_to_the_next_generation(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    frontend, other = fleet.frontend(), fleet.frontend()
    key = resumed.Keyring.from_keys(list(fleet.keys)).fleet_keys[0]
    for generation in range(3):
        fleet.store.values[address_of("shop", key, Epoch(NOON, ROTATION, generation))] = b"garbage"
    frontend.step()
    other.step()
    current = frontend.current(fleet.now)
    assert current
    assert current[0].epoch.generation == 3
    assert name(other, fleet.now) == current[0].name
    assert "cannot be opened" in caplog.text


def test_a_store_full_of_garbage_costs_a_bounded_number_of_calls(fleet: Fleet) -> None:
    key = resumed.Keyring.from_keys(list(fleet.keys)).fleet_keys[0]
    for generation in range(256):
        fleet.store.values[address_of("shop", key, Epoch(NOON, ROTATION, generation))] = b"garbage"
    frontend = fleet.frontend()
    frontend.step()
    assert fleet.store.calls <= 24
    assert frontend.current(fleet.now) is None


def test_a_secret_under_the_address_of_another_epoch_does_not_open(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    current = frontend.current(fleet.now)
    assert current
    secret = current[0]
    replayed = fleet.store.values[secret.address]
    later = secret.epoch._replace(start=secret.epoch.start + ROTATION)
    fleet.store.values[address_of("shop", secret.fleet_key, later)] = replayed
    fresh = fleet.frontend()
    fleet.now += ROTATION
    fresh.step()
    assert name(fresh, fleet.now) != secret.name


def test_two_secrets_for_one_epoch_are_both_opened_and_the_stores_encrypts(fleet: Fleet) -> None:
    one = fleet.frontend()
    one.step()
    before = name(one, fleet.now)
    fleet.store.values.clear()  # a failover that lost the last writes
    other = fleet.frontend()
    other.step()
    lost = name(other, fleet.now)
    assert lost != before
    fleet.now += ROTATION * 0.9
    one.step()
    assert name(one, fleet.now) == lost
    assert one.named(before, fleet.now)
    assert one.named(lost, fleet.now)


def test_a_ticket_of_an_unknown_name_makes_its_secret_known(fleet: Fleet) -> None:
    one = fleet.frontend()
    one.step()
    fleet.store.values.clear()
    other = fleet.frontend()
    other.step()
    lost = name(other, fleet.now)
    assert one.named(lost, fleet.now) is None
    assert one.step() == 0.0 or one.named(lost, fleet.now)
    one.step()
    assert one.named(lost, fleet.now)
    assert name(one, fleet.now) == lost  # the store's encrypts


def test_names_that_the_fleet_has_not_given_cost_no_call(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    before = fleet.store.calls
    for _ in range(1000):
        assert frontend.named(os.urandom(16), fleet.now) is None
    frontend.step()
    assert fleet.store.calls == before


def test_names_that_are_replayed_cost_a_call_a_second(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    current = frontend.current(fleet.now)
    assert current
    fleet.store.values.clear()
    frontend.revoke(lambda _: True)
    stale = TicketSecret(
        "shop", current[0].fleet_key, current[0].epoch._replace(start=0), current[0].secret, 0.0, NOON * 2
    ).name
    frontend.step()
    before = fleet.store.calls
    for _ in range(100):
        frontend.named(stale, fleet.now)
        frontend.step()
    assert fleet.store.calls == before + 1


def test_a_lost_secret_is_stored_again(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    before = name(frontend, fleet.now)
    fleet.store.values.clear()
    fleet.now += ROTATION * 0.9
    frontend.step()
    later = fleet.frontend()
    later.step()
    assert name(later, fleet.now) == name(frontend, fleet.now) == before


def test_a_secret_is_compared_with_the_stores_within_an_hour_although_the_next_is_agreed_on(fleet: Fleet) -> None:
    fleet.now += ROTATION * 5 / 6
    one = fleet.frontend(spread=1.0)
    one.step()
    fleet.store.values.clear()
    other = fleet.frontend()
    for _ in range(61):
        for frontend in (other, one):
            frontend.step()
        fleet.now += 60
    assert name(one, fleet.now) == name(other, fleet.now)


def test_a_secret_that_may_be_lost_is_stored_again_at_once(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    fleet.store.values.clear()
    frontend.recheck()
    assert frontend.step() > 0
    later = fleet.frontend()
    later.step()
    assert name(later, fleet.now) == name(frontend, fleet.now)


def test_with_a_single_use_a_lost_secret_gives_way_to_another(fleet: Fleet) -> None:
    frontend = fleet.frontend(restores=False)
    frontend.step()
    current = frontend.current(fleet.now)
    assert current
    lost, _ = current
    assert frontend.is_stored_as(lost, fleet.store.values[lost.address])
    fleet.store.values.clear()
    assert not frontend.is_stored_as(lost, None)
    frontend.step()
    assert name(frontend, fleet.now) != lost.name
    assert not frontend.is_stored_as(lost, fleet.store.values[lost.address])


def test_a_secret_that_was_removed_gives_way_to_another(fleet: Fleet) -> None:
    frontend, other = fleet.frontend(), fleet.frontend()
    for each in (frontend, other):
        each.step()
    current = frontend.current(fleet.now)
    assert current
    revoked = current[0]
    fleet.store.values.pop(revoked.address)
    fleet.store.removed.add(revoked.address)
    fleet.now += ROTATION * 0.9
    for each in (frontend, other):
        each.step()
    assert name(frontend, fleet.now) == name(other, fleet.now) != revoked.name
    assert frontend.named(revoked.name, fleet.now) is None


def test_revoked_secrets_are_replaced_by_those_of_the_store(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    before = name(frontend, fleet.now)
    frontend.revoke(lambda secret: secret.created < fleet.now)
    assert name(frontend, fleet.now) == before  # none is older
    frontend.revoke(lambda _: True)
    assert frontend.current(fleet.now) is None
    fleet.store.values.clear()  # the purge
    frontend.step()
    assert name(frontend, fleet.now) != before


def test_fleet_keys_are_rotated_without_a_loss(fleet: Fleet) -> None:
    old, new = os.urandom(32), os.urandom(32)
    before, between = fleet.frontend(old, new), fleet.frontend(new, old)
    for each in (before, between):
        each.step()
    issued = [name(before, fleet.now), name(between, fleet.now)]
    assert between.named(issued[0], fleet.now)
    assert before.named(issued[1], fleet.now) is None
    before.step()
    assert before.named(issued[1], fleet.now)


def test_without_the_key_that_seals_it_a_secret_is_dropped(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = list(resumed.Keyring.from_keys([os.urandom(32), os.urandom(32)]).fleet_keys)
    monkeypatch.setattr(resumed.Keyring, "fleet_keys", property(lambda _: tuple(keys)))
    frontend = fleet.frontend()
    frontend.step()
    before = name(frontend, fleet.now)
    del keys[0]
    frontend.step()
    assert frontend.named(before, fleet.now) is None
    assert name(frontend, fleet.now) != before


def test_a_rotation_or_keyring_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 604800 seconds"):
        TicketSecrets(Table(), resumed.Keyring.from_keys([bytes(32)]), rotation=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need a keyring"):
        TicketSecrets(Table(), resumed.Keyring.plaintext())  # type: ignore[arg-type]


def test_a_limit_of_the_store_is_an_outage_of_the_agreement_only(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = fleet.frontend()
    monkeypatch.setattr(fleet.store, "_result", lambda _: StoreError("RESOURCE_EXHAUSTED"))
    assert frontend.step() > 0
    assert frontend.current(fleet.now) is None


def test_secrets_show_in_no_text(fleet: Fleet) -> None:
    frontend = fleet.frontend()
    frontend.step()
    current = frontend.current(fleet.now)
    assert current
    secret = current[0]
    shown = f"{secret!r} {secret.secret!r} {secret.openssl!r} {secret.raw48!r} {secret.aead!r} {vars(secret)!r}"
    assert secret.secret.hex() not in shown
    assert str(bytes(secret.secret)) not in shown
    assert str(bytes(secret.openssl)[16:48]) not in shown
