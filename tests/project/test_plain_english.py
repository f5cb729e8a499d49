"""The language check finds its patterns, and the tree is within its budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from project import plain_english

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = """
# Meanwhile

It says what
is it, and is meant. `what is` code is not read.

| what it was |
|---|
| who calls   |

    who calls
"""
MODULE = '''
"""Nobody knows."""

# What
# is joined.
NAME = "what is no comment"
"""Whatever."""
'''
SOURCE = """
/// What
/// is joined.
let url = "https://example.org"; // who calls
/* The server
 * tells the client. */
"""


@pytest.mark.parametrize(
    ("read", "source", "expected"),
    [
        (plain_english.markdown_prose, PAGE, {(2, "Meanwhile"), (4, "what is"), (5, "is meant")}),
        (plain_english.python_prose, MODULE, {(2, "Nobody"), (4, "What is"), (7, "Whatever")}),
        (plain_english.comment_prose, SOURCE, {(2, "What is"), (4, "who calls"), (6, "tells the")}),
    ],
)
def test_occurrences_are_found_in_prose_and_only_there(
    read: Callable[[str], Iterator[plain_english.Prose]], source: str, expected: set[tuple[int, str]]
) -> None:
    found = {
        (line, description.split("'")[1])
        for prose in read(source)
        for line, description in plain_english.occurrences(prose)
    }
    assert found == expected


def test_an_occurrence_is_reported_with_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("One line.\nThe server tells the client.\n")
    counted = plain_english.count(plain_english.Part("pages", ("*.md",), 0.3), tmp_path)
    assert counted.words == 7
    assert counted.found == ["page.md:2: 'tells the' is software that talks"]


@pytest.mark.parametrize(("text", "status"), [("It tells the client.", 1), ("It notifies the client.", 0)])
def test_the_exit_status_depends_on_whether_a_part_is_above_its_budget(tmp_path: Path, text: str, status: int) -> None:
    (tmp_path / "README.md").write_text(text)
    assert plain_english.main(tmp_path) == status
