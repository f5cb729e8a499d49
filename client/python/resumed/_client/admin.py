"""The operations of operators: purge a namespace, and count its sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from resumed._client.store import parse_response, seconds_of, time_of
from resumed._transport.channel import Channel, Method
from resumed.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self

    from resumed._transport.tls import Credentials

_SERVICE = "/resumed.v1.AdminService/"
_PURGE, _STATS = (Method(_SERVICE + name, repeatable=True) for name in ("Purge", "Stats"))


class NamespaceStats(NamedTuple):
    """The content of a namespace."""

    sessions: int
    """Sessions that a look-up would return."""
    value_bytes: int
    """Bytes of their values, without keys and the overhead of the engine."""
    tombstones: int
    """Keys that refuse a Put, since their session was removed or taken."""
    purged: int
    """Sessions that were purged and are not deleted yet."""
    issued_before: float | None
    """No session from before this time (Unix seconds) is returned any more; None without a purge in the last week."""


class Admin:
    """The operators' side of the store at `target`. Thread-safe.

    Args:
        target: Where the store is, as a gRPC name: `dns:///store:7400`, `127.0.0.1:7400`, `unix:/run/resumed.sock`.
        deadline: Seconds that a call may take. Counting a million sessions takes some.
        credentials: For TLS to the store; None for plaintext.

    Raises ValueError for a malformed target. Every call raises StoreUnavailable when the store does not answer in time
    or cannot serve, InvalidRequest for a namespace or time outside its limits, and StoreError for what else it refuses:
    most often, that the caller has no grant for it.
    """

    PURGE_SECONDS: ClassVar[float] = 4.0
    """Seconds after the answer to a purge in which a mirror may still resume a purged session; without a mirror 0."""

    def __init__(self, target: str, *, deadline: float = 60.0, credentials: Credentials | None = None) -> None:
        self.target = target
        self.deadline = deadline
        self._channel = Channel(target, credentials)

    def __enter__(self) -> Self:
        """Do nothing: it connects when it is first used."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def purge(self, namespace: str, issued_before: float | None = None) -> float:
        """See to it that no session of a namespace that was issued before a time ever resumes again.

        Args:
            namespace: The namespace.
            issued_before: The time, in Unix seconds; None for now, by the store's clock.

        Returns:
            The time up to which the namespace is purged: the later one of this purge and earlier purges.
            Look-ups go by it when this returns; mirrors within 4 seconds. After an error, purge again.
        """
        request = pb.PurgeRequest(namespace=namespace)
        if issued_before is not None:
            request.issued_before_time.FromMicroseconds(int(issued_before * 1e6))
        answer = self._channel.call(_PURGE, request.SerializeToString(), self.deadline)
        return seconds_of(parse_response(pb.PurgeResponse, answer).issued_before_time)

    def stats(self, namespace: str | None = None) -> dict[str, NamespaceStats]:
        """Count what there is of a namespace, or (None) of each in which there is something."""
        request = pb.StatsRequest(namespace=namespace or "")
        stats: dict[str, NamespaceStats] = {}
        while True:
            encoded = self._channel.call(_STATS, request.SerializeToString(), self.deadline)
            answer = parse_response(pb.StatsResponse, encoded)
            stats |= {each.namespace: _stats(each) for each in answer.namespaces}
            # In the order of the names, so that a faulty store cannot make this loop endless.
            if answer.next_page_token <= request.page_token:
                return stats
            request.page_token = answer.next_page_token

    def close(self) -> None:
        """Close the connections; the next call opens another one."""
        self._channel.close()


def _stats(stats: pb.NamespaceStats) -> NamespaceStats:
    return NamespaceStats(
        stats.session_count,
        stats.value_bytes,
        stats.tombstone_count,
        stats.purged_count,
        time_of(stats, "issued_before_time"),
    )
