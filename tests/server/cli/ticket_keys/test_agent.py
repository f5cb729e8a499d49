from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from resumed_server.cli.ticket_keys.agent import RETRY_SECONDS, Agent
from resumed_server.cli.ticket_keys.key_set import KeySchedule, KeySet, create_temporary
from resumed_server.cli.ticket_keys.outputs import Output, OutputError
from support.clock import Clock
from support.ticket_secrets import LIFETIME, ROTATION, Secrets, secret_of

LEAD = 10.0
SECRETS = [secret_of(number) for number in range(6)]


class Recorded(Output):
    """An output that records the keys, and fails while it has a problem."""

    name = "recorded"

    def __init__(self, *, keys: bool = False, needs_reload: bool = True) -> None:
        self.published: list[KeySet] = []
        self.problem = ""
        self.needs_reload, self._keys = needs_reload, keys

    def publish(self, keys: KeySet) -> None:
        if self.problem:
            raise OutputError(self.problem)
        self.published.append(keys)

    def has_keys(self) -> bool:
        return self._keys or bool(self.published)


class Reload:
    """A reload command that fails while it has a problem."""

    def __init__(self) -> None:
        self.runs, self.problem = 0, ""

    def run(self) -> None:
        self.runs += 1
        if self.problem:
            raise OutputError(self.problem)


class Rig:
    """An agent with one output, at the time 150."""

    def __init__(self, *, keys: bool = False, needs_reload: bool = True, secrets: int = 2) -> None:
        self.clock, self.secrets = Clock(150.0), Secrets(SECRETS[:secrets])
        self.output, self.reload = Recorded(keys=keys, needs_reload=needs_reload), Reload()
        self.agent = Agent(
            self.secrets,  # type: ignore[arg-type]
            KeySchedule(LEAD),
            [self.output],
            create_temporary=lambda now: create_temporary("shop", now, ROTATION, LIFETIME),
            reload=self.reload,  # type: ignore[arg-type]
            clock=self.clock,
        )

    def step_at(self, now: float) -> float:
        self.clock.now = now
        return self.agent.step()


def test_keys_are_published_and_reloaded_once_for_each_change() -> None:
    rig = Rig()
    rig.step_at(150)
    rig.step_at(160)
    assert [keys.encrypting for keys in rig.output.published] == [SECRETS[1]]
    assert rig.reload.runs == 1
    rig.secrets.epochs.append(SECRETS[2])
    rig.step_at(170)
    assert [keys.encrypting for keys in rig.output.published] == [SECRETS[1], SECRETS[1]]
    assert rig.reload.runs == 2
    rig.step_at(200)
    assert len(rig.output.published) == 2, "the lead of the next key is not over"
    rig.step_at(210)
    assert rig.output.published[-1].encrypting == SECRETS[2]
    assert rig.reload.runs == 3


def test_a_key_of_an_ended_epoch_is_removed_without_news_of_the_store() -> None:
    rig = Rig(secrets=3)
    rig.step_at(250)
    assert SECRETS[0] in rig.output.published[-1].all
    rig.step_at(SECRETS[0].not_after)
    assert SECRETS[0] not in rig.output.published[-1].all


def test_a_step_is_due_when_a_lead_ends() -> None:
    rig = Rig(secrets=3)
    rig.step_at(150)
    assert rig.step_at(209) == pytest.approx(1.0)


def test_an_output_that_fails_gets_the_present_keys_when_it_works_again() -> None:
    rig = Rig()
    rig.output.problem = "the disk is full"
    with capture_logs() as logs:
        rig.step_at(150)
        rig.step_at(150 + RETRY_SECONDS)
        rig.output.problem = ""
        rig.step_at(150 + 1.5 * RETRY_SECONDS)
        assert not rig.output.published, "the pause is not over"
        rig.step_at(150 + 2 * RETRY_SECONDS)
    assert [keys.encrypting for keys in rig.output.published] == [SECRETS[1]]
    assert rig.agent.status.outputs[0].failed == 2
    events = [line["event"] for line in logs if line.get("output") == "recorded"]
    assert events == ["failed, trying again", "succeeded again", "published"]


def test_a_reload_that_fails_is_repeated_until_it_succeeds() -> None:
    rig = Rig()
    rig.reload.problem = "a syntax error"
    rig.step_at(150)
    rig.step_at(150 + RETRY_SECONDS)
    rig.reload.problem = ""
    rig.step_at(150 + 2 * RETRY_SECONDS)
    rig.step_at(150 + 3 * RETRY_SECONDS)
    assert rig.reload.runs == 3
    reloads = rig.agent.status.reloads
    assert reloads
    assert (reloads.failed, reloads.succeeded) == (2, 1)


def test_an_output_that_needs_no_reload_causes_none() -> None:
    rig = Rig(needs_reload=False)
    rig.step_at(150)
    assert rig.output.published
    assert rig.reload.runs == 0


def test_in_an_outage_the_keys_stay_and_the_epochs_count() -> None:
    rig = Rig()
    rig.step_at(150)
    rig.step_at(210)
    rig.step_at(220)
    assert len(rig.output.published) == 1
    assert rig.agent.status.held_over
    assert rig.agent.status.held_over_epochs == 1
    rig.secrets.epochs.append(SECRETS[2])
    rig.step_at(230)
    rig.step_at(240)
    assert not rig.agent.status.held_over
    assert rig.output.published[-1].encrypting == SECRETS[2]


def test_servers_start_with_a_temporary_key_while_the_store_does_not_answer() -> None:
    rig = Rig(secrets=0)
    rig.step_at(150)
    rig.step_at(160)
    (keys,) = rig.output.published
    assert keys.temporary
    assert rig.agent.ready
    rig.secrets.epochs = SECRETS[:2]
    rig.step_at(170)
    assert rig.output.published[-1].all == (SECRETS[1], SECRETS[0])


def test_a_temporary_key_does_not_replace_those_of_an_earlier_agent() -> None:
    rig = Rig(secrets=0, keys=True)
    rig.step_at(150)
    assert not rig.output.published
    assert rig.agent.ready


def test_when_all_keys_have_ended_in_an_outage_a_temporary_one_replaces_them() -> None:
    rig = Rig()
    rig.step_at(150)
    rig.step_at(SECRETS[1].not_after)
    assert rig.output.published[-1].temporary


def test_an_agent_whose_output_has_no_keys_is_not_ready() -> None:
    rig = Rig()
    assert not rig.agent.ready
    rig.output.problem = "no"
    rig.step_at(150)
    assert not rig.agent.ready


def test_no_log_line_has_a_key() -> None:
    rig = Rig(secrets=0)
    with capture_logs() as logs:
        rig.step_at(150)
        rig.secrets.epochs = SECRETS[:3]
        rig.step_at(160)
        rig.step_at(210)
    text = repr(logs)
    assert SECRETS[1].name.hex() in text
    for key in SECRETS[:3]:
        assert key.openssl[16:48].hex() not in text
        assert repr(bytes(key.openssl[16:48])) not in text
