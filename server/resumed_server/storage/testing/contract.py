"""The promises of every engine, as tests: subclass EngineContract and define the fixtures `engine` and `kept`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from resumed_server.storage.engine import (
    Engine,
    EngineUnavailable,
    Get,
    NamespaceUsage,
    Put,
    Remove,
    Take,
)
from resumed_server.storage.testing.change_contract import ChangeContract
from resumed_server.storage.testing.fixtures import race_threads
from resumed_server.storage.testing.purge_contract import PurgeContract
from resumed_server.storage.testing.session_contract import SessionContract

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.storage.testing.fixtures import Advance


class EngineContract(SessionContract, ChangeContract, PurgeContract):
    """The promises of `resumed_server.storage.engine.Engine`.

    A subclass defines the fixtures `engine` and `kept`, and overrides the others and the class variables as it needs.
    """

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

        race_threads(lambda racer: close(racer) if racer == 8 else work(racer), 9)
        assert len(refused) == 8
