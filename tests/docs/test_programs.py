"""Every block of Python that a page shows runs, behind what `tables.py` says that its reader has already."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from docs.markdown import PAGES, Block, blocks
from docs.quick_start import README
from docs.tables import PROGRAMS

if TYPE_CHECKING:
    from pathlib import Path

    from docs.stage import Stage

PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
QUICK_START = next(block for block in PYTHON if block.page == README)
"""test_quick_start.py runs two processes of it."""


@pytest.mark.parametrize(
    "block", [block for block in PYTHON if block is not QUICK_START], ids=lambda block: block.where
)
def test_every_program_runs(block: Block, stage: Stage, tmp_path: Path) -> None:
    directory = tmp_path / "here"
    shutil.copytree(stage.directory, directory)
    before, given = next((found for head, found in PROGRAMS.items() if block.lines[0].startswith(head)), ("", {}))
    program = "\n".join(block.lines)
    for written, meant in given.items():
        assert written in program, f"tables.py: {written!r} is not in {block.where}"
        program = program.replace(written, meant)
    (directory / "program.py").write_text(f"{before}\n{program}\n".replace("127.0.0.1:7400", stage.store))
    stage.run("python program.py", directory)


def test_the_table_has_nothing_that_no_page_has() -> None:
    assert not [head for head in PROGRAMS if not any(block.lines[0].startswith(head) for block in PYTHON)]
