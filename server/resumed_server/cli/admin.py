"""`resumed purge` and `resumed stats`: the calls of operators to a running store."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resumed import Admin, CredentialsError, StoreError
from resumed_server.cli.diagnosis import explain
from resumed_server.cli.options import AsJson, Deadline, Target
from resumed_server.cli.tls_options import TlsOptions, takes_tls
from resumed_server.config.patterns import is_namespace, is_namespace_pattern, matches
from resumed_server.config.types import Duration
from resumed_server.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed import NamespaceStats


@takes_tls
def purge(
    target: Target,
    namespaces: Annotated[
        list[str],
        typer.Argument(
            metavar="NAMESPACE...",
            help='Namespaces to purge. A * at the end matches any rest: "shop.*", or "*" for all that have sessions.',
        ),
    ],
    *,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Keep the sessions issued since then: a time such as 2026-11-25T10:00:00Z, or a duration such as 2h.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Purge without confirmation.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Purge namespaces that have no sessions, too.")] = False,
    as_json: AsJson = False,
    tls: TlsOptions,
    deadline: Deadline = 60.0,
) -> None:
    """End all sessions of a namespace, or those issued before a time: no frontend resumes any of them again.

    Requires the grants "purge" and, to count the sessions, "stats"; for a pattern "stats" of all namespaces ("*").
    Use it after client certificates were revoked, or after keys or frontends were stolen (SECURITY.md). A namespace
    without sessions is rejected, since its name may be misspelt, and then nothing is purged.

    After another exit status than 0 or 2, run it again: some namespaces may be purged in part.
    """
    _verify_namespaces(namespaces, is_namespace_pattern)
    issued_before = None if before is None else _parse_time(before)
    with _connect(target, tls, deadline) as admin:
        plan = _plan(admin, namespaces, tls, force=force)
        if not yes:
            _confirm(plan, issued_before)
        rows = [_purge(admin, namespace, sessions, issued_before, tls) for namespace, sessions in plan.items()]
    if as_json:
        Console(soft_wrap=True).print_json(data=[row._asdict() for row in rows])
    else:
        _show_purges(rows)
    if status := min((row.status for row in rows if row.status), default=ExitStatus.DONE):
        raise typer.Exit(status)


@takes_tls
def stats(
    target: Target,
    namespaces: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAMESPACE...]",
            help='Namespaces to count. Default: all, which requires a grant for the namespaces "*".',
        ),
    ] = None,
    *,
    as_json: AsJson = False,
    tls: TlsOptions,
    deadline: Deadline = 60.0,
) -> None:
    """Count the sessions of each namespace in a running store. This takes seconds for millions of sessions.

    Requires the grant "stats".
    """
    _verify_namespaces(namespaces or (), is_namespace)
    found: dict[str, NamespaceStats] = {}
    with _connect(target, tls, deadline) as admin:
        try:
            for namespace in namespaces or (None,):
                found |= admin.stats(namespace)
        except StoreError as error:
            raise _failed("the sessions were not counted", error, target, tls) from None
    if as_json:
        report = {
            name: each._asdict() | {"issued_before": each.issued_before and _format_time(each.issued_before)}
            for name, each in found.items()
        }
        Console(soft_wrap=True).print_json(data=report)
        return
    table = Table()
    table.add_column("namespace", overflow="fold")
    for column in ("sessions", "bytes", "tombstones", "to delete"):
        table.add_column(column, justify="right")
    table.add_column("purged before")
    for name, each in found.items():
        numbers = (each.sessions, each.value_bytes, each.tombstones, each.purged)
        purged = _format_time(each.issued_before) if each.issued_before else ""
        table.add_row(name, *(f"{number:,}" for number in numbers), purged)
    Console().print(table)


class _Purge(NamedTuple):
    """The result of the purge of one namespace.

    Attributes:
        namespace: Its name.
        sessions: Number of its sessions before; None if no grant permits counting.
        issued_before: Time up to which it is purged; None after an error.
        problem: Why it is not purged, or only in part; empty after success.
        remedy: The remedy.
        status: The exit status that this causes.
    """

    namespace: str
    sessions: int | None
    issued_before: str | None
    problem: str = ""
    remedy: str = ""
    status: ExitStatus = ExitStatus.DONE


def _verify_namespaces(namespaces: Sequence[str], is_valid: Callable[[str], object]) -> None:
    """Check the names or patterns of the command line.

    Raises:
        UserError: One is invalid.
    """
    if wrong := [name for name in namespaces if not is_valid(name)]:
        raise UserError("\n".join(f"NAMESPACE: {name!r} is not 1 to 63 characters of [a-z0-9.-]" for name in wrong))


def _connect(target: str, tls: TlsOptions, deadline: float) -> Admin:
    """Return the operators' client of a store.

    Raises:
        UserError: The target is malformed, or a file of the credentials cannot be used.
    """
    try:
        return Admin(target, deadline=deadline, credentials=tls.credentials())
    except (ValueError, CredentialsError) as error:
        raise UserError(str(error)) from None


def _plan(admin: Admin, patterns: Sequence[str], tls: TlsOptions, *, force: bool) -> dict[str, int | None]:
    """Return the namespaces to purge, with their numbers of sessions; None where no grant permits counting.

    Raises:
        UserError: The sessions cannot be counted, or a namespace has none.
    """
    plan: dict[str, int | None] = {}
    empty = []
    for pattern in patterns:
        found = _count(admin, pattern, tls)
        plan |= found
        if not any(sessions is None or sessions for sessions in found.values()):
            empty.append(pattern)
    if not plan or (empty and not force):
        names = ", ".join(empty)
        raise UserError(
            f"nothing was purged: {names}: no such sessions; correct the name (`resumed stats` lists the namespaces), "
            "or give --force to purge a namespace without sessions",
        )
    return plan


def _count(admin: Admin, pattern: str, tls: TlsOptions) -> dict[str, int | None]:
    """Return the number of sessions in each namespace that matches; without a grant, None for a full name."""
    exact = not pattern.endswith("*")
    try:
        found = admin.stats(pattern if exact else None)
    except StoreError as error:
        if exact and error.code == "PERMISSION_DENIED":
            return {pattern: None}
        raise _failed("nothing was purged, since the sessions cannot be counted", error, admin.target, tls) from None
    return {name: each.sessions for name, each in found.items() if exact or (each.sessions and matches(pattern, name))}


def _confirm(plan: dict[str, int | None], issued_before: float | None) -> None:
    """Ask the user for confirmation."""
    if not sys.stdin.isatty():
        raise UserError("nothing was purged: give --yes, since standard input is not a terminal")
    which = "all sessions" if issued_before is None else f"all sessions issued before {_format_time(issued_before)}"
    what = ", ".join(f"{name} ({_format_count(sessions)})" for name, sessions in plan.items())
    typer.confirm(f"Purge {which} of {what}? Their clients make full handshakes then.", abort=True)


def _purge(admin: Admin, namespace: str, sessions: int | None, issued_before: float | None, tls: TlsOptions) -> _Purge:
    try:
        return _Purge(namespace, sessions, _format_time(admin.purge(namespace, issued_before)))
    except StoreError as error:
        return _Purge(namespace, sessions, None, *explain(error, admin.target, tls))


def _show_purges(rows: Sequence[_Purge]) -> None:
    out, err = (Console(soft_wrap=True, stderr=stderr) for stderr in (False, True))
    for row in rows:
        if row.problem:
            text = f"resumed: {row.namespace} is not purged, or only in part: {row.problem}; {row.remedy}"
            err.print(Text(text))
        else:
            before = f"no session issued before {row.issued_before} resumes any more"
            out.print(Text(f"{row.namespace}: {before} ({_format_count(row.sessions)} before the purge)"))
    if not any(row.problem for row in rows):
        delay = f"within {Admin.PURGE_SECONDS:.0f} s on frontends with one"
        out.print(Text(f"Effective at once on frontends without a mirror, {delay}."))


def _format_count(sessions: int | None) -> str:
    return "an unknown number of sessions" if sessions is None else f"{sessions:,} sessions"


def _failed(consequence: str, error: StoreError, target: str, tls: TlsOptions) -> UserError:
    """Return the error of a command whose call failed."""
    problem, remedy, status = explain(error, target, tls)
    return UserError(f"{consequence}: {problem}; {remedy}", status)


def _parse_time(text: str) -> float:
    """Return Unix seconds, from a time with a zone or from a duration before now."""
    with contextlib.suppress(ValueError):
        return time.time() - Duration.parse(text)
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(text.removesuffix("Z") + "+00:00" * text.endswith("Z"))
        if moment.tzinfo is not None:
            return moment.timestamp()
    raise UserError(
        f"--before: {text!r} is neither a duration, such as 90s or 2h, nor a time such as 2026-11-25T10:00:00Z"
    )


def _format_time(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
