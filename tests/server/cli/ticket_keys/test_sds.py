from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from resumed_server.cli.ticket_keys import sds_pb2 as pb
from resumed_server.cli.ticket_keys.key_set import KeySet
from resumed_server.cli.ticket_keys.sds import (
    SERVICE,
    TYPE_URL,
    DeltaSubscription,
    InvalidSubscription,
    SecretDiscovery,
    Snapshot,
    Subscription,
)
from resumed_server.config.types import Address
from support.ticket_secrets import secret_of
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OLD, NOW, NEXT = (secret_of(number) for number in range(3))
FIRST, SECOND = Snapshot.of(KeySet(NOW, (OLD,))), Snapshot.of(KeySet(NEXT, (NOW, OLD)))
TEMPORARY = Snapshot.of(KeySet(OLD, temporary=True))


def keys_in(packed: Any) -> list[bytes]:
    assert packed.type_url == TYPE_URL
    return [key.inline_bytes for key in pb.Secret.FromString(packed.value).session_ticket_keys.keys]


@pytest.fixture
def rejections() -> list[str]:
    return []


@pytest.fixture
def subscription(rejections: list[str]) -> Subscription:
    return Subscription(("shop", "ticket-keys"), rejections.append)


@pytest.fixture
def delta(rejections: list[str]) -> DeltaSubscription:
    return DeltaSubscription(("shop", "ticket-keys"), rejections.append)


@pytest.mark.parametrize("name", ["shop", "ticket-keys"])
def test_a_subscriber_gets_all_keys_and_the_encrypting_one_first(subscription: Subscription, name: str) -> None:
    subscription.receive(pb.DiscoveryRequest(resource_names=[name], type_url=TYPE_URL))
    response = subscription.respond(FIRST)
    assert response
    (packed,) = response.resources
    assert pb.Secret.FromString(packed.value).name == name
    assert keys_in(packed) == [NOW.openssl, OLD.openssl]
    assert subscription.respond(FIRST) is None


def test_a_change_is_sent_once_and_an_acknowledgement_is_answered_by_nothing(subscription: Subscription) -> None:
    subscription.receive(pb.DiscoveryRequest(resource_names=["shop"]))
    first = subscription.respond(FIRST)
    assert first
    acknowledged = pb.DiscoveryRequest(
        resource_names=["shop"], version_info=first.version_info, response_nonce=first.nonce
    )
    subscription.receive(acknowledged)
    assert subscription.respond(FIRST) is None
    second = subscription.respond(SECOND)
    assert second
    assert second.version_info != first.version_info
    assert second.nonce != first.nonce


def test_before_there_are_keys_nothing_is_sent(subscription: Subscription) -> None:
    subscription.receive(pb.DiscoveryRequest(resource_names=["shop"]))
    assert subscription.respond(None) is None


def test_a_rejection_is_noted_and_the_same_keys_are_not_sent_again(
    subscription: Subscription, rejections: list[str]
) -> None:
    subscription.receive(pb.DiscoveryRequest(resource_names=["shop"]))
    first = subscription.respond(FIRST)
    assert first
    rejected = pb.DiscoveryRequest(resource_names=["shop"], response_nonce=first.nonce)
    rejected.error_detail.message = "wrong length"
    subscription.receive(rejected)
    assert rejections == ["wrong length"]
    assert subscription.respond(FIRST) is None
    assert subscription.respond(SECOND)


def test_a_request_about_an_earlier_response_changes_nothing(subscription: Subscription, rejections: list[str]) -> None:
    subscription.receive(pb.DiscoveryRequest(resource_names=["shop"]))
    first = subscription.respond(FIRST)
    assert first
    assert subscription.respond(SECOND)
    stale = pb.DiscoveryRequest(response_nonce=first.nonce)
    stale.error_detail.message = "late"
    subscription.receive(stale)
    assert not rejections
    assert subscription.respond(FIRST), "the subscription was lost"


def test_further_names_are_answered_and_no_names_end_the_subscription(subscription: Subscription) -> None:
    subscription.receive(pb.DiscoveryRequest(resource_names=["shop"]))
    first = subscription.respond(FIRST)
    assert first
    subscription.receive(pb.DiscoveryRequest(resource_names=["shop", "ticket-keys"], response_nonce=first.nonce))
    second = subscription.respond(FIRST)
    assert second
    assert len(second.resources) == 2
    subscription.receive(pb.DiscoveryRequest(response_nonce=second.nonce))
    assert subscription.respond(SECOND) is None


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (pb.DiscoveryRequest(resource_names=["server_cert"]), "no secret 'server_cert'.*'shop' or 'ticket-keys'"),
        (pb.DiscoveryRequest(type_url="type.googleapis.com/other"), "only secrets"),
    ],
)
def test_other_secrets_are_refused_with_the_names_that_exist(
    subscription: Subscription, request_: pb.DiscoveryRequest, problem: str
) -> None:
    with pytest.raises(InvalidSubscription, match=problem):
        subscription.receive(request_)


