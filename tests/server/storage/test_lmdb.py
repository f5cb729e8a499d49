"""The LMDB engine: the contract of every engine, and a database file that processes share."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import pytest
from structlog.testing import capture_logs

from resumed_server.storage.engine import (
    AlreadyExists,
    EngineFull,
    EngineUnavailable,
    Get,
    Operation,
    Put,
    Remove,
    StoredSession,
    Take,
)
from resumed_server.storage.lmdb import engine as embedded
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.registry import open_engine, verify_url
from resumed_server.storage.testing.contract import EngineContract, FakeClock, read_all_changes, read_removals
from resumed_server.storage.testing.state_machine import check_histories
from support.lmdb import raw_values
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOMY = 64 << 20
MEBIBYTE = 1 << 20
NOBODY = 65_534
PATIENCE = 30.0
"""Upper bound in seconds for another process to react."""


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


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def opened(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., LmdbEngine]]:
    with contextlib.ExitStack() as held:

        def opened(path: Path = tmp_path / "db", *, capacity: int = ROOMY) -> LmdbEngine:
            return held.enter_context(contextlib.closing(LmdbEngine(path, capacity=capacity, clock=clock)))

        yield opened


def gone(engine: LmdbEngine, key: bytes) -> bool:
    """Return whether the session of `key` is missing and cannot be stored again."""
    try:
        engine.put("shop", key, b"late", 60.0)
    except AlreadyExists:
        return engine.get("shop", key) is None
    return False


# --- Restarts --------------------------------------------------------------------------------------------------------


def test_sessions_and_tombstones_survive_a_restart(opened: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    """With their expiries, and without a warning in the log."""
    engine = opened()
    for key in (b"kept", b"taken", b"removed"):
        engine.put("shop", key, b"value", 60.0)
    engine.take("shop", b"taken")
    engine.remove("shop", b"removed")
    engine.remove("shop", b"unknown")
    engine.close()
    clock.advance(20.0)
    with capture_logs() as logged:
        engine = opened()
    assert not logged
    assert engine.get("shop", b"kept") == StoredSession(b"value", 40.0)
    assert all(gone(engine, key) for key in (b"taken", b"removed", b"unknown"))
    clock.advance(40.0)
    assert engine.sweep(10) == 4


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

WRITER = """
engine, first = LmdbEngine(path, capacity=64 << 20), int(sys.argv[2])
for number in range(first, first + 1_000_000):
    engine.put("shop", b"%d" % number, b"value", 600.0)
    tell("put", number)
    if number % 3 == 0:
        engine.take("shop", b"%d" % number)
        tell("took", number)
"""


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run `script` in a process of its own."""
    command = [sys.executable, "-c", SCRIPT + script, *map(str, arguments)]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    said: list[list[str]] = []
    for turn in range(3):
        with child(WRITER, tmp_path / "db", turn * 1_000_000) as process:
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
        assert all(gone(engine, number.encode()) for number in taken)
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


