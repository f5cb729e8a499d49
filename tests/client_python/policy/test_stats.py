"""The documentation lists every reason that the statistics count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resumed._policy.stats import REASONS, Stats

FRONTENDS = Path(__file__).parents[3] / "docs" / "frontends.md"


@pytest.mark.parametrize("kind", REASONS)
def test_the_docs_list_the_reasons(kind: str) -> None:
    """Each reason is a time series from the start, so that its first increase is visible."""
    (row,) = re.findall(rf"^\| `{kind}` \| (.*) \|$", FRONTENDS.read_text(), re.MULTILINE)
    row = row.partition("In Node also")[0]
    listed = set(re.findall(r"`([a-z-]+)`", row)) or set(REASONS["hits"])  # foreign_hits: by the same reasons
    assert listed == set(REASONS[kind])
    assert isinstance(getattr(Stats(), kind), dict)
