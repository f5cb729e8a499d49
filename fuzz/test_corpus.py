"""Every reader of foreign bytes, with all inputs that fuzzing has found worth keeping, and some that are new."""

from __future__ import annotations

import random

import pytest

from fuzz.handshakes import HANDSHAKES
from fuzz.target import Target, mutated
from fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_input_breaks_a_reader(target: Target) -> None:
    check, source = target.prepare(), random.Random(7400)
    kept = [path.read_bytes() for path in sorted(target.corpus.iterdir())]
    assert kept
    for data in kept:
        check(data)
    for _ in range(100 if target in HANDSHAKES else 1_000):
        check(mutated(source.choice(kept), source)[: target.longest])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_its_seeds_are_inputs(target: Target) -> None:
    check = target.prepare()
    for seed in target.seeds():
        assert len(seed) <= target.longest
        check(seed)
