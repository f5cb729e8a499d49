"""Enforcement of limits: the limit of each identity and namespace, and its state."""

from __future__ import annotations

import functools
import random
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from resumed_server.limits.config import LIMIT_NAMES, Limit
from resumed_server.limits.rate_limiter import RateLimiter, RateTable
from resumed_server.limits.usage_counters import ENTRY_BYTES, UsageCounter, UsageCounters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MIN_REJECTIONS_PER_SECOND = 100
"""Rejections per second that leave at once, or the rate of the limit if that is higher. Further ones are delayed.

A frontend must receive a rejection within the deadline of a handshake, or it counts as an outage there.
"""
MAX_DELAY_SECONDS = 20.0
"""Maximum delay of a rejection."""
_MAX_CACHED = 4_096


class LimitExceeded(Exception):
    """A limit is used up.

    Attributes:
        subject: The identity, or the namespaces, that the limit applies to.
        rule: The pattern of the limit in the grants file; empty for the default limit of each namespace.
        limit: The name of the limit in the grants file.
        retry: Seconds after which another call may succeed; None if the time alone does not help.
        delay: Seconds by which to delay the rejection, so that a client that ignores rejections gains nothing.
    """

    def __init__(
        self, subject: str, rule: Limit, limit: str, *, retry: float | None = None, delay: float = 0.0
    ) -> None:
        super().__init__(f"{subject} is at its limit of {getattr(rule, limit)} {limit.replace('_', ' ')}")
        self.subject = subject
        self.rule = rule.identity or ", ".join(rule.namespaces)
        self.limit = limit
        self.retry = retry
        self.delay = delay


class LimitUse(NamedTuple):
    """A limit and its use, for metrics.

    Attributes:
        subject: The patterns that the limit applies to, or the namespace of a default limit.
        limit: The name of the limit in the grants file.
        amount: Its value.
        used: Its use; None if that is no number at one time, as of a rate.
    """

    subject: str
    limit: str
    amount: int
    used: int | None


class LimitObserver(Protocol):
    """Is notified of calls and operations beyond a limit."""

    def on_limit(self, limit: Limit, subject: str, name: str, /) -> None:
        """Record that `subject` is at the part `name` of its limit."""


class SharedCounters(NamedTuple):
    """The memory in which the processes of a server count together. Create it before the fork."""

    rates: RateTable
    usage: UsageCounters

    @classmethod
    def create(cls, clock: Callable[[], float] = time.monotonic) -> SharedCounters:
        """Return empty counters; `clock` returns monotonic seconds."""
        return cls(RateTable(clock), UsageCounters())


