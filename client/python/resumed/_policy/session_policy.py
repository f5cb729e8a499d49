"""Session policy: the decisions of each session callback of a TLS server, without TLS and without ctypes.

The rules:
- A handshake never waits for the store beyond the deadline, and not at all while the store keeps failing.
- Nothing is raised. A call that fails means no resumption, and nothing else.
- Ids come from a peer and values from the store: neither is trusted.
- A session resumes only in the context that negotiated it: docs/contexts.md.
- A session's lifetime counts from its negotiation. Resuming or storing it again never prolongs it.
- Ids, keys and sessions appear in no log.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, Protocol

from resumed._async.suspendable_handshake import SuspendableHandshake
from resumed._crypto.envelope import Envelope
from resumed._crypto.origin import CURRENT_PROCESS
from resumed._crypto.session_id import ID_BYTES
from resumed._crypto.store_key import StoreKeys
from resumed._crypto.ticket_state import LINEAGE_BYTES
from resumed._exceptions import UnsealError
from resumed._policy.circuit_breaker import Breaker
from resumed._policy.lookups import Lookups, completed_future, result_or_late
from resumed._policy.prober import Prober
from resumed._policy.removal import Removal
from resumed._policy.stats import Recorder, Stats
from resumed._policy.ticket_secrets import TicketSecrets
from resumed._policy.tickets import Tickets
from resumed._policy.write_queue import PendingWrite, WriteQueue
from resumed._process.fork import register_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from concurrent.futures import Future

    from resumed._client.store import StoreClient
    from resumed._crypto.keyring import Keyring
    from resumed._policy.lookups import Accept, LookupResult
    from resumed._policy.mirror import Mirror
    from resumed._policy.served_names import Expected
    from resumed._policy.tickets import TicketOptions
    from resumed._tracing import LookupSpans

MAX_LIFETIME = 7 * 24 * 3600
"""Seconds that a session may live at most (RFC 8446 section 4.6.1)."""

SSL_R_UNEXPECTED_EOF_WHILE_READING = 294
"""OpenSSL's reason when the peer ended the connection without close_notify."""

_log = logging.getLogger("resumed")

_FRESH_SECONDS = 10
"""Seconds after its issue in which an id that the store does not have is looked up again: its Put may be on its way."""
_IDS = 8
"""How many ids are issued at once; those not used within the second are thrown away."""
_MOST_RELATED = 16_384
"""Of how many sessions a process remembers which others their connections have."""
_NO_IDS: tuple[int, list[bytes]] = 0, []


class Offer(Protocol):
    """A session that a client offers on a connection, as the TLS library shows it."""

    @property
    def session_id(self) -> bytes:
        """The id of the session: any bytes at all."""

    @property
    def expected(self) -> Expected:
        """The context that the connection is expected to be served by."""

    def check(self, envelope: Envelope) -> None:
        """Raise UnsealError if the session may not resume; from any thread."""

    def decode(self, envelope: Envelope, remaining: float) -> int:
        """Return the session, with that many seconds of its life left; raise UnsealError if it may not resume."""


