"""The results of a section of the benchmark, in a form that JSON can express: verdicts, tables, and figures to plot."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass
class Verdict:
    """A target and the measured value: the median of the turns, and their range.

    Attributes:
        what: The measured quantity.
        relation: "≤" or "≥".
        limit: The target.
        measured: The median; of several cases the worst one.
        low, high: The lowest and the highest turn of that case.
        case: The name of that case, if there are several.
        unit: The unit of all these figures.
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
    def is_met(self) -> bool:
        """Whether the measured value meets the target."""
        return self.measured <= self.limit if self.relation == "≤" else self.measured >= self.limit


@dataclass
class Results:
    """The results of one section.

    Attributes:
        verdicts: The comparisons with targets.
        tables: Title, headings and rows of cells.
        figures: The figures of the plots.
        missing: The measurements that were impossible, each with the reason.
        facts: Date, duration and machine.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def judge(
        self, what: str, relation: str, limit: float, cases: Mapping[str, Sequence[float]], unit: str = ""
    ) -> None:
        """Compare the median of each case with a target, and record the worst case."""
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
        """Return the results as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Results:
        """Return the results that as_json() encoded."""
        document = {**document, "verdicts": [Verdict(**verdict) for verdict in document["verdicts"]]}
        return cls(**document)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the quotients of two sequences, turn by turn."""
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