def test_a_temporary_key_is_for_subscribers_that_have_none(subscription: Subscription) -> None:
    subscription.receive(pb.DiscoveryRequest(resource_names=["shop"], version_info="before"))
    assert subscription.respond(TEMPORARY) is None
    assert subscription.respond(FIRST)
    assert subscription.respond(TEMPORARY), "all keys have ended"


def test_an_incremental_subscriber_gets_keys_and_changes(delta: DeltaSubscription, rejections: list[str]) -> None:
    delta.receive(pb.DeltaDiscoveryRequest(type_url=TYPE_URL, resource_names_subscribe=["shop"]))
    first = delta.respond(FIRST)
    assert first
    (resource,) = first.resources
    assert (resource.name, keys_in(resource.resource)) == ("shop", [NOW.openssl, OLD.openssl])
    delta.receive(pb.DeltaDiscoveryRequest(response_nonce=first.nonce))
    assert delta.respond(FIRST) is None
    second = delta.respond(SECOND)
    assert second
    rejected = pb.DeltaDiscoveryRequest(response_nonce=second.nonce)
    rejected.error_detail.message = "wrong length"
    delta.receive(rejected)
    assert rejections == ["wrong length"]
    delta.receive(pb.DeltaDiscoveryRequest(resource_names_unsubscribe=["shop"]))
    assert delta.respond(FIRST) is None


def test_an_incremental_subscriber_with_keys_gets_no_temporary_one(delta: DeltaSubscription) -> None:
    delta.receive(
        pb.DeltaDiscoveryRequest(resource_names_subscribe=["shop"], initial_resource_versions={"shop": "before"})
    )
    assert delta.respond(TEMPORARY) is None
    assert delta.respond(FIRST)


def test_incremental_subscriptions_to_other_secrets_are_refused(delta: DeltaSubscription) -> None:
    with pytest.raises(InvalidSubscription, match="no secret 'server_cert'"):
        delta.receive(pb.DeltaDiscoveryRequest(resource_names_subscribe=["server_cert"]))


@pytest.fixture
def discovery(tmp_path: Path) -> Iterator[SecretDiscovery]:
    discovery = SecretDiscovery(Address(path=str(tmp_path / "sds")), "shop")
    yield discovery
    discovery.close()


@pytest.fixture
def channel(tmp_path: Path, discovery: SecretDiscovery) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{tmp_path}/sds") as channel:
        yield channel


def subscribe(channel: grpc.Channel, name: str) -> Any:
    stream = channel.stream_stream(
        f"/{SERVICE}/StreamSecrets", pb.DiscoveryRequest.SerializeToString, pb.DiscoveryResponse.FromString
    )
    return stream(iter([pb.DiscoveryRequest(resource_names=[name])]), timeout=30)


def test_a_stream_is_counted_until_it_ends(discovery: SecretDiscovery, channel: grpc.Channel) -> None:
    ended = threading.Event()

    def requests() -> Iterator[pb.DiscoveryRequest]:
        yield pb.DiscoveryRequest(resource_names=["shop"])
        ended.wait(30)

    discovery.publish(KeySet(NOW, (OLD,)))
    stream = channel.stream_stream(
        f"/{SERVICE}/StreamSecrets", pb.DiscoveryRequest.SerializeToString, pb.DiscoveryResponse.FromString
    )
    call: Any = stream(requests(), timeout=30)
    assert keys_in(next(call).resources[0]) == [NOW.openssl, OLD.openssl]
    assert discovery.streams == 1
    discovery.publish(KeySet(NEXT, (NOW, OLD)))
    assert keys_in(next(call).resources[0]) == [NEXT.openssl, NOW.openssl, OLD.openssl]
    call.cancel()
    ended.set()
    until(lambda: discovery.streams == 0)


def test_a_stream_for_another_secret_ends_with_the_reason(discovery: SecretDiscovery, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        next(subscribe(channel, "server_cert"))
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "there is no secret 'server_cert'" in error.details()
