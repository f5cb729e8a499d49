"""Check that this tree can be released, and build its packages without uploading them: `make release-check`.

Steps whose tools are not installed are listed as skipped.
"""

# ruff: noqa: T201 - a tool prints
from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from project import versions

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE = versions.TREE
TWINE = TREE / ".build" / "twine" / "bin" / "twine"
HELM = TREE / ".build" / "kubernetes" / "helm"


class Package(NamedTuple):
    """A package of a registry, and the command that builds it."""

    name: str
    tool: str
    command: tuple[str, ...]
    directory: str = "."


def packages(output: Path) -> tuple[Package, ...]:
    """Return the packages of a release; files are written to `output`."""
    cargo = ("cargo", "publish", "--dry-run", "--quiet", "--locked", "--no-verify", "--allow-dirty")
    maven = ("mvn", "--batch-mode", "--quiet", "--activate-profiles", "release", "package", "-DskipTests")
    check = ("sh", "-c", '"$0" check --strict "$1"/resumed-*.whl "$1"/resumed-*.tar.gz', str(TWINE), str(output))
    return (
        Package("PyPI", sys.executable, (sys.executable, "-m", "hatchling", "build", "-d", str(output))),
        Package("PyPI's rules", str(TWINE), check),
        Package("crates.io", "cargo", cargo, "client/rust"),
        Package("npm", "npm", ("npm", "pack", "--silent", "--pack-destination", str(output)), "client/node"),
        Package("npm's rules", "npm", ("npm", "run", "--silent", "check-package"), "client/node"),
        Package("Maven Central", "mvn", maven, "client/java"),
        Package("Go module", "go", ("go", "mod", "verify"), "client/go"),
        Package("Helm chart", str(HELM), (str(HELM), "package", "deploy/kubernetes/chart", "-d", str(output))),
    )


def git(*arguments: str) -> str:
    """Return the output of git in this tree."""
    return subprocess.run(["git", *arguments], cwd=TREE, capture_output=True, text=True, check=True).stdout


def undated(changelog: str, version: str) -> Iterator[str]:
    """Yield a problem if the changelog has no section of the version with a date."""
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md: the heading of the release must read `## [{version}] - YYYY-MM-DD`"


def problems(*, tagged: bool) -> Iterator[str]:
    """Yield a line for each reason not to release this tree; `tagged` if its tag is there already."""
    version = versions.project_version()
    yield from undated((TREE / "CHANGELOG.md").read_text(), version)
    if tagged:
        if f"v{version}" not in git("tag", "--points-at", "HEAD").split():
            yield f"this commit does not have the tag v{version}"
        return
    if changed := git("status", "--porcelain").splitlines():
        yield f"the tree is not clean: {len(changed)} files, the first is {changed[0][3:]}"
    for tag in git("tag", "--list", f"v{version}", f"client/go/v{version}").split():
        yield f"tag {tag} exists: choose another version"


def run(package: Package) -> subprocess.CompletedProcess[str]:
    """Run the command of a package; its output includes the errors, which Maven prints to the standard output."""
    return subprocess.run(
        package.command,
        cwd=TREE / package.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def main() -> int:
    """Check, build, and print each step; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TREE / ".build" / "release", help="directory of the packages")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dry-run", action="store_true", help="accept changed files and an undated changelog")
    kind.add_argument("--tagged", action="store_true", help="require the tag of the version instead of its absence")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    failed = [*versions.problems(), *([] if options.dry_run else problems(tagged=options.tagged))]
    for package in packages(output):
        if not shutil.which(package.tool):
            print(f"skipped   {package.name}: {package.tool} is not installed")
            continue
        done = run(package)
        print(f"{'FAILED' if done.returncode else 'built':<9} {package.name}: {' '.join(package.command)}")
        if done.returncode:
            failed.append(f"{package.name}: {done.stdout.strip()[-2_000:]}")
    print(*(failed or [f"version {versions.project_version()}: the packages are in {output}"]), sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
