"""The promises of every engine about its change log and lasting removals, as tests."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from resumed_server.storage.engine import (
    UNKNOWN_TOMBSTONE_SECONDS,
    Change,
    Engine,
    Kept,
    NamespacePurged,
    NamespaceUsage,
    NoTombstone,
    Put,
    Remove,
    Take,
)
from resumed_server.storage.testing.fixtures import (
    ContractFixtures,
    assert_gone,
    changes_of,
    read_all_changes,
    read_removals,
    value_of,
)

if TYPE_CHECKING:
    from resumed_server.storage.testing.fixtures import Advance


class ChangeContract(ContractFixtures):
    """Promises about the change log, lasting removals and pinned sessions."""

    # --- Changes ----------------------------------------------------------------------------------------------------
    def test_each_change_is_in_the_log_once(self, engine: Engine) -> None:
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

    def test_a_change_has_the_remaining_ttl_of_its_session(self, engine: Engine, advance: Advance) -> None:
        """Its remaining ttl, as a look-up would return; of a session that was stored and removed, only the removal."""
        position = engine.position()
        engine.put("shop", b"a", b"value", 60.0)
        engine.put("shop", b"b", b"value", 60.0)
        engine.put("shop", b"c", b"value", 10.0)
        engine.remove("shop", b"b")
        advance(20.0)
        read = engine.changes(position, engine.position(), 10)
        assert read is not None
        sessions = {change.key: change.session for change in changes_of(read)}
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
            found.update(change.key for change in changes_of(read))
            position = read[1]
            if position == until:
                break
        assert found == Counter(keys)
        assert read_all_changes(engine, position)[0] == {("shop", b"later"): [b"value"]}

    def test_large_values_are_read_a_few_at_a_time(self, engine: Engine) -> None:
        """Without omissions."""
        position, found, reads = engine.position(), [], 0
        keys = [b"%d" % number for number in range(300)]
        for key in keys:
            engine.put("shop", key, bytes(65_536), 60.0)
        until = engine.position()
        while position != until:
            read = engine.changes(position, until, 1_000)
            assert read is not None
            assert sum(len(change.session.value) for change in changes_of(read) if change.session) <= 9 << 20
            found += [change.key for change in changes_of(read)]
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
            assert_gone(engine, key)
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
        assert_gone(engine, b"k")
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
            return [(change.key, change.ttl) for change in changes_of(read)]

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

    def test_an_expired_lasting_removal_is_read_like_any_other(self, engine: Engine, advance: Advance) -> None:
        """Its key can have a session again."""
        position = engine.position()
        engine.remove("shop", b"k", ttl=100.0)
        advance(100.0)
        engine.put("shop", b"k", b"value", 60.0)
        read = engine.changes(position, engine.position(), 10)
        assert read is not None
        assert {change.ttl for change in changes_of(read)} == {None}

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
        assert_gone(engine, b"k")
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
        assert value_of(engine.take("shop", b"taken")) == b"value"
        assert engine.remove("shop", b"removed") is True
        for key in (b"taken", b"removed"):
            assert_gone(engine, key)
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
        assert value_of(engine.get("shop", b"purged")) == b"another"
        assert engine.usage("shop")["shop"] == NamespaceUsage(
            1, 7, issued_before=engine.usage("shop")["shop"].issued_before
        )
