from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from resumed_server.cli.atomic_file import write_atomically
from resumed_server.cli.ticket_keys import key_files
from resumed_server.cli.ticket_keys.key_files import file_system, verify_directory
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


def mounts(tmp_path: Path, kind: str) -> str:
    """Write a table of mounts in which the file system of `tmp_path` has a type."""
    device = tmp_path.stat().st_dev
    table = tmp_path / "mountinfo"
    table.write_text(
        f"36 35 0:999 / /elsewhere rw,noatime master:1 - ext4 /dev/root rw\n"
        f"37 35 {device >> 8 & 0xFFF}:{device & 0xFF | device >> 12 & 0xFFF00} / / rw shared:1 - {kind} none rw\n"
    )
    return str(table)


def test_proc_has_the_type_of_a_file_system() -> None:
    assert file_system(Path("/proc")) == "proc"
    if Path("/dev/shm").is_mount():
        assert file_system(Path("/dev/shm")) == "tmpfs"


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_keys_may_be_in_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_files, "_MOUNTS", mounts(tmp_path, kind))
    verify_directory("--nginx", tmp_path, allow_disk=False)


def test_a_directory_on_a_disk_is_refused_with_the_command_that_mounts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_files, "_MOUNTS", mounts(tmp_path, "ext4"))
    with pytest.raises(UserError, match=rf"--nginx: {tmp_path} is on a disk \(ext4\).*mount -t tmpfs .* {tmp_path}`"):
        verify_directory("--nginx", tmp_path, allow_disk=False)
    verify_directory("--nginx", tmp_path, allow_disk=True)


def test_where_the_system_shows_no_mounts_a_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_files, "_MOUNTS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="unknown"):
        verify_directory("--nginx", tmp_path, allow_disk=False)


def test_a_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        verify_directory("--haproxy", tmp_path / "absent", allow_disk=True)


def test_a_file_is_replaced_whole_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_atomically(path, b"before")
    with path.open("rb") as open_before:
        write_atomically(path, b"after")
        assert open_before.read() == b"before", "the file itself was changed"
    assert path.read_bytes() == b"after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["keys"]


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make every rename fail."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    return lambda: monkeypatch.setattr(Path, "replace", fail)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, full: Callable[[], None]) -> None:
    path = tmp_path / "keys"
    write_atomically(path, b"before")
    full()
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["keys"]
