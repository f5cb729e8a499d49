"""`.ci/retry`: a test that fails beside others and passes alone does not fail a change, but is listed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RETRY = Path(__file__).parents[2] / ".ci" / "retry"
TESTS = """
import os
from pathlib import Path

def test_steady(): pass

def test_flaky():
    tried = Path(__file__).with_name("tried")
    if not tried.exists():
        tried.touch()
        raise AssertionError

def test_broken():
    assert "BROKEN" not in os.environ
"""


PYTEST = (sys.executable, "-m", "pytest", "-q")
PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}  # others take seconds to load


def retry(directory: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RETRY), *command],
        cwd=directory,
        env={**os.environ, **PLUGINS, "PYTHON": sys.executable, "FLAKY": "flaky", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_a_test_that_passes_alone_is_listed_as_flaky(directory: Path) -> None:
    done = retry(directory, *PYTEST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (directory / "flaky").read_text() == "test_it.py::test_flaky\n"


def test_a_test_that_fails_twice_fails_the_command(directory: Path) -> None:
    done = retry(directory, *PYTEST, BROKEN="1")
    assert done.returncode
    assert "1 failed" in done.stdout


def test_a_command_that_succeeds_lists_nothing(directory: Path) -> None:
    assert retry(directory, "true").returncode == 0
    assert not (directory / "flaky").exists()


def test_a_command_that_fails_without_a_failed_test_fails(directory: Path) -> None:
    assert retry(directory, "false").returncode
