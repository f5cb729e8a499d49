"""What goes into the image is pinned by hash, and is what pyproject.toml asks for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TREE = Path(__file__).parents[2]
LOCKS = {name: TREE / f"deploy/docker/{name}.lock" for name in ("image", "build")}


def pinned(lock: Path) -> list[Requirement]:
    return [Requirement(found) for found in re.findall(r"^(\S+==[^\\]*) \\$", lock.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("name", LOCKS)
def test_everything_is_pinned_by_hash_and_from_no_particular_index(name: str) -> None:
    lines = [
        line for line in LOCKS[name].read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    pins = [number for number, line in enumerate(lines) if "==" in line]
    assert len(pins) == len(pinned(LOCKS[name])) > 10
    for number, line in enumerate(lines):
        assert number in pins or re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    assert all(number - 1 not in pins for number in pins)
    assert "//" not in LOCKS[name].read_text()


@pytest.mark.parametrize("name", LOCKS)
def test_required_packages_are_pinned(name: str) -> None:
    """Run `make lock` after a change of pyproject.toml."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = {
        "image": [*project["project"]["dependencies"], *extras["server"], *extras["redis"]],
        "build": project["dependency-groups"]["image-build"],
    }[name]
    for requirement in map(Requirement, asked):
        pins = [
            each for each in pinned(LOCKS[name]) if canonicalize_name(each.name) == canonicalize_name(requirement.name)
        ]
        assert pins, f"{requirement.name} is not pinned; run `make lock`"
        for pin in pins:
            (version,) = pin.specifier
            assert requirement.specifier.contains(version.version), f"{pin} is too old or too new; run `make lock`"
