"""docs/threat-model.md: no threat without a defence, and none without a test that is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
PAGE = TREE / "docs" / "threat-model.md"
HEAD = ["Threat", "Defence", "Test"]


def threats() -> list[list[str]]:
    """Return the rows of all tables of threats."""
    found: list[list[str]] = []
    heads: list[list[str]] = [[]]
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            heads.append([])
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not heads[-1]:
            heads[-1] = cells
        elif heads[-1] == HEAD and set(line) - set("|-: "):
            found.append(cells)
    return found


@cache
def names(path: Path) -> set[str]:
    """Return the names that a file defines: in Python its functions, as `function` or `Class::function`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"[\w-]+", text))
    body = ast.parse(text).body
    scopes = [("", body), *((f"{each.name}::", each.body) for each in body if isinstance(each, ast.ClassDef))]
    return {scope + each.name for scope, within in scopes for each in within if isinstance(each, ast.FunctionDef)}


def test_there_are_threats() -> None:
    """This fails if the tables of the page cannot be parsed."""
    assert len(threats()) > 40


@pytest.mark.parametrize("row", threats(), ids=lambda row: row[0][:60])
def test_every_threat_has_a_test(row: list[str]) -> None:
    _, defence, tests = row
    assert defence
    named = re.findall(r"`([^`]+?)::([^`]+)`", tests)
    assert named, "no test is named, as `integration/test_x.py::test_y`"
    for file, name in named:
        path = next((path for path in (TREE / "tests" / file, TREE / file) if path.exists()), None)
        assert path, f"{file} is not there"
        assert name in names(path), f"{file} has no {name}"
        assert path.suffix != ".py" or name.rpartition("::")[2].startswith("test_"), f"{name} is no test"
