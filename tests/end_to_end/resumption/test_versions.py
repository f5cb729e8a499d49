"""Frontends and servers of different versions work together in every order of upgrades: docs/upgrading.md."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import resumed
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.other_version import other_version
from support.tls import PATIENCE, STACKS, Frontend, Mirrored
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.server import RunningServer
    from support.tls import Client


@pytest.fixture(scope="module")
def targets(store: RunningServer) -> Iterator[dict[str, str]]:
    """The store as itself, and as it is behind another version."""
    with (
        other_version("older", store.target) as older,
        other_version("stored", store.target) as stored,
        other_version("newer", store.target) as newer,
    ):
        yield {"older": older, "stored": stored, "newer": newer, "as it is": store.target}


@pytest.fixture
def namespace() -> str:
    return os.urandom(8).hex()


@pytest.fixture
def fleet(targets: dict[str, str], keyring: resumed.Keyring, namespace: str) -> Callable[..., Any]:
    """Make a frontend of a namespace whose server has another version."""

    def frontend(kind: Any, stack: str, version: str, **options: Any) -> Any:
        return kind(stack, targets[version], keyring, namespace=namespace, **options)

    return frontend


@pytest.mark.parametrize("version", ["older", "stored", "newer"])
def test_frontends_resume_with_a_store_of_any_version(fleet: Callable[..., Any], client: Client, version: str) -> None:
    frontends = [fleet(Frontend, stack, each, mirror=True) for stack in STACKS for each in (version, "as it is")]
    sessions = [client.visit(frontend).session for frontend in frontends]
    assert all(frontend.shim.flush(PATIENCE) for frontend in frontends)
    for number, frontend in enumerate(frontends):
        assert client.visit(frontend, sessions[number - 1]).reused
    assert not any(Counter(frontend.shim.stats.misses) for frontend in frontends)
    assert not any(frontend.shim.breaker_open for frontend in frontends)


@pytest.mark.parametrize("version", ["older", "stored", "newer"])
def test_removed_and_taken_sessions_stay_away(fleet: Callable[..., Any], client: Client, version: str) -> None:
    frontends = [fleet(Frontend, "ssl", each, single_use=True) for each in (version, "as it is")]
    session = client.visit(frontends[0]).session
    assert frontends[0].shim.flush(PATIENCE)
    assert [client.visit(each, session).reused for each in (*frontends, *frontends)] == [True, False, False, False]


def test_a_mirror_of_a_newer_store_takes_what_it_knows_of(fleet: Callable[..., Any], client: Client) -> None:
    mirrored, other = fleet(Mirrored, "pyopenssl", "newer"), fleet(Frontend, "ssl", "as it is")
    session = client.visit(other).session
    assert other.shim.flush(PATIENCE)
    until(lambda: len(mirrored.mirror.sessions))
    assert client.visit(mirrored, session).reused
    assert mirrored.shim.stats.hits == {"mirror": 1}


def test_a_purge_ends_the_sessions_of_older_frontends(
    fleet: Callable[..., Any], client: Client, targets: dict[str, str], namespace: str
) -> None:
    """Their Puts carry no issue time, so the time of arrival counts."""
    frontends = [fleet(Frontend, "ssl", each) for each in ("older", "as it is")]
    session = client.visit(frontends[0]).session
    assert frontends[0].shim.flush(PATIENCE)
    with resumed.Admin(targets["as it is"], deadline=PATIENCE) as admin:
        admin.purge(namespace)
    assert not any(client.visit(frontend, session).reused for frontend in frontends)


def test_an_older_store_says_that_it_has_no_purges(targets: dict[str, str]) -> None:
    with (
        resumed.Admin(targets["older"], deadline=PATIENCE) as admin,
        pytest.raises(resumed.StoreError, match="UNIMPLEMENTED") as refused,
    ):
        admin.purge("shop")
    assert not isinstance(refused.value, resumed.StoreUnavailable)


def watched(target: str, namespace: str, *, removals_only: bool = True) -> Iterator[pb.WatchResponse]:
    """Yield the responses of a stream at a store."""
    request = pb.WatchRequest(namespace=namespace, removals_only=removals_only)
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield from SessionStoreServiceStub(channel).Watch(request, timeout=PATIENCE)


def remove_for(target: str, namespace: str, key: bytes) -> None:
    """Make a lasting removal."""
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = pb.RemoveRequest(namespace=namespace, key=key)
        request.ttl.seconds = 600
        SessionStoreServiceStub(channel).Remove(request, timeout=PATIENCE)


def test_an_older_store_does_not_confirm_a_stream_of_removals(targets: dict[str, str], namespace: str) -> None:
    """It is live at once, as a stream of all changes. Lasting removals are removals there."""
    stream = watched(targets["stored"], namespace)
    first = next(stream)
    assert (first.removals_only, first.live) == (False, True)
    remove_for(targets["stored"], namespace, b"k")
    (event,) = next(response.events for response in stream if response.events)
    assert event.removed == pb.SessionRemoved(key=b"k")


def test_a_newer_store_serves_a_stream_of_removals(targets: dict[str, str], namespace: str) -> None:
    remove_for(targets["newer"], namespace, b"k")
    stream = watched(targets["newer"], namespace)
    assert next(stream).removals_only
    (event,) = next(response.events for response in stream if response.events)
    assert event.removed.ttl.seconds > 0


def test_a_mirror_of_an_older_frontend_follows_lasting_removals(
    fleet: Callable[..., Any], client: Client, targets: dict[str, str], namespace: str
) -> None:
    """To it they are removals like any other."""
    mirrored, other = fleet(Mirrored, "ssl", "stored"), fleet(Frontend, "ssl", "as it is")
    stream = watched(targets["as it is"], namespace, removals_only=False)
    assert next(stream).live
    session = client.visit(other).session
    assert other.shim.flush(PATIENCE)
    until(lambda: len(mirrored.mirror.sessions))
    for event in next(response.events for response in stream if response.events):
        remove_for(targets["as it is"], namespace, event.stored.key)
    until(lambda: not len(mirrored.mirror.sessions))
    assert not client.visit(mirrored, session).reused


def test_an_operation_of_a_newer_client_fails_alone(targets: dict[str, str], namespace: str) -> None:
    put = pb.BatchOperation(put=pb.PutRequest(namespace=namespace, key=b"k", value=b"v"))
    put.put.ttl.seconds = 60
    to_come = pb.BatchOperation.FromString(b"\xc2\x3e\x05later")
    get = pb.BatchOperation(get=pb.GetRequest(namespace=namespace, key=b"k"))
    with grpc.insecure_channel(targets["as it is"], options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        results = SessionStoreServiceStub(channel).Batch(pb.BatchRequest(operations=[put, to_come, get])).results
    assert results[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert results[2].get.session.value == b"v"
