"""Reloaded files: a partial or invalid change is never used."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from resumed._reload import LARGEST, File, Followed, Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class Clock:
    """Both clocks of the module: the monotonic one moves only in tests, the wall clock gives the age of changes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.ahead = 0.0
        monkeypatch.setattr(
            "resumed._reload.time",
            SimpleNamespace(monotonic=lambda: self.now, time=lambda: time.time() + self.ahead),
        )

    def look(self, followed: Followed[int]) -> int:
        """Return the value after another look; changes are from the future, and so never old, unless `ahead` is set."""
        self.now += 2
        return followed.latest()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for which each change has just been made."""
    clock = Clock(monkeypatch)
    clock.ahead = -1000.0
    return clock


def numbers(files: Sequence[File]) -> int:
    return sum(int(file.content) for file in files)


def following(
    paths: Sequence[Path], parse: Callable[[Sequence[File]], int] = numbers
) -> tuple[Followed[int], list[int], list[str]]:
    values: list[int] = []
    errors: list[str] = []
    return Followed(paths, parse, values.append, lambda error: errors.append(str(error))), values, errors


def test_a_mixture_is_never_used(tmp_path: Path, clock: Clock) -> None:
    """A change counts only after two identical reads."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("10")
    followed, values, errors = following([one, two])
    one.write_text("2")
    assert clock.look(followed) == 11
    two.write_text("20")
    assert clock.look(followed) == 11
    assert clock.look(followed) == 22
    assert clock.look(followed) == 22
    assert (values, errors) == ([22], [])


def test_an_old_change_is_used_at_once(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "number"
    path.write_text("1")
    followed, _, _ = following([path])
    path.write_text("2")
    clock.ahead = 3600.0
    assert clock.look(followed) == 2


def test_looks_are_a_second_apart(tmp_path: Path, clock: Clock) -> None:
    """Two reads at the same moment would both see a partial change."""
    path = tmp_path / "number"
    path.write_text("1")
    followed, _, _ = following([path])
    path.write_text("2")
    assert clock.look(followed) == 1
    assert [followed.latest() for _ in range(3)] == [1] * 3
    clock.now += 1
    assert followed.latest() == 2


def test_one_thread_looks_at_a_time(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "number"
    path.write_text("1")
    followed, _, _ = following([path])
    path.write_text("2")
    with followed._looking:
        assert [clock.look(followed) for _ in range(3)] == [1] * 3
        followed.after_fork_in_child()
        assert [clock.look(followed) for _ in range(2)] == [1, 2]


def test_files_that_change_while_they_are_parsed_are_not_used(tmp_path: Path, clock: Clock) -> None:
    """Some parsers read the file themselves."""
    path = tmp_path / "number"
    path.write_text("1")
    writes = ["3"]

    def parse(_: Sequence[File]) -> int:
        number = int(path.read_text())
        if number == 2 and writes:
            path.write_text(writes.pop())
        return number

    followed, values, _ = following([path], parse)
    path.write_text("2")
    assert [clock.look(followed) for _ in range(3)] == [1, 1, 3]
    assert values == [3]


def test_unusable_files_are_reported_once_and_change_nothing(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "number"
    path.write_text("1")

    def parse(files: Sequence[File]) -> int:
        if files[0].mode & 0o077:
            raise ValueError("others may read it")
        return numbers(files)

    path.chmod(0o600)
    followed, _, errors = following([path], parse)
    path.write_text("nonsense")
    assert [clock.look(followed) for _ in range(4)] == [1] * 4
    path.unlink()
    assert [clock.look(followed) for _ in range(4)] == [1] * 4
    path.write_bytes(bytes(LARGEST + 1))
    assert [clock.look(followed) for _ in range(4)] == [1] * 4
    path.write_text("2")
    path.chmod(0o644)
    assert [clock.look(followed) for _ in range(4)] == [1] * 4
    assert [error.split(": ")[-1] for error in errors] == [
        "b'nonsense'",
        "No such file or directory",
        f"it is larger than {LARGEST} bytes",
        "others may read it",
    ]
    path.chmod(0o600)
    assert [clock.look(followed) for _ in range(2)] == [1, 2]


def test_without_a_value_there_is_nothing_to_follow(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="cannot be read: No such file"):
        following([tmp_path / "missing"])


def test_the_content_does_not_show(tmp_path: Path) -> None:
    """One of the files is a key."""
    path = tmp_path / "number"
    path.write_text("1234567")
    seen: list[File] = []

    def parse(files: Sequence[File]) -> int:
        seen.extend(files)
        return 0

    following([path], parse)
    assert "1234567" not in repr(seen) + repr(seen[0].content) + repr([*seen[0]])
