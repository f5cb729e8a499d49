"""The promises of every engine about sessions, as tests."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from resumed_server.storage.engine import (
    UNKNOWN_TOMBSTONE_SECONDS,
    AlreadyExists,
    Engine,
    Get,
    Kept,
    NoTombstone,
    Operation,
    Put,
    Remove,
    StoredSession,
    Take,
)
from resumed_server.storage.testing.fixtures import (
    KEYS,
    NAMESPACES,
    ContractFixtures,
    assert_gone,
    race_threads,
    value_of,
)

if TYPE_CHECKING:
    from resumed_server.storage.testing.fixtures import Advance, RawValues


class SessionContract(ContractFixtures):
    """Promises about Put, Get, Take, Remove and Batch: addresses, write-once ids, tombstones, expiry."""

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

    def test_a_stored_session_is_found_with_its_remaining_ttl(self, engine: Engine, advance: Advance) -> None:
        """A look-up does not consume the session."""
        assert engine.put("shop", b"k", b"value", 60.0) == pytest.approx(60.0, abs=self.tick)
        advance(20.0)
        for _ in range(2):
            found = engine.get("shop", b"k")
            assert found is not None
            assert found.value == b"value"
            assert found.ttl == pytest.approx(40.0, abs=self.tick)

    def test_a_put_returns_whether_it_stored_the_session(self, engine: Engine) -> None:
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
            assert value_of(engine.get(namespace, key)) == value
            assert value_of(engine.take(namespace, key)) == value
            assert not engine.remove(namespace, key)

    @pytest.mark.parametrize("value", [b"\0", b"v" * 4_096, b"\0" * 65_536, bytes(range(256)) * 256])
    def test_any_valid_value_comes_back_whole(self, engine: Engine, value: bytes) -> None:
        """1 to 65,536 bytes, including NULs."""
        engine.put("shop", b"k", value, 60.0)
        assert value_of(engine.get("shop", b"k")) == value
        assert value_of(engine.take("shop", b"k")) == value

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
        assert value_of(engine.get("shop", b"k")) == b"value"
        advance(60.0)
        assert engine.get("shop", b"k") is None

    # --- Tombstones -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("end", ["take", "remove"])
    def test_removed_and_taken_sessions_stay_away_until_their_expiry(
        self, engine: Engine, advance: Advance, end: str
    ) -> None:
        """A late or retried Put does not restore it, and does not prolong the tombstone."""
        engine.put("shop", b"k", b"value", 600.0)
        advance(10.0)
        assert getattr(engine, end)("shop", b"k")
        assert_gone(engine, b"k")
        advance(589.0)
        assert_gone(engine, b"k")
        advance(1.0)
        assert engine.put("shop", b"k", b"value", 60.0) == pytest.approx(60.0, abs=self.tick)
        assert value_of(engine.get("shop", b"k")) == b"value"

    def test_a_removed_unknown_key_refuses_a_put_for_a_minute(self, engine: Engine, advance: Advance) -> None:
        """The Put may have been sent before the Remove. A second Remove does not prolong the minute."""
        assert engine.remove("shop", b"k") is False
        advance(UNKNOWN_TOMBSTONE_SECONDS - 1.0)
        assert_gone(engine, b"k")
        advance(1.0)
        engine.put("shop", b"k", b"value", 60.0)
        assert value_of(engine.get("shop", b"k")) == b"value"

    def test_a_take_that_misses_leaves_no_tombstone(self, engine: Engine) -> None:
        """A look-up that arrives before the Put must not reject the Put."""
        assert engine.take("shop", b"k") is None
        engine.put("shop", b"k", b"value", 60.0)
        assert value_of(engine.take("shop", b"k")) == b"value"

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
            assert_gone(engine, key)
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
        assert value_of(engine.get("shop", b"k")) == b"new"
        advance(1.0)
        assert engine.sweep(100) == int(self.sweeps)
        assert engine.sweep(100) == 0

    def test_a_remove_over_an_expired_session_is_one_of_an_unknown_key(self, engine: Engine, advance: Advance) -> None:
        """It returns False, and the key refuses Puts for a minute."""
        engine.put("shop", b"k", b"value", 5.0)
        advance(5.0)
        assert engine.remove("shop", b"k") is False
        advance(UNKNOWN_TOMBSTONE_SECONDS - 1.0)
        assert_gone(engine, b"k")
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
        assert value_of(engine.take(*other)) == b"other"

    # --- Take, raced ------------------------------------------------------------------------------------------------

    def test_a_session_is_returned_once_to_concurrent_takes(self, engine: Engine) -> None:
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

        race_threads(take, 8)
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

        race_threads(put, 4)
        assert sorted(won) == sorted((key, value_of(engine.get("shop", key))) for key in keys)

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
        shapes = [value_of(each) if isinstance(each, StoredSession) else type(each) for each in outcomes]
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
