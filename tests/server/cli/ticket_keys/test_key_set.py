from __future__ import annotations

from resumed_server.cli.ticket_keys.key_set import KeySchedule, KeySet, create_temporary
from support.ticket_secrets import LIFETIME, ROTATION, secret_of

LEAD = 10.0
SECRETS = [secret_of(number) for number in range(5)]


def choose(schedule: KeySchedule, now: float, last: int = 2) -> KeySet:
    """Choose among the secrets up to a number, as frontends agree on them, and record the choice."""
    held = [each for each in SECRETS[: last + 1] if now < each.not_after]
    current = [each for each in held if each.epoch.start <= now][-1]
    keys = schedule.choose(held, current, now)
    assert keys
    schedule.record(keys, now)
    return keys


def test_a_key_encrypts_when_the_lead_of_its_epoch_is_over() -> None:
    schedule = KeySchedule(LEAD)
    assert choose(schedule, 150, last=1).encrypting == SECRETS[1]
    assert choose(schedule, 160).encrypting == SECRETS[1], "the next one only opens"
    assert SECRETS[2] in choose(schedule, 160).openers
    assert choose(schedule, 200).encrypting == SECRETS[1]
    assert choose(schedule, 209.9).encrypting == SECRETS[1]
    assert choose(schedule, 210).encrypting == SECRETS[2]
    assert SECRETS[1] in choose(schedule, 210).openers


def test_a_key_that_came_late_opens_for_the_lead_before_it_encrypts() -> None:
    schedule = KeySchedule(LEAD)
    choose(schedule, 150, last=1)
    choose(schedule, 205, last=1)
    assert choose(schedule, 250).encrypting == SECRETS[1]
    assert choose(schedule, 259.9).encrypting == SECRETS[1]
    assert choose(schedule, 260).encrypting == SECRETS[2]


def test_an_agent_that_starts_encrypts_at_once_with_the_key_that_others_encrypt_with() -> None:
    assert choose(KeySchedule(LEAD), 250).encrypting == SECRETS[2]
    assert choose(KeySchedule(LEAD), 205).encrypting == SECRETS[1], "the others do not encrypt with the third key yet"


def test_a_key_whose_predecessors_were_revoked_encrypts_at_once() -> None:
    schedule = KeySchedule(LEAD)
    choose(schedule, 150, last=1)
    replaced = secret_of(1, generation=1)
    keys = schedule.choose([replaced], replaced, 160)
    assert keys
    assert keys.all == (replaced,)


def test_of_two_secrets_of_an_epoch_the_one_of_the_store_encrypts_after_the_lead_and_both_open() -> None:
    schedule = KeySchedule(LEAD)
    choose(schedule, 150, last=1)
    other = secret_of(1, seed=9)
    for now, encrypting in ((160.0, SECRETS[1]), (170.0, other)):
        keys = schedule.choose([SECRETS[1], other], other, now)
        assert keys
        schedule.record(keys, now)
        assert keys.encrypting == encrypting
        assert set(keys.all) == {SECRETS[1], other}


def test_without_a_secret_there_are_no_keys() -> None:
    assert KeySchedule(LEAD).choose([], None, 0.0) is None


def test_the_next_change_is_the_end_of_a_lead_or_of_a_key() -> None:
    schedule = KeySchedule(LEAD)
    assert schedule.next_change(choose(schedule, 150), 150) == 60.0
    keys = choose(schedule, 215)
    assert schedule.next_change(keys, 215) == SECRETS[0].not_after - 215.0


def test_previous_and_next_are_the_neighbours_of_the_encrypting_key() -> None:
    keys = KeySet(SECRETS[2], (SECRETS[4], SECRETS[3], SECRETS[1], SECRETS[0]))
    assert (keys.previous, keys.next) == (SECRETS[1], SECRETS[3])
    alone = KeySet(SECRETS[2])
    assert (alone.previous, alone.next) == (SECRETS[2], SECRETS[2])


def test_a_temporary_key_is_another_one_each_time() -> None:
    one, other = (create_temporary("shop", 150.0, ROTATION, LIFETIME) for _ in range(2))
    assert one.temporary
    assert one.encrypting.openssl != other.encrypting.openssl
