"""Statistics of an installation: `Installation.stats`."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
"""Upper bounds of the look-up time buckets, in seconds; one more holds what took longer."""


REASONS = {
    "hits": ("mirror", "store", "retried", "coalesced"),
    "foreign_hits": ("mirror", "store", "retried", "coalesced"),
    "misses": (
        *("unknown", "foreign-id", "expired-id", "timeout", "unavailable", "rejected", "limited", "breaker-open"),
        *("too-many-lookups", "malformed", "unknown-key", "expired", "not-authentic", "undecodable"),
        *("server-name-mismatch", "internal-error", "context-mismatch", "context-unknown", "context-unstable"),
        "other-cipher",
    ),
    "puts": ("stored", "refused", "dropped", "expired", "unresumable"),
    "removals": ("fatal-error", "application", "dropped", "refused", "kept"),
    "terminations": ("context-mismatch",),
}
"""All that may be counted of stored sessions."""
TICKET_REASONS = {
    "tickets_issued": ("current", "held-over"),
    "tickets_withheld": ("no-secret", "unresumable"),
    "tickets_resumed": ("current", "previous", "older", "next"),
    "tickets_refused": (
        *(
            "unknown-secret",
            "not-authentic",
            "malformed",
            "expired",
            "revoked",
            "purged",
            "removals-unknown",
            "replayed",
        ),
        *("server-name-mismatch", "context-mismatch", "context-unknown", "context-unstable", "other-cipher"),
        *("timeout", "unavailable", "rejected", "limited", "breaker-open", "too-many-lookups", "internal-error"),
    ),
}
"""All that may be counted of tickets."""
ALL_REASONS = REASONS | TICKET_REASONS
"""All that may be counted."""


@dataclass(frozen=True)
class Stats:
    """The events since install(), each a count by reason.

    Attributes:
        hits: Sessions that OpenSSL received to resume; it may still refuse one (docs/frontends.md). `mirror` (no call);
            `store`; `retried` (a session just negotiated, found by a further call); `coalesced`
            (found by the look-up of another handshake).
        foreign_hits: Those of `hits` whose sessions another process issued: a cache of this process alone could not
            have had them. A TLS 1.3 ticket that was issued when a session resumed is its issuer's. None are counted
            with a plaintext keyring, or of ids that other TLS stacks chose.
        misses: `unknown`, `foreign-id` (not issued by this fleet for this namespace: no call), `expired-id` (no call),
            `timeout`, `unavailable`, `rejected`, `limited` (a limit of the store is used up; for a moment after that,
            no call), `breaker-open` (no call), `too-many-lookups` (no call),
            `malformed`, `unknown-key`, `expired`, `not-authentic`, `undecodable`, `server-name-mismatch` (negotiated
            for another server name), `internal-error`; `context-mismatch` (negotiated in another context:
            docs/contexts.md), `context-unknown` (no full handshake for this name in this process yet: no call),
            `context-unstable` (a connection for this name was terminated: no call), `other-cipher` (TLS 1.3:
            negotiated with another hash than the cipher has that the server chose).
        puts: `stored`, `refused`, `dropped` (the queue was full, or a limit of the store is used up), `expired` (not
            sent in time), `unresumable` (nothing to store).
        removals: `fatal-error`, `application`; `kept` counts connections that ended without close_notify, whose
            sessions stay.
        terminations: `context-mismatch` counts resumed connections that were ended after their handshake, as the
            context that served was not the session's.
        tickets_issued: `current`, with the secret of the present epoch; `held-over`, with that of an earlier one, since
            the store does not answer.
        tickets_withheld: Tickets that were not issued: `no-secret` (the store has not answered yet), `unresumable`
            (the proof of the session must not be shared).
        tickets_resumed: Tickets that resumed, by the epoch of their secret: `current`, `previous`, `older`, `next` (the
            issuer's clock is ahead).
        tickets_refused: `unknown-secret` (this process has not got the secret, or it was revoked), `not-authentic`,
            `malformed`, `expired`, `revoked`, `purged`, `removals-unknown` (the stream of removals is not live),
            `replayed` (a single use was used before); the others as in misses.
        lookup_seconds: Calls by their time: one count for each of BUCKETS and one for longer ones.
        lookup_seconds_sum: Seconds that all look-ups together took.
    """

    hits: Counter[str] = field(default_factory=Counter)
    foreign_hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    puts: Counter[str] = field(default_factory=Counter)
    removals: Counter[str] = field(default_factory=Counter)
    terminations: Counter[str] = field(default_factory=Counter)
    tickets_issued: Counter[str] = field(default_factory=Counter)
    tickets_withheld: Counter[str] = field(default_factory=Counter)
    tickets_resumed: Counter[str] = field(default_factory=Counter)
    tickets_refused: Counter[str] = field(default_factory=Counter)
    lookup_seconds: tuple[int, ...] = (0,) * (len(BUCKETS) + 1)
    lookup_seconds_sum: float = 0.0


class Recorder:
    """Counts, from any thread, and from callbacks of the garbage collector and of signals within its own methods.

    OpenSSL's remove callback runs wherever the collector frees a connection, which can be at any allocation. So the
    lock may be taken again by the thread that holds it, and the table of counts has all its keys from the beginning.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counts = dict.fromkeys(((kind, each) for kind, reasons in ALL_REASONS.items() for each in reasons), 0)
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def count(self, kind: str, reason: str) -> None:
        """Add 1 to one of the Counters of Stats.

        Args:
            kind: The name of the Counter.
            reason: One of the reasons that Stats lists.
        """
        with self._lock:
            self._counts[kind, reason] += 1

    def observe_lookup(self, seconds: float) -> None:
        """Add the time of one look-up that reached the store."""
        place = bisect_left(BUCKETS, seconds)
        with self._lock:
            self._buckets[place] += 1
            self._seconds += seconds

    def snapshot(self) -> Stats:
        """Return the counts so far."""
        with self._lock:
            counts, buckets, seconds = dict(self._counts), tuple(self._buckets), self._seconds
        counters: dict[str, Counter[str]] = {kind: Counter() for kind in ALL_REASONS}
        for (kind, reason), number in counts.items():
            if number:
                counters[kind][reason] = number
        return Stats(**counters, lookup_seconds=buckets, lookup_seconds_sum=seconds)

    def after_fork_in_child(self) -> None:
        """Begin with a lock of its own, and at zero: the parent reports its own counts."""
        self.__init__()  # type: ignore[misc]
