"""protos/vectors/policy.json: the policy that the clients of all languages share."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from resumed import _install
from resumed._async import suspendable_handshake
from resumed._client import limits
from resumed._crypto import ticket_secret
from resumed._policy import circuit_breaker, lookups, removals, session_policy, ticket_secrets, tickets, write_queue
from resumed._policy.circuit_breaker import Breaker
from resumed._policy.stats import BUCKETS, REASONS

VECTORS = Path(__file__).parents[3] / "protos" / "vectors"
POLICY = json.loads((VECTORS / "policy.json").read_text())
LIMITS = json.loads((VECTORS / "limits.json").read_text())


def ms(*seconds: float) -> list[float]:
    return [round(1000 * each, 6) for each in seconds]


def first_and_max(*seconds: float) -> dict[str, float]:
    return dict(zip(("first", "max"), ms(*seconds), strict=True))


def test_the_constants_are_those_of_all_clients() -> None:
    defaults = {
        name: each.default for name, each in inspect.signature(_install.install).parameters.items() if each.default
    }
    assert POLICY["constants"] == {
        "namespace_pattern": limits.NAMESPACE_PATTERN,
        "default_lifetime_seconds": defaults["lifetime"],
        "max_lifetime_seconds": session_policy.MAX_LIFETIME,
        "default_deadline_ms": ms(defaults["deadline"])[0],
        "deadline_share": lookups._DEADLINE_SHARE,
        "default_max_lookups": defaults["max_lookups"],
        "max_lookups_per_handshake": suspendable_handshake.MAX_LOOKUPS,
        "fresh_seconds": session_policy._FRESH_SECONDS,
        "retry_pauses_ms": ms(*lookups._FRESH_PAUSES),
        "min_call_ms": ms(lookups._LEAST_ASK_SECONDS)[0],
        "breaker_failures": inspect.signature(Breaker).parameters["failures"].default,
        "probe_pause_ms": first_and_max(circuit_breaker._FIRST_PROBE_DELAY, circuit_breaker._LONGEST_PROBE_DELAY),
        "probe_reset_ms": ms(circuit_breaker._RESET_AFTER)[0],
        "limit_pause_ms": first_and_max(circuit_breaker._FIRST_BACKOFF, circuit_breaker._LONGEST_BACKOFF),
        "scarcity_ms": ms(circuit_breaker._SCARCE_SECONDS)[0],
        "queue_bytes": write_queue.QUEUE_BYTES,
        "queue_item_bytes": write_queue._OVERHEAD,
        "batch_operations": limits.BATCH_OPERATIONS,
        "busy_batch_operations": write_queue.BUSY_OPERATIONS,
        "busy_batch_pause_ms": ms(write_queue.BUSY_PAUSE)[0],
        "batch_deadline_ms": ms(write_queue.BATCH_DEADLINE)[0],
        "batch_retry_ms": first_and_max(write_queue.RETRY_SECONDS, write_queue.LONGEST_RETRY_SECONDS),
        "max_value_bytes": LIMITS["value"]["max_bytes"],
        "lookup_buckets_ms": ms(*BUCKETS),
    }


def test_the_constants_of_tickets_are_those_of_all_clients() -> None:
    parameters = inspect.signature(_install.install).parameters
    assert POLICY["tickets"]["constants"] == {
        "default_rotation_seconds": parameters["rotation"].default,
        "max_rotation_seconds": ticket_secret.MAX_ROTATION,
        "default_revocation_grace_seconds": parameters["revocation_grace"].default,
        "stale_stream_ms": ms(tickets._STALE_SECONDS)[0],
        "max_generations": ticket_secrets._MAX_GENERATIONS,
        "max_recheck_seconds": ticket_secrets._MAX_RECHECK_SECONDS,
        "next_secret_parts": ticket_secrets._NEXT_WITHIN,
        "agreement_deadline_ms": ms(ticket_secrets._DEADLINE)[0],
        "agreement_retry_ms": first_and_max(ticket_secrets._FIRST_RETRY, ticket_secrets._LONGEST_RETRY),
        "unknown_name_pause_ms": ms(ticket_secrets._UNKNOWN_NAME_PAUSE)[0],
        "max_removals": removals.MAX_REMOVALS,
        "max_own_removals": tickets._MAX_OWN_REMOVALS,
        "max_removal_seconds": tickets._MAX_REMOVAL_SECONDS,
        "max_session_bytes": tickets.MAX_SESSION_BYTES,
    }


def test_the_limits_are_those_of_the_contract() -> None:
    assert LIMITS["namespace"]["pattern"] == limits.NAMESPACE_PATTERN
    assert LIMITS["operations"]["max_items"] == limits.BATCH_OPERATIONS
    framing = limits.BATCH_OPERATIONS * (LIMITS["key"]["max_bytes"] + 128)
    assert limits.BATCH_VALUE_BYTES + framing <= LIMITS["request"]["max_bytes"]


@pytest.mark.parametrize("kind", POLICY["reasons"])
def test_the_reasons_are_those_of_all_clients(kind: str) -> None:
    absent = POLICY["absent_reasons"]["python"].get(kind, [])
    assert list(REASONS[kind]) == [each for each in POLICY["reasons"][kind] if each not in absent]


@pytest.mark.parametrize("sequence", POLICY["sequences"], ids=lambda each: each["name"])
def test_the_breaker_follows_the_sequence(sequence: dict[str, Any]) -> None:
    now = 0.0
    breaker = Breaker(clock=lambda: now)
    for step in sequence["steps"]:
        now = step["at_ms"] / 1000
        apply(step, breaker)
        assert lookups_of(breaker) == step["lookups"], step
        if "new_sessions" in step:
            assert step["new_sessions"] == ("dropped" if breaker.scarce else "stored"), step
        if "next_probe_ms" in step:
            assert ms(breaker.next_probe_delay()) == [step["next_probe_ms"]], step


def apply(step: dict[str, Any], breaker: Breaker) -> None:
    event, result, began = step["event"], step.get("result"), step.get("began_ms", 0) / 1000
    if result == "limited":
        breaker.record_rate_limited(began)
    elif event in ("lookup", "probe") and result == "ok":
        breaker.succeeded()
    elif event == "lookup":
        breaker.failed(began, late=result == "timeout")


def lookups_of(breaker: Breaker) -> str:
    if not breaker.closed:
        return "breaker-open"
    return "limited" if breaker.rate_limited else "call"
