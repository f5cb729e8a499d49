"""Tickets of a fleet: the decisions about each ticket, without TLS and without ctypes.

A ticket carries its session. The store has the secrets that the tickets' keys are derived from (ticket_secrets.py), and
the removals of lineages, which a thread follows. So no handshake waits for the store, except for a single use.

- A ticket resumes only in the context that negotiated its lineage, and only for the same server name: docs/contexts.md.
- A lineage ends `lifetime` after its full handshake. No ticket prolongs it.
- Removals and purges reach all frontends by the stream. While it is not live, tickets resume for `grace` seconds.
- A ticket that does not resume costs a full handshake, and nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from resumed._client.store import Remove
from resumed._crypto.store_key import StoreKeys
from resumed._crypto.ticket_secret import NAME_BYTES
from resumed._crypto.ticket_state import LINEAGE_BYTES, TicketState, hash_name
from resumed._exceptions import StoreError
from resumed._policy.lookups import Claim, completed_future
from resumed._policy.removals import Removals
from resumed._policy.ticket_secrets import DEFAULT_ROTATION
from resumed._process.fork import register_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from resumed._async.suspendable_handshake import SuspendableHandshake
    from resumed._client.store import Change, StoreClient, Watch
    from resumed._crypto.ticket_secret import TicketSecret
    from resumed._policy.lookups import LookupResult, Lookups
    from resumed._policy.served_names import Expected
    from resumed._policy.stats import Recorder
    from resumed._policy.ticket_secrets import TicketSecrets

DEFAULT_GRACE = 300
"""Seconds for which tickets resume without a live stream of removals."""
MAX_SESSION_BYTES = 8192
"""Bytes of a session that a ticket carries; a larger one, with its client's certificates, is stored."""
HEAD_BYTES = 32
"""Bytes at the beginning of a ticket that are never the same twice: the name of its key, and its IV."""

_STALE_SECONDS = 3.0
"""Seconds without a message after which the stream is not live: the store sends one each second."""
_RETRY_SECONDS = 1.0
"""Seconds between two attempts to follow the removals."""
_MAX_OWN_REMOVALS = 16_384
"""How many of its removals a process sends again when the store has lost its storage."""
_MAX_REMOVAL_SECONDS = 7 * 24 * 3600
"""Seconds for which the store keeps a removal or a claim at most."""
_DEADLINE = 1.0
_FAILURES_TO_LOG = 2
"""Failures in a row that are worth a line: a server that stops ends its streams, and the next one serves at once."""

_log = logging.getLogger("resumed")


class TicketOptions(NamedTuple):
    """How a fleet shares tickets; Tickets describes each."""

    rotation: int = DEFAULT_ROTATION
    grace: float = DEFAULT_GRACE
    for_tls12: bool = False


class TicketOffer(Protocol):
    """A ticket that a client offers on a connection."""

    @property
    def name(self) -> bytes:
        """The server name that the client asks for, in lower case."""

    @property
    def expected(self) -> Expected:
        """The context that the connection is expected to be served by."""


