"""The promises of every engine, as tests: subclass EngineContract and define the fixtures `engine` and `kept`."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from typing import TYPE_CHECKING, ClassVar, cast

import pytest

from resumed_server.storage.engine import (
    LONGEST_TTL_SECONDS,
    UNKNOWN_TOMBSTONE_SECONDS,
    AlreadyExists,
    Change,
    Engine,
    EngineUnavailable,
    Get,
    Kept,
    NamespacePurged,
    NamespaceUsage,
    NoTombstone,
    Operation,
    Put,
    Remove,
    StoredSession,
    Take,
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


class EngineContract:
    """The promises of `resumed_server.storage.engine.Engine`.

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

    # --- Storage, without the engine --------------------------------------------------------------------------------

    def test_a_session_is_stored_under_its_own_address(self, engine: Engine, raw_values: RawValues) -> None:
        """With its own value, and nothing else is stored."""
        values = {place: b"value %d" % number for number, place in enumerate(itertools.product(NAMESPACES, KEYS))}
        puts = [Put(*address, value, 60.0) for address, value in values.items()]
        engine.put(puts[0].namespace, puts[0].key, puts[0].value, puts[0].ttl)
        engine.batch(puts[1:])
        assert raw_values() == values

    @pytest.mark.parametrize("end", ["take", "remove"])
    def test_no_value_is_kept_of_a_session_that_is_gone(self, engine: Engine, raw_values: RawValues, end: str) -> None:
        """A copy of the storage must not decrypt connections whose sessions were removed."""
        engine.put("shop", b"k", b"value", 60.0)
        engine.put("shop", b"other", b"other value", 60.0)
        getattr(engine, end)("shop", b"k")
        assert list(raw_values().values()) == [b"other value"]

    def test_no_value_is_kept_of_a_purged_session_once_it_was_swept(
        self, engine: Engine, raw_values: RawValues
    ) -> None:
        """A purge hides sessions at once, and sweeping deletes them."""
        engine.put("shop", b"k", b"value", 60.0)
        engine.put("eu", b"k", b"other value", 60.0)
        engine.purge("shop", None)
        while engine.sweep(100):
            pass
        assert list(raw_values().values()) == [b"other value"]

    # --- Put and Get ------------------------------------------------------------------------------------------------

    def test_what_was_put_is_found_with_the_time_it_has_left(self, engine: Engine, advance: Advance) -> None:
        """A look-up does not consume the session."""
        assert engine.put("shop", b"k", b"value", 60.0) == pytest.approx(60.0, abs=self.tick)
        advance(20.0)
        for _ in range(2):
            found = engine.get("shop", b"k")
            assert found is not None
            assert found.value == b"value"
            assert found.ttl == pytest.approx(40.0, abs=self.tick)

    def test_a_put_tells_whether_it_stored_anything(self, engine: Engine) -> None:
        """A session that is stored already is Kept."""
        put = Put("shop", b"k", b"value", 60.0)
        outcomes = [engine.put("shop", b"k", b"value", 60.0), *engine.batch([put, put])]
        assert [isinstance(outcome, Kept) for outcome in outcomes] == [False, True, True]
        assert outcomes == pytest.approx([60.0] * 3, abs=self.tick)

    def test_an_unknown_key_is_a_miss(self, engine: Engine) -> None:
        """Look-ups leave nothing behind."""
        assert engine.get("shop", b"k") is None
        assert engine.take("shop", b"k") is None
        assert engine.get("shop", b"k") is None

    def test_any_valid_namespace_and_key_will_do(self, engine: Engine) -> None:
        """The shortest and the longest, and those with NULs, side by side."""
        values = {place: b"value %d" % number for number, place in enumerate(itertools.product(NAMESPACES, KEYS))}
        for (namespace, key), value in values.items():
            engine.put(namespace, key, value, 60.0)
        for (namespace, key), value in values.items():
            assert _value(engine.get(namespace, key)) == value
            assert _value(engine.take(namespace, key)) == value
            assert not engine.remove(namespace, key)

    @pytest.mark.parametrize("value", [b"\0", b"v" * 4_096, b"\0" * 65_536, bytes(range(256)) * 256])
    def test_any_valid_value_comes_back_whole(self, engine: Engine, value: bytes) -> None:
        """1 to 65,536 bytes, including NULs."""
        engine.put("shop", b"k", value, 60.0)
        assert _value(engine.get("shop", b"k")) == value
        assert _value(engine.take("shop", b"k")) == value

    def test_a_ttl_is_never_lengthened(self, engine: Engine) -> None:
        """An engine may round a ttl, but only down."""
        for number, ttl in enumerate((0.01, 0.5004, 1.9999, 604_800.0)):
            key = bytes([number])
            left = engine.put("shop", key, b"value", ttl)
            assert 0.0 <= left <= ttl + 1e-6
            found = engine.get("shop", key)
            assert found is None or 0.0 < found.ttl <= ttl + 1e-6

    # --- Write-once -------------------------------------------------------------------------------------------------

    def test_the_same_value_again_changes_nothing(self, engine: Engine, advance: Advance) -> None:
        """The expiry stays as well: a retried Put is harmless and prolongs nothing."""
        engine.put("shop", b"k", b"value", 60.0)
        advance(50.0)
        assert engine.put("shop", b"k", b"value", 60.0) == pytest.approx(10.0, abs=self.tick)
        advance(10.0)
        assert engine.get("shop", b"k") is None

    def test_another_value_is_refused_and_changes_nothing(self, engine: Engine, advance: Advance) -> None:
        """Value and expiry stay, even if the other value is a prefix or an extension."""
        engine.put("shop", b"k", b"value", 60.0)
        for other in (b"other", b"valu", b"value\0"):
            with pytest.raises(AlreadyExists):
                engine.put("shop", b"k", other, 600.0)
        assert _value(engine.get("shop", b"k")) == b"value"
        advance(60.0)
        assert engine.get("shop", b"k") is None

    # --- Tombstones -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("end", ["take", "remove"])
    def test_what_was_removed_or_taken_stays_away_until_its_own_expiry(
        self, engine: Engine, advance: Advance, end: str
    ) -> None:
        """A late or retried Put does not restore it, and does not prolong the tombstone."""
        engine.put("shop", b"k", b"value", 600.0)
        advance(10.0)
        assert getattr(engine, end)("shop", b"k")
        _assert_gone(engine, b"k")
        advance(589.0)
        _assert_gone(engine, b"k")
        advance(1.0)
        assert engine.put("shop", b"k", b"value", 60.0) == pytest.approx(60.0, abs=self.tick)
        assert _value(engine.get("shop", b"k")) == b"value"

    def test_a_removed_unknown_key_refuses_a_put_for_a_minute(self, engine: Engine, advance: Advance) -> None:
        """The Put may have been sent before the Remove. A second Remove does not prolong the minute."""
        assert engine.remove("shop", b"k") is False
        advance(UNKNOWN_TOMBSTONE_SECONDS - 1.0)
        _assert_gone(engine, b"k")
        advance(1.0)
        engine.put("shop", b"k", b"value", 60.0)
        assert _value(engine.get("shop", b"k")) == b"value"

    def test_a_take_that_misses_leaves_no_tombstone(self, engine: Engine) -> None:
        """A look-up that arrives before the Put must not reject the Put."""
        assert engine.take("shop", b"k") is None
        engine.put("shop", b"k", b"value", 60.0)
        assert _value(engine.take("shop", b"k")) == b"value"

    def test_remove_answers_whether_a_live_session_was_there(self, engine: Engine) -> None:
        """A second Remove finds the tombstone, changes nothing, and returns None."""
        engine.put("shop", b"k", b"value", 60.0)
        assert [engine.remove("shop", b"k") for _ in range(3)] == [True, None, None]
        assert [engine.remove("shop", b"unknown") for _ in range(3)] == [False, None, None]

    def test_a_remove_that_may_leave_no_tombstone_still_removes(self, engine: Engine) -> None:
        """It leaves an unknown key unknown, by itself and in a batch."""
        for number in range(2):
            engine.put("shop", b"%d" % number, b"value", 60.0)
        assert engine.remove("shop", b"0", tombstone=False) is True
        with pytest.raises(NoTombstone):
            engine.remove("shop", b"unknown", tombstone=False)
        removes = [Remove("shop", key, tombstone=False) for key in (b"1", b"unknown", b"0")]
        removed, unknown, there = engine.batch(removes)
        assert (removed, there) == (True, None)
        assert isinstance(unknown, NoTombstone)
        for key in (b"0", b"1"):
            _assert_gone(engine, key)
        engine.put("shop", b"unknown", b"value", 60.0)
        assert engine.get("shop", b"unknown")

    # --- Expiry -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("call", ["get", "take", "remove"])
    def test_an_expired_session_is_a_miss_before_it_is_swept(self, engine: Engine, advance: Advance, call: str) -> None:
        """From the exact time of its expiry."""
        engine.put("shop", b"k", b"value", 60.0)
        advance(55.0)
        assert engine.get("shop", b"k")
        advance(5.0)
        assert not getattr(engine, call)("shop", b"k")

    @pytest.mark.parametrize("end", ["expire", "take", "remove", "remove unknown"])
    def test_a_put_over_an_expired_entry_is_not_swept_with_it(self, engine: Engine, advance: Advance, end: str) -> None:
        """Remains of the old session or tombstone must not delete the new one."""
        if end == "remove unknown":
            engine.remove("shop", b"k")
        else:
            engine.put("shop", b"k", b"old", 60.0)
        if end in {"take", "remove"}:
            getattr(engine, end)("shop", b"k")
        advance(60.0)
        engine.put("shop", b"k", b"new", 120.0)
        assert engine.sweep(100) == 0
        advance(119.0)
        assert engine.sweep(100) == 0
        assert _value(engine.get("shop", b"k")) == b"new"
        advance(1.0)
        assert engine.sweep(100) == int(self.sweeps)
        assert engine.sweep(100) == 0

    def test_a_remove_over_an_expired_session_is_one_of_an_unknown_key(self, engine: Engine, advance: Advance) -> None:
        """It returns False, and the key refuses Puts for a minute."""
        engine.put("shop", b"k", b"value", 5.0)
        advance(5.0)
        assert engine.remove("shop", b"k") is False
        advance(UNKNOWN_TOMBSTONE_SECONDS - 1.0)
        _assert_gone(engine, b"k")
        advance(1.0)
        engine.put("shop", b"k", b"value", 5.0)

    # --- Sweeping ---------------------------------------------------------------------------------------------------

    def test_a_sweep_is_bounded_and_exact(self, sweeper: Engine, advance: Advance) -> None:
        """It counts sessions and tombstones, returns less than the limit only at the end, and spares other entries."""
        for number in range(20):
            sweeper.put("shop", b"early%d" % number, b"value", 60.0)
            sweeper.put("shop", b"late%d" % number, b"value", 61.0)
        for number in range(5):
            sweeper.take("shop", b"early%d" % number)
            sweeper.remove("shop", b"unknown%d" % number)
        assert sweeper.sweep(10) == 0
        advance(60.0)
        assert [sweeper.sweep(10) for _ in range(4)] == [10, 10, 5, 0]
        assert all(sweeper.get("shop", b"late%d" % number) for number in range(20))
        advance(1.0)
        assert [sweeper.sweep(20) for _ in range(2)] == [20, 0]

    # --- Namespaces -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("a", b"bk"), ("ab", b"k")),
            (("a", b".b\0k"), ("a.b", b"k")),
            (("a", b"\0k"), ("a", b"k")),
            (("a", b"k\0"), ("a", b"k")),
            (("a", b"a\0k"), ("a.a", b"k")),
            (("shop", b"k"), ("shop.eu", b"k")),
        ],
    )
    def test_namespaces_and_keys_do_not_run_into_each_other(
        self, engine: Engine, one: tuple[str, bytes], other: tuple[str, bytes]
    ) -> None:
        """Their concatenation is ambiguous without a separator."""
        engine.put(*one, b"one", 60.0)
        assert engine.get(*other) is None
        assert engine.take(*other) is None
        engine.put(*other, b"other", 60.0)
        assert engine.remove(*one)
        assert engine.get(*one) is None
        assert _value(engine.take(*other)) == b"other"

    # --- Take, raced ------------------------------------------------------------------------------------------------

    def test_a_session_is_handed_out_once_however_many_take_it(self, engine: Engine) -> None:
        """Eight threads race Takes of the same sessions, singly and in batches. A Remove counts as a Take."""
        keys = [b"%d" % number for number in range(200)]
        engine.batch([Put("shop", key, b"value", 60.0) for key in keys])
        got: list[bytes] = []
        together = threading.Barrier(8)

        def take(racer: int) -> None:
            together.wait()
            if racer % 4 == 0:
                outcomes = engine.batch([Take("shop", key) for key in keys])
                got.extend(key for key, outcome in zip(keys, outcomes, strict=True) if outcome)
            elif racer % 4 == 1:
                got.extend(key for key in keys if engine.remove("shop", key))
            else:
                got.extend(key for key in keys if engine.take("shop", key))

        _race(take, 8)
        assert Counter(got) == Counter(keys)

    def test_of_raced_puts_one_wins(self, engine: Engine) -> None:
        """All others raise AlreadyExists, and look-ups return the value of the winner."""
        won: list[tuple[bytes, bytes]] = []
        keys = [b"%d" % number for number in range(100)]
        together = threading.Barrier(4)

        def put(racer: int) -> None:
            together.wait()
            for key in keys:
                try:
                    engine.put("shop", key, b"%d" % racer, 60.0)
                    won.append((key, b"%d" % racer))
                except AlreadyExists:
                    pass

        _race(put, 4)
        assert sorted(won) == sorted((key, _value(engine.get("shop", key))) for key in keys)

    # --- Batch ------------------------------------------------------------------------------------------------------

    def test_a_batch_answers_in_order_and_each_operation_sees_the_ones_before(self, engine: Engine) -> None:
        """Every operation on one key, and failures that do not affect the others."""
        operations: list[Operation] = [
            Get("shop", b"k"),
            Put("shop", b"k", b"value", 60.0),
            Put("shop", b"k", b"value", 30.0),
            Put("shop", b"k", b"other", 60.0),
            Get("shop", b"k"),
            Take("shop", b"k"),
            Take("shop", b"k"),
            Put("shop", b"k", b"value", 60.0),
            Remove("shop", b"k"),
            Remove("shop", b"unknown"),
            Put("shop", b"unknown", b"value", 60.0),
            Put("eu", b"k", b"elsewhere", 60.0),
            Get("eu", b"k"),
            Remove("eu", b"k"),
        ]
        outcomes = engine.batch(operations)
        shapes = [_value(each) if isinstance(each, StoredSession) else type(each) for each in outcomes]
        assert shapes == [
            *(type(None), float, Kept, AlreadyExists, b"value", b"value", type(None), AlreadyExists),
            *(type(None), bool, AlreadyExists, float, b"elsewhere", bool),
        ]
        assert [each for each in outcomes if isinstance(each, bool)] == [False, True]
        assert engine.get("shop", b"k") is None

    def test_a_batch_without_operations_has_no_outcomes(self, engine: Engine) -> None:
        """An empty batch changes nothing."""
        assert engine.batch([]) == []

    @pytest.mark.parametrize("kind", [Get, Take, Remove])
    def test_a_large_batch_does_as_many_single_calls(self, engine: Engine, kind: type[Get | Take | Remove]) -> None:
        """256 operations of one kind, half of them hits."""
        keys = [b"%d" % number for number in range(256)]
        outcomes = engine.batch([Put("shop", key, b"v" + key, 60.0) for key in keys[::2]])
        assert all(isinstance(outcome, float) for outcome in outcomes)
        found = engine.batch([kind("shop", key) for key in keys])
        assert [bool(outcome) for outcome in found] == [True, False] * 128
        assert [bool(outcome) for outcome in engine.batch([Get("shop", key) for key in keys])] == [
            kind is Get and number % 2 == 0 for number in range(256)
        ]

    # --- Changes ----------------------------------------------------------------------------------------------------

    @pytest.fixture
    def kept(self) -> tuple[int, int]:
        """The minimum and maximum number of changes in the engine's log."""
        raise NotImplementedError

    def test_what_changes_is_told_once(self, engine: Engine) -> None:
        """Puts, Takes and Removes with an effect, singly and in batches, in the order of each key."""
        position = engine.position()
        engine.put("shop", b"a", b"one", 60.0)
        engine.put("shop", b"a", b"one", 60.0)
        engine.get("shop", b"a")
        engine.take("shop", b"unknown")
        engine.batch([Put("eu", b"a", b"two", 60.0), Put("shop", b"b", b"three", 60.0)])
        changes, position = read_all_changes(engine, position)
        assert changes == {("shop", b"a"): [b"one"], ("eu", b"a"): [b"two"], ("shop", b"b"): [b"three"]}
        engine.take("shop", b"a")
        engine.batch([Take("shop", b"a"), Remove("eu", b"a"), Remove("shop", b"b"), Put("shop", b"b", b"three", 60.0)])
        engine.remove("shop", b"b")
        engine.remove("shop", b"unknown")
        changes, position = read_all_changes(engine, position)
        assert changes == {("eu", b"a"): [None], **{("shop", key): [None] for key in (b"a", b"b", b"unknown")}}
        assert read_all_changes(engine, position)[0] == {}

    def test_what_is_told_of_a_session_is_what_is_left_of_it(self, engine: Engine, advance: Advance) -> None:
        """Its remaining ttl, as a look-up would return; of a session that was stored and removed, only the removal."""
        position = engine.position()
        engine.put("shop", b"a", b"value", 60.0)
        engine.put("shop", b"b", b"value", 60.0)
        engine.put("shop", b"c", b"value", 10.0)
        engine.remove("shop", b"b")
        advance(20.0)
        read = engine.changes(position, engine.position(), 10)
        assert read is not None
        sessions = {change.key: change.session for change in _changes(read)}
        assert sessions.keys() == {b"a", b"b"}
        assert sessions[b"a"] is not None
        assert sessions[b"a"].ttl == pytest.approx(40.0, abs=self.tick)
        assert sessions[b"b"] is None

    def test_changes_are_read_in_parts(self, engine: Engine) -> None:
        """At most `limit` at a time, none twice, none omitted."""
        position = engine.position()
        keys = [b"%d" % number for number in range(300)]
        engine.batch([Put("shop", key, b"value", 60.0) for key in keys])
        engine.batch([Remove("shop", key) for key in keys[::2]])
        until, found = engine.position(), Counter[bytes]()
        engine.put("shop", b"later", b"value", 60.0)
        for _ in range(1_000):
            read = engine.changes(position, until, 7)
            assert read is not None
            assert len(read[0]) <= 7
            found.update(change.key for change in _changes(read))
            position = read[1]
            if position == until:
                break
        assert found == Counter(keys)
        assert read_all_changes(engine, position)[0] == {("shop", b"later"): [b"value"]}

    def test_large_values_are_told_a_few_at_a_time(self, engine: Engine) -> None:
        """Without omissions."""
        position, found, reads = engine.position(), [], 0
        keys = [b"%d" % number for number in range(300)]
        for key in keys:
            engine.put("shop", key, bytes(65_536), 60.0)
        until = engine.position()
        while position != until:
            read = engine.changes(position, until, 1_000)
            assert read is not None
            assert sum(len(change.session.value) for change in _changes(read) if change.session) <= 9 << 20
            found += [change.key for change in _changes(read)]
            position = read[1]
            reads += 1
        assert sorted(found) == sorted(keys)
        assert reads >= 2

    def test_a_log_that_moved_on_is_none_and_never_a_gap(self, engine: Engine, kept: tuple[int, int]) -> None:
        """The log is bounded; a reader that is too late starts anew."""
        least, most = kept
        position = engine.position()
        numbers = iter(range(1 << 30))

        def log(count: int) -> None:
            while count > 0:
                engine.batch([Put("shop", b"%d" % next(numbers), b"v", 60.0) for _ in range(min(count, 250))])
                count -= 250

        log(least)
        assert engine.changes(position, engine.position(), 10) is not None
        log(most + 1 - least)
        assert engine.changes(position, engine.position(), 10) is None

    def test_a_position_that_means_nothing_is_none(self, engine: Engine) -> None:
        """Nor is a position of another storage accepted."""
        engine.put("shop", b"a", b"value", 60.0)
        assert len(engine.position()) <= 64
        for length, byte in itertools.product((1, 16, 40, 64), (b"\0", b"\xff", b"x")):
            assert engine.changes(length * byte, engine.position(), 10) is None, (length, byte)
        assert engine.changes(b"", engine.position(), 10) is None

    # --- Lasting removals -------------------------------------------------------------------------------------------

    def test_a_lasting_removal_stays_for_the_longer_of_its_own_time_and_the_session(
        self, engine: Engine, advance: Advance
    ) -> None:
        """Of an unknown key as well, and never for less than a minute."""
        engine.batch([Put("shop", b"short", b"value", 100.0), Put("shop", b"long", b"value", 900.0)])
        removes = [Remove("shop", key, ttl) for key, ttl in ((b"short", 600.0), (b"long", 600.0), (b"unknown", 600.0))]
        assert engine.batch([*removes, Remove("shop", b"brief", 10.0)]) == [True, True, False, False]
        expected = {b"short": 600.0, b"long": 900.0, b"unknown": 600.0, b"brief": UNKNOWN_TOMBSTONE_SECONDS}
        assert read_removals(engine, "shop") == pytest.approx(expected, abs=self.tick)
        advance(595.0)
        for key in (b"short", b"long", b"unknown"):
            _assert_gone(engine, key)
        advance(5.0)
        assert read_removals(engine, "shop") == pytest.approx({b"long": 300.0}, abs=self.tick)
        engine.put("shop", b"short", b"value", 60.0)
        engine.put("shop", b"unknown", b"value", 60.0)
        advance(300.0)
        assert read_removals(engine, "shop") == {}
        engine.put("shop", b"long", b"value", 60.0)

    @pytest.mark.parametrize("first", [None, 60.0, 600.0, 900.0])
    def test_a_lasting_removal_prolongs_another_removal_and_shortens_none(
        self, engine: Engine, advance: Advance, first: float | None
    ) -> None:
        """It returns None, since there was no session."""
        engine.remove("shop", b"k", ttl=first)
        assert engine.remove("shop", b"k", ttl=600.0) is None
        advance(30.0)
        assert engine.remove("shop", b"k", ttl=30.0) is None
        assert engine.remove("shop", b"k") is None
        left = max(first or 0.0, 600.0) - 30.0
        assert read_removals(engine, "shop") == pytest.approx({b"k": left}, abs=self.tick)
        advance(left - 5.0)
        _assert_gone(engine, b"k")
        advance(5.0)
        engine.put("shop", b"k", b"value", 60.0)

    def test_each_step_of_a_lasting_removal_is_a_change_with_the_time_that_is_left(
        self, engine: Engine, advance: Advance
    ) -> None:
        """Also of a session that was removed or taken before. A Remove that changes nothing is no change."""
        engine.put("shop", b"taken", b"value", 600.0)
        engine.take("shop", b"taken")
        position = engine.position()

        def told() -> list[tuple[bytes, object]]:
            nonlocal position
            until = engine.position()
            if position == until:
                return []
            read = engine.changes(position, until, 10)
            assert read is not None
            position = read[1]
            return [(change.key, change.ttl) for change in _changes(read)]

        engine.remove("shop", b"k")
        assert told() == [(b"k", None)]
        engine.remove("shop", b"k", ttl=300.0)
        assert told() == [(b"k", pytest.approx(300.0, abs=self.tick))]
        engine.remove("shop", b"taken", ttl=60.0)
        assert told() == [(b"taken", pytest.approx(600.0, abs=self.tick))]
        for ttl in (None, 60.0):
            engine.remove("shop", b"taken", ttl=ttl)
            engine.remove("shop", b"k", ttl=ttl)
        assert told() == []
        engine.remove("shop", b"k", ttl=900.0)
        advance(200.0)
        assert told() == [(b"k", pytest.approx(700.0, abs=self.tick))]

    def test_changes_may_be_read_without_stored_sessions(self, engine: Engine) -> None:
        """All lasting removals and purges are among them, however few changes are read at a time."""
        position = engine.position()
        engine.batch([Put("shop", b"%d" % number, b"value", 600.0) for number in range(50)])
        engine.remove("shop", b"0", ttl=600.0)
        engine.purge("eu", None)
        engine.batch([Put("shop", b"late %d" % number, b"value", 600.0) for number in range(50)])
        engine.remove("shop", b"k", ttl=600.0)
        until, told = engine.position(), []
        while position != until:
            read = engine.changes(position, until, 7, removals_only=True)
            assert read is not None
            told += read[0]
            position = read[1]
        assert sorted({each.namespace for each in told if isinstance(each, NamespacePurged)}) == ["eu"]
        assert {each.key for each in told if isinstance(each, Change) and each.ttl} == {b"0", b"k"}
        assert not any(isinstance(each, Change) and each.session for each in told)

    def test_a_lasting_removal_that_is_over_is_told_as_any_other(self, engine: Engine, advance: Advance) -> None:
        """Its key can have a session again."""
        position = engine.position()
        engine.remove("shop", b"k", ttl=100.0)
        advance(100.0)
        engine.put("shop", b"k", b"value", 60.0)
        read = engine.changes(position, engine.position(), 10)
        assert read is not None
        assert {change.ttl for change in _changes(read)} == {None}

    def test_lasting_removals_are_read_in_parts_without_those_of_other_namespaces(
        self, engine: Engine, advance: Advance
    ) -> None:
        """However many end at the same time. Sessions and other removals are not among them."""
        for namespace in ("shop", "shop.eu", "-shop", "sho"):
            assert read_removals(engine, namespace) == {}
            engine.batch([Remove(namespace, b"%b %d" % (namespace.encode(), each), 600.0) for each in range(250)])
            engine.batch([Put(namespace, b"session %d" % number, b"value", 600.0) for number in range(20)])
            engine.batch([Remove(namespace, b"session %d" % number) for number in range(10)])
            engine.remove(namespace, b"over", ttl=100.0)
        advance(100.0)
        for namespace in ("shop", "shop.eu", "-shop", "sho"):
            parts = list(engine.removals(namespace, 20))
            assert len(parts) >= 2
            assert max(map(len, parts)) <= 200
            expected = {b"%b %d" % (namespace.encode(), number) for number in range(250)}
            assert {change.key for part in parts for change in part} == expected
            assert all(change.ttl == pytest.approx(500.0, abs=self.tick) for part in parts for change in part)

    def test_lasting_removals_are_not_missed_while_others_begin_and_end(self, engine: Engine, advance: Advance) -> None:
        """Between two parts, some are prolonged, some end, and some are new."""
        keys = [b"stay %d" % number for number in range(400)]
        engine.batch([Remove("shop", key, 600.0) for key in keys[:256]])
        engine.batch([Remove("shop", key, 600.0) for key in keys[256:]])
        engine.batch([Remove("shop", b"end %d" % number, 60.0) for number in range(200)])
        found: set[bytes] = set()
        for number, part in enumerate(engine.removals("shop", 20)):
            found.update(change.key for change in part)
            engine.batch([Remove("shop", key, 900.0) for key in keys[number % 7 :: 7]])
            engine.batch([Remove("shop", b"new %d %d" % (number % 100, each), 60.0) for each in range(10)])
            if number == 2:
                advance(60.0)
                engine.sweep(100)
        assert found >= set(keys)

    def test_a_lasting_removal_survives_a_purge(self, engine: Engine, advance: Advance) -> None:
        """It is a tombstone like any other; one of a purged session is that of an unknown key."""
        engine.put("shop", b"purged", b"value", 600.0)
        engine.remove("shop", b"k", ttl=600.0)
        engine.purge("shop", None)
        assert engine.remove("shop", b"purged", ttl=100.0) is False
        while engine.sweep(100):
            pass
        advance(1.0)
        _assert_gone(engine, b"k")
        assert read_removals(engine, "shop") == pytest.approx({b"k": 599.0, b"purged": 99.0}, abs=self.tick)

    def test_a_lasting_removal_that_may_leave_no_tombstone_still_removes_and_prolongs(self, engine: Engine) -> None:
        """It leaves an unknown key unknown."""
        engine.put("shop", b"there", b"value", 60.0)
        engine.remove("shop", b"removed")
        assert engine.remove("shop", b"there", ttl=300.0, tombstone=False) is True
        assert engine.remove("shop", b"removed", ttl=300.0, tombstone=False) is None
        with pytest.raises(NoTombstone):
            engine.remove("shop", b"unknown", ttl=300.0, tombstone=False)
        expected = dict.fromkeys((b"there", b"removed"), 300.0)
        assert read_removals(engine, "shop") == pytest.approx(expected, abs=self.tick)

    def test_a_pinned_session_is_a_session(self, engine: Engine, advance: Advance) -> None:
        """It expires, is removed, taken and purged as any other, and counts as one."""
        keys = [b"expires", b"taken", b"removed", b"purged", b"again"]
        for key in keys:
            assert engine.put("shop", key, b"value", 60.0, pinned=True) == pytest.approx(60.0, abs=self.tick)
        (again,) = engine.batch([Put("shop", b"again", b"value", 60.0, None, pinned=True)])
        assert isinstance(again, Kept)
        assert engine.usage("shop")["shop"].sessions == len(keys)
        assert _value(engine.take("shop", b"taken")) == b"value"
        assert engine.remove("shop", b"removed") is True
        for key in (b"taken", b"removed"):
            _assert_gone(engine, key)
        engine.purge("shop", None)
        advance(1.0)
        assert engine.get("shop", b"purged") is None
        engine.put("shop", b"purged", b"another", 600.0, pinned=True)
        while engine.sweep(100):
            pass
        advance(60.0)
        assert engine.get("shop", b"expires") is None
        while engine.sweep(100):
            pass
        assert _value(engine.get("shop", b"purged")) == b"another"
        assert engine.usage("shop")["shop"] == NamespaceUsage(
            1, 7, issued_before=engine.usage("shop")["shop"].issued_before
        )

    # --- Purges -----------------------------------------------------------------------------------------------------

    def test_the_last_purge_voids_as_much_as_all_of_them(self, engine: Engine, present: Callable[[], float]) -> None:
        """One without a time counts, whatever follows."""
        moment = round(present()) - 100.0
        assert engine.last_purge("shop") is None
        engine.purge("shop", moment)
        engine.purge("shop", moment - 50.0)
        assert engine.last_purge("shop") == NamespacePurged("shop", moment)
        assert engine.last_purge("shop.eu") is None
        cutoff = engine.purge("shop", None)
        engine.purge("shop", moment + 1.0)
        last = engine.last_purge("shop")
        assert last == NamespacePurged("shop", None)
        assert last.time == cutoff

    def test_a_purge_is_told_with_its_time(self, engine: Engine, present: Callable[[], float]) -> None:
        """Whether it is one up to a time, or of everything."""
        position, begun = engine.position(), present()
        engine.purge("shop", begun - 100.0)
        engine.purge("shop", None)
        read = engine.changes(position, engine.position(), 10)
        assert read is not None
        times = [purge.time for purge in read[0] if isinstance(purge, NamespacePurged)]
        assert times == pytest.approx([begun, begun], abs=max(self.tick, 0.01))

    def test_a_purge_ends_what_was_stored_and_nothing_else(self, engine: Engine, advance: Advance) -> None:
        """For every call; other namespaces stay, and so do later sessions."""
        neighbours = ("sho", "shop.eu", "shoq")
        for namespace in ("shop", *neighbours):
            engine.batch([Put(namespace, b"%d" % number, b"value", 60.0) for number in range(20)])
        engine.purge("shop", None)
        assert engine.batch([Get("shop", b"%d" % number) for number in range(10)]) == [None] * 10
        assert engine.get("shop", b"1") is None
        assert engine.take("shop", b"2") is None
        assert engine.remove("shop", b"3") is False
        assert engine.batch([Get("shop", b"4"), Take("shop", b"5"), Remove("shop", b"6")]) == [None, None, False]
        assert all(engine.get(namespace, b"%d" % number) for namespace in neighbours for number in range(20))
        advance(1.0)
        engine.put("shop", b"new", b"value", 60.0)
        assert _value(engine.get("shop", b"new")) == b"value"
        assert _value(engine.take("shop", b"new")) == b"value"

    def test_a_put_that_a_purge_overtook_is_refused(
        self, engine: Engine, advance: Advance, present: Callable[[], float]
    ) -> None:
        """Stored before or not, singly or in a batch, for the maximum lifetime of a session; a later one is stored."""
        issued = present() - 0.001
        engine.put("shop", b"stored", b"value", 60.0, issued)
        engine.purge("shop", None)
        for wait in (0.0, LONGEST_TTL_SECONDS - 10.0):
            advance(wait)
            for key in (b"stored", b"late"):
                with pytest.raises(AlreadyExists):
                    engine.put("shop", key, b"value", 60.0, issued)
                (outcome,) = engine.batch([Put("shop", key, b"value", 60.0, issued)])
                assert isinstance(outcome, AlreadyExists)
                assert engine.get("shop", key) is None
        engine.put("shop", b"late", b"value", 60.0)
        engine.put("eu", b"late", b"value", 60.0, issued)
        assert engine.get("shop", b"late")

    def test_a_session_older_than_any_may_be_is_not_stored(self, engine: Engine, present: Callable[[], float]) -> None:
        """The mark that would refuse it may have expired; a younger session lives for at most a week from its issue."""
        week = LONGEST_TTL_SECONDS
        outcomes = engine.batch(
            [Put("shop", b"old", b"v", 60.0, present() - week), Put("shop", b"k", b"v", 60.0, present() - week + 30.0)]
        )
        assert outcomes[0] == 0.0
        assert outcomes[1] == pytest.approx(30.0, abs=self.tick)
        assert engine.get("shop", b"old") is None
        found = engine.get("shop", b"k")
        assert found is not None
        assert found.ttl == pytest.approx(30.0, abs=self.tick)

    def test_a_purge_up_to_a_time_is_exact(self, engine: Engine, present: Callable[[], float]) -> None:
        """To the microsecond: sessions issued before are void; sessions issued at that time or later stay."""
        moment = round(present()) - 100.0
        times = {b"day": -86_400.0, b"before": -0.000_01, b"then": 0.0, b"after": 0.000_01, b"now": 99.0}
        engine.batch([Put("shop", key, b"value", 60.0, moment + time) for key, time in times.items()])
        assert engine.purge("shop", moment) == moment
        assert {key for key in times if engine.get("shop", key)} == {b"then", b"after", b"now"}

    def test_a_purge_never_goes_back(self, engine: Engine, present: Callable[[], float]) -> None:
        """An earlier time changes nothing, and both calls return the later time."""
        moment = round(present()) - 100.0
        assert engine.purge("shop", moment) == moment
        assert engine.purge("shop", moment - 50.0) == moment
        with pytest.raises(AlreadyExists):
            engine.put("shop", b"k", b"value", 60.0, moment - 1.0)
        assert engine.purge("shop", moment + 1.0) == moment + 1.0

    def test_a_purge_that_changes_nothing_is_not_told(self, engine: Engine, present: Callable[[], float]) -> None:
        """Or mirrors would search their sessions in vain."""
        moment = round(present()) - 100.0
        engine.purge("shop", moment)
        position = engine.position()
        assert engine.purge("shop", moment - 50.0) == moment
        until = engine.position()
        if position != until:
            assert engine.changes(position, until, 10) == ([], until)

    def test_no_session_and_no_purge_is_of_the_future(
        self, engine: Engine, advance: Advance, present: Callable[[], float]
    ) -> None:
        """A purge reaches the sessions of a frontend whose clock is ahead; an operator's clock may be ahead as well."""
        engine.put("shop", b"k", b"value", 60.0, present() + 3_600.0)
        engine.purge("shop", None)
        assert engine.get("shop", b"k") is None
        assert engine.purge("shop", present() + 3_600.0) <= present() + 1.0
        advance(2.0)
        assert engine.usage("shop")["shop"].sessions == 0

    def test_what_was_purged_is_as_if_it_had_never_been(self, engine: Engine, advance: Advance) -> None:
        """Except for tombstones: removed and taken sessions stay removed."""
        for key in (b"k", b"taken", b"removed"):
            engine.put("shop", key, b"value", 60.0)
        engine.take("shop", b"taken")
        engine.remove("shop", b"removed")
        engine.purge("shop", None)
        advance(1.0)
        for key in (b"taken", b"removed"):
            with pytest.raises(AlreadyExists):
                engine.put("shop", key, b"value", 60.0)
        assert engine.put("shop", b"k", b"other", 30.0) == pytest.approx(30.0, abs=self.tick)
        assert _value(engine.get("shop", b"k")) == b"other"

    def test_a_purge_is_told_behind_all_that_it_undid(self, engine: Engine, advance: Advance) -> None:
        """Changes from before the purge are those of sessions that are still valid."""
        position = engine.position()
        engine.put("shop", b"old", b"value", 60.0)
        engine.put("eu", b"other", b"value", 60.0)
        engine.purge("shop", None)
        advance(1.0)
        engine.put("shop", b"new", b"value", 60.0)
        read = engine.changes(position, engine.position(), 10)
        assert read is not None
        assert NamespacePurged("shop") in read[0]
        assert Counter(each.key for each in read[0] if isinstance(each, Change)) == Counter([b"new", b"other"])

    def test_changes_say_when_sessions_were_issued_and_up_to_when_a_namespace_was_purged(
        self, engine: Engine, present: Callable[[], float]
    ) -> None:
        """So a mirror deletes the sessions that a purge voids, and no others."""
        position, issued = engine.position(), round(present()) - 100.0
        engine.put("shop", b"timed", b"value", 60.0, issued)
        engine.put("shop", b"ahead", b"value", 60.0, present() + 3_600.0)
        engine.purge("shop", issued - 50.0)
        engine.purge("shop", issued)
        read = engine.changes(position, engine.position(), 10)
        assert read is not None
        told = {each.key: each.session for each in read[0] if isinstance(each, Change)}
        assert {key: session and session.issued_at for key, session in told.items()} == {
            b"timed": issued,
            b"ahead": pytest.approx(present(), abs=50.0),
        }
        assert [each for each in read[0] if isinstance(each, NamespacePurged)] == [
            NamespacePurged("shop", issued - 50.0),
            NamespacePurged("shop", issued),
        ]

    def test_what_was_purged_is_deleted_in_bounded_steps(self, engine: Engine, advance: Advance) -> None:
        """Every purged session is deleted, and no other."""
        engine.batch([Put("shop", b"%d" % number, b"value", 600.0) for number in range(50)])
        engine.batch([Put("eu", b"%d" % number, b"value", 600.0) for number in range(5)])
        engine.batch([Remove("shop", b"%d" % number) for number in range(10)])
        engine.purge("shop", None)
        advance(1.0)
        engine.put("shop", b"new", b"value", 600.0)
        usage = engine.usage("shop")["shop"]
        assert (usage.sessions, usage.tombstones, usage.pending_deletion) == (1, 10, 40)
        steps = 0
        while (looked := engine.sweep(8)) > 0:
            assert looked <= 8
            steps += 1
        assert steps >= 3
        usage = engine.usage("shop")["shop"]
        assert (usage.sessions, usage.tombstones, usage.pending_deletion) == (1, 10, 0)
        assert engine.usage("eu")["eu"].sessions == 5
        assert engine.get("shop", b"new")

    def test_no_look_up_finds_anything_once_a_purge_is_answered(
        self, engine: Engine, present: Callable[[], float]
    ) -> None:
        """While other threads store sessions and look them up."""
        issued, over = present() - 1.0, threading.Event()
        keys = [b"%d" % number for number in range(40)]
        together = threading.Barrier(5)

        def race(racer: int) -> None:
            together.wait()
            if racer == 4:
                engine.purge("shop", None)
                over.set()
            for turn in range(20):
                operations: list[Operation] = [Put("shop", b"%d" % turn + key, b"value", 60.0, issued) for key in keys]
                was_over = over.is_set()
                engine.batch(operations)
                found = engine.batch([Get("shop", each.key) for each in operations])
                assert not was_over or found == [None] * len(keys)

        _race(race, 5)
        assert engine.usage("shop")["shop"].sessions == 0

    def test_usage_is_what_a_look_up_would_find(
        self, engine: Engine, advance: Advance, present: Callable[[], float]
    ) -> None:
        """Of one namespace or of all, without expired entries, swept or not."""
        assert engine.usage(None) == {}
        assert engine.usage("shop") == {"shop": NamespaceUsage()}
        engine.batch([Put("shop", b"%d" % number, b"v" * 100, 600.0) for number in range(600)])
        engine.batch([Put("shop.eu", b"\0:%d" % number, b"v", 30.0 * (1 + number)) for number in range(2)])
        engine.take("shop", b"1")
        engine.remove("shop", b"unknown")
        advance(30.0)
        expected = {
            "shop": NamespaceUsage(sessions=599, value_bytes=59_900, tombstones=2),
            "shop.eu": NamespaceUsage(1, 1),
        }
        assert engine.usage(None) == expected
        assert engine.usage("shop") == {"shop": expected["shop"]}
        moment = round(present()) - 1_000.0
        engine.purge("shop", moment)
        assert engine.usage("shop")["shop"].issued_before == moment

    # --- The engine as a whole --------------------------------------------------------------------------------------

    def test_a_working_engine_passes_its_probe(self, engine: Engine) -> None:
        """With and without sessions."""
        engine.probe()
        engine.put("shop", b"k", b"value", 60.0)
        engine.probe()

    def test_totals_follow_what_is_stored(self, engine: Engine) -> None:
        """Other users of the storage count as well; nothing was evicted."""
        before = engine.totals()
        for number in range(10):
            engine.put(f"shop-{number % 2}", b"%d" % number, b"v" * 1_000, 60.0)
        after = engine.totals()
        assert after.sessions - before.sessions == 10
        assert after.bytes > 0
        assert after.evicted == 0

    def test_close_is_idempotent_and_later_calls_are_refused(self, engine: Engine) -> None:
        """With EngineUnavailable, like any outage."""
        engine.close()
        engine.close()
        calls: list[Callable[[], object]] = [
            lambda: engine.put("shop", b"k", b"value", 60.0),
            lambda: engine.get("shop", b"k"),
            lambda: engine.take("shop", b"k"),
            lambda: engine.remove("shop", b"k"),
            lambda: engine.batch([Get("shop", b"k")]),
            lambda: engine.batch([Take("shop", b"k")]),
            lambda: engine.sweep(1),
            lambda: engine.purge("shop", None),
            lambda: list(engine.removals("shop", 1)),
            lambda: engine.last_purge("shop"),
            lambda: engine.usage(None),
            engine.position,
            lambda: engine.changes(b"", b"", 1),
            engine.totals,
            engine.probe,
        ]
        for call in calls:
            with pytest.raises(EngineUnavailable):
                call()

    def test_close_lets_the_calls_under_way_finish(self, engine: Engine) -> None:
        """Every call of eight busy threads either succeeds or raises EngineUnavailable."""
        busy, refused = threading.Barrier(9), []

        def work(racer: int) -> None:
            busy.wait()
            number = 0
            try:
                while True:
                    number += 1
                    key = b"%d %d" % (racer, number)
                    engine.put("shop", key, b"value", 60.0)
                    assert engine.get("shop", key)
                    engine.batch([Take("shop", key), Remove("shop", key)])
            except EngineUnavailable as error:
                refused.append(error)

        def close(_racer: int) -> None:
            busy.wait()
            engine.put("shop", b"k", b"value", 60.0)
            engine.close()

        _race(lambda racer: close(racer) if racer == 8 else work(racer), 9)
        assert len(refused) == 8


