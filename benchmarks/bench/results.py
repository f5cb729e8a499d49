"""What a section of the bench found, in a form that JSON keeps: verdicts on targets, tables, and figures to plot."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass
class Verdict:
    """A target, and what was measured: the median of the turns, and their range.

    Attributes:
        what: What it is about.
        relation: "≤" or "≥".
        limit: The target.
        measured: The median; of several cases the one that is worst.
        low, high: The least and the greatest turn of that case.
        case: Which case it is, if there are several.
        unit: Of all of these.
    """

    what: str
    relation: str
    limit: float
    measured: float
    low: float
    high: float
    case: str = ""
    unit: str = ""

    @property
    def kept(self) -> bool:
        """Whether the target is reached."""
        return self.measured <= self.limit if self.relation == "≤" else self.measured >= self.limit


@dataclass
class Results:
    """What one section found.

    Attributes:
        verdicts: The targets that it has to do with.
        tables: Title, headings and rows of cells.
        figures: What the plots are made of.
        missing: What could not be measured, and why.
        facts: When, how long, on what.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def judge(
        self, what: str, relation: str, limit: float, cases: Mapping[str, Sequence[float]], unit: str = ""
    ) -> None:
        """Compare with a target what the turns of each case gave; the worst case counts."""
        if not cases:
            self.missing.append(f"{what}: no figures")
            return
        medians = {case: statistics.median(turns) for case, turns in cases.items()}
        worst = (max if relation == "≤" else min)(medians, key=lambda case: medians[case])
        turns = cases[worst]
        self.verdicts.append(
            Verdict(
                *(what, relation, limit, medians[worst], min(turns), max(turns)),
                case=worst if len(cases) > 1 else "",
                unit=unit,
            )
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Results:
        """Return what as_json() was made of."""
        found = {**found, "verdicts": [Verdict(**verdict) for verdict in found["verdicts"]]}
        return cls(**found)


def spread(figures: Sequence[float], digits: int = 2) -> str:
    """Return the median and the range."""
    return (
        f"{statistics.median(figures):,.{digits}f} ({min(figures):,.{digits}f} to {max(figures):,.{digits}f})"
        if figures
        else "-"
    )


def ratios(turns: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return turn ÷ turn."""
    return [one / other for one, other in zip(turns, others, strict=True)]
