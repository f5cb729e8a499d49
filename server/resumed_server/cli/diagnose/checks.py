"""Steps that find out what is wrong: each tried in turn, told in a table, with what helps where one fails.

`resumed check` and `resumed doctor` are made of them.
"""

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

# What gRPC's texts mean to an operator, and what helps; the first that matches. A text begins with the status code.
_MEANINGS = [
    (
        r"DNS|errors resolving|name resolution",
        "the name does not resolve",
        "check its spelling, and that the DNS of this machine knows it",
    ),
    (r"Connection refused", "nothing listens there", "start the store (`resumed serve`), or correct address and port"),
    (r"No such file", "there is no such socket", "start the store with --listen unix:PATH, or correct the path"),
    (r"Permission denied", "this user may not use the socket", "run this as the user that runs the store"),
    (r"unreachable|No route", "there is no way to that address", "check address, routes and firewall"),
    (
        r"^DEADLINE_EXCEEDED|[Tt]imed? ?out|FD Shutdown",
        "no answer in time",
        "check address and firewall, and that the store is not overloaded; --deadline gives it more time",
    ),
    (
        r"http2 header with status",
        "a web server or proxy answers, not the store",
        "correct the target; where http_proxy or grpc_proxy is set, add the store to no_proxy",
    ),
    (
        r"^(UNIMPLEMENTED|NOT_FOUND)",
        "a gRPC server answers, but it is no resumed store",
        "correct the port; `resumed serve` listens on 7400 unless told otherwise",
    ),
    (r"^UNAUTHENTICATED", "the store does not know this client", "use a certificate that the store trusts"),
    (
        r"^PERMISSION_DENIED",
        "this client may not use the namespace",
        "grant it on the store, or try one that is granted with --namespace",
    ),
    (r"^RESOURCE_EXHAUSTED", "the store is full, or overloaded", "give it more --capacity or --workers; see its log"),
    (r"^UNAVAILABLE.*storage", "the store's storage does not answer", "see the store's log"),
    (r"^UNAVAILABLE.*is stopping", "the server is just being stopped", "try again: another one takes its place"),
    (
        r"^UNAVAILABLE.*watchers",
        "the server has as many watchers as it takes",
        "give the store more --workers, or more servers",
    ),
    (r"^ABORTED", "the watcher did not keep up with the store", "try again; look for what slows this machine down"),
    (
        r"^(UNAVAILABLE|UNKNOWN|CANCELLED)",
        "what listens there does not speak gRPC without TLS, or is just being stopped",
        "correct the port; the target must be the store itself, or a proxy that passes HTTP/2 on",
    ),
]


@dataclass
class Step:
    """What became of one step.

    Attributes:
        name: What was tried.
        outcome: `ok`, `concern`, `failed`, or `not tried` because one before it failed.
        milliseconds: The time it took.
        note: What was found.
        advice: What to do, where it failed or is a concern.
    """

    name: str
    outcome: str = "not tried"
    milliseconds: float | None = None
    note: str = ""
    advice: str = ""


class Failure(Exception):
    """Something is not as it must be: what, and what to do."""


class Concern(Exception):
    """Something works, but not for long or not well: what, and what to do."""


def taken(actions: dict[str, Callable[[], str]], *, to_the_end: bool = False) -> list[Step]:
    """Take the steps in their order, until one fails or, where none needs another, `to_the_end`."""
    steps = [Step(name) for name in actions]
    for step in steps:
        started = time.perf_counter()
        try:
            step.note = actions[step.name]()
            step.outcome = "ok"
        except Concern as concern:
            step.outcome = "concern"
            step.note, step.advice = concern.args
        except (Failure, grpc.RpcError, resumed.ResumedError) as error:
            step.outcome = "failed"
            step.note, step.advice = explained(error)
        step.milliseconds = round(1000 * (time.perf_counter() - started), 2)
        if step.outcome == "failed" and not to_the_end:
            break
    return steps


def explained(error: Exception) -> tuple[str, str]:
    """Return what is wrong and what to do about it."""
    if isinstance(error, Failure):
        problem, advice = error.args
        return problem, advice
    if isinstance(error, resumed.KeyringError):
        problem, _, advice = str(error).partition("; ")
        return problem, advice or "copy the keyring from another frontend again, or make one with `resumed keygen`"
    text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else str(error)
    for pattern, meaning, advice in _MEANINGS:
        if re.search(pattern, text):
            return f"{meaning} ({text})", advice
    return text, "see the store's log"


def well(steps: Iterable[Step]) -> bool:
    """Return whether no step failed."""
    return all(step.outcome in {"ok", "concern"} for step in steps)


def show(title: str, steps: list[Step]) -> None:
    """Print a table of steps, and what to do."""
    styles = {"ok": "green", "concern": "yellow", "failed": "bold red", "not tried": "dim"}
    table = Table(title=title, title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("note", overflow="fold")
    for step in steps:
        took = "" if step.milliseconds is None else f"{step.milliseconds:.1f} ms"
        table.add_row(step.name, took, Text(step.outcome, styles[step.outcome]), Text(step.note))
    console = Console()
    console.print(table)
    for step in steps:
        if step.advice:
            console.print(Text(f"What to do: {step.advice}."), soft_wrap=True)
