"""The table of docs/languages.md that shows which library has what: each yes names a test that exists."""

from __future__ import annotations

import re

import pytest

from docs.markdown import TREE

PAGE = TREE / "docs" / "languages.md"
PLACES = {"Python": "tests", "Go": "client/go", "Node": "client/node/test", "Rust": "client/rust", "C": "tests"}
"""Where the tests of a column are."""
_TABLE = re.compile(r"^\| Feature \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


def cells() -> list[tuple[str, str, str]]:
    """Return feature, library and content of each cell."""
    found = _TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return [(row[0], library, cell) for row in rows for library, cell in zip(PLACES, row[1:], strict=True)]


@pytest.mark.parametrize(("feature", "library", "cell"), cells(), ids=lambda text: text[:30])
def test_each_cell_names_a_test_that_exists_or_a_reason(feature: str, library: str, cell: str) -> None:
    named = re.fullmatch(r"yes: `(\S+?)::(.+)`", cell)
    if named is None:
        assert re.match(r"no: \S+ \S+", cell), f"{feature}, {library}: neither a test nor a reason: {cell}"
        return
    file = next(path for path in (TREE / PLACES[library] / named[1], TREE / named[1]) if path.exists())
    assert named[2] in file.read_text(encoding="utf-8"), f"{file.relative_to(TREE)} has no {named[2]}"