class Tickets:
    """Decides about the tickets of one TLS context; its thread runs from start() on.

    Args:
        store: The store and the namespace, with connections of its own.
        secrets: The secrets, which this keeps up to date.
        recorder: Counts tickets.
        lookups: Makes the claims of tickets that are good for one use.
        lifetime: Seconds that a lineage lives after its full handshake.
        grace: Seconds for which tickets resume without a live stream of removals.
        single_use: Whether a ticket resumes once in the whole fleet.
        for_tls12: Whether connections of TLS 1.2 resume by tickets as well.
        clock: Unix seconds.
        monotonic: Seconds that only go forward.
    """

    def __init__(
        self,
        store: StoreClient,
        secrets: TicketSecrets,
        recorder: Recorder,
        lookups: Lookups,
        *,
        lifetime: int,
        grace: float = DEFAULT_GRACE,
        single_use: bool = False,
        for_tls12: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if grace < 0:
            raise ValueError(f"revocation_grace must be 0 seconds or more, not {grace}")
        if lifetime + secrets.margin > _MAX_REMOVAL_SECONDS:
            raise ValueError(
                f"lifetime and rotation must be {_MAX_REMOVAL_SECONDS} seconds together at most, not {lifetime} and "
                f"{secrets.margin}: the store keeps the removal of a ticket no longer"
            )
        self._store, self._secrets, self._recorder, self._lookups = store, secrets, recorder, lookups
        self.single_use, self.for_tls12 = single_use, for_tls12
        self._lifetime, self._grace, self._clock, self._monotonic = lifetime, grace, clock, monotonic
        self._lineage_keys = StoreKeys(store.namespace, "ticket-lineage")
        self._use_keys = StoreKeys(store.namespace, "ticket-use")
        self.removals = Removals(clock, monotonic)
        self._live_at = float("-inf")  # when the removals were complete
        self._holding_over = False
        self._own: dict[bytes, int] = {}  # the last removals of this process, with their ends
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = threading.Event()
        self._watch: Watch | None = None
        self._failures = 0  # in a row
        self._position = b""  # up to which all removals are applied

    def start(self) -> None:
        """Begin to agree on secrets and to follow the removals, in a thread; again in a forked child."""
        with self._starting:
            if self._thread is None and not self._closed.is_set():
                thread = threading.Thread(target=self._run, name="resumed-tickets", daemon=True)
                with suppress(RuntimeError):  # the system has no thread now: the next handshake tries again
                    thread.start()
                    self._thread = thread

    @property
    def live(self) -> bool:
        """Whether this frontend has all removals up to a moment ago."""
        return self._monotonic() - self._live_at < _STALE_SECONDS

    @property
    def secrets_held(self) -> int:
        """How many secrets may open a ticket."""
        return len(self._secrets.held(self._clock()))

    @property
    def encrypting_secret(self) -> tuple[TicketSecret, bool] | None:
        """The secret that encrypts new tickets, and whether it is held over; None if there is none."""
        return self._secrets.current(self._clock())

    def secret_for_issue(self) -> TicketSecret | None:
        """Return the secret that a new ticket is encrypted with; None if there is none yet."""
        if self._thread is None:
            self.start()
        current = self.encrypting_secret
        if current is None:
            self._recorder.count("tickets_withheld", "no-secret")
            return None
        secret, held_over = current
        if held_over is not self._holding_over:
            self._holding_over = held_over
            if held_over:
                _log.warning(
                    "namespace %s: the store has not answered since the last epoch, its ticket secret stays in use",
                    self._store.namespace,
                )
        return secret

    def secret_for_name(self, name: bytes) -> TicketSecret | None:
        """Return the secret whose keys have a name; None, counted, if there is none."""
        if self._thread is None:
            self.start()
        secret = self._secrets.named(name, self._clock())
        if secret is None:
            self.count_refusal("unknown-secret")
        return secret

    def held_secret(self, name: bytes) -> TicketSecret | None:
        """Return the secret whose keys have a name, without counting; None if there is none."""
        return self._secrets.named(name, self._clock())

    def is_current(self, secret: TicketSecret) -> bool:
        """Return whether new tickets are encrypted with a secret."""
        current = self.encrypting_secret
        return current is not None and current[0] is secret

    def begin(
        self, fingerprint: bytes, name: bytes, negotiated: float | None = None, end: int | None = None
    ) -> TicketState:
        """Return the state of the first ticket of a lineage.

        Args:
            fingerprint: The fingerprint of the context.
            name: The server name that the client asked for, in lower case.
            negotiated: When the full handshake was, in Unix seconds; None for now.
            end: The end of the lineage in Unix seconds, if it is not `lifetime` after that.
        """
        negotiated = self._clock() if negotiated is None else negotiated
        last = int(negotiated + self._lifetime)
        return TicketState(
            fingerprint, os.urandom(LINEAGE_BYTES), negotiated, last if end is None else min(end, last), hash_name(name)
        )

    def limited(self, state: TicketState, secret: TicketSecret, valid: float | None) -> TicketState | None:
        """Return the state of a ticket with the end that it can have; None if that is over.

        Args:
            state: The state of its lineage.
            secret: The secret that it is encrypted with.
            valid: Seconds until the client's certificate ends; None without one.
        """
        now = self._clock()
        end = min(state.end, secret.not_after, *(() if valid is None else (int(now + valid),)))
        if end <= now:
            return None
        return state if end == state.end else state._replace(end=end)

    def count_issue(self) -> None:
        """Note a ticket that was issued."""
        self._recorder.count("tickets_issued", "held-over" if self._holding_over else "current")

    def count_withheld(self) -> None:
        """Note a handshake that gets no ticket, as its session must not be shared."""
        self._recorder.count("tickets_withheld", "unresumable")

    def refusal(self, state: TicketState, offer: TicketOffer) -> str | None:
        """Return why a ticket must not resume, or None.

        Args:
            state: The state in it.
            offer: The connection on which it is offered.
        """
        if state.end <= self._clock():
            return "expired"
        expected = offer.expected
        if state.fingerprint != expected.fingerprint:
            return expected.reason or "context-mismatch"
        if state.server_name != hash_name(offer.name):
            return "server-name-mismatch"
        return self._revocation(state)

    def _revocation(self, state: TicketState) -> str | None:
        """Return why a lineage must not resume any more, or None."""
        if state.negotiated < self.removals.void_before:
            return "purged"
        if self._lineage_keys.key(state.lineage) in self.removals:
            return "revoked"
        if self._monotonic() - self._live_at >= max(self._grace, _STALE_SECONDS):
            return "removals-unknown"
        return None

    def count_refusal(self, reason: str) -> None:
        """Note a ticket of the fleet's form that does not resume."""
        self._recorder.count("tickets_refused", reason)

    def count_use(self, secret: TicketSecret) -> None:
        """Note a ticket that resumes."""
        self._recorder.count("tickets_resumed", self._secrets.describe_epoch(secret, self._clock()))

    def claim(
        self, head: bytes, state: TicketState, handshake: SuspendableHandshake, *, may_suspend: bool
    ) -> Future[LookupResult]:
        """Claim the one use of a ticket; the result has no value, and the reason, if another connection has used it.

        Args:
            head: The first HEAD_BYTES of the ticket.
            state: The state in it.
            handshake: The calls of the handshake so far: a ticket is claimed once in each.
            may_suspend: Whether the handshake can be suspended until the result is there; see its look_up().
        """
        known = handshake.result_for(head)
        if known is not None:
            return known
        secret = self.held_secret(head[:NAME_BYTES])
        if secret is None:  # dropped since it opened the ticket
            return completed_future((None, "unknown-secret"))
        now = self._clock()
        # If a step of the store's clock ends the claim, it has ended the secret before.
        ttl = max(state.end + self._secrets.margin, secret.not_after) - now
        claim = Claim(
            self._use_keys.key(head),
            state.negotiated,
            ttl,
            state.end - now,
            secret.address,
            partial(self._secrets.is_stored_as, secret),
        )
        return handshake.look_up(
            head,
            lambda seconds, blocking: self._lookups.claim(claim, seconds, blocking=blocking),
            may_suspend=may_suspend,
        )

    def remove(self, lineage: bytes, end: int | None = None) -> tuple[bytes, int]:
        """Let no ticket of a lineage resume in this process; return the store key of the removal, and when it may end.

        Args:
            lineage: The id of the lineage.
            end: When it ends, in Unix seconds; None if that is not known.
        """
        now = self._clock()
        end = (int(now) + self._lifetime if end is None else end) + self._secrets.margin
        key = self._lineage_keys.key(lineage)
        self.removals.add(key, max(end - now, 1.0))
        self._own[key] = end
        while len(self._own) > _MAX_OWN_REMOVALS:
            with suppress(KeyError, RuntimeError):  # another thread was quicker
                del self._own[next(iter(self._own))]
        return key, end

    def close(self) -> None:
        """Stop following."""
        self._closed.set()
        watch = self._watch
        if watch is not None:
            watch.cancel()

    def after_fork_in_child(self) -> None:
        """Begin a thread of its own with the next handshake; secrets and removals are still good."""
        self.removals.after_fork_in_child()
        self._reset()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._secrets.step()
                self._follow()
            except StoreError as error:
                self._failures += 1
                if self._failures == _FAILURES_TO_LOG and not self._closed.is_set():  # once per outage
                    _log.warning("namespace %s: removals of tickets are not followed: %s", self._store.namespace, error)
            except Exception:  # noqa: BLE001  # a defect must not end the thread: removals would be lost in silence
                _log.exception("namespace %s: following the removals of tickets failed", self._store.namespace)
            self._closed.wait(_RETRY_SECONDS)
        self._store.close()

    def _follow(self) -> None:
        """Apply the removals until the stream ends."""
        with self._store.watch(self._position, removals_only=True) as watch:
            self._watch = watch
            if self._closed.is_set():  # by a close() that knew of no stream yet
                return
            if not watch.removals_only:
                raise StoreError("the store is too old for tickets: upgrade it before the frontends")
            if self._position and not watch.resumed_from_position:
                self._make_up_for_loss()
            fresh = not watch.resumed_from_position
            for changes, behind, live in watch:
                fresh = fresh and not live
                self._apply(changes, fresh=fresh)
                self._position = behind or self._position
                if live:
                    self._failures = 0  # its end is none: a connection of a certain age gets another server
                    self._live_at = min(watch.confirmed, self._monotonic())
                self._secrets.step()

    def _make_up_for_loss(self) -> None:
        """Send the removals of this process again: the store may have lost them with its storage.

        It may have lost the uses of tickets as well, so tickets of single use are void from here on.
        """
        self._secrets.recheck()
        now = self._clock()
        if self.single_use:
            self.removals.purge(now)
            self._secrets.revoke(lambda _: True)
        removals = [Remove(key, end - now) for key, end in list(self._own.items()) if end > now]
        if removals:
            self._store.batch(removals, deadline=_DEADLINE)

    def _apply(self, changes: list[Change], *, fresh: bool) -> None:
        for change in changes:
            if change.key:
                if change.ttl and not self.removals.add(change.key, change.ttl):
                    _log.warning(
                        "namespace %s: too many removals of tickets, all tickets so far are void", self._store.namespace
                    )
                self._secrets.revoke(lambda secret, key=change.key: secret.address == key)  # type: ignore[misc]
            else:
                self.removals.purge(self._secrets.apply_purge(change, in_snapshot=fresh))
