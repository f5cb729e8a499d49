"""The Lua scripts of the Redis engine compile, document their arguments, and agree with the constants in Python."""

from __future__ import annotations

import hashlib
import re

import pytest

from resumed_server.storage.engine import LONGEST_TTL_SECONDS, UNKNOWN_TOMBSTONE_SECONDS
from resumed_server.storage.redis.admission import EPOCH_DIGITS, TIME_DIGITS
from resumed_server.storage.redis.change_log import KEPT_SECONDS
from resumed_server.storage.redis.script_loader import SCRIPTS, load_script
from support.redis import redis_server, valkey_server

NAMES = sorted(path.name.removesuffix(".lua") for path in SCRIPTS.iterdir() if path.name.endswith(".lua"))
INCLUDES = sorted(path.name for path in (SCRIPTS / "include").iterdir())


@pytest.mark.parametrize("running", [redis_server, valkey_server])
def test_every_script_compiles(running: object) -> None:
    with running() as server:  # type: ignore[operator]
        for name in NAMES:
            for cluster in (False, True):
                script = load_script(name, cluster=cluster)
                assert server.client.script_load(script) == hashlib.sha1(script.encode()).hexdigest(), name


@pytest.mark.parametrize("name", NAMES)
def test_every_script_says_what_it_takes_and_returns(name: str) -> None:
    text = (SCRIPTS / f"{name}.lua").read_text()
    assert text.startswith("#!lua")
    for part in ("KEYS:", "ARGV:", "Returns:"):
        assert re.search(rf"^-- .*{part}", text, re.MULTILINE), part


def test_every_function_that_is_shared_is_used_once_in_a_script() -> None:
    """A second copy would cost each new connection its bytes; one without a user would cost a reader their time."""
    texts = [load_script(name, cluster=cluster) for name in NAMES for cluster in (False, True)]
    assert all(text.count("local function latest") <= 1 for text in texts)
    for include in INCLUDES:
        body = [line for line in (SCRIPTS / "include" / include).read_text().splitlines() if line[:2] not in {"--", ""}]
        assert any(body[0] in text for text in texts), include


def test_no_comment_is_sent_to_redis() -> None:
    assert not [name for name in NAMES if re.search("^--|^$", load_script(name), re.MULTILINE)]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("include/marks.lua", f"TIME_DIGITS, EPOCH_DIGITS = {TIME_DIGITS}, {EPOCH_DIGITS}"),
        ("put.lua", f"LONGEST_TTL_MICROSECONDS = {LONGEST_TTL_SECONDS:.0f}e6"),
        ("set_purge.lua", f"LONGEST_TTL_MILLISECONDS = {LONGEST_TTL_SECONDS * 1_000:.0f}"),
        ("last_purge.lua", f"LONGEST_TTL_MILLISECONDS = {LONGEST_TTL_SECONDS * 1_000:.0f}"),
        ("remove.lua", f"UNKNOWN_TOMBSTONE_MILLISECONDS = {UNKNOWN_TOMBSTONE_SECONDS * 1_000:.0f}"),
        ("log_end.lua", f"HEARTBEAT_MILLISECONDS, KEPT_MILLISECONDS = 1000, {KEPT_SECONDS * 1_000}"),
    ],
)
def test_the_constants_of_a_script_are_those_of_python(file: str, expected: str) -> None:
    assert f"local {expected}\n" in SCRIPTS.joinpath(*file.split("/")).read_text()