class SessionPolicy:
    """Decides for one TLS context; called by its Binding.

    Args:
        store: The store, with the deadline of a look-up.
        keyring: Seals and opens values and ids.
        lifetime: Seconds that a session lives after its negotiation, 1 to 604,800.
        single_use: Whether a session resumes once in the whole fleet: it is taken once it is known to fit.
        accept_foreign_ids: Whether ids that the fleet did not issue are looked up, too.
        puts: `wait` holds a full handshake until its sessions are stored (at most for the deadline), `background` does
            not.
        max_lookups: How many look-ups may be under way at once; beyond that a handshake does not call the store.
        mirror: Searched before the store is called.
        tickets: How the fleet shares tickets; None if it only stores sessions.
        spans: Makes a span of each look-up.
        clock: Unix seconds.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        store: StoreClient,
        keyring: Keyring,
        *,
        lifetime: int = 7200,
        single_use: bool = False,
        accept_foreign_ids: bool = False,
        puts: Literal["wait", "background"] | None = None,
        max_lookups: int = 64,
        mirror: Mirror | None = None,
        tickets: TicketOptions | None = None,
        spans: LookupSpans | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 1 <= lifetime <= MAX_LIFETIME:
            raise ValueError(f"lifetime must be 1 to {MAX_LIFETIME} seconds, not {lifetime}")
        if puts not in ("wait", "background", None):
            raise ValueError(f"puts must be 'wait' or 'background', not {puts!r}")
        if store.deadline <= 0:
            raise ValueError(f"deadline must be above 0 seconds, not {store.deadline}")
        self.namespace = store.namespace
        self.lifetime = int(lifetime)
        self.seals_ids = keyring.seals
        self._store, self._keyring, self._clock = store, keyring, clock
        self._rejects_foreign_ids = keyring.seals and not accept_foreign_ids
        # Only a sealed id shows that it is new, and so that its Put may still be on its way.
        self._wait_for_puts = puts == "wait" or (puts is None and not keyring.seals)
        # With single use only the store can decide which frontend gets a session.
        self._mirror = None if single_use else mirror
        self._spans = spans
        self._store_keys = StoreKeys(store.namespace)
        self._recorder = Recorder()
        self._breaker = Breaker()
        self._prober = Prober(store, self._breaker)
        self._write_queue = WriteQueue(store, self._recorder, clock, keyring.seal, self._breaker.record_rate_limited)
        self._lookups = Lookups(
            store,
            self._breaker,
            self._recorder,
            self._prober.start,
            single_use=single_use,
            max_concurrent=max_lookups,
            mirror=self._mirror,
        )
        self.tickets = self._make_tickets(tickets, single_use=single_use) if tickets else None
        self._families: dict[bytes, Collection[bytes]] = {}  # the last sessions with others of the same connections
        self._ids = _NO_IDS  # issued in that second, for handshakes to come
        register_after_fork(self)

    def _make_tickets(self, options: TicketOptions, *, single_use: bool) -> Tickets:
        store = self._store.separate()  # which its thread closes when it ends
        secrets = TicketSecrets(
            store,
            self._keyring,
            lifetime=self.lifetime,
            rotation=options.rotation,
            restores=not single_use,
            clock=self._clock,
        )
        return Tickets(
            store,
            secrets,
            self._recorder,
            self._lookups,
            lifetime=self.lifetime,
            grace=options.grace,
            single_use=single_use,
            for_tls12=options.for_tls12,
            clock=self._clock,
        )

    @property
    def stats(self) -> Stats:
        """What happened so far in this process."""
        return self._recorder.snapshot()

    @property
    def mirror_live(self) -> bool | None:
        """Whether the mirror is up to date; None if there is none."""
        return self._mirror.live if self._mirror else None

    @property
    def keyring_last_reload(self) -> tuple[bool, float] | None:
        """See Keyring.last_reload."""
        return self._keyring.last_reload

    @property
    def breaker_open(self) -> bool:
        """Whether the store kept failing, so that handshakes do not call it at present."""
        return not self._breaker.closed

    def now(self) -> float:
        """Return the present, in Unix seconds."""
        return self._clock()

    def issue_id(self, *, resumed: bool = False) -> bytes:
        """Return the id for a session about to be negotiated.

        Args:
            resumed: Whether it follows another session, of a client that the store has served. Otherwise, while a limit
                of the store is used up, the id is expired from the start: no frontend of the fleet looks it up, and
                on_new_session() does not store the session.
        """
        if not resumed and self.seals_ids and self._breaker.scarce:
            # Not random: a frontend that looks foreign ids up would call the store for it.
            return self._keyring.issue_id(self.namespace, 0)
        second = int(self._clock())
        issued, ids = self._ids
        if issued == second:
            with suppress(IndexError):
                return ids.pop()
        # Many take hardly longer than one: between two handshakes its code and data leave the processor's caches.
        ids = [self._keyring.issue_id(self.namespace, second, CURRENT_PROCESS.nonce()) for _ in range(_IDS)]
        self._ids = second, ids[1:]
        return ids[0]

    def on_new_session(
        self, session_id: bytes, envelope: Envelope, remaining: float, *, last: bool, family: Collection[bytes] = ()
    ) -> None:
        """Store a session that a handshake has just negotiated.

        Args:
            session_id: Its id.
            envelope: The session, with its context and the time of its full handshake.
            remaining: Seconds of its life.
            last: Whether no further ticket of the same handshake follows.
            family: With the last one, the ids of all sessions of the connection, for remove().
        """
        remaining = min(remaining, self.lifetime)
        if remaining <= 0:
            self.count_unresumable()
            return
        if self.seals_ids and not CURRENT_PROCESS.is_own(session_id):
            self._recorder.count("puts", "dropped")  # no frontend would look it up
            return
        for each in family:
            self._families[each] = family
        while len(self._families) > _MOST_RELATED:
            with suppress(KeyError, RuntimeError):  # another thread was quicker
                del self._families[next(iter(self._families))]
        key, not_after = self._store_keys.key(session_id), int(self._clock() + remaining)
        wait = self._wait_for_puts and last
        number = self._write_queue.submit(
            PendingWrite(key, envelope.encode(), not_after, "", envelope.issued), urgent=wait, more=not last
        )
        # After a call that failed, which may have been this handshake's look-up, a handshake does not wait once more.
        if wait and self._breaker.last_call_succeeded and self._write_queue.last_batch_succeeded:
            self._write_queue.wait(number, self._store.deadline)

    def count_unresumable(self) -> None:
        """Note a session that cannot be resumed from the store, and so is not stored."""
        self._recorder.count("puts", "unresumable")

    def find(self, offer: Offer, handshake: SuspendableHandshake, *, may_suspend: bool = False) -> Future[LookupResult]:
        """Return the sealed value of a session that a client offers: that of the handshake, the mirror or the store.

        Args:
            offer: The session, and what may resume on the connection.
            handshake: The look-ups of the handshake so far; the store is not called again for their ids.
            may_suspend: Whether the handshake can be suspended until the result is there; see its look_up().
        """
        known = handshake.result_for(offer.session_id)
        if known is not None:
            return known
        key, now = self._store_keys.key(offer.session_id), self._clock()
        if self._write_queue.is_removed(key):
            return completed_future((None, "unknown"))
        # An id in the mirror is the fleet's: to open it first would only take time.
        mirrored = self._mirror.get(key) if self._mirror else None
        if mirrored is not None:
            return completed_future((mirrored, "mirror"))
        issued = self._keyring.open_id(self.namespace, offer.session_id)
        refusal = self._refusal(offer, issued, now)
        if refusal is not None:
            return completed_future((None, refusal))
        accept, fresh = self._acceptance(key, offer), _is_fresh(issued, now)
        return handshake.look_up(
            offer.session_id,
            lambda seconds, blocking: self._lookups.start(key, accept, seconds, fresh=fresh, blocking=blocking),
            may_suspend=may_suspend,
        )

    def handshake(
        self, find_resume_callback: Callable[[], Callable[[], None] | None] = lambda: None
    ) -> SuspendableHandshake:
        """Return an object that keeps the look-ups of one handshake; see there."""
        return SuspendableHandshake(self._store.deadline, find_resume_callback)

    def on_get_session(self, offer: Offer, handshake: SuspendableHandshake) -> int | None:
        """Return the session that a client offers, or None to make a full handshake.

        Args:
            offer: The session, and what may resume on the connection.
            handshake: The results of its look-ups so far; the store is not called again for their ids.
        """
        if self._spans:
            with self._spans.look_up() as ended:
                session, reason = self._look_up(offer, handshake)
                ended(session is not None, reason)
        else:
            session, reason = self._look_up(offer, handshake)
        if not handshake.is_first(offer.session_id):
            return session
        self._recorder.count("misses" if session is None else "hits", reason)
        if session is not None and self.seals_ids and not CURRENT_PROCESS.is_own(offer.session_id):
            self._recorder.count("foreign_hits", reason)
        return session

    def _look_up(self, offer: Offer, handshake: SuspendableHandshake) -> tuple[int | None, str]:
        """Return the session of look_up(), and the reason."""
        value, outcome = result_or_late(self.find(offer, handshake), 0)
        if value is None:
            return None, outcome
        key = self._store_keys.key(offer.session_id)
        if self._write_queue.is_removed(key):  # since it was found
            return None, "unknown"
        try:
            envelope, remaining = self._opened(key, value, offer.expected)
            return offer.decode(envelope, remaining), outcome
        except UnsealError as error:
            return None, error.reason

    def _opened(self, key: bytes, value: bytes, expected: Expected) -> tuple[Envelope, float]:
        """Return an envelope and its remaining lifetime; raise UnsealError if it is of another context."""
        now = self._clock()
        plaintext, not_after = self._keyring.open(key, value, now)
        envelope = Envelope.decode(plaintext)
        if envelope.fingerprint != expected.fingerprint:
            raise UnsealError(expected.reason or "context-mismatch")
        return envelope, not_after - now

    def _acceptance(self, key: bytes, offer: Offer) -> Accept:
        def accept(value: bytes) -> str | None:
            try:
                offer.check(self._opened(key, value, offer.expected)[0])
            except UnsealError as error:
                return error.reason
            return None

        return accept

    def count_termination(self) -> None:
        """Note a resumed connection that was ended, since the context that served was not the session's."""
        self._recorder.count("terminations", "context-mismatch")

    def on_connection_failed(self, session_ids: Iterable[bytes], reason: int, end: int | None = None) -> None:
        """Decide about the sessions of a connection that ended without our close_notify.

        Args:
            session_ids: Ids of all sessions that the connection negotiated or resumed, or of its tickets' lineage.
            reason: The reason code of the last error in OpenSSL's queue, 0 if there is none.
            end: The end of that lineage, in Unix seconds.

        A connection that was cut says nothing against its session (RFC 5246 section 7.2.1); after a fatal alert, sent
        or received, it must not be resumed (section 7.2.2).
        """
        if reason in (0, SSL_R_UNEXPECTED_EOF_WHILE_READING):
            self._recorder.count("removals", "kept")
            return
        for session_id in session_ids:
            self._remove(session_id, "fatal-error", end=end)

    def remove(self, session_ids: Collection[bytes]) -> Removal:
        """Remove sessions from the whole fleet, in the background; none of them resumes in this process any more.

        With them go the other sessions of their connections that this process knows of.
        """
        ids = dict.fromkeys(
            each for session_id in session_ids for each in (session_id, *self._families.get(session_id, ()))
        )
        removal = Removal(len(ids))
        for session_id in ids:
            self._remove(session_id, "application", removal.report)
        return removal

    def _remove(
        self,
        session_id: bytes,
        reason: str,
        report: Callable[[bool], None] | None = None,
        end: int | None = None,
    ) -> None:
        if self.tickets and len(session_id) == LINEAGE_BYTES:
            key, end = self.tickets.remove(session_id, end)
            self._write_queue.submit(PendingWrite(key, None, end, reason, report=report, lasting=True))
            return
        key = self._store_keys.key(session_id)
        if self._mirror:
            self._mirror.sessions.remove(key)
        self._lookups.forget(key)
        self._write_queue.submit(PendingWrite(key, None, 0, reason, report=report))

    def count_internal_error(self) -> None:
        """Note a defect that a callback caught; called while the exception is handled."""
        self._recorder.count("misses", "internal-error")
        # Source lines only: a traceback shows no values.
        _log.exception("a session callback failed; the handshake goes on without resumption")

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait until all Puts and removals so far are sent; see WriteQueue."""
        return self._write_queue.flush(timeout)

    def close(self, timeout: float = 1.0) -> None:
        """Wait up to `timeout` seconds until all is sent, then disconnect; nothing more is stored or removed."""
        if self._mirror:
            self._mirror.close()
        if self.tickets:
            self.tickets.close()
        self._prober.close()
        self._write_queue.close(timeout)
        self._lookups.close()

    def after_fork_in_child(self) -> None:
        """Issue ids of its own, and count from zero."""
        self._recorder.after_fork_in_child()
        self._ids = _NO_IDS

    def _refusal(self, offer: Offer, issued: int | None, now: float) -> str | None:
        """Return why an offer is not worth a call, or None."""
        if not 1 <= len(offer.session_id) <= ID_BYTES or (issued is None and self._rejects_foreign_ids):
            return "foreign-id"
        if issued is not None and now - issued > self.lifetime:
            return "expired-id"
        return offer.expected.reason or None


def _is_fresh(issued: int | None, now: float) -> bool:
    # With a clock that is behind, ids of other frontends are from the future, and stay so.
    return issued is not None and abs(now - issued) <= _FRESH_SECONDS
