"""The LMDB engine: the contract of every engine, and a database file that processes share."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import pytest
from structlog.testing import capture_logs

from resumed_server.storage.engine import (
    EngineUnavailable,
    Get,
    Put,
    StoredSession,
    Take,
)
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.registry import open_engine, verify_url
from resumed_server.storage.testing.contract import EngineContract
from resumed_server.storage.testing.fixtures import FakeClock, read_all_changes
from resumed_server.storage.testing.state_machine import check_histories
from support.lmdb import raw_values
from support.lmdb_engine import (
    MEBIBYTE,
    PATIENCE,
    ROOMY,
    assert_refused,
    continue_together,
    is_removed,
    start_process,
    write_garbage,
)
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
NOBODY = 65_534


class TestLmdb(EngineContract):
    @pytest.fixture
    def engine(self, clock: FakeClock) -> Iterator[LmdbEngine]:
        engine = LmdbEngine(None, capacity=ROOMY, clock=clock)
        yield engine
        engine.close()

    @pytest.fixture
    def raw_values(self, engine: LmdbEngine) -> Callable[[], dict[tuple[str, bytes], bytes]]:
        return lambda: raw_values(engine)

    @pytest.fixture
    def kept(self) -> tuple[int, int]:
        """The log keeps one change for every 2 KiB of capacity."""
        return ROOMY // 2_048, ROOMY // 2_048


def test_in_any_history_it_behaves_like_a_dictionary() -> None:
    check_histories(lambda clock: LmdbEngine(None, capacity=ROOMY, clock=clock))


# --- Restarts --------------------------------------------------------------------------------------------------------


def test_sessions_and_tombstones_survive_a_restart(open_lmdb: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    """With their expiries, and without a warning in the log."""
    engine = open_lmdb()
    for key in (b"kept", b"taken", b"removed"):
        engine.put("shop", key, b"value", 60.0)
    engine.take("shop", b"taken")
    engine.remove("shop", b"removed")
    engine.remove("shop", b"unknown")
    engine.close()
    clock.advance(20.0)
    with capture_logs() as logged:
        engine = open_lmdb()
    assert not logged
    assert engine.get("shop", b"kept") == StoredSession(b"value", 40.0)
    assert all(is_removed(engine, key) for key in (b"taken", b"removed", b"unknown"))
    clock.advance(40.0)
    assert engine.sweep(10) == 4


WRITER = """
engine, first = LmdbEngine(path, capacity=64 << 20), int(sys.argv[2])
for number in range(first, first + 1_000_000):
    engine.put("shop", b"%d" % number, b"value", 600.0)
    tell("put", number)
    if number % 3 == 0:
        engine.take("shop", b"%d" % number)
        tell("took", number)
"""


def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    said: list[list[str]] = []
    for turn in range(3):
        with start_process(WRITER, tmp_path / "db", turn * 1_000_000) as process:
            assert process.stdout
            said += [process.stdout.readline().split() for _ in range(300)]
            process.kill()
            said += [line.split() for line in process.stdout if line.endswith("\n")]
    taken = {number for verb, number in said if verb == "took"}
    with capture_logs() as logged, contextlib.closing(LmdbEngine(tmp_path / "db", capacity=ROOMY)) as engine:
        # The last of a turn may have been taken without a chance to say so.
        unsaid = {number for _, number in (said[at] for at in range(len(said)) if _last_of_turn(said, at))}
        for number in {number for verb, number in said if verb == "put"} - taken - unsaid:
            assert engine.get("shop", number.encode()), f"{number} was lost"
        assert all(is_removed(engine, number.encode()) for number in taken)
    assert not logged


def _last_of_turn(said: list[list[str]], at: int) -> bool:
    return at + 1 == len(said) or int(said[at + 1][1]) // 1_000_000 != int(said[at][1]) // 1_000_000


# --- Several processes -----------------------------------------------------------------------------------------------

OPENER = """
tell("ready"), input()
engine = LmdbEngine(path, capacity=64 << 20)
for number in range(200):
    engine.put("shop", b"%b %d" % (sys.argv[2].encode(), number), b"v" * 2_000, 600.0)
