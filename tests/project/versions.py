"""Check that every file that repeats the version agrees with pyproject.toml: `python tests/project/versions.py`."""

# ruff: noqa: T201 - a tool prints
from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE = Path(__file__).parents[2]
PLACES = {
    "CHANGELOG.md": r"\A(?:(?!^## ).*\n)*## \[(\d[^]]*)\]",  # the first section
    "client/c/CMakeLists.txt": r"^project\(resumed VERSION (\S+)",
    "client/c/Cargo.toml": r'^version = "(.+)"',
    "client/c/Cargo.lock": r'^name = "(?:lib)?resumed(?:-preload)?"\nversion = "(.+)"',
    "client/java/pom.xml": r"^  <version>(.+)</version>",
    "client/java/README.md": r"^  <version>(.+)</version>",
    "client/node/package.json": r'^  "version": "(.+)"',
    "client/node/package-lock.json": r'^ +"name": "@resumed/node",\n +"version": "(.+)"',
    "client/rust/Cargo.toml": r'^version = "(.+)"',
    "client/rust/Cargo.lock": r'^name = "resumed"\nversion = "(.+)"',
    "deploy/docker/Dockerfile": r"^ARG VERSION=(.+)",
    "deploy/kubernetes/chart/Chart.yaml": r"^(?:appVersion|version): (.+)",
    "deploy/kubernetes/frontend/*.yaml": r"image: resumed:(\S+)",
    "deploy/kubernetes/kustomize/*/*/*.yaml": r"(?:image: resumed:|app\.kubernetes\.io/version: )(\S+)",
    "docs/kubernetes.md": r"/resumed:(\d[\w.-]*)",
}
"""Files by pattern, and a regular expression whose group is the version; each must match at least once."""


def project_version(tree: Path = TREE) -> str:
    """Return the version in pyproject.toml, the only one that is edited by hand first."""
    [version] = re.findall(r'^version = "(.+)"', (tree / "pyproject.toml").read_text(), re.MULTILINE)
    return str(version)


def problems(tree: Path = TREE) -> Iterator[str]:
    """Yield a line for each version that differs, and for each place that has none."""
    expected = project_version(tree)
    for pattern, expression in PLACES.items():
        found = False
        for path in sorted(tree.glob(pattern)):
            text = path.read_text()
            for match in re.finditer(expression, text, re.MULTILINE):
                found, version = True, match[1].strip('"')
                if version != expected:
                    line = text.count("\n", 0, match.start(1)) + 1
                    yield f"{path.relative_to(tree)}:{line}: version {version}, but pyproject.toml has {expected}"
        if not found:
            yield f"{pattern}: no version matches {expression!r}"


def main() -> int:
    """Print the problems; return 1 if there are any."""
    found = list(problems())
    print(*(found or [f"version {project_version()} everywhere"]), sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
