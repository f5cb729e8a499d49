"""`resumed purge` and `resumed stats` from the operator's view."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from resumed import StoreClient
from resumed_server.cli.admin import purge
from resumed_server.errors import UserError
from support.command import called
from support.mtls import Authority, Files, grant
from support.server import PATIENCE, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.server import RunningServer

RESUMED = (sys.executable, "-m", "resumed_server")
KEYS = [b"%d" % number for number in range(3)]


WIDE = {"COLUMNS": "140"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def store(server: RunningServer) -> Iterator[StoreClient]:
    """A namespace with three sessions, one of them an hour old."""
    with closing(StoreClient(server.target, namespace=os.urandom(8).hex(), deadline=PATIENCE)) as store:
        for key, age in zip(KEYS, (3_600.0, 0.0, 0.0), strict=True):
            store.put(key, b"value", 60.0, issued=time.time() - age)
        yield store


def left(store: StoreClient) -> int:
    """Return how many of the sessions are there."""
    return sum(store.get(key) is not None for key in KEYS)


def answering(answer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command at a terminal where the user types an answer."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer.encode() + b"\n")
        return subprocess.run(
            [*RESUMED, *arguments],
            stdin=theirs, capture_output=True, text=True, timeout=60, check=False, env=os.environ | WIDE,
        )  # fmt: skip
    finally:
        os.close(ours)
        os.close(theirs)


def test_purge_asks_first_and_says_what_it_did(store: StoreClient) -> None:
    done = answering("n", "purge", store.target, store.namespace)
    assert done.returncode == 130
    assert f"Purge all sessions of {store.namespace} (3 sessions)?" in done.stdout
    assert left(store) == 3
    done = answering("y", "purge", store.target, store.namespace)
    assert done.returncode == 0, done
    assert f"{store.namespace}: no session issued before 2" in done.stdout
    assert "within 4 s" in done.stdout
    assert left(store) == 0


def test_where_nobody_can_be_asked_it_takes_yes(store: StoreClient) -> None:
    done = called("purge", store.target, store.namespace)
    assert (done.returncode, done.stderr) == (
        2,
        "resumed: nothing was purged: give --yes, since standard input is not a terminal\n",
    )
    assert left(store) == 3
    assert called("purge", store.target, store.namespace, "--yes").returncode == 0
    assert left(store) == 0


@pytest.mark.parametrize("ago", [True, False])
def test_before_spares_what_was_issued_since(store: StoreClient, ago: bool) -> None:
    moment = "30m" if ago else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 1_800))
    purge(store.target, [store.namespace], before=moment, yes=True)
    assert left(store) == 2


@pytest.mark.parametrize("moment", ["", "yesterday", "2026-11-25", "2026-11-25T10:00:00", "2 fortnights", "-3h"])
def test_a_time_that_is_none_is_refused(store: StoreClient, moment: str) -> None:
    """A time without a zone is ambiguous."""
    with pytest.raises(UserError, match=f"--before: '{moment}' is neither a duration"):
        purge(store.target, [store.namespace], before=moment, yes=True)
    assert left(store) == 3


def test_stats_are_a_table_or_json(store: StoreClient) -> None:
    store.remove(KEYS[0])
    done = called("stats", store.target, store.namespace, "nothing", "--json")
    expected = {"sessions": 2, "value_bytes": 10, "tombstones": 1, "purged": 0, "issued_before": None}
    nothing = dict.fromkeys(expected, 0) | {"issued_before": None}
    assert json.loads(done.stdout) == {store.namespace: expected, "nothing": nothing}
    purge(store.target, [store.namespace], before="10m", yes=True)
    done = called("stats", store.target, env=WIDE)
    (row,) = [line.replace(" ", "").split("│")[1:-1] for line in done.stdout.splitlines() if store.namespace in line]
    assert row[:5] == [store.namespace, "2", "10", "1", "0"]
    assert row[5].endswith("Z")


def test_what_the_store_refuses_is_a_line_with_what_to_do(server: RunningServer, tmp_path: Path) -> None:
    done = called("purge", server.target, "Shop", "--yes")
    assert done.returncode == 1
    assert "resumed: Shop is not purged, or only in part: INVALID_ARGUMENT: namespace must be" in done.stderr
    done = called("stats", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.endswith("; try again until it succeeds\n")
    assert called("stats", server.target, "--ca", str(tmp_path / "none")).returncode == 2

    authority = Authority()
    grants = grant("spiffe://example.org/operator", ["shop"], ["stats", "purge"])
    files = Files(tmp_path).write(authority.server(), authority.pem, grants)
    operator = authority.issue("spiffe://example.org/operator")
    (tmp_path / "operator.pem").write_bytes(operator.certificate + operator.key)
    identity = ["--ca", str(tmp_path / "ca.crt"), "--cert", str(tmp_path / "operator.pem")]
    identity += ["--server-name", "localhost"]
    with running_server(*files.options) as secured:
        done = called("purge", secured.target, "shop", "pay", "--yes", *identity)
        assert done.returncode == 1
        assert "shop: no session issued before" in done.stdout
        assert "pay is not purged" in done.stderr
        assert done.stderr.endswith("; add a grant (resumed serve --grants)\n")
