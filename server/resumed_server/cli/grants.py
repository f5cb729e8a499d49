"""`resumed grants check`: what a file of grants says, and why a call is allowed or denied."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resumed_server.auth.grants import OPERATIONS, watch_file
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed_server.auth.grants import Grant
    from resumed_server.limits.config import Limit

_NEAREST = 3
"""How many grants that nearly matched are shown."""
_NAMESPACE = re.compile(r"[a-z0-9.-]{1,63}")


class Question(NamedTuple):
    """Who asks for what; None stands for any."""

    identity: str | None
    namespace: str | None
    operation: str | None

    def __str__(self) -> str:
        return (
            f"{self.identity or 'anybody'} may {self.operation or 'do something'} in {self.namespace or 'a namespace'}"
        )


class _Compared(NamedTuple):
    """A grant, its number in the file, and what it lacks to allow what was asked."""

    number: int
    grant: Grant
    missing: list[str]

    def __str__(self) -> str:
        whom = self.grant.identity if "identity" in self.missing else "that identity"
        where = f", only in {', '.join(self.grant.namespaces)}" if "namespace" in self.missing else ""
        what = f", only to {', '.join(self.grant.operations)}" if "operation" in self.missing else ""
        return f"grant {self.number} is for {whom}{where}{what}"


def check(file: str, question: Question, *, as_json: bool) -> bool:
    """Print what the grants in `file` say to `question`, and return whether any allows it.

    Without a question the file is checked alone; that is True.

    Raises:
        UserError: The file cannot be used, or the question makes no sense.
    """
    _verify(question)
    try:
        read = watch_file(file).value
    except ValueError as error:
        raise UserError(str(error)) from None
    grants = read.grants
    compared = [_Compared(number, grant, _missing(grant, question)) for number, grant in enumerate(grants, 1)]
    matching = [each for each in compared if not each.missing]
    asked = any(question)
    nearest = _nearest(compared, question) if asked and not matching else []
    if as_json:
        report = {
            "file": file,
            "grants": len(grants),
            "limits": [_amounts(limit) for limit in read.limits],
            **question._asdict(),
            "allowed": bool(matching) if asked else None,
            "matching": list(map(_described, matching)),
            "nearest": [_described(each) | {"missing": each.missing} for each in nearest],
        }
        Console(soft_wrap=True).print_json(data=report)
    else:
        _show(file, question, compared, matching, nearest)
        if not asked and read.limits:
            _show_limits(read.limits)
    return bool(matching) or not asked


def _verify(question: Question) -> None:
    problems = []
    if question.identity is not None and not question.identity.startswith(("spiffe://", "dns:")):
        problems.append(f"--identity: {question.identity!r} is neither spiffe://... nor dns:...")
    if question.namespace is not None and not _NAMESPACE.fullmatch(question.namespace):
        problems.append(f"--namespace: {question.namespace!r} is not 1 to 63 characters of [a-z0-9.-]")
    if question.operation is not None and question.operation not in OPERATIONS:
        problems.append(f"--operation: {question.operation!r} is none of {', '.join(OPERATIONS)}")
    if problems:
        raise UserError("\n".join(problems))


def _missing(grant: Grant, question: Question) -> list[str]:
    """Return what keeps a grant from allowing what was asked."""
    tests: dict[str, Callable[[str], bool]] = {
        "identity": grant.matches_identity,
        "namespace": grant.matches_namespace,
        "operation": grant.operations.__contains__,
    }
    return [name for name, asked in question._asdict().items() if asked is not None and not tests[name](asked)]


def _nearest(compared: list[_Compared], question: Question) -> list[_Compared]:
    """Return the grants that lack least: first those that name the identity, then those that name a similar one."""

    def distance(each: _Compared) -> tuple[int, bool, float]:
        likeness = difflib.SequenceMatcher(None, each.grant.identity, question.identity or "").ratio()
        return len(each.missing), "identity" in each.missing, -likeness

    return sorted(compared, key=distance)[:_NEAREST]


def _described(each: _Compared) -> dict[str, Any]:
    return {"grant": each.number, **vars(each.grant)}


def _amounts(limit: Limit) -> dict[str, Any]:
    """Return what a limit says."""
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
        console.print(Text.assemble(("denied", "bold red"), f": no grant says that {question}"))
        for each in nearest:
            console.print(Text(f"  {each}"))
        return
    if all(question):
        grants = " and ".join(f"grant {each.number} ({each.grant.identity})" for each in matching)
        console.print(Text.assemble(("allowed", "green"), f": {grants} says that {question}"))
        return
    shown = matching if any(question) else compared
    console.print(Text(f"{file}: {len(shown)} of {len(compared)} grants"))
    table = Table()
    for column in ("grant", "identity", "namespaces", "operations"):
        table.add_column(column, overflow="fold")
    for number, grant, _ in shown:
        table.add_row(str(number), *map(Text, (grant.identity, " ".join(grant.namespaces), " ".join(grant.operations))))
    Console().print(table)
