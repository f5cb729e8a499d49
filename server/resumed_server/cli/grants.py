"""`resumed grants check`: check a grants file, and explain its decisions."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resumed_server.auth.grants import ALL_NAMESPACES, OPERATIONS, watch_file
from resumed_server.cli.options import AsJson
from resumed_server.config.patterns import is_namespace
from resumed_server.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed_server.auth.grants import Grant
    from resumed_server.limits.config import Limit

_NEAREST = 3
"""Number of the nearest grants that are printed after a denial."""


app = typer.Typer(add_completion=False, help="Check a grants file.")


@app.callback()
def _grants() -> None:
    """Check a grants file."""


class Question(NamedTuple):
    """A call: its identity, namespace and operation; None stands for any."""

    identity: str | None
    namespace: str | None
    operation: str | None

    def __str__(self) -> str:
        return (
            f"{self.identity or 'any identity'} to {self.operation or 'do anything'} "
            f"in {self.namespace or 'any namespace'}"
        )


class _Compared(NamedTuple):
    """A grant, its number in the file, and the parts of a question that it does not match."""

    number: int
    grant: Grant
    missing: list[str]

    def __str__(self) -> str:
        whom = self.grant.identity if "identity" in self.missing else "that identity"
        where = f", only in {', '.join(self.grant.namespaces)}" if "namespace" in self.missing else ""
        what = f", only to {', '.join(self.grant.operations)}" if "operation" in self.missing else ""
        return f"grant {self.number} is for {whom}{where}{what}"


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file of `resumed serve --grants`.")],
    identity: Annotated[
        str | None, typer.Option(metavar="NAME", help="Identity: spiffe://example.org/shop or dns:frontend.shop.svc.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Namespace of the call; * for the `stats` of all.")
    ] = None,
    operation: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Operation: {', '.join(OPERATIONS[:-1])} or {OPERATIONS[-1]}.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a grants file, and explain why a call is allowed or denied.

    An omitted option stands for any identity, namespace or operation; without options only the file is checked.
    """
    question = Question(identity, namespace, operation)
    _verify(question)
    try:
        read = watch_file(file).value
    except ValueError as error:
        raise UserError(str(error)) from None
    grants = read.grants
    compared = [_Compared(number, grant, _missing(grant, question)) for number, grant in enumerate(grants, 1)]
    matching = [each for each in compared if not each.missing]
    asked = any(question)
    warning = "" if grants else "it has no [[grant]], so every call is denied"
    nearest = _nearest(compared, question) if asked and not matching else []
    if as_json:
        report = {
            "file": file,
            "grants": len(grants),
            "warning": warning,
            "limits": [_amounts(limit) for limit in read.limits],
            **question._asdict(),
            "allowed": bool(matching) if asked else None,
            "matching": list(map(_as_dict, matching)),
            "nearest": [_as_dict(each) | {"missing": each.missing} for each in nearest],
        }
        Console(soft_wrap=True).print_json(data=report)
    else:
        _show(file, question, compared, matching, nearest)
        if not asked and read.limits:
            _show_limits(read.limits)
        if warning:
            Console(stderr=True, soft_wrap=True).print(Text(f"resumed: warning: {file}: {warning}", "yellow"))
    if asked and not matching:
        raise typer.Exit(ExitStatus.FAILED)


def _verify(question: Question) -> None:
    problems = []
    if question.identity is not None and not question.identity.startswith(("spiffe://", "dns:")):
        problems.append(f"--identity: {question.identity!r} is neither spiffe://... nor dns:...")
    if question.namespace not in {None, ALL_NAMESPACES} and not is_namespace(question.namespace or ""):
        problems.append(
            f"--namespace: {question.namespace!r} is not 1 to 63 characters of [a-z0-9.-], or {ALL_NAMESPACES}"
        )
    if question.operation is not None and question.operation not in OPERATIONS:
        problems.append(f"--operation: {question.operation!r} is none of {', '.join(OPERATIONS)}")
    if problems:
        raise UserError("\n".join(problems))


def _missing(grant: Grant, question: Question) -> list[str]:
    """Return the parts of a question that a grant does not match."""
    tests: dict[str, Callable[[str], bool]] = {
        "identity": grant.matches_identity,
        "namespace": grant.matches_namespace,
        "operation": grant.operations.__contains__,
    }
    return [name for name, asked in question._asdict().items() if asked is not None and not tests[name](asked)]


def _nearest(compared: list[_Compared], question: Question) -> list[_Compared]:
    """Return the grants with the fewest mismatches: first those of the identity, then those of a similar one."""

    def distance(each: _Compared) -> tuple[int, bool, float]:
        likeness = difflib.SequenceMatcher(None, each.grant.identity, question.identity or "").ratio()
        return len(each.missing), "identity" in each.missing, -likeness

    return sorted(compared, key=distance)[:_NEAREST]


def _as_dict(each: _Compared) -> dict[str, Any]:
    return {"grant": each.number, **vars(each.grant)}


def _amounts(limit: Limit) -> dict[str, Any]:
    """Return the fields of a limit that are set."""
    return {name: value for name, value in vars(limit).items() if value}


def _show_limits(limits: Sequence[Limit]) -> None:
    table = Table()
    for column in ("limit", "of", "amounts"):
        table.add_column(column, overflow="fold")
    for number, limit in enumerate(limits, 1):
        amounts = _amounts(limit)
        whose = amounts.pop("identity", "") or " ".join(amounts.pop("namespaces", ()))
        table.add_row(str(number), Text(whose), ", ".join(f"{value} {name}" for name, value in amounts.items()))
    Console().print(table)


def _show(
    file: str, question: Question, compared: list[_Compared], matching: list[_Compared], nearest: list[_Compared]
) -> None:
    console = Console(soft_wrap=True)
    if any(question) and not matching:
        console.print(Text.assemble(("denied", "bold red"), f": no grant allows {question}"))
        for each in nearest:
            console.print(Text(f"  {each}"))
        return
    if all(question):
        grants = " and ".join(f"grant {each.number} ({each.grant.identity})" for each in matching)
        console.print(Text.assemble(("allowed", "green"), f": {grants} allows {question}"))
        return
    shown = matching if any(question) else compared
    console.print(Text(f"{file}: {len(shown)} of {len(compared)} grants"))
    table = Table()
    for column in ("grant", "identity", "namespaces", "operations"):
        table.add_column(column, overflow="fold")
    for number, grant, _ in shown:
        table.add_row(str(number), *map(Text, (grant.identity, " ".join(grant.namespaces), " ".join(grant.operations))))
    Console().print(table)
