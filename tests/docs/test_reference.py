"""docs/configuration.md agrees with the code."""

from __future__ import annotations

import re

import pytest

from docs.reference import CHART_PAGE, PAGE, TREE, chart_page, page, preload_table


@pytest.fixture(scope="module")
def wanted() -> str:
    """The page as it has to be."""
    return page()


def test_the_configuration_reference_is_current(wanted: str) -> None:
    assert PAGE.read_text(encoding="utf-8") == wanted, "run `make reference` and commit"


def test_every_option_says_what_it_is_for(wanted: str) -> None:
    rows = [line for line in wanted.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if row.endswith("| |")] == []


def test_the_readme_of_the_chart_is_current() -> None:
    assert CHART_PAGE.read_text(encoding="utf-8") == chart_page(), "run `make reference` and commit"


def test_the_preloaded_library_reads_the_variables_of_its_table() -> None:
    code = (TREE / "client/c/preload/src/environment.rs").read_text(encoding="utf-8").partition("#[cfg(test)]")[0]
    read = set(re.findall(r'(?:get|number|flag|choice|required)\("([A-Z_]+)"', code))
    names = re.findall(r"`(?:RESUMED)?_([A-Z_]+)`", "".join(line.split("|")[1] for line in preload_table()[2:]))
    names += re.findall(r"`RESUMED_([A-Z_]+)`", preload_table()[2])
    assert read == {name.removeprefix("RESUMED_") for name in names}
