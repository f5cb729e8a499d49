"""The contract builds from this tree, suits all languages, and agrees with the server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodOptions

from resumed.v1 import admin_pb2, session_store_pb2
from resumed_server.rpc import status, validation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import MethodDescriptor

ROOT = Path(__file__).parents[3]
FILES = (session_store_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR)
IDEMPOTENCY: Any = MethodOptions.IdempotencyLevel


def methods() -> Iterator[MethodDescriptor]:
    """Yield all methods of the contract."""
    for file in FILES:
        for each in file.services_by_name.values():
            yield from each.methods


def test_the_contract_builds_from_this_tree_alone(tmp_path: Path) -> None:
    """In a fresh clone, without generated files or a network: with buf, and with the include path of protoc."""
    for name in ("protos", "buf.yaml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    buf = Path(sys.executable).with_name("buf")
    for arguments in ((), ("protos",)):
        built = tmp_path / "contract.binpb"
        subprocess.run([buf, "build", *arguments, "--output", built], cwd=tmp_path, check=True)
        files = {each.name for each in FileDescriptorSet.FromString(built.read_bytes()).file}
        assert {"resumed/v1/session_store.proto", "resumed/v1/admin.proto", "google/rpc/status.proto"} <= files


def test_methods_declare_whether_they_may_be_repeated() -> None:
    """A Batch may contain a Take."""
    assert {each.name: IDEMPOTENCY.Name(each.GetOptions().idempotency_level) for each in methods()} == {
        "Put": "IDEMPOTENT",
        "Get": "NO_SIDE_EFFECTS",
        "Take": "IDEMPOTENCY_UNKNOWN",
        "Remove": "IDEMPOTENT",
        "Batch": "IDEMPOTENCY_UNKNOWN",
        "Watch": "NO_SIDE_EFFECTS",
        "Purge": "IDEMPOTENT",
        "Stats": "NO_SIDE_EFFECTS",
    }


def test_the_service_config_retries_repeatable_methods_and_names_every_method() -> None:
    """A stream reconnects with a position instead."""
    retried = {}
    for config in json.loads((ROOT / "protos/service_config.json").read_text())["methodConfig"]:
        for name in config["name"]:
            retried[f"{name['service']}.{name['method']}"] = "retryPolicy" in config
    repeatable = {
        each.full_name: bool(each.GetOptions().idempotency_level) and not each.server_streaming for each in methods()
    }
    assert retried == repeatable


def test_limits_json_has_the_limits_of_the_server() -> None:
    assert json.loads((ROOT / "protos/vectors/limits.json").read_text()) == {
        "namespace": {"pattern": validation.is_namespace.__self__.pattern},  # type: ignore[attr-defined]
        "key": {"min_bytes": 1, "max_bytes": validation.MAX_KEY},
        "value": {"min_bytes": 1, "max_bytes": validation.MAX_VALUE},
        "pinned_value": {"min_bytes": 1, "max_bytes": validation.MAX_PINNED_VALUE},
        "ttl": {"above_nanoseconds": 0, "at_most_seconds": validation.MAX_SECONDS},
        "issue_time": {"from_unix_seconds": 0, "to_unix_seconds": validation.LAST_SECOND},
        "operations": {"min_items": 1, "max_items": validation.MAX_OPERATIONS},
        "position": {"max_bytes": validation.MAX_POSITION},
        "page_size": {"min": 0, "max_effective": validation.MAX_PAGE_SIZE},
        "page_token": {"max_bytes": validation.MAX_PAGE_TOKEN},
        "request": {"max_bytes": validation.MAX_MESSAGE},
    }


def test_the_server_sends_every_reason_of_the_contract() -> None:
    sent = {answer.reason for answer in status._MAPPINGS.values()} | {status._INTERNAL.reason}
    assert sent == set(session_store_pb2.ErrorReason.values())
    sources = (ROOT / "protos/resumed/v1/session_store.proto").read_text()
    assert sources.count(f'"domain": "{status.DOMAIN}"') == len(sent) - 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_message_is_nested(file: Any) -> None:
    """In some languages, generated code would give a nested message the name of a case of a oneof."""
    assert not [each.full_name for each in file.message_types_by_name.values() if each.nested_types]
