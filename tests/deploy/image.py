"""Builds the image without a container engine, on a base of Debian's packages, and reports its size.

    python tests/deploy/image.py [--suite bookworm|trixie] [--markdown]

The suite is Debian's: bookworm has Python 3.11, trixie has 3.13, as the Dockerfile does. The base has Python and no
shell, as distroless images do. Everything is kept in .build/image.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

TREE = Path(__file__).parents[2]
KEPT = TREE / ".build/image"
NAME = "localhost/resumed"
PYTHON = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "ca-certificates")
BUILD = ("dash", "coreutils", "findutils", "python3-pip")
"""Additional packages of the build: a shell, and pip."""
SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bookworm": ((), ("python3-distutils",)),
    "trixie": (("base-files",), ()),  # which brings /bin and /lib64 as links
}
"""What Python needs besides, and what pip does, by suite."""
STORAGE = ("--storage-driver", "vfs", "--root", str(KEPT / "storage"), "--runroot", str(KEPT / "run"))
_OCI = KEPT / "oci"
_OF_PIP = (Path("/etc/pip.conf"), Path("/etc/ssl/certs/ca-certificates.crt"))
"""How pip reaches its index from this machine: not the image's business, so it is in the base of the build."""


class Layer(NamedTuple):
    """A layer of an image."""

    made_by: str
    bytes: int
    """Unpacked."""
    compressed: int
    """As it is pulled."""
    files: dict[str, int]
    """Sizes by path."""
    records: dict[str, str]
    """By distribution: its RECORD, which lists the files that pip installed."""
    path: Path


def build(suite: str) -> None:
    """Build the image, and its base if that is missing."""
    KEPT.mkdir(parents=True, exist_ok=True)
    base, tools = f"base-{suite}", f"build-{suite}"
    more, for_pip = SUITES[suite]
    for name, packages in ((base, PYTHON + more), (tools, PYTHON + more + BUILD + for_pip)):
        if not _buildah("images", "--quiet", "--filter", f"reference=localhost/{name}"):
            _base(name, suite, packages)
    revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=TREE, text=True).strip()
    arguments = {"BASE_IMAGE": f"localhost/{base}", "BUILD_IMAGE": f"localhost/{tools}", "REVISION": revision}
    given = [text for name, value in arguments.items() for text in ("--build-arg", f"{name}={value}")]
    _buildah(
        *("bud", "--isolation", "chroot", "--layers", "--timestamp", "0", *given, "--tag", NAME),
        *("--file", "deploy/docker/Dockerfile", "."),
    )


def _base(name: str, suite: str, packages: tuple[str, ...]) -> None:
    root = KEPT / f"{name}.tar"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(packages)}", suite, root], check=True
    )
    container = _buildah("from", "scratch")
    _buildah("add", "--quiet", container, str(root), "/")
    if set(BUILD) <= set(packages):
        for path in filter(Path.exists, _OF_PIP):
            _buildah("add", "--quiet", container, str(path), str(path))
    _buildah("commit", "--rm", "--quiet", container, f"localhost/{name}")
    root.unlink()


def layers() -> list[Layer]:
    """Return the layers of the image, the base first."""
    shutil.rmtree(_OCI, ignore_errors=True)
    _buildah("push", "--quiet", NAME, f"oci:{_OCI}:latest")
    index = json.loads((_OCI / "index.json").read_text())
    manifest = _blob(index["manifests"][0]["digest"])
    made_by = [
        step["created_by"] for step in _blob(manifest["config"]["digest"])["history"] if "empty_layer" not in step
    ]
    return [_layer(*each) for each in zip(made_by, manifest["layers"], strict=True)]


def _layer(made_by: str, described: dict[str, Any]) -> Layer:
    path = _path(described["digest"])
    files, records, unpacked = {}, {}, 0
    with tarfile.open(path) as tar:
        for member in tar:
            files[member.name] = member.size
            if member.name.endswith(".dist-info/RECORD") and (record := tar.extractfile(member)):
                records[Path(member.name).parent.name.split("-")[0]] = record.read().decode()
        unpacked = tar.offset
    return Layer(made_by, unpacked, path.stat().st_size, files, records, path)


def dependencies(layer: Layer) -> dict[str, int]:
    """Return the bytes of each distribution in a layer, the largest first."""
    sizes: Counter[str] = Counter()
    for name, record in layer.records.items():
        for path, *_ in csv.reader(io.StringIO(record)):
            at = f"opt/resumed/{path}"
            # Sources are deleted, and their compiled files remain.
            sizes[name] += layer.files.get(at, 0) + layer.files.get(f"{at}c", 0)
    return dict(sizes.most_common())


def report(*, markdown: bool = False) -> str:
    """Return two tables: the size of each layer and of each dependency."""
    base, *own = layers()
    rows = [
        ("base (Python, for this test)", base.bytes, base.compressed),
        *zip(
            ("dependencies", "resumed", "SBOM", "directory of sessions"),
            (each.bytes for each in own),
            (each.compressed for each in own),
            strict=True,
        ),
        ("all but the base", sum(each.bytes for each in own), sum(each.compressed for each in own)),
    ]
    tables: list[list[Any]] = [
        [("layer", "MB", "MB as pulled"), *((name, _mb(size), _mb(pulled)) for name, size, pulled in rows)]
    ]
    costs = dependencies(own[0])
    tables.append([("dependency", "MB"), *((name, _mb(size)) for name, size in costs.items() if size >= 100_000)])
    tables[1].append(("the others", _mb(sum(size for size in costs.values() if size < 100_000))))
    return "\n\n".join(_table(table, markdown=markdown) for table in tables)


def _table(rows: list[Any], *, markdown: bool) -> str:
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n".join(
        "".join(f"{cell:<32}" if not column else f"{cell:>14}" for column, cell in enumerate(row)) for row in rows
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _path(digest: str) -> Path:
    return _OCI / "blobs" / digest.replace(":", "/")


def _blob(digest: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(_path(digest).read_bytes())
    return parsed


def _buildah(*arguments: str) -> str:
    return subprocess.check_output(["buildah", *STORAGE, *arguments], cwd=TREE, text=True).strip()


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("building without a container engine takes root; with one: see the head of deploy/docker/Dockerfile")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="bookworm", help="of Debian (default: bookworm)")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    build(options.suite)
    print(f"{NAME}, {options.suite}, {platform.machine()}\n\n{report(markdown=options.markdown)}")  # noqa: T201
