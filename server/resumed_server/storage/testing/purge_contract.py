"""The promises of every engine about purges, as tests."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from resumed_server.storage.engine import (
    LONGEST_TTL_SECONDS,
    AlreadyExists,
    Change,
    Engine,
    Get,
    NamespacePurged,
    Operation,
    Put,
    Remove,
    Take,
)
from resumed_server.storage.testing.fixtures import (
    ContractFixtures,
    race_threads,
    value_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.storage.testing.fixtures import Advance


class PurgeContract(ContractFixtures):
    """Promises about purges: exact, permanent, and in order with other changes."""

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

    def test_the_change_of_a_purge_has_its_time(self, engine: Engine, present: Callable[[], float]) -> None:
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
        assert value_of(engine.get("shop", b"new")) == b"value"
        assert value_of(engine.take("shop", b"new")) == b"value"

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

    def test_a_purge_without_effect_is_no_change(self, engine: Engine, present: Callable[[], float]) -> None:
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

    def test_purged_sessions_are_as_if_never_stored(self, engine: Engine, advance: Advance) -> None:
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
        assert value_of(engine.get("shop", b"k")) == b"other"

    def test_a_purge_follows_the_changes_that_it_voids(self, engine: Engine, advance: Advance) -> None:
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

    def test_purged_sessions_are_deleted_in_bounded_steps(self, engine: Engine, advance: Advance) -> None:
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

        race_threads(race, 5)
        assert engine.usage("shop")["shop"].sessions == 0
