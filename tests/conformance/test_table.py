from __future__ import annotations

import ssl
from dataclasses import replace

import pytest

from conformance import scenarios
from conformance.client import Client
from conformance.fleet import MODES, table
from support.server import running_server


def test_every_row_has_a_scenario_and_every_exception_a_row() -> None:
    """`make frontends` tests every row of the table and skips none silently."""
    behaviours, stacks = table()
    rows = {row.scenario for row in behaviours}
    assert all(callable(getattr(scenarios, row)) for row in rows)
    assert len(rows) == len(behaviours)
    assert all(stack.cannot.keys() | stack.cannot_with_tickets.keys() <= rows for stack in stacks)
    assert all(set(row.modes) <= set(MODES) for row in behaviours)
    with_vectors = {stack.name for stack in stacks if stack.vectors}
    assert all(stack.vectors or stack.sealing in with_vectors for stack in stacks)


def test_scenarios_distinguish_frontends_that_resume_from_others() -> None:
    """A short form of `make frontends` with a frontend in Python."""
    own = table()[1][0]
    stranger = replace(own, any_id=["--namespace", "other"])
    with running_server() as store:
        scenarios.another_process(own, store.target, Client(ssl.TLSVersion.TLSv1_3))
        with pytest.raises(AssertionError, match="connection 1"):
            scenarios.across(own, stranger, store.target, Client(ssl.TLSVersion.TLSv1_3))
