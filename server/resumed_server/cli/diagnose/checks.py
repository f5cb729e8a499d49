"""Checks, with a table of their results and a remedy for each failure; for `resumed check` and `resumed doctor`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

import resumed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# A pattern of gRPC's errors, its meaning and the remedy; the first match counts. An error begins with the status code.
_MEANINGS = [
    (
        r"DNS|errors resolving|name resolution",
        "the name does not resolve",
        "check the spelling, and the DNS configuration of this machine",
    ),
    (
        r"Connection refused",
        "no process listens there",
        "start the store (`resumed serve`), or correct the address",
    ),
    (r"No such file", "there is no such socket", "start the store with --listen unix:PATH, or correct the path"),
    (r"Permission denied", "this user may not use the socket", "run this as the user that runs the store"),
    (r"unreachable|No route", "the address is unreachable", "check address, routes and firewall"),
    (
        r"^DEADLINE_EXCEEDED|[Tt]imed? ?out|FD Shutdown",
        "no answer in time",
        "check address and firewall, and that the store is not overloaded; --deadline gives it more time",
    ),
    (
        r"http2 header with status",
        "a web server or proxy responds, not the store",
        "correct the target; where http_proxy or grpc_proxy is set, add the store to no_proxy",
    ),
    (
        r"^(UNIMPLEMENTED|NOT_FOUND)",
        "a gRPC server responds, but it is not a resumed store",
        "correct the port; `resumed serve` listens on 7400 by default",
    ),
    (r"^UNAUTHENTICATED", "the store does not accept this client", "use a certificate that the store trusts"),
    (
        r"^PERMISSION_DENIED",
        "this client may not use the namespace",
        "grant it on the store, or give a namespace with a grant as --namespace",
    ),
    (r"^RESOURCE_EXHAUSTED", "the store is full, or overloaded", "give it more --capacity or --workers; see its log"),
    (r"^UNAVAILABLE.*storage", "the storage of the store is unavailable", "see the store's log"),
    (r"^UNAVAILABLE.*is stopping", "the server is shutting down", "try again: another one takes over"),
    (
        r"^UNAVAILABLE.*watchers",
        "the server has reached its limit of watchers",
        "give the store more --workers, or more servers",
    ),
    (
        r"^ABORTED",
        "the watcher did not keep up with the store",
        "try again; reduce the load on this machine",
    ),
    (
        r"^(UNAVAILABLE|UNKNOWN|CANCELLED)",
        "the process that listens there does not accept gRPC without TLS, or is shutting down",
        "correct the port; the target must be the store itself, or a proxy that forwards HTTP/2",
    ),
]


@dataclass
class Check:
    """The result of one check.

    Attributes:
        name: Its name.
        outcome: `ok`, `warning`, `failed`, or `not tried` because an earlier check failed.
        milliseconds: Its duration.
        note: Its result, or the problem.
        advice: The remedy, after a failure or a warning.
    """

    name: str
    outcome: str = "not tried"
    milliseconds: float | None = None
    note: str = ""
    advice: str = ""


class Failure(Exception):
    """A check failed; the arguments are the problem and the remedy."""


class Warned(Exception):
    """A check succeeded, but not for long or not well; the arguments are the problem and the remedy."""


def run_checks(actions: dict[str, Callable[[], str]], *, to_the_end: bool = False) -> list[Check]:
    """Run the checks in their order, until one fails or, if they are independent, `to_the_end`."""
    checks = [Check(name) for name in actions]
    for check in checks:
        started = time.perf_counter()
        try:
            check.note = actions[check.name]()
            check.outcome = "ok"
        except Warned as warning:
            check.outcome = "warning"
            check.note, check.advice = warning.args
        except (Failure, grpc.RpcError, resumed.ResumedError) as error:
            check.outcome = "failed"
            check.note, check.advice = explained(error)
        check.milliseconds = round(1000 * (time.perf_counter() - started), 2)
        if check.outcome == "failed" and not to_the_end:
            break
    return checks


def explained(error: Exception) -> tuple[str, str]:
    """Return the problem and the remedy."""
    if isinstance(error, Failure):
        problem, advice = error.args
        return problem, advice
    if isinstance(error, resumed.KeyringError):
        problem, _, advice = str(error).partition("; ")
        return problem, advice or "copy the keyring from another frontend again, or create one with `resumed keygen`"
    text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else str(error)
    for pattern, meaning, advice in _MEANINGS:
        if re.search(pattern, text):
            return f"{meaning} ({text})", advice
    return text, "see the store's log"


def all_passed(checks: Iterable[Check]) -> bool:
    """Return whether no check failed."""
    return all(check.outcome in {"ok", "warning"} for check in checks)


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
