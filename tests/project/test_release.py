"""The version stands in one place, and other files that repeat it agree."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from project import release, versions

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of all files that contain the version."""
    for pattern in ("pyproject.toml", *versions.PLACES):
        for path in versions.TREE.glob(pattern):
            copy = tmp_path / path.relative_to(versions.TREE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path


def test_every_file_that_repeats_the_version_agrees() -> None:
    assert list(versions.problems()) == []


@pytest.mark.parametrize("pattern", versions.PLACES)
def test_another_version_is_found_wherever_it_stands(tree: Path, pattern: str) -> None:
    version = versions.project_version()
    path = max(tree.glob(pattern))
    path.write_text(path.read_text().replace(version, "9.9.9"))
    name = str(path.relative_to(tree))
    found = list(versions.problems(tree))
    assert found
    assert all(problem.startswith(name) and "9.9.9" in problem for problem in found)


def test_a_place_that_has_no_version_any_more_is_reported(tree: Path) -> None:
    (tree / "deploy/docker/Dockerfile").write_text("FROM scratch\n")
    assert [problem.split(":")[0] for problem in versions.problems(tree)] == ["deploy/docker/Dockerfile"]


def test_a_release_has_a_dated_section_in_the_changelog() -> None:
    assert list(release.undated("# Changelog\n\n## [1.2.0] - 2026-11-30\n", "1.2.0")) == []
    assert list(release.undated("# Changelog\n\n## [1.2.0] - unreleased\n", "1.2.0"))


def test_the_output_of_a_failed_build_has_both_streams() -> None:
    program = "import sys; print('[ERROR] javadoc'); print('colours', file=sys.stderr); sys.exit(1)"
    done = release.run(release.Package("any", sys.executable, (sys.executable, "-c", program)))
    assert done.returncode == 1
    assert set(done.stdout.splitlines()) == {"[ERROR] javadoc", "colours"}


def test_the_crate_has_the_license() -> None:
    license_text = (versions.TREE / "LICENSE").read_text()
    assert (versions.TREE / "client" / "rust" / "LICENSE").read_text() == license_text
