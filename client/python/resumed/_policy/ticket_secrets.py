"""Agreement on ticket secrets: the frontends of a fleet make one for each epoch, through the store.

Keys of the store are write-once, so of several proposals one wins, and every frontend has that one. Each frontend holds
the secrets of the present epoch, of the next one, and of all earlier ones whose tickets may live.
"""

from __future__ import annotations

import hmac
import logging
import os
import random as random_module
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from resumed._client.store import Get, Put, StoredSession
from resumed._crypto.fleet_key import Secret
from resumed._crypto.sealed_value import seal, unseal
from resumed._crypto.ticket_secret import (
    MAX_GENERATION,
    MAX_ROTATION,
    SECRET_BYTES,
    Epoch,
    TicketSecret,
    address_of,
    epoch_of_name,
)
from resumed._exceptions import AlreadyExists, StoreError, UnsealError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from resumed._client.store import Change, Operation, Result, StoreClient
    from resumed._crypto.fleet_key import FleetKey
    from resumed._crypto.keyring import Keyring

DEFAULT_ROTATION = 3600
"""Default length of an epoch, in seconds."""

_DEADLINE = 1.0
"""Seconds that a call may take; no handshake waits for it."""
_FIRST_RETRY, _LONGEST_RETRY = 0.05, 5.0
"""Seconds after which a call that failed is repeated; twice as long each time in a row, up to the second number."""
_MAX_GENERATIONS = 8
"""How many generations of a secret are tried in a row."""
_MAX_RECHECK_SECONDS = 3600
"""Seconds after which the present secret is compared with the store's; a rotation, if that is shorter."""
_NEXT_WITHIN = 6
"""The next epoch's secret is agreed on in the first sixth of an epoch, so that clocks may differ by the other five."""
_UNKNOWN_NAME_PAUSE = 1.0
"""Least seconds between two look-ups of secrets for names that clients showed."""

_log = logging.getLogger("resumed")


class Address(NamedTuple):
    """What determines the address of a secret in the store."""

    fleet_key: FleetKey
    epoch: Epoch