def in_step(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Let all `processes` continue at once, and return the next line of each."""
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes if process.stdout]


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_open_at_once_share_one_database(tmp_path: Path, *, damaged: bool) -> None:
    """The last one to close removes the in-use file."""
    if damaged:
        (tmp_path / "db").mkdir()
        garbage(tmp_path / "db")
    with contextlib.ExitStack() as held:
        processes = [held.enter_context(child(OPENER, tmp_path / "db", number)) for number in range(3)]
        assert [process.stdout.readline().strip() for process in processes if process.stdout] == ["ready"] * 3
        assert in_step(processes) == ["done"] * 3
        assert in_step(processes) == ["600"] * 3
    files = Counter(path.name.partition(".set-aside")[0] for path in (tmp_path / "db").iterdir())
    assert files == {"data.mdb": 1 + damaged, "lock.mdb": 1, "opening": 1}


def test_of_takes_raced_by_processes_each_session_is_handed_out_once(tmp_path: Path) -> None:
    with contextlib.closing(LmdbEngine(tmp_path / "db", capacity=ROOMY)) as engine:
        engine.batch([Put("shop", b"%d" % number, b"value", 600.0) for number in range(1_000)])
    with contextlib.ExitStack() as held:
        processes = [held.enter_context(child(TAKER, tmp_path / "db")) for _ in range(3)]
        assert [process.stdout.readline().strip() for process in processes if process.stdout] == ["ready"] * 3
        handed_out = Counter(key for line in in_step(processes) for key in line.split())
    assert handed_out == Counter(str(number) for number in range(1_000))


def test_one_process_cannot_open_a_database_twice(opened: Callable[..., LmdbEngine]) -> None:
    engine = opened()
    with pytest.raises(EngineUnavailable, match="already open in this process"):
        opened()
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
    opened: Callable[..., LmdbEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resumed_server.storage.call_gate.PATIENCE", 0.05)
    probed, removed = opened(), opened(tmp_path / "other")
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writing(tmp_path / name)) for name in ("db", "other")]
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


def writing(path: Path) -> subprocess.Popen[str]:
    """Start a process that is amid a write until it can read no more."""
    command = [sys.executable, "-c", LOCK_HOLDER, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("back", [0.0, 0.5, 1_800.0])
def test_a_purge_ends_what_was_stored_before_it_whatever_the_clock_says(
    opened: Callable[..., LmdbEngine], clock: FakeClock, back: float
) -> None:
    """A clock that is set back must not bring purged sessions back, nor hide later ones."""
    engine = opened()
    engine.put("shop", b"k", b"value", 7_200.0)
    clock.advance(-back)
    engine.purge("shop", None)
    for _ in range(2):
        assert engine.get("shop", b"k") is None
        assert engine.take("shop", b"k") is None
        assert engine.batch([Get("shop", b"k"), Take("shop", b"k")]) == [None, None]
        assert engine.usage("shop")["shop"].sessions == 0
        engine.close()
        engine = opened()
    clock.advance(0.01)
    engine.put("shop", b"new", b"value", 60.0)
    engine.purge("shop", clock() - 60.0)
    assert engine.get("shop", b"new")


def test_a_log_that_is_kept_longer_has_no_gap(opened: Callable[..., LmdbEngine]) -> None:
    engine = opened(capacity=MEBIBYTE)
    engine.put("shop", b"victim", b"value", 60.0)
    position = engine.position()
    engine.remove("shop", b"victim")
    for number in range(600):
        engine.put("shop", b"%d" % number, b"value", 60.0)
    later = engine.position()
    engine.put("shop", b"last", b"value", 60.0)
    engine.close()
    engine = opened(capacity=ROOMY)
    assert engine.changes(position, engine.position(), 2_000) is None
    assert read_all_changes(engine, later)[0] == {("shop", b"last"): [b"value"]}


def test_a_log_that_is_kept_shorter_is_trimmed(opened: Callable[..., LmdbEngine]) -> None:
    engine = opened(capacity=ROOMY)
    for number in range(700):
        engine.put("shop", b"%d" % number, b"value", 60.0)
    engine.close()
    engine = opened(capacity=MEBIBYTE)
    for number in range(100):
        engine.remove("shop", b"%d" % number)
    assert engine._read(lambda txn: txn.stat(engine._changes._table)["entries"]) == MEBIBYTE // 2_048 + 1


def test_close_waits_for_the_calls_under_way(opened: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    """LMDB crashes when it is closed during a call."""
    engine = opened()
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


# --- Capacity --------------------------------------------------------------------------------------------------------


def test_a_full_store_drops_the_soonest_to_expire_and_no_tombstone(opened: Callable[..., LmdbEngine]) -> None:
    capacity, value = 4 * MEBIBYTE, b"v" * 400
    engine = opened(capacity=capacity)
    tombstones = [b"t%d" % number for number in range(500)]
    engine.batch([Put("shop", key, value, 100.0) for key in tombstones])
    engine.batch([Take("shop", key) for key in tombstones])
    ttls = random.Random(1).sample(range(1_000, 9_000), 6_000)
    survivors = []
    for ttl in ttls:
        engine.put("shop", b"%d" % ttl, value, ttl)
    for number in range(10 * capacity // len(value) // 100):
        engine.batch([Put("shop", b"%d %d" % (number, each), value, 10_000.0) for each in range(100)])
        kept = {ttl for ttl in ttls if engine.get("shop", b"%d" % ttl)}
        assert not kept or kept == set(sorted(ttls)[-len(kept) :]), "not the soonest to expire went"
        survivors.append(len(kept))
        if not kept:
            break
    assert len(set(survivors)) > 10, "they did not go little by little"
    for number in range(10 * capacity // len(value) // 100):
        engine.batch([Put("shop", b"- %d %d" % (number, each), value, 20_000.0) for each in range(100)])
    assert engine.get("shop", b"- %d 99" % number)
    assert all(gone(engine, key) for key in tombstones)
    assert (engine._directory.path / "data.mdb").stat().st_blocks * 512 < capacity * 1.5


def test_a_full_store_keeps_pinned_sessions_and_lasting_removals(
    opened: Callable[..., LmdbEngine], clock: FakeClock
) -> None:
    """Until their expiry, although all sessions expire later."""
    engine = opened(capacity=MEBIBYTE)
    pinned = [b"pinned %d" % number for number in range(100)]
    removed = [b"removed %d" % number for number in range(100)]
    engine.batch([Put("shop", key, b"v" * 400, 100.0, None, pinned=True) for key in pinned])
    engine.batch([Remove("shop", key, 100.0) for key in removed])
    for number in range(5_000):
        engine.put("shop", b"%d" % number, b"v" * 400, 600.0)
    assert engine.totals().evicted > 0
    assert all(engine.get("shop", key) for key in pinned)
    assert read_removals(engine, "shop").keys() == set(removed)
    assert all(gone(engine, key) for key in removed)
    evicted = engine.totals().evicted
    clock.advance(100.0)
    for number in range(20):
        engine.put("shop", b"later %d" % number, b"v" * 400, 600.0)
    assert engine.totals().evicted == evicted, "what has expired makes room first"
    assert read_removals(engine, "shop") == {}
    clock.advance(600.0)
    while engine.sweep(100):
        pass
    with engine._env.begin() as txn:
        assert [txn.stat(table)["entries"] for table in engine._directory.tables[:5]] == [0] * 5


def test_a_store_of_nothing_but_pinned_sessions_is_full(opened: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    engine = opened(capacity=MEBIBYTE)
    puts = [Put("shop", b"%d" % number, b"v" * 1_000, 60.0, None, pinned=True) for number in range(2_000)]
    outcomes = engine.batch(puts)
    stored = [outcome for outcome in outcomes if isinstance(outcome, float)]
    assert 500 < len(stored) < 1_500
    assert all(isinstance(outcome, EngineFull) for outcome in outcomes[len(stored) :])
    assert engine.totals().evicted == 0
    assert engine.totals().sessions == len(stored)
    assert engine.remove("shop", b"0", ttl=600.0) is True
    clock.advance(60.0)
    engine.put("shop", b"k", b"value", 60.0)


def test_lasting_removals_survive_a_restart(opened: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    """With pinned sessions and the last purge."""
    engine = opened()
    engine.remove("shop", b"k", ttl=600.0)
    cutoff = engine.purge("shop", None)
    clock.advance(1.0)
    engine.put("shop", b"pinned", b"value", 600.0, pinned=True)
    engine.close()
    engine = opened()
    assert read_removals(engine, "shop") == {b"k": pytest.approx(599.0)}
    assert engine.totals().removals == 1
    purge = engine.last_purge("shop")
    assert purge is not None
    assert (purge.issued_before, purge.time) == (None, cutoff)
    assert engine.get("shop", b"pinned")


def test_the_memory_of_a_reader_does_not_depend_on_the_number_of_lasting_removals(
    opened: Callable[..., LmdbEngine],
) -> None:
    engine = opened()
    for start in range(0, 100_000, 250):
        engine.batch([Remove("shop", b"%032d" % number, 600.0) for number in range(start, start + 250)])
    found = 0
    tracemalloc.start()
    try:
        for part in engine.removals("shop", 1_000):
            found += len(part)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == 100_000
    assert peak < 4 * MEBIBYTE


def test_evictions_are_counted_by_the_database_and_not_by_its_processes(opened: Callable[..., LmdbEngine]) -> None:
    engine = opened(capacity=MEBIBYTE)
    for number in range(3_000):
        engine.put("shop", b"%d" % number, b"v" * 400, 600.0)
    totals = engine.totals()
    assert totals.evicted == 3_000 - totals.sessions > 0
    engine.close()
    assert opened(capacity=MEBIBYTE).totals() == totals


def test_a_full_store_may_be_opened_with_a_smaller_capacity(opened: Callable[..., LmdbEngine]) -> None:
    """The database shrinks gradually, since deletions need free pages as well."""
    engine = opened(capacity=160 * MEBIBYTE)
    for number in range(2_400):
        engine.put("shop", b"%d" % number, b"v" * 65_536, 600.0 + number)
    engine.close()
    engine = opened(capacity=MEBIBYTE)
    for number in range(1_000):
        engine.put("shop", b"new %d" % number, b"v" * 400, 90_000.0)
    assert engine.take("shop", b"2399")
    for number in range(30):
        engine.batch([Put("shop", b"new %d %d" % (number, each), b"v" * 65_536, 90_000.0) for each in range(100)])
    engine.put("shop", b"last", b"v", 90_000.0)
    with engine._env.begin() as txn:
        stats = [txn.stat(table) for table in engine._directory.tables]
    assert sum(stat["leaf_pages"] + stat["overflow_pages"] for stat in stats) * 4_096 < 2 * MEBIBYTE


@pytest.fixture
def buried(clock: FakeClock) -> Iterator[LmdbEngine]:
    """An engine of which half was filled with sessions, and then all with tombstones of unknown keys."""
    with contextlib.closing(LmdbEngine(None, capacity=MEBIBYTE, clock=clock)) as engine:
        for number in range(500):
            engine.put("shop", b"live %d" % number, b"v" * 500, 600.0)
        with pytest.raises(EngineFull):
            remove_forever(engine)
        yield engine


def remove_forever(engine: LmdbEngine) -> None:
    """Remove keys that are not there: 0, 1, 2, ..."""
    for number in range(100_000):
        engine.remove("shop", b"%d" % number)


def test_a_store_of_nothing_but_tombstones_is_full(buried: LmdbEngine, clock: FakeClock) -> None:
    assert not any(buried.get("shop", b"live %d" % number) for number in range(500))
    assert all(gone(buried, b"%d" % number) for number in range(5_000))
    with pytest.raises(EngineFull):
        buried.put("shop", b"k", b"value", 600.0)
    buried.probe()
    clock.advance(60.0)
    buried.put("shop", b"k", b"value", 60.0)
    assert buried.get("shop", b"k")


def test_a_put_without_room_fails_alone_in_its_batch(buried: LmdbEngine) -> None:
    operations: list[Operation] = [
        Remove("shop", b"0"),
        Put("shop", b"k", b"v", 60.0),
        Get("shop", b"k"),
        Put("shop", b"0", b"v", 60.0),
    ]
    outcomes = [type(outcome) for outcome in buried.batch(operations)]
    assert outcomes == [type(None), EngineFull, type(None), AlreadyExists]


def test_a_full_store_can_be_swept(buried: LmdbEngine, clock: FakeClock) -> None:
    """Deletions need free pages, so the engine must reserve some of them."""
    clock.advance(60.0)
    while buried.sweep(100):
        pass
    buried.batch([Put("shop", b"%d" % number, b"v" * 500, 60.0) for number in range(500)])
    assert all(buried.get("shop", b"%d" % number) for number in range(500))


def test_a_file_that_may_not_grow_makes_room_for_large_values(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """A large value needs consecutive pages, which a fragmented database may lack."""
    monkeypatch.setattr(embedded, "_HEADROOM_BYTES", 0)
    with contextlib.closing(LmdbEngine(None, capacity=2 * MEBIBYTE, clock=clock)) as engine:
        chance = random.Random(1)
        for number in range(5_000):
            key, size = b"%d" % number, chance.choice([100, 1_500, 5_000, 65_536])
            engine.put("shop", key, b"v" * size, chance.randrange(1_000, 2_000))
            assert engine.get("shop", key)
            if chance.random() < 0.05:
                engine.take("shop", key)


def test_a_stalled_reader_fills_the_file_and_takes_nothing_with_it(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """LMDB cannot reuse pages that a read transaction can still see."""
    monkeypatch.setattr(embedded, "_HEADROOM_BYTES", 0)
    with contextlib.closing(LmdbEngine(None, capacity=MEBIBYTE, clock=clock)) as engine:
        acknowledged = []
        with engine._env.begin():
            with contextlib.suppress(EngineFull):
                for number in range(10_000):
                    engine.put("shop", b"%d" % number, b"value", 60.0)
                    acknowledged.append(b"%d" % number)
            for call in (engine.take, engine.remove):
                with pytest.raises(EngineFull):
                    call("shop", acknowledged[-1])
            assert all(engine.get("shop", key) for key in acknowledged)
        assert 10 < len(acknowledged) < 9_999
        assert engine.take("shop", acknowledged[-1])
        engine.put("shop", b"k", b"value", 60.0)


# --- Full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("value", [b"v" * 100, b"v" * 30_000])
def test_a_full_disk_refuses_puts_and_loses_nothing(
    small_disk: Path, opened: Callable[..., LmdbEngine], value: bytes
) -> None:
    engine = opened(small_disk / "db")
    (small_disk / "ballast").write_bytes(bytes(2 * MEBIBYTE))
    acknowledged, refused = [], 0
    for number in range(100_000):
        try:
            engine.put("shop", b"%d" % number, value, 60.0)
            acknowledged.append(b"%d" % number)
        except EngineFull:
            refused += 1
            if refused == 50:
                break
    assert refused == 50
    assert all(engine.get("shop", key) for key in acknowledged)
    operations: list[Operation] = [Put("shop", b"big", b"v" * 65_536, 60.0), Get("shop", acknowledged[0])]
    assert [type(outcome) for outcome in engine.batch(operations)] == [EngineFull, StoredSession]
    engine.probe()
    (small_disk / "ballast").unlink()
    engine.put("shop", b"k", value, 60.0)
    engine.close()
    with capture_logs() as logged:
        engine = opened(small_disk / "db")
    assert not logged
    assert all(engine.get("shop", key) for key in [*acknowledged, b"k"])


def test_a_disk_without_room_for_a_database_is_refused(small_disk: Path) -> None:
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(5 * MEBIBYTE))
    assert_refused(small_disk / "db", "No space left on device")


GROWER = """
engine = LmdbEngine(path, capacity=256 << 20)
for number in range(300):
    engine.put("shop", b"large %d" % number, bytes(1 << 18), 600.0)
engine.close()
"""


def test_a_file_that_another_process_let_grow_is_followed(opened: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    engine = opened(capacity=MEBIBYTE)
    engine.put("shop", b"k", b"value", 600.0)
    with child(GROWER, tmp_path / "db") as process:
        assert process.wait(PATIENCE) == 0
    assert (tmp_path / "db/data.mdb").stat().st_size > 128 * MEBIBYTE
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: engine.get("shop", b"k"), range(100)))
    assert [each.value for each in found if each] == [b"value"] * 100
    engine.put("shop", b"new", b"value", 600.0)
    engine.probe()


# --- Damage ----------------------------------------------------------------------------------------------------------


def garbage(directory: Path) -> None:
    (directory / "data.mdb").write_bytes(random.Random(1).randbytes(100_000))


def cut_off(directory: Path) -> None:
    """Leave a fifth of the million bytes that were stored."""
    os.truncate(directory / "data.mdb", 200_000)


def tables_wiped(directory: Path) -> None:
    """Leave the first two pages and nothing that they point to."""
    with (directory / "data.mdb").open("r+b") as file:
        file.seek(8_192)
        file.write(bytes(8 * MEBIBYTE))


def marked_damaged(directory: Path) -> None:
    """A process that finds damage marks the database so."""
    (directory / "damaged").touch()


def in_use_at_another_boot(directory: Path) -> None:
    """The in-use file of a boot that ended in a power failure."""
    (directory / "in-use").write_text("00000000-0000-0000-0000-000000000000")


def in_use_unwritten(directory: Path) -> None:
    """A power failure created the in-use file and lost its content."""
    (directory / "in-use").touch()


def laid_out_otherwise(directory: Path) -> None:
    """A database of a version with another layout."""
    with lmdb.open(str(directory), max_dbs=5) as env, env.begin(write=True) as txn:
        assert txn.put(b"layout", b"0")


CRASHER = """
import os
number = 0
engine = LmdbEngine(path, capacity=64 << 20, quarantine_after_crash=True, clock=lambda: os.abort() if number else 0.0)
for number in range(2):
    engine.put("shop", b"secret %d" % number, b"secret", 60.0)
"""


def crashed(directory: Path) -> None:
    """A process crashed within the engine."""
    with child(CRASHER, directory) as process:
        assert process.wait(PATIENCE) == -signal.SIGABRT


@pytest.mark.parametrize(
    "spoil",
    [
        garbage,
        cut_off,
        tables_wiped,
        marked_damaged,
        crashed,
        in_use_at_another_boot,
        in_use_unwritten,
        laid_out_otherwise,
    ],
)
def test_a_file_that_cannot_be_trusted_is_set_aside_loudly(
    opened: Callable[..., LmdbEngine], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    engine = opened()
    engine.batch([Put("shop", b"%d" % number, b"v" * 1_000, 60.0) for number in range(1_000)])
    engine.close()
    spoil(tmp_path / "db")
    with capture_logs() as logged:
        engine = opened()
    (line,) = logged
    assert (line["log_level"], line["event"]) == ("error", "database quarantined, creating a new one")
    assert Path(line["aside"]).stat().st_size > 0
    assert engine.get("shop", b"1") is None
    engine.put("shop", b"k", b"value", 60.0)
    engine.close()
    with capture_logs() as logged:
        assert opened().get("shop", b"k")
    assert not logged


def test_of_files_set_aside_the_last_is_kept(opened: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    """A failure that repeats must not fill the disk."""
    for _ in range(3):
        opened().close()
        crashed(tmp_path / "db")
        with capture_logs() as logged:
            opened().close()
    kept = sorted(str(path) for path in (tmp_path / "db").glob("data.mdb.set-aside-*"))
    assert kept == [logged[0]["aside"], logged[0]["aside"] + ".crash"]


ABORTED_ELSEWHERE = """
import os
engine = LmdbEngine(path, capacity=64 << 20, quarantine_after_crash=True)
os.abort()
"""


def test_a_process_that_aborts_outside_of_the_engine_condemns_no_database(
    opened: Callable[..., LmdbEngine], tmp_path: Path
) -> None:
    """An abort in gRPC's core does no damage to the database."""
    engine = opened()
    engine.put("shop", b"k", b"value", 600.0)
    for _ in range(2):
        with child(ABORTED_ELSEWHERE, tmp_path / "db") as process:
            assert process.wait(PATIENCE) == -signal.SIGABRT
        engine.probe()
    assert engine.get("shop", b"k")
    crashed(tmp_path / "db")
    with pytest.raises(EngineUnavailable):
        engine.probe()


def test_a_file_cut_off_anywhere_is_found_out_or_harmless(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with contextlib.closing(LmdbEngine(whole, capacity=ROOMY)) as engine:
        for number in range(300):
            engine.put("shop", b"%d" % number, b"%d" % number * 100, 600.0)
        used = engine._env.info()["last_pgno"] + 1
    content = (whole / "data.mdb").read_bytes()[: used * 4_096]
    aside = 0
    for pages in range(used):
        directory = tmp_path / f"{pages}"
        directory.mkdir()
        (directory / "data.mdb").write_bytes(content[: pages * 4_096 + 100])
        with capture_logs() as logged, contextlib.closing(LmdbEngine(directory, capacity=ROOMY)) as engine:
            for number in range(300):
                found = engine.get("shop", b"%d" % number)
                assert found is None or found.value == b"%d" % number * 100
            engine.put("shop", b"k", b"value", 60.0)
        aside += len(logged)
    assert aside > used - 3, "the first two pages hold no session"


def test_free_pages_at_the_end_are_not_taken_for_a_file_cut_off(tmp_path: Path, clock: FakeClock) -> None:
    """LMDB does not write free pages, so the file may end before the last one."""
    chance = random.Random(1)
    for attempt in range(60):
        path, copy = tmp_path / f"{attempt}", tmp_path / f"{attempt} copy"
        with contextlib.closing(LmdbEngine(path, capacity=ROOMY, clock=clock)) as engine:
            engine.put("shop", b"k", b"value", 10_000.0)
            for _ in range(3):
                size = chance.choice([10, 1_500, 5_000])
                keys = [chance.randbytes(32) for _ in range(chance.choice([10, 100, 300]))]
                engine.batch([Put("shop", key, b"v" * size, 60.0) for key in keys])
                clock.advance(60.0)
                engine.sweep(chance.choice([10, 100, 300]))
            subprocess.run(["cp", "-r", "--sparse=always", path, copy], check=True)
        with capture_logs() as logged, contextlib.closing(LmdbEngine(copy, capacity=ROOMY, clock=clock)) as engine:
            assert engine.get("shop", b"k")
        assert not logged


def test_no_driver_error_leaves_a_damaged_database(tmp_path: Path) -> None:
    with contextlib.closing(LmdbEngine(tmp_path / "db", capacity=MEBIBYTE)) as engine:
        engine.batch([Put("shop", b"%d" % number, b"value", 60.0) for number in range(1_000)])
        with engine._env.begin(write=True) as txn:
            txn.drop(engine._sessions, delete=False)
        for number in range(10_000):
            engine.put("shop", b"new %d" % number, b"v" * 100, 600.0)
        shutil.rmtree(tmp_path / "db")
        assert isinstance(engine._translated(lmdb.Error("mdb_txn_commit: Input/output error")), EngineUnavailable)


def test_what_crashed_is_kept_and_tells_nothing_of_any_session(
    opened: Callable[..., LmdbEngine], tmp_path: Path
) -> None:
    crashed(tmp_path / "db")
    opened()
    (crash,) = (tmp_path / "db").glob("data.mdb.set-aside-*.crash")
    assert "in put" in crash.read_text()
    assert "secret" not in crash.read_text()


def test_a_database_is_set_aside_once_all_have_left_it(opened: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    """Otherwise another process would serve sessions that were removed from the new database."""
    with child(
        "engine = LmdbEngine(path, capacity=64 << 20)\ntell(), input()\n"
        "try: engine.probe()\nexcept EngineBroken: tell((path / 'damaged').exists())\nengine.close()\n",
        tmp_path / "db",
    ) as other:
        assert other.stdout
        other.stdout.readline()
        crashed(tmp_path / "db")
        opening = threading.Thread(target=opened)
        opening.start()
        opening.join(0.2)
        assert in_step([other]) == ["True"]
        opening.join(PATIENCE)
    assert list((tmp_path / "db").glob("*.set-aside-*"))


def test_damage_found_while_serving_ends_service_in_every_process(
    opened: Callable[..., LmdbEngine], tmp_path: Path
) -> None:
    engine = opened()
    engine.batch([Put("shop", b"%d" % number, b"v" * 1_000, 60.0) for number in range(1_000)])
    with child(
        'engine = LmdbEngine(path, capacity=64 << 20)\nengine.probe()\ntell("ready"), input()\n'
        "try: engine.probe()\nexcept EngineUnavailable as error: tell(error)\n",
        tmp_path / "db",
    ) as other:
        assert other.stdout
        assert other.stdout.readline().strip() == "ready"
        tables_wiped(tmp_path / "db")
        with capture_logs() as logged:
            for _ in range(2):
                with pytest.raises(EngineUnavailable, match="damaged; a restart"):
                    engine.get("shop", b"1")
        assert [(line["log_level"], line["event"]) for line in logged] == [("critical", "database damaged")]
        with pytest.raises(EngineUnavailable):
            engine.probe()
        assert "damaged" in in_step([other])[0]
    engine.close()
    with capture_logs() as logged:
        assert opened().get("shop", b"1") is None
    assert [line["cause"] for line in logged] == ["a process found damage"]


def replaced(directory: Path) -> None:
    """Another process has set the file aside."""
    (directory / "data.mdb").rename(directory / "aside")
    (directory / "data.mdb").touch()


@pytest.mark.parametrize("spoil", [marked_damaged, replaced])
def test_a_process_leaves_a_database_that_another_gave_up(
    opened: Callable[..., LmdbEngine], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Otherwise it would serve sessions that were removed from the new database."""
    engine = opened()
    engine.put("shop", b"k", b"value", 60.0)
    engine.probe()
    spoil(tmp_path / "db")
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="damaged; a restart"):
            engine.probe()
    with pytest.raises(EngineUnavailable):
        engine.get("shop", b"k")


def test_a_database_deleted_under_its_process_goes_on(opened: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    engine = opened()
    for path in (tmp_path / "db").iterdir():
        path.unlink()
    engine.probe()
    engine.put("shop", b"k", b"value", 60.0)
    assert engine.get("shop", b"k")


# --- Files and URLs --------------------------------------------------------------------------------------------------


def test_only_its_user_can_read_a_database(opened: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        opened()
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


def assert_refused(path: Path | None, cause: str) -> None:
    """Check that no database can be at `path`, and that the error says so in one line."""
    with pytest.raises(EngineUnavailable) as refused:
        LmdbEngine(path, capacity=ROOMY)
    assert re.fullmatch(
        rf"cannot use /\S+ for the database: .*{cause}.*; free it or choose another", str(refused.value)
    )


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