tell("done"), input()
found = [engine.get("shop", b"%d %d" % (peer, number)) for peer in range(3) for number in range(200)]
tell(sum(each is not None for each in found))
engine.close()
"""

TAKER = """
engine = LmdbEngine(path, capacity=64 << 20)
tell("ready"), input()
keys = [b"%d" % number for number in range(1_000)]
got = [key for key in keys[:500] if engine.take("shop", key)]
got += [key for key, each in zip(keys[500:], engine.batch([Take("shop", key) for key in keys[500:]])) if each]
tell(*map(bytes.decode, got))
engine.close()
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_open_at_once_share_one_database(tmp_path: Path, *, damaged: bool) -> None:
    """The last one to close removes the in-use file."""
    if damaged:
        (tmp_path / "db").mkdir()
        write_garbage(tmp_path / "db")
    with contextlib.ExitStack() as held:
        processes = [held.enter_context(start_process(OPENER, tmp_path / "db", number)) for number in range(3)]
        assert [process.stdout.readline().strip() for process in processes if process.stdout] == ["ready"] * 3
        assert continue_together(processes) == ["done"] * 3
        assert continue_together(processes) == ["600"] * 3
    files = Counter(path.name.partition(".set-aside")[0] for path in (tmp_path / "db").iterdir())
    assert files == {"data.mdb": 1 + damaged, "lock.mdb": 1, "opening": 1}


def test_takes_raced_by_processes_return_each_session_once(tmp_path: Path) -> None:
    with contextlib.closing(LmdbEngine(tmp_path / "db", capacity=ROOMY)) as engine:
        engine.batch([Put("shop", b"%d" % number, b"value", 600.0) for number in range(1_000)])
    with contextlib.ExitStack() as held:
        processes = [held.enter_context(start_process(TAKER, tmp_path / "db")) for _ in range(3)]
        assert [process.stdout.readline().strip() for process in processes if process.stdout] == ["ready"] * 3
        handed_out = Counter(key for line in continue_together(processes) for key in line.split())
    assert handed_out == Counter(str(number) for number in range(1_000))


def test_one_process_cannot_open_a_database_twice(open_lmdb: Callable[..., LmdbEngine]) -> None:
    engine = open_lmdb()
    with pytest.raises(EngineUnavailable, match="already open in this process"):
        open_lmdb()
    engine.put("shop", b"k", b"value", 60.0)
    assert engine.get("shop", b"k")