class LimitState:
    """The state of one limit.

    Args:
        subject: The identity, or the namespaces, that the limit applies to.
        limit: The limit.
        shared: The memory of its counters.
        on_rejection: Is called with the name of the limit before each rejection.

    Attributes:
        usage: Counter of sessions and bytes; None if they are not limited.
    """

    def __init__(
        self,
        subject: str,
        limit: Limit,
        shared: SharedCounters,
        on_rejection: Callable[[LimitState, str], object] = lambda *_: None,
    ) -> None:
        rates = shared.rates
        self.subject, self.limit, self._on_rejection = subject, limit, on_rejection
        kind = "identity" if limit.identity else "namespaces"
        per_second = limit.operations_per_second
        self._operations = RateLimiter(rates, f"{kind} {subject}", per_second) if per_second else None
        rejections = max(MIN_REJECTIONS_PER_SECOND, per_second or 0)
        self._rejections = RateLimiter(rates, f"rejected {kind} {subject}", rejections)
        self.usage = UsageCounter(shared.usage, subject) if limit.limits_sizes else None

    def acquire(self, operations: int) -> None:
        """Count the operations of a call.

        Raises:
            LimitExceeded: The rate is exceeded; no operation was counted.
        """
        if self._operations and (wait := self._operations.try_acquire(operations)):
            raise self._exceeded("operations_per_second", retry=wait)

    def admit_entry(self, size: int) -> None:
        """Count a session whose value has `size` bytes, or a tombstone (0 bytes).

        Raises:
            LimitExceeded: There is no room for it; it was not counted.
        """
        usage, limit = self.usage, self.limit
        if not usage:
            return
        if limit.sessions is not None and usage.entries >= limit.sessions:
            raise self._exceeded("sessions", delayed=False)
        if limit.bytes is not None and usage.bytes + size + ENTRY_BYTES > limit.bytes:
            raise self._exceeded("bytes", delayed=False)
        usage.add(size)

    def release_entry(self, size: int) -> None:
        """Subtract an entry that was admitted, but not stored."""
        if self.usage:
            self.usage.subtract(size)

    def admit_watcher(self, present: int) -> None:
        """Return if one more watcher than the `present` ones is allowed.

        Raises:
            LimitExceeded: It is not allowed.
        """
        if self.limit.watchers is not None and present >= self.limit.watchers:
            raise self._exceeded("watchers")

    def uses(self) -> Iterator[LimitUse]:
        """Yield the amounts of the limit, and the use of each that is a number at one time."""
        used = {"sessions": self.usage.entries, "bytes": self.usage.bytes} if self.usage else {}
        for name in LIMIT_NAMES:
            amount = getattr(self.limit, name)
            if amount is not None:
                yield LimitUse(self.limit.label or self.subject, name, amount, used.get(name))

    def _exceeded(self, name: str, retry: float | None = None, *, delayed: bool = True) -> LimitExceeded:
        self._on_rejection(self, name)
        if not delayed:
            return LimitExceeded(self.subject, self.limit, name)
        # Random delays: without them the clients of all delayed calls would return at the same moment.
        delay = self._rejections.reserve(MAX_DELAY_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        return LimitExceeded(self.subject, self.limit, name, retry=retry, delay=delay)


class Limits(Protocol):
    """The content of a file that has limits."""

    @property
    def limits(self) -> Sequence[Limit]:
        """The limits in the order of the file: the first that applies counts."""


class LimitsFile(Protocol):
    """A file that is reloaded when it changes."""

    @property
    def value(self) -> Limits:
        """Its content: the same object as long as the file does not change."""


class LimitEnforcer:
    """The limits of a server.

    Args:
        defaults: The limit of each namespace without a limit in the grants file.
        grants: The grants file, if there is one.
        shared: The memory of the counters.

    Attributes:
        observer: Is notified of rejections; None for none.
    """

    def __init__(
        self, defaults: Limit | None = None, grants: LimitsFile | None = None, shared: SharedCounters | None = None
    ) -> None:
        self._defaults = defaults if defaults and defaults != Limit() else None
        self._grants, self._shared = grants, shared or SharedCounters.create()
        self._cache = self._create_cache(None)
        self.observer: LimitObserver | None = None

    @property
    def limits_sizes(self) -> bool:
        """Whether any limit is one of sessions or bytes."""
        limits = self._grants.value.limits if self._grants else ()
        return any(limit.limits_sizes for limit in (*limits, self._defaults) if limit)

    def for_identities(self, identities: Sequence[str]) -> LimitState | None:
        """Return the limit of a caller with these identities, None if it has none."""
        for limit in self._grants.value.limits if self._grants else ():
            for identity in identities:
                if limit.matches_identity(identity):
                    return LimitState(identity, limit, self._shared, self._on_rejection)
        return None

    def uses(self, namespaces: Iterable[str]) -> Iterator[LimitUse]:
        """Yield all limits of the file, and the default limits of `namespaces` that have no other."""
        limits = self._grants.value.limits if self._grants else ()
        for limit in limits:
            yield from LimitState(", ".join(limit.namespaces) or limit.identity, limit, self._shared).uses()
        if self._defaults:
            for namespace in namespaces:
                if not any(limit.matches_namespace(namespace) for limit in limits):
                    yield from LimitState(namespace, self._defaults, self._shared).uses()

    def for_namespace(self, namespace: str) -> LimitState | None:
        """Return the limit of a namespace, which others may share; None if it has none."""
        file = self._grants.value if self._grants else None
        if not self._defaults and not (file and file.limits):
            return None
        cache = self._cache
        if cache[0] is not file:
            cache = self._cache = self._create_cache(file)
        return cache[1](namespace)

    def _create_cache(self, file: Limits | None) -> tuple[Limits | None, Callable[[str], LimitState | None]]:
        create = functools.partial(self._create, file.limits if file else ())
        return file, functools.lru_cache(_MAX_CACHED)(create)

    def _create(self, limits: Sequence[Limit], namespace: str) -> LimitState | None:
        for limit in limits:
            if limit.matches_namespace(namespace):
                return LimitState(", ".join(limit.namespaces), limit, self._shared, self._on_rejection)
        return LimitState(namespace, self._defaults, self._shared, self._on_rejection) if self._defaults else None

    def _on_rejection(self, state: LimitState, name: str) -> None:
        if self.observer:
            self.observer.on_limit(state.limit, state.subject, name)
