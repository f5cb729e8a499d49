"""Scrape metrics endpoints, and compute rates between two scrapes."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from resumed_server.cli.diagnosis import protocol_of
from resumed_server.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE = 3.0
"""Time limit of a scrape, in seconds."""
_LARGEST = 16 << 20

_PROTOCOLS = {
    "HTTP/2": "speaks gRPC and not HTTP/1.1: it is the address where the store serves sessions",
    "TLS": "speaks TLS and not plain HTTP: it may be the address where the store serves sessions",
}
"""By the protocol that a server speaks: the meaning."""

Labels = frozenset[tuple[str, str]]


class Unreachable(Exception):
    """An endpoint cannot be scraped; the message is the reason and the remedy.

    Attributes:
        status: The exit status that it causes.
    """

    def __init__(self, message: str, status: ExitStatus) -> None:
        super().__init__(message)
        self.status = status


class Scrape(NamedTuple):
    """The metrics of an endpoint at one time: values by name and labels."""

    time: float
    values: dict[str, dict[Labels, float]]


class Period:
    """The changes of one endpoint between two scrapes."""

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self._before, self._after = before, after
        self.seconds = max(after.time - before.time, 1e-9)

    def __contains__(self, name: str) -> bool:
        """Return whether the endpoint has such a metric."""
        return bool(self._after.values.get(name))

    def labels(self, name: str, label: str) -> list[str]:
        """Return the values that a label of a metric has."""
        return sorted({dict(labels).get(label, "") for labels in self._after.values.get(name, ())})

    def value(self, name: str, **where: str) -> float | None:
        """Return the present sum of a metric over all labels beside those given, or None if there is none."""
        found = [value for labels, value in self._after.values.get(name, {}).items() if where.items() <= labels]
        return sum(found) if found else None

    def text(self, name: str, label: str) -> str:
        """Return the value of a label of a metric that there is once."""
        return (self.labels(name, label) or [""])[0]

    def rate(self, name: str, **where: str) -> float:
        """Return the increase of a counter per second; after a restart it began at zero."""
        rise = 0.0
        before = self._before.values.get(name, {})
        for labels, value in self._after.values.get(name, {}).items():
            if where.items() <= labels:
                was = before.get(labels, 0.0)
                rise += value - was if value >= was else value
        return rise / self.seconds

    def quantile(self, share: float, name: str, **where: str) -> float | None:
        """Return the time that a share of the calls did not exceed, as Prometheus estimates it; None without calls."""
        buckets = sorted(
            (float(bound), self.rate(f"{name}_bucket", le=bound, **where))
            for bound in self.labels(f"{name}_bucket", "le")
        )
        if not buckets or not buckets[-1][1]:
            return None
        wanted, low, below = share * buckets[-1][1], 0.0, 0.0
        for bound, reached in buckets[:-1]:
            if reached >= wanted:
                return low + (bound - low) * (wanted - below) / (reached - below)
            low, below = bound, reached
        return low  # longer than the largest bound, by an unknown amount


def endpoints(given: Sequence[str]) -> list[str]:
    """Return the URLs that a user means: host:port or URLs; every address of a name is one.

    Raises:
        UserError: One is no address.
    """
    found: dict[str, None] = {}
    for text in given:
        wrong = f"ENDPOINT: {text!r} is not an address such as 127.0.0.1:9464 or http://store:9464/metrics"
        try:
            url = urlsplit(text if "://" in text else f"http://{text}")
            host, port = url.hostname, url.port
        except ValueError:
            raise UserError(wrong) from None
        if not host or not port or url.scheme != "http":
            raise UserError(wrong)
        for address in _addresses(host):
            found[f"http://{address}:{port}{url.path or '/metrics'}"] = None
    return list(found)


def scrape_all(urls: Sequence[str]) -> dict[str, Scrape | Unreachable]:
    """Scrape all endpoints concurrently."""
    with ThreadPoolExecutor(max(1, min(len(urls), 32))) as pool:
        return dict(zip(urls, pool.map(_scrape_one, urls), strict=True))


def _scrape_one(url: str) -> Scrape | Unreachable:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310 - http only, see endpoints()
            text = answer.read(_LARGEST).decode()
        values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("resumed_"):
                    values.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    except urllib.error.HTTPError as error:
        return Unreachable(f"answers with HTTP status {error.code}; correct the address", ExitStatus.FAILED)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _explain(url, getattr(error, "reason", error))
    if not values:
        return Unreachable("has no metrics of resumed; correct the address", ExitStatus.FAILED)
    return Scrape(time.monotonic(), values)


def _explain(url: str, error: object) -> Unreachable:
    """Return the reason for a failed scrape; connect again if another protocol may be the cause."""
    if isinstance(error, TimeoutError):
        return Unreachable("does not answer in time; check address and firewall", ExitStatus.RETRY)
    if isinstance(error, OSError) and error.errno not in {None, errno.ECONNRESET}:
        text = f"{error.strerror}; start the store with --metrics-listen, or correct the address"
        return Unreachable(text, ExitStatus.RETRY)
    with contextlib.suppress(OSError):
        parts = urlsplit(url)
        for family, _, _, _, where in socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM):
            if protocol := protocol_of((family, (str(where[0]), int(where[1])))):
                return Unreachable(
                    f"{_PROTOCOLS[protocol]}; give the address of its --metrics-listen", ExitStatus.USAGE
                )
    return Unreachable("does not answer with metrics; correct the address", ExitStatus.FAILED)


def _addresses(host: str) -> list[str]:
    """Return the addresses of a name, those of IPv4 if there are any; a name that has none stays as it is."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return [f"[{host}]" if ":" in host else host]
    four = sorted({str(where[0]) for family, _, _, _, where in found if family == socket.AF_INET})
    return four or sorted({f"[{where[0]}]" for *_, where in found})
