"""Checks, with a table of their results and a remedy for each failure; for `resumed check` and `resumed doctor`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

import resumed
from resumed_server.cli.diagnosis import Explanation, Failure
from resumed_server.errors import ExitStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass
class Check:
    """The result of one check.

    Attributes:
        name: Its name.
        outcome: `ok`, `warning`, `failed`, or `not tried` because an earlier check failed.
        milliseconds: Its duration.
        note: Its result, or the problem.
        advice: The remedy, after a failure or a warning.
        status: The exit status that the check causes.
    """

    name: str
    outcome: str = "not tried"
    milliseconds: float | None = None
    note: str = ""
    advice: str = ""
    status: ExitStatus = ExitStatus.DONE


class CheckWarning(Exception):
    """A check succeeded, but not for long or not well; the arguments are the problem and the remedy."""


def run_checks(
    actions: dict[str, Callable[[], str]],
    explain: Callable[[Exception], Explanation],
    *,
    to_the_end: bool = False,
) -> list[Check]:
    """Run the checks in their order, until one fails or, if they are independent, `to_the_end`."""
    checks = [Check(name) for name in actions]
    for check in checks:
        started = time.perf_counter()
        failure: Exception | None = None
        try:
            check.note = actions[check.name]()
            check.outcome = "ok"
        except CheckWarning as warning:
            check.outcome = "warning"
            check.note, check.advice = warning.args
        except (Failure, grpc.RpcError, resumed.ResumedError) as error:
            failure = error
        check.milliseconds = round(1000 * (time.perf_counter() - started), 2)  # without the diagnosis
        if failure:
            check.outcome = "failed"
            check.note, check.advice, check.status = explain(failure)
            if not to_the_end:
                break
    return checks


def exit_status(checks: Iterable[Check]) -> ExitStatus:
    """Return the exit status of checks: the least of those that failed, since it is the most serious."""
    return min((check.status for check in checks if check.status), default=ExitStatus.DONE)


def show(title: str, checks: list[Check]) -> None:
    """Print a table of the checks, and the remedies."""
    styles = {"ok": "green", "warning": "yellow", "failed": "bold red", "not tried": "dim"}
    table = Table(title=title, title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("note", overflow="fold")
    for check in checks:
        took = "" if check.milliseconds is None else f"{check.milliseconds:.1f} ms"
        table.add_row(check.name, took, Text(check.outcome, styles[check.outcome]), Text(check.note))
    console = Console()
    console.print(table)
    for check in checks:
        if check.advice:
            console.print(Text(f"What to do: {check.advice}."), soft_wrap=True)
