"""The LMDB engine with files that it cannot trust: crashes, truncated or damaged files, other layouts."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import pytest
from structlog.testing import capture_logs

from resumed_server.storage.engine import (
    EngineUnavailable,
    Put,
)
from resumed_server.storage.lmdb.engine import LmdbEngine
from support.lmdb_engine import MEBIBYTE, PATIENCE, ROOMY, continue_together, start_process, write_garbage

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.storage.testing.fixtures import FakeClock


def truncate(directory: Path) -> None:
    """Leave a fifth of the million bytes that were stored."""
    os.truncate(directory / "data.mdb", 200_000)


def wipe_tables(directory: Path) -> None:
    """Leave the first two pages and nothing that they point to."""
    with (directory / "data.mdb").open("r+b") as file:
        file.seek(8_192)
        file.write(bytes(8 * MEBIBYTE))


def mark_damaged(directory: Path) -> None:
    """A process that finds damage marks the database so."""
    (directory / "damaged").touch()


def leave_in_use_file_of_another_boot(directory: Path) -> None:
    """The in-use file of a boot that ended in a power failure."""
    (directory / "in-use").write_text("00000000-0000-0000-0000-000000000000")


def leave_empty_in_use_file(directory: Path) -> None:
    """A power failure created the in-use file and lost its content."""
    (directory / "in-use").touch()


def write_other_layout(directory: Path) -> None:
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


def crash(directory: Path) -> None:
    """Crash a process within the engine."""
    with start_process(CRASHER, directory) as process:
        assert process.wait(PATIENCE) == -signal.SIGABRT


@pytest.mark.parametrize(
    "spoil",
    [
        write_garbage,
        truncate,
        wipe_tables,
        mark_damaged,
        crash,
        leave_in_use_file_of_another_boot,
        leave_empty_in_use_file,
        write_other_layout,
    ],
)
def test_a_file_that_cannot_be_trusted_is_set_aside_loudly(
    open_lmdb: Callable[..., LmdbEngine], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    engine = open_lmdb()
    engine.batch([Put("shop", b"%d" % number, b"v" * 1_000, 60.0) for number in range(1_000)])
    engine.close()
    spoil(tmp_path / "db")
    with capture_logs() as logged:
        engine = open_lmdb()
    (line,) = logged
    assert (line["log_level"], line["event"]) == ("error", "database quarantined, creating a new one")
    assert Path(line["aside"]).stat().st_size > 0
    assert engine.get("shop", b"1") is None
    engine.put("shop", b"k", b"value", 60.0)
    engine.close()
    with capture_logs() as logged:
        assert open_lmdb().get("shop", b"k")
    assert not logged


def test_of_files_set_aside_the_last_is_kept(open_lmdb: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    """A failure that repeats must not fill the disk."""
    for _ in range(3):
        open_lmdb().close()
        crash(tmp_path / "db")
        with capture_logs() as logged:
            open_lmdb().close()
    kept = sorted(str(path) for path in (tmp_path / "db").glob("data.mdb.set-aside-*"))
    assert kept == [logged[0]["aside"], logged[0]["aside"] + ".crash"]


ABORTED_ELSEWHERE = """
import os
engine = LmdbEngine(path, capacity=64 << 20, quarantine_after_crash=True)
os.abort()
"""


def test_a_process_that_aborts_outside_of_the_engine_condemns_no_database(
    open_lmdb: Callable[..., LmdbEngine], tmp_path: Path
) -> None:
    """An abort in gRPC's core does no damage to the database."""
    engine = open_lmdb()
    engine.put("shop", b"k", b"value", 600.0)
    for _ in range(2):
        with start_process(ABORTED_ELSEWHERE, tmp_path / "db") as process:
            assert process.wait(PATIENCE) == -signal.SIGABRT
        engine.probe()
    assert engine.get("shop", b"k")
    crash(tmp_path / "db")
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
        assert isinstance(engine._translate_error(lmdb.Error("mdb_txn_commit: Input/output error")), EngineUnavailable)


def test_the_report_of_a_crash_is_kept_and_contains_no_session(
    open_lmdb: Callable[..., LmdbEngine], tmp_path: Path
) -> None:
    crash(tmp_path / "db")
    open_lmdb()
    (dump,) = (tmp_path / "db").glob("data.mdb.set-aside-*.crash")
    assert "in put" in dump.read_text()
    assert "secret" not in dump.read_text()


def test_a_database_is_set_aside_once_all_have_left_it(open_lmdb: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    """Otherwise another process would serve sessions that were removed from the new database."""
    with start_process(
        "engine = LmdbEngine(path, capacity=64 << 20)\ntell(), input()\n"
        "try: engine.probe()\nexcept EngineBroken: tell((path / 'damaged').exists())\nengine.close()\n",
        tmp_path / "db",
    ) as other:
        assert other.stdout
        other.stdout.readline()
        crash(tmp_path / "db")
        opening = threading.Thread(target=open_lmdb)
        opening.start()
        opening.join(0.2)
        assert continue_together([other]) == ["True"]
        opening.join(PATIENCE)
    assert list((tmp_path / "db").glob("*.set-aside-*"))


def test_damage_found_while_serving_ends_service_in_every_process(
    open_lmdb: Callable[..., LmdbEngine], tmp_path: Path
) -> None:
    engine = open_lmdb()
    engine.batch([Put("shop", b"%d" % number, b"v" * 1_000, 60.0) for number in range(1_000)])
    with start_process(
        'engine = LmdbEngine(path, capacity=64 << 20)\nengine.probe()\ntell("ready"), input()\n'
        "try: engine.probe()\nexcept EngineUnavailable as error: tell(error)\n",
        tmp_path / "db",
    ) as other:
        assert other.stdout
        assert other.stdout.readline().strip() == "ready"
        wipe_tables(tmp_path / "db")
        with capture_logs() as logged:
            for _ in range(2):
                with pytest.raises(EngineUnavailable, match="damaged; a restart"):
                    engine.get("shop", b"1")
        assert [(line["log_level"], line["event"]) for line in logged] == [("critical", "database damaged")]
        with pytest.raises(EngineUnavailable):
            engine.probe()
        assert "damaged" in continue_together([other])[0]
    engine.close()
    with capture_logs() as logged:
        assert open_lmdb().get("shop", b"1") is None
    assert [line["cause"] for line in logged] == ["a process found damage"]


def replace(directory: Path) -> None:
    """Another process has set the file aside."""
    (directory / "data.mdb").rename(directory / "aside")
    (directory / "data.mdb").touch()


@pytest.mark.parametrize("spoil", [mark_damaged, replace])
def test_a_process_leaves_a_database_that_another_gave_up(
    open_lmdb: Callable[..., LmdbEngine], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Otherwise it would serve sessions that were removed from the new database."""
    engine = open_lmdb()
    engine.put("shop", b"k", b"value", 60.0)
    engine.probe()
    spoil(tmp_path / "db")
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="damaged; a restart"):
            engine.probe()
    with pytest.raises(EngineUnavailable):
        engine.get("shop", b"k")


def test_a_database_deleted_under_its_process_goes_on(open_lmdb: Callable[..., LmdbEngine], tmp_path: Path) -> None:
    engine = open_lmdb()
    for path in (tmp_path / "db").iterdir():
        path.unlink()
    engine.probe()
    engine.put("shop", b"k", b"value", 60.0)
    assert engine.get("shop", b"k")