def read_all_changes(engine: Engine, position: bytes) -> tuple[dict[tuple[str, bytes], list[bytes | None]], bytes]:
    """Return all changes after a position, by namespace and key, and the position of the end of the log."""
    changes: dict[tuple[str, bytes], list[bytes | None]] = {}
    until = engine.position()
    while position != until:
        read = engine.changes(position, until, 1_000)
        assert read is not None, "the log does not reach back"
        for change in _changes(read):
            changes.setdefault((change.namespace, change.key), []).append(_value(change.session))
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


def _changes(read: tuple[list[Change | NamespacePurged], bytes]) -> list[Change]:
    """Return the changes of a read without purges."""
    assert all(isinstance(each, Change) for each in read[0])
    return cast("list[Change]", read[0])


def _value(outcome: object) -> bytes | None:
    return outcome.value if isinstance(outcome, StoredSession) else None


def _assert_gone(engine: Engine, key: bytes) -> None:
    assert engine.get("shop", key) is None
    assert engine.take("shop", key) is None
    assert engine.remove("shop", key) is None, "there is a tombstone"
    with pytest.raises(AlreadyExists):
        engine.put("shop", key, b"value", 600.0)


def _race(run: Callable[[int], None], racers: int) -> None:
    """Call `run` in `racers` threads at once, and raise the first exception of any of them."""
    raised: list[BaseException] = []

    def guarded(racer: int) -> None:
        try:
            run(racer)
        except BaseException as error:  # noqa: BLE001 - raised below
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(racer,)) for racer in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    if raised:
        raise raised[0]
