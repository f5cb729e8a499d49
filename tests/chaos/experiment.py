"""One fault from beginning to end: traffic, the fault, its end, and resumption back again."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from chaos.rig import Place
from chaos.traffic import WINDOW, Traffic

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from chaos.rig import Rig

BEFORE = 2.0
"""Default time of traffic before the fault, and at least after it, in seconds."""
PATIENCE = 20.0
"""Maximum time, in seconds, until sessions resume at first, and until they resume again."""
STALLED = 1.0
"""Seconds by which a handshake may exceed the frontends' deadline on a busy machine."""

NOTHING = "nothing"
ALL = "all sessions"
ENDED = "all sessions that the step carries past their end"
REFUSED = "sessions negotiated during the fault"
"""The possible losses of a fault."""
CLOCK_STEP = 10_800
"""Seconds by which clocks are wrong; more than the lifetime of a session."""


class Scene(NamedTuple):
    """The processes of a scenario, and how to begin and end its fault."""

    rig: Rig
    begin: Callable[[], object]
    """Begins the fault."""
    end: Callable[[], object] | None
    """Ends the fault; None if the fault is an instant, and the recovery is up to the product."""


Scenario: TypeAlias = "Callable[[Place], contextlib.AbstractContextManager[Scene]]"


@dataclass(frozen=True)
class Fault:
    """A fault and its name.

    Attributes:
        scenario: Sets the fault up.
        loses: The possible losses beside the resumptions during the fault.
        hindrance: Returns the reason if the fault cannot be set up on this machine.
        forgets_tickets: Whether the store may forget the removal or the use of a ticket while it keeps the ticket's
            secret: it evicts values, or its clock is set back and forward again.
    """

    name: str
    scenario: Scenario
    loses: str
    hindrance: Callable[[], str | None] = lambda: None
    forgets_tickets: bool = False


@dataclass(frozen=True)
class Outcome:
    """The measurements of one fault.

    Attributes:
        fault: The fault.
        deadline: The deadline of the frontends in seconds.
        tickets: Whether the clients kept the sessions, in tickets.
        traffic: All handshakes, failed ones and wrong resumptions.
        rates: The shares of offered sessions that resumed before, during and after the fault.
        slowest: The seconds of the slowest handshake before the fault, and since its beginning.
        kept: The share of the sessions stored before the fault that resumed after it.
        back: Seconds from the end of the fault until sessions resumed again, None if they did not.
        health: The health of the server during the fault.
        server_log: The kinds of log lines of the server during the fault and after, in order.
        frontend_log: The same of the frontends.
    """

    fault: Fault
    deadline: float
    tickets: bool
    traffic: Traffic
    rates: tuple[float | None, float | None, float | None]
    slowest: tuple[float, float]
    kept: float
    back: float | None
    health: str
    server_log: list[str]
    frontend_log: list[str]

    @property
    def broken(self) -> list[str]:
        """The promises that were broken."""
        traffic = self.traffic
        wrong = [] if self.tickets and self.fault.forgets_tickets else traffic.wrong
        promises = {
            f"{len(traffic.failures)} handshakes failed: {traffic.failures[:3]}": not traffic.failures,
            f"{len(wrong)} resumptions too many: {wrong[:3]}": not wrong,
            f"a handshake took {self.slowest[1]:.2f} s": self.slowest[1] < self.deadline + STALLED,
            "resumption did not come back": self.back is not None,
            "nothing was removed or taken": bool(traffic.spent),
        }
        return [f"{self.fault.name}: {broken}" for broken, kept in promises.items() if not kept]


def run(
    fault: Fault,
    seconds: float,
    deadline: float,
    tell: Callable[[str], object] = lambda _: None,
    *,
    tickets: bool = False,
    around: float = BEFORE,
) -> Outcome:
    """Run traffic through a fault of `seconds`, wait until sessions resume again, and return the measurements.

    The traffic lasts `around` seconds before the fault, and at least as long after it.
    """
    with tempfile.TemporaryDirectory(prefix="resumed-fault-") as directory:
        tell("starting")
        with fault.scenario(Place(Path(directory), deadline, tickets)) as (rig, begin, end), Traffic(rig) as traffic:
            tell("before")
            started = time.monotonic()
            warm = _await_resumption(traffic, started)
            traffic.save()
            time.sleep(around)
            lines = len(rig.server_log())
            tell("during")
            began = time.monotonic()
            begin()
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            health = rig.health()
            ended = time.monotonic()
            tell("after")
            if end:
                end()
            since = ended if end else began
            back = _await_resumption(traffic, since)
            time.sleep(2 * around if tickets else around)  # tickets resume before they may end with the store's loss
            back = traffic.back(since) if back is not None else None
            kept = traffic.kept()
            traffic.recheck()
            now = time.monotonic()
            return Outcome(
                fault,
                deadline,
                tickets,
                traffic,
                (
                    traffic.rate(started + (warm or 0), began),
                    traffic.rate(began, ended),
                    traffic.rate(since + (back or 0), now),
                ),
                (traffic.slowest(started, began), traffic.slowest(began, now)),
                kept,
                back,
                health,
                _kinds([_event(line) for line in rig.server_log()[lines:]]),
                _kinds(rig.frontend_log()),
            )


def _await_resumption(traffic: Traffic, since: float) -> float | None:
    end = time.monotonic() + PATIENCE
    while (back := traffic.back(since)) is None or time.monotonic() < since + back + WINDOW:
        if time.monotonic() > end:
            return None
        time.sleep(0.1)
    return back


def _event(line: dict[str, object]) -> str:
    return str(line.get("event") or line.get("text")) + (f" ({cause})" if (cause := line.get("cause")) else "")


def _kinds(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))