LOCK_HOLDER = """
import sys
import lmdb
with lmdb.open(sys.argv[1], max_dbs=5, create=False) as env, env.begin(write=True):
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_while_another_process_keeps_all_from_writing_no_probe_passes(
    open_lmdb: Callable[..., LmdbEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resumed_server.storage.call_gate.PATIENCE", 0.05)
    probed, removed = open_lmdb(), open_lmdb(tmp_path / "other")
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(start_writer(tmp_path / name)) for name in ("db", "other")]
        threads = [
            threading.Thread(target=probed.probe, daemon=True),
            threading.Thread(target=lambda: removed.remove("shop", b"k"), daemon=True),
        ]
        for thread in threads:
            thread.start()
        until(lambda: bool(removed._gate._running))
        with capture_logs() as logs:
            removed.close()
        assert [line["event"] for line in logs] == ["the database stays open: a running call does not end"]
        assert all(thread.is_alive() for thread in threads)
        for writer in writers:
            writer.communicate()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def start_writer(path: Path) -> subprocess.Popen[str]:
    """Start a process that is amid a write until it can read no more."""
    command = [sys.executable, "-c", LOCK_HOLDER, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("back", [0.0, 0.5, 1_800.0])
def test_a_purge_ends_earlier_sessions_independent_of_the_clock(
    open_lmdb: Callable[..., LmdbEngine], clock: FakeClock, back: float
) -> None:
    """A clock that is set back must not bring purged sessions back, nor hide later ones."""
    engine = open_lmdb()
    engine.put("shop", b"k", b"value", 7_200.0)
    clock.advance(-back)
    engine.purge("shop", None)
    for _ in range(2):
        assert engine.get("shop", b"k") is None
        assert engine.take("shop", b"k") is None
        assert engine.batch([Get("shop", b"k"), Take("shop", b"k")]) == [None, None]
        assert engine.usage("shop")["shop"].sessions == 0
        engine.close()
        engine = open_lmdb()
    clock.advance(0.01)
    engine.put("shop", b"new", b"value", 60.0)
    engine.purge("shop", clock() - 60.0)
    assert engine.get("shop", b"new")


def test_a_log_that_is_kept_longer_has_no_gap(open_lmdb: Callable[..., LmdbEngine]) -> None:
    engine = open_lmdb(capacity=MEBIBYTE)
    engine.put("shop", b"victim", b"value", 60.0)
    position = engine.position()
    engine.remove("shop", b"victim")
    for number in range(600):
        engine.put("shop", b"%d" % number, b"value", 60.0)
    later = engine.position()
    engine.put("shop", b"last", b"value", 60.0)
    engine.close()
    engine = open_lmdb(capacity=ROOMY)
    assert engine.changes(position, engine.position(), 2_000) is None
    assert read_all_changes(engine, later)[0] == {("shop", b"last"): [b"value"]}


def test_a_log_that_is_kept_shorter_is_trimmed(open_lmdb: Callable[..., LmdbEngine]) -> None:
    engine = open_lmdb(capacity=ROOMY)
    for number in range(700):
        engine.put("shop", b"%d" % number, b"value", 60.0)
    engine.close()
    engine = open_lmdb(capacity=MEBIBYTE)
    for number in range(100):
        engine.remove("shop", b"%d" % number)
    assert engine._read(lambda txn: txn.stat(engine._changes._table)["entries"]) == MEBIBYTE // 2_048 + 1


def test_close_waits_for_the_calls_under_way(open_lmdb: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    """LMDB crashes when it is closed during a call."""
    engine = open_lmdb()
    engine.put("shop", b"k", b"value", 60.0)
    inside, go_on = threading.Event(), threading.Event()
    ended: list[StoredSession | None] = []

    def stopped_clock() -> float:
        inside.set()
        go_on.wait(PATIENCE)
        return clock()

    def look_up() -> None:
        ended.append(engine.get("shop", b"k"))

    def close() -> None:
        engine.close()
        ended.append(None)

    engine._clock = stopped_clock
    threads = [threading.Thread(target=look_up), threading.Thread(target=close)]
    threads[0].start()
    assert inside.wait(PATIENCE)
    threads[1].start()
    threads[1].join(0.1)
    assert not ended
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert ended == [StoredSession(b"value", 60.0), None]


# --- Files and URLs --------------------------------------------------------------------------------------------------


def test_only_its_user_can_read_a_database(open_lmdb: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        open_lmdb()
    finally:
        os.umask(umask)
    assert oct((tmp_path / "db").stat().st_mode) == "0o40700"
    modes = {path.name: oct(path.stat().st_mode) for path in (tmp_path / "db").iterdir()}
    assert modes == dict.fromkeys(("data.mdb", "lock.mdb", "in-use", "opening"), "0o100600")


def test_a_private_database_goes_with_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, other = (open_engine("lmdb:", capacity=ROOMY) for _ in range(2))
    assert [oct(path.stat().st_mode) for path in tmp_path.iterdir()] == ["0o40700"] * 2
    one.put("shop", b"k", b"value", 60.0)
    assert other.get("shop", b"k") is None
    one.close()
    other.close()
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "exists")
    assert_refused(tmp_path / "file" / "db", "Not a directory")
    assert_refused(Path("/proc/nope"), "No such file or directory")
    monkeypatch.setattr("tempfile.tempdir", "/proc/nope")
    assert_refused(None, "No such file or directory")


def test_a_directory_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir(mode=0o500)
    user = os.geteuid()
    if not user:
        os.seteuid(NOBODY)
    try:
        assert_refused(tmp_path / "db", "Permission denied")
    finally:
        os.seteuid(user)


def test_a_database_that_another_container_uses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutex belongs to a process that is not visible in this PID namespace."""

    def locked(*_: object, **__: object) -> None:
        raise lmdb.Error("mdb_txn_begin: Resource temporarily unavailable")

    monkeypatch.setattr("resumed_server.storage.lmdb.database_directory.lmdb.open", locked)
    assert_refused(tmp_path / "db", "another container")


@pytest.mark.parametrize("url", ["lmdb:", "lmdb:///var/lib/resumed", "lmdb:///a%20b/%C3%A4"])
def test_urls_that_name_an_engine_are_accepted_unopened(url: str) -> None:
    verify_url(url)


@pytest.mark.parametrize(
    "url",
    ["", "/var/lib/x", "x", "mysql://x", "file:///x", "lmdb", "lmdb:x", "lmdb:/x", "lmdb://x", "lmdb://x/y", "lmdb:///",
     "lmdb:////", "lmdb://[", "lmdb:///a%00b", "lmdb:///a\0b"],
)  # fmt: skip
def test_urls_that_name_none_are_refused_with_what_to_do(url: str) -> None:
    for function in (verify_url, lambda url: open_engine(url, capacity=ROOMY)):
        with pytest.raises(ValueError, match=re.escape("use lmdb: or lmdb:///path/to/directory")):
            function(url)


def test_a_url_may_quote_its_path(tmp_path: Path) -> None:
    with contextlib.closing(open_engine(f"lmdb://{tmp_path}/a%20b", capacity=ROOMY)):
        assert (tmp_path / "a b" / "data.mdb").exists()
