"""The agent: follows the secrets of a fleet, and publishes the keys that derive from them.

Each step brings every output up to date, so that an output which failed gets the present keys once it works again.
While the store does not answer, the keys stay.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from resumed_server.cli.ticket_keys.outputs import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed._crypto.ticket_secret import TicketSecret
    from resumed._policy.ticket_secrets import TicketSecrets
    from resumed_server.cli.ticket_keys.key_set import KeySchedule, KeySet
    from resumed_server.cli.ticket_keys.outputs import Output
    from resumed_server.cli.ticket_keys.reload import ReloadCommand

RETRY_SECONDS = 5.0
"""Seconds from a failure of an output or of the reload command to the next attempt."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Bounds of the seconds between two steps. A revocation waits for the next step, and liveness needs steps."""

log = structlog.get_logger()


@dataclass
class Attempts:
    """The attempts at one thing: publications at an output, or reloads.

    Attributes:
        name: Its name.
        succeeded: Number of attempts that succeeded.
        failed: Number of attempts that failed.
        last: Time of the last success in Unix seconds, 0 before the first.
        problem: Why the last attempt failed; empty after a success.
    """

    name: str
    succeeded: int = 0
    failed: int = 0
    last: float = 0.0
    problem: str = ""
    retry_at: float = 0.0

    def run(self, attempt: Callable[[], object], now: float) -> bool:
        """Make an attempt, and return whether it succeeded. Of failures in a row that are alike, only one is logged."""
        try:
            attempt()
        except (OSError, OutputError) as error:
            self.failed += 1
            self.retry_at = now + RETRY_SECONDS
            problem = f"{error.filename or ''} {error.strerror}".strip() if isinstance(error, OSError) else str(error)
            if problem != self.problem:
                log.warning("failed, trying again", output=self.name, cause=problem, seconds=RETRY_SECONDS)
            self.problem = problem
            return False
        self.succeeded, self.last, self.retry_at = self.succeeded + 1, now, 0.0
        if self.problem:
            log.info("succeeded again", output=self.name)
        self.problem = ""
        return True


@dataclass
class _Target:
    output: Output
    attempts: Attempts
    names: tuple[str, ...] = ()
    """The keys that are published there."""


@dataclass
class Status:
    """The state of an agent, for metrics and health."""

    keys: KeySet | None = None
    held_over: bool = False
    """Whether the key that encrypts is of an ended epoch, since the store did not answer."""
    held_over_epochs: int = 0
    """Number of epochs that ended without the secret of the next one."""
    outputs: list[Attempts] = field(default_factory=list)
    reloads: Attempts | None = None


class Agent:
    """Brings outputs up to date.

    Args:
        secrets: The secrets of the fleet.
        schedule: Chooses the key that encrypts.
        outputs: Where to publish keys.
        create_temporary: Returns a key set for servers to start with while the fleet has no secret.
        reload: Runs after a change of an output that needs it; None for none.
        clock: The time in Unix seconds.

    Attributes:
        status: The state after the last step.
    """

    def __init__(
        self,
        secrets: TicketSecrets,
        schedule: KeySchedule,
        outputs: Sequence[Output],
        *,
        create_temporary: Callable[[float], KeySet],
        reload: ReloadCommand | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._secrets, self._schedule, self._create_temporary = secrets, schedule, create_temporary
        self._reload, self._clock = reload, clock
        self._targets = [_Target(output, Attempts(output.name)) for output in outputs]
        self._reload_due = False
        self._temporary: KeySet | None = None
        self._had_keys = False
        self._held_over: bytes | None = None
        self.status = Status(
            outputs=[target.attempts for target in self._targets], reloads=Attempts("reload") if reload else None
        )

    @property
    def ready(self) -> bool:
        """Whether every output has keys, so that servers can start."""
        return all(target.names or target.output.has_keys() for target in self._targets)

    def step(self) -> float:
        """Bring all outputs up to date, and return the seconds until the next step."""
        pause = self._secrets.step()
        now = self._clock()
        current, held_over = self._secrets.current(now) or (None, False)
        keys = self._choose(current, now)
        self._report(keys, current, held_over=held_over)
        for target in self._targets:
            self._publish(target, keys, now)
        self._run_reload(now)
        now = self._clock()  # the command may have taken a while
        if not keys.temporary:
            self._schedule.record(keys, now)
            pause = min(pause, self._schedule.next_change(keys, now))
        retries = [
            each.retry_at - now for each in (*self.status.outputs, self.status.reloads) if each and each.retry_at
        ]
        return max(_SHORTEST_PAUSE, min([pause, *retries, _LONGEST_PAUSE]))

    def _choose(self, current: TicketSecret | None, now: float) -> KeySet:
        keys = self._schedule.choose(self._secrets.held(now), current, now)
        if keys:
            self._temporary, self._had_keys = None, True
            return keys
        self._temporary = self._temporary or self._create_temporary(now)
        return self._temporary

    def _publish(self, target: _Target, keys: KeySet, now: float) -> None:
        if keys.names == target.names or now < target.attempts.retry_at:
            return
        if keys.temporary and not self._had_keys and target.output.has_keys():
            return  # an earlier agent's, which the fleet may still use
        if target.attempts.run(lambda: target.output.publish(keys), now):
            log.info("published", output=target.output.name, encrypts=keys.names[0], opens=list(keys.names[1:]))
            target.names = keys.names
            self._reload_due |= target.output.needs_reload

    def _run_reload(self, now: float) -> None:
        attempts = self.status.reloads
        if self._reload and attempts and self._reload_due and now >= attempts.retry_at:
            self._reload_due = not attempts.run(self._reload.run, now)
            if not self._reload_due:
                log.info("reloaded")

    def _report(self, keys: KeySet, current: TicketSecret | None, *, held_over: bool) -> None:
        status, before = self.status, self.status.keys
        if before is None or keys.names != before.names:
            ended = sorted(set(before.names) - set(keys.names)) if before else []
            if keys.temporary:
                log.warning("the fleet has no secret, since the store does not answer: serving with a temporary key")
            else:
                log.info("keys", encrypts=keys.names[0], opens=list(keys.names[1:]), removed=ended)
        status.held_over = held_over
        if current and held_over and self._held_over != current.name:
            self._held_over = current.name
            status.held_over_epochs += 1
            log.warning(
                "the store does not answer, the key of an ended epoch stays in use", encrypts=current.name.hex()
            )
        status.keys = keys
