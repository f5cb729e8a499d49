"""Fixtures, clock and helpers of the engine contract."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar, cast

import pytest

from resumed_server.storage.engine import (
    AlreadyExists,
    Change,
    Engine,
    NamespacePurged,
    StoredSession,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Advance: TypeAlias = Callable[[float], None]
    RawValues: TypeAlias = Callable[[], dict[tuple[str, bytes], bytes]]

KEYS = [b"k", b"\0", b"\0" * 64, b"\xff" * 64, bytes(range(64)), b"shop\0k", b"k\0"]
NAMESPACES = ["a", "a" * 63, "a.a", "a-a", "0", "shop", "shop.eu"]


class FakeClock:
    """A clock that moves only by advance()."""

    def __init__(self) -> None:
        self._now = 1_700_000_000.0

    def __call__(self) -> float:
        """Return the present in Unix seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self._now += seconds


class ContractFixtures:
    """The fixtures and class variables of EngineContract.

    A subclass defines the fixtures `engine` and `kept`, and overrides the others and the class variables as it needs.
    """

    tick: ClassVar[float] = 0.002
    """Maximum error of a ttl in seconds: its rounding (never up), and the duration of a test."""
    sweeps: ClassVar[bool] = True
    """Whether expired entries stay until sweep() reclaims them."""

    @pytest.fixture
    def clock(self) -> FakeClock:
        """The engine's time."""
        return FakeClock()

    @pytest.fixture
    def engine(self, clock: FakeClock) -> Engine:
        """The engine, new and empty."""
        raise NotImplementedError

    @pytest.fixture
    def advance(self, clock: FakeClock) -> Advance:
        """Moves the engine's clock forward."""
        return clock.advance

    @pytest.fixture
    def present(self, clock: FakeClock) -> Callable[[], float]:
        """The engine's time, in Unix seconds."""
        return clock

    @pytest.fixture
    def sweeper(self, engine: Engine) -> Engine:
        """The engine, unless it expires entries itself."""
        if not self.sweeps:
            pytest.skip("the engine expires natively")
        return engine

    @pytest.fixture
    def raw_values(self) -> RawValues:
        """Return a function that reads the value of each session from the storage without the engine.

        A subclass overrides it where the storage can be read. Without it, an engine passes that stores each session
        under another address than its own and looks for it there.
        """
        pytest.skip("the subclass gives no access to the storage")

    @pytest.fixture
    def kept(self) -> tuple[int, int]:
        """The minimum and maximum number of changes in the engine's log."""
        raise NotImplementedError


def read_all_changes(engine: Engine, position: bytes) -> tuple[dict[tuple[str, bytes], list[bytes | None]], bytes]:
    """Return all changes after a position, by namespace and key, and the position of the end of the log."""
    changes: dict[tuple[str, bytes], list[bytes | None]] = {}
    until = engine.position()
    while position != until:
        read = engine.changes(position, until, 1_000)
        assert read is not None, "the log does not reach back"
        for change in changes_of(read):
            changes.setdefault((change.namespace, change.key), []).append(value_of(change.session))
        position = read[1]
    return changes, position


def read_removals(engine: Engine, namespace: str) -> dict[bytes, float]:
    """Return the remaining seconds of all lasting removals in force in a namespace."""
    found: dict[bytes, float] = {}
    for part in engine.removals(namespace, 100):
        for change in part:
            assert change.namespace == namespace
            assert change.session is None
            assert change.ttl is not None
            found[change.key] = max(found.get(change.key, 0.0), change.ttl)
    return found


def changes_of(read: tuple[list[Change | NamespacePurged], bytes]) -> list[Change]:
    """Return the changes of a read without purges."""
    assert all(isinstance(each, Change) for each in read[0])
    return cast("list[Change]", read[0])


def value_of(outcome: object) -> bytes | None:
    """Return the value of a session; None for any other outcome."""
    return outcome.value if isinstance(outcome, StoredSession) else None


def assert_gone(engine: Engine, key: bytes) -> None:
    """Check that a session is missing and that its key refuses Puts."""
    assert engine.get("shop", key) is None
    assert engine.take("shop", key) is None
    assert engine.remove("shop", key) is None, "there is a tombstone"
    with pytest.raises(AlreadyExists):
        engine.put("shop", key, b"value", 600.0)


def race_threads(run: Callable[[int], None], racers: int) -> None:
    """Call `run` in `racers` threads at once, and raise the first exception of any of them."""
    raised: list[BaseException] = []

    def run_and_catch(racer: int) -> None:
        try:
            run(racer)
        except BaseException as error:  # noqa: BLE001 - raised below
            raised.append(error)

    threads = [threading.Thread(target=run_and_catch, args=(racer,)) for racer in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    if raised:
        raise raised[0]
