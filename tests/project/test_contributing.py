"""The tables of CONTRIBUTING.md name files that exist, and few of them for each change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
ROWS = re.findall(r"^\| ([^|]+) \| (.*) \|$", (TREE / "CONTRIBUTING.md").read_text(), re.MULTILINE)
LARGE = {"add an RPC", "add a language"}


def paths(cell: str) -> list[str]:
    return re.findall(r"`([\w.-]+/[\w./-]*|[\w-]+\.toml|Makefile)`", cell)


@pytest.mark.parametrize(("change", "files"), ROWS, ids=[change for change, _ in ROWS])
def test_every_file_of_a_change_exists(change: str, files: str) -> None:
    assert [path for cell in (change, files) for path in paths(cell) if not (TREE / path).exists()] == []


@pytest.mark.parametrize(("change", "files"), ROWS, ids=[change for change, _ in ROWS])
def test_a_change_concerns_few_files(change: str, files: str) -> None:
    assert len(paths(files)) <= 6 or change in LARGE
