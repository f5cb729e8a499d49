"""Processor time of the server's own code for a call, without gRPC: `python benchmarks/server_inside.py`.

One thread of this process decodes a request, calls the service with an LMDB engine, and encodes the response. Figures
are microseconds of processor time, medians of the rounds with the range; `--profile Get` prints a profile.
"""

# ruff: noqa: T201 - the script prints its figures
from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.engines import METHODS, generate_requests
from benchmarks.measuring import spread
from resumed_server.rpc.session_service import SessionStoreService
from resumed_server.storage.registry import open_engine
from resumed_server.watch.hub import WatchHub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.message import Message


def prepare_calls(service: SessionStoreService, operation: str, messages: Sequence[Message]) -> Callable[[], None]:
    """Return a function that makes the calls of one round."""
    handler: Any = getattr(service, METHODS[operation])
    read: Any = type(messages[0]).FromString
    bodies = [message.SerializeToString() for message in messages]

    def make_calls() -> None:
        for body in bodies:
            handler(read(body), None).SerializeToString()

    return make_calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5_000, help="sessions in each round of an operation")
    parser.add_argument("--profile", choices=METHODS, help="print a profile of this operation")
    options = parser.parse_args()
    figures: defaultdict[str, list[float]] = defaultdict(list)
    profile = cProfile.Profile()
    with contextlib.closing(open_engine("lmdb:", capacity=1 << 30)) as engine:
        service = SessionStoreService(engine, WatchHub(engine), max_ttl=86_400)
        for turn in range(options.rounds + 1):
            for operation, messages in generate_requests(options.calls):
                make_calls = prepare_calls(service, operation, messages)
                profiled = profile if operation == options.profile and turn else contextlib.nullcontext()
                started = time.process_time()
                with profiled:
                    make_calls()
                if turn:
                    figures[operation].append((time.process_time() - started) / len(messages))
    for operation, seconds in figures.items():
        print(f"{operation:14} {spread(seconds, 1, factor=1e6)} us")
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()
