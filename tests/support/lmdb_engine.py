"""LMDB engines for tests: sizes, processes that share a database, and damage."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resumed_server.storage.engine import AlreadyExists, EngineUnavailable
from resumed_server.storage.lmdb.engine import LmdbEngine

ROOMY = 64 << 20
MEBIBYTE = 1 << 20
PATIENCE = 30.0
"""Upper bound in seconds for another process to react."""


def is_removed(engine: LmdbEngine, key: bytes) -> bool:
    """Return whether the session of `key` is missing and cannot be stored again."""
    try:
        engine.put("shop", key, b"late", 60.0)
    except AlreadyExists:
        return engine.get("shop", key) is None
    return False


SCRIPT = """
import structlog, sys
from pathlib import Path
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
from resumed_server.storage.lmdb.engine import LmdbEngine
from support.lmdb import raw_values
from support.waiting import until
from resumed_server.storage.engine import *
tell = lambda *words: print(*words, flush=True)
path = Path(sys.argv[1])
"""


def start_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run `script` in a process of its own."""
    command = [sys.executable, "-c", SCRIPT + script, *map(str, arguments)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def continue_together(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Let all `processes` continue at once, and return the next line of each."""
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes if process.stdout]


def write_garbage(directory: Path) -> None:
    (directory / "data.mdb").write_bytes(random.Random(1).randbytes(100_000))


def assert_refused(path: Path | None, cause: str) -> None:
    """Check that no database can be at `path`, and that the error says so in one line."""
    with pytest.raises(EngineUnavailable) as refused:
        LmdbEngine(path, capacity=ROOMY)
    assert re.fullmatch(
        rf"cannot use /\S+ for the database: .*{cause}.*; free it or choose another", str(refused.value)
    )
