"""A stored input that still fails is reported, and does not hide the rest of the report."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fuzz import run
from fuzz.target import Target
from fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class InputDirectory(Target):
    """A target that fails on one of its inputs."""

    directory: Path

    @property
    def corpus(self) -> Path:
        return self.directory


def prepare() -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        assert data != b"bad"

    return check


@pytest.mark.filterwarnings("ignore:Module resumed", "ignore:No data was collected")  # imported before
def test_replay_goes_on_after_an_input_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("coverage", reason="only in the extra `fuzz`")
    from fuzz import replay

    (tmp_path / "1").write_bytes(b"bad")
    (tmp_path / "2").write_bytes(b"good")
    target = InputDirectory("broken", prepare, list, ("resumed/_crypto/origin.py",))
    object.__setattr__(target, "directory", tmp_path)
    monkeypatch.setitem(TARGETS, "broken", target)
    monkeypatch.setattr(sys, "argv", ["replay.py", "broken"])
    monkeypatch.setattr(logging, "disable", lambda: None)
    assert replay.main() == 1
    printed = capsys.readouterr()
    assert str(tmp_path / "1") in printed.err
    assert str(tmp_path / "2") not in printed.err
    assert "resumed/_crypto/origin.py" in json.loads(printed.out.splitlines()[-1])


@pytest.mark.parametrize(("status", "printed"), [(1, '{"a.py": "9 %"}\n'), (-11, "")])
def test_the_report_lists_inputs_that_still_fail(monkeypatch: pytest.MonkeyPatch, status: int, printed: str) -> None:
    replayed = subprocess.CompletedProcess([], status, printed, "corpus/x: AssertionError()\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: replayed)
    coverage, failures = run.line_coverage(list(TARGETS)[:1])
    assert failures == ["corpus/x: AssertionError()"]
    assert len(coverage) == bool(printed)