class TicketSecrets:
    """The secrets that a frontend holds.

    step() is for one thread; the other methods are for any.

    Args:
        store: The store and the namespace.
        keyring: Its first key seals new secrets, every key opens. It must seal.
        lifetime: Seconds that a ticket lives at most, 1 to 604,800.
        rotation: Length of an epoch in seconds, 1 to 604,800.
        restores: Whether the present secret is stored again after the store has lost it. With tickets of a single use
            it must not be: its presence proves that the store has not lost their uses.
        clock: Unix seconds.
        random: Returns a number from 0.0 to 1.0, which spreads the calls of a fleet.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        store: StoreClient,
        keyring: Keyring,
        *,
        lifetime: int = 7200,
        rotation: int = DEFAULT_ROTATION,
        restores: bool = True,
        clock: Callable[[], float] = time.time,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        if not keyring.seals:
            raise ValueError("tickets need a keyring: their secrets must not be readable in the store")
        if not 1 <= rotation <= MAX_ROTATION:
            raise ValueError(f"rotation must be 1 to {MAX_ROTATION} seconds, not {rotation}")
        self._store, self._keyring, self._clock, self._random = store, keyring, clock, random
        self._lifetime, self._rotation, self._restores = int(lifetime), int(rotation), restores
        self.margin = self._rotation
        """Seconds by which the clock of another frontend may be behind, for what must outlive a ticket there."""
        self._by_name: dict[bytes, TicketSecret] = {}
        self._agreed: dict[int, TicketSecret] = {}  # by the start of the epoch
        self._generations: dict[int, int] = {}  # that are to be tried next, by the start of the epoch
        self._loaded = False
        self._next_due: tuple[int, float] = -1, 0.0  # when to agree on the epoch with that start
        self._recheck_at = 0.0
        self._retry, self._retry_at = 0.0, 0.0
        self._unknown_names: list[bytes] = []
        self._look_up_names_at = 0.0

    def current(self, now: float) -> tuple[TicketSecret, bool] | None:
        """Return the secret that encrypts, and whether it is held over from an earlier epoch; None if there is none."""
        start = int(now) // self._rotation * self._rotation
        secret = self._agreed.get(start)
        if secret and now < secret.not_after:
            return secret, False
        earlier = [each for each in list(self._agreed.values()) if each.epoch.start < start and now < each.not_after]
        return (max(earlier, key=lambda each: each.epoch.start), True) if earlier else None

    def named(self, name: bytes, now: float) -> TicketSecret | None:
        """Return the secret whose keys have a name; None if it is not held, or has ended.

        Whether the fleet has named a key that is not held shows without a call; if so, the next step() looks it up.
        """
        secret = self._by_name.get(name)
        if secret:
            return secret if now < secret.not_after else None
        if len(self._unknown_names) < _MAX_GENERATIONS and name not in self._unknown_names and self._address_of(name):
            self._unknown_names.append(name)
        return None

    def held(self, now: float) -> list[TicketSecret]:
        """Return all secrets that may open a ticket, the latest epoch first."""
        secrets = [each for each in list(self._by_name.values()) if now < each.not_after]
        return sorted(secrets, key=lambda each: (each.epoch, each.created), reverse=True)

    def describe_epoch(self, secret: TicketSecret, now: float) -> str:
        """Return the epoch of a secret as seen from now: `next`, `current`, `previous` or `older`."""
        age = (Epoch.at(now, self._rotation).start - secret.epoch.start) // self._rotation
        return "next" if age < 0 else ("current", "previous")[age] if age < 2 else "older"  # noqa: PLR2004

    def step(self) -> float:
        """Do all that is due, and return the seconds until the next step is; a failure is logged, and repeated."""
        now = self._clock()
        self._erase(now)
        if now < self._retry_at:
            return self._retry_at - now
        try:
            self._do_due(now)
            self._retry = 0.0
        except StoreError as error:
            if not self._retry:  # once per outage
                _log.warning("namespace %s: no agreement on ticket secrets: %s", self._store.namespace, error)
            self._retry = min(max(2 * self._retry, _FIRST_RETRY), _LONGEST_RETRY)
            pause = self._retry * (0.5 + self._random() / 2)
            self._retry_at = now + pause
            return pause
        return max(0.0, min(self._due_times()) - self._clock())

    def revoke(self, doomed: Callable[[TicketSecret], bool]) -> None:
        """Drop the secrets for which `doomed` returns True; the next step() loads the others."""
        for secret in [each for each in list(self._by_name.values()) if doomed(each)]:
            self._drop(secret)
            self._loaded = False
            self._generations.clear()  # the same addresses are free again, at all frontends

    def is_stored_as(self, secret: TicketSecret, value: bytes | None) -> bool:
        """Return whether the store's value at the address of a secret is that secret; if not, the next step compares.

        Args:
            secret: A secret.
            value: The value; None if the store has none.
        """
        with suppress(UnsealError):  # without a line in the log, since every handshake may come here
            opened = self._open(Address(secret.fleet_key, secret.epoch), secret.address, value or b"")
            if hmac.compare_digest(opened.secret, secret.secret):
                return True
        self.recheck()
        return False

    def recheck(self) -> None:
        """Compare the present secret with the store's in the next step: the store may have lost its own."""
        self._recheck_at = 0.0

    def apply_purge(self, purge: Change, *, in_snapshot: bool) -> float:
        """Drop the secrets that a purge of the namespace ends; return the time before which all tickets are void.

        Args:
            purge: The purge.
            in_snapshot: Whether it is the last purge, with which a stream begins: later secrets stay.
        """
        before = purge.time if purge.time is not None else purge.purged
        before = self._clock() if before is None else before
        everything = purge.time is None and not in_snapshot
        self.revoke(lambda secret: everything or secret.created < before)
        return before

    def _do_due(self, now: float) -> None:
        present = Epoch.at(now, self._rotation)
        following = present._replace(start=present.start + self._rotation)
        if self._next_due[0] != following.start:
            self._next_due = following.start, present.start + self._random() * self._rotation / _NEXT_WITHIN
        wanted = [present] if present.start not in self._agreed else []
        if following.start not in self._agreed and (not self._loaded or now >= self._next_due[1]):
            wanted.append(following)
        openers = [] if self._loaded else list(self._earlier_addresses(present))
        if wanted or openers:
            self._agree(wanted, openers)
            self._loaded = True
            if present in wanted:
                self._recheck_at = now + self._recheck_seconds()
        elif now >= self._recheck_at:
            self._recheck(self._agreed[present.start])
            self._recheck_at = now + self._recheck_seconds()
        if self._unknown_names and now >= self._look_up_names_at:
            names, self._unknown_names = self._unknown_names, []
            self._look_up_names_at = now + _UNKNOWN_NAME_PAUSE
            found = self._fetch([address for name in names if (address := self._address_of(name))])
            for (_, epoch), secret in found.items():
                own = self._agreed.get(epoch.start)
                if own and own.address == secret.address:  # two frontends proposed it: the store decides
                    self._agreed[epoch.start] = secret

    def _due_times(self) -> Iterable[float]:
        now = self._clock()
        present = Epoch.at(now, self._rotation)
        if present.start not in self._agreed:
            return [now]
        ends = (float(each.not_after) for each in list(self._by_name.values()))
        due = [float(present.start + self._rotation), self._recheck_at, *ends]
        if present.start + self._rotation not in self._agreed:
            due.append(self._next_due[1])
        if self._unknown_names:
            due.append(self._look_up_names_at)
        return due

    def _recheck_seconds(self) -> float:
        return min(self._rotation, _MAX_RECHECK_SECONDS) * (0.5 + self._random() / 2)

    def _earlier_addresses(self, present: Epoch) -> Iterable[Address]:
        """Yield the addresses of secrets that other frontends may have agreed on before this one started."""
        now = self._clock()
        sealing, *others = self._keyring.fleet_keys
        epoch = present
        while epoch.not_after(self._lifetime) > now and epoch.start >= self._rotation:
            for fleet_key in others if epoch == present else (sealing, *others):
                yield Address(fleet_key, epoch)
            epoch = epoch._replace(start=epoch.start - self._rotation)

    def _agree(self, epochs: Sequence[Epoch], openers: Sequence[Address]) -> None:
        """Agree on the secrets of epochs, and load those at further addresses: at most three calls, as a rule."""
        sealing, open_ = self._keyring.fleet_keys[0], {each.start for each in epochs}
        for _ in range(_MAX_GENERATIONS):
            wanted = [
                Address(sealing, each._replace(generation=self._generations.get(each.start, 0)))
                for each in epochs
                if each.start in open_
            ]
            found = self._fetch([*wanted, *openers])
            missing = [each for each in wanted if each not in found]
            proposed = self._propose(missing)
            lost = [each for each in missing if each not in proposed]
            found |= proposed | (self._fetch(lost) if lost else {})
            openers = []
            for address in wanted:
                secret = found.get(address)
                if secret:
                    self._agreed[secret.epoch.start] = secret
                    open_.discard(secret.epoch.start)
                else:
                    self._skip_generation(address)
            if not open_:
                return
        raise StoreError(f"{_MAX_GENERATIONS} values in a row cannot be opened, or were removed")

    def _skip_generation(self, address: Address) -> None:
        """Go on with the next generation: a value cannot be opened, or was removed."""
        epoch = address.epoch
        if epoch.generation == MAX_GENERATION:
            raise StoreError("no generation of the ticket secret is left in this epoch")
        self._generations[epoch.start] = epoch.generation + 1
        _log.warning(
            "namespace %s: generation %d of a ticket secret cannot be opened or was removed, the next one replaces it",
            self._store.namespace,
            epoch.generation,
        )

    def _recheck(self, own: TicketSecret) -> None:
        """Compare a secret with the store's: a failover may have lost it, and an operator may have removed it."""
        address = Address(own.fleet_key, own.epoch)
        found = self._fetch([address]).get(address)
        if found:
            self._agreed[own.epoch.start] = found
        elif not self._restores or address not in self._put([own]):
            self._drop(own)
            self._agree([own.epoch._replace(generation=0)], [])

    def _propose(self, addresses: Sequence[Address]) -> dict[Address, TicketSecret]:
        """Put new secrets, and return those that the store accepted."""
        now = self._clock()
        return self._put(
            [
                TicketSecret(
                    self._store.namespace,
                    *each,
                    Secret(os.urandom(SECRET_BYTES)),
                    now,
                    each.epoch.not_after(self._lifetime),
                )
                for each in addresses
            ]
        )

    def _put(self, secrets: Sequence[TicketSecret]) -> dict[Address, TicketSecret]:
        """Put secrets, and return those that the store accepted."""
        now = self._clock()
        puts = [
            Put(
                each.address,
                seal([each.fleet_key], each.address, each.encode(), each.not_after),
                each.not_after - now,
                each.created,
                pinned=True,
            )
            for each in secrets
        ]
        accepted = {}
        for secret, result in zip(secrets, self._call(puts), strict=True):
            if isinstance(result, AlreadyExists):
                continue
            if isinstance(result, StoreError):
                raise result
            self._by_name[secret.name] = secret
            accepted[Address(secret.fleet_key, secret.epoch)] = secret
        return accepted

    def _fetch(self, addresses: Sequence[Address]) -> dict[Address, TicketSecret]:
        """Get the secrets at addresses, hold those that can be opened, and return them."""
        keys = [address_of(self._store.namespace, *each) for each in addresses]
        found = {}
        for address, key, result in zip(addresses, keys, self._call([Get(key) for key in keys]), strict=True):
            if isinstance(result, StoreError):
                raise result
            if isinstance(result, StoredSession):
                try:
                    secret = self._open(address, key, result.value)
                except UnsealError as error:
                    _log.warning("namespace %s: a ticket secret in the store is %s", self._store.namespace, error)
                    continue
                found[address] = self._by_name.setdefault(secret.name, secret)
        return found

    def _open(self, address: Address, key: bytes, value: bytes) -> TicketSecret:
        """Return the secret in a value of the store; raise UnsealError if it has none."""
        plaintext, not_after = unseal([address.fleet_key], key, value, self._clock())
        return TicketSecret.decode(self._store.namespace, *address, plaintext, not_after)

    def _call(self, operations: Sequence[Operation]) -> list[Result]:
        return self._store.batch(operations, deadline=_DEADLINE) if operations else []

    def _address_of(self, name: bytes) -> Address | None:
        """Return the address of the secret whose keys have a name; None if the fleet has not named them."""
        for fleet_key in self._keyring.fleet_keys:
            epoch = epoch_of_name(self._store.namespace, fleet_key, name)
            if epoch:
                return Address(fleet_key, epoch)
        return None

    def _erase(self, now: float) -> None:
        """Drop the secrets that have ended, and those whose key the keyring has no more: it may be stolen."""
        key_ids = {each.id for each in self._keyring.fleet_keys}
        for secret in list(self._by_name.values()):
            if now >= secret.not_after or secret.fleet_key.id not in key_ids:
                self._drop(secret)
        for start in [each for each in self._generations if each + 2 * self._rotation + self._lifetime <= now]:
            del self._generations[start]

    def _drop(self, secret: TicketSecret) -> None:
        self._by_name.pop(secret.name, None)
        if self._agreed.get(secret.epoch.start) is secret:
            del self._agreed[secret.epoch.start]
