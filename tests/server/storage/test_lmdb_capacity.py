"""The LMDB engine when it is full: eviction, tombstones, stalled readers, and disks without room."""

from __future__ import annotations

import contextlib
import random
import subprocess
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from resumed_server.storage.engine import (
    AlreadyExists,
    EngineFull,
    Get,
    Operation,
    Put,
    Remove,
    StoredSession,
    Take,
)
from resumed_server.storage.lmdb import engine as embedded
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.testing.fixtures import FakeClock, read_removals
from support.lmdb_engine import MEBIBYTE, PATIENCE, assert_refused, is_removed, start_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# --- Capacity --------------------------------------------------------------------------------------------------------


def test_a_full_store_drops_the_soonest_to_expire_and_no_tombstone(open_lmdb: Callable[..., LmdbEngine]) -> None:
    capacity, value = 4 * MEBIBYTE, b"v" * 400
    engine = open_lmdb(capacity=capacity)
    tombstones = [b"t%d" % number for number in range(500)]
    engine.batch([Put("shop", key, value, 100.0) for key in tombstones])
    engine.batch([Take("shop", key) for key in tombstones])
    ttls = random.Random(1).sample(range(1_000, 9_000), 6_000)
    kept, survivors = set(ttls), []
    for ttl in ttls:
        engine.put("shop", b"%d" % ttl, value, ttl)
    for number in range(10 * capacity // len(value) // 100):
        engine.batch([Put("shop", b"%d %d" % (number, each), value, 10_000.0) for each in range(100)])
        kept = {ttl for ttl in kept if engine.get("shop", b"%d" % ttl)}
        assert not kept or kept == set(sorted(ttls)[-len(kept) :]), "not the soonest to expire went"
        survivors.append(len(kept))
        if not kept:
            break
    assert len(set(survivors)) > 10, "they did not go little by little"
    for number in range(10 * capacity // len(value) // 100):
        engine.batch([Put("shop", b"- %d %d" % (number, each), value, 20_000.0) for each in range(100)])
    assert engine.get("shop", b"- %d 99" % number)
    assert all(is_removed(engine, key) for key in tombstones)
    assert (engine._directory.path / "data.mdb").stat().st_blocks * 512 < capacity * 1.5


def test_a_full_store_keeps_pinned_sessions_and_lasting_removals(
    open_lmdb: Callable[..., LmdbEngine], clock: FakeClock
) -> None:
    """Until their expiry, although all sessions expire later."""
    engine = open_lmdb(capacity=MEBIBYTE)
    pinned = [b"pinned %d" % number for number in range(100)]
    removed = [b"removed %d" % number for number in range(100)]
    engine.batch([Put("shop", key, b"v" * 400, 100.0, None, pinned=True) for key in pinned])
    engine.batch([Remove("shop", key, 100.0) for key in removed])
    for number in range(5_000):
        engine.put("shop", b"%d" % number, b"v" * 400, 600.0)
    assert engine.totals().evicted > 0
    assert all(engine.get("shop", key) for key in pinned)
    assert read_removals(engine, "shop").keys() == set(removed)
    assert all(is_removed(engine, key) for key in removed)
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


def test_a_store_of_nothing_but_pinned_sessions_is_full(open_lmdb: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    engine = open_lmdb(capacity=MEBIBYTE)
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


def test_lasting_removals_survive_a_restart(open_lmdb: Callable[..., LmdbEngine], clock: FakeClock) -> None:
    """With pinned sessions and the last purge."""
    engine = open_lmdb()
    engine.remove("shop", b"k", ttl=600.0)
    cutoff = engine.purge("shop", None)
    clock.advance(1.0)
    engine.put("shop", b"pinned", b"value", 600.0, pinned=True)
    engine.close()
    engine = open_lmdb()
    assert read_removals(engine, "shop") == {b"k": pytest.approx(599.0)}
    assert engine.totals().removals == 1
    purge = engine.last_purge("shop")
    assert purge is not None
    assert (purge.issued_before, purge.time) == (None, cutoff)
    assert engine.get("shop", b"pinned")


def test_the_memory_of_a_reader_does_not_depend_on_the_number_of_lasting_removals(
    open_lmdb: Callable[..., LmdbEngine],
) -> None:
    engine = open_lmdb()
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


def test_evictions_are_counted_by_the_database_and_not_by_its_processes(open_lmdb: Callable[..., LmdbEngine]) -> None:
    engine = open_lmdb(capacity=MEBIBYTE)
    for number in range(3_000):
        engine.put("shop", b"%d" % number, b"v" * 400, 600.0)
    totals = engine.totals()
    assert totals.evicted == 3_000 - totals.sessions > 0
    engine.close()
    assert open_lmdb(capacity=MEBIBYTE).totals() == totals


def test_a_full_store_may_be_opened_with_a_smaller_capacity(open_lmdb: Callable[..., LmdbEngine]) -> None:
    """The database shrinks gradually, since deletions need free pages as well."""
    engine = open_lmdb(capacity=160 * MEBIBYTE)
    for number in range(2_400):
        engine.put("shop", b"%d" % number, b"v" * 65_536, 600.0 + number)
    engine.close()
    engine = open_lmdb(capacity=MEBIBYTE)
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
    assert all(is_removed(buried, b"%d" % number) for number in range(5_000))
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
    small_disk: Path, open_lmdb: Callable[..., LmdbEngine], value: bytes
) -> None:
    engine = open_lmdb(small_disk / "db")
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
        engine = open_lmdb(small_disk / "db")
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


def test_a_file_that_another_process_let_grow_is_followed(open_lmdb: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    engine = open_lmdb(capacity=MEBIBYTE)
    engine.put("shop", b"k", b"value", 600.0)
    with start_process(GROWER, tmp_path / "db") as process:
        assert process.wait(PATIENCE) == 0
    assert (tmp_path / "db/data.mdb").stat().st_size > 128 * MEBIBYTE
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: engine.get("shop", b"k"), range(100)))
    assert [each.value for each in found if each] == [b"value"] * 100
    engine.put("shop", b"new", b"value", 600.0)
    engine.probe()
