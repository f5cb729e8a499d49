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
from support.command import run_command
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
    assert "(3 sessions before the purge)" in done.stdout
    assert "within 4 s" in done.stdout
    assert left(store) == 0


def test_without_a_terminal_it_needs_yes(store: StoreClient) -> None:
    done = run_command("purge", store.target, store.namespace)
    assert (done.returncode, done.stderr) == (
        2,
        "resumed: nothing was purged: give --yes, since standard input is not a terminal\n",
    )
    assert left(store) == 3
    assert run_command("purge", store.target, store.namespace, "--yes").returncode == 0
    assert left(store) == 0


def test_a_namespace_without_sessions_is_purged_only_by_force(store: StoreClient) -> None:
    """Its name may be misspelt; then no other namespace of the command is purged either."""
    misspelt = f"{store.namespace}x"
    done = run_command("purge", store.target, store.namespace, misspelt, "--yes")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"resumed: nothing was purged: {misspelt}: no such sessions; correct the name")
    assert left(store) == 3
    done = run_command("purge", store.target, store.namespace, misspelt, "--yes", "--force")
    assert done.returncode == 0
    assert f"{misspelt}: no session issued before" in done.stdout
    assert "(0 sessions before the purge)" in done.stdout
    assert left(store) == 0


def test_a_pattern_purges_all_namespaces_that_it_matches(store: StoreClient) -> None:
    with closing(StoreClient(store.target, namespace=f"{store.namespace}.eu", deadline=PATIENCE)) as other:
        other.put(b"key", b"value", 60.0)
        done = run_command("purge", store.target, f"{store.namespace}.*", "--yes", "--json")
        (row,) = json.loads(done.stdout)
        assert (row["namespace"], row["sessions"], row["problem"], row["status"]) == (other.namespace, 1, "", 0)
        assert row["issued_before"].endswith("Z")
        assert (left(store), other.get(b"key")) == (3, None)
        assert run_command("purge", store.target, f"{store.namespace}.u*", "--yes").returncode == 2
        other.put(b"again", b"value", 60.0)
        rows = json.loads(run_command("purge", store.target, f"{store.namespace}*", "--yes", "--json").stdout)
        assert {row["namespace"]: row["sessions"] for row in rows} == {store.namespace: 3, other.namespace: 1}
        assert (left(store), other.get(b"again")) == (0, None)


def test_a_star_purges_all_namespaces() -> None:
    with running_server() as server:
        stores = [StoreClient(server.target, namespace=name, deadline=PATIENCE) for name in ("shop", "pay")]
        for store in stores:
            store.put(b"key", b"value", 60.0)
        assert run_command("purge", server.target, "*", "--yes").returncode == 0
        assert [store.get(b"key") for store in stores] == [None, None]
        for store in stores:
            store.close()


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
    done = run_command("stats", store.target, store.namespace, "nothing", "--json")
    expected = {"sessions": 2, "value_bytes": 10, "tombstones": 1, "purged": 0, "issued_before": None}
    nothing = dict.fromkeys(expected, 0) | {"issued_before": None}
    assert json.loads(done.stdout) == {store.namespace: expected, "nothing": nothing}
    purge(store.target, [store.namespace], before="10m", yes=True)
    done = run_command("stats", store.target, env=WIDE)
    (row,) = [line.replace(" ", "").split("│")[1:-1] for line in done.stdout.splitlines() if store.namespace in line]
    assert row[:5] == [store.namespace, "2", "10", "1", "0"]
    assert row[5].endswith("Z")


def test_a_rejection_by_the_store_is_one_line_with_a_remedy(server: RunningServer, tmp_path: Path) -> None:
    done = run_command("stats", "127.0.0.1:1")
    assert done.returncode == 3
    assert done.stderr.startswith("resumed: the sessions were not counted: no process listens there (UNAVAILABLE: ")
    assert done.stderr.endswith("; start the store (`resumed serve`), or correct the address\n")
    assert run_command("stats", server.target, "--ca", str(tmp_path / "none")).returncode == 2

    authority = Authority()
    grants = grant("spiffe://example.org/operator", ["shop"], ["stats", "purge"])
    files = Files(tmp_path).write(authority.server(), authority.pem, grants)
    operator = authority.issue("spiffe://example.org/operator")
    (tmp_path / "operator.pem").write_bytes(operator.certificate + operator.key)
    identity = ["--ca", str(tmp_path / "ca.crt"), "--cert", str(tmp_path / "operator.pem")]
    identity += ["--server-name", "localhost"]
    with running_server(*files.options) as secured:
        done = run_command("purge", secured.target, "shop", "pay", "--yes", "--force", *identity)
        assert done.returncode == 1
        assert "shop: no session issued before" in done.stdout
        assert "pay is not purged" in done.stderr
        assert done.stderr.endswith(
            "; add one to the store's grants file; `resumed grants check` explains its decisions\n"
        )
        done = run_command("purge", secured.target, "shop*", "--yes", *identity)
        assert done.returncode == 1
        assert "nothing was purged, since the sessions cannot be counted: no grant allows this" in done.stderr
