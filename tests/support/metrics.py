"""Samples of a metrics endpoint."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from support.server import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.server import RunningServer

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """Samples by name and labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples: Samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Return a sample, 0 if there is none."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of all samples with these labels, and any others."""
        return sum(
            value for (called, having), value in self.samples.items() if called == name and labels.items() <= having
        )

    def labels(self, name: str, label: str) -> set[str]:
        """Return the values that a label has."""
        return {dict(having)[label] for called, having in self.samples if called == name}


def scrape(server: RunningServer) -> Scrape:
    """Ask a server for its metrics."""
    (address,) = server.log_lines("listening")[0]["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
        return Scrape(answer.read().decode())


def scraped_until(server: RunningServer, met: Callable[[Scrape], bool]) -> Scrape:
    """Scrape until the samples meet a condition: workers publish their metrics periodically."""
    end = time.monotonic() + PATIENCE
    while True:
        found = None
        with contextlib.suppress(ConnectionError):  # by a worker that was killed
            found = scrape(server)
            if met(found):
                return found
        assert time.monotonic() < end, found and found.text
        time.sleep(0.05)
