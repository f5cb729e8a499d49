"""`resumed purge` and `resumed stats`: the calls of operators to a running store."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resumed import Admin, CredentialsError, InvalidRequest, StoreError, StoreUnavailable
from resumed_server.cli.options import AsJson, Deadline, Target
from resumed_server.cli.tls_options import TlsOptions, takes_tls
from resumed_server.config.types import Duration
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed import NamespaceStats


@takes_tls
def purge(
    target: Target,
    namespaces: Annotated[list[str], typer.Argument(metavar="NAMESPACE...", help="Namespaces to purge.")],
    *,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Keep the sessions issued since then: a time such as 2026-11-25T10:00:00Z, or a duration such as 2h.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Purge without confirmation.")] = False,
    tls: TlsOptions,
    deadline: Deadline = 60.0,
) -> None:
    """End all sessions of a namespace, or those issued before a time: no frontend resumes any of them again.

    Requires the grant "purge". Use it after client certificates were revoked, or after keys or frontends were stolen
    (SECURITY.md).

    Exit status 1 if a namespace is not purged completely; run it again then.
    """
    issued_before = None if before is None else _parse_time(before)
    console = Console(soft_wrap=True)
    with _connected(target, tls, deadline) as admin:
        if not yes:
            _confirm(admin, namespaces, issued_before)
        failed = False
        for namespace in namespaces:
            try:
                cutoff = admin.purge(namespace, issued_before)
            except StoreError as error:
                failed = True
                _print_failure(f"{namespace} is not purged, or only in part", error)
            else:
                console.print(Text(f"{namespace}: no session issued before {_format_time(cutoff)} resumes any more"))
    if failed:
        raise typer.Exit(1)
    delay = f"within {Admin.PURGE_SECONDS:.0f} s on frontends with one"
    console.print(Text(f"Effective at once on frontends without a mirror, {delay}."))


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

    Exit status 1 if the store rejects the call or is unavailable.
    """
    found: dict[str, NamespaceStats] = {}
    with _connected(target, tls, deadline) as admin:
        try:
            for namespace in namespaces or (None,):
                found |= admin.stats(namespace)
        except StoreError as error:
            _print_failure("the sessions were not counted", error)
            raise typer.Exit(1) from None
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


def _connected(target: str, tls: TlsOptions, deadline: float) -> Admin:
    """Return the operators' client of a store.

    Raises:
        UserError: The target is malformed, or a file of the credentials cannot be used.
    """
    try:
        return Admin(target, deadline=deadline, credentials=tls.credentials())
    except (ValueError, CredentialsError) as error:
        raise UserError(str(error)) from None


def _confirm(admin: Admin, namespaces: Sequence[str], issued_before: float | None) -> None:
    """Ask the user for confirmation, with the number of sessions if the grants permit counting."""
    what = [_size(admin, namespace) for namespace in namespaces]
    if not sys.stdin.isatty():
        raise UserError("nothing was purged: give --yes, since standard input is not a terminal")
    which = "all sessions" if issued_before is None else f"all sessions issued before {_format_time(issued_before)}"
    typer.confirm(f"Purge {which} of {', '.join(what)}? Their clients make full handshakes then.", abort=True)


def _size(admin: Admin, namespace: str) -> str:
    with contextlib.suppress(StoreError):  # the grant may not include stats
        return f"{namespace} ({admin.stats(namespace)[namespace].sessions:,} sessions)"
    return namespace


def _print_failure(consequence: str, error: StoreError) -> None:
    """Print the consequence of a store's error, the error and the remedy."""
    advice = ""
    if isinstance(error, InvalidRequest):
        advice = "; correct it"
    elif isinstance(error, StoreUnavailable):
        advice = "; try again until it succeeds"
    elif "PERMISSION_DENIED" in str(error):
        advice = "; add a grant (resumed serve --grants)"
    Console(stderr=True, soft_wrap=True).print(Text(f"resumed: {consequence}: {error}{advice}"))


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
