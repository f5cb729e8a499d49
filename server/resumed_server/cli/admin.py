"""`resumed purge` and `resumed stats`: what operators ask of a running store."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resumed import Admin, CredentialsError, InvalidRequest, StoreError, StoreUnavailable
from resumed_server.config.types import Duration
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from resumed import NamespaceStats
    from resumed_server.cli.tls_options import Tls


class Store(NamedTuple):
    """Where the store is, and how to get there."""

    target: str
    tls: Tls
    deadline: float

    def admin(self) -> Admin:
        """Return its operators' side.

        Raises:
            UserError: The target is malformed, or a file of the credentials cannot be used.
        """
        try:
            return Admin(self.target, deadline=self.deadline, credentials=self.tls.credentials())
        except (ValueError, CredentialsError) as error:
            raise UserError(str(error)) from None


def purge(store: Store, namespaces: Sequence[str], *, before: str | None, yes: bool) -> bool:
    """Purge namespaces, asking first unless `yes`; return whether all are purged.

    Raises:
        UserError: The arguments make no sense, or nobody is there to be asked.
    """
    issued_before = None if before is None else _moment(before)
    console = Console(soft_wrap=True)
    with store.admin() as admin:
        if not yes:
            _confirm(admin, namespaces, issued_before)
        well = True
        for namespace in namespaces:
            with _telling(f"{namespace} is not purged, or in part only") as outcome:
                mark = admin.purge(namespace, issued_before)
                console.print(Text(f"{namespace}: no session issued before {_shown(mark)} resumes any more"))
            well &= outcome.well
    if well:
        console.print(
            Text(f"At frontends without a mirror from now on, at those with one within {Admin.PURGE_SECONDS:.0f} s.")
        )
    return well


def stats(store: Store, namespaces: Sequence[str], *, as_json: bool) -> bool:
    """Print what there is of namespaces, or of all if none is named; return whether the store said so."""
    found: dict[str, NamespaceStats] = {}
    with store.admin() as admin, _telling("nothing was counted") as outcome:
        for namespace in namespaces or (None,):
            found |= admin.stats(namespace)
    if not outcome.well:
        return False
    if as_json:
        report = {
            name: each._asdict() | {"issued_before": each.issued_before and _shown(each.issued_before)}
            for name, each in found.items()
        }
        Console(soft_wrap=True).print_json(data=report)
        return True
    table = Table()
    table.add_column("namespace", overflow="fold")
    for column in ("sessions", "bytes", "tombstones", "to delete"):
        table.add_column(column, justify="right")
    table.add_column("purged up to")
    for name, each in found.items():
        numbers = (each.sessions, each.value_bytes, each.tombstones, each.purged)
        purged = _shown(each.issued_before) if each.issued_before else ""
        table.add_row(name, *(f"{number:,}" for number in numbers), purged)
    Console().print(table)
    return True


def _confirm(admin: Admin, namespaces: Sequence[str], issued_before: float | None) -> None:
    """Have the user say yes, knowing how much it is, as far as they may know."""
    what = [_size(admin, namespace) for namespace in namespaces]
    if not sys.stdin.isatty():
        raise UserError("nothing is purged: say --yes where nobody can be asked")
    which = "all sessions" if issued_before is None else f"all sessions issued before {_shown(issued_before)}"
    typer.confirm(f"Purge {which} of {', '.join(what)}? Their clients make full handshakes then.", abort=True)


def _size(admin: Admin, namespace: str) -> str:
    with contextlib.suppress(StoreError):  # who may purge need not be granted to count
        return f"{namespace} ({admin.stats(namespace)[namespace].sessions:,} sessions)"
    return namespace


class _Outcome:
    well = True


@contextlib.contextmanager
def _telling(consequence: str) -> Iterator[_Outcome]:
    """Tell what the store refused, what follows, and what to do."""
    outcome = _Outcome()
    try:
        yield outcome
    except StoreError as error:
        outcome.well = False
        advice = ""
        if isinstance(error, InvalidRequest):
            advice = "; correct it"
        elif isinstance(error, StoreUnavailable):
            advice = "; try again until it succeeds"
        elif "PERMISSION_DENIED" in str(error):
            advice = "; have it granted (resumed serve --grants)"
        Console(stderr=True, soft_wrap=True).print(Text(f"resumed: {consequence}: {error}{advice}"))


def _moment(text: str) -> float:
    """Return a time in Unix seconds, of a date with a time and zone, or of how long ago it was."""
    with contextlib.suppress(ValueError):
        return time.time() - Duration.parse(text)
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(text.removesuffix("Z") + "+00:00" * text.endswith("Z"))
        if moment.tzinfo is not None:
            return moment.timestamp()
    raise UserError(
        f"--before: {text!r} is neither how long ago, such as 90s or 2h, nor a time such as 2026-11-25T10:00:00Z"
    )


def _shown(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
